# SPDX-License-Identifier: Apache-2.0
"""Rules for the VAE in HunyuanVideo's own files, on networks of our own with the same structure and the same results."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

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
from vidkernels.patching.rules import official_hunyuan_vae as rules

pytest.importorskip("diffusers", minversion="0.42")
toys = pytest.importorskip("official_hunyuan_vae_toys")
_CONTAINERS = ("DownsampleCausal3D", "DownEncoderBlockCausal3D", "UpDecoderBlockCausal3D")
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    layers = {digest(getattr(toys, name).forward) for name in _CONTAINERS}
    monkeypatch.setattr(_vae_memory, "_LAYERS", layers)
    yield from knowing(rules.RULES, toys)


class TestVae(OfficialVaeSuite):
    rules = {  # noqa: RUF012
        "hunyuan_vae.encoder": 1,
        "hunyuan_vae.decoder": 1,
        "hunyuan_vae.mid_block": 2,
        "hunyuan_vae.resnet": 13,
        "hunyuan_vae.upsample": 2,
        "hunyuan_vae.conv": 36,
    }
    sizes = ((1, 5, 16, 16), (2, 7, 8, 12), (1, 1, 8, 8))
    wrapped = "decoder.up_blocks.1.resnets.0.conv1.conv"
    hooked = (
        *("encoder.conv_in", "encoder.down_blocks.1", "encoder.down_blocks.1.downsamplers.0.conv.conv"),
        *("decoder.mid_block.attentions.0.to_q", "decoder.mid_block.resnets.1.norm2", "decoder.mid_block.attentions.0"),
        *("decoder.up_blocks.0.upsamplers.0", "decoder.up_blocks.1.resnets.0.conv_shortcut", "decoder.conv_act"),
    )

    def build(self) -> Any:
        return toys.AutoencoderKLCausal3D()

    def smallest(self) -> Any:
        return busy(toys.AutoencoderKLCausal3D((8, 8, 8)))

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encode(x)

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return model.decode(z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles(dtype: torch.dtype) -> None:
    """Blended in place, as upstream does: no tile lies in another's memory."""
    torch.manual_seed(0)
    model = busy(toys.AutoencoderKLCausal3D()).to(dtype)
    model.tile = 4
    models = copy.deepcopy(model), model, copy.deepcopy(model).double()
    vidkernels.patch(model)
    with torch.no_grad():
        check_call(lambda m, z: m.decode(z), models, torch.randn(1, 4, 6, 2, 3, dtype=dtype), "decode")
    assert not vidkernels.status(model).fallbacks


def test_the_mask_is_made_only_where_the_attention_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, z, made = busy(toys.AutoencoderKLCausal3D()), torch.randn(2, 4, 3, 4, 4), []
    upstream = toys.prepare_causal_attention_mask
    with torch.no_grad():
        expected = model.decode(z)
        vidkernels.patch(model)
        monkeypatch.setattr(toys, "prepare_causal_attention_mask", lambda *a: made.append(1) or upstream(*a))
        torch.testing.assert_close(model.decode(z), expected, **CLOSE)
        assert not made
        model.decoder.mid_block.attentions[0].register_forward_pre_hook(lambda module, call: None)
        with pytest.warns(VidkernelsFallbackWarning, match="Attention has hooks"):
            torch.testing.assert_close(model.decode(z), expected, **CLOSE)
        assert made


def test_checkpointing_gives_the_same_gradients() -> None:
    model, z = busy(toys.AutoencoderKLCausal3D()), torch.randn(1, 4, 2, 2, 2)
    vidkernels.patch(model, mode="training")
    model.train()
    found = []
    for model.decoder.gradient_checkpointing in (False, True):
        given = z.clone().requires_grad_()
        model.decode(given).square().sum().backward()
        found.append(given.grad)
    assert torch.equal(*found)


