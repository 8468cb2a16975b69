# SPDX-License-Identifier: Apache-2.0
"""Forward attention over packed segments: one program is one tile of queries of one head."""

from __future__ import annotations

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
    rescale_and_accumulate,
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
def _attend(
    q0, q1, acc0, acc1, maximum, total, k, v, stride_k, stride_v, count, limit, unit,
    D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One key tile of the online softmax. Row r sees the first min(count, limit + r) keys of the tile."""
    rows = tl.arange(0, BLOCK_N)
    k0 = load_piece(k, stride_k, rows, count, 0, D0, HEAD_DIM, MASKED)
    scores = row_product(q0, k0, EXACT, UPCAST, PRECISION)  # [BLOCK_M, BLOCK_N]
    if D1 > 0:
        k1 = load_piece(k, stride_k, rows, count, D0, D1, HEAD_DIM, MASKED)
        scores = accumulate(q1, tl.trans(k1), scores, EXACT, UPCAST, PRECISION)
    if MASKED:
        seen = rows[None, :] < count
        if CAUSAL:
            seen = seen & (rows[None, :] < limit + tl.arange(0, scores.shape[0])[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(maximum, tl.max(scores, 1))
    shift = highest
    if MASKED:
        shift = tl.where(highest == float("-inf"), 0.0, highest)  # no key seen yet: -inf - -inf would be NaN
    if EXACT:
        weights = tl.exp2((scores - shift[:, None]) * unit)
    else:
        weights = tl.exp2(scores * unit - (shift * unit)[:, None])  # one multiply-add per score
    correction = tl.exp2((maximum - shift) * unit)
    total = total * correction + tl.sum(weights, 1)
    v0 = load_piece(v, stride_v, rows, count, 0, D0, HEAD_DIM, MASKED)
    stored = rounded(weights, v0.dtype, UPCAST)
    acc0 = rescale_and_accumulate(stored, v0, acc0, correction, EXACT, UPCAST, PRECISION)
    if D1 > 0:
        v1 = load_piece(v, stride_v, rows, count, D0, D1, HEAD_DIM, MASKED)
        acc1 = rescale_and_accumulate(stored, v1, acc1, correction, EXACT, UPCAST, PRECISION)
    return acc0, acc1, highest, total


@triton.jit(do_not_specialize=["segments", "total_q"])
def _varlen_attention_fwd_kernel(
    q, k, v, out, stats, cu_seqlens_q, cu_seqlens_k, segments, total_q,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_o, unit, group,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, SIGN: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    stride_q, stride_qh, stride_o = stride_q * ALIGN, stride_qh * ALIGN, stride_o * ALIGN
    stride_k, stride_kh, stride_v, stride_vh = stride_k * ALIGN, stride_kh * ALIGN, stride_v * ALIGN, stride_vh * ALIGN
    segment, tile = find_tile(cu_seqlens_q, segments, tl.program_id(0), BLOCK_M)
    first_q = tl.load(cu_seqlens_q + segment)
    length_q = tl.load(cu_seqlens_q + segment + 1) - first_q
    tiles = (length_q + BLOCK_M - 1) // BLOCK_M
    if tile >= tiles:
        return
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest rows first
    first_k = tl.load(cu_seqlens_k + segment)
    length_k = tl.load(cu_seqlens_k + segment + 1) - first_k
    head = tl.program_id(1).to(tl.int64)
    row = tile * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    count_q = length_q - row
    token = (first_q + row).to(tl.int64)
    q += token * stride_q + head * stride_qh
    k += first_k.to(tl.int64) * stride_k + (head // group) * stride_kh
    v += first_k.to(tl.int64) * stride_v + (head // group) * stride_vh
    q0 = load_piece(q, stride_q, rows, count_q, 0, D0, HEAD_DIM, True)
    q0 = signed(q0, SIGN)
    q1 = q0
    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    acc1 = acc0
    if D1 > 0:
        q1 = load_piece(q, stride_q, rows, count_q, D0, D1, HEAD_DIM, True)
        q1 = signed(q1, SIGN)
        acc1 = tl.zeros((BLOCK_M, D1), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Query i sees keys j <= i + offset. Key tiles that every row sees whole need no mask.
    offset = length_k - length_q
    end = length_k
    full = length_k
    if CAUSAL:
        end = tl.minimum(length_k, tl.maximum(row + BLOCK_M + offset, 0))
        full = tl.minimum(length_k, tl.maximum(row + offset + 1, 0))
    full = full // BLOCK_N * BLOCK_N
    for _start in range(0, full, BLOCK_N):
        acc0, acc1, maximum, total = _attend(
            q0, q1, acc0, acc1, maximum, total, k, v, stride_k, stride_v, BLOCK_N, 0, unit,
            D0, D1, HEAD_DIM, BLOCK_N, False, CAUSAL, EXACT, UPCAST, PRECISION,
        )  # fmt: skip
        k += tl.cast(BLOCK_N, tl.int64) * stride_k
        v += tl.cast(BLOCK_N, tl.int64) * stride_v
    for start in range(full, end, BLOCK_N):
        acc0, acc1, maximum, total = _attend(
            q0, q1, acc0, acc1, maximum, total, k, v, stride_k, stride_v, length_k - start, row + offset + 1 - start, unit,
            D0, D1, HEAD_DIM, BLOCK_N, True, CAUSAL, EXACT, UPCAST, PRECISION,
        )  # fmt: skip
        k += tl.cast(BLOCK_N, tl.int64) * stride_k
        v += tl.cast(BLOCK_N, tl.int64) * stride_v
    sees = rows >= BLOCK_M * (length_k == 0)
    if CAUSAL:
        sees = sees & (row + rows + offset >= 0)
    inverse = tl.where(sees, 1.0 / total, 0.0)[:, None]
    out += token * stride_o + head * HEAD_DIM
    store_piece(out, stride_o, rows, count_q, acc0 * inverse, 0, D0, HEAD_DIM, UPCAST)
    if D1 > 0:
        store_piece(out, stride_o, rows, count_q, acc1 * inverse, D0, D1, HEAD_DIM, UPCAST)
    stats += head * total_q + token + rows
    tl.store(stats, tl.where(sees, maximum, float("-inf")), mask=rows < count_q)
    stats += tl.num_programs(1).to(tl.int64) * total_q
    tl.store(stats, tl.where(sees, total, 0.0), mask=rows < count_q)


def varlen_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    config: AttentionConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[total_q, Hq, D]` and statistics `[2, Hq, total_q]`; see `ops.varlen_attention`."""
    q, k, v = narrow(q), narrow(k), narrow(v)
    total_q, heads, head_dim = q.shape
    out = torch.empty((total_q, heads, head_dim), dtype=q.dtype, device=q.device)
    stats = torch.empty((2, heads, total_q), dtype=torch.float32, device=q.device)
    segments = cu_seqlens_q.shape[0] - 1
    if total_q == 0 or heads == 0 or segments == 0:
        return out, stats
    config = config or attention_config("fwd", head_dim, q.dtype, max_seqlen_q, family(q.device))
    first, second = head_pieces(head_dim)
    sign, unit = sign_and_unit(scale)
    align = alignment(q, k, v, out)
    grid = (tile_count(total_q, segments, config.resident), heads)
    _varlen_attention_fwd_kernel[grid](
        q, k, v, out, stats, cu_seqlens_q, cu_seqlens_k, segments, total_q,
        *(x.stride(axis) // align for x in (q, k, v) for axis in (0, 1)), out.stride(0) // align, unit, heads // k.shape[1],
        HEAD_DIM=head_dim, D0=first, D1=second, BLOCK_M=config.resident, BLOCK_N=config.streamed,
        CAUSAL=causal, SIGN=sign, EXACT=q.dtype == torch.float32, UPCAST=upcast(), PRECISION=precision(q.dtype),
        ALIGN=align, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, stats
