# SPDX-License-Identifier: Apache-2.0
"""Backward attention over packed segments in two kernels without atomics: gradients are equal bit for bit in every run.

The first gives the gradient of q (one program per query tile and head) and, on the way, delta = sum(grad_out * out) of
every query. The second gives those of k and v (one program per key tile and key head, over all queries that see it).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vidkernels.triton._attention import (
    accumulate,
    alignment,
    find_tile,
    head_pieces,
    load_piece,
    narrow,
    precision,
    rounded,
    row_product,
    sign_and_unit,
    signed,
    store_piece,
    tile_count,
    upcast,
)
from vidkernels.triton._attention_configs import AttentionConfig, attention_config
from vidkernels.triton._device import family


@triton.jit
def _weights(scores, shift, factor, unit, EXACT: tl.constexpr):
    """Softmax from the saved maximum and sum: (score - maximum) first where float32 must stay exact."""
    if EXACT:
        return tl.exp2((scores - shift) * unit) * factor
    return tl.exp2(scores * unit - shift * unit) * factor


@triton.jit
def _load_stats(stats, delta, heads, total_q, rows, count):
    """Maximum, 1 / sum and delta of a query tile. +inf as the maximum makes every weight of a blind query 0."""
    inside = rows < count
    maximum = tl.load(stats + rows, mask=inside, other=float("inf"))
    total = tl.load(stats + heads.to(tl.int64) * total_q + rows, mask=inside, other=0.0)
    shift = tl.where((total == 0.0) & (maximum == float("-inf")), float("inf"), maximum)
    return shift, tl.where(total == 0.0, 1.0, 1.0 / total), tl.load(delta + rows, mask=inside, other=0.0)


@triton.jit
def _query_step(
    q0, q1, g0, g1, acc0, acc1, delta, shift, factor, k, v, stride_k, stride_v, count, limit, unit,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, ONLY_DELTA: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one key tile to the gradient of a query tile, or its share to delta."""
    rows = tl.arange(0, BLOCK_N)
    k0 = load_piece(k, stride_k, rows, count, 0, D0, HEAD_DIM, MASKED)
    v0 = load_piece(v, stride_v, rows, count, 0, D0, HEAD_DIM, MASKED)
    scores = row_product(q0, k0, EXACT, UPCAST, PRECISION)
    grad_weights = row_product(g0, v0, EXACT, UPCAST, PRECISION)
    if D1 > 0:
        k1 = load_piece(k, stride_k, rows, count, D0, D1, HEAD_DIM, MASKED)
        v1 = load_piece(v, stride_v, rows, count, D0, D1, HEAD_DIM, MASKED)
        scores = accumulate(q1, tl.trans(k1), scores, EXACT, UPCAST, PRECISION)
        grad_weights = accumulate(g1, tl.trans(v1), grad_weights, EXACT, UPCAST, PRECISION)
    weights = _weights(scores, shift[:, None], factor[:, None], unit, EXACT)
    if MASKED:
        seen = rows[None, :] < count
        if CAUSAL:
            seen = seen & (rows[None, :] < limit + tl.arange(0, scores.shape[0])[:, None])
        weights = tl.where(seen, weights, 0.0)
    if ONLY_DELTA:
        delta += tl.sum(weights * grad_weights, 1)
    else:
        grad_scores = rounded(weights * (grad_weights - delta[:, None]), k0.dtype, UPCAST)
        acc0 = accumulate(grad_scores, k0, acc0, EXACT, UPCAST, PRECISION)
        if D1 > 0:
            acc1 = accumulate(grad_scores, k1, acc1, EXACT, UPCAST, PRECISION)
    return acc0, acc1, delta


