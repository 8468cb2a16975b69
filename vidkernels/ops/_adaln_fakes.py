# SPDX-License-Identifier: Apache-2.0
"""Shapes and dtypes of what the bare adaLN ops return; what was not asked for has no elements."""

from __future__ import annotations

import torch

from vidkernels.ops import _adaln_layout as layout


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of saved statistics: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def fake_table(like: torch.Tensor, typed: torch.Tensor | None, count: int, wanted: int) -> torch.Tensor:
    """Gradient of a table of rows: in the tables' dtype, `[count, C]` if wanted, else without elements."""
    shape = (count, like.shape[-1]) if wanted else (0,)
    return like.new_empty(shape, dtype=wide_dtype(like) if typed is None else typed.dtype)


def fake_vector(like: torch.Tensor, of: torch.Tensor | None, wanted: int) -> torch.Tensor:
    """Gradient of weight or bias: `[C]` if wanted, else without elements."""
    if wanted and of is not None:
        return like.new_empty((like.shape[-1],), dtype=of.dtype)
    return like.new_empty((0,), dtype=wide_dtype(like))


def fake_full(like: torch.Tensor, wanted: int) -> torch.Tensor:
    """Gradient of an activation: contiguous in its shape if wanted, else without elements."""
    return like.new_empty(like.shape if wanted else (0,))


def fake_statistics(x: torch.Tensor, norm: int, save: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Saved mean and rstd, one value a token, or without elements."""
    tokens = 1
    for size in x.shape[:-1]:
        tokens = tokens * size
    tokens = tokens if save else 0
    mean = x.new_empty((tokens if norm == layout.NORMS["layer"] else 0,), dtype=wide_dtype(x))
    return mean, x.new_empty((0 if norm == layout.NORMS["none"] else tokens,), dtype=wide_dtype(x))
