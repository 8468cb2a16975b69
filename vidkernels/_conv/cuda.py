# SPDX-License-Identifier: Apache-2.0
"""Backend "cuda" of causal_conv3d: 3x3 taps in space in CUDA C++, for GPUs of compute capability 9.0. Here are allocation, layout
and the choice of tiles; `csrc/causal_conv3d` has no policy.

A box of the source is read once for all nine taps of a frame, where other backends read it once for each. Data gradients are
such convolutions too, where nothing is repeated; the others, and weight gradients, are Triton's, or torch's without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidkernels._conv.cudnn_graphs import packed_strides
from vidkernels._conv.geometry import NONE, REPLICATE, ZEROS, output_size
from vidkernels._conv.gradients import backward_by
from vidkernels._conv.results import delivered, empty_strided, laid_out

DTYPES = (torch.bfloat16, torch.float16)
# Filters of a program, and its blocks of 8 x 8 positions: 192 sums a thread or fewer.
_BLOCKS = {192: 4, 160: 4, 128: 6, 96: 8}
_ALIGNED = 8  # values of 16 bytes
STEP = 32  # channels of a box; one that they do not fill costs as much
# Of one frame, by the boxes that pass through all frames before the next do: what taps along time share stays in L2.
_GROUP_BYTES = 4 << 20


def tile_filters(filters: int) -> int | None:
    """Filters of a program: the most that divide all of them."""
    return next((count for count in _BLOCKS if filters % count == 0), None)


@lru_cache(maxsize=1024)
def _tile(filters: int, height: int, width: int, line_bytes: int) -> list[int]:
    """Filters, rows and columns of blocks, and rows of boxes in a group, for frames of a size whose rows have `line_bytes`."""
    tile = tile_filters(filters)
    assert tile is not None
    blocks = _BLOCKS[tile]

    def cost(rows: int) -> tuple[int, int]:
        """Boxes, then positions of one with its border."""
        high, wide = 8 * rows, 8 * blocks // rows
        return -(-height // high) * -(-width // wide), (high + 2) * (wide + 2)

    rows = min((rows for rows in range(1, blocks + 1) if blocks % rows == 0), key=cost)
    boxes = -(-height // (8 * rows))
    return [tile, rows, blocks // rows, max(1, min(boxes, _GROUP_BYTES // (8 * rows * line_bytes)))]


def filled(batch: int, filters: int, frames: int, height: int, width: int, multiprocessors: int) -> float:
    """How much of what the multiprocessors make, in as many rounds as it takes, is a result: the last round leaves some without
    a box, and boxes reach beyond a frame."""
    tile, rows, columns, _ = _tile(filters, height, width, 1)
    boxes = -(-height // (8 * rows)) * -(-width // (8 * columns))
    rounds = max(1, -(-batch * frames * boxes * (filters // tile) // multiprocessors))
    return batch * frames * height * width * filters / (rounds * multiprocessors * 64 * rows * columns * tile)


def _is_readable(x: Tensor) -> bool:
    """Whether the kernel reads and writes x where it is: channels lie next to each other, everything else in steps of 16 bytes,
    and the values of a frame are less than 2^31 apart."""
    if x.is_contiguous(memory_format=torch.channels_last_3d):  # most are; the rest takes 4 us of the host
        return x.shape[1] % _ALIGNED == 0 and x.data_ptr() % 16 == 0
    if x.data_ptr() % 16 or (x.shape[1] > 1 and x.stride(1) != 1):
        return False
    if (x.shape[3] - 1) * x.stride(3) + (x.shape[4] - 1) * x.stride(4) >= 2**31 - x.shape[1]:
        return False
    return all(x.shape[axis] == 1 or x.stride(axis) % _ALIGNED == 0 for axis in (0, 2, 3, 4))


def _readable(x: Tensor | None) -> Tensor | None:
    """x itself if the kernel reads it, else a copy in channels_last_3d (a layout change, no padding)."""
    return x if x is None or _is_readable(x) else x.clone(memory_format=torch.channels_last_3d)


class _Plan(NamedTuple):
    """Of a convolution: size and strides of its result, padding in front, and the tile."""

    size: list[int]
    strides: list[int]
    before: list[int]
    tile: list[int]


@lru_cache(maxsize=1024)
def _plan(image: Sequence[int], weight: Sequence[int], padding: Sequence[int], itemsize: int) -> _Plan:
    ones = 1, 1, 1
    size = [image[0], weight[0], *output_size(image[2:], weight[2:], ones, ones, padding)]
    tile = _tile(weight[0], size[3], size[4], image[1] * image[4] * itemsize)
    return _Plan(size, packed_strides(size), [padding[0], padding[2], padding[4]], tile)


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
    plan = _plan(x.shape, weight.shape, tuple(padding), x.element_size())
    y = out if out is not None and _is_readable(out) else empty_strided(x, plan.size, plan.strides)
    tensors = y, _readable(x), weight, bias, _readable(history), _readable(residual)
    torch.ops.vidkernels.causal_conv3d_box_out.default(
        *tensors, plan.before, time_mode, space_mode, activation, plan.tile
    )
    return delivered(y, x, out)


def _others() -> ModuleType:
    """Who has the gradients that the kernel does not compute."""
    from vidkernels import _library

    return importlib.import_module(
        f"vidkernels.{'_conv.aten' if _library.triton_missing() else 'triton.causal_conv3d'}"
    )


def causal_conv3d_dgrad(
    grad: Tensor, weight: Tensor, input_size: Sequence[int], history_frames: int, *rule: Any
) -> tuple[Tensor, Tensor | None]:
    """See `_conv.gradients`: x[v] meets output v + before - k through tap k, so that the mirrored kernel with the rest of its
    extent in front gives its gradient. The history is what x is further on."""
    _, _, padding, time_mode, space_mode = rule
    repeats = time_mode == REPLICATE and (padding[0] > history_frames or padding[1] > 0)
    repeats |= space_mode == REPLICATE and any(padding[2:])
    batch, channels, frames, height, width = input_size
    if repeats or tile_filters(channels) is None or grad.shape[1] % _ALIGNED:
        dx, dhistory = _others().causal_conv3d_dgrad(grad, weight, input_size, history_frames, *rule)
        return dx, dhistory
    source, mirrored = _readable(grad), weight.flip(2, 3, 4).transpose(0, 1)
    tile = _tile(channels, height, width, grad.shape[1] * grad.shape[4] * grad.element_size())

    def gradient(count: int, past: int) -> Tensor:
        """Of `count` frames, the first of them `past` frames in front of x."""
        size = batch, channels, count, height, width
        result = empty_strided(grad, size, packed_strides(size))
        front, top, left = (k - 1 - p for k, p in zip(weight.shape[2:], padding[::2], strict=True))
        tensors, before = (result, source, mirrored, None, None, None), [front + past, top, left]
        torch.ops.vidkernels.causal_conv3d_box_out.default(*tensors, before, ZEROS, ZEROS, NONE, tile)
        return laid_out(result, grad)

    return gradient(frames, 0), gradient(history_frames, history_frames) if history_frames else None


def causal_conv3d_wgrad(grad: Tensor, x: Tensor, history: Tensor | None, kernel: Sequence[int], *rule: Any) -> Tensor:
    """See `_conv.gradients`."""
    dweight: Tensor = _others().causal_conv3d_wgrad(grad, x, history, kernel, *rule)
    return dweight


causal_conv3d_bwd = backward_by(causal_conv3d_dgrad, causal_conv3d_wgrad)
