# SPDX-License-Identifier: Apache-2.0
"""Which convolution kernel and which tile. Nothing here looks at the number of frames or clips: every chunking of a clip
must sum in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vidkernels._conv.geometry import full_float32
from vidkernels.triton._device import family
from vidkernels.triton._sizes import cdiv, next_power_of_2

_BOX_CHANNELS, _BOX_POSITIONS = 16, 64  # fewer leave a box mostly empty


@dataclass(frozen=True)
class BoxConfig:
    """A box of positions, filters and channels; warps and pipeline stages; filters of a second sum over the same boxes;
    whether sums are [filters, positions]."""

    block_h: int
    block_w: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    block_n2: int = 0
    transposed: bool = False

    @property
    def filters(self) -> int:
        """Of one program."""
        return self.block_n + self.block_n2

    @property
    def halves(self) -> bool:
        """Whether 128 sums a thread are stored in two parts: at once, with a residual, they would spill up to 48 bytes."""
        return self.block_h * self.block_w * self.block_n >= 128 * 32 * self.num_warps


@dataclass(frozen=True)
class PointerConfig:
    """Positions, filters, channels (or taps times channels if `flat`); warps and pipeline stages."""

    block_m: int
    block_n: int
    block_c: int
    flat: bool
    num_warps: int
    num_stages: int


def _describable(x: Tensor) -> bool:
    """Unit stride along channels and 16-byte steps along everything else, as bulk copies demand."""
    channels, step = 1 if x.ndim == 5 else 2, 16 // x.element_size()
    for axis, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if axis != channels and size > 1 and (stride <= 0 or stride % step):
            return False
    return x.data_ptr() % 16 == 0


def boxes_serve(x: Tensor, size: Sequence[int]) -> bool:
    """Whether the device copies boxes (sm_90 on) of x's dtype into its matrix units, and frames of `size` fill one."""
    if family(x.device) not in ("sm_90", "sm_100") or full_float32(x.dtype):
        return False
    return size[0] * size[1] >= _BOX_POSITIONS


def use_boxes(
    source: Tensor,
    history: Tensor | None,
    other: Tensor,
    stride: Sequence[int],
    space_replicate: bool,
    size: Sequence[int],
) -> bool:
    """Boxes need hardware for them, unit strides in space, zero padding there, and frames that fill a box."""
    if not boxes_serve(source, size) or stride[1] != 1 or stride[2] != 1 or space_replicate:
        return False
    if source.shape[1] < _BOX_CHANNELS:
        return False
    return all(_describable(x) for x in (source, history, other) if x is not None)


def _block_c(dtype: torch.dtype, channels: int) -> int:
    """Channels of one 128-byte line, or fewer where a whole line would be more than an eighth empty."""
    line = 32 if dtype == torch.float32 else 64
    while line > 16 and cdiv(channels, line) * line > channels * 9 // 8:
        line //= 2
    return line


