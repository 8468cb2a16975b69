# SPDX-License-Identifier: Apache-2.0
"""Launchers of the causal convolution's Triton kernels: forward, data gradient, weight gradient.

All three are correlations of channels-last tensors. The data gradient runs the forward's kernel on the gradient with
reversed taps: one launch per residue of the stride, and small launches for the gradient of repeated frames, rows and
columns, which is added to the edge they repeat.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidkernels._conv.geometry import REPLICATE, full_float32, is_channels_last
from vidkernels._conv.gradients import backward_by
from vidkernels._conv.results import delivered, target
from vidkernels.triton import _conv_wgrad as wgrad_kernels
from vidkernels.triton import _launch
from vidkernels.triton._conv_configs import BoxConfig, pointer_config, use_boxes, wgrad_box_config
from vidkernels.triton._conv_fold import Space, fold_or_correlate, packed_bands, packs_for_weights
from vidkernels.triton._correlate import (
    boxes_of,
    long_offsets,
    named,
    outer_strides,
    upcast,
    wait_for_products,
)
from vidkernels.triton._device import family, multiprocessors
from vidkernels.triton._sizes import cdiv

_AXES = (2, 3, 4)


def _channels_last(x: Tensor | None) -> Tensor | None:
    """x itself if its channels lie next to each other, else a copy in channels_last_3d (a layout change, no padding)."""
    if x is None or x.stride(1) == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last_3d)


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
    y = target(x, weight, stride, dilation, padding, out)
    before = [-padding[0], -padding[2], -padding[4]]
    replicate = time_mode == REPLICATE, space_mode == REPLICATE
    inputs = _channels_last(x), _channels_last(history), weight, bias, _channels_last(residual)
    fold_or_correlate(y, *inputs, stride, before, dilation, replicate, activation)
    return delivered(y, x, out)


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


class _Phase(NamedTuple):
    """Coordinates of one residue of the stride: which they are, the taps that they meet (None: there are none), and the
    correlation's base and step."""

    residue: tuple[int, ...]
    taps: tuple[slice, ...] | None
    base: tuple[int, ...]
    step: tuple[int, ...]


