# SPDX-License-Identifier: Apache-2.0
"""Forwards of VAEs of Wan's kind (Wan 2.1 and 2.2, QwenImage): causal convolutions on the cached frames as they are,
norm + SiLU in one pass, nearest-up + convolution by phases. Layers are found under diffusers' names; where others differ,
a method that names them is overridden (`_official_wan_units`).

`feat_cache` and `feat_idx` keep upstream's contents and order, so a module that runs its original forward in the middle
of a clip finds what it expects; only the first chunk's entry of a temporal downsampler holds one frame, the one that is
read, instead of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidkernels.distributed.temporal import CarriedList, Turns
from vidkernels.patching._guard import child_reason, guarded, parameter_of
from vidkernels.patching._mechanism import Fused
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._frame_units import doubling_reason, halving_reason
from vidkernels.patching.rules._vae_memory import empty_clip, frame_pieces, may_write, overwriting
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason

Cache = list[Any] | None
Index = list[int] | None


def causal(
    owner: Any,
    conv: Any,
    x: Tensor,
    history: Tensor | None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A causal convolution of Wan's kind: the frames of an earlier chunk in front, zeros before them."""
    left, right, top, bottom, front, _ = conv._padding
    past = None if history is None or front == 0 else history.to(x)
    options = {"pad_frames": front, "spatial_padding": (left, right, top, bottom), "history": past}
    return units.convolve(owner, conv, x, residual, out, **options)


def causal_reason(conv: Any, cls: type) -> str | None:
    """Why a causal convolution of one frame and pixel for each must be called."""
    reason = child_reason(conv, cls) or padding_reason(conv)
    if reason is None and (conv.stride, conv.dilation) != (_ONE, _ONE):
        reason = f"a convolution has stride {conv.stride} and dilation {conv.dilation}"
    return reason


_ONE = (1, 1, 1)


def padding_reason(conv: Any) -> str | None:
    """Why kernels cannot serve how a causal convolution pads."""
    reason = units.options_reason(conv) or units.unpadded_reason(conv)
    return reason or (f"a convolution pads by {conv._padding}" if conv._padding[5] else None)


class LastChunk(list[Any]):
    """The cache that the last chunk of a clip gets: what it would leave there is read by nobody."""


class LastTurn(CarriedList, LastChunk):
    """The same where the frames come from another rank."""


def cache_of(frames: list[Any], last: bool) -> list[Any]:
    """The cache of a chunk, from the frames of those before it."""
    return LastChunk(frames) if last and not torch.compiler.is_compiling() else frames


def cache_of_turn(turns: Turns, call: int, slots: int, last: bool) -> list[Any]:
    """The cache of a chunk whose frames come from one rank and go to another."""
    return (LastTurn if last else CarriedList)(turns.carried(call, last), slots)