@lru_cache(maxsize=1024)
def _cheapest(shapes: tuple[tuple[int, int, float], ...], height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the box that costs least on a frame, given (rows, columns, cost of a position)."""

    def cost(shape: tuple[int, int, float]) -> float:
        rows, columns, each = shape
        return cdiv(height, rows) * rows * cdiv(width, columns) * columns * each

    rows, columns, _ = min(shapes, key=cost)
    return rows, columns


# A box of one row goes from shared memory straight into the matrix unit. Several rows pass through registers, and the
# compiler waits for every product, unless they are the second operand (`transposed`): nothing is waited for then, but no GPU
# has timed it yet, so that they must save a fifth of the positions. 64 read half as much again as 128 for a product.
_BOXES = ((1, 128, 1.0), (1, 64, 1.5), (2, 64, 1.6), (8, 16, 1.6), (16, 8, 1.6), (4, 32, 1.6), (32, 4, 1.6))
_TRANSPOSED = 0.78
_SUMMED_BOXES = ((1, 64, 1.0), (4, 16, 1.6), (16, 4, 1.6), (8, 8, 1.6))  # of the weight gradient
# Filters of a program above 128: one sum, or two.
_FILTER_TILES = ((256, 0), (128, 64), (128, 32), (128, 0))


def _filter_tile(filters: int) -> tuple[int, int]:
    """Filters of the first and of the second sum.

    The second cache limits: a step reads 128 positions and a tile of filters, and whoever reads least for all filters is the
    fastest. TFLOP/s of an H100 at 3x3x3: 160 filters as 128 + 32 477, as 256 316; 192 as 128 + 64 516, as 256 357, as 128
    twice 267; 384 as 192 twice 536, as 128 three times 433; 256 at once 693, as 128 twice 526.
    """
    if filters <= 128:
        return max(16, next_power_of_2(filters)), 0

    def cost(tile: tuple[int, int]) -> tuple[int, int]:
        programs = cdiv(filters, sum(tile))
        return programs * (128 + sum(tile)), programs * sum(tile)

    return min(_FILTER_TILES, key=cost)


def box_config(
    dtype: torch.dtype, channels: int, filters: int, kernel: Sequence[int], height: int, width: int, gpu: str
) -> BoxConfig:
    """See `_box_config`; tables that tests replace are arguments of what is kept."""
    return _box_config(dtype, channels, filters, kernel[1] * kernel[2] > 1, height, width, gpu, _BOXES)


@lru_cache(maxsize=1024)
def _box_config(
    dtype: torch.dtype,
    channels: int,
    filters: int,
    taps_in_space: bool,
    height: int,
    width: int,
    gpu: str,
    boxes: tuple[tuple[int, int, float], ...],
) -> BoxConfig:
    """Tiles up to 256 x 128 either way, measured on an H100 in bfloat16.

    128 channels 1x3x3: 258 us with 256 positions, 8 warps and 4 stages, 265 with 128 and 3 stages, 273 with 16 warps. 3x1x1,
    which memory limits, takes 283 us with two programs on a multiprocessor; 256 filters take 4 stages (693 TFLOP/s; 3: 670;
    16 warps: 614); 96 channels, in 32 at a time, 256 positions, 16 warps and 6 stages (310; 128 positions 291, 3 stages 276).
    On sm_100 sums live in tensor memory, whose instructions take 8 warps at most.
    """
    block_n, block_n2 = _filter_tile(filters)
    block_c = _block_c(dtype, channels)
    single = dtype == torch.float32  # results twice as wide: the largest tiles would not leave their epilogue registers
    if single and block_n == 256:
        block_n = 128
    short = block_c * dtype.itemsize < 128  # a part of a line: more and smaller steps
    wide = not single and block_n == 128 and not block_n2 and taps_in_space
    transposable = block_n >= 64  # rows of the matrix unit
    shapes = ((1, 256, 0.82 if short else 0.97), *boxes) if wide else boxes
    shapes = tuple((h, w, cost * _TRANSPOSED if h > 1 and transposable else cost) for h, w, cost in shapes)
    rows, columns = _cheapest(shapes, height, width)
    transposed = rows > 1 and transposable
    if transposed and block_n2:
        block_n2 = 64
    if transposed and block_n == 256:
        block_n, block_n2 = 128, 128
    size = rows * columns * (block_n + block_n2)
    warps = 16 if short and columns == 256 and gpu == "sm_90" else 8 if size > 128 * 64 else 4
    stages = (5 if block_n2 else 6) if short else 4 if size > 128 * 128 else 3
    return BoxConfig(rows, columns, block_n, block_c, warps, stages, block_n2, transposed)


def folded_box_config(
    dtype: torch.dtype, channels: int, filters: int, height: int, width: int, residual: bool
) -> BoxConfig:
    """Of few channels or few filters (`_conv_fold`), taps along time alone: after six steps or fewer of a sum, what counts is
    how many programs are at their epilogue. On an H100 128 positions and 4 warps took 213 us for 3 to 128 channels, packing
    included, 8 warps 233, 256 positions and 16 warps 259; for 128 to 3, summing included, 128 and 256 positions 298. With
    a residual 4 warps would spill 472 bytes a thread."""
    rows, columns = _cheapest(tuple(shape for shape in _BOXES if shape[0] * shape[1] <= 128), height, width)
    block_n = min(128, max(16, next_power_of_2(filters)))
    warps = 8 if residual and rows * columns * block_n > 128 * 64 else 4
    return BoxConfig(rows, columns, block_n, _block_c(dtype, channels), warps, 3)


# Of one frame: with three taps' frames, the results and the next group it stays below half of an H100's 50 MB of L2.
_GROUP_BYTES = 4 << 20


def group_rows(tiles: int, bytes_each: int, taps: int) -> int:
    """Rows of boxes that pass through all frames together, of `tiles` rows that read `bytes_each` of a frame."""
    return tiles if taps == 1 else max(1, min(tiles, _GROUP_BYTES // bytes_each))


def wgrad_box_config(dtype: torch.dtype, channels: int, filters: int, height: int, width: int, gpu: str) -> BoxConfig:
    """Positions are the axis of the sum here: 64 of them; up to 128 filters by 128 channels.

    On sm_100 operands of float32 are also kept transposed: 320 KB of shared memory at 128 x 128, where there are 227.
    """
    largest = 64 if dtype == torch.float32 and gpu == "sm_100" else 128
    block_n = min(largest, max(16, next_power_of_2(filters)))
    block_c = min(largest, max(16, next_power_of_2(channels)))
    rows, columns = _cheapest(_SUMMED_BOXES, height, width)
    return BoxConfig(rows, columns, block_n, block_c, 8 if block_n * block_c > 64 * 128 else 4, 3)


def pointer_config(dtype: torch.dtype, channels: int, filters: int, gpu: str, *, wgrad: bool = False) -> PointerConfig:
    """128 positions (64 where they are summed over); fewer than 16 channels are summed together with the taps.

    Full float32 products run on the plain units, with operands in registers: small tiles. AMD has 64 KB of shared memory.
    """
    flat, single = channels < 16, dtype == torch.float32
    block_n = min(64 if flat or single else 128, max(16, next_power_of_2(filters)))
    if full_float32(dtype):
        # gradients of weights sum chains of 16 positions: 64 of them spill 232 bytes on sm_100
        positions, warps = (64 if flat else 32, 4) if wgrad else (64, 8 if flat else 4)
        return PointerConfig(positions, block_n, 16, flat, warps, 2)
    block_c = 32 if flat or single else min(64, next_power_of_2(channels))
    if channels % 8 and not flat and not single:  # every value has an address of its own: 64 a thread would spill 2 KB
        return PointerConfig(64, min(64, block_n), 32, False, 8, 2)
    stages = 2 if gpu == "amd" else 3
    # float32 operands are twice as wide: with fewer warps they would not leave the sums their registers.
    warps = 8 if block_n == 128 or (not wgrad and (flat or single)) else 4
    return PointerConfig(64 if wgrad or (flat and single) else 128, block_n, block_c, flat, warps, stages)
