# SPDX-License-Identifier: Apache-2.0
"""What the three adaLN ops share: which shapes `shift`, `scale` and `gate` may have, how their rows are indexed, and the
table of backends.

The kernels see a table as R rows with one stride between rows, and a token's row as an index; nothing is expanded to
tokens here. The accepted forms are listed in `python_ref/adaln_zero.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import prod

import torch

from vidkernels import _signature, dispatch
from vidkernels.errors import OptionError, ShapeError
from vidkernels.ops import _checks

MAX_ROW = 8192  # 512 threads with 16 columns each: csrc/adaln_zero/adaln_zero_cuda.h
NORMS = {"none": 0, "layer": 1, "rms": 2}
Tables = dict[str, "torch.Tensor | None"]
# The activations, the tables, and rows and cu_seqlens as the kernels take them.
Facts = tuple[torch.Tensor, list["torch.Tensor | None"], "torch.Tensor | None", "torch.Tensor | None"]

# Bits of the `needs` argument of the bare backward ops.
NEED_X, NEED_BRANCH, NEED_GATE, NEED_SHIFT, NEED_SCALE, NEED_WEIGHT, NEED_BIAS = (1 << bit for bit in range(7))


def row_too_long(x: torch.Tensor, *facts: object) -> str | None:
    """Predicate of the GPU kernels, which keep a row in registers."""
    return None if x.shape[-1] <= MAX_ROW else f"a row of {x.shape[-1]} values is longer than {MAX_ROW}"


BACKENDS: Mapping[str, dispatch.Predicate] = {
    "cpp": dispatch.cpp(),
    "cuda": dispatch.cuda(check=row_too_long),
    "triton": dispatch.triton(check=row_too_long),
    "reference": dispatch.always,
}


def check_activations(name: str, x: torch.Tensor) -> None:
    """x is `[..., C]` with at least two axes."""
    _checks.check_floating(name, x)
    _checks.check_ndim(name, x, 2, 8)


def check_branch(residual: torch.Tensor, branch: torch.Tensor) -> None:
    """residual is `[..., C]` with at least two axes; branch has its shape, dtype and device."""
    check_activations("residual", residual)
    _checks.check_shape("branch", branch, tuple(residual.shape), "the shape of residual")
    _checks.check_same_dtype("branch", branch, "residual", residual)
    _checks.check_same_device("branch", branch, "residual", residual)


def check_norm(x: torch.Tensor, norm: str, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> None:
    """norm and eps are valid; weight and bias are `[C]`, floating, on x's device."""
    _checks.check_option("norm", norm, NORMS)
    _checks.check_eps(eps)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _checks.check_floating(name, tensor)
            _checks.check_shape(name, tensor, (x.shape[-1],), "[C], the last axis of x")
            _checks.check_same_device(name, tensor, "x", x)


def signature(
    options: tuple[object, ...],
    cu_seqlens: torch.Tensor | None,
    rows: torch.Tensor | None,
    *tensors: torch.Tensor | None,
) -> Hashable:
    """The key of a call whose tables need no index. With one there is none: its values are checked in every call."""
    if torch.compiler.is_compiling() or cu_seqlens is not None or rows is not None:
        return None
    return _signature.signature(options, *tensors)


def are_as_given(tables: Sequence[torch.Tensor | None], *given: torch.Tensor | None) -> bool:
    """Whether `check_rows` has left all tables as they are, so that they need not be aligned in calls that look alike."""
    return all(table is other for table, other in zip(tables, given, strict=True))


