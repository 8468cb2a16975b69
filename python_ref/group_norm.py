# SPDX-License-Identifier: Apache-2.0
"""Normalisation over groups of channels, per frame or over the clip, with affine and optional SiLU.

Low-precision inputs are computed in float32 and rounded once.
"""

from __future__ import annotations

import torch

from .channel_norm import finish, widen


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: str | None = None,
    per_frame: bool = False,
) -> torch.Tensor:
    """`act(groupnorm(x) * weight + bias)` of [B, C, ...]: statistics over C / num_groups channels and all positions.

    `per_frame`: [B, C, T, ...] with the statistics of each frame on its own, as causal video VAEs need.
    """
    wide = widen(x)
    grouped = wide.unflatten(1, (num_groups, -1))  # [B, G, C/G, ...]
    axes = [axis for axis in range(2, grouped.ndim) if not (per_frame and axis == 3)]
    centred = grouped - grouped.mean(dim=axes, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dim=axes, keepdim=True) + eps)
    return finish(normed.flatten(1, 2), weight, bias, 1, activation, x.dtype)
