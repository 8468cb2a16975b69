# SPDX-License-Identifier: Apache-2.0
"""RMSNorm of queries and keys followed by a rotary position embedding over (t, h, w).

Formulas: RMSNorm (Zhang and Sennrich, 2019), rotary embedding (Su et al., 2021), with the axis splits and pair layouts
of the video transformers that use them: see `docs/qk_norm_rope.md`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def default_axes(head_dim: int, count: int) -> tuple[int, ...]:
    """Rotary dimensions per axis that fill a head: the last axes get `2*floor(head_dim/(2*count))`, the first the rest."""
    last = 2 * (head_dim // (2 * count))
    return (head_dim - head_dim % 2 - last * (count - 1), *[last] * (count - 1))


def rotary_frequencies(
    axes: Sequence[int], theta: float | Sequence[float] = 10000.0, position_scale: float | Sequence[float] = 1.0
) -> Tensor:
    """Radians per unit of position: row a holds `scale_a * theta_a**(-2i/d_a)`, i < d_a/2, at its own pairs, 0 elsewhere.

    Args:
        axes: rotary dimensions d_a of each position axis, even numbers.
        theta: base of the frequencies, one or one per axis.
        position_scale: factor on the positions, one or one per axis.

    Returns:
        float64 `[A, P]` with A = len(axes) and P = sum(axes) / 2.
    """
    thetas = [float(theta)] * len(axes) if isinstance(theta, (int, float)) else list(theta)
    scales = [float(position_scale)] * len(axes) if isinstance(position_scale, (int, float)) else list(position_scale)
    table = torch.zeros(len(axes), sum(axes) // 2, dtype=torch.float64)
    first = 0
    for axis, (dims, base, scale) in enumerate(zip(axes, thetas, scales, strict=True)):
        exponent = torch.arange(dims // 2, dtype=torch.float64) * (-2.0 / max(dims, 1))
        table[axis, first : first + dims // 2] = scale * torch.as_tensor(base, dtype=torch.float64) ** exponent
        first += dims // 2
    return table


def rotary_pairs(layout: str, axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Channel of the first and of the second member of every rotated pair, `[P]` each.

    `interleaved` rotates (2p, 2p+1); `half` rotates (p, p+P) over all axes together; `axis_half` does so inside each axis.
    """
    pairs = torch.arange(sum(axes) // 2)
    if layout == "interleaved":
        return 2 * pairs, 2 * pairs + 1
    if layout == "half":
        return pairs, pairs + len(pairs)
    starts = [sum(axes[:a]) for a in range(len(axes))]
    first = torch.cat([start + torch.arange(dims // 2) for start, dims in zip(starts, axes, strict=True)])
    second = torch.cat([start + dims // 2 + torch.arange(dims // 2) for start, dims in zip(starts, axes, strict=True)])
    return first, second


def rotary_angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Angles in radians, float64: sum over axes of position times frequency.

    Args:
        positions: `[..., A]`.
        frequencies: `[A, P]`, or `[A, H, P]` for one table per head.

    Returns:
        `[..., 1, P]` or `[..., H, P]`.
    """
    table = frequencies.to(positions.device, torch.float64)
    table = table.unsqueeze(1) if table.ndim == 2 else table  # [A, H or 1, P]
    moved = positions.to(torch.float64)[..., None, None] * table  # [..., A, H or 1, P]
    # An axis that a pair does not belong to has frequency 0: it must not spread that axis's NaN or Inf.
    return torch.where(table == 0, torch.zeros((), dtype=torch.float64, device=table.device), moved).sum(-3)


def _rms_norm(x: Tensor, weight: Tensor | None, norm: str | None, eps: float) -> Tensor:
    if norm is None:
        return x
    over = (-1,) if norm == "head" else (-2, -1)
    x = x * torch.rsqrt(x.square().mean(over, keepdim=True) + eps)
    if weight is None:
        return x
    return x * weight.to(x.dtype).view(weight.shape if norm == "head" else x.shape[-2:])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, second: Tensor) -> Tensor:
    a, b = x[..., first], x[..., second]
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return x.index_copy(-1, torch.cat((first, second)), rotated)


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    axes: Sequence[int] | None = None,
    theta: float | Sequence[float] = 10000.0,
    position_scale: float | Sequence[float] = 1.0,
    frequencies: Tensor | None = None,
    norm: str | None = "head",
    eps: float = 1e-6,
    layout: str = "interleaved",
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`y = R(angle) (weight * x / sqrt(mean(x**2) + eps))` for x = q and x = k.

    Same arguments as `vidkernels.ops.qk_norm_rope`. Angles are computed in float64 whatever the dtype, norm and rotation
    in float32 (float64 for float64 input), and the result is rounded once.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    if positions is not None:
        if frequencies is None:
            axes = default_axes(q.shape[-1], positions.shape[-1]) if axes is None else axes
            frequencies = rotary_frequencies(axes, theta, position_scale)
        else:
            axes = (2 * frequencies.shape[-1],)
        angles = rotary_angles(positions, frequencies)
        cos, sin = angles.cos().to(compute), angles.sin().to(compute)
        first, second = (index.to(q.device) for index in rotary_pairs(layout, axes))

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        y = _rms_norm(x.to(compute), weight, norm, eps)
        if positions is not None:
            y = _rotate(y, cos, sin, first, second)
        return x.copy_(y) if inplace else y.to(x.dtype)

    return turned(q, q_weight), None if k is None else turned(k, k_weight)
