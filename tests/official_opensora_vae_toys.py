# SPDX-License-Identifier: Apache-2.0
"""A small temporal VAE with the attributes, class names and results of Open-Sora 1.2's, written anew in plain PyTorch.

The official files are no package and not part of this one.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv3d(nn.Module):
    """The whole padding in front, and half a kernel on each side in space."""

    def __init__(
        self, cin: int, cout: int, size: int = 3, pad_mode: str = "constant", stride: int = 1, **options: Any
    ) -> None:
        super().__init__()
        self.pad_mode, self.time_pad = pad_mode, size - stride
        self.time_causal_padding = (*(size // 2,) * 4, self.time_pad, 0)
        self.conv = nn.Conv3d(cin, cout, size, (stride, 1, 1), **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.time_causal_padding, self.pad_mode))


class ResBlock(nn.Module):
    def __init__(
        self, in_channels: int, filters: int, groups: int, activation: Any = nn.SiLU, pad_mode: str = "constant"
    ) -> None:
        super().__init__()
        self.in_channels, self.filters, self.activate = in_channels, filters, activation()
        self.norm1, self.norm2 = nn.GroupNorm(groups, in_channels), nn.GroupNorm(groups, filters)
        self.conv1 = CausalConv3d(in_channels, filters, pad_mode=pad_mode, bias=False)
        self.conv2 = CausalConv3d(filters, filters, pad_mode=pad_mode, bias=False)
        if in_channels != filters:
            self.conv3 = CausalConv3d(in_channels, filters, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.activate(self.norm1(x)))
        h = self.conv2(self.activate(self.norm2(h)))
        return h + (self.conv3(x) if self.in_channels != self.filters else x)


class Network(nn.Module):
    def finish(self, widths: tuple[int, ...], times: tuple[bool, ...], blocks: int) -> None:
        self.num_blocks, self.num_res_blocks, self.temporal_downsample = len(widths), blocks, times
        self.s_stride, self.activate = 1, nn.SiLU()

    def through(self, blocks: Any, x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        return x


def _chain(cin: int, cout: int, count: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(cin if i == 0 else cout, cout, groups) for i in range(count))


class Encoder(Network):
    def __init__(self, z: int, widths: tuple[int, ...], times: tuple[bool, ...], blocks: int, groups: int) -> None:
        super().__init__()
        self.finish(widths, times, blocks)
        self.conv_in = CausalConv3d(4, widths[0], bias=False)
        befores = (widths[0], *widths[:-1])
        self.block_res_blocks = nn.ModuleList(
            _chain(before, width, blocks, groups) for before, width in zip(befores, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, stride=2) if half else nn.Identity()
            for width, half in zip(widths[:-1], times, strict=True)
        )
        self.res_blocks = _chain(widths[-1], widths[-1], blocks, groups)
        self.norm1, self.conv2 = nn.GroupNorm(groups, widths[-1]), CausalConv3d(widths[-1], z, 1, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for blocks, conv in zip(self.block_res_blocks, [*self.conv_blocks, nn.Identity()], strict=True):
            x = conv(self.through(blocks, x))
        return self.conv2(self.activate(self.norm1(self.through(self.res_blocks, x))))


class Decoder(Network):
    def __init__(self, z: int, widths: tuple[int, ...], times: tuple[bool, ...], blocks: int, groups: int) -> None:
        super().__init__()
        self.finish(widths, times, blocks)
        self.conv1, self.res_blocks = CausalConv3d(z, widths[-1]), _chain(widths[-1], widths[-1], blocks, groups)
        befores = (*widths[1:], widths[-1])
        self.block_res_blocks = nn.ModuleList(
            _chain(before, width, blocks, groups) for before, width in zip(befores, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width) if double else nn.Identity()
            for width, double in zip(widths[1:], times, strict=True)
        )
        self.norm1, self.conv_out = nn.GroupNorm(groups, widths[0]), CausalConv3d(widths[0], 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.through(self.res_blocks, self.conv1(x))
        for level in range(self.num_blocks - 1, -1, -1):
            x = self.through(self.block_res_blocks[level], x)
            if level > 0:
                x = self.conv_blocks[level - 1](x)
                if self.temporal_downsample[level - 1]:
                    x = x.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)
        return self.conv_out(self.activate(self.norm1(x)))


class VAE_Temporal(nn.Module):
    """Zero frames in front, so that the ratio divides a clip; the decoder's first frames go again."""

    def __init__(
        self,
        widths: tuple[int, ...] = (8, 16, 16, 24),
        times: tuple[bool, ...] = (False, True, True),
        blocks: int = 2,
        groups: int = 4,
    ) -> None:
        super().__init__()
        self.ratio = 2 ** sum(times)
        self.encoder, self.decoder = (
            Encoder(8, widths, times, blocks, groups),
            Decoder(4, widths, times, blocks, groups),
        )
        self.quant_conv, self.post_quant_conv = CausalConv3d(8, 8, 1), CausalConv3d(4, 4, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.ratio, 0))))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        return self.decoder(self.post_quant_conv(z))[:, :, -num_frames % self.ratio :]
