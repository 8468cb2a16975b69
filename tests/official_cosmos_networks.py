# SPDX-License-Identifier: Apache-2.0
"""Encoders and decoders of the blocks in `official_cosmos_toys`, and the networks for images."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from official_cosmos_toys import *  # noqa: F403 -- upstream's file imports them all, and the rules look for them there
from official_cosmos_toys import (
    CausalAttnBlock,
    CausalConv3d,
    CausalDownsample3d,
    CausalHybridDownsample3d,
    CausalHybridUpsample3d,
    CausalNormalize,
    CausalResnetBlock3d,
    CausalResnetBlockFactorized3d,
    CausalTemporalAttnBlock,
    CausalUpsample3d,
    Patcher,
    Patcher3D,
    UnPatcher,
    UnPatcher3D,
    _Block,
    batch2time,
    in_turn,
    means,
    nonlinearity,
    replication_pad,
    time2batch,
)
from torch import Tensor, nn


def filled(parts: dict[str, Any]) -> nn.Module:
    """A module with these children."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


class _Network(nn.Module):
    """Levels of one block each, from the widest frames to the narrowest; the second one attends."""

    def block(self, cin: int, cout: int) -> nn.Module:
        raise NotImplementedError

    def attention(self, width: int) -> nn.Module:
        raise NotImplementedError

    def middle(self, width: int) -> nn.Module:
        parts = self.block(width, width), self.attention(width), self.block(width, width)
        return filled(dict(zip(("block_1", "attn_1", "block_2"), parts, strict=True)))

    def level(self, i: int, cin: int, cout: int) -> nn.Module:
        attention = nn.ModuleList([self.attention(cout)] if i == 1 else [])
        return filled({"block": nn.ModuleList([self.block(cin, cout)]), "attn": attention})

    def through(self, level: nn.Module, h: Tensor) -> Tensor:
        h = level.block[0](h)
        return level.attn[0](h) if len(level.attn) else h

    def in_between(self, h: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))

    def end(self, h: Tensor) -> Tensor:
        return self.conv_out(nonlinearity(self.norm_out(h)))


class _Encoder(_Network):
    def __init__(self, widths: tuple[int, ...], samplers: list[Any], conv: Any, norm: Any, z: int, cin: int) -> None:
        super().__init__()
        self.num_resolutions = len(widths)
        self.conv_in, self.down = conv(cin, widths[0]), nn.ModuleList()
        for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            level = self.level(i, before, width)
            if i < len(samplers):
                level.downsample = samplers[i](width)
            self.down.append(level)
        self.mid, self.norm_out, self.conv_out = self.middle(widths[-1]), norm(widths[-1]), conv(widths[-1], z)

    def levels(self, h: Tensor) -> Tensor:
        for level in self.down:
            h = self.through(level, h)
            h = level.downsample(h) if hasattr(level, "downsample") else h
        return h


class _Decoder(_Network):
    def __init__(self, widths: tuple[int, ...], samplers: list[Any], conv: Any, norm: Any, z: int, cout: int) -> None:
        super().__init__()
        self.num_resolutions = len(widths)
        self.conv_in, self.mid, self.up = conv(z, widths[-1]), self.middle(widths[-1]), nn.ModuleList()
        for i, (width, above) in enumerate(zip(widths, (*widths[1:], widths[-1]), strict=True)):
            level = self.level(i, above, width)
            if i > 0:
                level.upsample = samplers[i - 1](width)
            self.up.append(level)
        self.norm_out, self.conv_out = norm(widths[0]), conv(widths[0], cout)

    def levels(self, h: Tensor) -> Tensor:
        for level in reversed(self.up):
            h = self.through(level, h)
            h = level.upsample(h) if hasattr(level, "upsample") else h
        return h


class _Factorized:
    def block(self, cin: int, cout: int) -> nn.Module:
        return CausalResnetBlockFactorized3d(cin, cout)

    def attention(self, width: int) -> nn.Module:
        return nn.Sequential(CausalAttnBlock(width), CausalTemporalAttnBlock(width))


class EncoderFactorized(_Factorized, _Encoder):
    def __init__(self, widths: tuple[int, ...], z: int, patch: int, method: str = "haar") -> None:
        samplers = [CausalHybridDownsample3d, lambda width: CausalHybridDownsample3d(width, time=False)]
        super().__init__(widths, samplers, in_turn, CausalNormalize, z, 3 * patch**3)
        self.patcher3d = Patcher3D(patch, method)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.in_between(self.levels(self.conv_in(self.patcher3d(x)))))


