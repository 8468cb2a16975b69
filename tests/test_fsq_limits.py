# SPDX-License-Identifier: Apache-2.0
"""What FSQ's CUDA kernel cannot take is refused by the predicate, before the kernel is asked."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

import vidkernels
from vidkernels import _library
from vidkernels.ops import fsq

# 254 distinct thresholds, within that limit, and 296 with the padding. Their codes have no int32 indices.
MANY = tuple(1 + x for x in (1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 21, 22, 25, 26, 29))


def test_limits_are_those_of_the_kernel() -> None:
    header, kernel = ((ROOT / "csrc/fsq" / name).read_text() for name in ("fsq.h", "fsq_fwd.cu"))
    most = re.search(r"kFsqMaxThresholds = (\d+);", header)
    run = re.search(r"kRun = (\d+);", kernel)
    spare = re.search(r"kMaxPadded = kFsqMaxThresholds \+ (\d+) \* \(kRun - 1\);", kernel)
    assert most and run and spare
    assert int(most[1]) == fsq.MAX_CUDA_THRESHOLDS and int(run[1]) == fsq.CUDA_RUN
    assert int(most[1]) + int(spare[1]) * (int(run[1]) - 1) == fsq.MAX_CUDA_PADDED


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        (MANY, "it takes at most 292 thresholds padded to runs of 4 a count, got 296"),
        (MANY + MANY[:1], "it takes at most 292 thresholds padded to runs of 4 a count, got 296"),
        (MANY[1:-1] + (MANY[-1] - 1,), None),
        ((257,), None),
        ((258,), "it takes at most 256 distinct thresholds, got 257"),
    ],
    ids=["padding", "a count twice", "just within", "one channel", "too many"],
)
def test_padding_counts_as_the_kernel_counts_it(
    levels: tuple[int, ...], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_library, "cuda_missing", None)
    with FakeTensorMode():
        z = torch.empty(2, len(levels), device="cuda")
    explained = vidkernels.explain("fsq_quantize", z, levels, bound="symmetric", return_indices=False)
    found = {choice.backend: choice.reason for choice in explained.choices}["cuda"]
    if reason is None:
        assert "thresholds" not in (found or "")  # but perhaps that this library has no CUDA kernels
    else:
        assert found == reason and explained.chosen != "cuda"
