# SPDX-License-Identifier: Apache-2.0
"""Launchers of the causal convolution's Triton kernels: forward, data gradient, weight gradient.

All three are correlations of channels-last tensors. The data gradient runs the forward's kernel on the gradient with
reversed taps: one launch per residue of the stride, and small launches for the gradient of repeated frames, rows and
columns, which is added to the edge they repeat.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vidkernels import _env
from vidkernels._conv.geometry import REPLICATE, SILU, full_float32, is_channels_last, output_size
from vidkernels.triton import _conv_kernels as kernels
from vidkernels.triton import _conv_wgrad as wgrad_kernels
from vidkernels.triton._conv_configs import (
    BoxConfig,
    box_config,
    family,
    group_rows,
    multiprocessors,
    pointer_config,
    use_boxes,
    wgrad_box_config,
)

_AXES = (2, 3, 4)


def _channels_last(x: Tensor | None) -> Tensor | None:
    """x itself if its channels lie next to each other, else a copy in channels_last_3d (a layout change, no padding)."""
    if x is None or x.stride(1) == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last_3d)


def _packed(weight: Tensor) -> Tensor:
    """[N, R, kt, kh, kw] as [N, taps, R]; no copy for a weight in channels_last_3d."""
    return weight.permute(0, 2, 3, 4, 1).contiguous().flatten(1, 3)


def _strides(x: Tensor | None) -> tuple[int, int, int, int]:
    """Batch, frame, row, column."""
    return (0, 0, 0, 0) if x is None else (x.stride(0), *x.stride()[2:])


def _long(*tensors: Tensor | None) -> bool:
    """Whether an element of one of them lies 2^31 or more from its first."""
    spans = (sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) for x in tensors if x is not None)
    return max(spans) >= 1 << 31


def _named(prefix: str, values: Sequence[int]) -> dict[str, int]:
    """Compile-time arguments along time, rows and columns, such as KT, KH and KW."""
    return {f"{prefix}{axis}": value for axis, value in zip("THW", values, strict=True)}


def _upcast(dtype: torch.dtype) -> bool:
    """Triton's interpreter multiplies the bit patterns of bfloat16."""
    return _env.TRITON_INTERPRET and dtype == torch.bfloat16


def _wait(device: torch.device, through_registers: bool) -> bool:
    """Whether products must be waited for one by one, see `_conv_kernels.product`."""
    return through_registers and family(device) == "sm_90" and not _env.TRITON_INTERPRET


def _boxes(x: Tensor, block: Sequence[int]) -> Any:
    """Host-side descriptor of x as [B, T, H, W, C] with boxes of one frame."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    view = x.permute(0, 2, 3, 4, 1)
    strides, extent = [1], -(-view.shape[4] // 16) * 16
    for axis in (3, 2, 1, 0):  # the stride of an axis of length 1 is never used, but must look usable
        strides.append(view.stride(axis) if view.shape[axis] > 1 else extent)
        extent = strides[-1] * view.shape[axis]
    return TensorDescriptor(view, list(view.shape), strides[::-1], list(block))


def _weight_boxes(weight: Tensor, block: Sequence[int]) -> Any:
    """The same of weights as [N, taps, R], one tap each."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(weight, list(weight.shape), list(weight.stride()), list(block))