def check_rows(
    x: torch.Tensor, tables: Tables, cu_seqlens: torch.Tensor | None, rows: torch.Tensor | None
) -> tuple[list[torch.Tensor | None], torch.Tensor | None, torch.Tensor | None]:
    """Check the modulation against x. Returns the tables in order with equal numbers of rows, then rows and cu_seqlens
    as the kernels take them (flat int32), both None where there is no table to index."""
    given = {name: table for name, table in tables.items() if table is not None}
    alike = _check_tables(x, given)
    if cu_seqlens is not None and rows is not None:
        raise OptionError(
            "rows", "either rows or cu_seqlens", "both", "Pass rows [total] with one row index per token."
        )
    if cu_seqlens is not None:
        cu_seqlens = _check_cu_seqlens(x, given, cu_seqlens)
    elif rows is not None:
        rows = _check_index(x, given, rows)
    elif alike is not None:
        if _check_uniform(x, alike, given[alike]) is given[alike]:
            return [*tables.values()], None, None  # as they were given: nothing to expand or to align
        given = {name: _check_uniform(x, name, table) for name, table in given.items()}
    else:
        given = {name: _check_uniform(x, name, table) for name, table in given.items()}
    if not given:
        return [None] * len(tables), None, None
    aligned = _align(given)
    return [aligned.get(name) for name in tables], rows, cu_seqlens


def _check_tables(x: torch.Tensor, tables: Mapping[str, torch.Tensor]) -> str | None:
    """Dtypes, device and last axis of the tables. Returns the first one's name if all have its shape, which most calls do:
    one of them then speaks for all."""
    first, shape, alike = "", None, True
    for name, table in tables.items():
        _checks.check_floating(name, table)
        _checks.check_same_device(name, table, "x", x)
        if shape is None:
            first, shape = name, table.shape
            if not shape or shape[-1] != x.shape[-1]:
                raise ShapeError(name, f"{x.shape[-1]} values a row, the last axis of x", tuple(shape), "")
            continue
        previous = tables[first]
        if table.dtype != previous.dtype:
            _checks.check_same_dtype(name, table, first, previous)
        if table.shape != shape:
            alike = False
            if table.ndim == 0 or table.shape[-1] != x.shape[-1]:
                raise ShapeError(name, f"{x.shape[-1]} values a row, the last axis of x", tuple(table.shape), "")
    return first if alike and first else None


def table_rows(table: torch.Tensor) -> int:
    """Number of rows of a table."""
    return prod(table.shape[:-1])


