# SPDX-License-Identifier: Apache-2.0
"""The convolutions that upsampling and a convolution behind it amount to, as plans that are kept.

A plan depends on sizes and rules alone. To make one takes 60 to 400 us of the host, more than its convolutions on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from vidkernels._conv.geometry import REPLICATE, Geometry
from vidkernels._conv.plan import Taps
from vidkernels._conv.upsample_plan import Run, TimeRule, space_runs, time_runs


@dataclass(frozen=True)
class Stream:
    """Where x lies in its clip (after `start` frames; `final`: at its end), the first frame to return, the paddings."""

    start: int
    first: int
    final: bool
    padding: tuple[int, ...]
    time_mode: int
    space_mode: int


@dataclass(frozen=True, eq=False)
class Phase:
    """One convolution: collapsed taps, the frames, rows and columns it reads and writes, its own padding."""

    runs: tuple[Run, Run, Run]
    reads: tuple[slice, slice, slice]
    past: int
    geometry: Geometry

    @cached_property
    def taps(self) -> tuple[Taps, ...]:
        """Of each axis: the weights of the kernel's taps at every element read."""
        return tuple(run.taps for run in self.runs)

    @cached_property
    def kernel(self) -> tuple[int, int, int]:
        """Elements read along (t, h, w)."""
        t, h, w = map(len, self.taps)
        return t, h, w

    def outputs(self, y: torch.Tensor) -> torch.Tensor:
        """View of this phase's elements of y."""
        size, strides, offset = [*y.shape[:2]], [*y.stride()], y.storage_offset()
        for axis, run in enumerate(self.runs, 2):
            size.append(run.count)
            offset += run.start * strides[axis]
            strides[axis] *= run.step
        return y.as_strided(size, strides, offset)  # one op, where slices are three

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """View of the frames, rows and columns of x that are read."""
        for axis, read in enumerate(self.reads, 2):
            if read.start > 0 or read.stop < x.shape[axis]:
                x = x.narrow(axis, read.start, read.stop - read.start)
        return x

    def history(self, history: torch.Tensor | None) -> torch.Tensor | None:
        """View of the elements of history that are read."""
        if history is None or self.past == 0:
            return None
        _, h, w = self.reads
        return history[:, :, history.shape[2] - self.past :, h, w]


@dataclass(frozen=True, eq=False)
class Plan:
    """All phases: the product of the runs along each axis, in row-major order.

    Attributes:
        start: frames of the clip before x, from which the positions of runs along time are counted.
        tables: of backends, by device: what their kernels read about this plan.
    """

    axes: tuple[tuple[Run, ...], tuple[Run, ...], tuple[Run, ...]]
    phases: tuple[Phase, ...]
    start: int
    tables: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Call:
    """A call of the bare ops: its rule, where its input lies, its plan, frames, rows and columns of the result."""

    rule: TimeRule
    stream: Stream
    plan: Plan
    size: tuple[int, ...]


def call_of(
    size: Sequence[int],
    past: int,
    kernel: Sequence[int],
    scale: Sequence[int],
    linear: bool,
    dropped: int,
    split: int,
    start: int,
    first: int,
    final: bool,
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
) -> Call:
    """The call of an input of `size` (t, h, w) behind `past` frames of history, from the bare ops' arguments."""
    flags = bool(linear), dropped, split, start, first, bool(final)
    return _call((*size,), past, (*kernel,), (*scale,), flags, (*padding,), time_mode, space_mode)


@lru_cache(maxsize=1024)
def _call(
    size: tuple[int, ...],
    past: int,
    kernel: tuple[int, ...],
    scale: tuple[int, ...],
    flags: tuple[bool, int, int, int, int, bool],
    padding: tuple[int, ...],
    time_mode: int,
    space_mode: int,
) -> Call:
    linear, dropped, split, start, first, final = flags
    rule = TimeRule(scale[0], linear, dropped, split)
    stream = Stream(start, first, final, padding, time_mode, space_mode)
    plan = _planned(size, past, kernel, scale, rule, _settled(rule, kernel[0], stream))
    return Call(rule, stream, plan, tuple(output_size(size, kernel, scale, rule, stream)))


