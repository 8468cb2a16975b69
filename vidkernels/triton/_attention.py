# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels share: the map from programs to tiles, loads of head slices, launch configurations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vidkernels import _env
from vidkernels.triton._sizes import common_divisor, next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
# Offsets inside a tile are 32-bit; a tile has at most 256 rows.
MAX_STRIDE = 2**22


def head_pieces(head_dim: int) -> tuple[int, int]:
    """A head's channels as one or two power-of-two pieces: 72 runs as 64 + 16 instead of 128, 96 as 64 + 32.

    The second piece is at least 16, the depth of one matrix instruction in half precision; 0 means that there is none.
    """
    whole = max(16, next_power_of_2(head_dim))
    first = whole if whole == head_dim or whole == 16 else whole // 2
    second = 0 if first >= head_dim else max(16, next_power_of_2(head_dim - first))
    return (whole, 0) if first + second >= whole else (first, second)


def tile_count(tokens: int, segments: int, block: int) -> int:
    """Programs that cover every segment with tiles of `block` rows: known without reading the offsets.

    Segment i owns the programs from `cu_seqlens[i] // block + i` on; that is at least as many as it has tiles and at most
    one more, which returns at once. Hence no padding is computed, whatever the lengths.
    """
    return tokens // block + segments


def upcast() -> bool:
    """Whether products take float32 operands: Triton's interpreter multiplies the bit patterns of bfloat16."""
    return _env.TRITON_INTERPRET


def precision(dtype: torch.dtype) -> str:
    """Input precision of float32 products: torch's own switch decides about TF32. From 2.9 on it has two interfaces, and
    reading the old one (`allow_tf32`) raises where the new one was used."""
    if dtype != torch.float32:
        return "ieee"
    switch = torch.backends.cuda.matmul
    allowed = switch.fp32_precision == "tf32" if hasattr(switch, "fp32_precision") else switch.allow_tf32
    return "tf32" if allowed else "ieee"


def narrow(x: torch.Tensor) -> torch.Tensor:
    """`x` with a contiguous last axis and strides that fit 32-bit offsets inside a tile."""
    return x if x.stride(-1) == 1 and 0 <= x.stride(0) < MAX_STRIDE else x.contiguous()


def alignment(*tensors: torch.Tensor) -> int:
    """What divides every token and head stride, see `common_divisor`."""
    return common_divisor(x.stride(axis) for x in tensors for axis in (0, 1))


def sign_and_unit(scale: float) -> tuple[int, float]:
    """A score is sign * q.k and its weight exp2(unit * (score - maximum)); with scale 0 the sign is 0 and the unit 1."""
    return (scale > 0) - (scale < 0), 1.0 if scale == 0 else abs(scale) * LOG2E.value


@triton.jit
def find_tile(cu_seqlens, segments, program, BLOCK: tl.constexpr):
    """Segment of this program and its tile inside the segment: the last i with cu_seqlens[i] // BLOCK + i <= program."""
    low = 0
    high = segments
    while low + 1 < high:
        middle = (low + high) // 2
        inside = tl.load(cu_seqlens + middle) // BLOCK + middle <= program
        low = tl.where(inside, middle, low)
        high = tl.where(inside, high, middle)
    return low, program - (tl.load(cu_seqlens + low) // BLOCK + low)


@triton.jit
def load_piece(
    pointer, stride, rows, count, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr
):
    """Channels FIRST : FIRST + WIDTH of `rows`; zeros beyond HEAD_DIM and, if MASKED, from row `count` on."""
    channels = FIRST + tl.arange(0, WIDTH)
    pointers = pointer + rows[:, None] * stride + channels[None, :]
    if FIRST + WIDTH <= HEAD_DIM:
        if MASKED:
            return tl.load(pointers, mask=rows[:, None] < count, other=0.0)
        return tl.load(pointers)
    inside = channels[None, :] < HEAD_DIM
    if MASKED:
        inside = inside & (rows[:, None] < count)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_piece(
    pointer, stride, rows, count, value, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Store channels FIRST : FIRST + WIDTH of the first `count` rows."""
    channels = FIRST + tl.arange(0, WIDTH)
    inside = (rows[:, None] < count) & (channels[None, :] < HEAD_DIM)
    pointers = pointer + rows[:, None] * stride + channels[None, :]
    tl.store(pointers, rounded(value, pointer.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def signed(q, SIGN: tl.constexpr):
    """sign(scale) * q, exact; through float32, since the interpreter has no bfloat16 arithmetic."""
    if SIGN == 1:
        return q
    return (q.to(tl.float32) * SIGN).to(q.dtype)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 to the storage type, to nearest even; the interpreter would truncate to bfloat16."""
    if UPCAST and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(DTYPE)
    return x.to(DTYPE)


@triton.jit
def product(a, b, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b, accumulated in float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_product(a, b, total, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b in float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def row_product(a, b, EXACT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b^T. A plain float32 product is one chain of multiply-adds along the channels: of 256, it has three times the
    error of a blocked sum. So it runs as products of 32 channels, added afterwards (of 64, the compiler spills)."""
    if EXACT and PRECISION == "ieee" and a.shape[1] > 64:
        rows_a: tl.constexpr = a.shape[0]
        rows_b: tl.constexpr = b.shape[0]
        pieces: tl.constexpr = a.shape[1] // 32
        first = tl.permute(tl.reshape(a, (rows_a, pieces, 32)), (1, 0, 2))
        second = tl.permute(tl.reshape(b, (rows_b, pieces, 32)), (1, 2, 0))
        return tl.sum(tl.dot(first, second, input_precision=PRECISION), 0)
    return product(a, tl.trans(b), UPCAST, PRECISION)


@triton.jit
def accumulate(a, b, total, EXACT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b. In plain float32 each tile's product is summed on its own, else all tiles make one chain of
    multiply-adds, whose error grows with the rows; by tl.fma, since an addition would be folded into the product."""
    if EXACT and PRECISION == "ieee":
        return tl.fma(product(a, b, UPCAST, PRECISION), tl.full(total.shape, 1.0, tl.float32), total)
    return add_product(a, b, total, UPCAST, PRECISION)


@triton.jit
def rescale_and_accumulate(a, b, total, factor, EXACT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """factor * total + a @ b, one factor a row; in plain float32 with the product on its own, as above."""
    if EXACT and PRECISION == "ieee":
        return tl.fma(total, tl.broadcast_to(factor[:, None], total.shape), product(a, b, UPCAST, PRECISION))
    return add_product(a, b, total * factor[:, None], UPCAST, PRECISION)
