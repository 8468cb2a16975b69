# SPDX-License-Identifier: Apache-2.0
"""Gated activations in Triton: tiles of whole vectors of both halves, one read and one write.

Exponentials are powers of two, and the normal distribution is a polynomial times one of them: 173 instructions a KB of
bfloat16 where libdevice's erf takes 232, below which an H100 keeps up with its memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vidkernels.triton import _launch
from vidkernels.triton._sizes import cdiv, next_power_of_2

# The numbers of the activations in the bare ops.
GELU = tl.constexpr(0)
GELU_TANH = tl.constexpr(1)
SILU = tl.constexpr(2)

_LOG2E = tl.constexpr(1.4426950408889634)
# sqrt(2 / pi) and that times 0.044715, of the approximation by tanh
_TANH_1 = tl.constexpr(0.7978845608028654)
_TANH_3 = tl.constexpr(0.035677408136300125)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@dataclass(frozen=True)
class GatedConfig:
    """Rows and columns of a program's tile of the output, 16 values a thread."""

    block_r: int
    block_d: int
    num_warps: int

    @classmethod
    def of_width(cls, width: int) -> GatedConfig:
        """Columns that divide the width, 256 bytes or more of each half, or all that a mask cuts off at its end."""
        divisor = width & -width
        block_d = min(1024, divisor if divisor >= 128 else next_power_of_2(width))
        return cls(2048 // block_d, block_d, 4)


@triton.jit
def _normal(z):
    """exp(-z^2 / 2) and the normal distribution's Phi(z), to 6e-8: Phi(-|z|) = exp(-z^2 / 2) P(1 / (1 + 0.4 |z|))."""
    e = tl.exp2(z * z * (-0.5 * _LOG2E))
    t = 1.0 / (1.0 + 0.4 * tl.abs(z))
    p = 0.054970529 * t - 0.2490496
    p = p * t + 0.33080384
    p = p * t + 0.020133203
    p = p * t + 0.1860286
    p = p * t + 0.15711346
    tail = p * t * e
    return e, tl.where(z < 0, tail, 1.0 - tail)


@triton.jit
def _sigmoid_argument(z, ACT: tl.constexpr):
    """w of act(z) = z sigmoid(w)."""
    if ACT == GELU_TANH:
        return z * (z * z * (2.0 * _TANH_3) + 2.0 * _TANH_1)
    return z


@triton.jit
def _activate(z, ACT: tl.constexpr):
    if ACT == GELU:
        _, share = _normal(z)
    else:
        share = 1.0 / (1.0 + tl.exp2(_sigmoid_argument(z, ACT) * -_LOG2E))
    return z * share


@triton.jit
def _activate_with_slope(z, ACT: tl.constexpr):
    """act(z) and its derivative; an infinite z has none (NaN), as in torch."""
    if ACT == GELU:
        e, share = _normal(z)
        slope = share + z * e * _DENSITY
    else:
        e = tl.exp2(tl.abs(_sigmoid_argument(z, ACT)) * -_LOG2E)
        large = 1.0 / (1.0 + e)
        small = e * large
        share = tl.where(z < 0, small, large)
        curve = z * (large * small)  # z s (1 - s): 0 before any power of z overflows
        if ACT == GELU_TANH:
            slope = share + (curve * (2.0 * _TANH_1) + curve * z * z * (6.0 * _TANH_3))
        else:
            slope = share + curve
    return z * share, slope


@triton.jit
def _tile(rows, width, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """First row, row in the tile and column of this program's values, and which of them exist."""
    chunks = tl.cdiv(width, BLOCK_D)
    first = (tl.program_id(0) // chunks).to(tl.int64) * BLOCK_R
    r = tl.arange(0, BLOCK_R)[:, None]
    c = (tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    return first, r, c, (first + r < rows) & (c < width)


@triton.jit(do_not_specialize=["rows"])
def _gated_activation_fwd_kernel(
    x, y, rows, width, x_row, ACT: tl.constexpr, GATE_FIRST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    first, r, c, mask = _tile(rows, width, BLOCK_R, BLOCK_D)
    halves = x + first * x_row + (r * x_row + c)
    one = tl.load(halves, mask=mask, other=0.0).to(tl.float32)
    two = tl.load(halves + width, mask=mask, other=0.0).to(tl.float32)
    if GATE_FIRST:
        result = two * _activate(one, ACT)
    else:
        result = one * _activate(two, ACT)
    tl.store(y + first * width + (r * width + c), result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gated_activation_bwd_kernel(
    dy, x, dx, rows, width, x_row, ACT: tl.constexpr, GATE_FIRST: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, r, c, mask = _tile(rows, width, BLOCK_R, BLOCK_D)
    halves = x + first * x_row + (r * x_row + c)
    one = tl.load(halves, mask=mask, other=0.0).to(tl.float32)
    two = tl.load(halves + width, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dy + first * width + (r * width + c), mask=mask, other=0.0).to(tl.float32)
    if GATE_FIRST:
        value, slope = _activate_with_slope(one, ACT)
        done, dtwo = grad * two * slope, grad * value
    else:
        value, slope = _activate_with_slope(two, ACT)
        done, dtwo = grad * value, grad * one * slope
    to = dx + first * (2 * width) + (r * (2 * width) + c)
    tl.store(to, done.to(dx.dtype.element_ty), mask=mask)
    tl.store(to + width, dtwo.to(dx.dtype.element_ty), mask=mask)


# Offsets inside a tile are 32-bit; a tile has at most 2048 rows.
_MOST_ROW_STRIDE = 2**20


def _narrow(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its rows are so far apart that offsets inside a tile would not fit."""
    return x if x.is_contiguous() or x.stride(0) < _MOST_ROW_STRIDE else x.contiguous()


def gated_activation_fwd(x: torch.Tensor, activation: int, gate_first: bool) -> torch.Tensor:
    """Launcher of `vidkernels::gated_activation_fwd_triton`."""
    x = _narrow(x)
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    _start(_gated_activation_fwd_kernel, x, (x, y), activation, gate_first)
    return y


def gated_activation_bwd(dy: torch.Tensor, x: torch.Tensor, activation: int, gate_first: bool) -> torch.Tensor:
    """Launcher of `vidkernels::gated_activation_bwd_triton`."""
    x = _narrow(x)
    dx = x.new_empty(x.shape)
    _start(_gated_activation_bwd_kernel, x, (dy.contiguous(), x, dx), activation, gate_first)
    return dx


def _start(kernel: Any, x: torch.Tensor, tensors: tuple[torch.Tensor, ...], activation: int, gate_first: bool) -> None:
    key = _launch.signature(*tensors[:-1]), (kernel, activation, gate_first)
    if _launch.repeat(key, tensors):
        return
    width = x.shape[-1] // 2
    rows, config = x.numel() // (2 * width), GatedConfig.of_width(width)
    grid = (cdiv(rows, config.block_r) * cdiv(width, config.block_d),)
    args = *tensors, rows, width, _row_stride(x), activation, gate_first, config.block_r, config.block_d
    _launch.launch(kernel, grid, args, {"num_warps": config.num_warps}, key, tensors)


def _row_stride(x: torch.Tensor) -> int:
    """Elements from one row of x to the next: x is contiguous, or [rows, 2 D] with adjacent elements in a row."""
    if x.is_contiguous():
        return x.shape[-1]
    if x.ndim != 2 or x.stride(1) != 1:
        raise ValueError("gated_activation: x must be contiguous, or two-dimensional with contiguous rows")
    return x.stride(0)
