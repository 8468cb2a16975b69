# SPDX-License-Identifier: Apache-2.0
"""Launcher of the one computation behind a convolution's forward and its data gradient: `correlate`.

Which of the two kernels (boxes or pointers) serves a call is decided here, by what the tensors and the device allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vidkernels import _env
from vidkernels._conv.geometry import SILU, full_float32
from vidkernels.triton import _conv_kernels as kernels
from vidkernels.triton import _launch
from vidkernels.triton._conv_configs import BoxConfig, box_config, group_rows, pointer_config, use_boxes
from vidkernels.triton._device import family
from vidkernels.triton._sizes import cdiv


def packed_weight(weight: Tensor) -> Tensor:
    """[N, R, kt, kh, kw] as [N, taps, R]; no copy for a weight in channels_last_3d."""
    return weight.permute(0, 2, 3, 4, 1).contiguous().flatten(1, 3)


def outer_strides(x: Tensor | None) -> tuple[int, int, int, int]:
    """Batch, frame, row, column."""
    return (0, 0, 0, 0) if x is None else (x.stride(0), *x.stride()[2:])


def long_offsets(*tensors: Tensor | None) -> bool:
    """Whether an element of one of them lies 2^31 or more from its first."""
    for x in tensors:
        if x is not None and x.numel() > 0:
            span = 0
            for size, stride in zip(x.shape, x.stride(), strict=True):
                span += (size - 1) * stride
            if span >= 1 << 31:
                return True
    return False


def named(prefix: str, values: Sequence[int]) -> dict[str, int]:
    """Compile-time arguments along time, rows and columns, such as KT, KH and KW."""
    return {f"{prefix}{axis}": value for axis, value in zip("THW", values, strict=True)}


def upcast(dtype: torch.dtype) -> bool:
    """Triton's interpreter multiplies the bit patterns of bfloat16."""
    return _env.TRITON_INTERPRET and dtype == torch.bfloat16


def wait_for_products(device: torch.device, through_registers: bool) -> bool:
    """Whether products must be waited for one by one, see `_conv_kernels.product`."""
    return through_registers and family(device) == "sm_90" and not _env.TRITON_INTERPRET


def boxes_of(x: Tensor, block: Sequence[int]) -> Any:
    """Host-side descriptor of x as [B, T, H, W, C] with boxes of one frame."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (batch, channels, *size), (first, _, *steps) = x.shape, x.stride()
    strides, extent = [1], cdiv(channels, 16) * 16
    for count, step in zip((*reversed(size), batch), (*reversed(steps), first), strict=True):
        strides.append(step if count > 1 else extent)  # that of an axis of length 1 is never used, but must look usable
        extent = strides[-1] * count
    return TensorDescriptor(x, [batch, *size, channels], strides[::-1], list(block))


def weight_boxes(weight: Tensor, filters: int, channels: int) -> Any:
    """The same of weights [N, taps, R] as [taps, N, R], one tap each."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    view = weight.transpose(0, 1)
    return TensorDescriptor(weight, list(view.shape), list(view.stride()), [1, filters, channels])


def correlate(
    y: Tensor,
    source: Tensor,
    history: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    multiplier: Sequence[int],
    base: Sequence[int],
    step: Sequence[int],
    replicate: tuple[bool, bool],
    activation: int,
    config: BoxConfig | None = None,
) -> None:
    """y[o] = epilogue(sum over k of source[o * multiplier + base + k * step] @ weight[k]); y is a view with any strides but
    the channels', `weight` [N, R, kt, kh, kw], `replicate` in (time, space). `config`: boxes that serve, and these."""
    kernel, exact, packed = weight.shape[2:], full_float32(source.dtype), packed_weight(weight)
    tensors = y, source, history, packed, bias, residual
    options = kernel, tuple(multiplier), tuple(base), tuple(step), replicate, activation, config, exact
    key = _launch.signature(*tensors), options
    if _launch.repeat(key, tensors):
        return
    common = {
        "REPLICATE": replicate[0], "HAS_HISTORY": history is not None, "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None, "SILU": activation == SILU,
        "UPCAST": upcast(source.dtype), "PRECISION": "ieee" if exact else "tf32",
    }  # fmt: skip
    height, width = y.shape[3:]
    if config is None and use_boxes(source, history, packed, multiplier, replicate[1], (height, width)):
        if not long_offsets(y[:1, :, :1], None if residual is None else residual[:1, :, :1]):
            gpu = family(source.device)
            config = box_config(source.dtype, source.shape[1], y.shape[1], kernel, height, width, gpu)
    if config is not None:
        _by_boxes(tensors, kernel, multiplier, base, step, config, common, key)
    else:
        _by_pointers(tensors, kernel, multiplier, base, step, replicate[1], common, key)


