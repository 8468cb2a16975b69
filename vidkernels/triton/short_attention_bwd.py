# SPDX-License-Identifier: Apache-2.0
"""Backward of attention over short segments: one pass over q, k, v and grad_out gives all gradients.

A tile holds whole segments, so the softmax is recomputed from q and k alone: nothing but the inputs is saved, and the
gradients go back through rotation and norm before they are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vidkernels.triton import _launch
from vidkernels.triton._attention import add_product, product, rounded, sign_and_unit
from vidkernels.triton._device import family
from vidkernels.triton._short_rows import (
    axial_offsets,
    axial_rows,
    head_angles,
    inverse_rms,
    load_head,
    packed_rows,
    result_offsets,
    store_head,
    store_rows,
    tile_and_head,
    turn,
    visible,
    weight_piece,
)
from vidkernels.triton.short_attention import (
    ShortConfig,
    aligned,
    constants,
    grid_of,
    launch_key,
    layout,
    prologue,
    short_config,
    softmax,
)


@triton.jit
def _store_sum(target, value, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    channels = FIRST + tl.arange(0, WIDTH)
    tl.store(target + channels, value, mask=channels < HEAD_DIM)


@triton.jit
def _epilogue(
    pointer, rows, used, d0, d1, weight, sums, cosine0, sine0, cosine1, sine1, eps,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ROTATE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of the raw rows from that of the normed and rotated ones; stores this head's share of the weight's.

    The raw rows are read again, from the cache: kept alive beside the softmax they would spill.
    """
    if ROTATE:
        d0 = turn(d0, cosine0, -sine0)
        if D1 > 0:
            d1 = turn(d1, cosine1, -sine1)
    if NORM:
        y0, y1 = load_head(pointer, rows, used, D0, D1, HEAD_DIM)
        y0, y1 = y0.to(tl.float32), y1.to(tl.float32)
        factor = inverse_rms(y0, y1, eps, D1, HEAD_DIM)[:, None]
        y0 = y0 * factor
        if HAS_WEIGHT:
            _store_sum(sums, tl.sum(d0 * y0, 0), 0, D0, HEAD_DIM)
            d0 = d0 * weight_piece(weight, 0, D0, HEAD_DIM)
        along = tl.sum(d0 * y0, 1)
        if D1 > 0:
            y1 = y1 * factor
            if HAS_WEIGHT:
                _store_sum(sums, tl.sum(d1 * y1, 0), D0, D1, HEAD_DIM)
                d1 = d1 * weight_piece(weight, D0, D1, HEAD_DIM)
            along += tl.sum(d1 * y1, 1)
        along = (along / HEAD_DIM)[:, None]
        d0 = (d0 - y0 * along) * factor
        if D1 > 0:
            d1 = (d1 - y1 * along) * factor
    d0 = rounded(d0, pointer.dtype.element_ty, UPCAST)
    if D1 > 0:
        d1 = rounded(d1, pointer.dtype.element_ty, UPCAST)
    return d0, d1


