# SPDX-License-Identifier: Apache-2.0
"""Kernels around a correlation whose taps in space became channels, or filters: before it and behind it."""

from __future__ import annotations

import triton
import triton.language as tl

from vidkernels.triton._conv_kernels import _epilogue, decode_positions


# Bands of frames differ in all sizes: Triton would compile again where one of them is 1 or a multiple of 16.
@triton.jit(
    do_not_specialize=[
        "positions", "frames", "height", "width", "source_height", "source_width", "base_h", "base_w",
        "s_batch", "s_frame", "s_height", "s_width",
    ]
)  # fmt: skip
def pack_kernel(
    source, packed, positions, frames, height, width, source_height, source_width, base_h, base_w,
    s_batch: tl.int64, s_frame: tl.int64, s_height, s_width,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, MUL_H: tl.constexpr, MUL_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, REPLICATE_SPACE: tl.constexpr,
    LANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """packed[b, t, h, w, (kh, kw, c)] = source[b, t, h * MUL_H + base_h + kh * STEP_H, w * MUL_W + base_w + kw * STEP_W, c],
    zeros in the lanes behind; BLOCK_M positions a program."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_L)
    row_mask = m < positions
    b, t, h, w = decode_positions(m, frames, height, width)
    tap = lane // CHANNELS
    at_h = (h * MUL_H + base_h)[:, None] + (tap // KW * STEP_H)[None, :]
    at_w = (w * MUL_W + base_w)[:, None] + (tap % KW * STEP_W)[None, :]
    inside = row_mask[:, None] & (lane < KH * KW * CHANNELS)[None, :]
    if REPLICATE_SPACE:
        at_h = tl.minimum(tl.maximum(at_h, 0), source_height - 1)
        at_w = tl.minimum(tl.maximum(at_w, 0), source_width - 1)
    else:
        inside = inside & (at_h >= 0) & (at_h < source_height) & (at_w >= 0) & (at_w < source_width)
    frame = b.to(tl.int64) * s_batch + t.to(tl.int64) * s_frame
    offset = at_h * s_height + at_w * s_width + (lane % CHANNELS)[None, :]
    value = tl.load(source + (frame[:, None] + offset), mask=inside, other=0.0)
    tl.store(packed + (m[:, None] * LANES + lane[None, :]), value, mask=row_mask[:, None] & (lane < LANES)[None, :])


@triton.jit(
    do_not_specialize=[
        "positions", "frames", "height", "width", "sums_height", "sums_width", "base_h", "base_w",
        "y_batch", "y_frame", "y_height", "y_width", "r_batch", "r_frame", "r_height", "r_width",
    ]
)  # fmt: skip
def gather_kernel(
    sums, bias, residual, y, positions, frames, height, width, sums_height, sums_width, base_h, base_w,
    y_batch: tl.int64, y_frame: tl.int64, y_height, y_width, r_batch: tl.int64, r_frame: tl.int64, r_height, r_width,
    FILTERS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SILU: tl.constexpr,
    LANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[b, t, h, w, n] = epilogue(sum over (kh, kw) of sums[b, t, h + base_h + kh * STEP_H, w + base_w + kw * STEP_W,
    (kh, kw, n)]), nothing from outside of `sums`; BLOCK_M positions a program."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    row_mask = m < positions
    b, t, h, w = decode_positions(m, frames, height, width)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = (b * frames + t) * sums_height
    for kh in tl.static_range(KH):
        at_h = h + base_h + kh * STEP_H
        inside_h = row_mask & (at_h >= 0) & (at_h < sums_height)
        for kw in tl.static_range(KW):
            at_w = w + base_w + kw * STEP_W
            inside = inside_h & (at_w >= 0) & (at_w < sums_width)
            row = ((first + at_h) * sums_width + at_w) * LANES + (kh * KW + kw) * FILTERS
            mask = inside[:, None] & (n < FILTERS)[None, :]
            total += tl.load(sums + (row[:, None] + n[None, :]), mask=mask, other=0.0)
    b, t = b.to(tl.int64), t.to(tl.int64)
    y_row = b * y_batch + t * y_frame + (h * y_height + w * y_width)
    r_row = b * r_batch + t * r_frame + (h * r_height + w * r_width)
    _epilogue(total, bias, residual, y, y_row, r_row, n, row_mask, FILTERS, HAS_BIAS, HAS_RESIDUAL, SILU)
