# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the alpha blend. The sums over frames are those of csrc/alpha_blend/alpha_blend.h.

A program owns one frame of one piece of positions. Programs of neighbouring frames of one piece follow each other, so
that frames which several of them read come from the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _linked(i, frames, history, lookahead, split):
    """Whether linear interpolation blends frame i with frame i + 1."""
    inside = (i < frames - 1) | (lookahead > 0)
    cut = (split > 0) & (i == split - 1)
    return tl.where(i == -1, history > 0, inside & (cut == 0))


@triton.jit
def _forward_tap(K: tl.constexpr, j, frames, history, lookahead, split, MODE: tl.constexpr):
    """Frame and coefficient of the K-th term of output frame j, and whether there is such a term."""
    coefficient = 1.0
    if MODE == 0:
        frame = j
        present = frame >= 0
    elif MODE == 5:
        frame = j // 2
        present = frame >= 0
    elif MODE == 6:
        i = j // 2
        neighbour = i - 1 + 2 * (j % 2)
        blends = _linked(tl.minimum(i, neighbour), frames, history, lookahead, split)
        if K == 0:
            frame = i
            coefficient = tl.where(blends, 0.75, 1.0)
            present = frame >= 0
        else:
            frame = neighbour
            coefficient = 0.25
            present = blends
    else:
        if MODE == 3:
            frame = 2 * j + K
        elif MODE == 4:
            frame = 2 * j + K - history
        else:
            frame = 2 * j + K - 1
        present = frame < frames
        if MODE == 1:
            present = present & (frame >= 0)
        if MODE == 2:
            frame = tl.maximum(frame, 0)
    return frame, coefficient, present


