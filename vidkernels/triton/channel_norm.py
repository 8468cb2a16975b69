# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the channel norm: a tile of positions x channels stays in registers between its passes.

Both memory orders are one kernel: the stride that is 1 decides along which axis of the tile threads load together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vidkernels.triton._silu import silu, silu_slope
from vidkernels.triton._sizes import cdiv, next_power_of_2

LAYER, L2 = 0, 2


@triton.jit
def _tile(
    tile, inner, channels, outer_stride, inner_stride, channel_stride, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Offsets and mask of tile number `tile`, [BLOCK_P, BLOCK_C]."""
    per_plane = tl.cdiv(inner, BLOCK_P)
    p = (tile % per_plane) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    offsets = (tile // per_plane) * outer_stride + p[:, None] * inner_stride + c[None, :] * channel_stride
    return offsets, (p[:, None] < inner) & (c[None, :] < channels)


@triton.jit
def _statistics(x, mask, channels, eps, KIND: tl.constexpr):
    """xhat, rstd and whether rstd is the constant that replaces a vanishing l2 norm; values outside the mask are 0."""
    if KIND == 0:
        centred = tl.where(mask, x - (tl.sum(x, axis=1) / channels)[:, None], 0.0)
        # what rounding the first mean has left
        centred = tl.where(mask, centred - (tl.sum(centred, axis=1) / channels)[:, None], 0.0)
    else:
        centred = x
    squares = tl.sum(centred * centred, axis=1)
    fixed = squares < 0
    if KIND == 2:
        length = tl.sqrt(squares)
        fixed = length < eps
        rstd = tl.sqrt(channels * 1.0) / tl.where(fixed, eps, length)
    else:
        rstd = 1.0 / tl.sqrt(squares / channels + eps)
    return centred * rstd[:, None], rstd, fixed


@triton.jit
def _affine(weight, bias, channels, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.arange(0, BLOCK_C)
    w = tl.full((BLOCK_C,), 1.0, tl.float32)
    b = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    return w, b


@triton.jit
def _channel_norm_fwd_kernel(
    x,
    weight,
    bias,
    y,
    inner,
    channels,
    x_outer,
    x_inner,
    x_channel,
    y_outer,
    y_inner,
    y_channel,
    eps,
    KIND: tl.constexpr,
    SILU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    at, mask = _tile(tile, inner, channels, x_outer, x_inner, x_channel, BLOCK_P, BLOCK_C)
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    xhat, _, _ = _statistics(values, mask, channels, eps, KIND)
    w, b = _affine(weight, bias, channels, HAS_WEIGHT, HAS_BIAS, BLOCK_C)
    z = xhat * w[None, :] + b[None, :]
    if SILU:
        z = silu(z)
    at, mask = _tile(tile, inner, channels, y_outer, y_inner, y_channel, BLOCK_P, BLOCK_C)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def _channel_norm_bwd_kernel(
    dy,
    x,
    weight,
    bias,
    dx,
    partial,
    tiles,
    inner,
    channels,
    x_outer,
    x_inner,
    x_channel,
    y_outer,
    y_inner,
    y_channel,
    eps,
    KIND: tl.constexpr,
    SILU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WANT_X: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    w, b = _affine(weight, bias, channels, HAS_WEIGHT, HAS_BIAS, BLOCK_C)
    weight_sum = tl.zeros((BLOCK_C,), tl.float32)
    bias_sum = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(program, tiles, tl.num_programs(0)):
        at, mask = _tile(tile, inner, channels, x_outer, x_inner, x_channel, BLOCK_P, BLOCK_C)
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        xhat, rstd, fixed = _statistics(values, mask, channels, eps, KIND)
        at, mask = _tile(tile, inner, channels, y_outer, y_inner, y_channel, BLOCK_P, BLOCK_C)
        dz = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            dz *= silu_slope(xhat * w[None, :] + b[None, :])
        # positions outside hold dy = 0, but their xhat may be anything
        product = tl.where(mask, dz * xhat, 0.0)
        dz = tl.where(mask, dz, 0.0)
        weight_sum += tl.sum(product, axis=0)
        bias_sum += tl.sum(dz, axis=0)
        if WANT_X:
            g = dz * w[None, :]
            gx_mean = tl.where(fixed, 0.0, tl.sum(g * xhat, axis=1) / channels)
            g -= xhat * gx_mean[:, None]
            if KIND == 0:
                g -= (tl.sum(tl.where(mask, g, 0.0), axis=1) / channels)[:, None]
            tl.store(dx + at, (g * rstd[:, None]).to(dx.dtype.element_ty), mask=mask)
    c = tl.arange(0, BLOCK_C)
    row = partial + program * 2 * channels
    tl.store(row + c, weight_sum, mask=c < channels)
    tl.store(row + channels + c, bias_sum, mask=c < channels)


@dataclass(frozen=True)
class NormConfig:
    """Positions and channels of a tile, and the warps that hold it."""

    block_p: int
    block_c: int
    num_warps: int


def norm_config(channels: int, rows: bool, backward: bool) -> NormConfig:
    """The tile for a number of channels: about 32 values a thread (16 backward, which holds four such tiles).

    Where positions are adjacent, at least 16 of them make loads of 32 bytes or more a channel, but the backward
    of wide channels would spill.
    """
    block_c = next_power_of_2(channels)
    fewest = 1 if rows else 4 if backward else 16
    block_p = max(fewest, min(64, 4096 // block_c))
    per_thread = 16 if backward else 32
    warps = min(16, max(4, next_power_of_2(block_p * block_c // (32 * per_thread))))
    return NormConfig(block_p, block_c, warps)


# Programs that keep sums of dweight and dbias, whatever the device: results depend on shapes alone.
_MAX_PROGRAMS = 512


@dataclass(frozen=True)
class _Layout:
    """Positions as [outer, inner] beside the channel axis, with the strides of x and of y (dy and dx have y's)."""

    outer: int
    inner: int
    x: tuple[int, int, int]
    y: tuple[int, int, int]


def _merged(sizes: list[int], strides: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(size, stride in x, stride in y) of axes, merged where both tensors allow; outermost first."""
    groups: list[tuple[int, int, int]] = []
    for size, (x, y) in zip(sizes, strides, strict=True):
        if groups and groups[-1][1] == x * size and groups[-1][2] == y * size:
            groups[-1] = (groups[-1][0] * size, x, y)
        else:
            groups.append((size, x, y))
    return groups


def _layout(x: torch.Tensor, y: torch.Tensor, dim: int) -> _Layout | None:
    """None where positions need more than two axes; never for tensors with the strides of one dense tensor."""
    axes = [axis for axis in range(x.ndim) if axis != dim and x.shape[axis] > 1]
    axes.sort(key=lambda axis: -y.stride(axis))
    groups = _merged([x.shape[a] for a in axes], [(x.stride(a), y.stride(a)) for a in axes])
    if len(groups) > 2:
        return None
    groups = [(1, 0, 0)] * (2 - len(groups)) + groups
    (outer, xo, yo), (inner, xi, yi) = groups
    return _Layout(outer, inner, (xo, xi, x.stride(dim)), (yo, yi, y.stride(dim)))


def _prepared(x: torch.Tensor, y: torch.Tensor, dim: int) -> tuple[torch.Tensor, _Layout]:
    """x, or its values in y's strides where a tile cannot walk it, and the layout."""
    layout = _layout(x, y, dim)
    if layout is not None:
        return x, layout
    x = torch.empty_like(y).copy_(x)
    dense = _layout(x, y, dim)
    assert dense is not None
    return x, dense


def channel_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dim: int,
    kind: int,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    """Launcher of `vidkernels::channel_norm_fwd_triton`."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    x, layout = _prepared(x.resolve_neg(), y, dim)  # called past torch's dispatcher, which would see to that
    channels = x.shape[dim]
    config = norm_config(channels, layout.y[2] == 1, backward=False)
    grid = (layout.outer * cdiv(layout.inner, config.block_p),)
    _channel_norm_fwd_kernel[grid](
        x, weight, bias, y, layout.inner, channels, *layout.x, *layout.y, eps, KIND=kind, SILU=silu,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, BLOCK_P=config.block_p, BLOCK_C=config.block_c,
        num_warps=config.num_warps,
    )  # fmt: skip
    return y


def _affine_grad(affine: torch.Tensor | None, x: torch.Tensor, wanted: bool) -> torch.Tensor:
    if affine is None:
        return x.new_empty(0)
    return torch.empty_like(affine) if wanted else affine.new_empty(0)


def channel_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dim: int,
    kind: int,
    eps: float,
    silu: bool,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launcher of `vidkernels::channel_norm_bwd_triton`."""
    like = torch.empty_like(x)
    dx = like if want_x else x.new_empty(0)
    dweight, dbias = _affine_grad(weight, x, want_weight), _affine_grad(bias, x, want_bias)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    x, layout = _prepared(x, like, dim)
    if dy.stride() != like.stride():
        dy = torch.empty_like(like).copy_(dy)
    channels = x.shape[dim]
    config = norm_config(channels, layout.y[2] == 1, backward=True)
    tiles = layout.outer * cdiv(layout.inner, config.block_p)
    programs = min(_MAX_PROGRAMS, tiles)
    partial = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
    _channel_norm_bwd_kernel[(programs,)](
        dy, x, weight, bias, like, partial, tiles, layout.inner, channels, *layout.x, *layout.y, eps, KIND=kind,
        SILU=silu, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, WANT_X=want_x, BLOCK_P=config.block_p,
        BLOCK_C=config.block_c, num_warps=config.num_warps,
    )  # fmt: skip
    sums = partial.sum(dim=0, dtype=torch.float64)
    for grad, total in ((dweight, sums[0]), (dbias, sums[1])):
        if grad.numel() > 0:
            grad.copy_(total)
    return dx, dweight, dbias
