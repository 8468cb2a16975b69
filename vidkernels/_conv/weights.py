# SPDX-License-Identifier: Apache-2.0
"""Linear maps on a kernel's taps: summed taps where several fall on one element, and a blend folded in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vidkernels._conv.plan import Taps

_AXES = (2, 3, 4)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Taps are summed, and gradients of weights kept, in float32 (float64 for float64)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _mixed(weight: torch.Tensor, axis: int, rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """Slices `sum_j rows[i][j] * weight[j]` along an axis. A matrix product with an inner size of 3 is 10 times slower."""
    size = weight.shape[axis]
    if [list(row) for row in rows] == [[float(i == j) for j in range(size)] for i in range(size)]:
        return weight
    mixed = weight.new_zeros([len(rows) if a == axis else n for a, n in enumerate(weight.shape)])
    for i, row in enumerate(rows):
        for j, factor in enumerate(row):
            if factor:
                mixed.select(axis, i).add_(weight.select(axis, j), alpha=factor)
    return mixed


def collapse(weight: torch.Tensor, taps: Sequence[Taps | None]) -> torch.Tensor:
    """[K, C, kt, kh, kw] -> [K, C, positions...]: weight of each position read; None leaves an axis as it is."""
    for axis, rows in zip(_AXES, taps, strict=True):
        if rows is not None:
            weight = _mixed(weight, axis, rows)
    return weight


def expand(dweight: torch.Tensor, taps: Sequence[Taps | None]) -> torch.Tensor:
    """Transpose of `collapse`."""
    for axis, rows in zip(_AXES, taps, strict=True):
        if rows is not None:
            dweight = _mixed(dweight, axis, list(zip(*rows, strict=True)))
    return dweight


def fold_blend(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mix_factor: torch.Tensor,
    taps: Sequence[tuple[int, int, int]],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and bias of `s(m) * mean(x at taps) + (1 - s(m)) * conv(x)`, differentiable in all three.

    Args:
        weight: [C, C, kt, kh, kw].
        bias: [C].
        mix_factor: one number m; s is the sigmoid.
        taps: kernel positions (t, h, w) that the smooth branch averages.
    """
    dtype = wide_dtype(weight.dtype)
    alpha = torch.sigmoid(mix_factor.to(dtype)).reshape(())
    smooth = torch.zeros_like(weight, dtype=dtype)
    share = torch.eye(weight.shape[0], dtype=dtype, device=weight.device) / len(taps)
    for t, h, w in taps:
        smooth[:, :, t, h, w] += share
    folded = torch.lerp(weight.to(dtype), smooth, alpha).to(weight.dtype)
    return folded, None if bias is None else ((1 - alpha) * bias).to(bias.dtype)
