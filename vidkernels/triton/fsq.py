# SPDX-License-Identifier: Apache-2.0
"""FSQ in Triton. Thresholds and level values are compile-time constants: one kernel per list of levels and bound.

A code is picked by comparison, never computed, so that it has the same bits on every target: `/` is approximate in
Triton and a product may be fused with the subtraction after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidkernels.triton._tokens import (
    channel_offset,
    code_tensor,
    collapse,
    index_tensor,
    launch,
    token_offsets,
)

NAN_INDEX = tl.constexpr(-(2**31))


@triton.jit
def _fsq_fwd_kernel(
    z,
    codes,
    indices,
    inner,
    books,
    z_outer,
    z_inner,
    z_channel,
    codes_outer,
    codes_inner,
    codes_channel,
    LEVELS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_CODES: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    PLANAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    outer, i, book, mask = token_offsets(inner, books, BLOCK, PLANAR)
    channels: tl.constexpr = len(LEVELS)
    z += outer * z_outer + i * z_inner + book * channels * z_channel
    codes += outer * codes_outer + i * codes_inner + book * channels * codes_channel
    index = tl.zeros((BLOCK,), tl.int32)
    has_nan = tl.zeros((BLOCK,), tl.int1)
    basis = 1
    for c in tl.static_range(len(LEVELS)):
        v = tl.load(z + channel_offset(c, z_channel), mask=mask, other=0.0).to(tl.float32)
        digit = tl.zeros((BLOCK,), tl.int32)
        code = tl.full((BLOCK,), VALUES[c][0], tl.float32)
        for k in tl.static_range(LEVELS[c] - 1):
            reached = v >= THRESHOLDS[c][k]
            digit += reached.to(tl.int32)
            code = tl.where(reached, VALUES[c][k + 1], code)
        if HAS_CODES:
            code = tl.where(v == v, code, v)
            tl.store(codes + channel_offset(c, codes_channel), code.to(codes.dtype.element_ty), mask=mask)
        index += digit * basis
        basis *= LEVELS[c]
        has_nan = has_nan | (v != v)
    if HAS_INDICES:
        index = tl.where(has_nan, NAN_INDEX, index)
        tl.store(indices + (outer * inner + i) * books + book, index, mask=mask)


@triton.jit
def _fsq_bwd_kernel(
    z,
    dcodes,
    dz,
    inner,
    books,
    z_outer,
    z_inner,
    z_channel,
    dcodes_outer,
    dcodes_inner,
    dcodes_channel,
    dz_outer,
    dz_inner,
    dz_channel,
    SHIFT: tl.constexpr,
    SLOPE: tl.constexpr,
    HARD_CLAMP: tl.constexpr,
    PLANAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    outer, i, book, mask = token_offsets(inner, books, BLOCK, PLANAR)
    channels: tl.constexpr = len(SHIFT)
    z += outer * z_outer + i * z_inner + book * channels * z_channel
    dcodes += outer * dcodes_outer + i * dcodes_inner + book * channels * dcodes_channel
    dz += outer * dz_outer + i * dz_inner + book * channels * dz_channel
    for c in tl.static_range(len(SHIFT)):
        size = tl.abs(tl.load(z + channel_offset(c, z_channel), mask=mask, other=0.0).to(tl.float32) + SHIFT[c])
        grad = tl.load(dcodes + channel_offset(c, dcodes_channel), mask=mask, other=0.0).to(tl.float32)
        if HARD_CLAMP:
            slope = tl.where(size == size, tl.where(size <= 1.0, 1.0, 0.0), size)
        else:
            # 4 e / (1 + e)^2 where 1 - t^2 would cancel, 1 - t^2 where it has fewer roundings.
            e = tl.exp(-2.0 * size)
            r = 1.0 / (1.0 + e)
            t = (1.0 - e) * r
            slope = tl.where(t < 0.7, 1.0 - t * t, 4.0 * e * r * r)
        tl.store(dz + channel_offset(c, dz_channel), (grad * SLOPE[c] * slope).to(dz.dtype.element_ty), mask=mask)


@triton.jit
def _fsq_decode_kernel(
    indices,
    codes,
    inner,
    books,
    codes_outer,
    codes_inner,
    codes_channel,
    LEVELS: tl.constexpr,
    VALUES: tl.constexpr,
    SIZE: tl.constexpr,
    PLANAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    outer, i, book, mask = token_offsets(inner, books, BLOCK, PLANAR)
    channels: tl.constexpr = len(LEVELS)
    codes += outer * codes_outer + i * codes_inner + book * channels * codes_channel
    index = tl.load(indices + (outer * inner + i) * books + book, mask=mask, other=0).to(tl.int64)
    valid = (index >= 0) & (index < SIZE)
    rest = tl.where(valid, index, 0).to(tl.int32)
    for c in tl.static_range(len(LEVELS)):
        digit = rest % LEVELS[c]
        rest = rest // LEVELS[c]
        code = tl.full((BLOCK,), VALUES[c][0], tl.float32)
        for k in tl.static_range(LEVELS[c] - 1):
            code = tl.where(digit == k + 1, VALUES[c][k + 1], code)
        code = tl.where(valid, code, float("nan"))
        tl.store(codes + channel_offset(c, codes_channel), code.to(codes.dtype.element_ty), mask=mask)


@lru_cache(maxsize=64)
def level_values(levels: tuple[int, ...], symmetric: bool, dtype: torch.dtype) -> tuple[tuple[float, ...], ...]:
    """The value of each level of each channel: computed in float32, rounded to ``dtype``."""
    values = []
    for count in levels:
        digits = torch.arange(count, dtype=torch.float32)
        if symmetric:
            grid = 2.0 / torch.tensor(count - 1, dtype=torch.float32) * digits - 1.0
        else:
            grid = (digits - count // 2) / (count // 2)
        values.append(tuple(grid.to(dtype).tolist()))
    return tuple(values)


def split_thresholds(levels: Sequence[int], thresholds: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Each channel's own thresholds, from the shared list of the distinct level counts."""
    found: dict[int, tuple[float, ...]] = {}
    start = 0
    for count in dict.fromkeys(levels):
        found[count] = tuple(thresholds[start : start + count - 1])
        start += count - 1
    return tuple(found[count] for count in levels)


