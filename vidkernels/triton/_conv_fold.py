# SPDX-License-Identifier: Apache-2.0
"""Correlations with few channels or few filters, where boxes would be mostly empty: the taps in space become channels of
the source (27 of an image of 3), or filters whose results neighbours add up. What is left has taps along time alone.

Both need a workspace. It stays within `WORKSPACE` bytes, since frames, rows and clips are served in parts; boxes, and with
them the order of every sum, are chosen from the whole frame, so that any parts give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vidkernels._conv.geometry import NONE, SILU
from vidkernels.triton import _conv_fold_kernels as kernels
from vidkernels.triton import _launch
from vidkernels.triton._conv_configs import boxes_serve, folded_box_config, use_boxes
from vidkernels.triton._correlate import correlate, long_offsets, outer_strides
from vidkernels.triton._sizes import cdiv, next_power_of_2

# One part where the clip allows. H200, bfloat16, us at 32 / 64 / 128 / 512 MB as the host starts it, and from a CUDA graph: 3 to
# 128 channels at 17x256x256 305 / 268 / 208 / 205, graph 178 / 172 / 167 / 175; 128 to 3 there 449 / 391 / 293 / 275, graph 301 /
# 285 / 275 / 265; 96 to 3 at 4x480x832 893 / 727 / 455 / 588, graph 470 / 440 / 418 / 407. Staying in the 50 MB of L2 gains
# nothing.
WORKSPACE = 128 << 20
_LANES = 64  # of folded taps: as many channels as one 128-byte line holds, as many filters as 256 bytes of sums
_MIN_FILTERS = 32  # results of fewer are smaller than the packed source
_MAX_FILTERS = 8  # more fill half a tile of 16 by themselves
_COLUMNS = 128  # of a box: a part of a row is no narrower


class Correlation(NamedTuple):
    """The arguments of `correlate`."""

    y: Tensor
    source: Tensor
    history: Tensor | None
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    multiplier: Sequence[int]
    base: Sequence[int]
    step: Sequence[int]
    replicate: tuple[bool, bool]
    activation: int


def fold_or_correlate(*args: object) -> None:
    """`correlate` of the same arguments, in one of the forms of this file where that pays."""
    call = Correlation(*args)  # type: ignore[arg-type]
    if folds_into_channels(call):
        _correlate_packed(call)
    elif folds_into_filters(call):
        _correlate_and_gather(call)
    else:
        correlate(*call)


class Space(NamedTuple):
    """Where taps read in rows and columns: how many, the first output's first, distances of outputs and of taps."""

    kernel: Sequence[int]
    base: Sequence[int]
    multiplier: Sequence[int]
    step: Sequence[int]
    replicate: bool


def _short_frames(call: Correlation) -> bool:
    """Whether offsets within a frame fit 32 bits."""
    tensors = call.y, call.source, call.history, call.residual
    return not long_offsets(*(x[:1, :, :1] for x in tensors if x is not None))


def _lanes(count: int) -> int:
    """Rounded up to steps of 32 bytes of 16-bit values, as bulk copies like them."""
    return cdiv(count, 16) * 16


def folds_into_channels(call: Correlation) -> bool:
    """Few channels, taps in space, and results that outweigh the packed source."""
    filters, channels, _, *space = call.weight.shape
    taps = math.prod(space)
    if taps == 1 or channels * taps > _LANES or filters < _MIN_FILTERS:
        return False
    return boxes_serve(call.source, call.y.shape[3:]) and _short_frames(call)


