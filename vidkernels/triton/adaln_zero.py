# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the adaLN forward, and what forward and backward share.

A program takes a run of consecutive tokens and reads a row of modulation once per run. A row of C values is cut into the
largest power of two that fits and a remainder, so that 1152 costs 1024 + 128 lanes and not 2048.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vidkernels.triton._device import multiprocessors
from vidkernels.triton._sizes import cdiv, next_power_of_2

LAYER, RMS = 1, 2


@dataclass(frozen=True)
class RowConfig:
    """How a launch covers its rows: `head` and `tail` lanes of a row, warps a program, tokens a program."""

    head: int
    tail: int
    num_warps: int
    chunk: int


def row_config(tokens: int, channels: int, device: torch.device, waves: int, most_warps: int = 16) -> RowConfig:
    """Heuristic: about eight values a thread, in at most `most_warps` warps; as many programs as `waves` times the
    multiprocessors, one run of tokens each."""
    head = 1 << (channels.bit_length() - 1)
    tail = next_power_of_2(channels - head) if channels > head else 1
    num_warps = min(most_warps, max(1, channels // 256))
    processors = multiprocessors(device) if device.type == "cuda" else 2  # the interpreter: a few tokens a run
    chunk = max(1, cdiv(tokens, processors * waves))
    return RowConfig(head, tail, 1 << (num_warps.bit_length() - 1), chunk)


@triton.jit
def row_of(position, cu_seqlens, index, unit, count):
    """Row of modulation that a position takes: the last that begins at or before it, or the index, or position / unit."""
    row = position // unit
    if index is not None:
        row = tl.minimum(tl.maximum(tl.load(index + row).to(tl.int64), 0), count - 1)
    if cu_seqlens is not None:
        low = position * 0
        high = low + count - 1
        while low < high:
            middle = (low + high + 1) // 2
            before = tl.load(cu_seqlens + middle).to(tl.int64) * unit <= position
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle - 1)
        row = low
    return row


@triton.jit
def run_end(position, row, end, cu_seqlens, index, unit, count):
    """End of the run of positions that share `row`; beyond `position` even where cu_seqlens is malformed."""
    stop = (position // unit + 1) * unit
    if cu_seqlens is not None:
        stop = tl.load(cu_seqlens + row + 1).to(tl.int64) * unit
    if index is None:
        stop = tl.where(row + 1 == count, end, stop)
    return tl.minimum(tl.maximum(stop, position + 1), end)


@triton.jit
def load_row(table, row, stride, columns, mask, missing: tl.constexpr):
    """Columns of a table's row in float32; `missing` where there is no table."""
    if table is not None:
        value = tl.load(table + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    else:
        value = tl.full(columns.shape, missing, tl.float32)
    return value


@triton.jit
def load_factor(scale, scale_stride, weight, row, columns, mask):
    """a = weight * (1 + scale)."""
    factor = 1.0 + load_row(scale, row, scale_stride, columns, mask, 0.0)
    return factor * load_row(weight, 0, 0, columns, mask, 1.0)


@triton.jit
def load_offset(shift, shift_stride, scale, scale_stride, bias, row, columns, mask):
    """s = bias * (1 + scale) + shift."""
    offset = load_row(shift, row, shift_stride, columns, mask, 0.0)
    if bias is not None:
        factor = 1.0 + load_row(scale, row, scale_stride, columns, mask, 0.0)
        offset += factor * load_row(bias, 0, 0, columns, mask, 0.0)
    return offset


@triton.jit
def _gate_part(x, branch, hidden, gate, offsets, mask):
    """A part of hidden = x + gate * branch, rounded as stored: that is what the norm reads."""
    value = tl.load(x + offsets, mask=mask, other=0.0)
    if branch is not None:
        other = tl.load(branch + offsets, mask=mask, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + gate * other).to(hidden.dtype.element_ty)
        tl.store(hidden + offsets, value, mask=mask)
    return value.to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "unit", "count", "chunk"])
def _adaln_fwd_kernel(
    x, branch, hidden, y, mean_out, rstd_out, gate, shift, scale, weight, bias, index, cu_seqlens,
    gate_stride, shift_stride, scale_stride, tokens, unit, count, chunk, channels, eps,
    NORM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    head_mask = head < channels
    tail_mask = tail < channels
    position = tl.program_id(0).to(tl.int64) * chunk
    end = tl.minimum(position + chunk, tokens)
    while position < end:
        row = row_of(position, cu_seqlens, index, unit, count)
        stop = tl.minimum(run_end(position, row, tokens, cu_seqlens, index, unit, count), end)
        gate_head = load_row(gate, row, gate_stride, head, head_mask, 1.0)
        gate_tail = load_row(gate, row, gate_stride, tail, tail_mask, 1.0)
        if y is not None:
            a_head = load_factor(scale, scale_stride, weight, row, head, head_mask)
            a_tail = load_factor(scale, scale_stride, weight, row, tail, tail_mask)
            s_head = load_offset(shift, shift_stride, scale, scale_stride, bias, row, head, head_mask)
            s_tail = load_offset(shift, shift_stride, scale, scale_stride, bias, row, tail, tail_mask)
        while position < stop:
            base = position * channels
            h_head = _gate_part(x, branch, hidden, gate_head, base + head, head_mask)
            h_tail = _gate_part(x, branch, hidden, gate_tail, base + tail, tail_mask)
            if y is not None:
                if NORM == 1:
                    mean = (tl.sum(h_head, 0) + tl.sum(h_tail, 0)) / channels
                    h_head = tl.where(head_mask, h_head - mean, 0.0)
                    h_tail = tl.where(tail_mask, h_tail - mean, 0.0)
                    if mean_out is not None:
                        tl.store(mean_out + position, mean)
                if NORM != 0:
                    square = (tl.sum(h_head * h_head, 0) + tl.sum(h_tail * h_tail, 0)) / channels
                    rstd = 1.0 / tl.sqrt(square + eps)
                    h_head *= rstd
                    h_tail *= rstd
                    if rstd_out is not None:
                        tl.store(rstd_out + position, rstd)
                tl.store(y + base + head, (h_head * a_head + s_head).to(y.dtype.element_ty), mask=head_mask)
                tl.store(y + base + tail, (h_tail * a_tail + s_tail).to(y.dtype.element_ty), mask=tail_mask)
            position += 1


Table = torch.Tensor | None


def as_rows(table: Table, channels: int) -> tuple[Table, int]:
    """A table as `[R, C]` with unit stride along C, and its stride between rows; a copy only where no view exists."""
    if table is None:
        return None, 0
    flat = table.reshape(-1, channels)
    if channels > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)


def row_count(*tables: Table) -> int:
    """Rows of modulation: of the first table there is, else 1."""
    return next((table.numel() // table.shape[-1] for table in tables if table is not None), 1)


def group_size(tokens: int, count: int, grouping: Table, cu_seqlens: Table) -> int:
    """Tokens that share one entry of the row map."""
    groups = grouping.numel() if grouping is not None else tokens if cu_seqlens is not None else count
    return max(1, tokens // max(1, groups))


def _forward(
    x: torch.Tensor, branch: Table, gate: Table, shift: Table, scale: Table, weight: Table, bias: Table,
    rows: Table, cu_seqlens: Table, norm: int, eps: float, save: bool, modulate: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    x, branch, weight, bias = (None if t is None else t.contiguous() for t in (x, branch, weight, bias))
    channels = x.shape[-1]
    tokens = x.numel() // max(1, channels)
    count = row_count(gate, shift, scale)
    saved = tokens if modulate and save else 0
    mean = x.new_empty((saved if norm == LAYER else 0,), dtype=torch.float32)
    rstd = x.new_empty((saved if norm else 0,), dtype=torch.float32)
    hidden = x.new_empty(x.shape if branch is not None else (0,))
    y = x.new_empty(x.shape if modulate else (0,))
    if x.numel() == 0:
        return hidden, y, mean, rstd
    config = row_config(tokens, channels, x.device, waves=8)
    gate, gate_stride = as_rows(gate, channels)
    shift, shift_stride = as_rows(shift, channels)
    scale, scale_stride = as_rows(scale, channels)
    _adaln_fwd_kernel[(cdiv(tokens, config.chunk),)](
        x, branch, hidden if branch is not None else None, y if modulate else None,
        mean if mean.numel() else None, rstd if rstd.numel() else None, gate, shift, scale, weight, bias, rows, cu_seqlens,
        gate_stride, shift_stride, scale_stride, tokens, group_size(tokens, count, rows, cu_seqlens), count, config.chunk,
        channels, eps, NORM=norm, HEAD=config.head, TAIL=config.tail, num_warps=config.num_warps,
    )  # fmt: skip
    return hidden, y, mean, rstd


def adaln_modulate_fwd(
    x: torch.Tensor, shift: Table, scale: Table, weight: Table, bias: Table, rows: Table, cu_seqlens: Table,
    norm: int, eps: float, save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launcher of `vidkernels::adaln_modulate_fwd_triton`: y, mean, rstd."""
    return _forward(x, None, None, shift, scale, weight, bias, rows, cu_seqlens, norm, eps, save, True)[1:]


def gate_residual_fwd(
    residual: torch.Tensor, branch: torch.Tensor, gate: Table, rows: Table, cu_seqlens: Table
) -> torch.Tensor:
    """Launcher of `vidkernels::gate_residual_fwd_triton`."""
    return _forward(residual, branch, gate, None, None, None, None, rows, cu_seqlens, 0, 0.0, False, False)[0]


def adaln_zero_fwd(
    residual: torch.Tensor, branch: torch.Tensor, gate: Table, shift: Table, scale: Table, weight: Table, bias: Table,
    rows: Table, cu_seqlens: Table, norm: int, eps: float, save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launcher of `vidkernels::adaln_zero_fwd_triton`: hidden, y, mean, rstd."""
    return _forward(residual, branch, gate, shift, scale, weight, bias, rows, cu_seqlens, norm, eps, save, True)
