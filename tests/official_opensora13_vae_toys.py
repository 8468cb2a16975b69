# SPDX-License-Identifier: Apache-2.0
"""A small VAE with the attributes, class names and results of Open-Sora 1.3's `vae_v1_3`, written anew in plain PyTorch.

The official files are no package and not part of this one. Their blocks write over their inputs in inference; these do not.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def nonlinearity(x: Tensor, is_training: bool = False) -> Tensor:
    return F.silu(x)


def video_to_image(function: Any) -> Any:
    """The method, called for all frames as a batch of images."""

    def of_frames(self: Any, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        images = function(self, x.transpose(1, 2).flatten(0, 1), *rest, **options)
        return images.unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    return of_frames


class CausalConv3dPlainAR(nn.Module):
    def __init__(
        self, cin: int, cout: int, size: int = 3, stride: Any = 1, pad_mode: str = "constant", padding: int = 0
    ) -> None:
        super().__init__()
        self.pad_mode, self.time_pad = pad_mode, size - 1
        self.time_causal_padding = (*(size // 2,) * 4, size - 1, 0)
        self.conv = nn.Conv3d(cin, cout, size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        mode = self.pad_mode if x.shape[2] > self.time_pad else "constant"
        return self.conv(F.pad(x, self.time_causal_padding, mode))


class Resnet3DBlock(nn.Module):
    def __init__(self, cin: int, cout: int, conv_shortcut: bool = False, dropout: float = 0.0, groups: int = 4) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.use_conv_shortcut = cin, cout, conv_shortcut
        self.norm1, self.norm2 = nn.GroupNorm(groups, cin, 1e-6), nn.GroupNorm(groups, cout, 1e-6)
        self.conv1, self.conv2 = CausalConv3dPlainAR(cin, cout), CausalConv3dPlainAR(cout, cout)
        self.dropout, self.empty_cache = nn.Dropout(dropout), False
        if cin != cout and conv_shortcut:
            self.conv_shortcut = CausalConv3dPlainAR(cin, cout)
        elif cin != cout:
            self.nin_shortcut = CausalConv3dPlainAR(cin, cout, 1)

    def forward(self, x: Tensor, is_training: bool = False) -> Tensor:
        h = self.conv1(nonlinearity(self.norm1(x)))
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    def __init__(self, width: int, groups: int = 4) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, 1e-6)
        self.q, self.k, self.v, self.proj_out = (CausalConv3dPlainAR(width, width, 1) for _ in range(4))

    def attention(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).mT.unflatten(2, x.shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(self.attention(x))


class Downsample2D(nn.Module):
    def __init__(self, width: int, with_conv: bool = True) -> None:
        super().__init__()
        self.with_conv, self.micro_batch_size_2d = with_conv, None
        if with_conv:
            self.conv = nn.Conv2d(width, width, 3, 2)

    @video_to_image
    def forward(self, x: Tensor, is_training: bool = False) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1))) if self.with_conv else F.avg_pool2d(x, 2)


class Downsample3D(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv3dPlainAR(width, width, stride=2)

    def forward(self, x: Tensor, is_training: bool = False) -> Tensor:
        return self.conv(x)


class Res3DBlockUpsample(nn.Module):
    def __init__(self, width: int, groups: int = 4, with_norm: bool = True) -> None:
        super().__init__()
        self.num_filters = self.input_filters = width
        self.with_norm, self.down_sampling, self.act = with_norm, False, nn.SiLU()
        self.conv1, self.conv2 = CausalConv3dPlainAR(width, width), CausalConv3dPlainAR(width, width)
        self.norm1, self.norm2 = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width)

    def forward(self, x: Tensor, is_training: bool = False) -> Tensor:
        h = self.conv2(self.act(self.norm1(self.conv1(x))))
        return self.act(self.norm2(h) + x)


class Upsample3D(nn.Module):
    def __init__(self, width: int, scale_factor: int = 2) -> None:
        super().__init__()
        self.scale_factor, self.conv3d = scale_factor, Res3DBlockUpsample(width)

    def forward(self, x: Tensor, is_split: bool = False, is_training: bool = False) -> Tensor:
        for axis in (2, 3, 4):
            x = x.repeat_interleave(self.scale_factor, axis)
        return self.conv3d(x) + x


class Upsample2D(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.with_conv, self.micro_batch_size_2d, self.conv = True, None, nn.Conv2d(width, width, 3, padding=1)

    @video_to_image
    def forward(self, x: Tensor, is_split: bool = False, is_training: bool = False) -> Tensor:
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def _middle(width: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1, mid.attn_1, mid.block_2 = Resnet3DBlock(width, width), AttnBlock(width), Resnet3DBlock(width, width)
    return mid


class _Network(nn.Module):
    def middle(self, h: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))


class VideoEncoder(_Network):
    def __init__(self, widths: tuple[int, ...], z: int) -> None:
        super().__init__()
        self.num_resolutions, self.num_res_blocks, self.down_sampling_layer = len(widths), 1, [1]
        self.conv_in, self.down = CausalConv3dPlainAR(3, widths[0]), nn.ModuleList()
        for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            level = nn.Module()
            level.block = nn.ModuleList([Resnet3DBlock(before, width)])
            if i < len(widths) - 1:
                level.downsample = Downsample3D(width) if i in self.down_sampling_layer else Downsample2D(width)
            self.down.append(level)
        self.mid, self.norm_out = _middle(widths[-1]), nn.GroupNorm(4, widths[-1], 1e-6)
        self.conv_out = CausalConv3dPlainAR(widths[-1], 2 * z)

    def forward(self, x: Tensor, is_training: bool = False) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                h = block(h)
            h = level.downsample(h) if hasattr(level, "downsample") else h
        return self.conv_out(nonlinearity(self.norm_out(self.middle(h))))


class VideoDecoder(_Network):
    def __init__(self, widths: tuple[int, ...], z: int) -> None:
        super().__init__()
        self.num_resolutions, self.num_res_blocks, self.temporal_up_layers = len(widths), 0, [2]
        self.temporal_downsample, self.up = 2, nn.ModuleList()
        self.conv_in, self.mid = CausalConv3dPlainAR(z, widths[-1]), _middle(widths[-1])
        for i, (width, above) in enumerate(zip(widths, (*widths[1:], widths[-1]), strict=True)):
            level = nn.Module()
            level.block = nn.ModuleList([Resnet3DBlock(above, width)])
            if i > 0:
                level.upsample = Upsample3D(width) if i in self.temporal_up_layers else Upsample2D(width)
            self.up.append(level)
        self.norm_out, self.time_causal_padding = nn.GroupNorm(4, widths[0], 1e-6), (1, 1, 1, 1, 2, 0)
        self.conv_out = nn.Conv3d(widths[0], 3, 3)

    def forward(self, z: Tensor, is_training: bool = False) -> Tensor:
        h = self.middle(self.conv_in(z))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            h = level.upsample(h, is_split=True) if hasattr(level, "upsample") else h
        h = self.conv_out(F.pad(nonlinearity(self.norm_out(h)), self.time_causal_padding))
        return h[:, :, self.temporal_downsample - 1 :]


class OpenSoraVAE(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (8, 16, 16), z: int = 4) -> None:
        super().__init__()
        self.encoder, self.decoder = VideoEncoder(widths, z), VideoDecoder(widths, z)
