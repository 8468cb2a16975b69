# SPDX-License-Identifier: Apache-2.0
"""Rules for Open-Sora-Plan's causal VAEs, on networks of our own with the same structure and the same results."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import official_opensora_plan_toys as toys
import pytest
import torch
from official_vae_suite import OfficialVaeSuite, busy, knowing
from patching_suite import no_fallback  # noqa: F401
from torch import Tensor, nn
from vae_cases import check_call

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import digest
from vidkernels.patching.rules import _vae_memory
from vidkernels.patching.rules import official_opensora_plan_vae as rules


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in rules._INNER:
        inner = getattr(toys, name).forward.__closure__[0].cell_contents
        monkeypatch.setitem(rules._INNER, name, (digest(inner),))
    monkeypatch.setattr(_vae_memory, "_FRAMEWISE", {digest(toys.Conv2d.forward)})
    yield from knowing(rules.RULES, toys)


def calls(module: Any, x: Tensor) -> Tensor:
    return module(x)


class _Suite(OfficialVaeSuite):
    version: str
    sizes = ((1, 5, 16, 24), (2, 3, 8, 12), (1, 1, 8, 8), (2, 9, 8, 8))
    wrapped = "decoder.up.0.block.0.conv1.conv"

    def build(self) -> Any:
        return toys.CausalVAEModel(self.version)

    def smallest(self) -> Any:
        return busy(toys.CausalVAEModel(self.version, blocks=1))

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encode(x)

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return model.decode(z)

    def test_bfloat16(self) -> None:
        """torch has no means over frames in bfloat16 on a CPU, which encoders of 1.0 and 1.1 take."""
        model = self.ready().bfloat16()
        models = copy.deepcopy(model), model, copy.deepcopy(model).double()
        vidkernels.patch(model)
        with torch.no_grad():
            check_call(self.decode, models, torch.randn(1, 4, 3, 4, 6).bfloat16(), "decode")


_EVERYWHERE = {"opensora_plan_vae.encoder": 1, "opensora_plan_vae.decoder": 1}


class TestVersion10(_Suite):
    version = "1.0"
    rules = _EVERYWHERE | {
        "opensora_plan_vae.block": 16,
        "opensora_plan_vae.mixed_attention": 2,
        "opensora_plan_vae.space_down": 2,
        "opensora_plan_vae.space_up": 2,
        "opensora_plan_vae.time_down": 1,
        "opensora_plan_vae.time_up": 1,
        "opensora_plan_vae.causal_conv": 52,
    }
    hooked = (
        *("encoder", "encoder.down.1.block.0", "encoder.down.1.block.0.nin_shortcut", "encoder.down.1.time_downsample"),
        *(
            "encoder.down.1.time_downsample.conv",
            "encoder.mid.attn_1",
            "encoder.norm_out",
            "decoder.up.2.time_upsample",
            "decoder.up.1.upsample.conv",
        ),
        *("decoder.mid.attn_1.q", "decoder.conv_out"),
    )


class TestVersion11(_Suite):
    version = "1.1"
    rules = _EVERYWHERE | {
        "opensora_plan_vae.block": 12,
        "opensora_plan_vae.frame_block": 4,
        "opensora_plan_vae.attention": 2,
        "opensora_plan_vae.frame_down": 2,
        "opensora_plan_vae.space_up": 2,
        "opensora_plan_vae.blended_down": 1,
        "opensora_plan_vae.blended_up": 1,
        "opensora_plan_vae.causal_conv": 41,
    }
    hooked = (
        *("encoder.conv_in", "encoder.down.1.block.0", "encoder.down.1.time_downsample", "encoder.down.0.downsample"),
        *("encoder.down.1.time_downsample.avg_pool", "decoder.up.2.time_upsample", "decoder.up.2.time_upsample.conv"),
        "decoder.mid.attn_1.norm",
    )


class TestVersion12(_Suite):
    version = "1.2"
    rules = _EVERYWHERE | {
        "opensora_plan_vae.block": 12,
        "opensora_plan_vae.frame_block": 4,
        "opensora_plan_vae.attention": 2,
        "opensora_plan_vae.frame_down": 1,
        "opensora_plan_vae.down": 1,
        "opensora_plan_vae.space_up": 1,
        "opensora_plan_vae.up": 1,
        "opensora_plan_vae.causal_conv": 41,
    }
    hooked = ("encoder.down.1.downsample", "decoder.up.2.upsample", "decoder.up.2.upsample.conv")


def with_steps(width: int) -> nn.Module:
    module = toys.Spatial2xTime2x3DUpsample(width)
    module.t_interpolation = "trilinear"
    return module


LAYERS = {
    "frame up": toys.Upsample,
    "frame down": toys.Downsample,
    "no frame down": lambda width: toys.Downsample(width, undown=True),
    "no space up": lambda width: toys.SpatialUpsample2x(width, unup=True),
    "space down": toys.Spatial2x3DDownsample,
    "space up": toys.Spatial2x3DUpsample,
    "up in steps": with_steps,
    "wide shortcut": lambda width: toys.ResnetBlock3D((width, 12), conv_shortcut=True),
    "wide shortcut of frames": lambda width: toys.ResnetBlock2D((width, 12), conv_shortcut=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_other_configurations(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for size in ((2, 8, 4, 5, 7), (1, 8, 1, 4, 4)):
            module, x = busy(LAYERS[name](8)).to(dtype), torch.randn(size).to(dtype)
            models = copy.deepcopy(module), module, copy.deepcopy(module).double()
            assert len(vidkernels.patch(module).patched) >= 1
            with torch.no_grad():
                check_call(calls, models, x, name)
            assert not vidkernels.status(module).fallbacks


def test_attention_in_levels_and_dropout() -> None:
    model, x = busy(toys.CausalVAEModel("1.2", dropout=0.5, attends=True)), torch.randn(1, 3, 5, 16, 16)
    models = copy.deepcopy(model), model, copy.deepcopy(model).double()
    vidkernels.patch(model)
    with torch.no_grad():
        z = check_call(lambda m, x: m.encode(x), models, x, "encode").chunk(2, 1)[0].contiguous()
        check_call(lambda m, z: m.decode(z), models, z, "decode")
        model.train()
        torch.manual_seed(0)
        first = model.encode(x)
        torch.manual_seed(0)
        assert torch.equal(model.encode(x), first)
        assert not torch.equal(model.encode(x), first)
    assert not vidkernels.status(model).fallbacks


def test_a_tensor_kept_by_earlier_versions_runs_the_original() -> None:
    model, x = busy(toys.ResnetBlock3D((8, 8))), torch.randn(1, 8, 4, 4, 4)
    with torch.no_grad():
        expected = model(x)
        vidkernels.patch(model)
        for conv in (model.conv1, model.conv2):
            del conv.__dict__["is_first_chunk"]
            conv.enable_cached = True
        assert model._reason(x) == "a convolution keeps frames for the next chunk"
        for conv in (model.conv1, model.conv2):
            conv.is_first_chunk, conv.enable_cached = False, False
        assert model._reason(x) == "a convolution has kept no frames of the chunk before"
        for conv in (model.conv1, model.conv2):
            conv.is_first_chunk = True
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    assert not vidkernels.status(model).fallbacks


def test_what_is_left_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = toys.CausalVAEModel("1.1").encoder
    encoder.down[-1].downsample = toys.Downsample(16)
    assert "whose result upstream drops" in vidkernels.explain(encoder).details()
    block = toys.ResnetBlock3D((8, 8))
    block.norm1 = nn.Identity()
    assert "its norm is a Identity, neither GroupNorm" in vidkernels.explain(block).details()
    sampler = with_steps(8)
    sampler.t_interpolation = "nearest"
    assert "it interpolates frames by nearest" in vidkernels.explain(sampler).details()
    monkeypatch.setitem(rules._INNER, "Downsample", ("0" * 16,))
    assert "what its forward calls for frames has digest" in vidkernels.explain(toys.Downsample(8)).details()
    conv, x = toys.CausalConv3d(8, 8, padding=1), torch.randn(1, 8, 3, 4, 4)
    with torch.no_grad():
        expected = conv(x)
        vidkernels.patch(conv)
        monkeypatch.setattr(toys, "npu_config", SimpleNamespace(on_npu=True))
        with pytest.warns(VidkernelsFallbackWarning, match="NPU"):
            assert torch.equal(conv(x), expected)
