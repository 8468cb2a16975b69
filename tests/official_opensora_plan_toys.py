# SPDX-License-Identifier: Apache-2.0
"""Small causal VAEs with the attributes, class names and results of Open-Sora-Plan's, written anew in plain PyTorch.

The official files are no package and not part of this one. A version is an argument here: "1.0", "1.1" or "1.2".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

npu_config: Any = None


def nonlinearity(x: Tensor) -> Tensor:
    return F.silu(x)


def of_frames(function: Any) -> Callable[..., Tensor]:
    """A method of images as one of clips, too."""

    def of_clips(self: Any, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return function(self, x)
        return torch.stack([function(self, frame) for frame in x.unbind(2)], 2)

    return of_clips


def repeated(x: Tensor, count: int) -> Tensor:
    return torch.cat([x[:, :, :1].expand(-1, -1, count, -1, -1), x], 2)


def linear(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    first = F.interpolate(x[:, :, :1], scale_factor=(1, *factors[1:]), mode="trilinear")
    if x.shape[2] == 1:
        return first
    return torch.cat([first, F.interpolate(x[:, :, 1:], scale_factor=factors, mode="trilinear")], 2)


class Conv2d(nn.Conv2d):
    @of_frames
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


class LayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def Normalize(width: int, norm_type: str = "groupnorm") -> nn.Module:  # noqa: N802
    return nn.GroupNorm(4, width, 1e-6) if norm_type == "groupnorm" else LayerNorm(width)


class CausalConv3d(nn.Module):
    """With frames kept for the next chunk in a queue, as WF-VAE's; earlier versions keep none."""

    def __init__(
        self, cin: int, cout: int, size: Any = 3, stride: Any = 1, padding: int = 0, bias: bool = True
    ) -> None:
        super().__init__()
        self.chan_in, self.chan_out = cin, cout
        self.conv = nn.Conv3d(cin, cout, size, stride, (0, padding, padding), bias=bias)
        self.time_kernel_size, self.enable_cached = self.conv.kernel_size[0], False
        self.is_first_chunk, self.causal_cached, self.cache_offset = True, deque[Tensor](), 0

    def forward(self, x: Tensor) -> Tensor:
        front, stride = self.time_kernel_size - 1, self.conv.stride[0]
        x = repeated(x, front) if self.is_first_chunk else torch.cat([self.causal_cached.popleft(), x], 2)
        if self.enable_cached:
            end = max(x.shape[2] - self.cache_offset, 0)
            count = -(-front // stride) if front >= stride else 0
            self.causal_cached.append(x[:, :, max(end - count, 0) : end].clone())
        return self.conv(x)


class Block(nn.Module):
    def fill(self, widths: tuple[int, int], make: Any, dropout: float, conv_shortcut: bool, norm_type: str) -> None:
        self.in_channels, self.out_channels = widths
        self.use_conv_shortcut = conv_shortcut
        self.norm1, self.norm2 = Normalize(widths[0], norm_type), Normalize(widths[1], norm_type)
        self.conv1, self.conv2 = make(*widths, 3, padding=1), make(widths[1], widths[1], 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        if widths[0] != widths[1]:
            name = "conv_shortcut" if conv_shortcut else "nin_shortcut"
            setattr(self, name, make(*widths, 3, padding=1) if conv_shortcut else make(*widths, 1))

    def added(self, x: Tensor) -> Tensor:
        h = self.conv1(nonlinearity(self.norm1(x)))
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if self.in_channels == self.out_channels:
            return x + h
        return (self.conv_shortcut if self.use_conv_shortcut else self.nin_shortcut)(x) + h


class ResnetBlock2D(Block):
    def __init__(
        self,
        widths: tuple[int, int],
        dropout: float = 0.0,
        conv_shortcut: bool = False,
        norm_type: str = "groupnorm",
    ) -> None:
        super().__init__()
        self.fill(widths, nn.Conv2d, dropout, conv_shortcut, norm_type)

    @of_frames
    def forward(self, x: Tensor) -> Tensor:
        return self.added(x)


class ResnetBlock3D(Block):
    def __init__(
        self,
        widths: tuple[int, int],
        dropout: float = 0.0,
        conv_shortcut: bool = False,
        norm_type: str = "groupnorm",
    ) -> None:
        super().__init__()
        self.fill(widths, CausalConv3d, dropout, conv_shortcut, norm_type)

    def forward(self, x: Tensor) -> Tensor:
        return self.added(x)


class Attention(nn.Module):
    def __init__(self, width: int, norm_type: str = "groupnorm") -> None:
        super().__init__()
        self.norm = Normalize(width, norm_type)
        self.q, self.k, self.v, self.proj_out = (CausalConv3d(width, width, 1) for _ in range(4))

    def projections(self, x: Tensor) -> list[Tensor]:
        h = self.norm(x)
        return [self.q(h), self.k(h), self.v(h)]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of matrices [N, C, positions]."""
    return v @ ((q.mT @ k) * q.shape[1] ** -0.5).softmax(-1).mT


class AttnBlock3D(Attention):
    def forward(self, x: Tensor) -> Tensor:
        matrices = (t.reshape(x.shape[0] * x.shape[2], x.shape[1], -1) for t in self.projections(x))
        return x + self.proj_out(attend(*matrices).reshape(x.shape))


class AttnBlock3DFix(Attention):
    def forward(self, x: Tensor) -> Tensor:
        matrices = (t.transpose(1, 2).flatten(0, 1).flatten(2) for t in self.projections(x))
        mixed = attend(*matrices).unflatten(0, (x.shape[0], -1)).unflatten(3, x.shape[3:])
        return x + self.proj_out(mixed.transpose(1, 2))


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.with_conv, self.conv = True, nn.Conv2d(width, width, 3, padding=1)

    @of_frames
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Downsample(nn.Module):
    def __init__(self, width: int, undown: bool = False) -> None:
        super().__init__()
        self.with_conv, self.undown = True, undown
        self.conv = nn.Conv2d(width, width, 3, 1 if undown else 2, 1 if undown else 0)

    @of_frames
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.undown else F.pad(x, (0, 1, 0, 1)))


class Strided(nn.Module):
    size: Any = 3
    stride: Any = 2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, self.size, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class SpatialDownsample2x(Strided):
    size, stride = (1, 3, 3), (1, 2, 2)


class Spatial2xTime2x3DDownsample(Strided):
    pass


class Spatial2x3DDownsample(Strided):
    stride = (1, 2, 2)


class SpatialUpsample2x(nn.Module):
    def __init__(self, width: int, unup: bool = False) -> None:
        super().__init__()
        self.unup, self.conv = unup, CausalConv3d(width, width, (1, 3, 3), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.unup else x.repeat_interleave(2, 3).repeat_interleave(2, 4))


class Spatial2xTime2x3DUpsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, 3, padding=1)
        self.enable_cached, self.causal_cached = False, deque[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "t_interpolation"):
            return self.conv(linear(x, (2, 2, 2)))
        return self.conv(F.interpolate(self.over_time(x), scale_factor=(1, 2, 2), mode="trilinear"))

    def over_time(self, x: Tensor) -> Tensor:
        """With a `depth`, as in the latest version, a single frame is not kept, and the first chunk has no first frame."""
        latest = hasattr(self, "depth")
        if latest and x.shape[2] == 1:
            return x
        if not self.enable_cached:
            return linear(x, (2, 1, 1))
        follows = len(self.causal_cached) > 0
        if follows:
            x = torch.cat([self.causal_cached.popleft(), x], 2)
        last = x.shape[2] - (2**self.depth if latest else follows) - 1
        self.causal_cached.append(x[:, :, last : last + 1].clone())
        if not follows and not latest:
            return linear(x, (2, 1, 1))
        return F.interpolate(x, scale_factor=(2, 1, 1), mode="trilinear")[:, :, 2 * follows :]


class Spatial2x3DUpsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear"))


class TimeDownsample2x(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernel_size, self.conv = 3, nn.AvgPool3d((3, 1, 1), (2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(repeated(x, 2))


class TimeUpsample2x(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, (2, 1, 1))


class TimeDownsampleRes2x(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernel_size, self.avg_pool = (3, 3, 3), nn.AvgPool3d((3, 1, 1), (2, 1, 1))
        self.conv = nn.Conv3d(width, width, 3, (2, 1, 1), (0, 1, 1))
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        alpha, x = self.mix_factor.sigmoid(), repeated(x, 2)
        return alpha * self.avg_pool(x) + (1 - alpha) * self.conv(x)


class TimeUpsampleRes2x(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, 3, padding=1)
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        alpha, x = self.mix_factor.sigmoid(), linear(x, (2, 1, 1))
        return alpha * x + (1 - alpha) * self.conv(x)


# Per level: sampler in space, sampler in time; encoders of 1.1 and 1.2 begin with blocks of frames.
DOWN = {
    "1.0": ((SpatialDownsample2x, None), (SpatialDownsample2x, TimeDownsample2x), (None, None)),
    "1.1": ((Downsample, None), (Downsample, TimeDownsampleRes2x), (None, None)),
    "1.2": ((Downsample, None), (Spatial2xTime2x3DDownsample, None), (None, None)),
}
UP = {
    "1.0": ((None, None), (SpatialUpsample2x, None), (SpatialUpsample2x, TimeUpsample2x)),
    "1.1": ((None, None), (SpatialUpsample2x, None), (SpatialUpsample2x, TimeUpsampleRes2x)),
    "1.2": ((None, None), (SpatialUpsample2x, None), (Spatial2xTime2x3DUpsample, None)),
}


class Network(nn.Module):
    def fill(self, version: str, top: int, last: int, channels: int, dropout: float) -> None:
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = (ResnetBlock3D((top, top), dropout) for _ in range(2))
        self.mid.attn_1 = (AttnBlock3D if version == "1.0" else AttnBlock3DFix)(top)
        self.norm_out, self.conv_out = nn.GroupNorm(4, last, 1e-6), CausalConv3d(last, channels, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))

    def through(self, level: Any, x: Tensor, names: tuple[str, str]) -> Tensor:
        for index, block in enumerate(level.block):
            x = block(x)
            x = level.attn[index](x) if len(level.attn) else x
        for name in names:
            x = getattr(level, name)(x) if hasattr(level, name) else x
        return x


def filled(blocks: list[nn.Module], samplers: Any, names: tuple[str, str], width: int, attends: bool) -> nn.Module:
    level = nn.Module()
    level.block = nn.ModuleList(blocks)
    level.attn = nn.ModuleList(AttnBlock3DFix(width) for _ in range(len(blocks) * attends))
    for name, sampler in zip(names, samplers, strict=True):
        if sampler is not None:
            setattr(level, name, sampler(width))
    return level


class Encoder(Network):
    def __init__(self, version: str, widths: tuple[int, ...], blocks: int, dropout: float, attends: bool) -> None:
        super().__init__()
        self.num_resolutions, self.num_res_blocks, self.in_ch_mult = len(widths), blocks, (1, *widths)
        self.conv_in = CausalConv3d(3, widths[0], padding=1) if version == "1.0" else Conv2d(3, widths[0], 3, padding=1)
        self.down, before = nn.ModuleList(), widths[0]
        for index, (width, samplers) in enumerate(zip(widths, DOWN[version], strict=True)):
            kind = ResnetBlock3D if version == "1.0" or index == len(widths) - 1 else ResnetBlock2D
            row = [kind((before if i == 0 else width, width), dropout) for i in range(blocks)]
            last = attends and index == len(widths) - 1
            self.down.append(filled(row, samplers, ("downsample", "time_downsample"), width, last))
            before = width
        self.fill(version, widths[-1], widths[-1], 8, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = self.through(level, x, ("downsample", "time_downsample"))
        return self.conv_out(nonlinearity(self.norm_out(self.middle(x))))


class Decoder(Network):
    def __init__(self, version: str, widths: tuple[int, ...], blocks: int, dropout: float, attends: bool) -> None:
        super().__init__()
        self.num_resolutions, self.num_res_blocks = len(widths), blocks - 1
        self.conv_in, self.up, before = CausalConv3d(4, widths[-1], padding=1), nn.ModuleList(), widths[-1]
        for index in reversed(range(len(widths))):
            width = widths[index]
            row = [ResnetBlock3D((before if i == 0 else width, width), dropout) for i in range(blocks)]
            last = attends and index == len(widths) - 1
            self.up.insert(0, filled(row, UP[version][index], ("upsample", "time_upsample"), width, last))
            before = width
        self.fill(version, widths[-1], widths[0], 3, dropout)

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.conv_in(z))
        for level in reversed(self.up):
            x = self.through(level, x, ("upsample", "time_upsample"))
        return self.conv_out(nonlinearity(self.norm_out(x)))


class CausalVAEModel(nn.Module):
    def __init__(
        self,
        version: str,
        widths: tuple[int, ...] = (8, 16, 16),
        blocks: int = 2,
        dropout: float = 0.0,
        attends: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(version, widths, blocks, dropout, attends)
        self.decoder = Decoder(version, widths, blocks, dropout, attends)
        self.quant_conv, self.post_quant_conv = CausalConv3d(8, 8, 1), CausalConv3d(4, 4, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))
