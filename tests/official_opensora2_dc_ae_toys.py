# SPDX-License-Identifier: Apache-2.0
"""A small autoencoder with the attributes, class names and results of Open-Sora 2.0's `dc_ae` for clips, written anew in plain
PyTorch. The official files are no package and not part of this one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelChunkConv3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)


class RMSNorm3d(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.elementwise_affine = eps, True
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        x = (wide * torch.rsqrt(wide.pow(2).mean(1, True) + self.eps)).to(x.dtype)
        return x * self.weight[:, None, None, None] + self.bias[:, None, None, None]


def build_norm(width: int | None) -> Any:
    return None if width is None else RMSNorm3d(width)


class ConvLayer(nn.Module):
    def __init__(
        self, cin: int, cout: int, size: int = 3, stride: Any = 1, groups: int = 1, norm: bool = False, act: Any = None,
        dropout: float = 0.0, bias: bool = True, is_video: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.is_video, self.pad_mode_3d, self.pad = is_video, "constant", F.pad
        self.padding = (size // 2,) * 6
        self.conv = ChannelChunkConv3d(cin, cout, size, stride, groups=groups, bias=bias)
        self.norm, self.act = build_norm(cout if norm else None), act() if act else None
        self.dropout = nn.Dropout3d(dropout) if dropout else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.dropout is None else self.dropout(x)
        x = self.conv(self.pad(x, self.padding, self.pad_mode_3d) if self.is_video else x)
        x = x if self.norm is None else self.norm(x)
        return x if self.act is None else self.act(x)


def unshuffled(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    for axis, factor in zip((4, 3, 2), factors[::-1], strict=True):
        x = x.unflatten(axis, (-1, factor))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def shuffled(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    x = x.unflatten(1, (-1, *factors)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class Averaging(nn.Module):
    """Pixels to channels, of which neighbours are averaged."""

    def __init__(self, cout: int, factor: int, time: bool = False) -> None:
        super().__init__()
        self.out_channels, self.factor, self.time = cout, factor, time

    def forward(self, x: Tensor) -> Tensor:
        factors = (self.factor if self.time and x.shape[2] != 1 else 1, self.factor, self.factor)
        return unshuffled(x, factors).unflatten(1, (self.out_channels, -1)).mean(2)


class Duplicating(Averaging):
    """Channels, repeated, to pixels."""

    def forward(self, x: Tensor) -> Tensor:
        factors = (self.factor if self.time and x.shape[2] != 1 else 1, self.factor, self.factor)
        count = self.out_channels * factors[0] * self.factor**2 // x.shape[1]
        return shuffled(x.repeat_interleave(count, 1), factors)


def chunked_interpolate(x: Tensor, scale_factor: list[int]) -> Tensor:
    for axis, factor in zip((2, 3, 4), scale_factor, strict=True):
        x = x.repeat_interleave(factor, axis)
    return x


class InterpolateConvUpSampleLayer(nn.Module):
    def __init__(self, cin: int, cout: int, factor: int = 2, time: bool = False, mode: str = "nearest") -> None:
        super().__init__()
        self.factor, self.mode, self.temporal_upsample, self.conv = factor, mode, time, ConvLayer(cin, cout)

    def forward(self, x: Tensor) -> Tensor:
        time = self.factor if self.temporal_upsample and x.shape[2] != 1 else 1
        return self.conv(chunked_interpolate(x, [time, self.factor, self.factor]))


class GLUMBConv(nn.Module):
    def __init__(self, width: int, gate: Any = nn.SiLU) -> None:
        super().__init__()
        self.glu_act, wide = gate(), 8 * width
        self.inverted_conv, self.depth_conv = ConvLayer(width, wide, 1, act=nn.SiLU), ConvLayer(wide, wide, groups=wide)
        self.point_conv = ConvLayer(wide // 2, width, 1, norm=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.depth_conv(self.inverted_conv(x)).chunk(2, 1)
        return self.point_conv(hidden * self.glu_act(gate))


class LiteMLA(nn.Module):
    """Linear attention over all positions, with keys and values of two scales."""

    def __init__(self, width: int, dim: int = 8) -> None:
        super().__init__()
        self.dim, self.qkv = dim, ConvLayer(width, 3 * width, 1, bias=False)
        heads = 3 * width // dim
        near = ChannelChunkConv3d(3 * width, 3 * width, 5, padding=2, groups=3 * width, bias=False)
        mix = ChannelChunkConv3d(3 * width, 3 * width, 1, groups=heads, bias=False)
        self.aggreg, self.proj = nn.Sequential(near, mix), ConvLayer(2 * width, width, 1, norm=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        both = torch.cat((qkv, self.aggreg(qkv)), 1)
        q, k, v = both.flatten(2).unflatten(1, (-1, 3 * self.dim)).split(self.dim, 2)
        weights = F.relu(k).transpose(-1, -2)
        sums = F.pad(v, (0, 0, 0, 1), value=1) @ weights @ F.relu(q)
        mixed = sums[:, :, :-1] / (sums[:, :, -1:] + 1e-15)
        return self.proj(mixed.flatten(1, 2).unflatten(2, x.shape[2:]))


class ResidualBlock(nn.Module):
    def __init__(self, main: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.main, self.shortcut = main, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.shortcut(x)


class OpSequential(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.op_list:
            x = layer(x)
        return x


def _blocks(width: int, attends: bool) -> list[nn.Module]:
    if attends:
        return [ResidualBlock(LiteMLA(width), nn.Identity()), ResidualBlock(GLUMBConv(width), nn.Identity())]
    main = nn.Sequential(ConvLayer(width, width, act=nn.SiLU), ConvLayer(width, width, norm=True, bias=False))
    return [ResidualBlock(main, nn.Identity())]


class Encoder(nn.Module):
    def __init__(self, widths: tuple[int, ...], z: int) -> None:
        super().__init__()
        self.cfg, self.project_in = SimpleNamespace(is_video=True), ConvLayer(3, widths[0])
        stages = []
        for i, width in enumerate(widths):
            layers, last = _blocks(width, i > 0), i == len(widths) - 1
            if not last:
                stride = (2 if i else 1, 2, 2)
                down = ConvLayer(width, widths[i + 1], stride=stride)
                layers.append(ResidualBlock(down, Averaging(widths[i + 1], 2, i > 0)))
            stages.append(OpSequential(layers))
        self.stages = nn.ModuleList(stages)
        self.project_out = ResidualBlock(ConvLayer(widths[-1], z), Averaging(z, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        for stage in self.stages:
            x = stage(x)
        return self.project_out(x)


class Decoder(nn.Module):
    def __init__(self, widths: tuple[int, ...], z: int) -> None:
        super().__init__()
        self.cfg, self.project_in = (
            SimpleNamespace(is_video=True),
            ResidualBlock(ConvLayer(z, widths[-1]), Duplicating(widths[-1], 1)),
        )
        stages = []
        for i, width in enumerate(widths):
            layers = _blocks(width, i > 0)
            if i < len(widths) - 1:
                up = InterpolateConvUpSampleLayer(widths[i + 1], width, time=i > 0)
                layers.insert(0, ResidualBlock(up, Duplicating(width, 2, i > 0)))
            stages.append(OpSequential(layers))
        self.stages = nn.ModuleList(stages)
        self.project_out = OpSequential([RMSNorm3d(widths[0]), nn.ReLU(), ConvLayer(widths[0], 3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        for stage in reversed(self.stages):
            x = stage(x)
        return self.project_out(x)


class DCAE(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (8, 16, 16), z: int = 8) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(widths, z), Decoder(widths, z)
