# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the group norm: sums a channel over slabs of positions, merged per group, then one pass of x.

Both memory orders are one kernel: the stride that is 1 decides along which axis of a tile threads load together. Groups are
seen by the merging kernels alone, so that tiles need not divide into them. Nothing is added atomically: results depend
on shapes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vidkernels.triton._silu import silu, silu_slope


@triton.jit
def _slab(
    program,
    positions,
    channels,
    frames,
    slabs,
    tiles,
    batch_stride,
    frame_stride,
    position_stride,
    channel_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sample, slab and channels of a program, offsets of the tile that begins at position 0, and the slab's positions:
    those of a tile from 0, the first and the end."""
    chunks = tl.cdiv(channels, BLOCK_C)
    sample = program // (chunks * slabs)
    slab = program // chunks % slabs
    c = (program % chunks) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = (sample // frames) * batch_stride + (sample % frames) * frame_stride
    p = tl.arange(0, BLOCK_P)
    at = start + p[:, None].to(tl.int64) * position_stride + c[None, :] * channel_stride
    begin = slab * tiles * BLOCK_P
    return sample, slab, c, at, p, begin, tl.minimum(begin + tiles * BLOCK_P, positions)


@triton.jit
def _reciprocal(count):
    """1 / count to float64's rounding by Newton's steps from float32: a division of float64 is a call, which keeps 8 bytes of
    every thread in memory."""
    found = (1.0 / count.to(tl.float32)).to(tl.float64)
    found *= 2.0 - count * found
    return found * (2.0 - count * found)


@triton.jit
def _coefficients(
    mean,
    rstd,
    weight,
    bias,
    sample,
    c,
    channels,
    groups,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """z = (x - centre) * scale + shift; what float32 cannot hold of the mean is in the shift, and returned as `rest`."""
    at = sample * groups + c // (channels // groups)
    mu = tl.load(mean + at, mask=c < channels, other=0.0)
    scale = tl.load(rstd + at, mask=c < channels, other=0.0)
    if HAS_WEIGHT:
        scale *= tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float64)
    centre = mu.to(tl.float32)
    rest = mu - centre.to(tl.float64)
    shift = -rest * scale
    if HAS_BIAS:
        shift += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float64)
    return centre, scale.to(tl.float32), shift.to(tl.float32), rest


@triton.jit(do_not_specialize=["frames", "slabs", "tiles"])
def _group_norm_sums_kernel(
    x,
    partial,
    positions,
    channels,
    frames,
    slabs,
    tiles,
    batch_stride,
    frame_stride,
    position_stride,
    channel_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and centred sum of squares of every channel over a slab: partial [samples, slabs, 2, C]."""
    sample, slab, c, at, p, begin, end = _slab(
        tl.program_id(0).to(tl.int64), positions, channels, frames, slabs, tiles, batch_stride, frame_stride,
        position_stride, channel_stride, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    mask = (begin + p[:, None] < end) & (c[None, :] < channels)
    values = tl.load(x + at + begin * position_stride, mask=mask, other=0.0).to(tl.float32)
    # Squares about the first tile's mean: about 0, a large mean would take their digits.
    pivot = tl.sum(values, axis=0) / tl.minimum(end - begin, BLOCK_P).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(begin, end, BLOCK_P):
        mask = (first + p[:, None] < end) & (c[None, :] < channels)
        values = tl.load(x + at + first * position_stride, mask=mask, other=0.0).to(tl.float32)
        values = tl.where(mask, values - pivot[None, :], 0.0)
        total += values
        squares += values * values
    count = (end - begin).to(tl.float64)
    sums = tl.sum(total.to(tl.float64), axis=0)
    centred = tl.sum(squares.to(tl.float64), axis=0) - sums * sums / count
    row = partial + (sample * slabs + slab) * 2 * channels
    tl.store(row + c, pivot.to(tl.float64) + sums / count, mask=c < channels)
    tl.store(row + channels + c, centred, mask=c < channels)


@triton.jit(do_not_specialize=["positions", "slabs", "slab_positions"])
def _group_norm_merge_kernel(
    partial,
    mean,
    rstd,
    positions,
    channels,
    groups,
    slabs,
    slab_positions,
    eps,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Chan's merge, in float64, of the slabs and channels of one group of one sample."""
    program = tl.program_id(0).to(tl.int64)
    width = channels // groups
    k = tl.arange(0, BLOCK_K)
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    at = partial + program // groups * slabs * 2 * channels + program % groups * width + k[None, :]
    total = tl.zeros((BLOCK_S, BLOCK_K), tl.float64)
    for first in range(0, slabs, BLOCK_S):
        slab = first + s
        mask = (slab[:, None] < slabs) & (k[None, :] < width)
        count = tl.minimum(positions - slab * slab_positions, slab_positions).to(tl.float64)
        means = tl.load(at + slab[:, None] * 2 * channels, mask=mask, other=0.0)
        total += tl.where(mask, means * count[:, None], 0.0)
    per_value = _reciprocal(positions.to(tl.float64) * width)
    mu = tl.sum(tl.sum(total, axis=0), axis=0) * per_value
    total = tl.zeros((BLOCK_S, BLOCK_K), tl.float64)
    for first in range(0, slabs, BLOCK_S):
        slab = first + s
        mask = (slab[:, None] < slabs) & (k[None, :] < width)
        count = tl.minimum(positions - slab * slab_positions, slab_positions).to(tl.float64)
        means = tl.load(at + slab[:, None] * 2 * channels, mask=mask, other=0.0) - mu
        centred = tl.load(at + channels + slab[:, None] * 2 * channels, mask=mask, other=0.0)
        total += tl.where(mask, centred + means * means * count[:, None], 0.0)
    variance = tl.sum(tl.sum(total, axis=0), axis=0) * per_value
    tl.store(mean + program, mu)
    tl.store(rstd + program, tl.rsqrt(variance + eps))


@triton.jit(do_not_specialize=["frames", "slabs", "tiles"])
def _group_norm_apply_kernel(
    x,
    weight,
    bias,
    mean,
    rstd,
    y,
    positions,
    channels,
    groups,
    frames,
    slabs,
    tiles,
    batch_stride,
    frame_stride,
    position_stride,
    channel_stride,
    SILU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Backwards: what the sums have read last is still in the level 2 cache.
    sample, slab, c, at, p, begin, end = _slab(
        (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64), positions, channels, frames, slabs, tiles,
        batch_stride, frame_stride, position_stride, channel_stride, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    centre, scale, shift, _ = _coefficients(
        mean, rstd, weight, bias, sample, c, channels, groups, HAS_WEIGHT, HAS_BIAS, BLOCK_C
    )
    for first in range(begin, end, BLOCK_P):
        mask = (first + p[:, None] < end) & (c[None, :] < channels)
        here = at + first * position_stride
        values = tl.load(x + here, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        z = (values - centre[None, :]) * scale[None, :] + shift[None, :]
        if SILU:
            z = silu(z)
        tl.store(y + here, z.to(y.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["frames", "slabs", "tiles"])
def _group_norm_bwd_sums_kernel(
    dy,
    x,
    weight,
    bias,
    mean,
    rstd,
    partial,
    positions,
    channels,
    groups,
    frames,
    slabs,
    tiles,
    batch_stride,
    frame_stride,
    position_stride,
    channel_stride,
    SILU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of dz * (x - mean) and of dz of every channel over a slab: partial [samples, slabs, 2, C]."""
    sample, slab, c, at, p, begin, end = _slab(
        tl.program_id(0).to(tl.int64), positions, channels, frames, slabs, tiles, batch_stride, frame_stride,
        position_stride, channel_stride, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    centre, scale, shift, rest = _coefficients(
        mean, rstd, weight, bias, sample, c, channels, groups, HAS_WEIGHT, HAS_BIAS, BLOCK_C
    )
    products = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(begin, end, BLOCK_P):
        mask = (first + p[:, None] < end) & (c[None, :] < channels)
        here = at + first * position_stride
        centred = tl.load(x + here, mask=mask, other=0.0).to(tl.float32) - centre[None, :]
        dz = tl.load(dy + here, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            dz *= silu_slope(centred * scale[None, :] + shift[None, :])
        # positions outside hold dy = 0, but the other factors may be anything
        products += tl.where(mask, dz * centred, 0.0)
        total += tl.where(mask, dz, 0.0)
    sums = tl.sum(total.to(tl.float64), axis=0)
    weighted = tl.sum(products.to(tl.float64), axis=0) - rest * sums
    row = partial + (sample * slabs + slab) * 2 * channels
    tl.store(row + c, weighted, mask=c < channels)
    tl.store(row + channels + c, sums, mask=c < channels)


@triton.jit(do_not_specialize=["positions", "slabs"])
def _group_norm_bwd_merge_kernel(
    partial,
    weight,
    mean,
    rstd,
    affine,
    lines,
    positions,
    channels,
    groups,
    slabs,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of one group of one sample: terms of dweight and dbias, affine [samples, 2, C], and slope and offset of dx."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // groups
    width = channels // groups
    k = tl.arange(0, BLOCK_K)
    c = program % groups * width + k
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    at = partial + sample * slabs * 2 * channels + c[None, :]
    products = tl.zeros((BLOCK_S, BLOCK_K), tl.float64)
    total = tl.zeros((BLOCK_S, BLOCK_K), tl.float64)
    for first in range(0, slabs, BLOCK_S):
        slab = first + s
        mask = (slab[:, None] < slabs) & (k[None, :] < width)
        products += tl.load(at + slab[:, None] * 2 * channels, mask=mask, other=0.0)
        total += tl.load(at + channels + slab[:, None] * 2 * channels, mask=mask, other=0.0)
    mu = tl.load(mean + program)
    r = tl.load(rstd + program)
    dweight = tl.sum(products, axis=0) * r
    dbias = tl.sum(total, axis=0)
    row = affine + sample * 2 * channels + c
    tl.store(row, dweight, mask=k < width)
    tl.store(row + channels, dbias, mask=k < width)
    if HAS_WEIGHT:
        w = tl.load(weight + c, mask=k < width, other=0.0).to(tl.float64)
        dweight *= w
        dbias *= w
    scale = r * _reciprocal(positions.to(tl.float64) * width)
    slope = tl.sum(dweight, axis=0) * scale * r
    offset = tl.sum(dbias, axis=0) * scale - (mu - mu.to(tl.float32).to(tl.float64)) * slope
    tl.store(lines + program * 2, slope.to(tl.float32))
    tl.store(lines + program * 2 + 1, offset.to(tl.float32))


@triton.jit(do_not_specialize=["frames", "slabs", "tiles"])
def _group_norm_dx_kernel(
    dy,
    x,
    weight,
    bias,
    mean,
    rstd,
    lines,
    dx,
    positions,
    channels,
    groups,
    frames,
    slabs,
    tiles,
    batch_stride,
    frame_stride,
    position_stride,
    channel_stride,
    SILU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = dz * scale - (x - centre) * slope - offset."""
    sample, slab, c, at, p, begin, end = _slab(
        (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64), positions, channels, frames, slabs, tiles,
        batch_stride, frame_stride, position_stride, channel_stride, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    centre, scale, shift, _ = _coefficients(
        mean, rstd, weight, bias, sample, c, channels, groups, HAS_WEIGHT, HAS_BIAS, BLOCK_C
    )
    line = lines + 2 * (sample * groups + c // (channels // groups))
    slope = tl.load(line, mask=c < channels, other=0.0)
    offset = tl.load(line + 1, mask=c < channels, other=0.0)
    for first in range(begin, end, BLOCK_P):
        mask = (first + p[:, None] < end) & (c[None, :] < channels)
        here = at + first * position_stride
        centred = tl.load(x + here, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        centred -= centre[None, :]
        dz = tl.load(dy + here, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if SILU:
            dz *= silu_slope(centred * scale[None, :] + shift[None, :])
        grad = dz * scale[None, :] - (centred * slope[None, :] + offset[None, :])
        tl.store(dx + here, grad.to(dx.dtype.element_ty), mask=mask, eviction_policy="evict_first")
