# SPDX-License-Identifier: Apache-2.0
"""Rows of a tile that holds whole short segments, and what happens to q and k before they are multiplied.

Two layouts. Axial: segments of one length along an axis of a strided tensor; a tile holds BLOCK // LENGTH of them.
Packed: segments of any length up to `longest`; tile t holds those that begin in [t * step, (t + 1) * step) with
step = BLOCK - longest + 1, which always fit, so that each segment lies in exactly one tile and no plan is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vidkernels.triton._rotary import TURNS_PER_RADIAN, closed_form_turns, cos_sin


@triton.jit
def _first_at_or_after(cu_seqlens, segments, token):
    """The first segment i with cu_seqlens[i] >= token, or `segments`."""
    low = 0
    high = segments
    while low < high:
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle) < token
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def tile_and_head(heads, HEADS: tl.constexpr):
    """Tile and first head of this program. All heads of a tile follow each other: a token's heads lie side by side, and
    programs that run at a time should read whole rows of memory, not HEADS heads out of every row."""
    groups = (heads + (HEADS - 1)) // HEADS
    tile = tl.program_id(0) // groups
    return tile, (tl.program_id(0) - tile * groups) * HEADS


@triton.jit
def packed_rows(cu_seqlens, segments, step, tile, BLOCK: tl.constexpr):
    """Of a packed tile: token and segment of every row, whether it is one, and the range of segments."""
    begin = _first_at_or_after(cu_seqlens, segments, tile * step)
    end = _first_at_or_after(cu_seqlens, segments, (tile + 1) * step)
    first = tl.load(cu_seqlens + begin)
    token = first + tl.arange(0, BLOCK)
    valid = token < tl.load(cu_seqlens + end)
    low = tl.zeros((BLOCK,), tl.int32) + begin
    high = tl.zeros((BLOCK,), tl.int32) + end
    span = end - begin
    while span > 0:  # bisection in every row: the last segment that begins at or before the token
        middle = (low + high) // 2
        inside = tl.load(cu_seqlens + middle) <= token
        low = tl.where(inside & (low + 1 < high), middle, low)
        high = tl.where(inside, high, middle)
        span = span // 2
    return token.to(tl.int64), low, valid, begin, end


@triton.jit
def axial_rows(segments, tile, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Of an axial tile: place along the axis, segment, whether the row is used, and the range of segments."""
    rows = tl.arange(0, BLOCK)
    count: tl.constexpr = BLOCK // LENGTH
    begin = tile * count
    segment = begin + rows // LENGTH
    end = tl.minimum(begin + count, segments)
    return (rows % LENGTH).to(tl.int64), segment, segment < end, begin, end


@triton.jit
def axial_offsets(segment, place, inner, stride_outer, stride_axis, stride_inner):
    """Element offset of every row: segment = outer index * inner + inner index."""
    outer = segment // inner
    return (
        outer.to(tl.int64) * stride_outer + (segment - outer * inner).to(tl.int64) * stride_inner + place * stride_axis
    )


