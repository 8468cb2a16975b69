# SPDX-License-Identifier: Apache-2.0
"""The Haar transforms at both ends of Cosmos's tokenizers, for clips and for images: a matrix product of 2 x 2 x 2 numbers a level.

Upstream calls 14 convolutions a level for clips (6 for images), with kernels of two numbers for each channel, and as many transposed
ones to go back. Coefficients are [B, bands C, T, H, W], the last level's band first. One product of 64 numbers for two levels
would be 4 times as far from float64 as upstream.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels.patching._guard import guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules._frame_units import frames_reason
from vidkernels.patching.rules._vae_units import video_reason


def _matrix(wavelet: Tensor, axes: int, dtype: torch.dtype) -> Tensor:
    """[bands, numbers of a box], by the two numbers of a wavelet."""
    first, second = wavelet.double()
    pair = torch.stack([torch.stack([second, first]), torch.stack([first, -second])])  # [band, place]
    # A clip's bands are ordered by time, height and width, an image's by width and height.
    one = torch.einsum("at,bh,cw->abcthw", pair, pair, pair) if axes == 3 else torch.einsum("cw,bh->cbhw", pair, pair)
    return (one.reshape(2**axes, 2**axes) / math.sqrt(2**axes)).to(dtype)


def parted(x: Tensor, wavelet: Tensor) -> Tensor:
    """One level apart, [B, C, T, H, W] -> [B, 8 C, T / 2, H / 2, W / 2], or the same for images."""
    axes = x.ndim - 2
    if any(size % 2 for size in x.shape[2:]):
        x = F.pad(x, [side for size in reversed(x.shape[2:]) for side in (0, size % 2)], mode="reflect")
    size = [number // 2 for number in x.shape[2:]]
    for axis in range(axes + 1, 1, -1):
        x = x.unflatten(axis, (-1, 2))
    x = x.permute(0, *range(3, 3 + 2 * axes, 2), 1, *range(2, 2 + 2 * axes, 2))  # [B, 2, 2, 2, C, t, h, w]
    mixed = torch.matmul(_matrix(wavelet, axes, x.dtype), x.reshape(x.shape[0], 2**axes, -1))
    return mixed.reshape(x.shape[0], -1, *size)


def joined(coefficients: Tensor, wavelet: Tensor) -> Tensor:
    """One level together, [B, 8 C, T, H, W] -> [B, C, 2 T, 2 H, 2 W], or the same for images."""
    axes = coefficients.ndim - 2
    batch, channels, *size = coefficients.shape
    back = _matrix(wavelet, axes, coefficients.dtype).t() * float(2**axes)
    x = torch.matmul(back, coefficients.reshape(batch, 2**axes, -1))
    x = x.reshape(batch, *(2,) * axes, channels // 2**axes, *size)
    x = x.permute(0, 1 + axes, *(axis for i in range(axes) for axis in (2 + axes + i, 1 + i)))
    return x.reshape(batch, channels // 2**axes, *(2 * number for number in size))


def levels(module: Any) -> int:
    """How often the numbers of a patch are halved along each axis."""
    return int(math.log2(module.patch_size))


class Wavelet(Fused):
    """What the transforms share."""

    _axes = 3

    def _call_reason(self, x: Tensor) -> str | None:
        reason = video_reason(x) if self._axes == 3 else frames_reason(x)
        return reason or check(self) or ("an input is empty" if x.numel() == 0 else None)

    def _bands_reason(self, x: Tensor) -> str | None:
        reason, bands = self._call_reason(x), self.patch_size**self._axes
        if reason is None and x.shape[1] % bands:
            reason = f"{x.shape[1]} channels are no multiple of {bands} bands"
        return reason

    def _apart(self, x: Tensor) -> Tensor:
        """All levels; the first frame of a clip counts as often as a patch is long."""
        if self._axes == 3:
            x = torch.cat([x[:, :, :1].expand(-1, -1, self.patch_size - 1, -1, -1), x], 2)
        for _ in range(levels(self)):
            x = parted(x, self.wavelets)
        return x

    def _together(self, x: Tensor) -> Tensor:
        for _ in range(levels(self)):
            x = joined(x, self.wavelets)
        return x[:, :, self.patch_size - 1 :] if self._axes == 3 else x


class PatcherForward(Wavelet):
    """`Patcher3D.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, p^3 C, 1 + (T - 1) / p, H / p, W / p]."""
        return self._apart(x)

    def _reason(self, x: Tensor) -> str | None:
        return self._call_reason(x)


class UnPatcherForward(Wavelet):
    """`UnPatcher3D.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, p^3 C, T, H, W] -> [B, C, 1 + p (T - 1), p H, p W]."""
        return self._together(x)

    def _reason(self, x: Tensor) -> str | None:
        return self._bands_reason(x)


class FramePatcherForward(PatcherForward):
    """`Patcher.forward`: [N, C, H, W] -> [N, p^2 C, H / p, W / p]."""

    _axes = 2


class FrameUnPatcherForward(UnPatcherForward):
    """`UnPatcher.forward`: [N, p^2 C, H, W] -> [N, C, p H, p W]."""

    _axes = 2


def check(module: Any) -> str | None:
    """Why a transform can never be served."""
    if module.patch_method != "haar":
        return f"it takes patches apart by {module.patch_method!r}, which is one copy"
    if module.patch_size < 2 or module.patch_size != 2 ** levels(module) or module.wavelets.numel() != 2:
        return f"it has patches of {module.patch_size} and a wavelet of {module.wavelets.numel()}"
    return None


def clip_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A small clip."""
    side = module.patch_size
    return (torch.randn(1, 3, 1 + 2 * side, 2 * side, 3 * side).to(module.wavelets),), {}