def folds_into_filters(call: Correlation) -> bool:
    """Few filters at stride 1 in space, zeros around, and sources read so often that passing sums on is less traffic.

    Bytes a position: boxes read the channels once a tap; here once a tap along time, then sums are written, read, and each
    read again in a sector of 32 bytes. 128 channels 3x3x3 to 3 filters: 6912 against 1312; an H100 took 1059 and 298 us.
    """
    filters, channels, frames, *space = call.weight.shape
    taps = math.prod(space)
    if taps == 1 or filters > _MAX_FILTERS or filters * taps > _LANES:
        return False
    if call.replicate[1] or call.multiplier[1] != 1 or call.multiplier[2] != 1:
        return False
    once = frames * channels * call.source.element_size()
    if once * taps < 2 * (once + 8 * _lanes(filters * taps) + 32 * taps) or channels * call.source.element_size() % 16:
        return False
    size = [part.stop - part.start for part in _whole_window(call)]
    if math.prod(size) > 2 * call.y.shape[3] * call.y.shape[4]:  # one column of results reads three
        return False
    return use_boxes(call.source, call.history, call.source, call.multiplier, False, size) and _short_frames(call)


def _needed_frames(call: Correlation) -> tuple[Tensor, Tensor | None, int]:
    """Source and history without the frames that no tap reads, and how many were cut off in front of the source."""
    reach = (call.weight.shape[2] - 1) * call.step[0]
    low = call.base[0] + min(reach, 0)
    high = call.base[0] + (call.y.shape[2] - 1) * call.multiplier[0] + max(reach, 0)
    last = call.source.shape[2] - 1
    first = min(max(low, 0), last)
    source, history = call.source[:, :, first : max(min(high, last), first) + 1], call.history
    if history is not None:
        history = history[:, :, max(history.shape[2] + low, 0) :] if low < 0 else None
    return source, history, first


