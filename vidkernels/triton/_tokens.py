# SPDX-License-Identifier: Apache-2.0
"""Tensors with channels on one axis and tokens on the others, as [outer, inner] tokens: no permuted copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidkernels._token_shapes import code_shape, index_shape
from vidkernels.triton._sizes import cdiv


@dataclass(frozen=True)
class TokenConfig:
    """Tokens of one program and its warps."""

    block: int
    num_warps: int

    @classmethod
    def of_streaming(cls) -> TokenConfig:
        """4 tokens a thread make 16-byte accesses on NVIDIA. On AMD's wider warps more than one token a thread keeps
        so many comparison masks alive that the scalar registers spill (200 bytes at 512 tokens)."""
        return cls(256 if torch.version.hip else 512, 4)


@dataclass(frozen=True)
class TokenGrid:
    """Sizes and, for each tensor, its (outer, inner, channel) strides in elements."""

    outer: int
    inner: int
    strides: tuple[tuple[int, int, int], ...]

    @property
    def planar(self) -> bool:
        """Tokens follow each other in memory (NCTHW), so threads should walk along them."""
        return all(inner == 1 for _, inner, _ in self.strides)


def token_grid(tensors: Sequence[Tensor], dim: int) -> TokenGrid | None:
    """The token axes of tensors of one shape merged into two, in logical order; None where that takes a copy."""
    sizes: list[int] = []
    steps: list[list[int]] = []
    for axis in reversed(range(tensors[0].ndim)):
        size = tensors[0].shape[axis]
        if axis == dim or size == 1:
            continue
        step = [t.stride(axis) for t in tensors]
        if sizes and step == [s * sizes[-1] for s in steps[-1]]:
            sizes[-1] *= size
            continue
        if len(sizes) == 2:
            return None
        sizes.append(size)
        steps.append(step)
    sizes += [1] * (2 - len(sizes))
    steps += [[0] * len(tensors)] * (2 - len(steps))
    strides = tuple((steps[1][k], steps[0][k], t.stride(dim)) for k, t in enumerate(tensors))
    return TokenGrid(sizes[1], sizes[0], strides)


def collapse(inputs: Sequence[Tensor], output: Tensor, dim: int) -> tuple[TokenGrid, list[Tensor]]:
    """The grid of inputs and output, and the tensors to launch with: copies where the token axes do not merge, a fresh
    output among them that the caller copies back."""
    tensors = [*inputs, output]
    grid = token_grid(tensors, dim)
    if grid is None:
        tensors = [
            *(t.contiguous() for t in inputs),
            torch.empty(output.shape, dtype=output.dtype, device=output.device),
        ]
        grid = token_grid(tensors, dim)
    assert grid is not None  # the axes of contiguous tensors always merge
    return grid, tensors


def index_tensor(x: Tensor, dim: int, num_codebooks: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised indices of the tokens of ``x``."""
    return x.new_empty(index_shape(x.shape, dim, num_codebooks), dtype=dtype)


def code_tensor(indices: Tensor, dim: int, num_codebooks: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised codes of ``indices``."""
    return indices.new_empty(code_shape(indices.shape, dim, num_codebooks, channels), dtype=dtype)


def launch(
    kernel: Any,
    grid: TokenGrid,
    books: int,
    tensors: Sequence[Tensor],
    *,
    strides: Sequence[int],
    config: TokenConfig | None = None,
    **arguments: Any,
) -> None:
    """Start ``kernel(*tensors, inner, books, *strides of the named tensors, **arguments)`` on the tensors' device."""
    config = config or TokenConfig.of_streaming()
    rows = grid.outer * books if grid.planar else grid.outer
    per_row = cdiv(grid.inner if grid.planar else grid.inner * books, config.block)
    steps = [step for k in strides for step in grid.strides[k]]
    kernel[(rows * per_row,)](
        *tensors, grid.inner, books, *steps, **arguments,
        PLANAR=grid.planar, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip


@triton.jit
def token_offsets(inner, books, BLOCK: tl.constexpr, PLANAR: tl.constexpr):
    """(outer, inner, book) of a program's tokens, which follow each other in memory, and a mask of those that exist.

    One launch axis only: the others end at 65535 programs.
    """
    length = inner if PLANAR else inner * books
    blocks = tl.cdiv(length, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if PLANAR:
        outer = row // books
        book = row % books
        i = token
    else:
        outer = row
        book = token % books
        i = token // books
    return outer, i, book, token < length


@triton.jit
def channel_offset(c: tl.constexpr, stride):
    """Elements from a token's first channel to channel ``c``, in 64 bits: planes of 2^29 tokens are 2^31 apart at channel 4."""
    return tl.cast(c, tl.int64) * stride
