# SPDX-License-Identifier: Apache-2.0
"""Attention over short segments: several share a tile under a block-diagonal mask, norm and rotation in the prologue.

Every input is read once and the output written once: at 16 or 32 tokens a segment attention is bound by memory, and a
kernel with tiles of 128 queries computes 8 of 9 scores for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vidkernels.triton import _launch
from vidkernels.triton._attention import add_product, head_pieces, precision, product, rounded, sign_and_unit, upcast
from vidkernels.triton._device import family
from vidkernels.triton._rotary import convention
from vidkernels.triton._short_rows import (
    axial_offsets,
    axial_rows,
    head_angles,
    inverse_rms,
    load_head,
    packed_rows,
    result_offsets,
    store_rows,
    tile_and_head,
    turn,
    visible,
    weight_piece,
)
from vidkernels.triton._sizes import cdiv, common_divisor, next_power_of_2


@triton.jit
def prologue(
    x0, x1, weight, cosine0, sine0, cosine1, sine1, eps,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ROTATE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of the rows of q or k, rounded to the storage type as a pass of its own would round them."""
    if NORM or ROTATE:
        y0 = x0.to(tl.float32)
        y1 = x1.to(tl.float32)
        if NORM:
            factor = inverse_rms(y0, y1, eps, D1, HEAD_DIM)[:, None]
            y0 = y0 * factor
            if HAS_WEIGHT:
                y0 = y0 * weight_piece(weight, 0, D0, HEAD_DIM)
            if D1 > 0:
                y1 = y1 * factor
                if HAS_WEIGHT:
                    y1 = y1 * weight_piece(weight, D0, D1, HEAD_DIM)
        if ROTATE:
            y0 = turn(y0, cosine0, sine0)
            if D1 > 0:
                y1 = turn(y1, cosine1, sine1)
        x0 = rounded(y0, x0.dtype, UPCAST)
        if D1 > 0:
            x1 = rounded(y1, x1.dtype, UPCAST)
    return x0, x1


@triton.jit
def softmax(
    q0, q1, k0, k1, seen, unit, D1: tl.constexpr, SIGN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr
):
    """Weights of a tile, float32, rows summing to 1; rows that see nothing are 0."""
    scores = product(q0, tl.trans(k0), UPCAST, PRECISION)
    if D1 > 0:
        scores = add_product(q1, tl.trans(k1), scores, UPCAST, PRECISION)
    scores = tl.where(seen, scores * SIGN, float("-inf"))
    maximum = tl.max(scores, 1)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    weights = tl.where(seen, tl.exp2((scores - maximum[:, None]) * unit), 0.0)
    total = tl.sum(weights, 1)
    return weights / tl.where(tl.sum(seen.to(tl.int32), 1) == 0, 1.0, total)[:, None]


