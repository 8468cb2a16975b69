# SPDX-License-Identifier: Apache-2.0
"""Convolutions and samplers in NVIDIA's own code of the Cosmos tokenizers: torch's convolutions behind repeated first frames."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching.rules import _cosmos_units as cosmos
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason


def _padding(conv: Any) -> cosmos.Padding:
    """What a convolution pads: repeated first frames, and the same on all sides of a frame."""
    space = {"spatial_padding": conv.spatial_pad, "spatial_padding_mode": units.PAD_MODES[conv.pad_mode]}
    return {"time_padding": "replicate", "pad_frames": conv.time_pad, **space}


def _parts(conv: Any) -> tuple[Any, ...]:
    """A convolution in space and one in time, or the one convolution."""
    return tuple(conv._modules.values()) if type(conv) is nn.Sequential else (conv,)


def convolve(owner: Any, conv: Any, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """A convolution, or one after the other, the last one plus the residual."""
    *before, last = _parts(conv)
    for part in before:
        x = units.convolve(owner, part._modules["conv3d"], x, **_padding(part))
    return units.convolve(owner, last._modules["conv3d"], x, residual, out, **_padding(last))


def conv_check(conv: Any) -> str | None:
    """Why kernels cannot serve a convolution's options."""
    if conv.pad_mode not in units.PAD_MODES or conv.time_pad < 0:
        return f"a convolution pads by mode {conv.pad_mode} and {conv.time_pad} frames"
    return units.options_reason(conv._modules["conv3d"]) or units.unpadded_reason(conv._modules["conv3d"])


class Family(Fused):
    """What modules of these files share."""

    def _convs_reason(self, *convs: Any) -> str | None:
        for conv in convs:
            reason = child_reason(conv, nn.Sequential) if type(conv) is nn.Sequential else None
            for part in _parts(conv):
                reason = reason or child_reason(part, self._vidkernels_home.CausalConv3d)
                reason = reason or units.kernel_reason(part._modules["conv3d"], nn.Conv3d) or conv_check(part)
            if reason is not None:
                return reason
        return None

    def _norms_reason(self, *norms: Any) -> str | None:
        for norm in norms:
            reason = child_reason(norm, self._vidkernels_home.CausalNormalize) or units.group_reason(norm.norm)
            if reason is not None:
                return reason
        return None

    def _normed(self, norm: Any, x: Tensor, activation: str | None = "silu") -> Tensor:
        return units.group_normed(self, norm.norm, x, activation, per_frame=norm.num_groups == 1)


class ConvForward(Family):
    """`CausalConv3d.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W]."""
        return convolve(self, self, x)

    def _reason(self, x: Tensor) -> str | None:
        return video_reason(x) or units.kernel_reason(self.conv3d, nn.Conv3d) or conv_check(self)


class _Sampler(Family):
    def _used_reason(self, x: Tensor, first: bool, second: bool) -> str | None:
        used = (first, self.conv1), (second, self.conv2), (True, self.conv3)
        return video_reason(x) or samples_nothing(self) or self._convs_reason(*(conv for on, conv in used if on))


class HybridDownForward(_Sampler):
    """`CausalHybridDownsample3d.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> half the height and width, half the frames: convolutions plus means."""
        clip = channels_last(x)
        if self.spatial_down:
            clip = cosmos.halved_in_space(self, self.conv1.conv3d, _padding(self.conv1), clip)
        if self.temporal_down:
            clip = cosmos.halved_in_time(self, self.conv2.conv3d, _padding(self.conv2), clip)
        return restored(convolve(self, self.conv3, clip), x)

    def _reason(self, x: Tensor) -> str | None:
        reason = self._used_reason(x, self.spatial_down, self.temporal_down)
        if reason is None and self.spatial_down:
            return _halving_reason(self.conv1, x)
        return reason


def _halving_reason(conv: Any, x: Tensor) -> str | None:
    if any(conv.spatial_pad):
        return f"a convolution behind padded frames pads them by {conv.spatial_pad}, too"
    odd = x.shape[3] % 2 or x.shape[4] % 2  # upstream's two halves differ by a pixel then
    return f"its frames have {x.shape[3]} x {x.shape[4]} pixels" if odd else None


class HybridUpForward(_Sampler):
    """`CausalHybridUpsample3d.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> 2 T - 1 frames, doubled height and width: repeated values plus their convolutions."""
        clip = channels_last(x)
        if self.temporal_up:
            clip = cosmos.doubled_in_time(self, self.conv1.conv3d, _padding(self.conv1), clip)
        if self.spatial_up:
            clip = cosmos.doubled_in_space(self, self.conv2.conv3d, _padding(self.conv2), clip)
        return restored(convolve(self, self.conv3, clip), x)

    def _reason(self, x: Tensor) -> str | None:
        return self._used_reason(x, self.temporal_up, self.spatial_up)


def samples_nothing(module: Any) -> str | None:
    """A sampler of a level that has none."""
    kinds = ("spatial_up", "temporal_up", "spatial_down", "temporal_down")
    return None if any(getattr(module, kind, False) for kind in kinds) else "it samples nothing"


class DownForward(Family):
    """`CausalDownsample3d.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, (T + 1) / 2, H / 2, W / 2]."""
        padding = _padding(self.conv)
        zeros = {"spatial_padding": (0, 1, 0, 1), "spatial_padding_mode": "zeros"}
        options = padding | zeros | {"pad_frames": padding["pad_frames"] + 1}
        return restored(units.convolve(self, self.conv.conv3d, channels_last(x), **options), x)

    def _reason(self, x: Tensor) -> str | None:
        reason = video_reason(x) or self._convs_reason(self.conv)
        if reason is None and any(self.conv.spatial_pad):
            reason = f"a convolution behind padded frames pads them by {self.conv.spatial_pad}, too"
        return reason


class UpForward(Family):
    """`CausalUpsample3d.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 2 T - 1, 2 H, 2 W]."""
        return restored(cosmos.upsampled(self, self.conv.conv3d, _padding(self.conv), channels_last(x), (2, 2, 2)), x)

    def _reason(self, x: Tensor) -> str | None:
        return video_reason(x) or self._convs_reason(self.conv)
