# SPDX-License-Identifier: Apache-2.0
"""The blocks of VidTok. Every tensor is [B, C, T, H, W] in channels-last memory: frames, pixels and volumes are one
layout there, so 2-D, 1-D and 3-D blocks follow each other without a rearrangement.

Parameters carry the official names and shapes (a temporal kernel is [C, C, 3]); `forward` views them as 3-D kernels.
`state` is None for a whole clip. In streaming it is a dict that maps a layer to the frames it must remember; layers read
and replace their own entry, and nothing is kept in the modules.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.nn._residual import in_pieces, needs_gradients

State = dict[nn.Module, Any]
NORM_EPS = 1e-6


def as_volume(weight: Tensor) -> Tensor:
    """A kernel in the checkpoint's shape as a 3-D kernel [K, C, kt, kh, kw]; a view."""
    if weight.ndim == 5:
        return weight
    return weight.unsqueeze(2) if weight.ndim == 4 else weight.unsqueeze(3).unsqueeze(4)


class Kernel(nn.Module):
    """Weight and bias of a convolution in the checkpoint's own shape, initialised as PyTorch does."""

    def __init__(self, out_channels: int, in_channels: int, *size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        bound = 1 / math.sqrt(in_channels * math.prod(size))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def volume(self) -> Tensor:
        """The weight as a 3-D kernel; a view."""
        return as_volume(self.weight)


class FrameConv(Kernel):
    """Convolution of each frame by itself, 3x3 or 1x1."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 3) -> None:
        super().__init__(out_channels, in_channels, size, size)

    def forward(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x [B, C, T, H, W] -> [B, K, T, H, W] (+ residual), in `out` if given."""
        return ops.causal_conv3d(x, self.volume(), self.bias, time_padding="none", residual=residual, out=out)


class TimeConv(nn.Module):
    """Convolution over time (and space, for a 3-D kernel) with VidTok's padding of one family.

    A causal model keeps its kernel one level deeper (`conv.weight`) than a non-causal one (`weight`).

    Args:
        size: [3] for a temporal kernel, [k, k, k] for a volume.
        time_padding: "zeros" (v1.0), "replicate" (v1.1) or "symmetric" (non-causal).
        time_stride: 1 or 2.
    """

    def __init__(
        self, in_channels: int, out_channels: int, size: tuple[int, ...], time_padding: str, time_stride: int = 1
    ) -> None:
        super().__init__()
        kernel = Kernel(out_channels, in_channels, *size)
        self.time_padding, self.time_stride, self.frames = time_padding, time_stride, size[0]
        if time_padding == "symmetric":
            self.weight, self.bias = kernel.weight, kernel.bias
        else:
            self.conv = kernel

    @property
    def kernel(self) -> Kernel | TimeConv:
        """The module that holds `weight` and `bias`."""
        return self if self.time_padding == "symmetric" else self.conv

    def volume(self) -> Tensor:
        """The weight as a 3-D kernel; a view."""
        return as_volume(self.kernel.weight)

    def forward(self, x: Tensor, state: State | None = None, **extra: Any) -> Tensor:
        """x [B, C, T, H, W] -> [B, K, T / time_stride, H, W]; `extra`: `residual`, `out`, or `mix_factor` of a `TemporalDown`."""
        convolve = ops.downsample_conv3d if "mix_factor" in extra else ops.causal_conv3d
        options: dict[str, Any] = {"stride": (self.time_stride, 1, 1), **extra}
        if self.time_padding == "symmetric":
            # A stride of 2 takes frames 2i, 2i+1, 2i+2: one zero frame behind instead of one on each side.
            side = (self.frames - 1) // 2
            options |= {"time_padding": "zeros", "pad_frames": (side, side) if self.time_stride == 1 else (0, side)}
        else:
            options["time_padding"] = self.time_padding
        kernel = self.kernel  # a child is 0.8 us
        weight, bias = as_volume(kernel.weight), kernel.bias
        if state is None or self.frames == 1:
            return convolve(x, weight, bias, **options)
        y, state[self] = convolve(x, weight, bias, history=state.get(self), return_history=True, **options)
        return y


class _Affine(nn.Module):
    """Weight and bias of a norm, under its checkpoint's names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each position, with or without SiLU behind it; its parameters are `norm.*`."""

    def __init__(self, channels: int, activation: str | None = "silu") -> None:
        super().__init__()
        self.norm, self.activation = _Affine(channels), activation

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> the same shape."""
        affine = self.norm
        return ops.channel_norm(x, affine.weight, affine.bias, eps=NORM_EPS, activation=self.activation)


class FrameBlock(nn.Module):
    """2-D residual block: norm, SiLU, 3x3, norm, SiLU, 3x3, plus the input (through 1x1 if the width changes)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(in_channels)
        self.conv1 = FrameConv(in_channels, out_channels)
        self.norm2 = ChannelNorm(out_channels)
        self.conv2 = FrameConv(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = FrameConv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, state: State | None = None, inplace: bool = False) -> Tensor:
        """x [B, C, T, H, W] -> [B, K, T, H, W]. `inplace`: without gradients the result may take the place of x."""
        if needs_gradients(self, x):
            return self._whole(x)
        return in_pieces(self._whole, x, 2, self.conv2.weight.shape[0], inplace=inplace)

    def _whole(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        residual = self.nin_shortcut(x, out=out) if hasattr(self, "nin_shortcut") else x
        return self.conv2(self.norm2(self.conv1(self.norm1(x))), residual=residual, out=out)


class TimeBlock(nn.Module):
    """1-D or 3-D residual block of constant width: norm, SiLU, conv, norm, SiLU, conv, plus the input."""

    def __init__(self, channels: int, size: tuple[int, ...], time_padding: str) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.conv1 = TimeConv(channels, channels, size, time_padding)
        self.norm2 = ChannelNorm(channels)
        self.conv2 = TimeConv(channels, channels, size, time_padding)
        self.temporal = len(size) == 1
        if self.temporal:
            # A temporal block starts as the identity, so that a 2-D tokenizer can be inflated.
            nn.init.zeros_(self.conv2.kernel.weight)
            nn.init.zeros_(self.conv2.kernel.bias)

    def forward(self, x: Tensor, state: State | None = None, inplace: bool = False) -> Tensor:
        """x [B, C, T, H, W] -> the same shape. `inplace`: without gradients the result may take the place of x."""
        if not self.temporal or needs_gradients(self, x):
            return self._whole(x, None, state)
        if state is None:
            return in_pieces(self._whole, x, 3, x.shape[1], inplace=inplace)
        return self._in_rows(x, state, inplace)

    def _in_rows(self, x: Tensor, state: State, inplace: bool) -> Tensor:
        """`_whole` of some rows after the others, each with its rows of the state."""
        convs = (self.conv1, self.conv2)
        before = [state.get(conv) for conv in convs]
        left: list[list[Tensor]] = [[], []]
        top = 0

        def rows(part: Tensor, out: Tensor | None) -> Tensor:
            nonlocal top
            height = part.shape[3]
            own: State = {
                conv: frames.narrow(3, top, height)
                for conv, frames in zip(convs, before, strict=True)
                if frames is not None
            }
            y = self._whole(part, out, own)
            for conv, found in zip(convs, left, strict=True):
                found.append(own[conv])
            top += height
            return y

        y = in_pieces(rows, x, 3, x.shape[1], inplace=inplace)
        for conv, found in zip(convs, left, strict=True):
            state[conv] = found[0] if len(found) == 1 else torch.cat(found, 3)
        return y

    def _whole(self, x: Tensor, out: Tensor | None = None, state: State | None = None) -> Tensor:
        return self.conv2(self.norm2(self.conv1(self.norm1(x), state)), state, residual=x, out=out)


class FrameAttention(nn.Module):
    """Self-attention over the positions of each frame, one head as wide as the channels, plus the input."""

    def __init__(self, channels: int, time_padding: str) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, activation=None)
        self.q, self.k, self.v, self.proj_out = (
            TimeConv(channels, channels, (1, 1, 1), time_padding) for _ in range(4)
        )

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """x [B, C, T, H, W] -> the same shape."""
        batch, channels, frames, height, width = x.shape
        normed = self.norm(x)
        q, k, v = (
            layer(normed).permute(0, 2, 3, 4, 1).reshape(batch * frames, 1, height * width, channels)
            for layer in (self.q, self.k, self.v)
        )  # [B*T, 1, H*W, C]
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed.reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
        return self.proj_out(mixed, residual=x)


class SpatialDown(nn.Module):
    """3x3 convolution of stride 2 per frame; one zero row below and one zero column to the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, C, T, H // 2, W // 2]."""
        kernel = self.conv
        return ops.causal_conv3d(
            x, kernel.volume(), kernel.bias, stride=(1, 2, 2), time_padding="none", spatial_padding=(0, 1, 0, 1)
        )


class SpatialUp(nn.Module):
    """Nearest doubling of height and width, then 3x3 per frame, without the doubled tensor (4/9 of the FLOPs)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, C, T, 2H, 2W]."""
        return ops.upsample_conv3d(x, self.conv.volume(), self.conv.bias, scale=(1, 2, 2))


class TemporalDown(nn.Module):
    """Half the frames: sigmoid(mix) * mean of 3 frames + (1 - sigmoid(mix)) * 3x3x3 convolution of stride 2.

    The mean is a filter of the convolution's own window, so the blend is folded into the weights.
    """

    def __init__(self, channels: int, time_padding: str) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))
        self.conv = TimeConv(channels, channels, (3, 3, 3), time_padding, time_stride=2)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """x [B, C, T, H, W] -> [B, C, T // 2, H, W]."""
        return self.conv(x, state, mix_factor=self.mix_factor)


