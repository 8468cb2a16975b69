# SPDX-License-Identifier: Apache-2.0
"""Rules for VQGAN's and latent diffusion's autoencoders, on networks of our own with the same structure and results."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import official_vqgan_toys as toys
import pytest
import torch
from official_image_suite import OfficialImageSuite
from official_vae_suite import busy, knowing
from patching_suite import no_fallback  # noqa: F401
from test_patching_vae_memory import peak
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from vae_cases import check_call

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import _rule as table
from vidkernels.patching.rules import official_vqgan


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """Without the second rule for attention, which is the first one's for another text."""
    rules = [rule for rule in official_vqgan.RULES if rule.name != "vqgan.fused_attention"]
    yield from knowing(rules, toys)


class TestAutoencoder(OfficialImageSuite):
    rules = {
        "vqgan.encoder": 1,
        "vqgan.decoder": 1,
        "vqgan.block": 6 + 2 + 9 + 2,
        "vqgan.attention": 2 + 1 + 3 + 1,
        "vqgan.upsample": 2,
        "vqgan.downsample": 2,
    }
    sizes = ((1, 16, 12), (3, 9, 11), (2, 8, 8))
    hooked = (
        *("encoder", "encoder.conv_in", "encoder.down.0.block.1", "encoder.down.1.downsample", "encoder.norm_out"),
        *("encoder.mid.block_1.conv1", "encoder.mid.attn_1", "encoder.down.2.block.0.nin_shortcut"),
        *("encoder.mid.block_2.norm2", "decoder.up.1.upsample", "decoder.up.2.upsample.conv", "decoder.mid.attn_1.k"),
        *("decoder.up.0.block.0.dropout", "decoder.conv_out"),
    )
    wrapped = "decoder.up.0.block.1.conv2"

    def build(self) -> Any:
        return toys.Autoencoder()

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encoder(x)

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return model.decoder(z)


def same(model: Any, *arguments: Any) -> Any:
    """A module gives what it gave before it was patched, to rounding."""
    model = busy(model)
    models = copy.deepcopy(model), model, copy.deepcopy(model).double()
    assert vidkernels.patch(model).patched
    with torch.no_grad():
        x = torch.randn(2, 4, 3, 5) if isinstance(model, toys.Decoder) else torch.randn(2, 8, 3, 5)
        check_call(lambda module, x: module(x, *arguments), models, x, type(model).__name__)
    assert not vidkernels.status(model).fallbacks
    return model


def test_ends_of_the_decoder() -> None:
    for options in ({"give_pre_end": True}, {"tanh_out": True}, {"attention": nn.Identity()}):
        model = same(toys.Decoder(4, **options))
        assert model.last_z_shape == (2, 4, 3, 5)


def test_shortcuts_of_nine_taps() -> None:
    same(toys.ResnetBlock(8, 12, conv_shortcut=True), None)


def test_dropout_in_training() -> None:
    block, x = toys.ResnetBlock(8, 8, dropout=0.5).train(), torch.randn(2, 8, 4, 4)
    vidkernels.patch(block)
    torch.manual_seed(1)
    dropped = block(x, None)
    torch.manual_seed(1)
    assert torch.equal(dropped, block(x, None)) and not torch.equal(dropped, block(x, None))
    assert torch.allclose(block.eval()(x, None), block(x, None))
    assert not vidkernels.status(block).fallbacks


def test_what_is_left_alone() -> None:
    for module, reason in (
        (toys.ResnetBlock(8, 8, temb_channels=4), "takes a timestep embedding"),
        (toys.Upsample(8, with_conv=False), "has no convolution"),
        (toys.Downsample(8, with_conv=False), "has no convolution"),
    ):
        report = vidkernels.explain(module)
        assert not report.patched and reason in report.details()


class TimedConv2d(nn.Conv2d):
    """As the last layer of a decoder for clips, which inherits the forward of one for images."""

    def forward(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        return super().forward(x)


def test_decoders_for_clips_are_refused() -> None:
    model = toys.Decoder(4)
    model.conv_out.__class__ = TimedConv2d
    report = vidkernels.explain(model)
    assert "its conv_out is a TimedConv2d, not a Conv2d" in report.details()
    assert {entry.cls for entry in report.patched} == {"ResnetBlock", "AttnBlock", "Upsample"}


def test_calls_with_more_arguments_run_the_original() -> None:
    model, z = toys.Decoder(4).eval(), torch.randn(1, 4, 3, 3)
    vidkernels.patch(model)
    with (
        pytest.warns(VidkernelsFallbackWarning, match="called with timesteps"),
        pytest.raises(TypeError, match="timesteps"),
    ):
        model(z, timesteps=2)


def test_a_foreign_attention_keeps_blocks_from_writing() -> None:
    """Its results may be seen by others."""

    class Kept(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return x

    model, z = toys.Decoder(4, attention=Kept()).eval(), torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        expected = model(z)
        seen = model.mid.attn_1.seen.clone()
        vidkernels.patch(model)
        torch.testing.assert_close(model(z), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(model.mid.attn_1.seen, seen, atol=2e-5, rtol=1e-4)


def test_results_of_layers_are_not_kept() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model, x = toys.Encoder(8).eval(), torch.empty(1, 3, 64, 64)
        before = peak(model, lambda m, x: m(x), x)
        vidkernels.patch(model)
        assert peak(model, lambda m, x: m(x), x) < 0.6 * before


def test_both_attentions_have_a_rule() -> None:
    """A file has one of two texts; the other rule's near miss is no obstacle."""
    rules = {rule.name: rule for rule in official_vqgan.RULES}
    other = dataclasses.replace(
        rules["vqgan.attention"], name="test.other", digests={"AttnBlock.forward": ("unknown",)}
    )
    vidkernels.register_rule(other)
    report = vidkernels.explain(toys.AttnBlock(8))
    assert [entry.rule for entry in report.patched] == ["test.vqgan.attention"]


@pytest.mark.parametrize("home", ["taming.modules.diffusionmodules.model", "ldm.modules.diffusionmodules.model"])
def test_the_official_files(home: str) -> None:
    """Where they are on the path."""
    upstream = pytest.importorskip(home, reason=f"{home} is not on the path")
    table._USER.clear()
    options = {"ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": [8]}
    model = upstream.Decoder(**options, in_channels=3, resolution=16, z_channels=4).eval()
    report = vidkernels.explain(model)
    assert not report.near_misses and len(report.patched) == 1 + 2 + 1 + 4 + 2 + 1