@triton.jit
def _over_keys(
    q0, q1, g0, g1, acc0, acc1, delta, shift, factor, k, v, stride_k, stride_v, row, offset, length_k, full, end, unit,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    ONLY_DELTA: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All key tiles of a query tile: first those that every row sees whole, then the masked ones."""
    for _start in range(0, full, BLOCK_N):
        acc0, acc1, delta = _query_step(
            q0, q1, g0, g1, acc0, acc1, delta, shift, factor, k, v, stride_k, stride_v, BLOCK_N, 0, unit,
            D0, D1, HEAD_DIM, BLOCK_N, False, CAUSAL, ONLY_DELTA, EXACT, UPCAST, PRECISION,
        )  # fmt: skip
        k += tl.cast(BLOCK_N, tl.int64) * stride_k
        v += tl.cast(BLOCK_N, tl.int64) * stride_v
    for start in range(full, end, BLOCK_N):
        acc0, acc1, delta = _query_step(
            q0, q1, g0, g1, acc0, acc1, delta, shift, factor, k, v, stride_k, stride_v,
            length_k - start, row + offset + 1 - start, unit,
            D0, D1, HEAD_DIM, BLOCK_N, True, CAUSAL, ONLY_DELTA, EXACT, UPCAST, PRECISION,
        )  # fmt: skip
        k += tl.cast(BLOCK_N, tl.int64) * stride_k
        v += tl.cast(BLOCK_N, tl.int64) * stride_v
    return acc0, acc1, delta


@triton.jit(do_not_specialize=["segments", "total_q"])
def _varlen_attention_bwd_q_kernel(
    q, k, v, out, grad_out, stats, delta, grad_q, cu_seqlens_q, cu_seqlens_k, segments, total_q,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_o, stride_oh, stride_g, stride_gh,
    unit, scale, group,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, SIGN: tl.constexpr, WANTED: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    stride_q, stride_qh, stride_o, stride_oh = stride_q * ALIGN, stride_qh * ALIGN, stride_o * ALIGN, stride_oh * ALIGN
    stride_k, stride_kh, stride_v, stride_vh = stride_k * ALIGN, stride_kh * ALIGN, stride_v * ALIGN, stride_vh * ALIGN
    stride_g, stride_gh = stride_g * ALIGN, stride_gh * ALIGN
    segment, tile = find_tile(cu_seqlens_q, segments, tl.program_id(0), BLOCK_M)
    first_q = tl.load(cu_seqlens_q + segment)
    length_q = tl.load(cu_seqlens_q + segment + 1) - first_q
    tiles = (length_q + BLOCK_M - 1) // BLOCK_M
    if tile >= tiles:
        return
    if CAUSAL:
        tile = tiles - 1 - tile
    first_k = tl.load(cu_seqlens_k + segment)
    length_k = tl.load(cu_seqlens_k + segment + 1) - first_k
    head = tl.program_id(1).to(tl.int64)
    row = tile * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    count_q = length_q - row
    token = (first_q + row).to(tl.int64)
    g = grad_out + token * stride_g + head * stride_gh
    o = out + token * stride_o + head * stride_oh
    g0 = load_piece(g, stride_g, rows, count_q, 0, D0, HEAD_DIM, True)
    o0 = load_piece(o, stride_o, rows, count_q, 0, D0, HEAD_DIM, True)
    g1 = g0
    change = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    if D1 > 0:
        g1 = load_piece(g, stride_g, rows, count_q, D0, D1, HEAD_DIM, True)
        o1 = load_piece(o, stride_o, rows, count_q, D0, D1, HEAD_DIM, True)
        change += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    delta += head * total_q + token
    if WANTED or EXACT:
        q += token * stride_q + head * stride_qh
        k += first_k.to(tl.int64) * stride_k + (head // group) * stride_kh
        v += first_k.to(tl.int64) * stride_v + (head // group) * stride_vh
        q0 = signed(load_piece(q, stride_q, rows, count_q, 0, D0, HEAD_DIM, True), SIGN)
        q1 = q0
        acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
        acc1 = acc0
        if D1 > 0:
            q1 = signed(load_piece(q, stride_q, rows, count_q, D0, D1, HEAD_DIM, True), SIGN)
            acc1 = tl.zeros((BLOCK_M, D1), tl.float32)
        shift, factor, _ = _load_stats(
            stats + head * total_q + token, delta, tl.num_programs(1), total_q, rows, count_q
        )
        offset = length_k - length_q
        end = length_k
        full = length_k
        if CAUSAL:
            end = tl.minimum(length_k, tl.maximum(row + BLOCK_M + offset, 0))
            full = tl.minimum(length_k, tl.maximum(row + offset + 1, 0))
        full = full // BLOCK_N * BLOCK_N
        if EXACT:
            # sum(weights * grad_weights) equals sum(grad_out * out), but cancels exactly against grad_weights where one
            # weight is near 1. In float32 that matters, and a third more products are cheap beside its matrix units.
            _, _, change = _over_keys(
                q0, q1, g0, g1, acc0, acc1, tl.zeros_like(change), shift, factor, k, v, stride_k, stride_v, row, offset,
                length_k, full, end, unit, D0, D1, HEAD_DIM, BLOCK_N, CAUSAL, True, EXACT, UPCAST, PRECISION,
            )  # fmt: skip
        if WANTED:
            acc0, acc1, _ = _over_keys(
                q0, q1, g0, g1, acc0, acc1, change, shift, factor, k, v, stride_k, stride_v, row, offset,
                length_k, full, end, unit, D0, D1, HEAD_DIM, BLOCK_N, CAUSAL, False, EXACT, UPCAST, PRECISION,
            )  # fmt: skip
            grad_q += (token * tl.num_programs(1) + head) * HEAD_DIM
            stride_d = tl.num_programs(1) * HEAD_DIM
            store_piece(grad_q, stride_d, rows, count_q, acc0 * scale, 0, D0, HEAD_DIM, UPCAST)
            if D1 > 0:
                store_piece(grad_q, stride_d, rows, count_q, acc1 * scale, D0, D1, HEAD_DIM, UPCAST)
    tl.store(delta + rows, change, mask=rows < count_q)


@triton.jit(do_not_specialize=["segments", "total_q"])
def _varlen_attention_bwd_kv_kernel(
    q, k, v, grad_out, stats, delta, grad_k, grad_v, cu_seqlens_q, cu_seqlens_k, segments, total_q,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_g, stride_gh, unit, scale, group,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, SIGN: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys stay, BLOCK_M queries stream by; everything is transposed, [keys, queries]."""
    stride_q, stride_qh, stride_g, stride_gh = stride_q * ALIGN, stride_qh * ALIGN, stride_g * ALIGN, stride_gh * ALIGN
    stride_k, stride_kh, stride_v, stride_vh = stride_k * ALIGN, stride_kh * ALIGN, stride_v * ALIGN, stride_vh * ALIGN
    segment, tile = find_tile(cu_seqlens_k, segments, tl.program_id(0), BLOCK_N)
    first_k = tl.load(cu_seqlens_k + segment)
    length_k = tl.load(cu_seqlens_k + segment + 1) - first_k
    column = tile * BLOCK_N
    if column >= length_k:
        return
    first_q = tl.load(cu_seqlens_q + segment)
    length_q = tl.load(cu_seqlens_q + segment + 1) - first_q
    head_k = tl.program_id(1).to(tl.int64)
    heads_q = tl.num_programs(1) * group
    columns = tl.arange(0, BLOCK_N)
    count_k = length_k - column
    token = (first_k + column).to(tl.int64)
    k += token * stride_k + head_k * stride_kh
    v += token * stride_v + head_k * stride_vh
    k0 = load_piece(k, stride_k, columns, count_k, 0, D0, HEAD_DIM, True)
    v0 = load_piece(v, stride_v, columns, count_k, 0, D0, HEAD_DIM, True)
    grad_k0 = tl.zeros((BLOCK_N, D0), tl.float32)
    grad_v0 = tl.zeros((BLOCK_N, D0), tl.float32)
    if D1 > 0:
        k1 = load_piece(k, stride_k, columns, count_k, D0, D1, HEAD_DIM, True)
        v1 = load_piece(v, stride_v, columns, count_k, D0, D1, HEAD_DIM, True)
        grad_k1 = tl.zeros((BLOCK_N, D1), tl.float32)
        grad_v1 = tl.zeros((BLOCK_N, D1), tl.float32)
    offset = length_k - length_q
    begin = 0
    if CAUSAL:
        begin = tl.maximum(column - offset, 0) // BLOCK_M * BLOCK_M  # the first query that sees the first key
    for member in range(0, group):
        head = head_k * group + member
        for row in range(begin, length_q, BLOCK_M):
            rows = tl.arange(0, BLOCK_M)
            count_q = length_q - row
            query = (first_q + row).to(tl.int64)
            at_q = q + query * stride_q + head * stride_qh
            at_g = grad_out + query * stride_g + head * stride_gh
            q0 = load_piece(at_q, stride_q, rows, count_q, 0, D0, HEAD_DIM, True)
            g0 = load_piece(at_g, stride_g, rows, count_q, 0, D0, HEAD_DIM, True)
            scores = row_product(k0, q0, EXACT, UPCAST, PRECISION)  # [BLOCK_N, BLOCK_M]
            grad_weights = row_product(v0, g0, EXACT, UPCAST, PRECISION)
            if D1 > 0:
                q1 = load_piece(at_q, stride_q, rows, count_q, D0, D1, HEAD_DIM, True)
                g1 = load_piece(at_g, stride_g, rows, count_q, D0, D1, HEAD_DIM, True)
                scores = accumulate(k1, tl.trans(q1), scores, EXACT, UPCAST, PRECISION)
                grad_weights = accumulate(v1, tl.trans(g1), grad_weights, EXACT, UPCAST, PRECISION)
            at = head * total_q + query
            shift, factor, change = _load_stats(stats + at, delta + at, heads_q, total_q, rows, count_q)
            weights = _weights(scores * SIGN, shift[None, :], factor[None, :], unit, EXACT)
            if CAUSAL:
                weights = tl.where(column + columns[:, None] <= row + rows[None, :] + offset, weights, 0.0)
            grad_scores = rounded(weights * (grad_weights - change[None, :]), q0.dtype, UPCAST)
            weights = rounded(weights, g0.dtype, UPCAST)
            grad_v0 = accumulate(weights, g0, grad_v0, EXACT, UPCAST, PRECISION)
            grad_k0 = accumulate(grad_scores, q0, grad_k0, EXACT, UPCAST, PRECISION)
            if D1 > 0:
                grad_v1 = accumulate(weights, g1, grad_v1, EXACT, UPCAST, PRECISION)
                grad_k1 = accumulate(grad_scores, q1, grad_k1, EXACT, UPCAST, PRECISION)
    stride_d = tl.num_programs(1) * HEAD_DIM
    grad_k += (token * tl.num_programs(1) + head_k) * HEAD_DIM
    grad_v += (token * tl.num_programs(1) + head_k) * HEAD_DIM
    store_piece(grad_k, stride_d, columns, count_k, grad_k0 * scale, 0, D0, HEAD_DIM, UPCAST)
    store_piece(grad_v, stride_d, columns, count_k, grad_v0, 0, D0, HEAD_DIM, UPCAST)
    if D1 > 0:
        store_piece(grad_k, stride_d, columns, count_k, grad_k1 * scale, D0, D1, HEAD_DIM, UPCAST)
        store_piece(grad_v, stride_d, columns, count_k, grad_v1, D0, D1, HEAD_DIM, UPCAST)


def varlen_attention_bwd(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    need_q: bool,
    need_kv: bool,
    config_q: AttentionConfig | None = None,
    config_kv: AttentionConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v; those not needed come back with no tokens."""
    q, k, v, out, grad_out = (narrow(x) for x in (q, k, v, out, grad_out))

    def like(x: torch.Tensor, needed: bool) -> torch.Tensor:
        return torch.empty((x.shape[0] if needed else 0, *x.shape[1:]), dtype=x.dtype, device=x.device)

    grad_q, grad_k, grad_v = like(q, need_q), like(k, need_kv), like(v, need_kv)
    segments = cu_seqlens_q.shape[0] - 1
    if segments == 0 or q.shape[1] == 0 or not (need_q or need_kv):
        return grad_q, grad_k, grad_v
    heads, head_dim, heads_k = q.shape[1], q.shape[2], k.shape[1]
    config_q = config_q or attention_config("bwd_q", head_dim, q.dtype, max_seqlen_q, family(q.device))
    config_kv = config_kv or attention_config("bwd_kv", head_dim, q.dtype, max_seqlen_k, family(q.device))
    first, second = head_pieces(head_dim)
    sign, unit = sign_and_unit(scale)
    align = alignment(q, k, v, out, grad_out)
    delta = torch.empty((heads, q.shape[0]), dtype=torch.float32, device=q.device)
    options: dict[str, Any] = {
        "HEAD_DIM": head_dim, "D0": first, "D1": second, "CAUSAL": causal, "SIGN": sign, "ALIGN": align,
        "EXACT": q.dtype == torch.float32, "UPCAST": upcast(), "PRECISION": precision(q.dtype),
    }  # fmt: skip

    def strides(*tensors: torch.Tensor) -> list[int]:
        return [x.stride(axis) // align for x in tensors for axis in (0, 1)]

    tail = (unit, scale, heads // heads_k)
    if q.shape[0]:
        _varlen_attention_bwd_q_kernel[(tile_count(q.shape[0], segments, config_q.resident), heads)](
            q, k, v, out, grad_out, stats, delta, grad_q, cu_seqlens_q, cu_seqlens_k, segments, q.shape[0],
            *strides(q, k, v, out, grad_out), *tail, BLOCK_M=config_q.resident, BLOCK_N=config_q.streamed,
            WANTED=need_q, num_warps=config_q.num_warps, num_stages=config_q.num_stages, **options,
        )  # fmt: skip
    if need_kv and k.shape[0]:
        _varlen_attention_bwd_kv_kernel[(tile_count(k.shape[0], segments, config_kv.resident), heads_k)](
            q, k, v, grad_out, stats, delta, grad_k, grad_v, cu_seqlens_q, cu_seqlens_k, segments, q.shape[0],
            *strides(q, k, v, grad_out), *tail, BLOCK_M=config_kv.streamed, BLOCK_N=config_kv.resident,
            num_warps=config_kv.num_warps, num_stages=config_kv.num_stages, **options,
        )  # fmt: skip
    return grad_q, grad_k, grad_v