def streamed(
    owner: Any,
    conv: Any,
    x: Tensor,
    feat_cache: Cache,
    feat_idx: list[int],
    residual: Tensor | None = None,
    owned: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """`causal` on the frames in the next slot of the cache, which then keeps the last two frames of x.

    owned: nobody else writes to x, so that it may lie in the cache itself where all its frames are kept.
    """
    if feat_cache is None:
        return causal(owner, conv, x, None, residual, out)
    slot = feat_idx[0]
    history = feat_cache[slot]
    feat_idx[0] += 1
    feat_cache[slot] = None if isinstance(feat_cache, LastChunk) else units.last_frames(x, history, 2, owned)
    return causal(owner, conv, x, history, residual, out)


Step = Callable[[Tensor, Tensor, "list[Any]", "list[int]"], object]


def in_pieces(step: Step, x: Tensor, y: Tensor, feat_cache: Cache, feat_idx: list[int], slots: int) -> None:
    """`step(x, y, cache, index)` on a few frames after the other, with so many slots of the cache, which keep between pieces
    what they keep between chunks."""
    first = feat_idx[0]
    feat_idx[0] += slots
    frames = [None] * slots if feat_cache is None else feat_cache[first : feat_idx[0]]
    for start, end in frame_pieces(x, max(x.shape[1], y.shape[1])):
        if end == x.shape[2] and (feat_cache is None or isinstance(feat_cache, LastChunk)):
            frames = LastChunk(frames)
        step(x[:, :, start:end], y[:, :, start:end], frames, [0])
    if feat_cache is not None:
        feat_cache[first : feat_idx[0]] = frames


class Family(Fused):
    """Base of the mixins: upstream's classes by their names without the library's prefix."""

    _prefix = "Wan"

    def _upstream(self, name: str) -> type:
        found: type = getattr(self._vidkernels_home, self._prefix + name)
        return found

    def _conv_reason(self, conv: Any) -> str | None:
        return causal_reason(conv, self._upstream("CausalConv3d"))

    def _norm_reason(self, norm: Any) -> str | None:
        return units.rms_reason(norm, self._upstream("RMS_norm"))


class ConvForward(Family):
    """`WanCausalConv3d.forward`."""

    @guarded
    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """[B, C, T, H, W] behind the frames of `cache_x`."""
        return causal(self, self, x, cache_x)

    def _reason(self, x: Tensor, cache_x: Tensor | None) -> str | None:
        return video_reason(x, cache_x) or padding_reason(self)


class NormForward(Family):
    """`WanRMS_norm.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """Any floating tensor with its channels on axis 1."""
        wide = x.to(torch.promote_types(x.dtype, self.gamma.dtype))  # the dtype of the product with gamma
        return units.rms_normed(self, self, wide, None)

    def _reason(self, x: Tensor) -> str | None:
        reason = units.call_reason(x) or units.rms_options_reason(self)
        if reason is None and (x.ndim < 3 or x.dtype not in _DTYPES):
            reason = f"it normalizes {x.ndim} axes or another dtype ({x.dtype})"
        return reason


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class BlockParts(NamedTuple):
    """The layers of a residual block, in the order in which they run; the shortcut beside them."""

    norm1: Any
    act1: Any
    conv1: Any
    norm2: Any
    act2: Any
    dropout: Any
    conv2: Any
    shortcut: Any


class BlockForward(Family):
    """`WanResidualBlock.forward`."""

    def _layers(self) -> BlockParts:
        parts = self._modules
        act = parts["nonlinearity"]
        first = parts["norm1"], act, parts["conv1"]
        return BlockParts(*first, parts["norm2"], act, parts["dropout"], parts["conv2"], parts["conv_shortcut"])

    def _reason(self, x: Tensor, **rest: Any) -> str | None:
        parts, conv, norm = self._layers(), self._upstream("CausalConv3d"), self._upstream("RMS_norm")
        reason = video_reason(x) or units.rms_reason(parts.norm1, norm) or causal_reason(parts.conv1, conv)
        reason = reason or units.rms_reason(parts.norm2, norm) or causal_reason(parts.conv2, conv)
        reason = reason or child_reason(parts.act1, nn.SiLU) or child_reason(parts.dropout, nn.Dropout)
        if reason is None and parts.act2 is not parts.act1:
            reason = child_reason(parts.act2, nn.SiLU)
        if reason is None and self.in_dim != self.out_dim:
            reason = reason or causal_reason(parts.shortcut, conv)
            padded = reason is None and any(parts.shortcut._padding)
            return f"a shortcut pads by {parts.shortcut._padding}" if padded else reason
        return reason or child_reason(parts.shortcut, nn.Identity)

    @guarded
    def forward(self, x: Tensor, feat_cache: Cache = None, feat_idx: Index = None) -> Tensor:
        """[B, in_dim, T, H, W] -> [B, out_dim, T, H, W]."""
        index = [0] if feat_idx is None else feat_idx
        h, parts = channels_last(x), self._layers()
        if may_write(h):
            return restored(self._in_pieces(parts, h, feat_cache, index), x)
        shortcut = h if self.in_dim == self.out_dim else units.pointwise(self, parts.shortcut, h)
        h = streamed(self, parts.conv1, units.rms_normed(self, parts.norm1, h), feat_cache, index)
        h = units.dropped(parts.dropout, units.rms_normed(self, parts.norm2, h))
        return restored(streamed(self, parts.conv2, h, feat_cache, index, shortcut), x)

    def _in_pieces(self, parts: BlockParts, x: Tensor, feat_cache: Cache, feat_idx: list[int]) -> Tensor:
        """The same over x, a few frames after the other."""
        width = self.out_dim

        def step(h: Tensor, out: Tensor, frames: list[Any], index: list[int]) -> None:
            residual = h if y is x else units.pointwise(self, parts.shortcut, h, out=out)
            h = streamed(self, parts.conv1, units.rms_normed(self, parts.norm1, h), frames, index)
            h = units.dropped(parts.dropout, units.rms_normed(self, parts.norm2, h))
            streamed(self, parts.conv2, h, frames, index, residual, out=out)

        y = x if self.in_dim == width else empty_clip(x, width)
        in_pieces(step, x, y, feat_cache, feat_idx, 2)
        return y


class AttentionForward(Family):
    """`WanAttentionBlock.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W]: every frame attends to itself."""
        identity = channels_last(x)
        qkv = units.pointwise(self, self.to_qkv, units.rms_normed(self, self.norm, identity, None))
        mixed = units.frame_attention(*qkv.chunk(3, 1))
        return restored(units.pointwise(self, self.proj, mixed, identity), x)

    def _reason(self, x: Tensor) -> str | None:
        reason = video_reason(x) or self._norm_reason(self.norm)
        return reason or units.kernel_reason(self.to_qkv) or units.kernel_reason(self.proj)


class ResampleForward(Family):
    """`WanResample.forward`."""

    def _reason(self, x: Tensor, **rest: Any) -> str | None:
        reason = video_reason(x) or child_reason(self.resample, nn.Sequential)
        if reason is not None:
            return reason
        upwards, (first, conv) = self.mode.startswith("up"), self.resample
        if upwards:
            reason = child_reason(first, self._upstream("Upsample")) or doubling_reason(conv)
        else:
            reason = child_reason(first, nn.ZeroPad2d) or halving_reason(conv)
            if reason is None and (first.padding != (0, 1, 0, 1) or first.value != 0):
                reason = f"frames are padded by {first.padding} with {first.value}"
        if reason is not None or not self.mode.endswith("3d"):
            return reason
        time_conv: Any = self._modules.get("time_conv")
        reason = child_reason(time_conv, self._upstream("CausalConv3d")) or padding_reason(time_conv)
        if reason is None and not upwards and any(time_conv._padding):
            reason = f"a convolution over frames pads by {time_conv._padding}"
        return reason

    @guarded
    def forward(self, x: Tensor, feat_cache: Cache = None, feat_idx: Index = None) -> Tensor:
        """[B, dim, T, H, W] -> twice or half the height and width; in a stream also twice or half the frames."""
        index = [0] if feat_idx is None else feat_idx
        y = channels_last(x)
        if self.mode.startswith("up"):
            if self.mode == "upsample3d" and feat_cache is not None:
                y = self._doubled_in_time(y, feat_cache, index)
            y = units.doubled_in_space(self, self.resample[1], y)
        else:
            y = units.halved_in_space(self, self.resample[1], y)
            if self.mode == "downsample3d" and feat_cache is not None:
                y = self._halved_in_time(y, feat_cache, index)
        return restored(y, x)

    def _doubled_in_time(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        """Two frames from each, but not in the first chunk; the second one starts with zeros, not with that chunk."""
        slot = feat_idx[0]
        feat_idx[0] += 1
        before = feat_cache[slot]
        if before is None:
            feat_cache[slot] = "Rep"
            return x
        fresh = isinstance(before, str)
        past = x.new_zeros(1, 1, 1, 1, 1).expand_as(x[:, :, :1]) if fresh else before
        feat_cache[slot] = None if isinstance(feat_cache, LastChunk) else units.last_frames(x, past, 2)
        pairs = causal(self, self.time_conv, x, None if fresh else before)
        batch, channels, frames, height, width = x.shape
        # [B, T, H, W, 2 C] in memory: the first C filters make even frames, the others odd ones.
        rows = units.as_rows(pairs).unflatten(-1, (2, channels)).permute(0, 1, 4, 2, 3, 5)
        return units.as_clip(rows.reshape(batch, 2 * frames, height, width, channels))

    def _halved_in_time(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        """Half the frames, but not in the first chunk."""
        slot = feat_idx[0]
        feat_idx[0] += 1
        before = feat_cache[slot]
        feat_cache[slot] = None if isinstance(feat_cache, LastChunk) else units.last_frames(x, None, 1)
        if before is None:
            return x
        past = {"history": before[:, :, -1:].to(x), "time_padding": "history"}
        return units.convolve(self, self.time_conv, x, spatial_padding=0, **past)


class Ends(NamedTuple):
    """The first and the last layers of a network."""

    conv_in: Any
    norm: Any
    act: Any
    conv_out: Any


class _Network(Family):
    """What encoder and decoder share."""

    def _ends(self) -> Ends:
        return Ends(self.conv_in, self.norm_out, self.nonlinearity, self.conv_out)

    def _reason(self, x: Tensor, **rest: Any) -> str | None:
        ends = self._ends()
        reason = video_reason(x) or self._conv_reason(ends.conv_in) or self._conv_reason(ends.conv_out)
        return reason or self._norm_reason(ends.norm) or child_reason(ends.act, nn.SiLU)

    def _begin(self, x: Tensor, feat_cache: Cache, feat_idx: list[int]) -> Tensor:
        return streamed(self, self._ends().conv_in, channels_last(x), feat_cache, feat_idx, owned=False)

    def _end(self, x: Tensor, feat_cache: Cache, feat_idx: list[int]) -> Tensor:
        """In the format in which the original returns it, whatever that of x."""
        ends = self._ends()

        def step(h: Tensor, out: Tensor | None, frames: Cache, index: list[int]) -> Tensor:
            return streamed(self, ends.conv_out, units.rms_normed(self, ends.norm, h), frames, index, out=out)

        if not may_write(x):
            return step(x, None, feat_cache, feat_idx).contiguous()
        y = empty_clip(x, parameter_of(ends.conv_out, "weight").shape[0])
        in_pieces(step, x, y, feat_cache, feat_idx, 1)
        return y.contiguous()


class EncoderForward(_Network):
    """`WanEncoder3d.forward`."""

    @guarded
    def forward(self, x: Tensor, feat_cache: Cache = None, feat_idx: Index = None) -> Tensor:
        """[B, 3, T, H, W] -> moments [B, 2 z, T / 4, H / 8, W / 8]; T = 1 in the first chunk of a stream."""
        index = [0] if feat_idx is None else feat_idx
        with overwriting(self, x):
            return self._end(self._body(x, feat_cache, index), feat_cache, index)

    def _body(self, x: Tensor, feat_cache: Cache, index: list[int]) -> Tensor:
        h = self._begin(x, feat_cache, index)
        for layer in self.down_blocks:
            h = layer(h) if feat_cache is None else layer(h, feat_cache=feat_cache, feat_idx=index)
        mixed: Tensor = self.mid_block(h, feat_cache=feat_cache, feat_idx=index)
        return mixed


class DecoderForward(_Network):
    """`WanDecoder3d.forward`."""

    def _block_options(self, first_chunk: bool) -> dict[str, Any]:
        return {"first_chunk": first_chunk}

    @guarded
    def forward(self, x: Tensor, feat_cache: Cache = None, feat_idx: Index = None, first_chunk: bool = False) -> Tensor:
        """[B, z, T, H, W] -> frames [B, 3, 4 T, 8 H, 8 W]; T = 1 in the first chunk of a stream, which gives one."""
        index = [0] if feat_idx is None else feat_idx
        options = self._block_options(first_chunk)
        with overwriting(self, x):
            return self._end(self._body(x, feat_cache, index, options), feat_cache, index)

    def _body(self, x: Tensor, feat_cache: Cache, index: list[int], options: dict[str, Any]) -> Tensor:
        h = self._begin(x, feat_cache, index)
        h = self.mid_block(h, feat_cache=feat_cache, feat_idx=index)
        for block in self.up_blocks:
            h = block(h, feat_cache=feat_cache, feat_idx=index, **options)
        return h
