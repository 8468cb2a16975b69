# SPDX-License-Identifier: Apache-2.0
"""Attention over packed segments, as a loop over them. Plain PyTorch; the law for `ops.varlen_attention`.

Every segment is attended with operations whose shapes depend on that segment alone, on freshly allocated operands: a
packed call is bitwise equal to one call per sample.
"""

from __future__ import annotations

import torch


def full_precision(x: torch.Tensor) -> torch.autocast:
    """Products in the dtype of their operands, also under autocast, which knows no meta device."""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


def segment_attention(
    q: torch.Tensor,  # [Lq, Hq, D]
    k: torch.Tensor,  # [Lk, Hk, D]
    v: torch.Tensor,  # [Lk, Hk, D]
    *,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """`softmax(scale * q k^T) v` of one segment, per head; half dtypes are computed in float32 and rounded once.

    Query head `h` reads key head `h // (Hq / Hk)`. Causal masks are aligned at the end (bottom right): query `i` sees
    the keys `j <= i + Lk - Lq`. A query that sees no key gets zeros.

    Returns:
        `[Lq, Hq, D]` in the dtype of q.
    """
    with full_precision(q):
        return _attention(q, k, v, causal, q.shape[-1] ** -0.5 if scale is None else scale)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // max(k.shape[1], 1)
    queries = q.to(wide).transpose(0, 1).clone(memory_format=torch.contiguous_format)  # [Hq, Lq, D]
    keys = k.to(wide).transpose(0, 1).repeat_interleave(group, dim=0)  # [Hq, Lk, D]
    values = v.to(wide).transpose(0, 1).repeat_interleave(group, dim=0)  # [Hq, Lk, D]
    scores = (queries @ keys.transpose(1, 2)) * scale  # [Hq, Lq, Lk]
    if causal:
        query_index = torch.arange(q.shape[0], device=q.device)[:, None]
        hidden = torch.arange(k.shape[0], device=q.device) > query_index + (k.shape[0] - q.shape[0])  # [Lq, Lk]
        scores = scores.masked_fill(hidden, float("-inf")).masked_fill(hidden.all(dim=1, keepdim=True), 0.0)
        weights = scores.softmax(dim=-1).masked_fill(hidden, 0.0)
        return _weigh(weights, values, hidden).transpose(0, 1).to(q.dtype)
    return (scores.softmax(dim=-1) @ values).transpose(0, 1).to(q.dtype)


def _weigh(weights: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """`weights @ values`, where a hidden key has no influence even if its value is NaN or infinite (0 * inf is NaN)."""
    finite = torch.isfinite(values)
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # by torch.func: nobody can look at values
    if weights.shape[1] == 0 or (not transformed and bool(finite.all())):
        return weights @ values
    sees = (~hidden).to(weights.dtype) @ (~finite).to(weights.dtype) > 0  # [Hq, Lq, D]
    rows = [weights[:, i : i + 1, ~hidden[i]] @ values[:, ~hidden[i]] for i in range(weights.shape[1])]
    return torch.where(sees, torch.cat(rows, dim=1), weights @ values.masked_fill(~finite, 0.0))


def varlen_attention(
    q: torch.Tensor,  # [total_q, Hq, D]
    k: torch.Tensor,  # [total_k, Hk, D]
    v: torch.Tensor,  # [total_k, Hk, D]
    cu_seqlens_q: torch.Tensor,  # [B + 1] int32
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    deterministic: bool | None = None,
) -> torch.Tensor:
    """Attention of each segment `i` of q, rows `cu_seqlens_q[i] : cu_seqlens_q[i + 1]`, over segment `i` of k and v.

    The layout is the one of flash-attn's varlen functions (Dao, arXiv 2307.08691) and of Patch n' Pack (Dehghani et
    al., arXiv 2307.06304). `max_seqlen_*` and `deterministic` change nothing here.

    Returns:
        `[total_q, Hq, D]` in the dtype of q. A query segment with an empty key segment gets zeros.
    """
    starts_q = cu_seqlens_q.tolist()
    starts_k = starts_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    outputs = [] if len(starts_q) > 1 else [segment_attention(q, k, v)]  # no segments: nothing, but differentiable
    for i in range(len(starts_q) - 1):
        rows, columns = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        outputs.append(segment_attention(q[rows], k[columns], v[columns], causal=causal, scale=scale))
    return torch.cat(outputs)
