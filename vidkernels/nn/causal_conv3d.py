# SPDX-License-Identifier: Apache-2.0
"""Causal convolutions and the samplers of video tokenizers as modules. State is explicit: a clip may come in chunks.

`layer(x)` takes a whole clip. `y, state = layer(x, state, return_state=True)` takes a chunk: `state` is None for the
first one and what the call before returned for the others. Modules keep nothing between calls. All layers take
[B, C, T, H, W] in any layout; `torch.channels_last_3d` is fastest, and kept.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.errors import DTypeError
from vidkernels.ops._causal_conv3d_call import triple
from vidkernels.ops._checks import check_flag, check_number, check_sizes, check_tensor


class _Kernel(nn.Module):
    """Weight [K, C, kt, kh, kw] and bias [K], initialised as `torch.nn.Conv3d` does."""

    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        *,
        bias: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels)
        check_flag("bias", bias)
        kernel = triple("kernel_size", kernel_size)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.kernel_size, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **factory)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan in), as PyTorch's convolutions."""
        bound = 1 / math.sqrt(max(self.in_channels * math.prod(self.kernel_size), 1))
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"


class CausalConv3d(_Kernel):
    """3D convolution that never looks into the future; parameters as `torch.nn.Conv3d` (`weight`, `bias`).

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, bias: as in `torch.nn.Conv3d`.
        time_padding, pad_frames, spatial_padding, spatial_padding_mode, activation, backend: as in `ops.causal_conv3d`.
        device, dtype: of the parameters.

    The state between chunks is a tensor [B, C, P, H, W]: the last frames that the next chunk reads.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        dilation: int | tuple[int, int, int] = 1,
        *,
        bias: bool = True,
        time_padding: str = "zeros",
        pad_frames: int | tuple[int, int] | None = None,
        spatial_padding: int | tuple[int, ...] | None = None,
        spatial_padding_mode: str = "zeros",
        activation: str | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, device=device, dtype=dtype)
        self.stride, self.dilation, self.time_padding = (
            triple("stride", stride),
            triple("dilation", dilation),
            time_padding,
        )
        self.pad_frames, self.spatial_padding, self.spatial_padding_mode = (
            pad_frames,
            spatial_padding,
            spatial_padding_mode,
        )
        self.activation, self.backend = activation, backend

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, residual: Tensor | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, C, T, H, W] -> [B, K, To, Ho, Wo] (+ residual), and the next state if asked."""
        # A later chunk has all its frames in front in its state, whose length varies with strides.
        carried: dict[str, Any] = {"time_padding": self.time_padding, "pad_frames": self.pad_frames}
        if state is not None:
            carried = {"time_padding": "history", "history": state}
        return ops.causal_conv3d(
            *(x, self.weight, self.bias),
            stride=self.stride,
            dilation=self.dilation,
            spatial_padding=self.spatial_padding,
            spatial_padding_mode=self.spatial_padding_mode,
            activation=self.activation,
            residual=residual,
            return_history=return_state,
            backend=self.backend,
            **carried,
        )


