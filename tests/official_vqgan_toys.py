# SPDX-License-Identifier: Apache-2.0
"""Small networks with the attributes, class names and results of VQGAN's and of latent diffusion's autoencoders, written
anew in plain PyTorch.

The official files are no package and not part of this one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 4


def nonlinearity(x: Tensor) -> Tensor:
    return F.silu(x)


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, 1e-6)


class Upsample(nn.Module):
    def __init__(self, width: int, with_conv: bool = True) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    def __init__(self, width: int, with_conv: bool = True) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(width, width, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1))) if self.with_conv else F.avg_pool2d(x, 2)


class ResnetBlock(nn.Module):
    def __init__(
        self, cin: int, cout: int, dropout: float = 0.0, conv_shortcut: bool = False, temb_channels: int = 0
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.use_conv_shortcut = cin, cout, conv_shortcut
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, cout)
        self.norm2, self.dropout, self.conv2 = norm(cout), nn.Dropout(dropout), nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            name, size = ("conv_shortcut", 3) if conv_shortcut else ("nin_shortcut", 1)
            setattr(self, name, nn.Conv2d(cin, cout, size, padding=size // 2))

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        h = self.conv1(nonlinearity(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[..., None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if self.in_channels == self.out_channels:
            return h + x
        return h + (self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_channels, self.norm = width, norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def attention(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2) for part in (self.q, self.k, self.v))  # [N, C, H*W]
        scores = (q.mT @ k * q.shape[1] ** -0.5).softmax(-1)
        return (v @ scores.mT).reshape(x.shape)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x + self.proj_out(self.attention(x))


def _level(cin: int, cout: int, blocks: int, attends: bool, dropout: float) -> Any:
    level: Any = nn.Module()
    level.block = nn.ModuleList(ResnetBlock(cin if i == 0 else cout, cout, dropout) for i in range(blocks))
    level.attn = nn.ModuleList(AttnBlock(cout) for _ in range(blocks) if attends)
    return level


class Network(nn.Module):
    def add_middle(self, width: int, dropout: float, attention: Any = None) -> None:
        self.mid: Any = nn.Module()
        self.mid.block_1, self.mid.block_2 = (ResnetBlock(width, width, dropout) for _ in range(2))
        self.mid.attn_1 = AttnBlock(width) if attention is None else attention

    def middle(self, h: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, None)), None)

    def through(self, level: Any, h: Tensor) -> Tensor:
        for i, block in enumerate(level.block):
            h = block(h, None)
            h = level.attn[i](h) if len(level.attn) > 0 else h
        return h


class Encoder(Network):
    def __init__(self, z_channels: int, widths: tuple[int, ...] = (8, 8, 16), dropout: float = 0.0) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = _level(widths[max(0, i - 1)], width, 2, i == len(widths) - 1, dropout)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.add_middle(widths[-1], dropout)
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.conv_in(x)]
        for level in self.down:
            kept.append(self.through(level, kept[-1]))
            if hasattr(level, "downsample"):
                kept.append(level.downsample(kept[-1]))
        return self.conv_out(nonlinearity(self.norm_out(self.middle(kept[-1]))))


class Decoder(Network):
    def __init__(
        self,
        z_channels: int,
        widths: tuple[int, ...] = (8, 8, 16),
        dropout: float = 0.0,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        attention: Any = None,
    ) -> None:
        super().__init__()
        self.give_pre_end, self.tanh_out = give_pre_end, tanh_out
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.add_middle(widths[-1], dropout, attention)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            above = widths[min(i + 1, len(widths) - 1)]
            level = _level(above, width, 3, i == len(widths) - 1, dropout)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor, **kwargs: Any) -> Tensor:
        self.last_z_shape = z.shape
        h = self.middle(self.conv_in(z))
        for i in range(len(self.up) - 1, -1, -1):
            h = self.through(self.up[i], h)
            h = self.up[i].upsample(h) if i > 0 else h
        if self.give_pre_end:
            return h
        h = self.conv_out(nonlinearity(self.norm_out(h)), **kwargs)
        return torch.tanh(h) if self.tanh_out else h


class Autoencoder(nn.Module):
    """Both networks; the latents are the first half of the encoder's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(8), Decoder(4)
