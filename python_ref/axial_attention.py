# SPDX-License-Identifier: Apache-2.0
"""Attention along one axis of a video, and attention with query/key norm and rotation inside: compositions of
`qk_norm_rope` and `varlen_attention`. Plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .qk_norm_rope import qk_norm_rope
from .varlen_attention import segment_attention, varlen_attention


def norm_rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    positions: Tensor | None = None,
    axes: Sequence[int] | None = None,
    theta: float | Sequence[float] = 10000.0,
    position_scale: float | Sequence[float] = 1.0,
    frequencies: Tensor | None = None,
    norm: str | None = "head",
    eps: float = 1e-6,
    layout: str = "interleaved",
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`varlen_attention` of q and k after `qk_norm_rope`, packed `[tokens, H, D]`; each step rounds to the dtype."""
    q, turned = qk_norm_rope(
        q, k, q_weight, k_weight, positions, axes=axes, theta=theta, position_scale=position_scale,
        frequencies=frequencies, norm=norm, eps=eps, layout=layout,
    )  # fmt: skip
    assert turned is not None
    return varlen_attention(q, turned, v, cu_seqlens, causal=causal, scale=scale)


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dim: int = 1,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    positions: Tensor | None = None,
    axes: Sequence[int] | None = None,
    theta: float | Sequence[float] = 10000.0,
    position_scale: float | Sequence[float] = 1.0,
    frequencies: Tensor | None = None,
    norm: str | None = None,
    eps: float = 1e-6,
    layout: str = "interleaved",
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention along axis `dim` of `[..., H, D]`; every other leading axis is a batch axis.

    Args as in `vidkernels.ops.axial_attention`; positions `[L, A]` belong to the places along the axis.
    """
    moved = [x.movedim(dim, -3) for x in (q, k, v)]
    rows = [x.flatten(0, -4) if x.ndim > 3 else x[None] for x in moved]  # [N, L, H, D]
    turned_q, turned_k = qk_norm_rope(
        rows[0], rows[1], q_weight, k_weight, positions, axes=axes, theta=theta, position_scale=position_scale,
        frequencies=frequencies, norm=norm, eps=eps, layout=layout,
    )  # fmt: skip
    assert turned_k is not None
    parts = [segment_attention(*x, causal=causal, scale=scale) for x in zip(turned_q, turned_k, rows[2], strict=True)]
    out = torch.stack(parts) if parts else rows[0]
    return out.reshape(moved[0].shape).movedim(-3, dim).contiguous()
