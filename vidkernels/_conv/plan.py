# SPDX-License-Identifier: Apache-2.0
"""Along one axis, a padded convolution as a few unpadded ones.

An output whose taps all lie inside the tensor belongs to the interior: one ordinary convolution. At the edges, taps
that fall on the same stored element are summed into one (replicate padding), and taps on zeros are dropped. The sum
of taps is exact algebra; only its rounding differs. Three axes combine as a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vidkernels._conv.geometry import ZEROS

X, HISTORY = 0, 1
Taps = tuple[tuple[float, ...], ...]  # [positions read][kernel taps]: how much of each tap applies there


@dataclass(frozen=True)
class AxisRun:
    """Outputs `start .. start+count-1` read `source[begin + i*stride + n*spacing]` through `taps[n]`.

    `taps` None is the identity (the kernel as it is), `()` reads nothing. `pad` is symmetric zero padding that the
    convolution itself applies. `first` is False for a run that adds to outputs which an earlier run has written.
    """

    start: int
    count: int
    source: int
    begin: int
    stride: int
    spacing: int
    taps: Taps | None
    positions: int
    pad: int = 0
    first: bool = True

    @property
    def extent(self) -> int:
        """Elements read from `begin` on."""
        return (self.count - 1) * self.stride + (self.positions - 1) * self.spacing + 1

    def split(self, count: int) -> list[AxisRun]:
        """The same outputs in runs of at most `count`; a run with `pad` stays whole."""
        if self.pad or self.count <= count:
            return [self]
        starts = range(0, self.count, count)
        return [
            AxisRun(
                self.start + i,
                min(count, self.count - i),
                self.source,
                self.begin + i * self.stride,
                *(self.stride, self.spacing, self.taps, self.positions, 0, self.first),
            )
            for i in starts
        ]


def _edge(output: int, groups: dict[int, dict[int, list[float]]], stride: int) -> list[AxisRun]:
    """Runs of one output at an edge: one per stretch of equally spaced positions in one source."""
    runs: list[AxisRun] = []
    for source, taps in groups.items():
        positions = sorted(taps)
        steps = {b - a for a, b in zip(positions, positions[1:], strict=False)}
        stretches = [positions] if len(steps) <= 1 else [[p] for p in positions]
        for stretch in stretches:
            spacing = stretch[1] - stretch[0] if len(stretch) > 1 else 1
            rows = tuple(tuple(taps[p]) for p in stretch)
            runs.append(AxisRun(output, 1, source, stretch[0], stride, spacing, rows, len(rows), 0, not runs))
    return runs or [AxisRun(output, 1, X, 0, stride, 1, (), 0)]


@lru_cache(maxsize=1024)
def axis_runs(
    size: int, history: int, kernel: int, stride: int, dilation: int, padding: tuple[int, int], mode: int
) -> tuple[AxisRun, ...]:
    """Runs that together give every output of one axis.

    Args:
        size: elements of x along the axis.
        history: elements of the history before them (time axis only).
        kernel, stride, dilation: of the convolution.
        padding: (before, behind).
        mode: ZEROS or REPLICATE, beyond x and history.
    """
    before, behind = padding
    outputs = (size + before + behind - dilation * (kernel - 1) - 1) // stride + 1
    if mode == ZEROS and history == 0 and before == behind:
        return (AxisRun(0, outputs, X, 0, stride, dilation, None, kernel, before),)
    low = min(-(-before // stride), outputs)
    high = max((size - 1 - (kernel - 1) * dilation + before) // stride + 1, low)
    high = min(high, outputs)
    runs: list[AxisRun] = []
    if high > low:
        runs.append(AxisRun(low, high - low, X, low * stride - before, stride, dilation, None, kernel))
    for output in [*range(low), *range(high, outputs)]:
        groups: dict[int, dict[int, list[float]]] = {}
        for tap in range(kernel):
            position, source = output * stride - before + tap * dilation, X
            if position < 0 and position >= -history:
                position, source = history + position, HISTORY
            elif position < 0 or position >= size:
                if mode == ZEROS:
                    continue
                source = HISTORY if position < 0 and history else X
                position = 0 if position < 0 else size - 1
            row = groups.setdefault(source, {}).setdefault(position, [0.0] * kernel)
            row[tap] += 1.0
        runs += _edge(output, groups, stride)
    return tuple(runs)
