# SPDX-License-Identifier: Apache-2.0
"""Forwards of Wan 2.2's blocks with shortcuts of averaged and repeated values.

The original clones every block's input, and makes two copies of it to average (the encoder) or two tensors of its result's
size to repeat (the decoder). In inference the means are taken before the block writes over its input, and repeated values
are added to the result where it lies. Elsewhere the shortcut is called as upstream wrote it, without the clone.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching.rules._vae_memory import may_write
from vidkernels.patching.rules._vae_units import as_clip, as_rows, video_reason
from vidkernels.patching.rules._wan_units import Cache, Family, Index


def _axes_within(shortcut: Any, values: int) -> int | None:
    """How many axes of the box (t, h, w) tell channels apart, so that the others hold so many values; None: no number does."""
    box = shortcut.factor_t, shortcut.factor_s, shortcut.factor_s
    return next((axes for axes in range(4) if math.prod(box[axes:]) == values), None)


def shortcut_check(block: Any) -> str | None:
    """Why a block with a shortcut can never be served."""
    shortcut = block.avg_shortcut
    if shortcut is None:
        return None
    values = shortcut.group_size if hasattr(shortcut, "group_size") else shortcut.repeats
    return (
        None if _axes_within(shortcut, values) is not None else f"its shortcut spreads a channel over {values} values"
    )


def _boxes(x: Tensor, shortcut: Any, frames: int) -> Tensor:
    """[B, C, T, frames, H, s, W, s], a view."""
    side = shortcut.factor_s
    return x.unflatten(4, (-1, side)).unflatten(3, (-1, side)).unflatten(2, (-1, frames))


def averaged(shortcut: Any, x: Tensor) -> Tensor:
    """`AvgDown3D.forward`: means over boxes, or over a part of their axes where the others are channels. Never x itself."""
    missing = -x.shape[2] % shortcut.factor_t
    if missing:
        x = F.pad(x, (0, 0, 0, 0, missing, 0))
    axes = _axes_within(shortcut, shortcut.group_size) or 0
    box = shortcut.factor_t, shortcut.factor_s, shortcut.factor_s
    batch, channels, *size = x.shape
    kept, summed = math.prod(box[:axes]), math.prod(box[axes:])
    size = [length // factor for length, factor in zip(size, box, strict=True)]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = torch.zeros((batch, *size, channels, kept), dtype=wide, device=x.device)
    # Slices whose channels lie next to each other: a mean over these axes took PyTorch on a CPU 3 to 8 times as long.
    for index, (t, h, w) in enumerate(itertools.product(*map(range, box))):
        mean[..., index // summed] += as_rows(x[:, :, t :: box[0], h :: box[1], w :: box[2]])
    if summed > 1:
        mean /= summed
    return as_clip(mean.flatten(4).to(x.dtype))


def add_repeated(shortcut: Any, x: Tensor, y: Tensor, first_chunk: bool) -> Tensor:
    """`y += DupUp3D.forward(x)`; of the first chunk's first frame only the last repetition is there."""
    factor = shortcut.factor_t
    if first_chunk and factor > 1:
        _add_boxes(shortcut, x[:, :, :1], y[:, :, :1], slice(factor - 1, factor))
        x, y_rest = x[:, :, 1:], y[:, :, 1:]
    else:
        y_rest = y
    if x.shape[2]:
        _add_boxes(shortcut, x, y_rest, slice(0, factor))
    return y


def _add_boxes(shortcut: Any, x: Tensor, y: Tensor, frames: slice) -> None:
    axes = _axes_within(shortcut, shortcut.repeats) or 0
    box = (shortcut.factor_t, shortcut.factor_s, shortcut.factor_s)
    lead = (*box[:axes], *(1,) * (3 - axes))
    values = x.unflatten(1, (-1, *lead))  # [B, C, t, h, w, T, H, W], 1 where all of an axis get the same
    if axes > 0:
        values = values[:, :, frames]
    count = frames.stop - frames.start
    _boxes(y, shortcut, count).add_(values.permute(0, 1, 5, 2, 6, 3, 7, 4))


class DownBlockForward(Family):
    """`WanResidualDownBlock.forward`."""

    def _layers(self) -> list[nn.Module]:
        return [*self.resnets, *(() if self.downsampler is None else (self.downsampler,))]

    def _reason(self, x: Tensor, **rest: Any) -> str | None:
        return video_reason(x) or child_reason(self.avg_shortcut, self._vidkernels_home.AvgDown3D)

    @guarded
    def forward(self, x: Tensor, feat_cache: Cache = None, feat_idx: Index = None) -> Tensor:
        """[B, in_dim, T, H, W] -> [B, out_dim, T / t, H / s, W / s]."""
        index = [0] if feat_idx is None else feat_idx
        mean = averaged(self.avg_shortcut, x) if may_write(x) else None
        h = x
        for layer in self._layers():
            h = layer(h, feat_cache=feat_cache, feat_idx=index)
        return h + self.avg_shortcut(x) if mean is None else h.add_(mean)


class UpBlockForward(Family):
    """`WanResidualUpBlock.forward`."""

    def _layers(self) -> list[nn.Module]:
        return [*self.resnets, *(() if self.upsampler is None else (self.upsampler,))]

    def _keeps_width(self) -> bool:
        """Whether the first layer writes over its input, where it may."""
        return bool(self.in_dim == self.out_dim)

    def _reason(self, x: Tensor, feat_cache: Cache, first_chunk: bool, **rest: Any) -> str | None:
        reason, shortcut = video_reason(x), self.avg_shortcut
        if reason is None and shortcut is not None:
            reason = child_reason(shortcut, self._vidkernels_home.DupUp3D)
            if reason is None and feat_cache is None and not first_chunk and shortcut.factor_t > 1:
                reason = "without a cache only the shortcut repeats frames"
        return reason

    @guarded
    def forward(self, x: Tensor, feat_cache: Cache = None, feat_idx: Index = None, first_chunk: bool = False) -> Tensor:
        """[B, in_dim, T, H, W] -> [B, out_dim, t T, s H, s W]."""
        index, shortcut = [0] if feat_idx is None else feat_idx, self.avg_shortcut
        writes = may_write(x)
        kept = x.clone() if writes and shortcut is not None and self._keeps_width() else x
        h = x
        for layer in self._layers():
            h = layer(h, feat_cache=feat_cache, feat_idx=index)
        if shortcut is None:
            return h
        return add_repeated(shortcut, kept, h, first_chunk) if writes else h + shortcut(kept, first_chunk=first_chunk)
