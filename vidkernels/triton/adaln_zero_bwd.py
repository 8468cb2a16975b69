# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the adaLN backward: one pass over the activations, then small sums over slots.

A program takes a chunk of positions. Chunks and rows of modulation cut the positions into pieces; the piece of chunk c
and row r has slot c + r, distinct and increasing along the positions, so sums need no atomics and have one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vidkernels.triton._sizes import cdiv
from vidkernels.triton.adaln_zero import (
    LAYER,
    Table,
    as_rows,
    group_size,
    load_factor,
    load_row,
    row_config,
    row_of,
    run_end,
)

# Bits of `needs`, as ops/_adaln_layout.py and csrc/adaln_zero/adaln_zero.h have them.
NEED_X, NEED_BRANCH, NEED_GATE, NEED_SHIFT, NEED_SCALE, NEED_WEIGHT, NEED_BIAS = (1 << bit for bit in range(7))


@triton.jit
def _store_sums(target, row, channels, columns, mask, value):
    if target is not None:
        tl.store(target + row * channels + columns, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _token_of(position, order, unit):
    token = position
    if order is not None:
        token = tl.load(order + position // unit).to(tl.int64) * unit + position % unit
    return token


@triton.jit
def _load_part(source, offsets, mask, like):
    value = tl.zeros(like.shape, tl.float32)
    if source is not None:
        value = tl.load(source + offsets, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _write_part(dx, dbranch, offsets, mask, d, gate):
    if dx is not None:
        tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=mask)
    if dbranch is not None:
        tl.store(dbranch + offsets, (d * gate).to(dbranch.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "unit", "count", "chunk"])
def _adaln_bwd_kernel(
    dhidden, dy, x, branch, mean, rstd, gate, scale, weight, order, cu_seqlens, dx, dbranch,
    part_p, part_q, part_g, part_w, part_b, gate_stride, scale_stride, tokens, unit, count, chunk, channels,
    NORM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    head_mask = head < channels
    tail_mask = tail < channels
    piece = tl.program_id(0).to(tl.int64)
    position = piece * chunk
    end = tl.minimum(position + chunk, tokens)
    w_head = tl.zeros((HEAD,), tl.float32)
    w_tail = tl.zeros((TAIL,), tl.float32)
    b_head = tl.zeros((HEAD,), tl.float32)
    b_tail = tl.zeros((TAIL,), tl.float32)
    while position < end:
        row = row_of(position, cu_seqlens, None, unit, count)
        stop = tl.minimum(run_end(position, row, tokens, cu_seqlens, None, unit, count), end)
        gate_head = load_row(gate, row, gate_stride, head, head_mask, 1.0)
        gate_tail = load_row(gate, row, gate_stride, tail, tail_mask, 1.0)
        a_head = load_factor(scale, scale_stride, weight, row, head, head_mask)
        a_tail = load_factor(scale, scale_stride, weight, row, tail, tail_mask)
        p_head = tl.zeros((HEAD,), tl.float32)
        p_tail = tl.zeros((TAIL,), tl.float32)
        q_head = tl.zeros((HEAD,), tl.float32)
        q_tail = tl.zeros((TAIL,), tl.float32)
        g_head = tl.zeros((HEAD,), tl.float32)
        g_tail = tl.zeros((TAIL,), tl.float32)
        while position < stop:
            token = _token_of(position, order, unit)
            base = token * channels
            d_head = _load_part(dhidden, base + head, head_mask, head)
            d_tail = _load_part(dhidden, base + tail, tail_mask, tail)
            if dy is not None:
                dy_head = _load_part(dy, base + head, head_mask, head)
                dy_tail = _load_part(dy, base + tail, tail_mask, tail)
                x_head = _load_part(x, base + head, head_mask, head)
                x_tail = _load_part(x, base + tail, tail_mask, tail)
                if NORM == 1:
                    centre = tl.load(mean + token)
                    x_head = tl.where(head_mask, x_head - centre, 0.0)
                    x_tail = tl.where(tail_mask, x_tail - centre, 0.0)
                scale_of_row = 1.0
                if NORM != 0:
                    scale_of_row = tl.load(rstd + token)
                    x_head *= scale_of_row
                    x_tail *= scale_of_row
                p_head += dy_head * x_head
                p_tail += dy_tail * x_tail
                q_head += dy_head
                q_tail += dy_tail
                t_head = dy_head * a_head
                t_tail = dy_tail * a_tail
                if NORM != 0:
                    along = (tl.sum(t_head * x_head, 0) + tl.sum(t_tail * x_tail, 0)) / channels
                    if NORM == 1:
                        level = (tl.sum(t_head, 0) + tl.sum(t_tail, 0)) / channels
                        t_head -= level
                        t_tail -= level
                    t_head = (t_head - x_head * along) * scale_of_row
                    t_tail = (t_tail - x_tail * along) * scale_of_row
                d_head += t_head
                d_tail += t_tail
            _write_part(dx, dbranch, base + head, head_mask, d_head, gate_head)
            _write_part(dx, dbranch, base + tail, tail_mask, d_tail, gate_tail)
            if branch is not None:
                g_head += d_head * _load_part(branch, base + head, head_mask, head)
                g_tail += d_tail * _load_part(branch, base + tail, tail_mask, tail)
            position += 1
        _store_sums(part_p, piece + row, channels, head, head_mask, p_head)
        _store_sums(part_p, piece + row, channels, tail, tail_mask, p_tail)
        _store_sums(part_q, piece + row, channels, head, head_mask, q_head)
        _store_sums(part_q, piece + row, channels, tail, tail_mask, q_tail)
        _store_sums(part_g, piece + row, channels, head, head_mask, g_head)
        _store_sums(part_g, piece + row, channels, tail, tail_mask, g_tail)
        if part_w is not None:
            factor_head = load_factor(scale, scale_stride, None, row, head, head_mask)
            factor_tail = load_factor(scale, scale_stride, None, row, tail, tail_mask)
            w_head += factor_head * p_head
            w_tail += factor_tail * p_tail
            b_head += factor_head * q_head
            b_tail += factor_tail * q_tail
    _store_sums(part_w, piece, channels, head, head_mask, w_head)
    _store_sums(part_w, piece, channels, tail, tail_mask, w_tail)
    _store_sums(part_b, piece, channels, head, head_mask, b_head)
    _store_sums(part_b, piece, channels, tail, tail_mask, b_tail)


@triton.jit
def _sum_slots(source, first, last, channels, columns, mask, WAYS: tl.constexpr):
    ways = tl.arange(0, WAYS)
    total = tl.zeros((WAYS, columns.shape[0]), tl.float32)
    slot = first
    while slot < last:
        at = slot + ways
        inside = (at < last)[:, None] & mask[None, :]
        total += tl.load(source + at[:, None] * channels + columns[None, :], mask=inside, other=0.0)
        slot += WAYS
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["tokens", "unit", "count", "chunk"])
def _adaln_reduce_kernel(
    part_p, part_q, part_g, dshift, dscale, dgate, weight, bias, cu_seqlens, tokens, unit, count, chunk, channels,
    BLOCK: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < channels
    begin = row * unit
    end = (row + 1) * unit
    if cu_seqlens is not None:
        begin = tl.where(row == 0, 0, tl.load(cu_seqlens + row).to(tl.int64) * unit)
        end = tl.load(cu_seqlens + row + 1).to(tl.int64) * unit
    begin = tl.maximum(begin, 0)
    end = tl.where(row + 1 == count, tokens, tl.minimum(end, tokens))
    first = begin // chunk + row
    last = tl.where(end > begin, (end - 1) // chunk + row + 1, first)
    if part_q is not None:
        q = _sum_slots(part_q, first, last, channels, columns, mask, WAYS)
        _store_sums(dshift, row, channels, columns, mask, q)
        p = _sum_slots(part_p, first, last, channels, columns, mask, WAYS)
        p = p * load_row(weight, 0, 0, columns, mask, 1.0) + q * load_row(bias, 0, 0, columns, mask, 0.0)
        _store_sums(dscale, row, channels, columns, mask, p)
    if part_g is not None:
        _store_sums(dgate, row, channels, columns, mask, _sum_slots(part_g, first, last, channels, columns, mask, WAYS))


@triton.jit(do_not_specialize=["chunks"])
def _adaln_affine_kernel(part, grad, chunks, channels, BLOCK: tl.constexpr, WAYS: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < channels
    first = tl.program_id(0).to(tl.int64) * 0
    _store_sums(grad, first, channels, columns, mask, _sum_slots(part, first, chunks, channels, columns, mask, WAYS))


def _or_none(tensor: torch.Tensor) -> Table:
    return tensor if tensor.numel() else None


def _outputs(
    like: torch.Tensor, typed: Table, weight: Table, bias: Table, count: int, needs: int
) -> dict[str, torch.Tensor]:
    channels = like.shape[-1]
    row_dtype = torch.float32 if typed is None else typed.dtype

    def full(bit: int) -> torch.Tensor:
        return like.new_empty(like.shape if needs & bit else (0,))

    def table(bit: int) -> torch.Tensor:
        return like.new_empty((count, channels) if needs & bit else (0,), dtype=row_dtype)

    def vector(bit: int, of: Table) -> torch.Tensor:
        wanted = of is not None and needs & bit
        return like.new_empty((channels,) if wanted else (0,), dtype=of.dtype if wanted else torch.float32)

    return {
        "dx": full(NEED_X),
        "dbranch": full(NEED_BRANCH),
        "dgate": table(NEED_GATE),
        "dshift": table(NEED_SHIFT),
        "dscale": table(NEED_SCALE),
        "dweight": vector(NEED_WEIGHT, weight),
        "dbias": vector(NEED_BIAS, bias),
    }


def _backward(
    dhidden: Table, dy: Table, hidden: Table, branch: Table, mean: Table, rstd: Table, gate: Table, scale: Table,
    weight: Table, bias: Table, order: Table, cu_seqlens: Table, count: int, norm: int, needs: int,
) -> dict[str, torch.Tensor]:  # fmt: skip
    dhidden, dy, hidden, branch, weight, bias = (
        None if t is None else t.contiguous() for t in (dhidden, dy, hidden, branch, weight, bias)
    )
    like = dy if dy is not None else dhidden
    channels = like.shape[-1]
    tokens = like.numel() // max(1, channels)
    out = _outputs(like, gate if scale is None else scale, weight, bias, count, needs)
    if tokens == 0 or channels == 0:
        for name in ("dgate", "dshift", "dscale", "dweight", "dbias"):
            out[name].zero_()
        return out
    # 16 warps leave 128 registers a thread, too few for five kinds of values: 8 warps do not spill
    config = row_config(tokens, channels, like.device, waves=4, most_warps=8)
    chunks = cdiv(tokens, config.chunk)
    unit = group_size(tokens, count, order, cu_seqlens)
    affine = bool(out["dweight"].numel() or out["dbias"].numel())

    def scratch(wanted: bool, rows: int) -> Table:
        return like.new_empty((rows, channels), dtype=torch.float32) if wanted else None

    sums_wanted = bool(out["dshift"].numel() or out["dscale"].numel())
    parts = {name: scratch(sums_wanted, chunks + count) for name in ("p", "q")}
    parts["g"] = scratch(bool(out["dgate"].numel()), chunks + count)
    parts |= {name: scratch(affine, chunks) for name in ("w", "b")}
    gate_rows, gate_stride = as_rows(gate, channels)
    scale_rows, scale_stride = as_rows(scale, channels)
    _adaln_bwd_kernel[(chunks,)](
        dhidden, dy, hidden if dy is not None else None, branch if out["dgate"].numel() else None,
        mean if norm == LAYER else None, rstd if norm else None, gate_rows, scale_rows, weight, order, cu_seqlens,
        _or_none(out["dx"]), _or_none(out["dbranch"]), parts["p"], parts["q"], parts["g"], parts["w"], parts["b"],
        gate_stride, scale_stride, tokens, unit, count, config.chunk, channels,
        NORM=norm, HEAD=config.head, TAIL=config.tail, num_warps=config.num_warps,
    )  # fmt: skip
    if sums_wanted or out["dgate"].numel():
        _adaln_reduce_kernel[(count, cdiv(channels, 64))](
            parts["p"], parts["q"], parts["g"], _or_none(out["dshift"]), _or_none(out["dscale"]), _or_none(out["dgate"]),
            weight, bias, cu_seqlens, tokens, unit, count, config.chunk, channels, BLOCK=64, WAYS=16, num_warps=4,
        )  # fmt: skip
    for part, grad in ((parts["w"], out["dweight"]), (parts["b"], out["dbias"])):
        if grad.numel():
            grid = (cdiv(channels, 64),)
            _adaln_affine_kernel[grid](part, grad, chunks, channels, BLOCK=64, WAYS=16, num_warps=4)
    return out


def adaln_modulate_bwd(
    dy: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, scale: Table, weight: Table, bias: Table,
    order: Table, cu_seqlens: Table, count: int, norm: int, needs: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Launcher of `vidkernels::adaln_modulate_bwd_triton`: dx, dshift, dscale, dweight, dbias."""
    out = _backward(None, dy, x, None, mean, rstd, None, scale, weight, bias, order, cu_seqlens, count, norm, needs)
    return out["dx"], out["dshift"], out["dscale"], out["dweight"], out["dbias"]


def gate_residual_bwd(
    dout: torch.Tensor, branch: Table, gate: Table, order: Table, cu_seqlens: Table, count: int, needs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launcher of `vidkernels::gate_residual_bwd_triton`: dbranch, dgate."""
    none = (None,) * 2
    out = _backward(dout, *none, branch, *none, gate, None, *none, order, cu_seqlens, count, 0, needs)
    return out["dbranch"], out["dgate"]


def adaln_zero_bwd(
    dhidden: Table, dy: torch.Tensor, hidden: torch.Tensor, branch: Table, mean: torch.Tensor, rstd: torch.Tensor,
    gate: Table, scale: Table, weight: Table, bias: Table, order: Table, cu_seqlens: Table, count: int, norm: int,
    needs: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Launcher of `vidkernels::adaln_zero_bwd_triton`: dresidual, dbranch, dgate, dshift, dscale, dweight, dbias."""
    out = _backward(
        dhidden, dy, hidden, branch, mean, rstd, gate, scale, weight, bias, order, cu_seqlens, count, norm, needs
    )
    return tuple(out.values())