@triton.jit(do_not_specialize=["segments", "inner", "step"])
def _short_attention_bwd_kernel(
    q, k, v, grad_out, grad_q, grad_k, grad_v, grad_weights, q_weight, k_weight, positions, frequencies, cu_seqlens,
    segments, heads, inner, step,
    q_outer, q_axis, q_inner, q_head, k_outer, k_axis, k_inner, k_head, v_outer, v_axis, v_inner, v_head,
    g_outer, g_axis, g_inner, g_head, position_place, position_axis, eps, unit, scale,
    LENGTH: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROTATE: tl.constexpr, PAIRS: tl.constexpr,
    STEPS: tl.constexpr, SCALES: tl.constexpr, TABLE_AXES: tl.constexpr, CAUSAL: tl.constexpr, SIGN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradients are contiguous, as the forward's output."""
    tile, first_head = tile_and_head(heads, HEADS)
    if LENGTH == 0:
        place, segment, valid, begin, end = packed_rows(cu_seqlens, segments, step, tile, BLOCK)
        if begin >= end:
            return
        rows_q, rows_k, rows_v = place * (q_axis * ALIGN), place * (k_axis * ALIGN), place * (v_axis * ALIGN)
        rows_g = place * (g_axis * ALIGN)
    else:
        place, segment, valid, begin, end = axial_rows(segments, tile, LENGTH, BLOCK)
        rows_q = axial_offsets(segment, place, inner, q_outer, q_axis, q_inner) * ALIGN
        rows_k = axial_offsets(segment, place, inner, k_outer, k_axis, k_inner) * ALIGN
        rows_v = axial_offsets(segment, place, inner, v_outer, v_axis, v_inner) * ALIGN
        rows_g = axial_offsets(segment, place, inner, g_outer, g_axis, g_inner) * ALIGN
    rows_o = result_offsets(segment, place, inner, heads, LENGTH, HEAD_DIM)
    seen = visible(segment, valid, BLOCK, CAUSAL)
    cosine0, sine0, cosine1, sine1 = head_angles(
        positions, frequencies, place, position_place, position_axis, valid, D0, D1, ROTATE, PAIRS, STEPS, SCALES,
        TABLE_AXES,
    )  # fmt: skip
    for member in range(0, HEADS):
        head = first_head + member
        used = valid & (head + tl.zeros((BLOCK,), tl.int32) < heads)
        at_q = q + head.to(tl.int64) * (q_head * ALIGN)
        at_k = k + head.to(tl.int64) * (k_head * ALIGN)
        at_v = v + head.to(tl.int64) * (v_head * ALIGN)
        at_g = grad_out + head.to(tl.int64) * (g_head * ALIGN)
        x0, x1 = load_head(at_q, rows_q, used, D0, D1, HEAD_DIM)
        y0, y1 = load_head(at_k, rows_k, used, D0, D1, HEAD_DIM)
        v0, v1 = load_head(at_v, rows_v, used, D0, D1, HEAD_DIM)
        g0, g1 = load_head(at_g, rows_g, used, D0, D1, HEAD_DIM)
        q0, q1 = prologue(
            x0, x1, q_weight, cosine0, sine0, cosine1, sine1, eps, HEAD_DIM, D0, D1, NORM, HAS_WEIGHT, ROTATE, UPCAST
        )
        k0, k1 = prologue(
            y0, y1, k_weight, cosine0, sine0, cosine1, sine1, eps, HEAD_DIM, D0, D1, NORM, HAS_WEIGHT, ROTATE, UPCAST
        )
        weights = softmax(q0, q1, k0, k1, seen, unit, D1, SIGN, UPCAST, PRECISION)
        grad = product(g0, tl.trans(v0), UPCAST, PRECISION)
        if D1 > 0:
            grad = add_product(g1, tl.trans(v1), grad, UPCAST, PRECISION)
        grad = tl.where(seen, grad, 0.0)
        change = tl.sum(weights * grad, 1)
        scores = rounded(weights * (grad - change[:, None]) * scale, q0.dtype, UPCAST)
        turned = tl.trans(rounded(weights, g0.dtype, UPCAST))
        at = head.to(tl.int64) * HEAD_DIM
        grad_v0 = rounded(product(turned, g0, UPCAST, PRECISION), v0.dtype, UPCAST)
        store_rows(grad_v + at, rows_o, used, grad_v0, 0, D0, HEAD_DIM)
        d0 = product(scores, k0, UPCAST, PRECISION)
        e0 = product(tl.trans(scores), q0, UPCAST, PRECISION)
        d1, e1 = d0, e0
        if D1 > 0:
            grad_v1 = rounded(product(turned, g1, UPCAST, PRECISION), v0.dtype, UPCAST)
            store_rows(grad_v + at, rows_o, used, grad_v1, D0, D1, HEAD_DIM)
            d1 = product(scores, k1, UPCAST, PRECISION)
            e1 = product(tl.trans(scores), q1, UPCAST, PRECISION)
        # The share of program p and its member: row p * HEADS + member, as tiles walk over all groups of heads.
        sums = grad_weights + (tl.program_id(0).to(tl.int64) * HEADS + member) * (2 * HEAD_DIM)
        d0, d1 = _epilogue(
            at_q, rows_q, used, d0, d1, q_weight, sums, cosine0, sine0, cosine1, sine1, eps,
            HEAD_DIM, D0, D1, NORM, HAS_WEIGHT, ROTATE, UPCAST,
        )  # fmt: skip
        e0, e1 = _epilogue(
            at_k, rows_k, used, e0, e1, k_weight, sums + HEAD_DIM, cosine0, sine0, cosine1, sine1, eps,
            HEAD_DIM, D0, D1, NORM, HAS_WEIGHT, ROTATE, UPCAST,
        )  # fmt: skip
        store_head(grad_q + at, rows_o, used, d0, d1, D0, D1, HEAD_DIM)
        store_head(grad_k + at, rows_o, used, e0, e1, D0, D1, HEAD_DIM)


def short_attention_bwd(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    longest: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    positions: torch.Tensor | None,
    frequencies: torch.Tensor | None,
    axes: list[int],
    theta: list[float],
    position_scale: list[float],
    norm: bool,
    eps: float,
    causal: bool,
    scale: float,
    config: ShortConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and of the two weights (`[0]` without weights)."""
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    weight_count = 0 if q_weight is None else q.shape[-1]
    if q.numel() == 0:
        nothing = torch.zeros((0, 2, weight_count), dtype=torch.float32, device=q.device)
        return (*grads, *_weight_grads(nothing, q_weight, k_weight, q))
    length = q.shape[1] if cu_seqlens is None else 0
    segments = q.shape[0] * q.shape[2] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    longest = max(longest, 1)
    inside = norm or positions is not None
    config = config or short_config("bwd", q.shape[-1], q.shape[-2], family(q.device), length == 0, length, inside)
    (tiles, groups), step = grid_of(q, segments, length, longest, config)
    # One row per tile and head, added up in order: the same bits in every run. Tiles without a segment leave theirs at 0.
    rows = tiles * groups * config.heads
    sums = torch.zeros((rows, 2, weight_count), dtype=torch.float32, device=q.device)
    tensors = q, k, v, grad_out, *grads, sums, cu_seqlens, q_weight, k_weight, positions, frequencies
    key = launch_key(tensors, "bwd", longest, axes, theta, position_scale, norm, eps, causal, scale, config)
    if not _launch.repeat(key, tensors):
        sign, unit = sign_and_unit(scale)
        align, (sq, sk, sv, sg) = aligned(q, k, v, grad_out)
        args = (
            q, k, v, grad_out, *grads, sums, q if q_weight is None else q_weight, k if k_weight is None else k_weight,
            q if positions is None else positions, q if frequencies is None else frequencies,
            q if cu_seqlens is None else cu_seqlens,
            segments, q.shape[-2], q.shape[2] if length else 1, step,
            *layout(q, sq), *layout(k, sk), *layout(v, sv), *layout(grad_out, sg),
            *((0, 0) if positions is None else positions.stride()), eps, unit, scale,
        )  # fmt: skip
        options = constants(
            q, config, length, q_weight, positions, frequencies, axes, theta, position_scale, norm, causal, sign
        )
        options["ALIGN"] = align
        _launch.launch(_short_attention_bwd_kernel, (tiles * groups,), args, options, key, tensors)
    return (*grads, *_weight_grads(sums, q_weight, k_weight, q))


def _weight_grads(
    sums: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if q_weight is None or k_weight is None:
        return q.new_empty(0), q.new_empty(0)
    sums = sums.sum(0)
    return sums[0].to(q_weight.dtype, copy=True), sums[1].to(k_weight.dtype, copy=True)