def _align(tables: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tables of one row next to tables of R rows are expanded (stride 0); other differences are errors."""
    count, widest = 0, ""
    for name, table in tables.items():
        if table_rows(table) > count or not widest:
            count, widest = table_rows(table), name
    for name, table in list(tables.items()):
        rows = table_rows(table)
        if rows == count:
            continue
        if rows != 1:
            got = f"{rows} rows (shape {tuple(table.shape)})"
            raise ShapeError(name, f"{count} rows, as {widest} has", got, "Give all tables the same rows, or one row.")
        tables[name] = table.reshape(1, -1).expand(count, -1)
    return tables


def _check_uniform(x: torch.Tensor, name: str, table: torch.Tensor) -> torch.Tensor:
    batch, tokens = (1, x.shape[0]) if x.ndim == 2 else (x.shape[0], prod(x.shape[1:-1]))
    remedy = "Shapes: [C], [B, C], [B, groups, C]; packed tokens need cu_seqlens; other orders need rows."
    if table.ndim == 1:
        return table
    if table.ndim == 2 and x.ndim > 2:
        if table.shape[0] not in (1, batch):
            raise ShapeError(name, f"[C], [1, C] or [{batch}, C] for x {tuple(x.shape)}", tuple(table.shape), remedy)
        return table
    if table.ndim not in (2, 3):
        raise ShapeError(name, "1 to 3 dimensions", f"{table.ndim} (shape {tuple(table.shape)})", remedy)
    lead, groups = (1, table.shape[0]) if table.ndim == 2 else (table.shape[0], table.shape[1])
    if lead not in (1, batch):
        raise ShapeError(name, f"a first axis of 1 or {batch} for x {tuple(x.shape)}", tuple(table.shape), remedy)
    if groups == 0 or tokens % groups != 0:
        raise ShapeError(name, f"a number of groups that divides the {tokens} tokens of a sample", groups, remedy)
    if lead == 1 and batch > 1 and groups > 1:
        return table.expand(batch, -1, -1)
    return table


def _check_cu_seqlens(x: torch.Tensor, tables: dict[str, torch.Tensor], cu_seqlens: torch.Tensor) -> torch.Tensor:
    _checks.check_integer("cu_seqlens", cu_seqlens)
    _checks.check_ndim("cu_seqlens", cu_seqlens, 1)
    _checks.check_same_device("cu_seqlens", cu_seqlens, "x", x)
    if x.ndim > 2 and x.shape[0] != 1:
        raise ShapeError("x", "[total, C] or [1, total, C] with cu_seqlens", tuple(x.shape), "Pack the samples first.")
    segments = cu_seqlens.shape[0] - 1
    if segments < 1:
        raise ShapeError("cu_seqlens", "at least 2 values", segments + 1, "It holds the S + 1 ends of S segments.")
    for name, table in tables.items():
        _checks.check_shape(name, table, (segments, x.shape[-1]), "[segments, C]")
    if not _checks.is_unread(cu_seqlens):
        ends = cu_seqlens.tolist()
        total = prod(x.shape[:-1])
        if ends[0] != 0 or ends[-1] != total or any(a > b for a, b in zip(ends, ends[1:], strict=False)):
            raise ShapeError("cu_seqlens", f"values that rise from 0 to {total}, the tokens of x", ends, "")
    return cu_seqlens.to(torch.int32).contiguous()


def _check_index(x: torch.Tensor, tables: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    _checks.check_integer("rows", rows)
    _checks.check_same_device("rows", rows, "x", x)
    batch, tokens = ((), x.shape[0]) if x.ndim == 2 else ((x.shape[0],), prod(x.shape[1:-1]))
    expected = f"[{'' if not batch else 'B, '}groups], groups a divisor of {tokens}"
    if rows.ndim != len(batch) + 1 or tuple(rows.shape[:-1]) != batch:
        raise ShapeError("rows", expected, tuple(rows.shape), "One index per group of tokens of each sample.")
    if rows.shape[-1] == 0 or tokens % rows.shape[-1] != 0:
        raise ShapeError("rows", expected, tuple(rows.shape), "The tokens of a sample form equal groups.")
    for name, table in tables.items():
        _checks.check_ndim(name, table, 2)
    if tables and rows.numel() > 0 and not _checks.is_unread(rows):
        count = min(table.shape[0] for table in tables.values())
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= count:
            raise OptionError(
                "rows", f"values in [0, {count})", f"{low} to {high}", "They index the rows of the tables."
            )
    if tokens == 0:  # groups of no tokens own nothing, where the kernels count at least one a group
        rows = rows[..., :0]
    return rows.reshape(-1).to(torch.int32).contiguous()


def sort_rows(
    rows: torch.Tensor | None, cu_seqlens: torch.Tensor | None, count: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """For a backward: with `rows`, the groups in the order of their row and where each row begins in that order."""
    if rows is None:
        return None, cu_seqlens
    ordered, order = torch.sort(rows.clamp(0, count - 1), stable=True)
    ends = torch.searchsorted(ordered, torch.arange(count + 1, device=rows.device, dtype=torch.int32), out_int32=True)
    return order.to(torch.int32), ends


def wanted(*pairs: tuple[bool, int]) -> int:
    """The `needs` argument: the sum of the bits whose gradient is wanted."""
    needs = 0
    for want, bit in pairs:
        if want:
            needs |= bit
    return needs


def grad_or_none(grad: torch.Tensor, shape: torch.Size | None, dtype: torch.dtype | None) -> torch.Tensor | None:
    """A bare op's gradient in its table's shape; None for a gradient that was not asked for."""
    if shape is None or dtype is None:
        return None
    if grad.shape != shape:  # a view costs 3 us, and most tables are rows already
        grad = grad.reshape(shape)
    return grad if grad.dtype == dtype else grad.to(dtype)