@triton.jit
def _weigh(weights, v, segment, begin, end, ALONE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """weights @ v. Where v is not finite, segment by segment: a weight of 0 times NaN would reach the tile's others.

    ALONE: a tile holds one segment, so there are no others.
    """
    stored = rounded(weights, v.dtype, UPCAST)
    out = product(stored, v, UPCAST, PRECISION)
    if not ALONE:
        probe = tl.sum(v.to(tl.float32) * 0.0)
        if probe != probe:
            for one in range(begin, end):
                inside = (segment == one)[:, None]
                part = product(stored, tl.where(inside, v, 0.0), UPCAST, PRECISION)
                out = tl.where(inside, part, out)
    return out


@triton.jit(do_not_specialize=["segments", "inner", "step"])
def _short_attention_fwd_kernel(
    q, k, v, out, q_weight, k_weight, positions, frequencies, cu_seqlens, segments, heads, inner, step,
    q_outer, q_axis, q_inner, q_head, k_outer, k_axis, k_inner, k_head, v_outer, v_axis, v_inner, v_head,
    position_place, position_axis, eps, unit,
    LENGTH: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROTATE: tl.constexpr, PAIRS: tl.constexpr,
    STEPS: tl.constexpr, SCALES: tl.constexpr, TABLE_AXES: tl.constexpr, CAUSAL: tl.constexpr, SIGN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """LENGTH 0: packed layout, with the token strides in *_axis; else axial."""
    tile, first_head = tile_and_head(heads, HEADS)
    if LENGTH == 0:
        place, segment, valid, begin, end = packed_rows(cu_seqlens, segments, step, tile, BLOCK)
        if begin >= end:
            return
        rows_q, rows_k, rows_v = place * (q_axis * ALIGN), place * (k_axis * ALIGN), place * (v_axis * ALIGN)
    else:
        place, segment, valid, begin, end = axial_rows(segments, tile, LENGTH, BLOCK)
        rows_q = axial_offsets(segment, place, inner, q_outer, q_axis, q_inner) * ALIGN
        rows_k = axial_offsets(segment, place, inner, k_outer, k_axis, k_inner) * ALIGN
        rows_v = axial_offsets(segment, place, inner, v_outer, v_axis, v_inner) * ALIGN
    ALONE: tl.constexpr = 2 * LENGTH > BLOCK
    rows_o = result_offsets(segment, place, inner, heads, LENGTH, HEAD_DIM)
    seen = visible(segment, valid, BLOCK, CAUSAL)
    cosine0, sine0, cosine1, sine1 = head_angles(
        positions, frequencies, place, position_place, position_axis, valid, D0, D1, ROTATE, PAIRS, STEPS, SCALES,
        TABLE_AXES,
    )  # fmt: skip
    for member in range(0, HEADS):
        head = first_head + member
        used = valid & (head + tl.zeros((BLOCK,), tl.int32) < heads)
        at_q = q + head.to(tl.int64) * (q_head * ALIGN)
        at_k = k + head.to(tl.int64) * (k_head * ALIGN)
        at_v = v + head.to(tl.int64) * (v_head * ALIGN)
        q0, q1 = load_head(at_q, rows_q, used, D0, D1, HEAD_DIM)
        k0, k1 = load_head(at_k, rows_k, used, D0, D1, HEAD_DIM)
        v0, v1 = load_head(at_v, rows_v, used, D0, D1, HEAD_DIM)
        q0, q1 = prologue(
            q0, q1, q_weight, cosine0, sine0, cosine1, sine1, eps, HEAD_DIM, D0, D1, NORM, HAS_WEIGHT, ROTATE, UPCAST
        )
        k0, k1 = prologue(
            k0, k1, k_weight, cosine0, sine0, cosine1, sine1, eps, HEAD_DIM, D0, D1, NORM, HAS_WEIGHT, ROTATE, UPCAST
        )
        weights = softmax(q0, q1, k0, k1, seen, unit, D1, SIGN, UPCAST, PRECISION)
        at_o = out + head.to(tl.int64) * HEAD_DIM
        mixed = _weigh(weights, v0, segment, begin, end, ALONE, UPCAST, PRECISION)
        store_rows(at_o, rows_o, used, rounded(mixed, v0.dtype, UPCAST), 0, D0, HEAD_DIM)
        if D1 > 0:
            mixed = _weigh(weights, v1, segment, begin, end, ALONE, UPCAST, PRECISION)
            store_rows(at_o, rows_o, used, rounded(mixed, v1.dtype, UPCAST), D0, D1, HEAD_DIM)


@dataclass(frozen=True)
class ShortConfig:
    """Rows of a tile, heads that a program walks over (they share rows and angles), warps, pipeline stages, and whether
    a head is one piece although two would hold it."""

    block: int
    heads: int
    num_warps: int
    num_stages: int = 1
    whole: bool = False


def small_config(
    kernel: str, head_dim: int, heads: int, device_family: str, length: int, inside: bool
) -> ShortConfig | None:
    """A tile of 16 or 32 rows in the fewest warps that do not spill; None where nothing shorter than 64 rows is better.

    Such a tile holds one segment of 16 and computes nothing for a mask to hide. A warp alone waits for no other, and 16
    programs of one share a multiprocessor where 64 rows in 8 warps of 183 registers leave room for a single program, which
    waits for its loads, then for its products: 35 instructions a KB, were 202, and 110 KB on their way, were 28.
    """
    if not 0 < length <= 32 or device_family == "amd" or (inside and kernel == "bwd"):
        return None
    narrow = head_dim <= 80
    if length <= 16:
        warps = 2 if inside and not narrow else 1
    elif inside:
        warps = 2 if narrow else 4
    elif kernel == "fwd":
        warps = 1 if head_dim <= 96 else 2
    else:
        warps = 2 if narrow else 4
    return ShortConfig(16 if length <= 16 else 32, min(heads, 4), warps)


def short_config(
    kernel: str,
    head_dim: int,
    heads: int,
    device_family: str,
    packed: bool = False,
    length: int = 0,
    inside: bool = True,
) -> ShortConfig:
    """Configuration of "fwd" or "bwd": no spills with norm and rotation inside (tests/test_varlen_attention_aot.py).

    `length`: of all segments, if they have one; `inside`: whether q and k are normed or rotated.

    Loads of the next head overlap the products of this one where registers permit more than one stage. The backward of
    wide heads holds 32 rows, and one piece of 128 channels spills less than 64 + 16. Rows of a packed tile need two more
    registers each: at 255 of them the backward then takes one head a program.
    """
    small = small_config(kernel, head_dim, heads, device_family, length, inside)
    if small is not None:
        return small
    group = min(heads, 4)
    if kernel == "fwd":
        stages = 3 if 16 < head_dim <= 64 else 1
        wide = 64 < head_dim <= 80 and device_family in ("sm_90", "sm_100")
        # Three stages of packed heads of 32 spill 8 bytes on sm_100, which gives the kernel 80 registers.
        if head_dim <= 16 or wide or head_dim <= 32 and device_family == "sm_100":
            stages = 2
        return ShortConfig(64, group, 8, 1 if device_family == "amd" else stages)
    if head_dim <= 64 and device_family != "amd":
        if device_family == "sm_80":
            return ShortConfig(64, 1 if packed else group, 8, 1)
        return ShortConfig(64, group, 8, 2)
    if head_dim <= 80 and device_family == "sm_90":
        return ShortConfig(64, 1 if packed else group, 8, 1)
    return ShortConfig(32, group, 8, 1, whole=64 < head_dim)


def longest_short(head_dim: int, device_family: str) -> int:
    """Longest segment that both kernels take."""
    return short_config("bwd", head_dim, 1, device_family).block if head_dim <= 128 else 0


def constants(
    q: torch.Tensor, config: ShortConfig, length: int, q_weight: torch.Tensor | None, positions: torch.Tensor | None,
    frequencies: torch.Tensor | None, axes: Sequence[int], theta: Sequence[float], position_scale: Sequence[float],
    norm: bool, causal: bool, sign: int,
) -> dict[str, Any]:  # fmt: skip
    """Compile-time arguments that forward and backward share."""
    first, second = (next_power_of_2(q.shape[-1]), 0) if config.whole else head_pieces(q.shape[-1])
    turned = convention(axes, theta, position_scale)
    return {
        "LENGTH": length, "BLOCK": config.block, "HEADS": config.heads, "HEAD_DIM": q.shape[-1], "D0": first, "D1": second,
        "NORM": norm, "HAS_WEIGHT": q_weight is not None, "ROTATE": positions is not None, "PAIRS": turned.pairs,
        "STEPS": turned.steps, "SCALES": turned.scales,
        "TABLE_AXES": 0 if frequencies is None else frequencies.shape[0], "CAUSAL": causal, "SIGN": sign, "UPCAST": upcast(),
        "PRECISION": precision(q.dtype), "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def aligned(*tensors: torch.Tensor) -> tuple[int, list[list[int]]]:
    """What divides all strides but the last axis's, see `common_divisor`, and the strides divided by it, tensor by tensor."""
    strides = [list(x.stride()[:-1]) for x in tensors]
    align = common_divisor(s for row in strides for s in row)
    return align, [[s // align for s in row] for row in strides]


def layout(x: torch.Tensor, strides: list[int]) -> list[int]:
    """(outer, axis, inner, head) strides of `[outer, L, inner, H, D]`, or of `[tokens, H, D]` (token stride as axis)."""
    return strides if x.ndim == 5 else [0, strides[0], 0, strides[1]]


def grid_of(
    q: torch.Tensor, segments: int, length: int, longest: int, config: ShortConfig
) -> tuple[tuple[int, int], int]:
    """Launch grid and, for packed rows, the step between tiles."""
    head_groups = cdiv(q.shape[-2], config.heads)
    if length:
        return (cdiv(segments, config.block // length), head_groups), 0
    step = config.block - longest + 1
    return (cdiv(q.shape[0], step), head_groups), step


def launch_key(
    tensors: Sequence[torch.Tensor | None], kernel: str, longest: int, axes: Sequence[int], theta: Sequence[float],
    position_scale: Sequence[float], *options: Any,
) -> Any:  # fmt: skip
    """All that decides a launch but addresses."""
    rotation = tuple(axes), tuple(theta), tuple(position_scale)
    first = tensors[0]
    assert first is not None
    return _launch.signature(*tensors), (kernel, longest, rotation, options, precision(first.dtype))


def short_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    longest: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    positions: torch.Tensor | None,
    frequencies: torch.Tensor | None,
    axes: list[int],
    theta: list[float],
    position_scale: list[float],
    norm: bool,
    eps: float,
    causal: bool,
    scale: float,
    config: ShortConfig | None = None,
) -> torch.Tensor:
    """q, k, v `[outer, L, inner, H, D]` along axis 1, or packed `[tokens, H, D]` with cu_seqlens; a new tensor like q."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    tensors = q, k, v, out, cu_seqlens, q_weight, k_weight, positions, frequencies
    key = launch_key(tensors, "fwd", longest, axes, theta, position_scale, norm, eps, causal, scale, config)
    if _launch.repeat(key, tensors):
        return out
    length = q.shape[1] if cu_seqlens is None else 0
    segments = q.shape[0] * q.shape[2] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    longest = max(longest, 1)
    inside = norm or positions is not None
    config = config or short_config("fwd", q.shape[-1], q.shape[-2], family(q.device), length == 0, length, inside)
    sign, unit = sign_and_unit(scale)
    align, (sq, sk, sv) = aligned(q, k, v)
    (tiles, groups), step = grid_of(q, segments, length, longest, config)
    args = (
        q, k, v, out, q if q_weight is None else q_weight, k if k_weight is None else k_weight,
        q if positions is None else positions, q if frequencies is None else frequencies,
        q if cu_seqlens is None else cu_seqlens,
        segments, q.shape[-2], q.shape[2] if length else 1, step, *layout(q, sq), *layout(k, sk), *layout(v, sv),
        *((0, 0) if positions is None else positions.stride()), eps, unit,
    )  # fmt: skip
    options = constants(
        q, config, length, q_weight, positions, frequencies, axes, theta, position_scale, norm, causal, sign
    )
    options["ALIGN"] = align
    _launch.launch(_short_attention_fwd_kernel, (tiles * groups,), args, options, key, tensors)
    return out
