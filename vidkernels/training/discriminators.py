# SPDX-License-Identifier: Apache-2.0
"""Discriminators over video [B, 3, T, H, W]. They are built from torch's own convolutions: R1 differentiates them twice."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels.errors import ShapeError
from vidkernels.ops._checks import check_ndim, check_option

SLOPE = 0.2
NORMS = ("none", "group", "batch")


def _norm(kind: str, channels: int, dims: int) -> nn.Module:
    if kind == "group":
        return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)
    if kind == "batch":
        return (nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d)(channels)
    return nn.Identity()


class PatchGAN(nn.Module):
    """One logit per patch (arXiv 1611.07004): 4-wide convolutions, `layers` of stride 2, doubling the width up to 8 times.

    Args:
        dims: 2: each frame by itself; 3: volumes, whose time is halved in the layers `temporal` counts.
        channels: width of the first layer. layers: strided ones; each patch sees 70 pixels for 3.
        norm: "batch" as VQGAN, "group", or "none" (the form R1 is meant for).
        temporal: 3-D: how many of the strided layers, from the last one backwards, also halve the frames.
    """

    def __init__(
        self, dims: int = 2, channels: int = 64, layers: int = 3, norm: str = "group", temporal: int = 2
    ) -> None:
        super().__init__()
        check_option("dims", dims, (2, 3))
        check_option("norm", norm, NORMS)
        self.dims, self.smallest = dims, 3 * 2**layers
        widths = [min(2**i, 8) * channels for i in range(layers + 1)]
        steps: list[nn.Module] = []
        for i in range(layers + 1):
            stride = 2 if i < layers else 1
            halves = stride == 2 and i >= layers - temporal
            steps += [
                self._conv(3 if i == 0 else widths[i - 1], widths[i], stride, halves, bias=i == 0 or norm == "none"),
                _norm(norm if i else "none", widths[i], dims),
                nn.LeakyReLU(SLOPE),
            ]
        self.body = nn.Sequential(*steps, self._conv(widths[-1], 1, 1, False, bias=True))

    def _conv(self, cin: int, cout: int, stride: int, temporal: bool, bias: bool) -> nn.Module:
        if self.dims == 2:
            return nn.Conv2d(cin, cout, 4, stride, 1, bias=bias)
        # 3 frames wide, so that a clip of any length, one frame included, keeps ceil(T / stride) frames.
        return nn.Conv3d(cin, cout, (3, 4, 4), (2 if temporal else 1, stride, stride), 1, bias=bias)

    def check_size(self, size: tuple[int, ...]) -> None:
        """Refuse clips of a size (frames, height, width) that the strided layers leave nothing of."""
        if min(size[1:]) < self.smallest:
            expected = f"height and width of at least {self.smallest}"
            raise ShapeError("video", expected, tuple(size[1:]), "Use fewer strided layers or larger clips.")

    def forward(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> logits [B, 1, t, h, w]."""
        check_ndim("video", video, 5)
        self.check_size(tuple(video.shape[2:]))
        if self.dims == 3:
            return self.body(video)
        frames = self.body(video.movedim(2, 1).flatten(0, 1))
        return frames.unflatten(0, (video.shape[0], video.shape[2])).movedim(1, 2)


class _Halve(nn.Module):
    """Half the size on every axis longer than 1, rounded up: the mean of 2, or the filter (1, 2, 1) / 4 (arXiv 1904.11486)."""

    def __init__(self, blur: bool) -> None:
        super().__init__()
        self.blur = blur

    def forward(self, x: Tensor) -> Tensor:
        if not self.blur:
            size = [2 if side > 1 else 1 for side in x.shape[2:]]
            return F.avg_pool3d(x, size, ceil_mode=True, count_include_pad=False)
        for axis in (2, 3, 4):
            if x.shape[axis] == 1:
                continue
            taps = x.new_full((3,), 0.25)  # filled there: a copy from the host would wait for the device
            taps[1] = 0.5
            shape, stride, pad = [1, 1, 1], [1, 1, 1], [0] * 6
            shape[axis - 2], stride[axis - 2] = 3, 2
            pad[2 * (4 - axis)] = pad[2 * (4 - axis) + 1] = 1
            kernel = taps.view(1, 1, *shape).expand(x.shape[1], -1, -1, -1, -1)
            x = F.conv3d(F.pad(x, pad, mode="replicate"), kernel, stride=stride, groups=x.shape[1])
        return x


class _ResidualDown(nn.Module):
    def __init__(self, cin: int, cout: int, blur: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(cin, cin, 3, padding=1)
        self.conv2 = nn.Conv3d(cin, cout, 3, padding=1)
        self.shortcut = nn.Conv3d(cin, cout, 1, bias=False)
        self.halve = _Halve(blur)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.conv1(x), SLOPE)
        y = F.leaky_relu(self.conv2(self.halve(y)), SLOPE)
        return (y + self.shortcut(self.halve(x))) / math.sqrt(2)


class StyleDiscriminator(nn.Module):
    """StyleGAN's residual discriminator in 3-D, as MAGVIT's (arXiv 2212.05199): one logit per clip.

    3x3x3 convolution, residual blocks that halve every axis, 3x3x3 convolution, two dense layers.

    Args:
        size: (frames, height, width) of the clips.
        channels: base width. multipliers: width of each block's output.
        blur: halve with (1, 2, 1) / 4 (MAGVIT-v2) instead of the mean of 2 (MAGVIT).
    """

    def __init__(
        self,
        size: tuple[int, int, int],
        channels: int = 64,
        multipliers: tuple[int, ...] = (2, 4, 4, 4, 4),
        blur: bool = False,
    ) -> None:
        super().__init__()
        self.size = tuple(size)
        self.conv_in = nn.Conv3d(3, channels, 3, padding=1)
        widths = [channels, *(channels * m for m in multipliers)]
        self.blocks = nn.Sequential(
            *(_ResidualDown(cin, cout, blur) for cin, cout in zip(widths, widths[1:], strict=False))
        )
        self.conv_out = nn.Conv3d(widths[-1], widths[-1], 3, padding=1)
        positions = math.prod(math.ceil(side / 2 ** len(multipliers)) for side in size)
        self.dense = nn.Linear(widths[-1] * positions, widths[-1])
        self.logit = nn.Linear(widths[-1], 1)

    def forward(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] of the constructor's size -> logits [B, 1]."""
        check_ndim("video", video, 5)
        if tuple(video.shape[2:]) != self.size:
            raise ShapeError(
                "video", f"clips of {self.size}", tuple(video.shape[2:]), "The dense layer fixes the size."
            )
        x = self.blocks(F.leaky_relu(self.conv_in(video), SLOPE))
        x = F.leaky_relu(self.conv_out(x), SLOPE).flatten(1)
        return self.logit(F.leaky_relu(self.dense(x), SLOPE))