def _settled(rule: TimeRule, kernel: int, stream: Stream) -> Stream:
    """The earliest place in a clip with the same phases: chunks of a long clip then share one plan.

    Far behind the clip's begin and its split, positions move with the chunk and weights are the same.
    """
    read_before = kernel + stream.padding[0] + 2 * rule.factor  # of the first output, at most, in upsampled frames
    settled = rule.split + read_before // rule.factor + rule.dropped + 3
    beyond = stream.start - settled
    if beyond <= 0:
        return stream
    return replace(stream, start=settled, first=stream.first - beyond * rule.factor)


def _window(run: Run, low: int, high: int, mode: int, past: int = 0) -> tuple[slice, int, int]:
    """Stored elements [low, high) that a run reads, and how many it reads before and behind them; the `past` last ones before
    are stored elsewhere. Where padding repeats the outermost element, a run of nothing but padding reads that one."""
    if mode == REPLICATE and low < high:
        if run.begin >= high:
            return slice(high - 1 - low, high - low), 0, run.end - run.begin - 1
        if run.end <= low and not past:
            return slice(0, 1), run.end - run.begin - 1, 0
    begin, end = max(run.begin, low), max(min(run.end, high), low)
    begin = min(begin, end)
    return slice(begin - low, end - low), max(low - run.begin, 0), max(run.end - high, 0)


@lru_cache(maxsize=512)
def _planned(
    size: tuple[int, ...],
    past: int,
    kernel: tuple[int, ...],
    scale: tuple[int, ...],
    rule: TimeRule,
    stream: Stream,
) -> Plan:
    pads = stream.padding
    total = stream.start + size[0]
    frames = time_runs(rule, kernel[0], (pads[0], pads[1]), stream.time_mode, stream.first, total, stream.final)
    rows = space_runs(size[1], scale[1], kernel[1], (pads[2], pads[3]))
    columns = space_runs(size[2], scale[2], kernel[2], (pads[4], pads[5]))
    phases = []
    for t, h, w in itertools.product(frames, rows, columns):
        read_t, front, back = _window(t, stream.start, total, stream.time_mode, past)
        read_h, top, bottom = _window(h, 0, size[1], stream.space_mode)
        read_w, left, right = _window(w, 0, size[2], stream.space_mode)
        padding = (front, back, top, bottom, left, right)
        geometry = Geometry((1, 1, 1), (1, 1, 1), padding, stream.time_mode, stream.space_mode)
        phases.append(Phase((t, h, w), (read_t, read_h, read_w), min(front, past), geometry))
    return Plan((frames, rows, columns), tuple(phases), stream.start)


def runs_in_time(
    y: torch.Tensor, x: torch.Tensor, history: torch.Tensor | None, kernel: int, rule: TimeRule, stream: Stream
) -> list[tuple[Run, torch.Tensor, torch.Tensor, torch.Tensor | None, int]]:
    """Runs along time with their frames of y, of x and of the history (None: they read none), and how many frames they
    read before those of x."""
    total = stream.start + x.shape[2]
    past = 0 if history is None else history.shape[2]
    found = []
    for run in time_runs(rule, kernel, stream.padding[:2], stream.time_mode, stream.first, total, stream.final):
        view = y[:, :, run.start : run.start + run.step * (run.count - 1) + 1 : run.step]
        frames, front, _ = _window(run, stream.start, total, stream.time_mode, past)
        used = min(front, past)
        older = history[:, :, past - used :] if history is not None and used else None
        found.append((run, view, x[:, :, frames], older, front))
    return found


def output_frames(rule: TimeRule, kernel: int, frames: int, stream: Stream) -> int:
    """Frames that one call returns."""
    total = stream.start + frames
    last = rule.upsampled(total) if stream.final else rule.ready(total)
    return last - stream.first + stream.padding[0] + stream.padding[1] - (kernel - 1)


def output_size(
    size: Sequence[int], kernel: Sequence[int], scale: Sequence[int], rule: TimeRule, stream: Stream
) -> list[int]:
    """Frames, rows and columns that one call returns."""
    pads = stream.padding
    space = [scale[a] * size[a] + pads[2 * a] + pads[2 * a + 1] - (kernel[a] - 1) for a in (1, 2)]
    return [output_frames(rule, kernel[0], size[0], stream), *space]