_Tensors = tuple[Tensor, Tensor, "Tensor | None", Tensor, "Tensor | None", "Tensor | None"]


def _by_boxes(
    tensors: _Tensors,
    kernel: Sequence[int],
    multiplier: Sequence[int],
    base: Sequence[int],
    step: Sequence[int],
    config: BoxConfig,
    common: Mapping[str, Any],
    key: Any,
) -> None:
    y, source, history, packed, bias, residual = tensors
    batch, filters, frames, height, width = y.shape
    box = 1, 1, config.block_h, config.block_w, config.block_c
    weights = weight_boxes(packed, config.block_n, config.block_c)
    rest = weight_boxes(packed, config.block_n2, config.block_c) if config.block_n2 else weights
    tiles = cdiv(height, config.block_h), cdiv(width, config.block_w)
    grid = (batch * frames * tiles[0] * tiles[1] * cdiv(filters, config.filters),)
    row = source.shape[1] * source.shape[4] * source.element_size()
    group = group_rows(tiles[0], config.block_h * row, kernel[0])
    described = boxes_of(source, box)
    args = (
        described, described if history is None else boxes_of(history, box), weights, rest, y if bias is None else bias,
        y if residual is None else residual, y, group, frames, height, width, *tiles, filters, source.shape[1], source.shape[2],
        0 if history is None else history.shape[2], *base, *outer_strides(y), *outer_strides(residual), *kernel, multiplier[0], *step,
    )  # fmt: skip
    options = {
        "BLOCK_H": config.block_h, "BLOCK_W": config.block_w, "BLOCK_N": config.block_n, "BLOCK_N2": config.block_n2,
        "BLOCK_C": config.block_c, "TRANSPOSED": config.transposed, "HALVES": config.halves,
        "WAIT": wait_for_products(source.device, config.block_h > 1 and not config.transposed),
        "num_warps": config.num_warps, "num_stages": config.num_stages, **common,
    }  # fmt: skip
    _launch.launch(kernels._conv_box_kernel, grid, args, options, key, tensors)


def _by_pointers(
    tensors: _Tensors,
    kernel: Sequence[int],
    multiplier: Sequence[int],
    base: Sequence[int],
    step: Sequence[int],
    replicate_space: bool,
    common: Mapping[str, Any],
    key: Any,
) -> None:
    y, source, history, packed, bias, residual = tensors
    batch, filters, frames, height, width = y.shape
    tile = pointer_config(source.dtype, source.shape[1], filters, family(source.device))
    positions = batch * frames * height * width
    grid = (cdiv(positions, tile.block_m) * cdiv(filters, tile.block_n),)
    args = (
        source, source if history is None else history, packed, y if bias is None else bias, y if residual is None else residual,
        y, positions, frames, height, width, filters, source.shape[1], source.shape[2], 0 if history is None else history.shape[2],
        *source.shape[3:], *base, *outer_strides(source), *outer_strides(history), *outer_strides(y), *outer_strides(residual),
    )  # fmt: skip
    options = {
        **named("K", kernel), **named("MUL_", multiplier), **named("STEP_", step), "REPLICATE_SPACE": replicate_space,
        "FLAT": tile.flat, "LONG": long_offsets(y, source, history, residual), "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "BLOCK_C": tile.block_c, "WAIT": wait_for_products(source.device, history is not None),
        "num_warps": tile.num_warps, "num_stages": tile.num_stages, **common,
    }  # fmt: skip
    _launch.launch(kernels._conv_pointer_kernel, grid, args, options, key, tensors)
