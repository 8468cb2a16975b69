# SPDX-License-Identifier: Apache-2.0
"""Backward of the query/key norm and rotation in Triton.

With xhat = x r, r = 1 / sqrt(mean(x^2) + eps) and dz = dy turned back: dx = r (w dz - xhat mean(w dz xhat)) and
dw = sum dz xhat. As many programs as fit the device walk over the tokens; each keeps one row of partial sums for the
weights, and the rows are added in order afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidkernels.triton._sizes import cdiv
from vidkernels.triton.qk_norm_rope import (
    CLOSED,
    FULL,
    HEAD,
    LANES,
    TABLE,
    TABLE_PER_HEAD,
    Call,
    aligned_strides,
    angles,
    channels,
    inverse_rms,
    load_pairs,
    load_weight,
    rotate,
    store_pairs,
    tile_of,
    token_count,
)


@triton.jit
def _load_cotangent(
    dy, dy_head, head, head_mask, row_mask, pair, first, second, positions, axis_stride, token_mask, frequencies, heads,
    cosine, sine,
    HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, PAIRS: tl.constexpr, STEPS: tl.constexpr, SCALES: tl.constexpr,
    AXES: tl.constexpr, ROTATION: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dy of some heads, turned back by the angles."""
    a, b = load_pairs(
        dy[:, None] + (head.to(tl.int64) * dy_head * ALIGN)[None, :], row_mask, pair, first, second, HEAD_DIM, LAYOUT
    )
    if ROTATION == TABLE_PER_HEAD:
        own_cosine, own_sine = angles(
            positions, axis_stride, token_mask, frequencies, pair, head, head_mask, heads,
            ROTATED, PAIRS, STEPS, SCALES, AXES, ROTATION,
        )  # fmt: skip
        a, b = rotate(a, b, own_cosine, -own_sine, pair, ROTATED)
    elif ROTATION != 0:
        a, b = rotate(a, b, cosine, -sine, pair, ROTATED)
    return a, b


