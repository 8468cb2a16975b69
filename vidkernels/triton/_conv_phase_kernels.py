# SPDX-License-Identifier: Apache-2.0
"""Convolutions of an upsampled tensor without it: the weights of all phases, then all phases.

A phase reads few elements through summed taps (`_conv.phases`). What differs from phase to phase stands in tables of 32-bit
values on the device, so that one launch makes all weights and one computes all phases, with few arguments and without a
compilation for every rule.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vidkernels.triton._attention import rounded
from vidkernels.triton._conv_kernels import _store_tile, _sum_boxes, _zeros


@triton.jit
def _mixture(factors, values, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Sum of COUNT values, from FIRST on, by the factors there; a value with factor zero may be infinite."""
    factor = tl.load(factors).to(tl.float32, bitcast=True)
    total = tl.where(factor != 0.0, values[FIRST] * factor, 0.0)
    for i in tl.static_range(1, COUNT):
        factor = tl.load(factors + i).to(tl.float32, bitcast=True)
        total += tl.where(factor != 0.0, values[FIRST + i * STEP] * factor, 0.0)
    return total


@triton.jit
def _store_weights(
    out, total, n, r, mask, filters, channels, before, index, taps, STACKED: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Weights of filter n at tap `index` of a phase with `taps`, `before` which lie the taps of other phases."""
    row = (before + index) * filters + n if STACKED else before * filters + n * taps + index
    tl.store(out + row.to(tl.int64) * channels + r, rounded(total, out.dtype.element_ty, UPCAST), mask=mask)


# Counts that differ from layer to layer: each of them that is 1 or a multiple of 16 would be another compilation.
@triton.jit(do_not_specialize=["filters", "outs_t", "outs_h", "outs_w"])
def phase_weights_kernel(
    weight, bias, mix_factor, table, out, filters, channels, outs_t, outs_h, outs_w,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SPACE: tl.constexpr, BLEND: tl.constexpr,
    HAS_BIAS: tl.constexpr, FRAME: tl.constexpr, CENTER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, STACKED: tl.constexpr, UPCAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One filter, BLOCK channels, all taps of all phases: every tap is read once, sums are float32 and rounded once.

    weight: [filters, channels, KT, KH, KW], or with the channels last. `table`, per element read along an axis, first of all
    of the time: elements of the runs before, elements of its own run, its place there, and the factor of every tap of the
    kernel, whose bits are those of a float32. SPACE: the same of rows and columns follows; without it they are not mixed.
    `out`: [taps of all phases, filters, channels] if STACKED, else [filters, taps, channels] of phase after phase; then the
    bias of a BLEND, `s(m) u + (1 - s(m)) conv(u)`. Its smooth part is added at tap (FRAME, CENTER); -1: a share at every
    frame's; CENTER -1: not at all.
    """
    space: tl.constexpr = KH * KW
    blocks = tl.cdiv(channels, BLOCK)
    n = tl.program_id(0) // blocks
    first = (tl.program_id(0) - n * blocks) * BLOCK
    r = first + tl.arange(0, BLOCK)
    mask = r < channels
    rest, smooth = 1.0, 0.0
    if BLEND:
        mix = tl.load(mix_factor).to(tl.float64)
        rest = (1.0 / (1.0 + tl.exp(mix))).to(tl.float32)
        smooth = 1.0 / (1.0 + tl.exp(-mix))
        smooth = (smooth / KT if FRAME < 0 else smooth).to(tl.float32)
        if HAS_BIAS:
            scaled = tl.load(bias + n).to(tl.float32) * rest
            end = out + (filters * outs_t * outs_h * outs_w).to(tl.int64) * channels
            tl.store(end + n, rounded(scaled, out.dtype.element_ty, UPCAST), mask=first == 0)
    source = weight + n.to(tl.int64) * (channels * (KT * space))
    taps = ()
    for j in tl.static_range(KT * space):
        if CHANNELS_LAST:
            value = tl.load(source + (r + j * channels), mask=mask, other=0.0).to(tl.float32)
        else:
            value = tl.load(source + (r * (KT * space) + j), mask=mask, other=0.0).to(tl.float32)
        if BLEND:
            value *= rest
            if j % space == CENTER and (FRAME < 0 or j // space == FRAME):
                value += tl.where(r == n, smooth, 0.0)
        taps = taps + (value,)
    rows = table + outs_t * (3 + KT)
    columns = rows + outs_h * (3 + KH)
    for t in range(0, outs_t):
        at_t = table + t * (3 + KT)
        before_t, size_t, index_t = tl.load(at_t), tl.load(at_t + 1), tl.load(at_t + 2)
        frame = ()
        for k in tl.static_range(space):
            frame = frame + (_mixture(at_t + 3, taps, k, space, KT),)
        if SPACE:
            for h in range(0, outs_h):
                at_h = rows + h * (3 + KH)
                before_h, size_h, index_h = tl.load(at_h), tl.load(at_h + 1), tl.load(at_h + 2)
                row = ()
                for k in tl.static_range(KW):
                    row = row + (_mixture(at_h + 3, frame, k, KW, KH),)
                for w in range(0, outs_w):
                    at_w = columns + w * (3 + KW)
                    before_w, size_w, index_w = tl.load(at_w), tl.load(at_w + 1), tl.load(at_w + 2)
                    before = before_t * (outs_h * outs_w) + size_t * (before_h * outs_w + size_h * before_w)
                    index = (index_t * size_h + index_h) * size_w + index_w
                    total = _mixture(at_w + 3, row, 0, 1, KW)
                    size = size_t * size_h * size_w
                    _store_weights(out, total, n, r, mask, filters, channels, before, index, size, STACKED, UPCAST)
        else:
            for k in tl.static_range(space):
                _store_weights(
                    out, frame[k], n, r, mask, filters, channels, before_t * space, index_t * space + k,
                    size_t * space, STACKED, UPCAST,
                )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "group", "entries", "tiles_h", "tiles_w", "channels", "source_frames", "history_frames", "frames", "height", "width",
        "kernel_h", "kernel_w", "scale_h", "scale_w",
    ]
)  # fmt: skip
def phase_box_kernel(
    source, history, weight, weight2, bias, y, table, group, entries, tiles_h, tiles_w, filters, channels,
    source_frames, history_frames, frames, height, width, kernel_h, kernel_w, scale_h, scale_w,
    REPLICATE: tl.constexpr, HAS_HISTORY: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_N2: tl.constexpr, BLOCK_C: tl.constexpr,
    TRANSPOSED: tl.constexpr, HALVES: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """`_conv_box_kernel` of all phases. y: [B, frames, height, width, filters] without gaps.

    `table`, per frame of a phase in space: its weights' first tap along time (of kernel_h * kernel_w each), their number, the
    first frame read, the frame of y; then first row read, first row of y, rows; then the same of columns. Entries of one frame
    follow each other, and `group` rows of boxes pass through all of them before the next rows do: all phases find the rows
    that they share in L2.
    """
    blocks_n = tl.cdiv(filters, BLOCK_N + BLOCK_N2)
    tile = tl.program_id(0) // blocks_n
    n = (tl.program_id(0) - tile * blocks_n) * (BLOCK_N + BLOCK_N2)
    tile_w = tile % tiles_w
    tile = tile // tiles_w
    b = tile // (tiles_h * entries)
    tile -= b * (tiles_h * entries)
    first = tile // (group * entries) * group
    tile -= first * entries
    shared = tl.minimum(tiles_h - first, group)
    o = tile // shared
    h0, w0 = (first + tile - o * shared) * BLOCK_H, tile_w * BLOCK_W
    entry = table + o * 10
    tap, kernel_t, t, frame = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    base_h, top, rows = tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)
    base_w, left, columns = tl.load(entry + 7), tl.load(entry + 8), tl.load(entry + 9)
    total = _zeros(BLOCK_H * BLOCK_W, BLOCK_N, TRANSPOSED)
    total2 = _zeros(BLOCK_H * BLOCK_W, BLOCK_N2 if BLOCK_N2 else 1, TRANSPOSED)
    split = tap
    if HAS_HISTORY:
        split += tl.minimum(tl.maximum(-t, 0), kernel_t)
        total, total2 = _sum_boxes(
            total, total2, history, weight, weight2, b, t + history_frames - tap, h0 + base_h, w0 + base_w, n,
            history_frames - 1, tap, split, channels, kernel_h, kernel_w, 1, 1, 1,
            REPLICATE, BLOCK_H, BLOCK_W, BLOCK_N, BLOCK_N2, BLOCK_C, TRANSPOSED, UPCAST, PRECISION, WAIT,
        )  # fmt: skip
    total, total2 = _sum_boxes(
        total, total2, source, weight, weight2, b, t - tap, h0 + base_h, w0 + base_w, n,
        source_frames - 1, split, tap + kernel_t, channels, kernel_h, kernel_w, 1, 1, 1,
        REPLICATE, BLOCK_H, BLOCK_W, BLOCK_N, BLOCK_N2, BLOCK_C, TRANSPOSED, UPCAST, PRECISION, WAIT,
    )  # fmt: skip
    y += (b.to(tl.int64) * frames + frame) * height * width * filters
    position = tl.arange(0, BLOCK_H * BLOCK_W)
    h, w = h0 + position // BLOCK_W, w0 + position % BLOCK_W
    mask = (h < rows) & (w < columns)
    y_row = ((top + h * scale_h) * width + (left + w * scale_w)) * filters
    if TRANSPOSED:
        total = tl.trans(total)
        total2 = tl.trans(total2)
    _store_tile(
        total, bias, y, y, y_row, y_row, n, mask, filters, HAS_BIAS, False, False, BLOCK_H * BLOCK_W, BLOCK_N, HALVES
    )
    if BLOCK_N2:
        _store_tile(
            total2, bias, y, y, y_row, y_row, n + BLOCK_N, mask, filters, HAS_BIAS, False, False,
            BLOCK_H * BLOCK_W, BLOCK_N2, False,
        )  # fmt: skip
