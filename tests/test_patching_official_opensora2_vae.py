# SPDX-License-Identifier: Apache-2.0
"""Rules for Open-Sora 2.0's VAE, on networks of our own with the same structure and the same results."""

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
from vidkernels.patching.rules import official_opensora2_vae as rules

pytest.importorskip("diffusers", minversion="0.42")
toys = pytest.importorskip("official_opensora2_vae_toys")
_CONTAINERS = ("ChannelChunkConv3d", "DownsampleCausal3D", "DownEncoderBlockCausal3D", "UpDecoderBlockCausal3D")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    layers = {digest(getattr(toys, name).forward) for name in _CONTAINERS}
    monkeypatch.setattr(_vae_memory, "_LAYERS", layers)
    yield from knowing(rules.RULES, toys)


class TestVae(OfficialVaeSuite):
    rules = {  # noqa: RUF012
        "opensora2_vae.encoder": 1,
        "opensora2_vae.decoder": 1,
        "opensora2_vae.mid_block": 2,
        "opensora2_vae.resnet": 13,
        "opensora2_vae.upsample": 2,
        "opensora2_vae.conv": 36,
    }
    sizes = ((1, 5, 16, 16), (2, 7, 8, 12), (1, 1, 8, 8))
    wrapped = "decoder.up_blocks.1.resnets.0.conv1.conv"
    hooked = (
        *("encoder.conv_in", "encoder.down_blocks.1", "encoder.down_blocks.1.downsamplers.0.conv.conv"),
        *(
            "decoder.mid_block.attentions.0.to_q",
            "decoder.mid_block.resnets.1.norm2",
            "decoder.up_blocks.0.upsamplers.0",
        ),
        *("decoder.up_blocks.1.resnets.0.conv_shortcut", "decoder.conv_act"),
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


@pytest.mark.parametrize("attention", [True, False])
def test_the_mask_is_made_only_where_somebody_reads_it(attention: bool) -> None:
    torch.manual_seed(0)
    model, z, made = busy(toys.AutoencoderKLCausal3D(attention=attention)), torch.randn(2, 4, 3, 4, 4), []
    upstream = toys.DecoderCausal3D.prepare_attention_mask
    with torch.no_grad():
        expected = model.decode(z)
        vidkernels.patch(model)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(toys._Network, "prepare_attention_mask", lambda *a: made.append(1) or upstream(*a))
            torch.testing.assert_close(model.decode(z), expected, atol=2e-5, rtol=1e-4)
            assert not made
            hook = model.decoder.mid_block.register_forward_pre_hook(lambda module, call: None)
            torch.testing.assert_close(model.decode(z), expected, atol=2e-5, rtol=1e-4)
            hook.remove()
            vidkernels.unpatch(model.decoder.mid_block)
            torch.testing.assert_close(model.decode(z), expected, atol=2e-5, rtol=1e-4)
            assert len(made) == (2 if attention else 0)


def test_a_middle_block_obeys_the_mask_that_it_is_given() -> None:
    torch.manual_seed(0)
    block, x = busy(toys.UNetMidBlockCausal3D(8, 4)), torch.randn(2, 8, 3, 2, 2)
    mask = torch.zeros(2, 12, 12).masked_fill(torch.rand(2, 12, 12) < 0.3, -torch.inf)
    mask[:, range(12), range(12)] = 0
    with torch.no_grad():
        expected = [block(x, given) for given in (mask, None)]
        vidkernels.patch(block)
        actual = [block(x, given) for given in (mask, None)]
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(*actual, atol=1e-3)
    assert not vidkernels.status(block).fallbacks


def test_checkpointing_gives_the_same_gradients() -> None:
    model, x = busy(toys.AutoencoderKLCausal3D()), torch.randn(1, 3, 5, 8, 8)
    vidkernels.patch(model, mode="training")
    found = []
    for checked in (False, True):
        for module in model.modules():
            module.grad_checkpointing = checked
        given = x.clone().requires_grad_()
        model.decode(model.encode(given).chunk(2, 1)[0]).square().sum().backward()
        found.append(given.grad)
    assert torch.equal(*found)


def test_dropout_and_half_precision_decoders() -> None:
    """Dropout drops, and the decoder goes on in the dtype of its upper blocks."""
    block, x = toys.ResnetBlockCausal3D(8, 8, 4, dropout=0.5).train(), torch.randn(1, 8, 3, 4, 4)
    vidkernels.patch(block, mode="training")
    assert not torch.equal(block(x), block(x))
    decoder, z = busy(toys.AutoencoderKLCausal3D()).decoder, torch.randn(1, 4, 2, 4, 4)
    decoder.up_blocks.bfloat16()
    decoder.conv_norm_out.bfloat16()
    decoder.conv_out.bfloat16()
    with torch.no_grad():
        expected = decoder(z)
        vidkernels.patch(decoder)
        assert decoder(z).dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(decoder(z), expected, atol=0.1, rtol=0.1)


def test_what_is_left_to_the_original() -> None:
    assert "its activation is ReLU" in vidkernels.explain(toys.ResnetBlockCausal3D(8, 8, 4, act=nn.ReLU)).details()
    assert "divided by 2.0" in vidkernels.explain(toys.ResnetBlockCausal3D(8, 8, 4, 2.0)).details()
    assert "pads by mode reflect" in vidkernels.explain(toys.CausalConv3d(4, 4, pad_mode="reflect")).details()
    assert "2.0, 2, 2" in vidkernels.explain(toys.UpsampleCausal3D(4, (2.0, 2, 2))).details()


@pytest.mark.parametrize(
    ("path", "attribute", "value"),
    [
        ("resnets.0", "output_scale_factor", 2.0),
        ("resnets.0.conv1", "pad_mode", "reflect"),
        ("resnets.0.conv1", "time_causal_padding", (1, 1, 1, 1, 1, 1)),
        ("resnets.1.conv2.conv", "dilation", (1, 1, 1)),
        ("attentions.0", "rescale_output_factor", 2.0),
        ("attentions.0", "processor", None),
    ],
)
def test_changes_on_a_patched_model(path: str, attribute: str, value: Any) -> None:
    torch.manual_seed(0)
    block, x = busy(toys.UNetMidBlockCausal3D(8, 4)), torch.randn(1, 8, 3, 4, 4)
    patched = copy.deepcopy(block)
    vidkernels.patch(patched)
    mask = toys._Network().prepare_attention_mask(x)
    for model in (block, patched):
        target = model.get_submodule(path)
        setattr(target, attribute, Doubled(target.processor) if value is None else value)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", VidkernelsFallbackWarning)
        torch.testing.assert_close(patched(x, mask), block(x, mask), atol=2e-5, rtol=1e-4)


class Doubled:
    """An attention processor of somebody's own."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, *call: Any, **options: Any) -> Tensor:
        return 2 * self.inner(*call, **options)


def test_activation_changed_after_patching() -> None:
    """Another activation has its effect: the original code calls it."""
    network = busy(toys.AutoencoderKLCausal3D()).encoder
    patched, x = copy.deepcopy(network), torch.randn(1, 3, 3, 8, 8)
    vidkernels.patch(patched)
    for model in (network, patched):
        model.conv_act = nn.GELU()
    with torch.no_grad(), pytest.warns(VidkernelsFallbackWarning, match="GELU"):
        torch.testing.assert_close(patched(x), network(x), atol=2e-5, rtol=1e-4)