@triton.jit
def _backward_side(
    x, dy, dx, weight, partial, sum_a, sum_b, heads, x_head, dy_head, dx_head, begin,
    positions, axis_stride, token_mask, frequencies, cosine, sine, eps,
    HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, PAIRS: tl.constexpr, STEPS: tl.constexpr, SCALES: tl.constexpr,
    AXES: tl.constexpr, ROTATION: tl.constexpr, NORM: tl.constexpr, LAYOUT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WEIGHT_GRADS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One side of a block of tokens. Adds to sum_a, sum_b (norm per head) or to the row at `partial` (full norm)."""
    pair = tl.arange(0, BLOCK_P)
    pair_mask = pair < HEAD_DIM // 2
    first, second = channels(pair, ROTATED, PAIRS, LAYOUT)
    if NORM == FULL:
        squares, products = tl.zeros((BLOCK_T,), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
        for start in range(0, heads, BLOCK_H):
            head = start + tl.arange(0, BLOCK_H)
            head_mask = head < heads
            row_mask = token_mask[:, None] & head_mask[None, :]
            a, b = load_pairs(
                x[:, None] + (head.to(tl.int64) * x_head * ALIGN)[None, :],
                row_mask,
                pair,
                first,
                second,
                HEAD_DIM,
                LAYOUT,
            )
            da, db = _load_cotangent(
                dy, dy_head, head, head_mask, row_mask, pair, first, second, positions, axis_stride, token_mask, frequencies,
                heads, cosine, sine, HEAD_DIM, ROTATED, PAIRS, STEPS, SCALES, AXES, ROTATION, LAYOUT, ALIGN,
            )  # fmt: skip
            if HAS_WEIGHT:
                weight_a, weight_b = load_weight(weight, head, head_mask, pair, first, second, HEAD_DIM, NORM, LAYOUT)
                da, db = da * weight_a, db * weight_b
            squares += tl.sum(tl.sum(a * a + b * b, 2), 1)
            products += tl.sum(tl.sum(a * da + b * db, 2), 1)
        count = heads * HEAD_DIM * 1.0
        token_factor = inverse_rms(squares, count, eps)[:, None]
        token_mean = token_factor * tl.div_rn(products, count)[:, None]
    for start in range(0, heads, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)
        head_mask = head < heads
        row_mask = token_mask[:, None] & head_mask[None, :]
        da, db = _load_cotangent(
            dy, dy_head, head, head_mask, row_mask, pair, first, second, positions, axis_stride, token_mask, frequencies,
            heads, cosine, sine, HEAD_DIM, ROTATED, PAIRS, STEPS, SCALES, AXES, ROTATION, LAYOUT, ALIGN,
        )  # fmt: skip
        if NORM != 0:
            a, b = load_pairs(
                x[:, None] + (head.to(tl.int64) * x_head * ALIGN)[None, :],
                row_mask,
                pair,
                first,
                second,
                HEAD_DIM,
                LAYOUT,
            )
            if NORM == HEAD:
                factor = inverse_rms(tl.sum(a * a + b * b, 2), HEAD_DIM * 1.0, eps)
            else:
                factor = token_factor
            a, b = a * factor[:, :, None], b * factor[:, :, None]
            if WEIGHT_GRADS:
                own_a, own_b = tl.sum(da * a, 0), tl.sum(db * b, 0)  # [heads, pairs]
                if NORM == HEAD:
                    sum_a += tl.sum(own_a, 0)
                    sum_b += tl.sum(own_b, 0)
                else:
                    row = partial + (head * HEAD_DIM)[:, None]
                    own_mask = head_mask[:, None] & pair_mask[None, :]
                    old = own_mask & (begin > 0)
                    tl.store(
                        row + first[None, :], tl.load(row + first[None, :], mask=old, other=0.0) + own_a, mask=own_mask
                    )
                    tl.store(
                        row + second[None, :],
                        tl.load(row + second[None, :], mask=old, other=0.0) + own_b,
                        mask=own_mask,
                    )
            if HAS_WEIGHT:
                weight_a, weight_b = load_weight(weight, head, head_mask, pair, first, second, HEAD_DIM, NORM, LAYOUT)
                da, db = da * weight_a, db * weight_b
            if NORM == HEAD:
                mean = tl.div_rn(tl.sum(a * da + b * db, 2), HEAD_DIM * 1.0)
            else:
                mean = token_mean
            da = factor[:, :, None] * (da - a * mean[:, :, None])
            db = factor[:, :, None] * (db - b * mean[:, :, None])
        store_pairs(
            dx[:, None] + (head.to(tl.int64) * dx_head * ALIGN)[None, :],
            row_mask,
            pair,
            first,
            second,
            da,
            db,
            HEAD_DIM,
            LAYOUT,
        )
    return sum_a, sum_b


@triton.jit(do_not_specialize=["tokens", "batch_tokens"])
def _qk_norm_rope_bwd_kernel(
    q, k, dq, dk, q_out, k_out, q_weight, k_weight, positions, frequencies, partial, columns, tokens, batch_tokens,
    q_heads, k_heads, q_batch, q_token, q_head, k_batch, k_token, k_head, dq_batch, dq_token, dq_head,
    dk_batch, dk_token, dk_head, qo_batch, qo_token, qo_head, ko_batch, ko_token, ko_head,
    position_batch, position_token, position_axis, eps,
    HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, PAIRS: tl.constexpr, STEPS: tl.constexpr, SCALES: tl.constexpr,
    AXES: tl.constexpr, ROTATION: tl.constexpr, NORM: tl.constexpr, LAYOUT: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr, HAS_K_WEIGHT: tl.constexpr, WEIGHT_GRADS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    pair = tl.arange(0, BLOCK_P)
    q_row = partial + tl.program_id(0).to(tl.int64) * columns
    k_row = q_row + (q_heads * HEAD_DIM if NORM == FULL else HEAD_DIM)
    q_a, q_b = tl.zeros((BLOCK_P,), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    k_a, k_b = tl.zeros((BLOCK_P,), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        token = block * tl.full((), BLOCK_T, tl.int64) + tl.arange(0, BLOCK_T)
        mask = token < tokens
        batch = token // batch_tokens
        token = token - batch * batch_tokens
        rows = positions + batch * position_batch + token * position_token
        begin = tl.full((1, 1), 0, tl.int32) + (block - tl.program_id(0))
        cosine, sine = 1.0, 0.0
        if ROTATION == CLOSED or ROTATION == TABLE:
            one = tl.arange(0, 1)
            cosine, sine = angles(
                rows, position_axis, mask, frequencies, pair, one, one == 0, 1,
                ROTATED, PAIRS, STEPS, SCALES, AXES, ROTATION,
            )  # fmt: skip
        q_a, q_b = _backward_side(
            q + (batch * q_batch + token * q_token) * ALIGN, dq + (batch * dq_batch + token * dq_token) * ALIGN,
            q_out + (batch * qo_batch + token * qo_token) * ALIGN, q_weight, q_row, q_a, q_b, q_heads, q_head, dq_head, qo_head, begin,
            rows, position_axis, mask, frequencies, cosine, sine, eps,
            HEAD_DIM, ROTATED, PAIRS, STEPS, SCALES, AXES, ROTATION, NORM, LAYOUT, HAS_Q_WEIGHT, WEIGHT_GRADS,
            ALIGN, BLOCK_T, BLOCK_H, BLOCK_P,
        )  # fmt: skip
        k_a, k_b = _backward_side(
            k + (batch * k_batch + token * k_token) * ALIGN, dk + (batch * dk_batch + token * dk_token) * ALIGN,
            k_out + (batch * ko_batch + token * ko_token) * ALIGN, k_weight, k_row, k_a, k_b, k_heads, k_head, dk_head, ko_head, begin,
            rows, position_axis, mask, frequencies, cosine, sine, eps,
            HEAD_DIM, ROTATED, PAIRS, STEPS, SCALES, AXES, ROTATION, NORM, LAYOUT, HAS_K_WEIGHT, WEIGHT_GRADS,
            ALIGN, BLOCK_T, BLOCK_H, BLOCK_P,
        )  # fmt: skip
        # The next round reads the row of partial sums that this one wrote, perhaps by other threads.
        if WEIGHT_GRADS and NORM == FULL:
            tl.debug_barrier()
    if WEIGHT_GRADS and NORM == HEAD:
        first, second = channels(pair, ROTATED, PAIRS, LAYOUT)
        pair_mask = pair < HEAD_DIM // 2
        tl.store(q_row + first, q_a, mask=pair_mask)
        tl.store(q_row + second, q_b, mask=pair_mask)
        tl.store(k_row + first, k_a, mask=pair_mask)
        tl.store(k_row + second, k_b, mask=pair_mask)


# Enough programs for every multiprocessor to hold a few, few enough that their partial sums stay small.
PROGRAMS = 1024


def qk_norm_rope_bwd(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    positions: Tensor | None, frequencies: Tensor | None, axes: list[int], theta: list[float],
    position_scale: list[float], norm: int, eps: float, layout: int, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of `vidkernels::qk_norm_rope_bwd`."""
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    tokens, head_dim = token_count(q, k), q.shape[-1]
    of_q, of_k = (x.shape[-2] * head_dim if norm == FULL.value else head_dim for x in (q, k))
    config = tile_of(head_dim, max(q.shape[-2], k.shape[-2]), values=1024, lanes=LANES)
    programs = min(PROGRAMS, cdiv(tokens, config.block_tokens))
    partial = torch.empty(programs if weight_grads else 0, of_q + of_k, dtype=torch.float32, device=q.device)
    if tokens:
        call = Call.of(positions, frequencies, axes, theta, position_scale)
        align, strides = aligned_strides(q, k, dq, dk, q_out, k_out)
        _qk_norm_rope_bwd_kernel[(programs,)](
            q, k, dq, dk, q_out, k_out, q if q_weight is None else q_weight, k if k_weight is None else k_weight,
            q if positions is None else positions, q if frequencies is None else frequencies,
            partial, of_q + of_k, tokens, q.shape[-3], q.shape[-2], k.shape[-2],
            *strides, *call.position_strides, eps, ALIGN=align,
            HAS_Q_WEIGHT=q_weight is not None, HAS_K_WEIGHT=k_weight is not None, WEIGHT_GRADS=weight_grads,
            **call.constants(head_dim, norm, layout, config),
        )  # fmt: skip
    sums: list[Any] = [partial[:, :of_q], partial[:, of_q:]]
    gradients = [
        q.new_empty(0) if weight is None or not weight_grads else rows.sum(0).to(weight.dtype)
        for rows, weight in zip(sums, (q_weight, k_weight), strict=True)
    ]
    return q_out, k_out, gradients[0], gradients[1]