def _correlate(
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
) -> None:
    """y[o] = epilogue(sum over k of source[o * multiplier + base + k * step] @ weight[k]); y is a view with any strides but
    the channels', `weight` [N, R, kt, kh, kw], `replicate` in (time, space)."""
    kernel = weight.shape[2:]
    packed = _packed(weight)
    common = {
        "REPLICATE": replicate[0], "HAS_HISTORY": history is not None, "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None, "SILU": activation == SILU,
        "UPCAST": _upcast(source.dtype), "PRECISION": "ieee" if full_float32(source.dtype) else "tf32",
    }  # fmt: skip
    batch, filters, frames, height, width = y.shape
    bias_or, residual_or = y if bias is None else bias, y if residual is None else residual
    outer = *_strides(y), *_strides(residual)
    past = 0 if history is None else history.shape[2]
    boxes = use_boxes(source, history, packed, multiplier, replicate[1], (height, width))
    if boxes and not _long(y[:1, :, :1], None if residual is None else residual[:1, :, :1]):
        config = box_config(source.dtype, source.shape[1], filters, height, width, family(source.device))
        box, weights = (1, 1, config.block_h, config.block_w, config.block_c), (config.block_n, 1, config.block_c)
        tiles = triton.cdiv(height, config.block_h), triton.cdiv(width, config.block_w)
        grid = (batch * frames * tiles[0] * tiles[1] * triton.cdiv(filters, config.block_n),)
        row = source.shape[1] * source.shape[4] * source.element_size()
        group = group_rows(tiles[0], config.block_h * row, kernel[0])
        described = _boxes(source, box)
        kernels._conv_box_kernel[grid](
            described, described if history is None else _boxes(history, box), _weight_boxes(packed, weights),
            bias_or, residual_or, y, group, frames, height, width, *tiles, filters, source.shape[1],
            source.shape[2], past, *base, *outer, *kernel, multiplier[0], *step, BLOCK_H=config.block_h, BLOCK_W=config.block_w,
            BLOCK_N=config.block_n, BLOCK_C=config.block_c, WAIT=_wait(source.device, config.block_h > 1),
            num_warps=config.num_warps, num_stages=config.num_stages, **common,
        )  # fmt: skip
        return
    config = pointer_config(source.dtype, source.shape[1], filters, family(source.device))
    positions = batch * frames * height * width
    grid = (triton.cdiv(positions, config.block_m) * triton.cdiv(filters, config.block_n),)
    kernels._conv_pointer_kernel[grid](
        source, source if history is None else history, packed, bias_or, residual_or, y, positions, frames, height, width,
        filters, source.shape[1], source.shape[2], past, *source.shape[3:], *base, *_strides(source), *_strides(history),
        *outer, **_named("K", kernel), **_named("MUL_", multiplier), **_named("STEP_", step), REPLICATE_SPACE=replicate[1],
        FLAT=config.flat, LONG=_long(y, source, history, residual), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_C=config.block_c, WAIT=_wait(source.device, history is not None),
        num_warps=config.num_warps, num_stages=config.num_stages, **common,
    )  # fmt: skip


def causal_conv3d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
    activation: int,
    out: Tensor | None = None,
) -> Tensor:
    """See `ops.causal_conv3d`."""
    y = out
    if out is None or (out.stride(1) != 1 and out.shape[1] > 1):
        size = [x.shape[0], weight.shape[0], *output_size(x.shape[2:], weight.shape[2:], stride, dilation, padding)]
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    before = [-padding[0], -padding[2], -padding[4]]
    replicate = time_mode == REPLICATE, space_mode == REPLICATE
    inputs = _channels_last(x), _channels_last(history), weight, bias, _channels_last(residual)
    _correlate(y, *inputs, stride, before, dilation, replicate, activation)
    if out is None:
        return y if is_channels_last(x) else y.contiguous()
    return out if y is out else out.copy_(y)


def _regions(size: int, before: int, behind: int, history: int, replicate: bool) -> list[tuple[int, int, int, int]]:
    """Parts of one axis of the padded input that have a gradient: (first coordinate, count, target, copies).

    `copies` is 1 for coordinates that exist, from `target` on; otherwise the part repeats the one at `target`. Coordinates
    below 0 down to -history exist too.
    """
    parts = [(-history, history + size, -history, 1)]
    if replicate:
        parts.append((-before, before - history, -history, 0))
        parts.append((size, behind, size - 1, 0))
    return [part for part in parts if part[1] > 0]


