# SPDX-License-Identifier: Apache-2.0
"""Rules for Open-MAGVIT2's networks, for clips and for images, on networks of our own with the same structure and results."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import official_magvit2_image_toys as images
import official_magvit2_toys as clips
import pytest
import torch
from official_image_suite import OfficialImageSuite
from official_vae_suite import OfficialVaeSuite, busy, knowing
from patching_suite import no_fallback  # noqa: F401
from torch import Tensor, nn
from vae_cases import check_call

import vidkernels
from vidkernels.patching import _rule as table
from vidkernels.patching.rules import official_magvit2, official_magvit2_image


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    for _ in knowing(official_magvit2_image.RULES, images):
        yield from knowing(official_magvit2.RULES, clips)


class TestClips(OfficialVaeSuite):
    rules = {
        "open_magvit2.video_encoder": 1,
        "open_magvit2.video_decoder": 1,
        "open_magvit2.video_block": 16,
        "open_magvit2.video_conv": 42,
        "open_magvit2.video_upsample": 2,
        "open_magvit2.video_adaptive_norm": 3,
    }
    sizes = ((1, 5, 8, 12), (2, 4, 7, 9), (1, 1, 8, 8), (2, 3, 4, 8))
    hooked = (
        *("encoder", "encoder.conv_in", "encoder.down.0.block.1", "encoder.down.1.downsample", "encoder.norm_out"),
        *("encoder.mid_block.0.conv1", "encoder.mid_block.1.norm2", "encoder.down.2.block.0.nin_shortcut.conv_1"),
        *("decoder.adaptive.1", "decoder.adaptive.0.gn", "decoder.adaptive.2.gamma", "decoder.up.1.upsample"),
        *("decoder.up.2.upsample.conv1", "decoder.conv_out"),
    )
    wrapped = "decoder.up.0.block.1.conv2.conv_1"

    def build(self) -> Any:
        return clips.Tokenizer()

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encoder(x)

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return model.decoder(z)


class TestImages(OfficialImageSuite):
    rules = {
        "open_magvit2.image_encoder": 1,
        "open_magvit2.image_decoder": 1,
        "open_magvit2.image_block": 16,
        "open_magvit2.image_upsample": 2,
        "open_magvit2.image_adaptive_norm": 3,
    }
    sizes = ((1, 16, 12), (3, 9, 11), (2, 8, 8))
    hooked = (
        *("encoder", "encoder.conv_in", "encoder.down.0.block.1", "encoder.down.1.downsample", "encoder.norm_out"),
        *("encoder.mid_block.0.conv1", "encoder.mid_block.1.norm2", "encoder.down.2.block.0.nin_shortcut"),
        *("decoder.adaptive.1", "decoder.adaptive.0.gn", "decoder.adaptive.2.gamma", "decoder.up.1.upsample"),
        *("decoder.up.2.upsample.conv1", "decoder.conv_out"),
    )
    wrapped = "decoder.up.0.block.1.conv2"

    def build(self) -> Any:
        return images.Tokenizer()

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encoder(x)

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return model.decoder(z)


def same(model: Any, *sizes: tuple[int, ...]) -> None:
    """A module gives what it gave before it was patched, to rounding."""
    model = busy(model)
    models = copy.deepcopy(model), model, copy.deepcopy(model).double()
    assert vidkernels.patch(model).patched
    with torch.no_grad():
        for size in sizes:
            check_call(lambda module, x: module(x), models, torch.randn(size), type(model).__name__)
    assert not vidkernels.status(model).fallbacks


def test_decoder_without_adaptive_norms() -> None:
    same(images.Tokenizer(adaptive=False).decoder, (1, 4, 3, 4), (2, 4, 2, 2))


def test_shortcuts_of_nine_and_more_taps() -> None:
    same(clips.ResBlock(8, 12, use_conv_shortcut=True), (2, 8, 3, 5, 4))
    same(images.ResBlock(8, 12, use_conv_shortcut=True), (2, 8, 5, 4))


@pytest.mark.parametrize("block", [(1, 2, 2), (2, 2, 2), (2, 1, 3)])
def test_upsampling_in_pieces(block: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (1, 2 * 4 * block[0] * block[1] * block[2] * 2 * 6, 1 << 20):
        monkeypatch.setattr(official_magvit2, "PIECE_CPU", limit)
        same(clips.Upsampler(4, block), (2, 4, 5, 3, 2), (1, 4, 1, 3, 2), (1, 4, 2, 2, 2))


def test_a_decoder_does_not_write_over_its_codes() -> None:
    for model, size in ((clips.Tokenizer(), (1, 4, 2, 3, 2)), (images.Tokenizer(), (2, 4, 3, 2))):
        vidkernels.patch(model.eval())
        codes = clips.codes_like(torch.randn(size))
        kept = codes.clone()
        with torch.no_grad():
            model.decoder(codes)
        assert torch.equal(codes, kept)


def test_a_layer_of_an_adaptive_norm_without_a_weight() -> None:
    """A wrapper in its place is called."""
    for model, size in ((clips.Tokenizer(), (1, 4, 2, 3, 2)), (images.Tokenizer(), (2, 4, 3, 2))):
        model.decoder.adaptive[0].beta = nn.Sequential(model.decoder.adaptive[0].beta)
        codes = clips.codes_like(torch.randn(size))
        with torch.no_grad():
            expected = model.eval().decoder(codes)
            vidkernels.patch(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", vidkernels.errors.VidkernelsFallbackWarning)
                torch.testing.assert_close(model.decoder(codes), expected, atol=1e-5, rtol=1e-4)


class FrameNorm(nn.GroupNorm):
    """A norm of a copy's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def test_what_is_left_alone() -> None:
    block = clips.ResBlock(8, 8)
    block.norm2 = nn.InstanceNorm3d(8)
    assert "its norm2 is a InstanceNorm3d, not a GroupNorm" in vidkernels.explain(block).details()
    upsampler = clips.Upsampler(4, (4, 2, 2))
    assert "makes boxes of (4, 2, 2)" in vidkernels.explain(upsampler).details()
    block, x = clips.ResBlock(8, 8).eval(), torch.randn(1, 8, 3, 4, 4)
    block.norm1.__class__ = FrameNorm
    upsampler = clips.Upsampler(4, (1, 2, 2))
    upsampler.depth2space = lambda y, block_size: 2 * clips.depth_to_space3d(y, block_size)
    for module, given, reason in ((block, x, "FrameNorm"), (upsampler, x[:, :4], "a function of its own")):
        with torch.no_grad():
            expected = module(given)
            vidkernels.patch(module)
            with pytest.warns(vidkernels.errors.VidkernelsFallbackWarning, match=reason):
                torch.testing.assert_close(module(given), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("file", ["improved_video_model", "improved_model"])
def test_the_official_files(file: str) -> None:
    """Where a checkout of SEED-Voken is on the path, which no package holds."""
    upstream = pytest.importorskip(f"src.Open_MAGVIT2.modules.diffusionmodules.{file}", reason="no SEED-Voken here")
    table._USER.clear()
    options = {"ch": 32, "out_ch": 3, "in_channels": 3, "num_res_blocks": 1, "z_channels": 4, "resolution": 16}
    report = vidkernels.explain(upstream.Decoder(**options).eval())
    layers = 1 + 5 + 4 + 3  # the decoder, its blocks, adaptive norms and upsamplers
    convolutions = 2 + 5 * 2 + 2 + 3 if "video" in file else 0
    assert not report.near_misses and len(report.patched) == layers + convolutions
