# SPDX-License-Identifier: Apache-2.0
"""A padded convolution as the unpadded ones that torch can run: what each reads, with which taps, and where it goes.

Plans depend on sizes alone and are kept: to make one takes 20 to 200 us, more than a small clip's convolutions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from vidkernels._conv.plan import HISTORY, AxisRun, Taps, axis_runs

_AXES = (2, 3, 4)


@dataclass(frozen=True)
class Piece:
    """One unpadded convolution: which outputs, from which part of x or history, with which weights."""

    runs: tuple[AxisRun, AxisRun, AxisRun]

    @property
    def source(self) -> int:
        return self.runs[0].source

    @cached_property
    def reads_nothing(self) -> bool:
        return any(run.taps == () for run in self.runs)

    @cached_property
    def first(self) -> bool:
        return all(run.first for run in self.runs)

    @property
    def whole(self) -> bool:
        """Whether it is the one convolution there is, of x and all taps."""
        return self.source != HISTORY and all(taps is None for taps in self.taps)

    def outputs(self, y: torch.Tensor) -> torch.Tensor:
        for axis, run in zip(_AXES, self.runs, strict=True):
            y = y.narrow(axis, run.start, run.count)
        return y

    def inputs(self, source: torch.Tensor) -> torch.Tensor:
        for axis, run in zip(_AXES, self.runs, strict=True):
            if not run.pad:
                source = source.narrow(axis, run.begin, run.extent)
        return source

    @cached_property
    def taps(self) -> tuple[Taps | None, ...]:
        return tuple(run.taps for run in self.runs)

    @cached_property
    def kept(self) -> tuple[tuple[int, int] | None, ...]:
        """Axes where a part of the taps is used as it is (all zero padding is like this): the first and their number."""
        return tuple(None if not taps else _consecutive(taps) for taps in self.taps)

    @cached_property
    def summed(self) -> tuple[Taps | None, ...]:
        """The rows of the other axes, whose taps are summed."""
        return tuple(None if kept else taps for taps, kept in zip(self.taps, self.kept, strict=True))

    def part(self, weight: torch.Tensor) -> torch.Tensor:
        """The view of a weight, or of its gradient, that holds the taps used."""
        for axis, kept in zip(_AXES, self.kept, strict=True):
            if kept is not None:
                weight = weight.narrow(axis, *kept)
        return weight

    @cached_property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        """Stride, padding, dilation of torch's convolution."""
        return [r.stride for r in self.runs], [r.pad for r in self.runs], [r.spacing for r in self.runs]


def _consecutive(taps: Taps) -> tuple[int, int] | None:
    """(first, count) where each position read has one tap, and these follow each other."""
    first = next((tap for tap, factor in enumerate(taps[0]) if factor), 0)
    kept = tuple(tuple(float(tap == first + i) for tap in range(len(row))) for i, row in enumerate(taps))
    return (first, len(taps)) if kept == taps else None


def pieces_of(
    size: Sequence[int],
    history_frames: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
    slice_frames: int,
) -> tuple[Piece, ...]:
    """The unpadded convolutions that together are a padded one of an input of `size` (t, h, w), in the order in which they
    are to be stored and added; at most `slice_frames` output frames each."""
    rule = tuple(kernel), tuple(stride), tuple(dilation), tuple(padding), (time_mode, space_mode, space_mode)
    return _planned((*map(int, size),), int(history_frames), *rule, slice_frames)


@lru_cache(maxsize=1024)
def _planned(
    size: tuple[int, ...],
    history_frames: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: tuple[int, ...],
    modes: tuple[int, ...],
    slice_frames: int,
) -> tuple[Piece, ...]:
    plans = [
        axis_runs(
            *(size[axis], history_frames if axis == 0 else 0, kernel[axis], stride[axis], dilation[axis]),
            padding=(padding[2 * axis], padding[2 * axis + 1]),
            mode=modes[axis],
        )
        for axis in range(3)
    ]
    time = [part for run in plans[0] for part in run.split(slice_frames)]
    return tuple(Piece(runs) for runs in itertools.product(time, plans[1], plans[2]))