def _taps_of(residue: int, kernel: int, stride: int, dilation: int) -> tuple[int, int] | None:
    """First tap k with k * dilation = residue (mod stride) and the distance to the next such tap; None without one."""
    first = next((k for k in range(kernel) if (k * dilation - residue) % stride == 0), None)
    return None if first is None else (first, stride // math.gcd(stride, dilation))


def _scatter(
    out: Tensor,
    grad: Tensor,
    weight: Tensor,
    start: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
) -> None:
    """out[v] = sum over taps of grad[(start + v + before - k * dilation) / stride] where that is whole, any strides of out.

    Coordinates of one residue of the stride meet every `stride / gcd`-th tap: a correlation with fewer taps.
    """
    for phase in itertools.product(*(range(s) for s in stride)):
        view, taps, base, step = out, weight, [], []
        for axis in range(3):
            view = view[(slice(None),) * _AXES[axis] + (slice(phase[axis], None, stride[axis]),)]
            shifted = start[axis] + phase[axis] + before[axis]
            found = _taps_of(shifted % stride[axis], weight.shape[_AXES[axis]], stride[axis], dilation[axis])
            if found is None:
                taps = None
                break
            first, distance = found
            taps = taps[(slice(None),) * _AXES[axis] + (slice(first, None, distance),)]
            base.append((shifted - first * dilation[axis]) // stride[axis])
            step.append(-distance * dilation[axis] // stride[axis])
        if taps is None:
            out[(slice(None),) * 2 + tuple(slice(p, None, s) for p, s in zip(phase, stride, strict=True))].zero_()
        elif view.numel():
            _correlate(view, grad, None, taps, None, None, (1, 1, 1), base, step, (False, False), 0)


def causal_conv3d_dgrad(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    history_frames: int,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
) -> tuple[Tensor, Tensor]:
    """See `ops.causal_conv3d`: gradients of x and history, in the format of `grad`."""
    channels_last = is_channels_last(grad)
    grad, transposed = _channels_last(grad), weight.transpose(0, 1)
    batch, channels, frames, height, width = input_size
    options = {"dtype": grad.dtype, "device": grad.device, "memory_format": torch.channels_last_3d}
    dx = torch.empty(list(input_size), **options)
    dhistory = torch.empty([batch, channels, history_frames, height, width], **options)
    front, back, top, bottom, left, right = padding
    space = space_mode == REPLICATE
    times = _regions(frames, front, back, history_frames, time_mode == REPLICATE)
    areas = itertools.product(_regions(height, top, bottom, 0, space), _regions(width, left, right, 0, space))
    before = (front, top, left)
    for time, rows, columns in ((t, *area) for area in areas for t in times):
        start = [time[0], rows[0], columns[0]]
        if time[3] and rows[3] and columns[3]:
            _scatter(dx, grad, transposed, [0, start[1], start[2]], stride, dilation, before)
            if history_frames:
                _scatter(dhistory, grad, transposed, [-history_frames, start[1], start[2]], stride, dilation, before)
            continue
        size = [batch, channels, time[1], rows[1], columns[1]]
        edge = torch.empty(size, dtype=torch.float32, device=grad.device, memory_format=torch.channels_last_3d)
        _scatter(edge, grad, transposed, start, stride, dilation, before)
        _add_edge(dx, dhistory, edge, (time, rows, columns))
    return (dx, dhistory) if channels_last else (dx.contiguous(), dhistory.contiguous())


def _add_edge(dx: Tensor, dhistory: Tensor, edge: Tensor, parts: Sequence[tuple[int, int, int, int]]) -> None:
    """Adds the gradient of repeated coordinates to what they repeat; frames below 0 are those of the history."""
    (_, frames, frame, exists), *space = parts
    for axis, (_, _, _, copies) in zip(_AXES, parts, strict=True):
        if not copies:
            edge = edge.sum(axis, keepdim=True)
    place = [slice(target, target + count if copies else target + 1) for _, count, target, copies in space]
    history = dhistory.shape[2]
    if exists:
        dx[:, :, :, place[0], place[1]] += edge[:, :, history:]
        dhistory[:, :, :, place[0], place[1]] += edge[:, :, :history]
    elif frame < 0:
        dhistory[:, :, :1, place[0], place[1]] += edge
    else:
        dx[:, :, frame : frame + 1, place[0], place[1]] += edge


def _wgrad_part(
    partial_of: Callable[[tuple[int, int], int], tuple[Tensor, int]],
    grad: Tensor,
    source: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    base: Sequence[int],
    clamp: tuple[bool, bool],
    space_replicate: bool,
) -> Tensor:
    """Partial sums [parts, K, taps * C] over the output frames whose tap falls into `source`."""
    batch, filters, frames, height, width = grad.shape
    channels = source.shape[1]
    common = {
        "CLAMP_LOWER": clamp[0], "CLAMP_UPPER": clamp[1],
        "UPCAST": _upcast(grad.dtype), "PRECISION": "ieee" if full_float32(grad.dtype) else "tf32",
    }  # fmt: skip
    taps = math.prod(kernel)
    if use_boxes(source, None, grad, stride, space_replicate, (height, width)):
        config: BoxConfig = wgrad_box_config(grad.dtype, channels, filters, height, width, family(grad.device))
        tiles = triton.cdiv(height, config.block_h), triton.cdiv(width, config.block_w)
        blocks = triton.cdiv(filters, config.block_n), taps * triton.cdiv(channels, config.block_c)
        partial, parts = partial_of(blocks, batch * frames * tiles[0] * tiles[1])
        space = (1, 1, config.block_h, config.block_w)
        wgrad_kernels._wgrad_box_kernel[(*blocks, parts)](
            _boxes(grad, (*space, config.block_n)), _boxes(source, (*space, config.block_c)), partial, batch, frames, *tiles,
            filters, channels, source.shape[2], *base, parts, *kernel, stride[0], *dilation,
            BLOCK_H=config.block_h, BLOCK_W=config.block_w, BLOCK_N=config.block_n, BLOCK_C=config.block_c,
            WAIT=_wait(grad.device, config.block_h > 1), num_warps=config.num_warps, num_stages=config.num_stages, **common,
        )  # fmt: skip
        return partial
    config = pointer_config(grad.dtype, channels, filters, family(grad.device), wgrad=True)
    columns = (
        kernel[0] * triton.cdiv(kernel[1] * kernel[2] * channels, config.block_c)
        if config.flat
        else taps * triton.cdiv(channels, config.block_c)
    )
    blocks = triton.cdiv(filters, config.block_n), columns
    partial, parts = partial_of(blocks, triton.cdiv(batch * frames * height * width, config.block_m))
    wgrad_kernels._wgrad_pointer_kernel[(*blocks, parts)](
        grad, source, partial, batch, frames, height, width, filters, channels, *source.shape[2:], *base, parts,
        *_strides(grad), *_strides(source), **_named("K", kernel), **_named("MUL_", stride), **_named("STEP_", dilation),
        REPLICATE_SPACE=space_replicate, FLAT=config.flat,
        LONG=_long(grad, source),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_C=config.block_c,
        num_warps=config.num_warps, num_stages=config.num_stages, **common,
    )  # fmt: skip
    return partial


def causal_conv3d_wgrad(
    grad: Tensor,
    x: Tensor,
    history: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
) -> Tensor:
    """See `ops.causal_conv3d`: [K, C, kt, kh, kw] in float32."""
    grad, x, history = _channels_last(grad), _channels_last(x), _channels_last(history)
    filters, channels, taps = grad.shape[1], x.shape[1], math.prod(kernel)

    def partial_of(blocks: tuple[int, int], steps: int) -> tuple[Tensor, int]:
        """Parts of the sum: as many as keep the device busy twice over, each of at least four steps."""
        wanted = triton.cdiv(2 * multiprocessors(grad.device), blocks[0] * blocks[1])
        parts = max(1, min(wanted, steps // 4))
        return torch.empty(parts, filters, taps * channels, dtype=torch.float32, device=grad.device), parts

    replicate, space = time_mode == REPLICATE, space_mode == REPLICATE
    base = [-padding[0], -padding[2], -padding[4]]
    shape = list(kernel), list(stride), list(dilation)
    total = _wgrad_part(partial_of, grad, x, *shape, base, (replicate and history is None, replicate), space).sum(0)
    if history is not None:
        older = [base[0] + history.shape[2], *base[1:]]
        total += _wgrad_part(partial_of, grad, history, *shape, older, (replicate, False), space).sum(0)
    return total.view(filters, *kernel, channels).permute(0, 4, 1, 2, 3).contiguous()