class SpatialDownsample(_Kernel):
    """3x3 convolution of stride 2 in every frame, padded on the right and at the bottom (VidTok's `Downsample2D`).

    Args:
        channels: in and out.
        device, dtype: of the parameters, weight [C, C, 1, 3, 3] and bias [C].
    """

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(channels, channels, (1, 3, 3), bias=True, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, C, T, H // 2, W // 2]; frames are independent, so there is no state."""
        return ops.causal_conv3d(x, self.weight, self.bias, stride=(1, 2, 2), spatial_padding=(0, 1, 0, 1))


class SpatialUpsample(_Kernel):
    """Nearest doubling of height and width, then a 3x3 convolution, in every frame: VidTok's `Upsample2D` at 4/9 of the work.

    Args:
        channels: in; `out_channels`: out, default `channels`.
        device, dtype: of the parameters, weight [K, C, 1, 3, 3] and bias [K].
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, out_channels or channels, (1, 3, 3), bias=True, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, K, T, 2H, 2W]; frames are independent, so there is no state."""
        return ops.upsample_conv3d(x, self.weight, self.bias, scale=(1, 2, 2))


class TemporalDownsample(_Kernel):
    """Halve the frames: `s(m) mean of 3 frames + (1 - s(m)) conv 3x3x3 of stride 2` as one convolution (VidTok).

    Args:
        channels: in and out.
        time_padding: "zeros" (VidTok 1.0), "replicate" (1.1) or "behind" (non-causal: one zero frame at the end).
        mix_factor: initial value of the learned m.

    The state between chunks is a tensor [B, C, P, H, W].
    """

    def __init__(
        self,
        channels: int,
        *,
        time_padding: str = "zeros",
        mix_factor: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels, 3, bias=True, device=device, dtype=dtype)
        check_number("mix_factor", mix_factor)
        self.mix_factor = nn.Parameter(torch.tensor([float(mix_factor)], device=device, dtype=dtype))
        self.time_padding = time_padding

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, C, T, H, W] -> [B, C, T // 2, H, W], and the next state if asked."""
        options: dict[str, Any] = {"time_padding": self.time_padding}
        if self.time_padding == "behind":
            options = {"pad_frames": (0, 1)}
        if state is not None:
            options = {"time_padding": "history", "history": state}
        return ops.downsample_conv3d(
            x, self.weight, self.bias, mix_factor=self.mix_factor, return_history=return_state, **options
        )


class UpsampleState(NamedTuple):
    """What `TemporalUpsample` carries from chunk to chunk: the last frames, and how many frames there have been."""

    history: Tensor
    frames: int


class TemporalUpsample(_Kernel):
    """Double the frames: `s(m) u + (1 - s(m)) conv 3x3x3(u)` for u = upsample(x), which is never stored (VidTok).

    Args:
        channels: in and out.
        mode: "nearest" (VidTok 1.0 and non-causal) or "linear_time" (1.1).
        split: frames at the clip's start that are interpolated by themselves (1.1: 1, 2, 4 in decoding order).
        time_padding: "zeros" (1.0), "replicate" (1.1) or "symmetric" (non-causal).
        mix_factor: initial value of the learned m.

    Linear interpolation needs the next frame, so a chunk returns one frame less than it will have; `final=True` on the
    last chunk (which may be empty) returns the rest.
    """

    def __init__(
        self,
        channels: int,
        *,
        mode: str = "nearest",
        split: int = 0,
        time_padding: str = "zeros",
        mix_factor: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels, 3, bias=True, device=device, dtype=dtype)
        check_number("mix_factor", mix_factor)
        self.mix_factor = nn.Parameter(torch.tensor([float(mix_factor)], device=device, dtype=dtype))
        self.mode, self.split, self.time_padding = mode, split, time_padding

    def forward(
        self,
        x: Tensor,
        state: UpsampleState | None = None,
        *,
        final: bool | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, UpsampleState]:
        """x [B, C, T, H, W] -> [B, C, 2T, H, W], and the next state if asked. `final`: default unless `return_state`."""
        check_tensor("x", x)
        if state is not None and not isinstance(state, UpsampleState):
            raise DTypeError("state", "an UpsampleState", type(state).__name__, "Pass what the call before returned.")
        padding: dict[str, Any] = {"time_padding": self.time_padding}
        if self.time_padding == "symmetric":
            padding = {"pad_frames": (1, 1)}
        start = 0 if state is None else state.frames
        result = ops.upsample_conv3d(
            *(x, self.weight, self.bias),
            mode=self.mode,
            split=self.split,
            history=None if state is None else state.history,
            start=start,
            final=final,
            mix_factor=self.mix_factor,
            return_history=return_state,
            **padding,
        )
        return (result[0], UpsampleState(result[1], start + x.shape[2])) if return_state else result
