# SPDX-License-Identifier: Apache-2.0
"""Samplers of Open-Sora-Plan's causal VAEs: in space, in time, or both; with a convolution, a mean, or a blend of the two."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import child_reason, guarded, is_autocast, parameter_of
from vidkernels.patching.rules import _frame_units as frames
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._opensora_plan_units import (
    Family,
    as_clip,
    as_given,
    averaged,
    causal,
    interpolated,
    raised,
)
from vidkernels.patching.rules._vae_units import channels_last, restored


class FrameUpForward(Family):
    """`Upsample.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] or images [N, C, H, W] -> height and width doubled."""
        return as_given(frames.doubled(self, self.conv, as_clip(x)), x)

    def _reason(self, x: Tensor) -> str | None:
        return self._frames_reason(x) or frames.doubling_reason(self.conv)


class FrameDownForward(Family):
    """`Downsample.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] or images [N, C, H, W] -> height and width halved; with `undown` as they are."""
        if getattr(self, "undown", False):
            return as_given(frames.per_frame(self, self.conv, as_clip(x)), x)
        return as_given(frames.halved(self, self.conv, as_clip(x)), x)

    def _reason(self, x: Tensor) -> str | None:
        given = frames.conv_reason if getattr(self, "undown", False) else frames.halving_reason
        return self._frames_reason(x) or given(self.conv)


class DownForward(Family):
    """`SpatialDownsample2x.forward`, `Spatial2xTime2x3DDownsample.forward` and `Spatial2x3DDownsample.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> height and width halved, perhaps frames too, but the first; a zero row and column behind."""
        return restored(causal(self, self.conv, channels_last(x), behind=1), x)

    def _reason(self, x: Tensor) -> str | None:
        return self._clip_reason(x) or self._conv_reason(self.conv)


class UpForward(Family):
    """`SpatialUpsample2x.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> height and width doubled; with `unup` as they are."""
        clip, kernel = channels_last(x), self.conv.conv
        if getattr(self, "unup", False):
            return restored(causal(self, self.conv, clip), x)
        options = {"scale": (1, 2, 2), "pad_frames": 0, "backend": self._vidkernels_backend("causal_conv3d")}
        y: Tensor = ops.upsample_conv3d(clip, kernel.weight, kernel.bias, **options)
        return restored(y, x)

    def _reason(self, x: Tensor) -> str | None:
        return self._clip_reason(x) or self._conv_reason(self.conv)


class LinearUpForward(Family):
    """`Spatial2xTime2x3DUpsample.forward` and `Spatial2x3DUpsample.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 2 T - 1, 2 H, 2 W] or [B, C, T, 2 H, 2 W], interpolated, and a causal convolution."""
        return restored(causal(self, self.conv, self._doubled(channels_last(x))), x)

    def _reason(self, x: Tensor) -> str | None:
        reason = self._clip_reason(x) or self._conv_reason(self.conv)
        if reason is None and getattr(self, "causal_cached", None) and not getattr(self, "enable_cached", False):
            reason = "an upsampler holds frames, but was told to keep none"
        return reason

    def _doubled(self, x: Tensor) -> Tensor:
        if not hasattr(self, "t_interpolation"):
            return interpolated(x, (2, 2, 2))
        if getattr(self, "enable_cached", False):
            return self._doubled_chunk(x)
        return interpolated(x, (2, 1, 1), (1, 2, 2))  # later versions round in between

    def _doubled_chunk(self, x: Tensor) -> Tensor:
        """The kept frame is interpolated with the chunk, and its two frames dropped; the last frames come again."""
        counted = hasattr(
            self, "depth"
        )  # the latest version: how many frames come again; it keeps none of a single frame
        if counted and x.shape[2] == 1:
            return channels_last(raised(x, (1, 2, 2)))
        follows = len(self.causal_cached) > 0
        if follows:
            x = torch.cat([self.causal_cached.popleft().to(x.dtype), x], 2)
        again = 2**self.depth if counted else 1 if follows else 0
        end = max(x.shape[2] - again, 0)
        self.causal_cached.append(x[:, :, max(end - 1, 0) : end].clone())
        if follows:
            return channels_last(raised(raised(x, (2, 1, 1))[:, :, 2:], (1, 2, 2)))
        if counted:
            return channels_last(raised(x, (2, 1, 1), (1, 2, 2)))
        return interpolated(x, (2, 1, 1), (1, 2, 2))


class SpaceLinearUpForward(LinearUpForward):
    """`Spatial2x3DUpsample.forward`."""

    def _doubled(self, x: Tensor) -> Tensor:
        return channels_last(F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear"))


class MeanDownForward(Family):
    """`TimeDownsample2x.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> every second frame, a mean of it and of those before it."""
        return restored(averaged(channels_last(x), self.kernel_size), x)

    def _reason(self, x: Tensor) -> str | None:
        return self._clip_reason(x) or _pool_reason(self._modules["conv"], self.kernel_size)


def _pool_reason(pool: Any, count: int) -> str | None:
    """Why a mean of so many frames must be called."""
    reason = child_reason(pool, nn.AvgPool3d)
    if reason is None and (pool.kernel_size, pool.stride) != ((count, 1, 1), (2, 1, 1)):
        reason = f"a mean is over {pool.kernel_size} values, every {pool.stride}"
    return reason


class MeanUpForward(Family):
    """`TimeUpsample2x.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 2 T - 1, H, W], interpolated."""
        return restored(interpolated(channels_last(x), (2, 1, 1)), x)

    def _reason(self, x: Tensor) -> str | None:
        return self._clip_reason(x)


class _Blended(Family):
    """A convolution blended with a mean or an interpolation, by a learned factor."""

    def _is_one_op(self, x: Tensor, kernel: Any) -> bool:
        """Whether the blend goes into the convolution's weights: not where they are more numbers than the clip."""
        weight = parameter_of(kernel, "weight")
        same = self.mix_factor.dtype == x.dtype == weight.dtype
        return same and not is_autocast(x) and x.numel() >= weight.numel()

    def _blend(self, smooth: Tensor, convolved: Tensor) -> Tensor:
        alpha = torch.sigmoid(self.mix_factor)
        return channels_last(alpha * smooth + (1 - alpha) * convolved)


class BlendedDownForward(_Blended):
    """`TimeDownsampleRes2x.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, (T + 1) / 2, H, W]."""
        clip, kernel = channels_last(x), self.conv
        front = kernel.kernel_size[0] - 1
        options: dict[str, Any] = {"time_padding": "replicate", "pad_frames": (front, 0)}
        if not self._is_one_op(clip, kernel):
            convolved = units.convolve(self, kernel, clip, spatial_padding=kernel.padding[1:], **options)
            return restored(self._blend(averaged(clip, front + 1), convolved), x)
        options |= {"stride": kernel.stride, "backend": self._vidkernels_backend("causal_conv3d")}
        y: Any = ops.downsample_conv3d(clip, kernel.weight, kernel.bias, mix_factor=self.mix_factor, **options)
        return restored(y, x)

    def _reason(self, x: Tensor) -> str | None:
        reason = self._clip_reason(x) or units.kernel_reason(self._modules["conv"], nn.Conv3d)
        return reason or _pool_reason(self._modules["avg_pool"], self.conv.kernel_size[0])


class BlendedUpForward(_Blended):
    """`TimeUpsampleRes2x.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 2 T - 1, H, W]."""
        clip, kernel = channels_last(x), self.conv.conv
        if not self._is_one_op(clip, kernel):
            doubled = interpolated(clip, (2, 1, 1))
            return restored(self._blend(doubled, causal(self, self.conv, doubled)), x)
        # Interpolated by itself the first frame appears twice: without the first of the two, what is left is upstream's.
        rule: dict[str, Any] = {"scale": (2, 1, 1), "mode": "linear_time", "split": 1, "time_padding": "replicate"}
        rule["backend"] = self._vidkernels_backend("causal_conv3d")
        y: Any = ops.upsample_conv3d(clip, kernel.weight, kernel.bias, mix_factor=self.mix_factor, **rule)
        return restored(channels_last(y[:, :, 1:]), x)

    def _reason(self, x: Tensor) -> str | None:
        return self._clip_reason(x) or self._conv_reason(self.conv)


def up_check(module: Any) -> str | None:
    kernel = module.conv.conv
    found = kernel.kernel_size, kernel.stride, tuple(kernel.padding)
    return None if found == ((1, 3, 3), (1, 1, 1), (0, 1, 1)) else f"its convolution is {found}"


def blended_check(module: Any) -> str | None:
    kernel = getattr(module.conv, "conv", module.conv)
    up = kernel is not module.conv
    wanted = (3, 3, 3), (1, 1, 1) if up else (2, 1, 1), (0, 1, 1)
    found = kernel.kernel_size, kernel.stride, tuple(kernel.padding)
    if found != wanted or kernel.in_channels != kernel.out_channels:
        return f"its convolution is {found} from {kernel.in_channels} to {kernel.out_channels} channels"
    return None


def linear_check(module: Any) -> str | None:
    mode = getattr(module, "t_interpolation", "trilinear")
    return None if mode == "trilinear" else f"it interpolates frames by {mode}"
