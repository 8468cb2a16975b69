# SPDX-License-Identifier: Apache-2.0
"""Upsampling followed by a convolution, as convolutions of the tensor before upsampling.

Output `o` of an axis sums taps on upsampled elements, each a mixture of input elements; so it is a sum over input
elements with collapsed weights. Outputs `o` and `o + factor` have the same weights one element further, except near
the ends and near a split. One `Run` holds all outputs of one phase with equal weights: an ordinary convolution of
stride 1 that writes every `factor`-th output. Input positions are those of the whole clip (axis); those outside of
it stand for padding, which the convolution itself supplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vidkernels._conv.geometry import REPLICATE
from vidkernels._conv.plan import Taps


@dataclass(frozen=True)
class Run:
    """Outputs `start, start+step, ...` (`count` of them) read positions `begin+i .. begin+i+len(taps)-1`."""

    start: int
    step: int
    count: int
    begin: int
    taps: Taps

    @property
    def end(self) -> int:
        """One past the last position read."""
        return self.begin + self.count - 1 + len(self.taps)


@dataclass(frozen=True)
class TimeRule:
    """How frames are upsampled: factor, linear or nearest, first frames dropped, frames interpolated by themselves."""

    factor: int
    linear: bool
    dropped: int
    split: int

    def upsampled(self, total: int) -> int:
        """Upsampled frames of a clip of `total` frames."""
        return max(self.factor * total - self.dropped, 0)

    def ready(self, total: int) -> int:
        """Upsampled frames that the clip's first `total` frames determine, whatever follows."""
        waits = self.linear and total not in (0, self.split)
        return max(self.factor * total - self.dropped - (self.factor // 2 if waits else 0), 0)

    def sources(self, s: int, total: int | None, mode: int) -> dict[int, float]:
        """Upsampled frame s as {position: weight}; `total` None: the clip goes on after what is known."""
        if not self.linear:
            position = (s + self.dropped) // self.factor
            if s < 0 and position >= 0 and mode != REPLICATE:
                return {}
            return {position: 1.0}
        return self._linear(s, total, mode)

    def _linear(self, s: int, total: int | None, mode: int) -> dict[int, float]:
        if s < 0 and mode != REPLICATE:
            return {}
        split = self.split if total is None else min(self.split, total)
        head = 0 < split and s < self.factor * split
        begin, end = (0, split) if head else (split, None if mode == REPLICATE else total)
        if total is not None and not head and mode != REPLICATE and s >= self.factor * total:
            return {}
        # Half-pixel centres in integers: position = (2*s + 1 - factor) / (2*factor).
        low, rest = divmod(2 * (s - self.factor * begin) + 1 - self.factor, 2 * self.factor)
        high = low + 1 if rest else low
        # Beyond the clip's ends lie copies of its first and last frame, if replicated: no clamp. A split clamps.
        if begin > 0 or mode != REPLICATE:
            low, high = max(low, 0), max(high, 0)
        if end is not None:
            low, high = min(low, end - begin - 1), min(high, end - begin - 1)
        weight = rest / (2 * self.factor)
        sources = {begin + low: 1.0 - weight}
        if weight:
            sources[begin + high] = sources.get(begin + high, 0.0) + weight
        return sources

    def lookback(self, total: int, front: int) -> int:
        """Of the clip's first `total` frames, how many the next chunk may read."""
        reach = -(-front // self.factor)
        if self.linear:  # from the first frame not yet certain, factor//2 before its place, `front` taps further back
            reach = -(-(self.factor - 1 + 2 * (self.factor // 2) + 2 * front) // (2 * self.factor))
        return min(total, reach)


@lru_cache(maxsize=512)
def time_runs(
    rule: TimeRule, kernel: int, padding: tuple[int, int], mode: int, first: int, total: int, final: bool
) -> tuple[Run, ...]:
    """Runs of the outputs from `first` to the last one that `total` frames of the clip make certain."""
    last = rule.upsampled(total) if final else rule.ready(total)
    last += padding[0] + padding[1] - (kernel - 1)
    runs: list[Run] = []
    for phase in range(rule.factor):
        current: Run | None = None
        for output in range(first + phase, last, rule.factor):
            begin, taps = _effective(rule, kernel, output - padding[0], mode, total if final else None)
            if current is not None and taps == current.taps and begin == current.begin + current.count:
                current = Run(current.start, rule.factor, current.count + 1, current.begin, taps)
            else:
                if current is not None:
                    runs.append(current)
                current = Run(output - first, rule.factor, 1, begin, taps)
        if current is not None:
            runs.append(current)
    return tuple(runs)


def _effective(rule: TimeRule, kernel: int, s: int, mode: int, total: int | None) -> tuple[int, Taps]:
    """Lowest position read by the output whose first tap is on upsampled frame s, and the weights from there on."""
    rows: dict[int, list[float]] = {}
    for tap in range(kernel):
        for position, weight in rule.sources(s + tap, total, mode).items():
            rows.setdefault(position, [0.0] * kernel)[tap] += weight
    if not rows:
        return 0, ()
    low, high = min(rows), max(rows)
    return low, tuple(tuple(rows.get(p, [0.0] * kernel)) for p in range(low, high + 1))


@lru_cache(maxsize=512)
def space_runs(size: int, factor: int, kernel: int, padding: tuple[int, int]) -> tuple[Run, ...]:
    """One run per phase of a nearest-upsampled axis; positions outside [0, size) are padding."""
    outputs = factor * size + padding[0] + padding[1] - (kernel - 1)
    runs = []
    for phase in range(min(factor, outputs)):
        positions = [(phase - padding[0] + tap) // factor for tap in range(kernel)]
        taps = tuple(tuple(float(p == q) for p in positions) for q in range(positions[0], positions[-1] + 1))
        runs.append(Run(phase, factor, -(-(outputs - phase) // factor), positions[0], taps))
    return tuple(runs)
