# SPDX-License-Identifier: Apache-2.0
"""Rules for Open-Sora 1.3's VAE, on networks of our own with the same structure and the same results."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import official_opensora13_vae_toys as toys
import pytest
import torch
from official_vae_suite import OfficialVaeSuite, busy, knowing
from patching_suite import no_fallback  # noqa: F401
from torch import Tensor, nn
from vae_cases import check_call

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import digest
from vidkernels.patching.rules import _opensora_plan_units as plan_units
from vidkernels.patching.rules import _vae_memory
from vidkernels.patching.rules import official_opensora13_vae as rules


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in rules._INNER:
        monkeypatch.setitem(rules._INNER, name, (digest(plan_units.inner_function(getattr(toys, name))),))
    monkeypatch.setattr(_vae_memory, "_LAYERS", {digest(toys.Downsample3D.forward)})
    yield from knowing(rules.RULES, toys)


class TestVae(OfficialVaeSuite):
    rules = {  # noqa: RUF012
        "opensora13_vae.encoder": 1,
        "opensora13_vae.decoder": 1,
        "opensora13_vae.block": 10,
        "opensora13_vae.attention": 2,
        "opensora13_vae.frame_down": 1,
        "opensora13_vae.frame_up": 1,
        "opensora13_vae.up": 1,
        "opensora13_vae.up_block": 1,
        "opensora13_vae.conv": 36,
    }
    sizes = ((1, 5, 8, 16), (2, 4, 8, 12), (1, 1, 8, 8))
    wrapped = "decoder.up.1.block.0.conv1.conv"
    hooked = (
        *("encoder.conv_in", "encoder.down.0.downsample.conv", "encoder.down.1.downsample", "encoder.mid.attn_1.q"),
        *("decoder.mid.block_1.conv1", "decoder.up.2.upsample.conv3d.conv1.conv", "decoder.up.1.upsample"),
    )

    def build(self) -> Any:
        return toys.OpenSoraVAE()

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encoder(x)

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return model.decoder(z)


def alone(module: Any, x: Tensor) -> None:
    """A patched module against the original and float64."""
    models = copy.deepcopy(module), module, copy.deepcopy(module).double()
    vidkernels.patch(module)
    with torch.no_grad():
        check_call(lambda m, x: m(x), models, x, type(module).__name__)
    assert not vidkernels.status(module).fallbacks


def test_shortcuts_and_factors() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 4, 5)
    for module in (toys.Resnet3DBlock(8, 16, conv_shortcut=True), toys.Upsample3D(8, 3), toys.Res3DBlockUpsample(8)):
        alone(busy(module), x)


def test_dropout_drops() -> None:
    block, x = toys.Resnet3DBlock(8, 8, dropout=0.5).train(), torch.randn(1, 8, 3, 4, 4)
    vidkernels.patch(block, mode="training")
    assert not torch.equal(block(x, is_training=True), block(x, is_training=True))


def test_what_is_left_to_the_original() -> None:
    assert (
        "pads by mode replicate" in vidkernels.explain(toys.CausalConv3dPlainAR(4, 4, pad_mode="replicate")).details()
    )
    assert "it has no convolution" in vidkernels.explain(toys.Downsample2D(4, with_conv=False)).details()


@pytest.mark.parametrize(
    ("path", "attribute", "value"),
    [
        ("mid.block_1.conv1", "pad_mode", "replicate"),
        ("mid.block_1.conv2", "time_causal_padding", (1, 1, 1, 1, 1, 1)),
        ("mid.block_2", "dropout", nn.Hardtanh(0, 0.1)),
        ("up.2.upsample.conv3d", "act", nn.ReLU()),
        ("up.2.upsample", "scale_factor", 1),
        ("up.1.upsample.conv", "padding_mode", "circular"),
        ("", "time_causal_padding", (1, 1, 1, 1, 1, 1)),
        ("", "temporal_downsample", 3),
    ],
)
def test_changes_on_a_patched_model(path: str, attribute: str, value: Any) -> None:
    torch.manual_seed(0)
    decoder, z = busy(toys.OpenSoraVAE()).decoder, torch.randn(1, 4, 3, 4, 4)
    patched = copy.deepcopy(decoder)
    vidkernels.patch(patched)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", VidkernelsFallbackWarning)
        before = patched(z)
        for model in (decoder, patched):
            setattr(model.get_submodule(path), attribute, value)
        torch.testing.assert_close(patched(z), decoder(z), atol=2e-5, rtol=1e-4)
        after = decoder(z)
        assert after.shape != before.shape or not torch.allclose(after, before, atol=1e-4)