def test_an_embedding_goes_to_the_original() -> None:
    """To a middle block and to a decoder, whose blocks add it as it is, or project it."""
    torch.manual_seed(0)
    block, x, embedding = busy(toys.UNetMidBlockCausal3D(8, 4)), torch.randn(2, 8, 3, 2, 2), torch.randn(2, 8)
    with torch.no_grad():
        expected = block(x, embedding), block(x, None)
        vidkernels.patch(block)
        assert block(x).equal(block(x, None))
        with pytest.warns(VidkernelsFallbackWarning, match="an embedding is given"):
            torch.testing.assert_close((block(x, embedding), block(x)), expected, **CLOSE)
        assert not torch.allclose(*expected, atol=1e-3)
        decoder, z = busy(toys.AutoencoderKLCausal3D((8, 8, 8))).decoder, torch.randn(2, 4, 1, 2, 2)
        expected = decoder(z, embedding)
        vidkernels.patch(decoder)
        with pytest.warns(VidkernelsFallbackWarning, match="an embedding is given"):
            torch.testing.assert_close(decoder(z, latent_embeds=embedding), expected, **CLOSE)


def test_what_is_left_to_the_original() -> None:
    details = [
        vidkernels.explain(module).details()
        for module in (
            toys.ResnetBlockCausal3D(8, 8, 4, act=nn.ReLU),
            toys.ResnetBlockCausal3D(8, 8, 4, 2.0),
            toys.ResnetBlockCausal3D(8, 8, 4, embedding=8),
            toys.ResnetBlockCausal3D(8, 8, 4, up=True),
            toys.CausalConv3d(4, 4, pad_mode="reflect"),
            toys.UpsampleCausal3D(4, (2.0, 2, 2)),
        )
    ]
    reasons = ("its activation is ReLU", "divided by 2.0", "projects a time embedding", "samples up or down")
    for text, reason in zip(details, (*reasons, "pads by mode reflect", "2.0, 2, 2"), strict=True):
        assert reason in text, text


class SpatialNorm(nn.GroupNorm):
    """A norm that reads an embedding, by its name."""


def test_norms_that_read_an_embedding() -> None:
    decoder = busy(toys.AutoencoderKLCausal3D((8, 8, 8))).decoder
    decoder.conv_norm_out = SpatialNorm(4, 8)
    decoder.up_blocks[0].resnets[0].norm1 = SpatialNorm(4, 8)
    details = vidkernels.explain(decoder).details()
    assert details.count("its norms read an embedding (SpatialNorm)") == 2, details


@pytest.mark.parametrize(
    ("path", "attribute", "value"),
    [
        ("mid_block.resnets.0", "output_scale_factor", 2.0),
        ("mid_block.resnets.0", "upsample", toys.UpsampleCausal3D(8, (1, 2, 2), use_conv=False)),
        ("mid_block.attentions.0", "rescale_output_factor", 2.0),
        ("up_blocks.0.upsamplers.0", "interpolate", False),
        ("up_blocks.0.upsamplers.0", "use_conv", False),
        ("up_blocks.0.upsamplers.0.conv", "pad_mode", "constant"),
        ("up_blocks.0.upsamplers.0.conv", "time_causal_padding", (1, 1, 1, 1, 1, 1)),
    ],
)
def test_changes_on_a_patched_model(path: str, attribute: str, value: Any) -> None:
    torch.manual_seed(0)
    decoder, z = busy(toys.AutoencoderKLCausal3D((8, 8, 8))).decoder, torch.randn(1, 4, 2, 2, 2)
    patched = copy.deepcopy(decoder)
    vidkernels.patch(patched)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", VidkernelsFallbackWarning)
        before = decoder(z)
        for model in (decoder, patched):
            setattr(model.get_submodule(path), attribute, value)
        expected = decoder(z)
        torch.testing.assert_close(patched(z), expected, **CLOSE)
    assert expected.shape != before.shape or not torch.allclose(expected, before, atol=1e-3)
