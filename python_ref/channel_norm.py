# SPDX-License-Identifier: Apache-2.0
"""Normalisation over channels, one position at a time, with affine and optional SiLU.

Low-precision inputs are computed in float32 and rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_HALF = (torch.bfloat16, torch.float16)


def widen(x: torch.Tensor) -> torch.Tensor:
    """Half precision in float32, in which norms are computed."""
    return x.float() if x.dtype in _HALF else x


def finish(
    normed: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dim: int,
    activation: str | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Affine over axis `dim`, the activation, and the one rounding to `dtype`."""
    shape = [1] * normed.ndim
    shape[dim] = -1
    if weight is not None:
        normed = normed * weight.reshape(shape).to(normed.dtype)
    if bias is not None:
        normed = normed + bias.reshape(shape).to(normed.dtype)
    return (F.silu(normed) if activation == "silu" else normed).to(dtype)


def channel_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    kind: str = "layer",
    eps: float | None = None,
    dim: int = 1,
    activation: str | None = None,
) -> torch.Tensor:
    """`act(norm(x) * weight + bias)` over axis `dim`, separately at every position of the other axes.

    kind `layer`: (x - mean) / sqrt(var + eps) with the biased variance; `rms`: x / sqrt(mean(x^2) + eps), both with
    eps 1e-6; `l2`: sqrt(C) * x / max(|x|, eps) with eps 1e-12, as Wan's and HunyuanVideo-1.5's VAEs write it.
    """
    wide = widen(x)
    if kind == "l2":
        normed = F.normalize(wide, dim=dim, eps=1e-12 if eps is None else eps) * x.shape[dim] ** 0.5
    else:
        centred = wide - wide.mean(dim=dim, keepdim=True) if kind == "layer" else wide
        normed = centred * torch.rsqrt(centred.square().mean(dim=dim, keepdim=True) + (1e-6 if eps is None else eps))
    return finish(normed, weight, bias, dim, activation, x.dtype)
