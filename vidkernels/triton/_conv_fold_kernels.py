# SPDX-License-Identifier: Apache-2.0
"""Kernels around a correlation whose taps in space became channels, or filters: before it and behind it.

A program serves positions of one row, so that what it finds out about rows and frames is one number, not one a
thread: a quotient of sizes known at run time costs about 20 instructions, and a packed position has only 64 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vidkernels.triton._conv_kernels import _epilogue

# Plus any coordinate or distance still far below 0, and beyond every size if read as unsigned.
_OUTSIDE = tl.constexpr(-(1 << 29))


@triton.jit
def _row_of(width, height, frames, BLOCK: tl.constexpr):
    """(row among all, clip, frame, row of the frame, first of BLOCK columns) of this program."""
    tiles = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // tiles
    image = row // height
    b = image // frames
    return row, b, image - b * frames, row - image * height, (tl.program_id(0) - row * tiles) * BLOCK


# Bands of frames differ in all sizes: Triton would compile again where one of them is 1 or a multiple of 16.
@triton.jit(
    do_not_specialize=[
        "frames", "height", "width", "source_height", "source_width", "base_h", "base_w",
        "s_batch", "s_frame", "s_height", "s_width",
    ]
)  # fmt: skip
def pack_kernel(
    source, packed, frames, height, width, source_height, source_width, base_h, base_w,
    s_batch: tl.int64, s_frame: tl.int64, s_height, s_width,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, MUL_H: tl.constexpr, MUL_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, REPLICATE_SPACE: tl.constexpr,
    LANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """packed[b, t, h, w, (kh, kw, c)] = source[b, t, h * MUL_H + base_h + kh * STEP_H, w * MUL_W + base_w + kw * STEP_W, c],
    zeros in the lanes behind; STEPS times BLOCK_M positions a program, since lanes cost 300 instructions to take apart."""
    row, b, t, h, first = _row_of(width, height, frames, STEPS * BLOCK_M)
    lane = tl.arange(0, BLOCK_L)
    tap = lane // CHANNELS
    at_h = h * MUL_H + base_h + tap // KW * STEP_H
    used = lane < KH * KW * CHANNELS
    if REPLICATE_SPACE:
        at_h = tl.minimum(tl.maximum(at_h, 0), source_height - 1)
    else:
        used = used & (at_h >= 0) & (at_h < source_height)
    shift = tl.where(used, tap % KW * STEP_W, _OUTSIDE)[None, :]
    source += b.to(tl.int64) * s_batch + t.to(tl.int64) * s_frame
    place = (at_h * s_height + lane % CHANNELS)[None, :]
    to = packed + row.to(tl.int64) * width * LANES
    for i in range(0, STEPS):
        w = first + i * BLOCK_M + tl.arange(0, BLOCK_M)
        at_w = tl.where(w < width, w * MUL_W + base_w, _OUTSIDE)[:, None] + shift
        if REPLICATE_SPACE:
            inside = at_w >= _OUTSIDE // 2
            at_w = tl.minimum(tl.maximum(at_w, 0), source_width - 1)
        else:
            inside = at_w.to(tl.uint32, bitcast=True) < source_width.to(tl.uint32, bitcast=True)
        value = tl.load(source + (place + at_w * s_width), mask=inside, other=0.0)
        tl.store(to + (w[:, None] * LANES + lane[None, :]), value, mask=(w < width)[:, None] & (lane < LANES)[None, :])


@triton.jit(
    do_not_specialize=[
        "frames", "height", "width", "sums_height", "sums_width", "base_h", "base_w",
        "y_batch", "y_frame", "y_height", "y_width", "r_batch", "r_frame", "r_height", "r_width",
    ]
)  # fmt: skip
def gather_kernel(
    sums, bias, residual, y, frames, height, width, sums_height, sums_width, base_h, base_w,
    y_batch: tl.int64, y_frame: tl.int64, y_height, y_width, r_batch: tl.int64, r_frame: tl.int64, r_height, r_width,
    FILTERS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SILU: tl.constexpr,
    LANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[b, t, h, w, n] = epilogue(sum over (kh, kw) of sums[b, t, h + base_h + kh * STEP_H, w + base_w + kw * STEP_W,
    (kh, kw, n)]), nothing from outside of `sums`."""
    _, b, t, h, column = _row_of(width, height, frames, BLOCK_M)
    w = column + tl.arange(0, BLOCK_M)
    own_w = tl.where(w < width, w + base_w, _OUTSIDE)
    n = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = (b * frames + t) * sums_height
    for kh in tl.static_range(KH):
        at_h = h + base_h + kh * STEP_H
        row_w = own_w + tl.where((at_h >= 0) & (at_h < sums_height), 0, _OUTSIDE)
        for kw in tl.static_range(KW):
            at_w = row_w + kw * STEP_W
            inside = at_w.to(tl.uint32, bitcast=True) < sums_width.to(tl.uint32, bitcast=True)
            place = ((first + at_h) * sums_width + at_w) * LANES + (kh * KW + kw) * FILTERS
            mask = inside[:, None] & (n < FILTERS)[None, :]
            total += tl.load(sums + (place[:, None] + n[None, :]), mask=mask, other=0.0)
    y += b.to(tl.int64) * y_batch + t.to(tl.int64) * y_frame + h * y_height
    residual += b.to(tl.int64) * r_batch + t.to(tl.int64) * r_frame + h * r_height
    _epilogue(
        total, bias, residual, y, w * y_width, w * r_width, n, w < width, FILTERS, HAS_BIAS, HAS_RESIDUAL, SILU,
    )  # fmt: skip
