# SPDX-License-Identifier: Apache-2.0
"""Segment offsets on a device from lengths on the host."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from vidkernels.errors import ShapeError


def int_tensor(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """int32 tensor on `device`; from pinned memory to a GPU, since a plain copy would wait for the stream."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int32, device=device)
    return torch.tensor(values, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)


def offsets(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """int32 `[B + 1]`: 0 and the running sums of `lengths`."""
    sums = list(itertools.accumulate(lengths, initial=0))
    if sums[-1] >= 2**31:
        raise ShapeError("lengths", "fewer than 2^31 tokens in one pack", sums[-1], "Split it: offsets are int32.")
    return int_tensor(sums, device)


def longest(lengths: Sequence[int]) -> int:
    """The largest length, 0 without any; also of lengths that a graph leaves open, for which Dynamo knows no `max(default=)`."""
    return max(lengths) if lengths else 0


def segment_ids(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """int64 `[total]`: the segment of every token. The total is stated, so that no length is read back."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    return torch.arange(lengths.shape[0], device=cu_seqlens.device).repeat_interleave(lengths, output_size=total)
