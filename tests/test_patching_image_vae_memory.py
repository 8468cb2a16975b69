# SPDX-License-Identifier: Apache-2.0
"""Patched VAEs over frames peak below the originals, on the policies of a CPU and of a GPU, and write only over what nobody
reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vae_cases as cases
from patching_suite import no_fallback  # noqa: F401
from test_patching_image_vae import FRAMES, KINDS, LEVELS, build, decode, images, seeded  # noqa: F401
from test_patching_vae_memory import as_on_a_gpu, peak
from torch._subclasses.fake_tensor import FakeTensorMode

import vidkernels
from vidkernels.nn import _residual
from vidkernels.patching.rules import _vae_memory


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [1, 4])
def test_no_peak_is_above_the_originals(frames: int, kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "gpu":
        as_on_a_gpu(monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = build(kind, block_out_channels=(32, 64, 64))
        x, z = torch.empty(frames, 3, 64, 64), torch.empty(frames, 4, 16, 16)
        options = {"num_frames": frames} if kind == "temporal" else {}

        def decoded(network: Any, z: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = network.decode(z, **options).sample
            return found

        before = [peak(model, *call) for call in ((cases.encode, x), (decoded, z))]
        assert vidkernels.patch(model)
        after = [peak(model, *call) for call in ((cases.encode, x), (decoded, z))]
    assert all(ours < theirs for ours, theirs in zip(after, before, strict=True)), (after, before)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_places_do_not_change_results(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over their inputs, frame by frame, or as training runs them."""
    model, x = build(kind), images()
    vidkernels.patch(model)
    results = []
    with torch.no_grad():
        for allowed, limit in ((False, 1 << 40), (True, 1 << 40), (True, 1)):
            monkeypatch.setattr(_vae_memory, "_is_unseen", lambda *call, allowed=allowed: allowed)
            monkeypatch.setattr(_residual, "PIECE_CPU", limit)
            moments = cases.encode(model, x)
            results.append((moments, decode(model, moments.chunk(2, 1)[0])))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_blocks_own_input_stays(kind: str) -> None:
    model = build(kind)
    vidkernels.patch(model)
    x = torch.randn(FRAMES, LEVELS[kind][-1], 4, 4).to(memory_format=torch.channels_last)
    kept = x.clone()
    with torch.no_grad():
        assert _vae_memory._is_unseen(model.decoder, x) and _vae_memory._is_unseen(model.encoder, x)
        model.decoder.up_blocks[0](x, *([torch.zeros(1, FRAMES)] if kind == "temporal" else []))
        model.encoder.mid_block(x)
    assert torch.equal(x, kept)
    assert not _vae_memory._is_unseen(model.decoder, x)  # gradients are on
