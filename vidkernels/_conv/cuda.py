# SPDX-License-Identifier: Apache-2.0
"""Backend "cuda" of causal_conv3d: 3x3 taps in space in CUDA C++, for GPUs of compute capability 9.0. Here are allocation, layout
and the choice of tiles; `csrc/causal_conv3d` has no policy.

A box of the source is read once for all nine taps of a frame, where other backends read it once for each. Gradients are Triton's,
or torch's without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from vidkernels._conv.results import delivered, target

DTYPES = (torch.bfloat16, torch.float16)
# Filters of a program, and its blocks of 8 x 8 positions: 192 sums a thread or fewer.
_BLOCKS = {192: 4, 160: 4, 128: 6, 96: 8}
_ALIGNED = 8  # values of 16 bytes
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


def _is_readable(x: Tensor) -> bool:
    """Whether the kernel reads and writes x where it is: channels lie next to each other, everything else in steps of 16 bytes,
    and the values of a frame are less than 2^31 apart."""
    if x.data_ptr() % 16 or (x.shape[1] > 1 and x.stride(1) != 1):
        return False
    if (x.shape[3] - 1) * x.stride(3) + (x.shape[4] - 1) * x.stride(4) >= 2**31 - x.shape[1]:
        return False
    return all(x.shape[axis] == 1 or x.stride(axis) % _ALIGNED == 0 for axis in (0, 2, 3, 4))


def _readable(x: Tensor | None) -> Tensor | None:
    """x itself if the kernel reads it, else a copy in channels_last_3d (a layout change, no padding)."""
    return x if x is None or _is_readable(x) else x.clone(memory_format=torch.channels_last_3d)


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
    y = target(x, weight, stride, dilation, padding, out, _is_readable)
    source, before = _readable(x), [padding[0], padding[2], padding[4]]
    tile = _tile(weight.shape[0], y.shape[3], y.shape[4], x.shape[1] * x.shape[4] * x.element_size())
    tensors = y, source, weight, bias, _readable(history), _readable(residual)
    torch.ops.vidkernels.causal_conv3d_box_out.default(*tensors, before, time_mode, space_mode, activation, tile)
    return delivered(y, x, out)


def causal_conv3d_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, history: Tensor | None, geometry: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    """See `_conv.gradients`."""
    from vidkernels import _library

    name = "causal_conv3d_bwd_torch" if _library.triton_missing() else "causal_conv3d_bwd_triton"
    return getattr(torch.ops.vidkernels, name).default(grad, x, weight, history, geometry, needs)
