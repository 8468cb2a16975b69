# SPDX-License-Identifier: Apache-2.0
"""Streams of diffusers' EasyAnimate and CogVideoX VAEs under their patches: original and fused forward go on with each
other's caches, and what is kept are the few frames that the next chunk reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import vae_cases as cases

import vidkernels

pytest.importorskip("diffusers", minversion="0.42")


@pytest.mark.parametrize("first_is_patched", [True, False])
@pytest.mark.parametrize("name", ["magvit", "magvit-clip-norm"])
def test_easyanimate_streams_continue(name: str, first_is_patched: bool) -> None:
    model = cases.build(name)
    whole = copy.deepcopy(model)
    video, z = torch.randn(1, 3, 9, 16, 16), torch.randn(1, 4, 3, 4, 4)
    with torch.no_grad():
        for part, clip, sizes in (("encoder", video, [1, 4, 4]), ("decoder", z, [1, 1, 1])):
            expected = torch.cat([getattr(whole, part)(chunk) for chunk in clip.split(sizes, 2)], 2)
            parts = []
            for i, chunk in enumerate(clip.split(sizes, 2)):
                patched = first_is_patched == (i < 2)
                vidkernels.patch(model) if patched else vidkernels.unpatch(model)
                parts.append(getattr(model, part)(chunk))
            torch.testing.assert_close(torch.cat(parts, 2), expected, atol=2e-5, rtol=1e-4)
        for module in model.modules():
            kept = getattr(module, "prev_features", None)
            assert kept is None or kept.shape[2] <= 2 or not first_is_patched


def cached(caches: Any) -> list[torch.Tensor]:
    if isinstance(caches, dict):
        return [tensor for value in caches.values() for tensor in cached(value)]
    return [] if caches is None else [caches]


@pytest.mark.parametrize("first_is_patched", [True, False])
def test_cogvideox_streams_continue(first_is_patched: bool) -> None:
    model = cases.build("cogvideox")
    original = copy.deepcopy(model)
    vidkernels.patch(model)
    networks = (model, original) if first_is_patched else (original, model)
    video, z = torch.randn(1, 3, 17, 16, 16), torch.randn(1, 4, 5, 2, 2)
    with torch.no_grad():
        for part, clip, sizes in (("encoder", video, [9, 8]), ("decoder", z, [3, 2])):
            chunks = clip.split(sizes, 2)
            expected, caches = [], None
            for chunk in chunks:
                y, caches = getattr(original, part)(chunk, conv_cache=caches)
                expected.append(y)
            y, caches = getattr(networks[0], part)(chunks[0], conv_cache=None)
            if first_is_patched:
                assert all(tensor.shape[2] in (0, 2) for tensor in cached(caches))
                assert all(t.untyped_storage().nbytes() == 4 * t.numel() for t in cached(caches))
            actual = [y, getattr(networks[1], part)(chunks[1], conv_cache=caches)[0]]
            torch.testing.assert_close(torch.cat(actual, 2), torch.cat(expected, 2), atol=2e-5, rtol=1e-4)
