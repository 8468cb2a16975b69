# SPDX-License-Identifier: Apache-2.0
"""adaLN-Zero, defined: `norm(x) * (1 + scale) + shift`, `residual + gate * branch`, and the two in one step.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv:2212.09748), section 3.2, the adaLN-Zero
block. Latte, PixArt, Open-Sora, Goku, CogVideoX, Wan and HunyuanVideo carry it with different rows of modulation.

`shift`, `scale` and `gate` are tables of rows of C values. Which row a token takes:

* `[C]` or `[1, C]`: one row for all tokens. `[B, C]` with `x [B, ..., C]`: one row per sample.
* `[B, G, C]`: the tokens of a sample, in order, form G equal groups with one row each. G = 1 is per sample, G = number
  of frames is per frame, G = number of tokens is per token. A leading 1 serves every sample.
* `[S, C]` with `cu_seqlens [S + 1]`: x is packed, `[total, C]` or `[1, total, C]`; segment s is the tokens
  `cu_seqlens[s] .. cu_seqlens[s + 1] - 1` and takes row s.
* `[R, C]` with integer `rows`: x `[B, T, C]` has rows `[B, G]` (x `[total, C]` has `[G]`); the tokens of a sample form
  G equal groups and group g takes row `rows[b, g]`. G = T is one index per token.
"""

from __future__ import annotations

import torch


def modulation_per_token(
    table: torch.Tensor, x: torch.Tensor, cu_seqlens: torch.Tensor | None = None, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """The row of `table` that each token of `x` takes, as a tensor of x's shape (see the module's list of forms)."""
    channels = x.shape[-1]
    if cu_seqlens is not None:
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        total = x.numel() // channels if channels else 0
        return torch.repeat_interleave(table, lengths, dim=0, output_size=total).reshape(x.shape)
    if rows is not None:
        picked = table.index_select(0, rows.reshape(-1).long())  # [B * G, C]
        return _repeat_groups(picked.reshape(*rows.shape, channels), x)
    if table.ndim == 1:
        return table.expand(x.shape)
    if table.ndim == 2 and x.ndim > 2:
        table = table[:, None]  # [B, 1, C]
    return _repeat_groups(table, x)


def _repeat_groups(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`[B or 1, G, C]` (`[G, C]` for x `[total, C]`) to x's shape: each row serves tokens / G tokens in order."""
    tokens = x[None] if x.ndim == 2 else x.flatten(1, -2)  # [B, T, C]
    table = table[None] if table.ndim == 2 else table
    size = tokens.shape[1] // max(table.shape[1], 1)
    if tokens.shape[1] != size * table.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens do not form {table.shape[1]} equal groups")
    return table.repeat_interleave(size, dim=1).expand_as(tokens).reshape(x.shape)


def normalize(
    x: torch.Tensor,
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """LayerNorm, RMSNorm or nothing over the last axis, then `* weight + bias` where given.

    "layer": (x - mean) / sqrt(var + eps) with the biased variance. "rms": x / sqrt(mean(x^2) + eps). "none": x.
    """
    if norm == "layer":
        centred = x - x.mean(-1, keepdim=True)
        x = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    elif norm == "rms":
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    elif norm != "none":
        raise ValueError(f"norm: expected layer, rms or none, got {norm!r}")
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def adaln_modulate(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    cu_seqlens: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """`norm(x) * (1 + scale) + shift`; a missing shift or scale counts as 0.

    Computed in float32 (float64 for float64 x) and rounded once to x's dtype.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = normalize(x.to(wide), norm, _to(weight, wide), _to(bias, wide), eps)
    if scale is not None:
        y = y * (1 + modulation_per_token(scale.to(wide), x, cu_seqlens, rows))
    if shift is not None:
        y = y + modulation_per_token(shift.to(wide), x, cu_seqlens, rows)
    return y.to(x.dtype)


def gate_residual(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """`residual + gate * branch`; a missing gate counts as 1. Computed wide, rounded once to residual's dtype."""
    wide = torch.float64 if residual.dtype == torch.float64 else torch.float32
    gated = branch.to(wide)
    if gate is not None:
        gated = gated * modulation_per_token(gate.to(wide), residual, cu_seqlens, rows)
    return (residual.to(wide) + gated).to(residual.dtype)


def adaln_zero(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    cu_seqlens: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The seam between two sub-blocks: `h = residual + gate * branch`, then `norm(h) * (1 + scale) + shift`.

    Returns `(h, modulated)`. The norm reads h as stored, that is after rounding to residual's dtype, so the result is
    that of `gate_residual` followed by `adaln_modulate`.
    """
    hidden = gate_residual(residual, branch, gate, cu_seqlens=cu_seqlens, rows=rows)
    modulated = adaln_modulate(
        hidden, shift, scale, norm=norm, weight=weight, bias=bias, eps=eps, cu_seqlens=cu_seqlens, rows=rows
    )
    return hidden, modulated


def _to(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype)