@triton.jit
def _backward_tap(K: tl.constexpr, i, frames, out_frames, history, lookahead, split, MODE: tl.constexpr):
    """Output frame and coefficient of the K-th term of the gradient of frame i, and whether there is such a term."""
    coefficient = 1.0
    if MODE == 0:
        frame = i
        present = i >= 0
    elif MODE == 5:
        frame = 2 * i + K
        present = i >= 0
    elif MODE == 6:
        before = _linked(i - 1, frames, history, lookahead, split)
        behind = _linked(i, frames, history, lookahead, split)
        inside = (i >= 0) & (i < frames)
        frame = 2 * i - 1 + K
        if K == 0:
            coefficient = 0.25
            present = (i > 0) & before
        elif K == 1:
            coefficient = tl.where(before, 0.75, 1.0)
            present = inside
        elif K == 2:
            coefficient = tl.where(behind, 0.75, 1.0)
            present = inside
        else:
            coefficient = 0.25
            present = (i < frames - 1) & behind
    else:
        position = i
        if MODE == 4:
            position = i + history
        elif MODE != 3:
            position = i + 1
        even = position % 2 == 0
        frame = tl.where(even, position // 2 - 1, position // 2) + K
        present = (frame >= 0) & (2 * frame <= position) & (frame < out_frames)
        if MODE == 2:
            coefficient = tl.where(i == 0, 2.0, 1.0)
    return frame, coefficient, present


@triton.jit
def _locate(frame_count, inner, BLOCK: tl.constexpr):
    """Frame, outer position, inner positions and mask of this program."""
    program = tl.program_id(0).to(tl.int64)
    pieces = tl.cdiv(inner, BLOCK)
    frame = program % frame_count
    rest = program // frame_count
    at = (rest % pieces) * BLOCK + tl.arange(0, BLOCK)
    return frame, rest // pieces, at, at < inner


@triton.jit
def _gather(
    x,
    history_ptr,
    lookahead_ptr,
    x_outer,
    x_frame,
    h_outer,
    h_frame,
    l_outer,
    j,
    outer,
    at,
    inner,
    frames,
    history,
    lookahead,
    split,
    MODE: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    HAS_LOOKAHEAD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The terms of output frame j, added in DTYPE, not yet times the pool's 1/3."""
    total = tl.zeros_like(at).to(DTYPE)
    for k in tl.static_range(TERMS):
        frame, coefficient, present = _forward_tap(k, j, frames, history, lookahead, split, MODE)
        used = at < tl.where(present & (frame >= 0) & (frame < frames), inner, 0)
        value = tl.load(x + outer * x_outer + frame * x_frame + at, mask=used, other=0.0).to(DTYPE)
        if HAS_HISTORY:
            used = at < tl.where(present & (frame < 0), inner, 0)
            offset = outer * h_outer + (frame + history) * h_frame
            value += tl.load(history_ptr + offset + at, mask=used, other=0.0).to(DTYPE)
        if HAS_LOOKAHEAD:
            used = at < tl.where(present & (frame >= frames), inner, 0)
            value += tl.load(lookahead_ptr + outer * l_outer + at, mask=used, other=0.0).to(DTYPE)
        total += coefficient * value
    return total


@triton.jit
def _sigmoid_pair(mix_ptr):
    """sigmoid(m) and sigmoid(-m), without cancellation."""
    m = tl.load(mix_ptr).to(tl.float32)
    e = tl.exp(-tl.abs(m))
    large = 1.0 / (1.0 + e)
    small = e / (1.0 + e)
    return tl.where(m < 0, small, large), tl.where(m < 0, large, small)


@triton.jit(do_not_specialize=["frames", "out_frames", "history", "lookahead", "split"])
def _alpha_blend_fwd_kernel(
    x,
    b,
    y,
    mix_ptr,
    history_ptr,
    lookahead_ptr,
    x_outer,
    x_frame,
    y_outer,
    y_frame,
    h_outer,
    h_frame,
    l_outer,
    inner,
    frames,
    out_frames,
    history,
    lookahead,
    split,
    MODE: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    HAS_LOOKAHEAD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    j, outer, at, mask = _locate(out_frames, inner, BLOCK)
    alpha, beta = _sigmoid_pair(mix_ptr)
    mixed = _gather(
        x, history_ptr, lookahead_ptr, x_outer, x_frame, h_outer, h_frame, l_outer, j, outer, at, inner, frames,
        history, lookahead, split, MODE, TERMS, HAS_HISTORY, HAS_LOOKAHEAD, tl.float32,
    )  # fmt: skip
    offset = outer * y_outer + j * y_frame + at
    second = tl.load(b + offset, mask=mask, other=0.0).to(tl.float32)
    out = (alpha * SCALE) * mixed + beta * second
    tl.store(y + offset, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["frames", "out_frames", "history", "lookahead", "split"])
def _alpha_blend_bwd_b_kernel(
    dy,
    x,
    b,
    db,
    partial,
    mix_ptr,
    history_ptr,
    lookahead_ptr,
    x_outer,
    x_frame,
    y_outer,
    y_frame,
    h_outer,
    h_frame,
    l_outer,
    inner,
    frames,
    out_frames,
    history,
    lookahead,
    split,
    MODE: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    HAS_LOOKAHEAD: tl.constexpr,
    SCALE: tl.constexpr,
    WANT_B: tl.constexpr,
    WANT_MIX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    j, outer, at, mask = _locate(out_frames, inner, BLOCK)
    offset = outer * y_outer + j * y_frame + at
    grad = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32)
    if WANT_B:
        _, beta = _sigmoid_pair(mix_ptr)
        tl.store(db + offset, (beta * grad).to(db.dtype.element_ty), mask=mask)
    if WANT_MIX:
        # Millions of products of either sign: all in float64, so that their sum keeps its digits. Frames of float32
        # interpolated in float32 would have more error than that sum.
        mixed = _gather(
            x, history_ptr, lookahead_ptr, x_outer, x_frame, h_outer, h_frame, l_outer, j, outer, at, inner, frames,
            history, lookahead, split, MODE, TERMS, HAS_HISTORY, HAS_LOOKAHEAD, tl.float64,
        )  # fmt: skip
        second = tl.load(b + offset, mask=mask, other=0.0).to(tl.float64)
        terms = grad.to(tl.float64) * (mixed * SCALE - second)
        tl.store(partial + tl.program_id(0).to(tl.int64), tl.sum(terms, axis=0))


@triton.jit(do_not_specialize=["first", "count", "frames", "out_frames", "history", "lookahead", "split"])
def _alpha_blend_bwd_x_kernel(
    dy,
    dx,
    mix_ptr,
    x_outer,
    x_frame,
    y_outer,
    y_frame,
    inner,
    first,
    count,
    frames,
    out_frames,
    history,
    lookahead,
    split,
    MODE: tl.constexpr,
    TERMS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, outer, at, mask = _locate(count, inner, BLOCK)
    alpha, _ = _sigmoid_pair(mix_ptr)
    total = tl.zeros_like(at).to(tl.float32)
    for k in tl.static_range(TERMS):
        tap = _backward_tap(k, index + first, frames, out_frames, history, lookahead, split, MODE)
        frame, coefficient, present = tap
        used = at < tl.where(present, inner, 0)
        value = tl.load(dy + outer * y_outer + frame * y_frame + at, mask=used, other=0.0).to(tl.float32)
        total += coefficient * value
    out = (alpha * SCALE) * total
    tl.store(dx + outer * x_outer + index * x_frame + at, out.to(dx.dtype.element_ty), mask=mask)