def fsq_fwd(
    z: Tensor,
    levels: Sequence[int],
    thresholds: Sequence[float],
    symmetric: bool,
    dim: int,
    num_codebooks: int,
    return_codes: bool,
    return_indices: bool,
) -> tuple[Tensor, Tensor]:
    """Launcher of the bare op `fsq_fwd`."""
    codes = torch.empty_like(z) if return_codes else z.new_empty(0)
    indices = index_tensor(z, dim, num_codebooks, torch.int32) if return_indices else z.new_empty(0, dtype=torch.int32)
    if z.numel() == 0:
        return codes, indices
    grid, (source, target) = collapse([z], codes if return_codes else z, dim)
    launch(
        _fsq_fwd_kernel,
        grid,
        num_codebooks,
        [source, target, indices],
        strides=[0, 1],
        LEVELS=tuple(levels),
        THRESHOLDS=split_thresholds(levels, thresholds),
        VALUES=level_values(tuple(levels), symmetric, z.dtype),
        HAS_CODES=return_codes,
        HAS_INDICES=return_indices,
    )
    if return_codes and target is not codes:
        codes.copy_(target)
    return codes, indices


def fsq_bwd(
    dcodes: Tensor,
    z: Tensor,
    shift: Sequence[float],
    slope: Sequence[float],
    hard_clamp: bool,
    dim: int,
    num_codebooks: int,
) -> Tensor:
    """Launcher of the bare op `fsq_bwd`."""
    dz = torch.empty_like(z)
    if z.numel() == 0:
        return dz
    grid, (source, grad, target) = collapse([z, dcodes], dz, dim)
    launch(
        _fsq_bwd_kernel,
        grid,
        num_codebooks,
        [source, grad, target],
        strides=[0, 1, 2],
        SHIFT=tuple(shift),
        SLOPE=tuple(slope),
        HARD_CLAMP=hard_clamp,
    )
    return dz if target is dz else dz.copy_(target)


def fsq_decode(
    indices: Tensor, levels: Sequence[int], symmetric: bool, dim: int, num_codebooks: int, dtype: torch.dtype
) -> Tensor:
    """Launcher of the bare op `fsq_decode`."""
    codes = code_tensor(indices, dim, num_codebooks, len(levels), dtype)
    if codes.numel() == 0:
        return codes
    grid, _ = collapse([], codes, dim)
    launch(
        _fsq_decode_kernel,
        grid,
        num_codebooks,
        [indices.contiguous(), codes],
        strides=[0],
        LEVELS=tuple(levels),
        VALUES=level_values(tuple(levels), symmetric, dtype),
        SIZE=math.prod(levels),
    )
    return codes
