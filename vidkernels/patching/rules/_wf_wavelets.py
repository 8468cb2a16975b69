# SPDX-License-Identifier: Apache-2.0
"""WF-VAE's wavelet transforms: one matrix product of the numbers of a box, 2 x 2 x 2 or 2 x 2, with the weights.

Upstream calls a convolution with one channel for each of the eight, or four, bands, and one transposed convolution a band to go
back, for frames one by one. Coefficients are [B, bands C, T, H, W], bands first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import guarded
from vidkernels.patching._match import digest
from vidkernels.patching.rules._opensora_plan_units import Family

VOLUME = ("h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v")
FRAME = ("aa", "ad", "da", "dd")
_BOX = {len(VOLUME): (2, 2, 2), len(FRAME): (1, 2, 2)}


def bands(x: Tensor, weights: list[Tensor]) -> Tensor:
    """[B, C, T, H, W] -> [B, n C, T', H / 2, W / 2], by n weights of n numbers; what does not fill a box is left out."""
    batch, channels = x.shape[:2]
    count, box = len(weights), _BOX[len(weights)]
    frames, height, width = (size // side for size, side in zip(x.shape[2:], box, strict=True))
    x = x[:, :, : frames * box[0], : 2 * height, : 2 * width]
    x = x.unflatten(4, (width, 2)).unflatten(3, (height, 2)).unflatten(2, (frames, box[0]))
    x = x.permute(0, 3, 5, 7, 1, 2, 4, 6).flatten(4).flatten(1, 3)  # [B, n, C T' H / 2 W / 2], a copy
    mixed = torch.matmul(torch.stack([weight.flatten() for weight in weights]), x)
    return mixed.reshape(batch, count * channels, frames, height, width)


def rebuilt(coefficients: Tensor, weights: list[Tensor]) -> Tensor:
    """The transposed `bands`."""
    batch, count, frames, height, width = coefficients.shape
    box = _BOX[len(weights)]
    boxes = coefficients.unflatten(1, (len(weights), -1)).flatten(2)
    mixed = torch.matmul(torch.stack([weight.flatten() for weight in weights]).t(), boxes)
    parts = mixed.reshape(batch, *box, count // len(weights), frames, height, width)
    rows = parts.permute(0, 4, 5, 1, 6, 2, 7, 3)
    return rows.reshape(batch, count // len(weights), frames * box[0], 2 * height, 2 * width)


# Forwards that call their convolutions for one channel of one sample after the other.
_BY_CHANNEL = {"31164f0171f81056", "8a41ef93ca302340"}


@lru_cache(maxsize=64)
def _calls_by_channel(cls: type[nn.Module]) -> bool:
    return digest(cls.forward) in _BY_CHANNEL


class HaarForward(Family):
    """`HaarWaveletTransform3D.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, 8 C, 1 + (T - 1) / 2, H / 2, W / 2]; [B, 8 C, T / 2, ...] in a later chunk."""
        convs = self._convs()
        weights = [conv._modules["conv"].weight for conv in convs]
        calls = x.shape[0] * x.shape[1] if _calls_by_channel(self._vidkernels_base) else 1
        for conv in convs:
            self._keep(conv, x, calls)
        if not convs[0].is_first_chunk:
            return bands(x, weights)
        return bands(
            torch.cat([x[:, :, :1], x], 2), weights
        )  # held by nobody else, it goes once it is arranged in boxes

    def _keep(self, conv: Any, x: Tensor, calls: int) -> None:
        """No frames, as often and in the shape in which upstream's calls of a convolution keep them: [B C / calls, 1, 0, H, W]."""
        if not conv.is_first_chunk:
            for _ in range(calls):
                conv.causal_cached.popleft()
        if conv.enable_cached:
            volumes = x.shape[0] * x.shape[1] // max(calls, 1)
            conv.causal_cached.extend(x.new_empty(volumes, 1, 0, *x.shape[3:]) for _ in range(calls))

    def _convs(self) -> list[Any]:
        return [self._modules[f"{name}_conv"] for name in VOLUME]

    def _reason(self, x: Tensor) -> str | None:
        convs = self._convs()
        reason = self._clip_reason(x) or self._conv_reason(*convs)
        if reason is not None:
            return reason
        for conv in convs:
            if conv.is_first_chunk != convs[0].is_first_chunk:
                return "its convolutions are at different chunks"
            if not conv.is_first_chunk and any(kept.shape[2] != 0 for kept in conv.causal_cached):
                return "its convolutions have kept frames"
        return None


class InverseHaarForward(Family):
    """`InverseHaarWaveletTransform3D.forward`."""

    @guarded
    def forward(self, coeffs: Tensor) -> Tensor:
        """[B, 8 C, T, H, W] -> [B, C, 2 T - 1, 2 H, 2 W]; 2 T frames in a later chunk."""
        x = rebuilt(coeffs, [getattr(self, name) for name in VOLUME])
        return x if self.enable_cached and not self.is_first_chunk else x[:, :, 1:].contiguous()

    def _reason(self, coeffs: Tensor) -> str | None:
        return self._clip_reason(coeffs)


class FrameHaarForward(Family):
    """`HaarWaveletTransform2D.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, 4 C, T, H / 2, W / 2]; or images [N, C, H, W]."""
        weights = [getattr(self, name) for name in FRAME]
        return bands(x, weights) if x.ndim == 5 else bands(x.unsqueeze(2), weights).squeeze(2)

    def _reason(self, x: Tensor) -> str | None:
        return self._frames_reason(x)


class InverseFrameHaarForward(Family):
    """`InverseHaarWaveletTransform2D.forward`."""

    @guarded
    def forward(self, coeffs: Tensor) -> Tensor:
        """[B, 4 C, T, H, W] -> [B, C, T, 2 H, 2 W]; or images [N, 4 C, H, W]."""
        weights = [getattr(self, name) for name in FRAME]
        return rebuilt(coeffs, weights) if coeffs.ndim == 5 else rebuilt(coeffs.unsqueeze(2), weights).squeeze(2)

    def _reason(self, coeffs: Tensor) -> str | None:
        return self._frames_reason(coeffs)


def conv_check(module: Any) -> str | None:
    """A convolution of a wavelet transform that is none of its kind."""
    for name in VOLUME:
        conv = getattr(module, f"{name}_conv")
        kernel = conv.conv
        found = kernel.in_channels, kernel.out_channels, kernel.kernel_size, kernel.stride, tuple(kernel.padding)
        if found != (1, 1, (2, 2, 2), (2, 2, 2), (0, 0, 0)) or kernel.bias is not None:
            return f"its convolution {name} has other sizes, or a bias"
        if not hasattr(conv, "is_first_chunk"):
            return f"its convolution {name} knows no chunks"
    return None


def buffer_check(module: Any) -> str | None:
    """A transform whose weights have other sizes."""
    return None if all(getattr(module, name).numel() == 8 for name in VOLUME) else "its weights have other sizes"


def sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A small clip."""
    return (torch.randn(1, 3, 5, 8, 12).to(_weight(module)),), {}


def inverse_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Coefficients of eight bands."""
    return (torch.randn(1, 24, 3, 4, 6).to(_weight(module)),), {}


def inverse_frame_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Coefficients of four bands."""
    return (torch.randn(1, 12, 3, 4, 6).to(_weight(module)),), {}


def _weight(module: Any) -> Tensor:
    return next(iter((*module.parameters(), *module.buffers())))
