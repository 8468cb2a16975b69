# SPDX-License-Identifier: Apache-2.0
"""The reference of varlen_attention as bare forward and backward ops: its loop over lengths cannot be traced."""

from __future__ import annotations

import torch

from vidkernels._reference import varlen_attention as reference


def fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of the reference; the statistics, which its backward does not need, are zeros."""
    out = reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, scale=scale)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out.contiguous(), q.new_zeros((2, q.shape[1], q.shape[0]), dtype=wide)


def _segment_bwd(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one segment, by the formulas of softmax attention in the dtype of the operands, which is wide."""
    group = q.shape[1] // max(k.shape[1], 1)
    q, grad_out = q.transpose(0, 1), grad_out.transpose(0, 1)  # [Hq, Lq, D]
    keys, values = (x.transpose(0, 1).repeat_interleave(group, dim=0) for x in (k, v))  # [Hq, Lk, D]
    scores = (q @ keys.transpose(1, 2)) * scale
    if causal:
        offset = k.shape[0] - q.shape[1]
        rows = torch.arange(q.shape[1], device=q.device)[:, None]
        hidden = torch.arange(k.shape[0], device=q.device) > rows + offset
        scores = scores.masked_fill(hidden, float("-inf")).masked_fill(hidden.all(dim=1, keepdim=True), 0.0)
        weights = scores.softmax(dim=-1).masked_fill(hidden, 0.0)
    else:
        weights = scores.softmax(dim=-1)
    grad_weights = grad_out @ values.transpose(1, 2)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True)) * scale
    grad_k = (grad_scores.transpose(1, 2) @ q).unflatten(0, (-1, group)).sum(dim=1)
    grad_v = (weights.transpose(1, 2) @ grad_out).unflatten(0, (-1, group)).sum(dim=1)
    return (grad_scores @ keys).transpose(0, 1), grad_k.transpose(0, 1), grad_v.transpose(0, 1)


def bwd(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients, segment by segment; half dtypes are computed in float32."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    grads = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for i in range(len(starts_q) - 1):
        rows, columns = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        values = _segment_bwd(
            grad_out[rows].to(wide), q[rows].to(wide), k[columns].to(wide), v[columns].to(wide), causal, scale
        )
        for grad, where, value in zip(grads, (rows, columns, columns), values, strict=True):
            grad[where] = value.to(grad.dtype)
    dq, dk, dv = (
        grad if wanted else grad.new_empty((0, *grad.shape[1:]))
        for grad, wanted in zip(grads, (need_q, need_kv, need_kv), strict=True)
    )
    return dq, dk, dv