def _bands(height: int, width: int, bytes_each: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of parts of a frame whose positions take `bytes_each` in all frames together. Nothing is computed
    twice: all that a part needs of its neighbours is packed with it."""
    columns = width
    if width * bytes_each > WORKSPACE:
        columns = max(_COLUMNS, WORKSPACE // bytes_each // _COLUMNS * _COLUMNS)
    parts = cdiv(height, max(1, WORKSPACE // (columns * bytes_each)))
    rows = cdiv(height, parts)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield slice(top, min(top + rows, height)), slice(left, min(left + columns, width))


def _pack(x: Tensor, space: Space, rows: slice, columns: slice) -> Tensor:
    """[B, lanes, T, rows, columns] in channels_last_3d: x at every tap in space of these rows and columns of the output."""
    batch, channels, frames = x.shape[:3]
    lanes, size = _lanes(channels * math.prod(space.kernel)), (rows.stop - rows.start, columns.stop - columns.start)
    packed = torch.empty((batch, frames, *size, lanes), dtype=x.dtype, device=x.device)
    first = space.base[0] + rows.start * space.multiplier[0], space.base[1] + columns.start * space.multiplier[1]
    shape = tuple(space.kernel), tuple(space.multiplier), tuple(space.step), space.replicate
    key = "pack", _launch.signature(x, packed), first, *shape
    if not _launch.repeat(key, (x, packed)):
        block, steps = 64, 4
        grid = (batch * frames * size[0] * cdiv(size[1], steps * block),)
        args = x, packed, frames, *size, *x.shape[3:], *first, *outer_strides(x)
        options = {
            "CHANNELS": channels, "KH": space.kernel[0], "KW": space.kernel[1], "MUL_H": space.multiplier[0],
            "MUL_W": space.multiplier[1], "STEP_H": space.step[0], "STEP_W": space.step[1],
            "REPLICATE_SPACE": space.replicate, "LANES": lanes, "BLOCK_M": block, "BLOCK_L": next_power_of_2(lanes),
            "STEPS": steps, "num_warps": 4,
        }  # fmt: skip
        _launch.launch(kernels.pack_kernel, grid, args, options, key, (x, packed))
    return packed.permute(0, 4, 1, 2, 3)


def packed_bands(
    size: Sequence[int], space: Space, *sources: Tensor | None
) -> Iterator[tuple[tuple[slice, slice], list[Tensor | None]]]:
    """Rows and columns of an output of `size` (height, width), and the sources packed for them; one band at a time."""
    given = [x for x in sources if x is not None]
    lanes, images = _lanes(given[0].shape[1] * math.prod(space.kernel)), sum(x.shape[0] * x.shape[2] for x in given)
    for rows, columns in _bands(*size, images * lanes * given[0].element_size()):
        yield (rows, columns), [None if x is None else _pack(x, space, rows, columns) for x in sources]


def _correlate_packed(call: Correlation) -> None:
    """Taps in space as channels: packed for a band of rows at a time, of all frames that are read."""
    y, weight, residual = call.y, call.weight, call.residual
    filters, channels, taps, *kernel = weight.shape
    used = channels * math.prod(kernel)
    folded = weight.new_zeros(filters, taps, _lanes(used))
    folded[..., :used].view(filters, taps, *kernel, channels).copy_(weight.permute(0, 2, 3, 4, 1))
    folded = folded.view(filters, taps, 1, 1, -1).permute(0, 4, 1, 2, 3)
    source, history, cut = _needed_frames(call)
    config = folded_box_config(source.dtype, folded.shape[1], filters, *y.shape[3:], residual is not None)
    space = Space(kernel, call.base[1:], call.multiplier[1:], call.step[1:], call.replicate[1])
    for band, (packed, past) in packed_bands(y.shape[3:], space, source, history):
        part = ..., *band
        correlate(
            y[part], packed, past, folded, call.bias, None if residual is None else residual[part],
            (call.multiplier[0], 1, 1), (call.base[0] - cut, 0, 0), (call.step[0], 1, 1),
            (call.replicate[0], False), call.activation, config,
        )  # fmt: skip


def packs_for_weights(grad: Tensor, source: Tensor, kernel: Sequence[int]) -> bool:
    """Whether the weight gradient of few channels is a product of boxes of `grad` and a packed source. Pointers would
    take an address for every channel of every tap, once for each 64 filters."""
    taps = math.prod(kernel[1:])
    if taps == 1 or source.shape[1] * taps > _LANES or grad.shape[1] < _MIN_FILTERS:
        return False
    if not use_boxes(grad, None, grad, (1, 1, 1), False, grad.shape[3:]):
        return False
    return not long_offsets(grad[:1, :, :1], source[:1, :, :1])


def _window(first: int, last: int, base: int, reach: int, size: int) -> slice:
    """Coordinates of the source, of `size`, that outputs [first, last) read with taps from `base` to `base + reach`; at least
    one, where all that they read lies outside."""
    start = min(max(first + base + min(reach, 0), 0), size - 1)
    return slice(start, max(min(last + base + max(reach, 0), size), start + 1))


def _reach(call: Correlation) -> list[int]:
    """From the first to the last tap, in rows and columns."""
    return [(taps - 1) * step for taps, step in zip(call.weight.shape[3:], call.step[1:], strict=True)]


def _whole_window(call: Correlation) -> list[slice]:
    """Rows and columns of the source that y reads."""
    axes = zip(call.y.shape[3:], call.base[1:], _reach(call), call.source.shape[3:], strict=True)
    return [_window(0, *axis) for axis in axes]


def _blocks(batch: int, frames: int, height: int, halo: int, rows_each: int, bytes_row: int) -> Iterator[list[slice]]:
    """Clips, frames and rows of y that are served together, of `height` rows whose sums are `rows_each` rows.

    A part computes the sums of `halo` rows once more, and reads kernel_t - 1 frames once more: about as many rows as frames.
    """
    rows_at_once, height_at_once, clips = max(1, WORKSPACE // bytes_row), height, 1
    if frames * rows_each <= rows_at_once:
        clips, frames_at_once = rows_at_once // (frames * rows_each), frames
    else:
        frames_at_once = min(frames, math.isqrt(rows_at_once))
        if rows_at_once // frames_at_once <= halo:
            frames_at_once = 1
        height_at_once = min(height, max(1, rows_at_once // frames_at_once - halo))
        if height_at_once == height:
            frames_at_once = max(1, rows_at_once // rows_each)
    steps = (batch, clips), (frames, frames_at_once), (height, height_at_once)
    even = [(size, cdiv(size, cdiv(size, most))) for size, most in steps]
    parts = [[slice(i, min(i + step, size)) for i in range(0, size, step)] for size, step in even]
    for clip in parts[0]:
        for frame in parts[1]:
            for row in parts[2]:
                yield [clip, frame, row]


def _gather(y: Tensor, sums: Tensor, residual: Tensor | None, call: Correlation, base: Sequence[int]) -> None:
    """y = epilogue of the sums of every tap in space; `base`: the first tap's place in `sums`."""
    batch, filters, frames, height, width = y.shape
    block, kernel = 128, call.weight.shape[3:]
    tensors = sums, call.bias, residual, y
    key = "gather", _launch.signature(*tensors), tuple(base), kernel, tuple(call.step[1:]), call.activation
    if _launch.repeat(key, tensors):
        return
    args = (
        sums, y if call.bias is None else call.bias, y if residual is None else residual, y, frames, height, width,
        *sums.shape[2:4], *base, *outer_strides(y), *outer_strides(residual),
    )  # fmt: skip
    options = {
        "FILTERS": filters, "KH": kernel[0], "KW": kernel[1], "STEP_H": call.step[1], "STEP_W": call.step[2],
        "HAS_BIAS": call.bias is not None, "HAS_RESIDUAL": residual is not None, "SILU": call.activation == SILU,
        "LANES": sums.shape[4], "BLOCK_M": block, "BLOCK_N": next_power_of_2(filters), "num_warps": 4,
    }  # fmt: skip
    grid = (batch * frames * height * cdiv(width, block),)
    _launch.launch(kernels.gather_kernel, grid, args, options, key, tensors)


def _correlate_and_gather(call: Correlation) -> None:
    """Taps in space as filters: sums of each in float32 where the source is, then for every output those around it."""
    weight, source, history = call.weight, call.source, call.history
    filters, channels, taps, *space = weight.shape
    lanes = _lanes(filters * math.prod(space))
    folded = weight.new_zeros(lanes, taps, channels)
    folded[: filters * math.prod(space)].view(*space, filters, taps, channels).copy_(weight.permute(3, 4, 0, 2, 1))
    folded = folded.view(lanes, taps, 1, 1, channels).permute(0, 4, 1, 2, 3)
    (height, reach), (whole, columns) = (call.y.shape[3], _reach(call)[0]), _whole_window(call)
    size = whole.stop - whole.start, columns.stop - columns.start
    config = folded_box_config(source.dtype, channels, lanes, *size, False)
    for clips, frames, rows in _blocks(
        call.y.shape[0], call.y.shape[2], height, abs(reach), size[0], size[1] * lanes * 4
    ):
        window = _window(rows.start, rows.stop, call.base[1], reach, source.shape[3])
        y, residual = (None if x is None else x[clips, :, frames, rows] for x in (call.y, call.residual))
        read, past = (None if x is None else x[clips, :, :, window, columns] for x in (source, history))
        shape = y.shape[0], y.shape[2], window.stop - window.start, size[1], lanes
        sums = torch.empty(shape, dtype=torch.float32, device=source.device)
        correlate(
            sums.permute(0, 4, 1, 2, 3), read, past, folded, None, None, (call.multiplier[0], 1, 1),
            (call.base[0] + frames.start * call.multiplier[0], 0, 0), (call.step[0], 1, 1), (call.replicate[0], False), NONE, config,
        )  # fmt: skip
        _gather(y, sums, residual, call, (rows.start + call.base[1] - window.start, call.base[2] - columns.start))