@triton.jit
def result_offsets(segment, place, inner, heads, LENGTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Element offset of every row in a contiguous tensor of the input's shape."""
    token = place
    if LENGTH > 0:
        outer = segment // inner
        token = (outer.to(tl.int64) * LENGTH + place) * inner + (segment - outer * inner)
    return token * heads * HEAD_DIM


@triton.jit
def load_rows(pointer, offsets, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Channels FIRST : FIRST + WIDTH of every row, zeros elsewhere."""
    channels = FIRST + tl.arange(0, WIDTH)
    mask = valid[:, None] & (channels < HEAD_DIM)[None, :]
    return tl.load(pointer + offsets[:, None] + channels[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, offsets, valid, value, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store channels FIRST : FIRST + WIDTH of every used row; `value` has the storage type."""
    channels = FIRST + tl.arange(0, WIDTH)
    mask = valid[:, None] & (channels < HEAD_DIM)[None, :]
    tl.store(pointer + offsets[:, None] + channels[None, :], value, mask=mask)


@triton.jit
def load_head(pointer, offsets, valid, D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The one or two pieces of a head; the second is the first again where there is one."""
    first = load_rows(pointer, offsets, valid, 0, D0, HEAD_DIM)
    second = first
    if D1 > 0:
        second = load_rows(pointer, offsets, valid, D0, D1, HEAD_DIM)
    return first, second


@triton.jit
def store_head(pointer, offsets, valid, first, second, D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store the one or two pieces of a head; they have the storage type."""
    store_rows(pointer, offsets, valid, first, 0, D0, HEAD_DIM)
    if D1 > 0:
        store_rows(pointer, offsets, valid, second, D0, D1, HEAD_DIM)


@triton.jit
def angles(
    positions, frequencies, place, stride_place, stride_axis, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, STEPS: tl.constexpr, SCALES: tl.constexpr, TABLE_AXES: tl.constexpr,
):  # fmt: skip
    """Cosines and sines [rows, WIDTH // 2] of the pairs (2p, 2p + 1) of one piece; 1 and 0 beyond the rotated ones.

    TABLE_AXES > 0: from a table [TABLE_AXES, PAIRS[0]] of radians per unit of position, else in closed form.
    """
    pair = FIRST // 2 + tl.arange(0, WIDTH // 2)
    rotated = pair < PAIRS[0] + PAIRS[1] + PAIRS[2]
    position = positions + place * stride_place
    if TABLE_AXES > 0:
        turns = tl.zeros((place.shape[0], WIDTH // 2), tl.float64)
        for axis in tl.static_range(TABLE_AXES):
            frequency = tl.load(frequencies + axis * PAIRS[0] + pair, mask=rotated, other=0.0)
            frequency = frequency.to(tl.float64) * TURNS_PER_RADIAN
            where = tl.load(position + axis * stride_axis, mask=valid, other=0).to(tl.float64)
            # An axis that does not move a pair must not hand on its NaN or Inf.
            turns += tl.where(frequency[None, :] == 0.0, 0.0, where[:, None] * frequency[None, :])
    else:
        turns = closed_form_turns(position, stride_axis, valid, pair, PAIRS, STEPS, SCALES)
    cosine, sine = cos_sin(turns)
    return tl.where(rotated[None, :], cosine, 1.0), tl.where(rotated[None, :], sine, 0.0)


@triton.jit
def head_angles(
    positions, frequencies, place, stride_place, stride_axis, valid, D0: tl.constexpr, D1: tl.constexpr,
    ROTATE: tl.constexpr, PAIRS: tl.constexpr, STEPS: tl.constexpr, SCALES: tl.constexpr, TABLE_AXES: tl.constexpr,
):  # fmt: skip
    """Cosine and sine of the first and of the second piece; 1 and 0 where nothing is rotated."""
    cosine0, sine0, cosine1, sine1 = 1.0, 0.0, 1.0, 0.0
    if ROTATE:
        cosine0, sine0 = angles(
            positions, frequencies, place, stride_place, stride_axis, valid, 0, D0, PAIRS, STEPS, SCALES, TABLE_AXES
        )
        if D1 > 0:
            cosine1, sine1 = angles(
                positions,
                frequencies,
                place,
                stride_place,
                stride_axis,
                valid,
                D0,
                D1,
                PAIRS,
                STEPS,
                SCALES,
                TABLE_AXES,
            )
    return cosine0, sine0, cosine1, sine1


@triton.jit
def visible(segment, valid, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Block-diagonal mask of a tile: rows see used rows of their own segment, with CAUSAL those up to themselves."""
    seen = (segment[:, None] == segment[None, :]) & valid[None, :] & valid[:, None]
    if CAUSAL:
        seen = seen & (tl.arange(0, BLOCK)[None, :] <= tl.arange(0, BLOCK)[:, None])
    return seen


@triton.jit
def turn(x, cosine, sine):
    """Rotate neighbouring channels. Unrotated pairs pass exactly, infinities too: their sine is 0 and they are kept."""
    a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    still = sine == 0.0
    first = tl.where(still, a * cosine, a * cosine - b * sine)
    second = tl.where(still, b * cosine, b * cosine + a * sine)
    return tl.reshape(tl.join(first, second), (x.shape[0], x.shape[1]))


@triton.jit
def weight_piece(weight, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    channels = FIRST + tl.arange(0, WIDTH)
    return tl.load(weight + channels, mask=channels < HEAD_DIM, other=0.0).to(tl.float32)[None, :]


@triton.jit
def inverse_rms(x0, x1, eps, D1: tl.constexpr, HEAD_DIM: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of every row, from one or two pieces in float32."""
    squares = tl.sum(x0 * x0, 1)
    if D1 > 0:
        squares += tl.sum(x1 * x1, 1)
    return tl.div_rn(1.0, tl.sqrt_rn(squares / HEAD_DIM + eps))
