# SPDX-License-Identifier: Apache-2.0
"""Query/key RMSNorm and rotary embedding in Triton: a program holds some tokens and walks over the heads of q, then k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidkernels.triton._rotary import Convention, closed_form_turns, convention, cos_sin, table_turns
from vidkernels.triton._sizes import cdiv, common_divisor, next_power_of_2

HEAD, FULL = tl.constexpr(1), tl.constexpr(2)  # norm; 0: none
INTERLEAVED, HALF = tl.constexpr(0), tl.constexpr(1)  # layout; 2: halves inside each axis
CLOSED, TABLE, TABLE_PER_HEAD = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # rotation; 0: none


@dataclass(frozen=True)
class QkNormRopeConfig:
    """Tokens and heads of one tile, and the warps that hold it."""

    block_tokens: int
    block_heads: int
    num_warps: int


def tile_of(head_dim: int, heads: int, values: int, lanes: int) -> QkNormRopeConfig:
    """Heads first, since they share their token's angles; tokens until a tile has `values` channels; 128 threads.

    `lanes`: threads of a warp.
    """
    pairs = next_power_of_2(max(head_dim // 2, 1))
    block_heads = min(next_power_of_2(max(heads, 1)), max(1, values // (2 * pairs)), 16)
    block_tokens = max(1, values // (2 * pairs * block_heads))
    return QkNormRopeConfig(block_tokens, block_heads, 128 // lanes)


# Threads of a warp: AMD's compute GPUs have wide ones.
LANES = 64 if torch.version.hip else 32


@triton.jit
def channels(pair, ROTATED: tl.constexpr, PAIRS: tl.constexpr, LAYOUT: tl.constexpr):
    """First and second channel of each pair; channels beyond the rotated ones are paired with their neighbours."""
    if LAYOUT == INTERLEAVED:
        return 2 * pair, 2 * pair + 1
    if LAYOUT == HALF:
        return tl.where(pair < ROTATED, pair, 2 * pair), tl.where(pair < ROTATED, pair + ROTATED, 2 * pair + 1)
    second: tl.constexpr = PAIRS[0]
    third: tl.constexpr = PAIRS[0] + PAIRS[1]
    begin = tl.where(pair < second, 0, tl.where(pair < third, second, third))
    count = tl.where(pair < second, PAIRS[0], tl.where(pair < third, PAIRS[1], PAIRS[2]))
    return tl.where(pair < ROTATED, begin + pair, 2 * pair), tl.where(
        pair < ROTATED, begin + pair + count, 2 * pair + 1
    )


@triton.jit
def load_pairs(rows, row_mask, pair, first, second, HEAD_DIM: tl.constexpr, LAYOUT: tl.constexpr):
    """Both members of every pair in float32, [tokens, heads, pairs]; `rows` [tokens, heads]: pointers to channel 0."""
    if LAYOUT == INTERLEAVED:
        # Loaded as rows of channels and split in registers: a load of pairs would be 2 channels wide.
        channel = tl.arange(0, 2 * pair.shape[0])
        mask = row_mask[:, :, None] & (channel < HEAD_DIM)[None, None, :]
        both = tl.load(rows[:, :, None] + channel[None, None, :], mask=mask, other=0.0)
        a, b = tl.split(tl.reshape(both, (rows.shape[0], rows.shape[1], pair.shape[0], 2)))
    else:
        mask = row_mask[:, :, None] & (pair < HEAD_DIM // 2)[None, None, :]
        a = tl.load(rows[:, :, None] + first[None, None, :], mask=mask, other=0.0)
        b = tl.load(rows[:, :, None] + second[None, None, :], mask=mask, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_pairs(rows, row_mask, pair, first, second, a, b, HEAD_DIM: tl.constexpr, LAYOUT: tl.constexpr):
    """Inverse of load_pairs, rounded to the dtype of `rows`."""
    if LAYOUT == INTERLEAVED:
        channel = tl.arange(0, 2 * pair.shape[0])
        mask = row_mask[:, :, None] & (channel < HEAD_DIM)[None, None, :]
        both = tl.reshape(tl.join(a, b).to(rows.dtype.element_ty), (rows.shape[0], rows.shape[1], 2 * pair.shape[0]))
        tl.store(rows[:, :, None] + channel[None, None, :], both, mask=mask)
    else:
        mask = row_mask[:, :, None] & (pair < HEAD_DIM // 2)[None, None, :]
        tl.store(rows[:, :, None] + first[None, None, :], a.to(rows.dtype.element_ty), mask=mask)
        tl.store(rows[:, :, None] + second[None, None, :], b.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def angles(
    positions, axis_stride, token_mask, frequencies, pair, head, head_mask, heads,
    ROTATED: tl.constexpr, PAIRS: tl.constexpr, STEPS: tl.constexpr, SCALES: tl.constexpr,
    AXES: tl.constexpr, ROTATION: tl.constexpr,
):  # fmt: skip
    """Cosines and sines [tokens, heads or 1, pairs]; 1 and 0 for pairs that are not rotated."""
    if ROTATION == CLOSED:
        turns = closed_form_turns(positions, axis_stride, token_mask, pair, PAIRS, STEPS, SCALES)[:, None, :]
    else:
        table = frequencies + head[:, None] * ROTATED + pair[None, :]
        mask = head_mask[:, None] & (pair < ROTATED)[None, :]
        turns = table_turns(positions, axis_stride, token_mask, table, mask, heads * ROTATED, AXES)
    cosine, sine = cos_sin(turns)
    rotated = (pair < ROTATED)[None, None, :]
    return tl.where(rotated, cosine, 1.0), tl.where(rotated, sine, 0.0)


@triton.jit
def rotate(a, b, cosine, sine, pair, ROTATED: tl.constexpr):
    """Pairs that are not rotated pass untouched: a product with a zero sine would turn Inf into NaN."""
    rotated = (pair < ROTATED)[None, None, :]
    return tl.where(rotated, a * cosine - b * sine, a), tl.where(rotated, b * cosine + a * sine, b)


@triton.jit
def load_weight(
    weight, head, head_mask, pair, first, second, HEAD_DIM: tl.constexpr, NORM: tl.constexpr, LAYOUT: tl.constexpr
):
    """Weights of both members, [1, heads, pairs]."""
    rows = weight + (head * HEAD_DIM if NORM == FULL else head * 0)[None, :]
    return load_pairs(rows, head_mask[None, :], pair, first, second, HEAD_DIM, LAYOUT)


@triton.jit
def inverse_rms(square_sum, count, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square_sum, count) + eps))


@triton.jit
def _forward_side(
    x, y, weight, heads, x_head, y_head, positions, axis_stride, token_mask, frequencies, cosine, sine, eps,
    HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, PAIRS: tl.constexpr, STEPS: tl.constexpr, SCALES: tl.constexpr,
    AXES: tl.constexpr, ROTATION: tl.constexpr, NORM: tl.constexpr, LAYOUT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    pair = tl.arange(0, BLOCK_P)
    first, second = channels(pair, ROTATED, PAIRS, LAYOUT)
    if NORM == FULL:
        squares = tl.zeros((BLOCK_T,), tl.float32)
        for start in range(0, heads, BLOCK_H):
            head = start + tl.arange(0, BLOCK_H)
            row_mask = token_mask[:, None] & (head < heads)[None, :]
            a, b = load_pairs(
                x[:, None] + (head.to(tl.int64) * x_head * ALIGN)[None, :],
                row_mask,
                pair,
                first,
                second,
                HEAD_DIM,
                LAYOUT,
            )
            squares += tl.sum(tl.sum(a * a + b * b, 2), 1)
        factor = inverse_rms(squares, heads * HEAD_DIM * 1.0, eps)[:, None]
    for start in range(0, heads, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)
        head_mask = head < heads
        row_mask = token_mask[:, None] & head_mask[None, :]
        a, b = load_pairs(
            x[:, None] + (head.to(tl.int64) * x_head * ALIGN)[None, :], row_mask, pair, first, second, HEAD_DIM, LAYOUT
        )
        if NORM == HEAD:
            scale = inverse_rms(tl.sum(a * a + b * b, 2), HEAD_DIM * 1.0, eps)[:, :, None]
            a, b = a * scale, b * scale
        if NORM == FULL:
            a, b = a * factor[:, :, None], b * factor[:, :, None]
        if HAS_WEIGHT:
            weight_a, weight_b = load_weight(weight, head, head_mask, pair, first, second, HEAD_DIM, NORM, LAYOUT)
            a, b = a * weight_a, b * weight_b
        if ROTATION == TABLE_PER_HEAD:
            own_cosine, own_sine = angles(
                positions, axis_stride, token_mask, frequencies, pair, head, head_mask, heads,
                ROTATED, PAIRS, STEPS, SCALES, AXES, ROTATION,
            )  # fmt: skip
            a, b = rotate(a, b, own_cosine, own_sine, pair, ROTATED)
        elif ROTATION != 0:
            a, b = rotate(a, b, cosine, sine, pair, ROTATED)
        store_pairs(
            y[:, None] + (head.to(tl.int64) * y_head * ALIGN)[None, :],
            row_mask,
            pair,
            first,
            second,
            a,
            b,
            HEAD_DIM,
            LAYOUT,
        )


@triton.jit(do_not_specialize=["tokens", "batch_tokens"])
def _qk_norm_rope_fwd_kernel(
    q, k, q_out, k_out, q_weight, k_weight, positions, frequencies, tokens, batch_tokens, q_heads, k_heads,
    q_batch, q_token, q_head, k_batch, k_token, k_head, qo_batch, qo_token, qo_head, ko_batch, ko_token, ko_head,
    position_batch, position_token, position_axis, eps,
    HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, PAIRS: tl.constexpr, STEPS: tl.constexpr, SCALES: tl.constexpr,
    AXES: tl.constexpr, ROTATION: tl.constexpr, NORM: tl.constexpr, LAYOUT: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr, HAS_K_WEIGHT: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = token < tokens
    batch = token // batch_tokens
    token = token - batch * batch_tokens
    rows = positions + batch * position_batch + token * position_token
    cosine, sine = 1.0, 0.0
    if ROTATION == CLOSED or ROTATION == TABLE:
        one = tl.arange(0, 1)
        cosine, sine = angles(
            rows, position_axis, mask, frequencies, tl.arange(0, BLOCK_P), one, one == 0, 1,
            ROTATED, PAIRS, STEPS, SCALES, AXES, ROTATION,
        )  # fmt: skip
    _forward_side(
        q + (batch * q_batch + token * q_token) * ALIGN, q_out + (batch * qo_batch + token * qo_token) * ALIGN,
        q_weight, q_heads, q_head, qo_head, rows, position_axis, mask, frequencies, cosine, sine, eps,
        HEAD_DIM, ROTATED, PAIRS, STEPS, SCALES, AXES, ROTATION, NORM, LAYOUT, HAS_Q_WEIGHT, ALIGN, BLOCK_T, BLOCK_H, BLOCK_P,
    )  # fmt: skip
    _forward_side(
        k + (batch * k_batch + token * k_token) * ALIGN, k_out + (batch * ko_batch + token * ko_token) * ALIGN,
        k_weight, k_heads, k_head, ko_head, rows, position_axis, mask, frequencies, cosine, sine, eps,
        HEAD_DIM, ROTATED, PAIRS, STEPS, SCALES, AXES, ROTATION, NORM, LAYOUT, HAS_K_WEIGHT, ALIGN, BLOCK_T, BLOCK_H, BLOCK_P,
    )  # fmt: skip


def aligned_strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """What divides every stride of the tensors, see `common_divisor`, and the strides divided by it: elements from one batch
    entry, token and head to the next."""
    strides = [stride for x in tensors for stride in ((0, *x.stride()[:-1]) if x.ndim == 3 else x.stride()[:-1])]
    align = common_divisor(strides)
    return align, [stride // align for stride in strides]


@dataclass(frozen=True)
class Call:
    """What forward and backward derive alike from the bare op's options."""

    rotation: int
    convention: Convention
    rotated: int
    axes: int
    position_strides: tuple[int, int, int]

    @classmethod
    def of(
        cls,
        positions: Tensor | None,
        frequencies: Tensor | None,
        axes: Sequence[int],
        theta: Sequence[float],
        scale: Sequence[float],
    ) -> Call:
        if positions is None:
            return cls(0, Convention((0, 0, 0), (0.0,) * 3, (0.0,) * 3), 0, 0, (0, 0, 0))
        strides = positions.stride() if positions.ndim == 3 else (0, *positions.stride())
        count = positions.shape[-1]
        if frequencies is None:
            return cls(CLOSED.value, convention(axes, theta, scale), sum(axes) // 2, count, strides)
        kind = TABLE_PER_HEAD if frequencies.ndim == 3 else TABLE
        return cls(kind.value, Convention((0, 0, 0), (0.0,) * 3, (0.0,) * 3), axes[0] // 2, count, strides)

    def constants(self, head_dim: int, norm: int, layout: int, config: QkNormRopeConfig) -> dict[str, Any]:
        """Compile-time arguments common to both kernels."""
        return {
            "HEAD_DIM": head_dim, "ROTATED": self.rotated, "PAIRS": self.convention.pairs, "STEPS": self.convention.steps,
            "SCALES": self.convention.scales, "AXES": self.axes, "ROTATION": self.rotation, "NORM": norm, "LAYOUT": layout,
            "BLOCK_T": config.block_tokens, "BLOCK_H": config.block_heads,
            "BLOCK_P": next_power_of_2(max(head_dim // 2, 1)), "num_warps": config.num_warps,
        }  # fmt: skip


def token_count(q: Tensor, k: Tensor) -> int:
    """Tokens that there is work for: none if neither side has heads."""
    return q[..., 0].numel() // max(q.shape[-2], 1) or k[..., 0].numel() // max(k.shape[-2], 1)


def _forward_into(
    q_out: Tensor, k_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    positions: Tensor | None, frequencies: Tensor | None, axes: list[int], theta: list[float],
    position_scale: list[float], norm: int, eps: float, layout: int,
) -> None:  # fmt: skip
    tokens = token_count(q, k)
    if tokens == 0:
        return
    call = Call.of(positions, frequencies, axes, theta, position_scale)
    config = tile_of(q.shape[-1], max(q.shape[-2], k.shape[-2]), values=2048, lanes=LANES)
    align, strides = aligned_strides(q, k, q_out, k_out)
    _qk_norm_rope_fwd_kernel[(cdiv(tokens, config.block_tokens),)](
        q, k, q_out, k_out, q if q_weight is None else q_weight, k if k_weight is None else k_weight,
        q if positions is None else positions, q if frequencies is None else frequencies,
        tokens, q.shape[-3], q.shape[-2], k.shape[-2],
        *strides, *call.position_strides, eps, ALIGN=align,
        HAS_Q_WEIGHT=q_weight is not None, HAS_K_WEIGHT=k_weight is not None, **call.constants(q.shape[-1], norm, layout, config),
    )  # fmt: skip


def qk_norm_rope_fwd(q: Tensor, k: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Launcher of `vidkernels::qk_norm_rope_fwd`."""
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    _forward_into(q_out, k_out, q, k, *options)
    return q_out, k_out


def qk_norm_rope_(q: Tensor, k: Tensor, *options: Any) -> None:
    """Launcher of `vidkernels::qk_norm_rope_`: a program has read a tile before it writes it."""
    _forward_into(q, k, q, k, *options)