def _taps_of(residue: int, kernel: int, stride: int, dilation: int) -> tuple[int, int] | None:
    """First tap k with k * dilation = residue (mod stride) and the distance to the next such tap; None without one."""
    first = next((k for k in range(kernel) if (k * dilation - residue) % stride == 0), None)
    return None if first is None else (first, stride // math.gcd(stride, dilation))


@lru_cache(maxsize=1024)
def _phases(
    offset: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], kernel: tuple[int, ...]
) -> tuple[_Phase, ...]:
    """Of outputs v that sum grad[(offset + v - k * dilation) / stride] over the taps k where that is whole."""
    phases = []
    for residue in itertools.product(*map(range, stride)):
        taps, base, step = [], [], []
        for axis in range(3):
            shifted = offset[axis] + residue[axis]
            found = _taps_of(shifted % stride[axis], kernel[axis], stride[axis], dilation[axis])
            if found is not None:
                first, distance = found
                taps.append(slice(first, None, distance))
                base.append((shifted - first * dilation[axis]) // stride[axis])
                step.append(-distance * dilation[axis] // stride[axis])
        phases.append(_Phase(residue, tuple(taps) if len(taps) == 3 else None, tuple(base), tuple(step)))
    return tuple(phases)


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
    offset, whole = tuple(map(sum, zip(start, before, strict=True))), slice(None)
    phases = _phases(offset, tuple(stride), tuple(dilation), tuple(weight.shape[2:]))
    for residue, taps, base, step in phases:
        view, used = out, weight
        if len(phases) > 1:
            view = out[(whole, whole, *(slice(p, None, s) for p, s in zip(residue, stride, strict=True)))]
            used = weight if taps is None else weight[(whole, whole, *taps)]
        if taps is None:
            view.zero_()
        elif view.numel():
            fold_or_correlate(view, grad, None, used, None, None, (1, 1, 1), base, step, (False, False), 0)


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
) -> tuple[Tensor, Tensor | None]:
    """See `_conv.gradients`: gradients of x and history, in the format of `grad`."""
    channels_last = is_channels_last(grad)
    grad, transposed = _channels_last(grad), weight.transpose(0, 1)
    batch, channels, frames, height, width = input_size
    options = {"dtype": grad.dtype, "device": grad.device, "memory_format": torch.channels_last_3d}
    dx = torch.empty(input_size, **options)
    dhistory = torch.empty([batch, channels, history_frames, height, width], **options) if history_frames else None
    front, back, top, bottom, left, right = padding
    space = space_mode == REPLICATE
    times = _regions(frames, front, back, history_frames, time_mode == REPLICATE)
    areas = itertools.product(_regions(height, top, bottom, 0, space), _regions(width, left, right, 0, space))
    before = (front, top, left)
    for time, rows, columns in ((t, *area) for area in areas for t in times):
        start = [time[0], rows[0], columns[0]]
        if time[3] and rows[3] and columns[3]:
            _scatter(dx, grad, transposed, [0, start[1], start[2]], stride, dilation, before)
            if dhistory is not None:
                _scatter(dhistory, grad, transposed, [-history_frames, start[1], start[2]], stride, dilation, before)
            continue
        size = [batch, channels, time[1], rows[1], columns[1]]
        edge = torch.empty(size, dtype=torch.float32, device=grad.device, memory_format=torch.channels_last_3d)
        _scatter(edge, grad, transposed, start, stride, dilation, before)
        _add_edge(dx, dhistory, edge, (time, rows, columns))
    if channels_last:
        return dx, dhistory
    return dx.contiguous(), None if dhistory is None else dhistory.contiguous()


def _add_edge(dx: Tensor, dhistory: Tensor | None, edge: Tensor, parts: Sequence[tuple[int, int, int, int]]) -> None:
    """Adds the gradient of repeated coordinates to what they repeat; frames below 0 are those of the history."""
    (_, frames, frame, exists), *space = parts
    for axis, (_, _, _, copies) in zip(_AXES, parts, strict=True):
        if not copies:
            edge = edge.sum(axis, keepdim=True)
    place = [slice(target, target + count if copies else target + 1) for _, count, target, copies in space]
    if exists:
        history = 0 if dhistory is None else dhistory.shape[2]
        dx[:, :, :, place[0], place[1]] += edge[:, :, history:]
        if dhistory is not None:
            dhistory[:, :, :, place[0], place[1]] += edge[:, :, :history]
    elif frame < 0 and dhistory is not None:
        dhistory[:, :, :1, place[0], place[1]] += edge
    else:
        dx[:, :, frame : frame + 1, place[0], place[1]] += edge


def _empty_partial(grad: Tensor, entries: int, blocks: tuple[int, int], steps: int) -> tuple[Tensor, int]:
    """For parts of the sum: as many as keep the device busy twice over, each of at least four steps."""
    wanted = cdiv(2 * multiprocessors(grad.device), blocks[0] * blocks[1])
    parts = max(1, min(wanted, steps // 4))
    return torch.empty(parts, grad.shape[1], entries, dtype=torch.float32, device=grad.device), parts


def _wgrad_part(
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
    common = {
        "CLAMP_LOWER": clamp[0], "CLAMP_UPPER": clamp[1],
        "UPCAST": upcast(grad.dtype), "PRECISION": "ieee" if full_float32(grad.dtype) else "tf32",
    }  # fmt: skip
    if use_boxes(source, None, grad, stride, space_replicate, (grad.shape[3], grad.shape[4])):
        return _wgrad_boxes(grad, source, kernel, stride, dilation, base, common)
    return _wgrad_pointers(grad, source, kernel, stride, dilation, base, space_replicate, common)


def _wgrad_boxes(
    grad: Tensor,
    source: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    base: Sequence[int],
    common: dict[str, Any],
) -> Tensor:
    batch, filters, frames, height, width = grad.shape
    channels, taps = source.shape[1], math.prod(kernel)
    config: BoxConfig = wgrad_box_config(grad.dtype, channels, filters, height, width, family(grad.device))
    tiles = cdiv(height, config.block_h), cdiv(width, config.block_w)
    blocks = cdiv(filters, config.block_n), taps * cdiv(channels, config.block_c)
    partial, parts = _empty_partial(grad, taps * channels, blocks, batch * frames * tiles[0] * tiles[1])
    tensors = grad, source, partial
    shape = tuple(kernel), tuple(base), stride[0], tuple(dilation)
    key = _launch.signature(*tensors), config, *shape, *common.values()
    if _launch.repeat(key, tensors):
        return partial
    space = (1, 1, config.block_h, config.block_w)
    args = (
        boxes_of(grad, (*space, config.block_n)), boxes_of(source, (*space, config.block_c)), partial, batch, frames, *tiles,
        filters, channels, source.shape[2], *base, parts, *kernel, stride[0], *dilation,
    )  # fmt: skip
    options = {
        "BLOCK_H": config.block_h, "BLOCK_W": config.block_w, "BLOCK_N": config.block_n, "BLOCK_C": config.block_c,
        "WAIT": wait_for_products(grad.device, config.block_h > 1), "num_warps": config.num_warps,
        "num_stages": config.num_stages, **common,
    }  # fmt: skip
    _launch.launch(wgrad_kernels._wgrad_box_kernel, (*blocks, parts), args, options, key, tensors)
    return partial


def _wgrad_pointers(
    grad: Tensor,
    source: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    base: Sequence[int],
    space_replicate: bool,
    common: dict[str, Any],
) -> Tensor:
    batch, filters, frames, height, width = grad.shape
    channels, taps = source.shape[1], math.prod(kernel)
    config = pointer_config(grad.dtype, channels, filters, family(grad.device), wgrad=True)
    if config.flat:
        columns = kernel[0] * cdiv(kernel[1] * kernel[2] * channels, config.block_c)
    else:
        columns = taps * cdiv(channels, config.block_c)
    blocks, steps = (cdiv(filters, config.block_n), columns), cdiv(batch * frames * height * width, config.block_m)
    partial, parts = _empty_partial(grad, taps * channels, blocks, steps)
    tensors = grad, source, partial
    shape = tuple(kernel), tuple(base), tuple(stride), tuple(dilation), space_replicate
    key = _launch.signature(*tensors), config, *shape, *common.values()
    if _launch.repeat(key, tensors):
        return partial
    args = (
        grad, source, partial, batch, frames, height, width, filters, channels, *source.shape[2:], *base, parts,
        *outer_strides(grad), *outer_strides(source),
    )  # fmt: skip
    options = {
        **named("K", kernel), **named("MUL_", stride), **named("STEP_", dilation), "REPLICATE_SPACE": space_replicate,
        "FLAT": config.flat, "LONG": long_offsets(grad, source), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c, "num_warps": config.num_warps, "num_stages": config.num_stages, **common,
    }  # fmt: skip
    _launch.launch(wgrad_kernels._wgrad_pointer_kernel, (*blocks, parts), args, options, key, tensors)
    return partial


def _wgrad_of(
    grad: Tensor,
    source: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    base: Sequence[int],
    clamp: tuple[bool, bool],
    space_replicate: bool,
) -> Tensor:
    """[K, taps * C]: the sum of `_wgrad_part`; few channels are packed with their taps, a band of rows at a time."""
    filters = grad.shape[1]
    if not packs_for_weights(grad, source, kernel):
        partial = _wgrad_part(grad, source, kernel, stride, dilation, base, clamp, space_replicate)
        return partial.sum(0) if len(partial) > 1 else partial[0]
    total = None
    space = Space(kernel[1:], base[1:], stride[1:], dilation[1:], space_replicate)
    for band, (packed,) in packed_bands(grad.shape[3:], space, source):
        shape = [kernel[0], 1, 1], [stride[0], 1, 1], [dilation[0], 1, 1], [base[0], 0, 0]
        added = _wgrad_part(grad[(..., *band)], packed, *shape, clamp, False).sum(0)
        total = added if total is None else total.add_(added)
    used = source.shape[1] * math.prod(kernel[1:])
    return total.view(filters, kernel[0], -1)[..., :used].reshape(filters, -1)


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
    """See `_conv.gradients`: [K, C, kt, kh, kw] in float32, channels last."""
    grad, x, history = _channels_last(grad), _channels_last(x), _channels_last(history)
    replicate, space = time_mode == REPLICATE, space_mode == REPLICATE
    base = [-padding[0], -padding[2], -padding[4]]
    shape = list(kernel), list(stride), list(dilation)
    total = _wgrad_of(grad, x, *shape, base, (replicate and history is None, replicate), space)
    if history is not None:
        older = [base[0] + history.shape[2], *base[1:]]
        total += _wgrad_of(grad, history, *shape, older, (replicate, False), space)
    return total.view(grad.shape[1], *kernel, x.shape[1]).permute(0, 4, 1, 2, 3)


causal_conv3d_bwd = backward_by(causal_conv3d_dgrad, causal_conv3d_wgrad)
