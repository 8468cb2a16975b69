# SPDX-License-Identifier: Apache-2.0
"""The stream of diffusers' Wan VAE under its patch: caches, chunks, originals that go on in the middle of a clip."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import vae_cases as cases

import vidkernels
from vidkernels.patching.rules import _vae_units, _wan_units

pytest.importorskip("diffusers", minversion="0.42")


def stream(network: Any, chunks: tuple[torch.Tensor, ...], caches: list[Any], **first: Any) -> torch.Tensor:
    """Chunks of a clip through an encoder or decoder, one after the other."""
    parts = []
    for i, chunk in enumerate(chunks):
        parts.append(network(chunk, feat_cache=caches, feat_idx=[0], **(first if i == 0 else {})))
    return torch.cat(parts, 2)


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_any_chunking_behind_the_first_frame_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cases.build(name)
    vidkernels.patch(model)
    x = cases.clip(name, 21)
    results = []
    with torch.no_grad():
        for budget in (1, 1 << 20, 1 << 40):  # one chunk a call, some, all
            monkeypatch.setitem(_vae_units._BUDGET, "cpu", budget)
            encoded = cases.encode(model, x)
            results.append((encoded, cases.decode(model, cases.latents(model, x))))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            if name == "wan2.1":
                assert torch.equal(actual, expected)
            else:  # the means in Wan 2.2's shortcuts are PyTorch's, whose order of sums follows the shape
                torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("switch", [1, 2, 3])
@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_original_and_fused_forward_continue_each_others_streams(name: str, switch: int) -> None:
    """Caches keep upstream's contents: whoever ran the first chunks, the other one goes on."""
    model = cases.build(name)
    original = copy.deepcopy(model)
    vidkernels.patch(model)
    model.clear_cache()
    z = torch.randn(1, 4, 4, 4, 4)
    video = torch.randn(1, model.encoder.conv_in.in_channels, 13, 16, 16)
    first = {"first_chunk": True}
    with torch.no_grad():
        for part, chunks, options in (
            ("decoder", z.split(1, 2), first),
            ("encoder", video.split([1, 4, 4, 4], 2), {}),
        ):
            count = model._cached_conv_counts[part]
            expected = stream(getattr(original, part), chunks, [None] * count, **options)
            for before, behind in ((model, original), (original, model)):
                caches = [None] * count
                parts = [stream(getattr(before, part), chunks[:switch], caches, **options)]
                parts.append(stream(getattr(behind, part), chunks[switch:], caches))
                torch.testing.assert_close(torch.cat(parts, 2), expected, atol=1e-5, rtol=1e-4)


def test_caches_hold_the_frames_that_are_read_and_no_view_of_a_chunk() -> None:
    model = cases.build("wan2.1")
    vidkernels.patch(model)
    caches: list[Any] = [None] * model._cached_conv_counts["encoder"]
    with torch.no_grad():
        model.encoder(torch.randn(1, 3, 1, 32, 32), feat_cache=caches, feat_idx=[0])
        model.encoder(torch.randn(1, 3, 8, 32, 32), feat_cache=caches, feat_idx=[0])
    for cache in caches:
        if cache is not None:  # a shortcut convolution has a slot that nobody uses
            assert cache.shape[2] in (1, 2) and cache.untyped_storage().nbytes() == cache.numel() * 4
    model.encode(torch.randn(1, 3, 5, 32, 32))
    assert model._enc_feat_map == [None] * len(caches) and model._feat_map == [None] * model._conv_num


def test_frames_that_nobody_will_read_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two calls, one frame and the rest, only the input of the first convolution is copied: it may be the caller's."""
    monkeypatch.setitem(_vae_units._BUDGET, "cpu", 1 << 40)
    monkeypatch.setattr(_wan_units, "frame_pieces", lambda x, channels: [(0, x.shape[2])])
    kept: list[bool] = []
    last_frames = _vae_units.last_frames

    def counted(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        frames = last_frames(x, *arguments)
        kept.append(frames is x)
        return frames

    monkeypatch.setattr(_vae_units, "last_frames", counted)
    model = cases.build("wan2.1")
    vidkernels.patch(model)
    with torch.no_grad():
        model.decode(torch.randn(1, 4, 5, 4, 4))
    assert kept.count(False) == 1 and kept.count(True) > 10


def test_hooks_on_a_network_see_single_chunks() -> None:
    model = cases.build("wan2.1")
    vidkernels.patch(model)
    frames: list[int] = []
    model.decoder.register_forward_hook(lambda module, args, output: frames.append(args[0].shape[2]))
    with torch.no_grad(), pytest.warns(vidkernels.errors.VidkernelsFallbackWarning, match="has hooks"):
        model.decode(torch.randn(1, 4, 4, 4, 4))
    assert frames == [1, 1, 1, 1]


@pytest.mark.slow
def test_default_configuration() -> None:
    import diffusers

    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan().eval()
    cases.check(model, torch.rand(1, 3, 9, 32, 32) * 2 - 1)


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_tiles_where_upstream_takes_them(name: str) -> None:
    """Wan 2.2 compares the size before its patches with a tile's, so clips of 33 to 64 pixels go by tiles of 32, too."""
    model = cases.build(name)
    cases.enable_tiling(name, model)
    cases.check(model, torch.randn(1, 3, 5, 32, 64))
