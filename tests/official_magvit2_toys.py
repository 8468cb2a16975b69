# SPDX-License-Identifier: Apache-2.0
"""Small networks for clips with the attributes, class names and results of Open-MAGVIT2's, written anew in plain PyTorch.

The official files are no package and not part of this one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 4


def swish(x: Tensor) -> Tensor:
    return F.silu(x)


class ConvBlock3D(nn.Module):
    """All padding in time lies in front."""

    def __init__(self, cin: int, cout: int, size: int = 3, stride: Any = 1, bias: bool = True, **options: Any) -> None:
        super().__init__()
        self.padding = (*(size // 2,) * 4, size - 1, 0)
        self.conv_1 = nn.Conv3d(cin, cout, size, stride, bias=bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_1(F.pad(x, self.padding))


class ResBlock(nn.Module):
    def __init__(self, cin: int, cout: int, use_conv_shortcut: bool = False) -> None:
        super().__init__()
        self.in_filters, self.out_filters, self.use_conv_shortcut = cin, cout, use_conv_shortcut
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, cin, 1e-6), nn.GroupNorm(GROUPS, cout, 1e-6)
        self.conv1, self.conv2 = ConvBlock3D(cin, cout, bias=False), ConvBlock3D(cout, cout, bias=False)
        if cin != cout:
            name, size = ("conv_shortcut", 3) if use_conv_shortcut else ("nin_shortcut", 1)
            setattr(self, name, ConvBlock3D(cin, cout, size, bias=False))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        h = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        if self.in_filters == self.out_filters:
            return h + x
        return h + (self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x))


def depth_to_space3d(x: Tensor, block_size: tuple[int, int, int]) -> Tensor:
    boxes = x.unflatten(1, (*block_size, -1)).permute(0, 4, 5, 1, 6, 2, 7, 3)
    return boxes.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class Upsampler(nn.Module):
    def __init__(self, width: int, block_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.block_size, self.depth2space = block_size, depth_to_space3d
        self.conv1 = ConvBlock3D(width, width * block_size[0] * block_size[1] * block_size[2])

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth2space(self.conv1(x), self.block_size)
        kept = [i for i in range(y.shape[2]) if i != 1]
        return y[:, :, kept] if self.block_size[0] > 1 else y


class AdaptiveGroupNorm(nn.Module):
    def __init__(self, z_channel: int, width: int) -> None:
        super().__init__()
        self.gn, self.eps = nn.GroupNorm(GROUPS, width, 1e-6, affine=False), 1e-6
        self.gamma, self.beta = nn.Linear(z_channel, width), nn.Linear(z_channel, width)

    def forward(self, x: Tensor, quantizer: Tensor) -> Tensor:
        variance, mean = quantizer.flatten(2).var(-1), quantizer.flatten(2).mean(-1)
        scale, shift = self.gamma((variance + self.eps).sqrt()), self.beta(mean)
        shape = (*x.shape[:2], 1, 1, 1)
        return scale.reshape(shape) * self.gn(x) + shift.reshape(shape)


def _blocks(cin: int, cout: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(cin if i == 0 else cout, cout) for i in range(count))


class Encoder(nn.Module):
    def __init__(self, z_channels: int, widths: tuple[int, ...], times: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        self.conv_in = ConvBlock3D(3, widths[0], bias=False)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = nn.Module()
            level.block = _blocks(widths[max(0, i - 1)], width, blocks)
            if i < len(times):
                level.downsample = ConvBlock3D(width, width, stride=(times[i], 2, 2))
            self.down.append(level)
        self.mid_block = _blocks(widths[-1], widths[-1], blocks)
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], 1e-6)
        self.conv_out = ConvBlock3D(widths[-1], z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                x = block(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        for block in self.mid_block:
            x = block(x)
        return self.conv_out(swish(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, z_channels: int, widths: tuple[int, ...], times: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        self.conv_in = ConvBlock3D(z_channels, widths[-1])
        self.mid_block = _blocks(widths[-1], widths[-1], blocks)
        self.up, self.adaptive = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            level, above = nn.Module(), widths[min(i + 1, len(widths) - 1)]
            level.block = _blocks(above, width, blocks)
            if i > 0:
                level.upsample = Upsampler(width, (times[i - 1], 2, 2))
            self.up.append(level)
            self.adaptive.append(AdaptiveGroupNorm(z_channels, above))
        self.norm_out = nn.GroupNorm(GROUPS, widths[0], 1e-6)
        self.conv_out = ConvBlock3D(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        codes, z = z, self.conv_in(z)
        for block in self.mid_block:
            z = block(z)
        for i in range(len(self.up) - 1, -1, -1):
            z = self.adaptive[i](z, codes)
            for block in self.up[i].block:
                z = block(z)
            z = self.up[i].upsample(z) if i > 0 else z
        return self.conv_out(swish(self.norm_out(z)))


class Tokenizer(nn.Module):
    """Both networks; the encoder's codes are the first half of its channels."""

    def __init__(self) -> None:
        super().__init__()
        widths, times = (8, 8, 16), (1, 2)
        self.encoder, self.decoder = Encoder(8, widths, times, 2), Decoder(4, widths, times, 2)


def codes_like(x: Tensor) -> Tensor:
    """Signs, as a quantizer would give them."""
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)
