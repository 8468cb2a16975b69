# SPDX-License-Identifier: Apache-2.0
"""LFQ and BSQ in Triton: one program owns a block of tokens and walks over their channels."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidkernels.triton._tokens import (
    TokenConfig,
    channel_offset,
    code_tensor,
    collapse,
    index_tensor,
    launch,
    token_offsets,
)

# torch.nn.functional.normalize divides by no less than this.
NORM_FLOOR = tl.constexpr(1e-12)


@triton.jit
def _floored_norm(x, stride, mask, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    square = tl.zeros((BLOCK,), tl.float32)
    for c in tl.static_range(CHANNELS):
        v = tl.load(x + channel_offset(c, stride), mask=mask, other=1.0).to(tl.float32)
        square += v * v
    norm = tl.sqrt_rn(square)
    return tl.where(norm < NORM_FLOOR, NORM_FLOOR, norm)


@triton.jit
def _lfq_fwd_kernel(
    x,
    values,
    indices,
    inner,
    books,
    x_outer,
    x_inner,
    x_channel,
    values_outer,
    values_inner,
    values_channel,
    magnitude: tl.float32,
    scale: tl.float32,
    CHANNELS: tl.constexpr,
    LSB_FIRST: tl.constexpr,
    SPHERICAL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    PLANAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    outer, i, book, mask = token_offsets(inner, books, BLOCK, PLANAR)
    x += outer * x_outer + i * x_inner + book * CHANNELS * x_channel
    values += outer * values_outer + i * values_inner + book * CHANNELS * values_channel
    if SPHERICAL:
        norm = _floored_norm(x, x_channel, mask, CHANNELS, BLOCK)
    index = tl.zeros((BLOCK,), tl.int64)
    for c in tl.static_range(CHANNELS):
        u = tl.load(x + channel_offset(c, x_channel), mask=mask, other=0.0).to(tl.float32)
        if SPHERICAL:
            u = tl.div_rn(u, norm) * scale
        positive = u > 0
        index = index | (positive.to(tl.int64) << (c if LSB_FIRST else CHANNELS - 1 - c))
        if HAS_VALUES:
            value = tl.where(positive, magnitude, -magnitude)
            if ADDITIVE:
                value = u + (value - u)
            tl.store(values + channel_offset(c, values_channel), value.to(values.dtype.element_ty), mask=mask)
    if HAS_INDICES:
        tl.store(indices + (outer * inner + i) * books + book, index, mask=mask)


@triton.jit
def _lfq_bwd_kernel(
    x,
    grad,
    dx,
    inner,
    books,
    x_outer,
    x_inner,
    x_channel,
    grad_outer,
    grad_inner,
    grad_channel,
    dx_outer,
    dx_inner,
    dx_channel,
    scale: tl.float32,
    CHANNELS: tl.constexpr,
    PLANAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    outer, i, book, mask = token_offsets(inner, books, BLOCK, PLANAR)
    x += outer * x_outer + i * x_inner + book * CHANNELS * x_channel
    grad += outer * grad_outer + i * grad_inner + book * CHANNELS * grad_channel
    dx += outer * dx_outer + i * dx_inner + book * CHANNELS * dx_channel
    # float32 rounds once: six roundings of vectors with few channels, whose reference may be right to half a unit, are
    # up to three. One reciprocal a token, as float64 divides slowly.
    DTYPE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float32 else tl.float32
    square = tl.zeros((BLOCK,), DTYPE)
    for c in tl.static_range(CHANNELS):
        v = tl.load(x + channel_offset(c, x_channel), mask=mask, other=1.0).to(DTYPE)
        square += v * v
    norm = tl.sqrt(square)
    floored = norm < NORM_FLOOR
    inverse = 1.0 / tl.where(floored, NORM_FLOOR, norm)
    dot = tl.zeros((BLOCK,), DTYPE)
    for c in tl.static_range(CHANNELS):
        unit = tl.load(x + channel_offset(c, x_channel), mask=mask, other=0.0).to(DTYPE) * inverse
        dot += unit * tl.load(grad + channel_offset(c, grad_channel), mask=mask, other=0.0).to(DTYPE)
    dot = tl.where(floored, 0.0, dot)  # there the divisor is a constant
    for c in tl.static_range(CHANNELS):
        unit = tl.load(x + channel_offset(c, x_channel), mask=mask, other=0.0).to(DTYPE) * inverse
        g = tl.load(grad + channel_offset(c, grad_channel), mask=mask, other=0.0).to(DTYPE)
        tl.store(
            dx + channel_offset(c, dx_channel), (scale * inverse * (g - unit * dot)).to(dx.dtype.element_ty), mask=mask
        )


@triton.jit
def _lfq_decode_kernel(
    indices,
    codes,
    inner,
    books,
    codes_outer,
    codes_inner,
    codes_channel,
    magnitude: tl.float32,
    CHANNELS: tl.constexpr,
    LSB_FIRST: tl.constexpr,
    PLANAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    outer, i, book, mask = token_offsets(inner, books, BLOCK, PLANAR)
    codes += outer * codes_outer + i * codes_inner + book * CHANNELS * codes_channel
    index = tl.load(indices + (outer * inner + i) * books + book, mask=mask, other=0).to(tl.int64)
    for c in tl.static_range(CHANNELS):
        place = c if LSB_FIRST else CHANNELS - 1 - c
        code = tl.where(((index >> place) & 1) != 0, magnitude, -magnitude)
        tl.store(codes + channel_offset(c, codes_channel), code.to(codes.dtype.element_ty), mask=mask)


@lru_cache(maxsize=256)
def code_magnitude(bits: int, scale: float, spherical: bool, dtype: torch.dtype) -> float:
    """Absolute value of every channel of a code: computed in float32, rounded to ``dtype``."""
    one = torch.ones((), dtype=torch.float32)
    return float((one / (one * bits).sqrt() * scale if spherical else one * scale).to(dtype))


def lfq_fwd(
    x: Tensor,
    scale: float,
    lsb_first: bool,
    spherical: bool,
    additive: bool,
    dim: int,
    num_codebooks: int,
    return_values: bool,
    return_indices: bool,
) -> tuple[Tensor, Tensor]:
    """Launcher of the bare op `lfq_fwd`."""
    values = torch.empty_like(x) if return_values else x.new_empty(0)
    indices = index_tensor(x, dim, num_codebooks, torch.int64) if return_indices else x.new_empty(0, dtype=torch.int64)
    if x.numel() == 0:
        return values, indices
    bits = x.shape[dim] // num_codebooks
    grid, (source, target) = collapse([x], values if return_values else x, dim)
    launch(
        _lfq_fwd_kernel,
        grid,
        num_codebooks,
        [source, target, indices],
        strides=[0, 1],
        magnitude=code_magnitude(bits, scale, spherical, torch.float32 if additive else x.dtype),
        scale=scale,
        CHANNELS=bits,
        LSB_FIRST=lsb_first,
        SPHERICAL=spherical,
        ADDITIVE=additive,
        HAS_VALUES=return_values,
        HAS_INDICES=return_indices,
    )
    if return_values and target is not values:
        values.copy_(target)
    return values, indices


def lfq_bwd(grad: Tensor, x: Tensor, scale: float, dim: int, num_codebooks: int) -> Tensor:
    """Launcher of the bare op `lfq_bwd`."""
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx
    grid, (source, dense, target) = collapse([x, grad], dx, dim)
    bits = x.shape[dim] // num_codebooks
    launch(
        _lfq_bwd_kernel,
        grid,
        num_codebooks,
        [source, dense, target],
        strides=[0, 1, 2],
        # The compiler keeps both inputs from the first pass for the second: of 18 bits, 4 tokens a thread would spill.
        config=TokenConfig(256, 4) if bits > 12 else None,
        scale=scale,
        CHANNELS=bits,
    )
    return dx if target is dx else dx.copy_(target)


def lfq_decode(
    indices: Tensor,
    bits: int,
    scale: float,
    lsb_first: bool,
    spherical: bool,
    dim: int,
    num_codebooks: int,
    dtype: torch.dtype,
) -> Tensor:
    """Launcher of the bare op `lfq_decode`."""
    codes = code_tensor(indices, dim, num_codebooks, bits, dtype)
    if codes.numel() == 0:
        return codes
    grid, _ = collapse([], codes, dim)
    launch(
        _lfq_decode_kernel,
        grid,
        num_codebooks,
        [indices.contiguous(), codes],
        strides=[0],
        magnitude=code_magnitude(bits, scale, spherical, dtype),
        CHANNELS=bits,
        LSB_FIRST=lsb_first,
    )
    return codes