class TemporalUp(nn.Module):
    """Twice the frames: u = x repeated (v1.0) or interpolated (v1.1); sigmoid(mix) * u + (1 - sigmoid(mix)) * conv(u).

    u is never made: each phase of the result is a convolution of x, with the blend folded into the weights.

    Args:
        split: v1.1 interpolates the first `split` frames and the others apart: they stem from different latent frames.
    """

    def __init__(self, channels: int, time_padding: str, split: int) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))
        self.conv = TimeConv(channels, channels, (3, 3, 3), time_padding)
        self.split = split

    def forward(self, x: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """x [B, C, T, H, W] -> [B, C, 2T, H, W].

        In streaming, v1.1 lags by half an input frame, since u[2k+1] needs frame k+1; `last` flushes it.
        """
        options: dict[str, Any] = {"scale": (2, 1, 1), "mix_factor": self.mix_factor}
        if self.conv.time_padding == "symmetric":
            options |= {"pad_frames": (1, 1)}
        elif self.conv.time_padding == "replicate":
            options |= {"mode": "linear_time", "split": self.split, "time_padding": "replicate"}
        weight, bias = self.conv.volume(), self.conv.kernel.bias
        if state is None:
            return ops.upsample_conv3d(x, weight, bias, **options)
        start, history = state.get(self, (0, None))
        y, history = ops.upsample_conv3d(
            x, weight, bias, history=history, start=start, final=last, return_history=True, **options
        )
        state[self] = (start + x.shape[2], history)
        return y
