# SPDX-License-Identifier: Apache-2.0
"""Rotary angles in Triton: what the query/key norm kernels share with kernels that rotate in their prologue.

A program computes the angles of its tokens once, in float64 turns, and uses them for all heads: the angle's fraction
of a turn is then exact whatever the position, and float32 sines and cosines follow from it by polynomials. The rotary
convention is a compile-time constant: one kernel per model, not per shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

TURNS_PER_RADIAN = tl.constexpr(1.0 / (2.0 * math.pi))


class Convention(NamedTuple):
    """Closed form of the frequencies: pair i of an axis turns `scale * 2**(i * step)` per unit of position."""

    pairs: tuple[int, int, int]
    steps: tuple[float, float, float]
    scales: tuple[float, float, float]


def convention(axes: Sequence[int], theta: Sequence[float], position_scale: Sequence[float]) -> Convention:
    """From rotated dimensions, bases and scales per axis; missing axes have no pairs."""
    pairs = [dims // 2 for dims in axes]
    steps = [-math.log2(base) / count if count else 0.0 for count, base in zip(pairs, theta, strict=True)]
    scales = [scale / (2.0 * math.pi) for scale in position_scale]
    rest = [0] * (3 - len(pairs))
    return Convention((*pairs, *rest), (*steps, *rest), (*scales, *rest))


@triton.jit
def cos_sin(turns):
    """Cosine and sine, float32, of angles in turns, float64. Polynomials as in csrc/qk_norm_rope/qk_norm_rope.h."""
    quarters = tl.floor(turns * 4.0 + 0.5)
    rest = (turns - quarters * 0.25).to(tl.float32)
    quarter = quarters.to(tl.int64).to(tl.int32) & 3
    square = rest * rest
    odd = 40.53968811035156 * square - 76.66972351074219
    odd = odd * square + 81.60494995117188
    odd = odd * square - 41.34170150756836
    odd = odd * square - 1.7484555314695172e-07
    s = rest * 6.2831854820251465 + rest * odd
    even = 58.561214447021484 * square - 85.4231185913086
    even = even * square + 64.93914031982422
    even = even * square - 19.739208221435547
    c = even * square + 1.0
    swap = (quarter & 1) == 1
    sine = tl.where(swap, c, s)
    cosine = tl.where(swap, s, c)
    sine = tl.where(quarter >= 2, -sine, sine)
    cosine = tl.where((quarter == 1) | (quarter == 2), -cosine, cosine)
    return cosine, sine


@triton.jit
def closed_form_turns(
    position, axis_stride, token_mask, pair, PAIRS: tl.constexpr, STEPS: tl.constexpr, SCALES: tl.constexpr
):
    """Angles in turns [tokens, pairs]; `position` [tokens]: pointers to each token's first position."""
    second: tl.constexpr = PAIRS[0]
    third: tl.constexpr = PAIRS[0] + PAIRS[1]
    axis = (pair >= second).to(tl.int32) + (pair >= third).to(tl.int32)
    index = (pair - tl.where(axis == 0, 0, tl.where(axis == 1, second, third))).to(tl.float64)
    step = tl.where(axis == 0, index * STEPS[0], tl.where(axis == 1, index * STEPS[1], index * STEPS[2]))
    factor = tl.exp2(step)
    frequency = tl.where(axis == 0, factor * SCALES[0], tl.where(axis == 1, factor * SCALES[1], factor * SCALES[2]))
    mask = token_mask[:, None] & (pair < third + PAIRS[2])[None, :]
    where = tl.load(position[:, None] + axis[None, :] * axis_stride, mask=mask, other=0)
    return where.to(tl.float64) * frequency[None, :]


@triton.jit
def table_turns(position, axis_stride, token_mask, table, table_mask, table_axis_stride, AXES: tl.constexpr):
    """Angles in turns [tokens, rows, pairs] from a table of radians per unit of position.

    `table` [rows, pairs]: pointers to the first axis's entries; rows are heads, or one row for all of them.
    """
    turns = tl.zeros((position.shape[0], table.shape[0], table.shape[1]), tl.float64)
    for axis in tl.static_range(AXES):
        frequency = (
            tl.load(table + axis * table_axis_stride, mask=table_mask, other=0.0).to(tl.float64) * TURNS_PER_RADIAN
        )
        where = tl.load(position + axis * axis_stride, mask=token_mask, other=0).to(tl.float64)
        moved = where[:, None, None] * frequency[None, :, :]
        # An axis that does not move a pair must not hand on its NaN or Inf.
        turns += tl.where(frequency[None, :, :] == 0.0, 0.0, moved)
    return turns
