# SPDX-License-Identifier: Apache-2.0
"""Launchers of upsampling convolutions: one launch for the weights of all phases, and one for all phases.

An H200 took 1.3 ms for the weights of VidTok's encoder and decoder, as 87 sums of taps, each a launch for its host.
What the kernels read about a plan is kept with it; weights are made anew in every call, since nobody tells when their
values change (`p.data.copy_()`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vidkernels._conv.geometry import NONE, REPLICATE, full_float32, is_channels_last
from vidkernels._conv.phases import Plan
from vidkernels._conv.upsample_plan import Run
from vidkernels._conv.weights import collapse, summands, wide_parts, with_smooth
from vidkernels.triton import _conv_phase_kernels as kernels
from vidkernels.triton import _launch
from vidkernels.triton._conv_configs import BoxConfig, box_config, group_rows, use_boxes
from vidkernels.triton._conv_fold import fold_or_correlate
from vidkernels.triton._correlate import boxes_of, upcast, wait_for_products
from vidkernels.triton._device import family
from vidkernels.triton._sizes import cdiv, next_power_of_2

_MOST_TAPS = 48  # of a kernel: a thread keeps them in registers
_FEW_FILTERS, _FEW_CHANNELS = 8, 32  # up to so many filters, below so many channels: see `_conv_fold`
_ONES = (1, 1, 1)


@dataclass(frozen=True, eq=False)
class _Tables:
    """A plan on a device.

    Attributes:
        weights: table of `phase_weights_kernel`.
        outs: elements read along (t, h, w), of all runs together.
        mixed: whether rows and columns are.
        entries: table of `phase_box_kernel`, and how many; None where phases differ in their rows or columns of taps.
        kernel: the largest phase's elements read.
        size: rows and columns of the largest phase.
        first: of every phase, how many taps lie before.
        taps: of all phases together.
        recipes: by the signature of a call.
    """

    weights: Tensor
    outs: tuple[int, int, int]
    mixed: bool
    entries: Tensor | None
    count: int
    kernel: tuple[int, int, int]
    size: tuple[int, int]
    first: tuple[int, ...]
    taps: int
    recipes: dict[Any, _Recipe] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Recipe:
    """How calls of one kind are served: the tile of the launch for all phases (None: they are launched one by one), keys of the
    two launches. Looked up by a signature that takes the host 4 us; the decision takes 12."""

    config: BoxConfig | None
    weights_key: Any
    boxes_key: Any


def _axis_rows(runs: Sequence[Run]) -> list[int]:
    """`table` of one axis, see `phase_weights_kernel`."""
    values: list[int] = []
    before = 0
    for run in runs:
        for index, factors in enumerate(run.taps):
            values += before, len(run.taps), index
            values += struct.unpack(f"{len(factors)}i", struct.pack(f"{len(factors)}f", *factors))
        before += len(run.taps)
    return values


def _is_identity(runs: Sequence[Run]) -> bool:
    taps = runs[0].taps
    return len(runs) == 1 and all(len(row) == len(taps) and row[i] == sum(row) == 1 for i, row in enumerate(taps))


def _entries(plan: Plan) -> list[int]:
    """`table` of `phase_box_kernel`: frames of y in turn, of each all phases in space."""
    times, rows, columns = plan.axes
    lines: list[tuple[int, list[int]]] = []
    before = 0
    for time in times:
        taps = len(time.taps)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                first = before * len(rows) * len(columns) + taps * (i * len(columns) + j)
                space = [value for run in (row, column) for value in (run.begin, run.start, run.count)]
                for k in range(time.count):
                    frame = time.start + k * time.step
                    lines.append((frame, [first, taps, time.begin - plan.start + k, frame, *space]))
        before += taps
    lines.sort(key=lambda line: line[0])
    return [value for _, line in lines for value in line]


def _tables(plan: Plan, device: torch.device) -> _Tables:
    """Made at the first call and kept, by a blocking copy: that call belongs before the capture of a CUDA graph."""
    found: _Tables | None = plan.tables.get(device)
    if found is None:
        times, rows, columns = plan.axes
        outs = [sum(len(run.taps) for run in runs) for runs in plan.axes]
        sums = torch.tensor([v for runs in plan.axes for v in _axis_rows(runs)], dtype=torch.int32, device=device)
        entries = None
        if all(len({len(run.taps) for run in runs}) == 1 for runs in (rows, columns)):
            entries = torch.tensor(_entries(plan), dtype=torch.int32, device=device)
        first, taps = [], 0
        for phase in plan.phases:
            first.append(taps)
            taps += math.prod(phase.kernel)
        kernel = [max(len(run.taps) for run in runs) for runs in plan.axes]
        size = max(run.count for run in rows), max(run.count for run in columns)
        count = sum(run.count for run in times) * len(rows) * len(columns)
        mixed = not (_is_identity(rows) and _is_identity(columns))
        t, h, w = outs
        found = _Tables(
            sums, (t, h, w), mixed, entries, count, (kernel[0], kernel[1], kernel[2]), size, tuple(first), t * h * w
        )
        plan.tables[device] = found
    return found


def _make_weights(
    tables: _Tables,
    weight: Tensor,
    bias: Tensor | None,
    mix_factor: Tensor | None,
    smooth: tuple[int, int],
    stacked: bool,
    key: Any = None,
) -> Tensor:
    """The weights of all phases, one after the other, and, with a `mix_factor`, the scaled bias. `smooth`: frame and place in
    it of the tap at which the smooth part is added, see `phase_weights_kernel`; `key`: of a launch that may be repeated."""
    filters, channels, *kernel = weight.shape
    last = not weight.is_contiguous()
    if last and not weight.is_contiguous(memory_format=torch.channels_last_3d):
        weight, last = weight.contiguous(), False
    size = tables.taps * filters * channels
    scaled = bias is not None and mix_factor is not None
    out = torch.empty(size + filters if scaled else size, dtype=weight.dtype, device=weight.device)
    bias, blend = bias if scaled else weight, mix_factor is not None
    tensors = weight, bias, mix_factor if blend else weight, tables.weights, out
    if key is None:
        key = _launch.signature(weight, bias, mix_factor), ("separate weights", tables, smooth, stacked)
    if _launch.repeat(key, tensors):
        return out
    block = min(64, next_power_of_2(channels))
    options = {
        "KT": kernel[0], "KH": kernel[1], "KW": kernel[2], "SPACE": tables.mixed, "BLEND": blend, "HAS_BIAS": scaled,
        "FRAME": smooth[0], "CENTER": smooth[1], "CHANNELS_LAST": last, "STACKED": stacked, "UPCAST": upcast(weight.dtype),
        "BLOCK": block, "num_warps": 2,
    }  # fmt: skip
    args = *tensors, filters, channels, *tables.outs
    grid = (filters * cdiv(channels, block),)
    _launch.launch(kernels.phase_weights_kernel, grid, args, options, key, tensors)
    return out


def _smooth_tap(padding: Sequence[int] | None, kernel: Sequence[int]) -> tuple[int, int]:
    """Frame and place of the tap on the element itself; `padding` (front, back, top, ...) None: no smooth part is added."""
    return (-1, -1) if padding is None else (padding[0], padding[2] * kernel[2] + padding[4])


def _views(plan: Plan, tables: _Tables, weights: Tensor, filters: int, channels: int) -> Iterator[Tensor]:
    """[filters, channels, t, h, w] of every phase, channels last, of weights that are not stacked."""
    for phase, first in zip(plan.phases, tables.first, strict=True):
        t, h, w = phase.kernel
        strides = t * h * w * channels, 1, h * w * channels, w * channels, channels
        yield weights.as_strided((filters, channels, t, h, w), strides, first * filters * channels)


def separate_weights(
    plan: Plan, weight: Tensor, bias: Tensor | None, mix_factor: Tensor | None, padding: Sequence[int] | None
) -> tuple[Iterator[Tensor], Tensor | None]:
    """Weights of every phase in turn and the bias, in the dtype of the weight; `padding` says at which tap the smooth part of a
    blend is added, None: nowhere."""
    if math.prod(weight.shape[2:]) <= _MOST_TAPS:
        tables = _tables(plan, weight.device)
        smooth = _smooth_tap(padding, weight.shape[2:])
        made = _make_weights(tables, weight, bias, mix_factor, smooth, stacked=False)
        if bias is not None and mix_factor is not None:
            bias = made[-bias.shape[0] :]
        return _views(plan, tables, made, *weight.shape[:2]), bias
    wide, wide_bias = summands(weight, bias, mix_factor, padding)
    last = torch.channels_last_3d
    each = (collapse(wide, p.taps).to(weight.dtype, memory_format=last) for p in plan.phases)
    return each, None if wide_bias is None else wide_bias.to(weight.dtype)


@lru_cache(maxsize=64)
def _unmixed(kernel: tuple[int, int, int], device: torch.device) -> _Tables:
    """Tables of one phase whose taps are those of the kernel."""
    frames = kernel[0]
    taps = tuple(tuple(float(i == j) for j in range(frames)) for i in range(frames))
    table = torch.tensor(_axis_rows([Run(0, 1, 1, 0, taps)]), dtype=torch.int32, device=device)
    return _Tables(table, kernel, False, None, 0, kernel, (1, 1), (0,), math.prod(kernel))


def blended_weight(weight: Tensor, bias: Tensor | None, mix_factor: Tensor) -> Tensor:
    """See `ops.downsample_conv3d`: [K, kt, kh, kw, C] of its one convolution and then the bias, all in one row."""
    _, _, t, h, w = weight.shape
    if t * h * w > _MOST_TAPS:
        wide, wide_bias, share = wide_parts(weight, bias, mix_factor)
        wide = with_smooth(wide, share, [(frame, h // 2, w // 2) for frame in range(t)])
        parts = [wide.permute(0, 2, 3, 4, 1).flatten()] + ([] if wide_bias is None else [wide_bias])
        return torch.cat(parts).to(weight.dtype)
    return _make_weights(
        _unmixed((t, h, w), weight.device), weight, bias, mix_factor, (-1, h // 2 * w + w // 2), stacked=False
    )


def _boxes(
    plan: Plan, tables: _Tables, size: Sequence[int], source: Tensor, history: Tensor | None
) -> BoxConfig | None:
    """The tile with which one launch serves all phases; None where it does not."""
    filters, channels, (height, width) = size[1], source.shape[1], tables.size
    if tables.entries is None or tables.outs[0] == 0 or filters <= _FEW_FILTERS or channels < _FEW_CHANNELS:
        return None
    if channels * source.element_size() % 16 or size[3] * size[4] * filters >= 1 << 31:
        return None
    space = plan.phases[0].geometry.space_mode == REPLICATE
    if not use_boxes(source, history, source, _ONES, space, (height, width)):
        return None
    return box_config(source.dtype, channels, filters, tables.kernel, height, width, family(source.device))


def _convolve_boxes(
    y: Tensor,
    source: Tensor,
    history: Tensor | None,
    weights: Tensor,
    bias: Tensor | None,
    scale: Sequence[int],
    tables: _Tables,
    replicate: bool,
    recipe: _Recipe,
) -> None:
    """All phases in one launch, from stacked weights."""
    tensors = y, source, history, weights, bias, tables.entries
    if _launch.repeat(recipe.boxes_key, tensors):
        return
    from triton.tools.tensor_descriptor import TensorDescriptor

    config: Any = recipe.config
    batch, filters, *size = y.shape
    channels, (kernel_t, *kernel) = source.shape[1], tables.kernel
    shape, strides = [tables.taps, filters, channels], [filters * channels, channels, 1]
    weight = rest = TensorDescriptor(weights, shape, strides, [1, config.block_n, config.block_c])
    if config.block_n2:
        rest = TensorDescriptor(weights, shape, strides, [1, config.block_n2, config.block_c])
    box = 1, 1, config.block_h, config.block_w, config.block_c
    described = boxes_of(source, box)
    tiles = cdiv(tables.size[0], config.block_h), cdiv(tables.size[1], config.block_w)
    row = channels * source.shape[4] * source.element_size()
    shares = tables.count > size[0]  # phases in space read the same frames
    group = group_rows(tiles[0], config.block_h * row, max(kernel_t, 2) if shares else kernel_t)
    args = (
        described, described if history is None else boxes_of(history, box), weight, rest, y if bias is None else bias, y,
        tables.entries, group, tables.count, *tiles, filters, channels, source.shape[2],
        0 if history is None else history.shape[2], *size, *kernel, *scale[1:],
    )  # fmt: skip
    options = {
        "REPLICATE": replicate, "HAS_HISTORY": history is not None, "HAS_BIAS": bias is not None,
        "BLOCK_H": config.block_h, "BLOCK_W": config.block_w, "BLOCK_N": config.block_n, "BLOCK_N2": config.block_n2,
        "BLOCK_C": config.block_c, "TRANSPOSED": config.transposed, "HALVES": config.halves, "UPCAST": upcast(source.dtype),
        "PRECISION": "ieee" if full_float32(source.dtype) else "tf32",
        "WAIT": wait_for_products(source.device, config.block_h > 1 and not config.transposed),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    grid = (batch * tables.count * tiles[0] * tiles[1] * cdiv(filters, config.filters),)
    _launch.launch(kernels.phase_box_kernel, grid, args, options, recipe.boxes_key, tensors)


def _recipe(
    plan: Plan,
    size: Sequence[int],
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    mix_factor: Tensor | None,
    apart: bool,
) -> tuple[_Tables, _Recipe]:
    tables = _tables(plan, source.device)
    signature = _launch.signature(source, weight, bias, history, mix_factor)
    key = signature, apart, full_float32(source.dtype)
    found = tables.recipes.get(key)
    if found is None:
        config = _boxes(plan, tables, size, source, history)
        found = _Recipe(config, (signature, ("weights", tables, apart)), (signature, ("boxes", tables, key[2])))
        tables.recipes[key] = found
    return tables, found


def convolve(
    plan: Plan,
    size: Sequence[int],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    mix_factor: Tensor | None,
    scale: Sequence[int],
    padding: Sequence[int],
    apart: bool,
) -> Tensor:
    """The result, [B, K, T, H, W] of `size`; without the smooth part of a blend if that is added `apart`."""
    last = torch.channels_last_3d
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=last)
    source = x if x.stride(1) == 1 else x.contiguous(memory_format=last)
    older = history if history is None or history.stride(1) == 1 else history.contiguous(memory_format=last)
    kernel, mode = weight.shape[2:], plan.phases[0].geometry
    replicate, tap = mode.time_mode == REPLICATE, None if apart else padding
    config = None
    if math.prod(kernel) <= _MOST_TAPS:
        tables, recipe = _recipe(plan, size, source, weight, bias, older, mix_factor, apart)
        config = recipe.config
    if config is None:
        _phase_by_phase(y, plan, source, weight, bias, older, mix_factor, tap)
    else:
        made = _make_weights(tables, weight, bias, mix_factor, _smooth_tap(tap, kernel), True, recipe.weights_key)
        if bias is not None and mix_factor is not None:
            bias = made[-bias.shape[0] :]
        _convolve_boxes(y, source, older, made, bias, scale, tables, replicate, recipe)
    return y if is_channels_last(x) else y.contiguous()


def _phase_by_phase(
    y: Tensor,
    plan: Plan,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    mix_factor: Tensor | None,
    padding: Sequence[int] | None,
) -> None:
    """Weights of all phases in one launch, then one convolution after the other."""
    each, bias = separate_weights(plan, weight, bias, mix_factor, padding)
    for phase, w in zip(plan.phases, each, strict=True):
        view = phase.outputs(y)
        if not phase.taps[0]:  # frames of nothing but zero padding
            view.copy_(y.new_zeros(()) if bias is None else bias[:, None, None, None])
            continue
        base = phase.runs[0].begin - plan.start, phase.runs[1].begin, phase.runs[2].begin
        replicate = phase.geometry.time_mode == REPLICATE, phase.geometry.space_mode == REPLICATE
        fold_or_correlate(view, source, history, w, bias, None, _ONES, base, _ONES, replicate, NONE)