def clip_bands(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Coefficients of a small clip."""
    return (torch.randn(1, 3 * module.patch_size**3, 3, 2, 3).to(module.wavelets),), {}


def _image_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(2, 3, 2 * module.patch_size, 3 * module.patch_size).to(module.wavelets),), {}


def _image_bands(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(2, 3 * module.patch_size**2, 2, 3).to(module.wavelets),), {}


def _rule(name: str, target: str, mixin: type, digests: dict[str, str], sample: Any) -> Rule:
    return Rule(
        name=f"cosmos_tokenizer.{name}",
        ops=("causal_conv3d",),
        targets=(f"cosmos_tokenizer.modules.patching:{target}",),
        mixin=mixin,
        digests={key: (value,) for key, value in digests.items()},
        features=("patch_size", "patch_method", "wavelets"),
        check=check,
        sample=sample,
        tested_versions=("Cosmos-Tokenizer (9ea5083)",),
    )


_APART = {"Patcher.forward": "aa3ba2be78f20164"}
_TOGETHER = {"UnPatcher.forward": "4500396063358f88"}

# Those for clips are subclasses of those for images, and come first.
RULES = (
    _rule(
        *("patcher", "Patcher3D", PatcherForward),
        _APART | {"Patcher3D._dwt": "62df8a3e6d760e3b", "Patcher3D._haar": "4bd74e65740c3631"},
        clip_sample,
    ),
    _rule(
        *("unpatcher", "UnPatcher3D", UnPatcherForward),
        _TOGETHER | {"UnPatcher3D._idwt": "9921f06f11b18aa9", "UnPatcher3D._ihaar": "e95d3829187786a0"},
        clip_bands,
    ),
    _rule(
        *("image_patcher", "Patcher", FramePatcherForward),
        _APART | {"Patcher._dwt": "1a85049331e6a0b8", "Patcher._haar": "510f1cba43e8803b"},
        _image_sample,
    ),
    _rule(
        *("image_unpatcher", "UnPatcher", FrameUnPatcherForward),
        _TOGETHER | {"UnPatcher._idwt": "af3bda0569feb25c", "UnPatcher._ihaar": "2e7ddc1882824b8e"},
        _image_bands,
    ),
)