class DecoderFactorized(_Factorized, _Decoder):
    def __init__(self, widths: tuple[int, ...], z: int, patch: int, method: str = "haar") -> None:
        samplers = [CausalHybridUpsample3d, lambda width: CausalHybridUpsample3d(width, time=False)]
        super().__init__(widths, samplers, in_turn, CausalNormalize, z, 3 * patch**3)
        self.unpatcher3d = UnPatcher3D(patch, method)

    def forward(self, z: Tensor) -> Tensor:
        return self.unpatcher3d(self.end(self.levels(self.in_between(self.conv_in(z)))))


def whole(cin: int, cout: int) -> CausalConv3d:
    return CausalConv3d(cin, cout, padding=1)


def grouped(width: int) -> CausalNormalize:
    return CausalNormalize(width, 4)


class _Base:
    def block(self, cin: int, cout: int) -> nn.Module:
        return CausalResnetBlock3d(cin, cout, groups=4)

    def attention(self, width: int) -> nn.Module:
        return CausalAttnBlock(width, 4)


class EncoderBase(_Base, _Encoder):
    def __init__(self, widths: tuple[int, ...], z: int, patch: int) -> None:
        super().__init__(widths, [CausalDownsample3d] * 2, whole, grouped, z, 3 * patch**2)
        self.patcher = Patcher(patch)

    def patcher3d(self, x: Tensor) -> Tensor:
        return batch2time(self.patcher(time2batch(x)), x.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        h = replication_pad(self.levels(self.conv_in(self.patcher3d(x))))
        return self.end(self.in_between(means(h, (2, 1, 1))))


class DecoderBase(_Base, _Decoder):
    def __init__(self, widths: tuple[int, ...], z: int, patch: int) -> None:
        super().__init__(widths, [CausalUpsample3d] * 2, whole, grouped, z, 3 * patch**2)
        self.unpatcher = UnPatcher(patch)

    def unpatcher3d(self, x: Tensor) -> Tensor:
        return batch2time(self.unpatcher(time2batch(x)), x.shape[0])

    def forward(self, z: Tensor) -> Tensor:
        h = self.levels(self.in_between(self.conv_in(z)))
        return self.unpatcher3d(self.end(h.repeat_interleave(2, 2)[:, :, 1:]))


def conv2d(cin: int, cout: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, size, padding=size // 2)


def norm2d(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(4, width, 1e-6)


class ResnetBlock(_Block):
    def norms(self, cin: int, cout: int, groups: int) -> tuple[nn.Module, nn.Module]:
        return norm2d(cin), norm2d(cout)

    def convs(self, cin: int, cout: int) -> tuple[nn.Module, nn.Module]:
        return conv2d(cin, cout), conv2d(cout, cout)

    def shortcut(self, cin: int, cout: int) -> nn.Module:
        return conv2d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class AttnBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm2d(width)
        self.q, self.k, self.v, self.proj_out = (conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(self.norm(x)).flatten(2).mT for layer in (self.q, self.k, self.v))
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).mT.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv2d(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class _Images:
    def block(self, cin: int, cout: int) -> nn.Module:
        return ResnetBlock(cin, cout)

    def attention(self, width: int) -> nn.Module:
        return AttnBlock(width)


class Encoder(_Images, _Encoder):
    def __init__(self, widths: tuple[int, ...], z: int, patch: int) -> None:
        super().__init__(widths, [Downsample] * 2, conv2d, norm2d, z, 3 * patch**2)
        self.patcher, self.num_downsamples = Patcher(patch), 2

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.in_between(self.levels(self.conv_in(self.patcher(x)))))


class Decoder(_Images, _Decoder):
    def __init__(self, widths: tuple[int, ...], z: int, patch: int) -> None:
        super().__init__(widths, [Upsample] * 2, conv2d, norm2d, z, 3 * patch**2)
        self.unpatcher, self.num_upsamples = UnPatcher(patch), 2

    def forward(self, z: Tensor) -> Tensor:
        return self.unpatcher(self.end(self.levels(self.in_between(self.conv_in(z)))))


class Tokenizer(nn.Module):
    """A pair of networks."""

    def __init__(
        self,
        kind: str = "Factorized",
        widths: tuple[int, ...] = (8, 16, 16),
        z: int = 4,
        patch: int = 4,
        **options: Any,
    ) -> None:
        super().__init__()
        encoder, decoder = (globals()[f"{name}{kind}"] for name in ("Encoder", "Decoder"))
        self.encoder, self.decoder = encoder(widths, 2 * z, patch, **options), decoder(widths, z, patch, **options)
