# SPDX-License-Identifier: Apache-2.0
"""Networks of our own in the place of the official VAE of Wan 2.1: the same layers under the same names, the same results and
the same caches. `official_wan_vae_toys_2_2` adds what 2.2 has besides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv3d(nn.Conv3d):
    def __init__(self, cin: int, cout: int, size: Any, stride: Any = 1, padding: Any = 0) -> None:
        super().__init__(cin, cout, size, stride=stride, padding=padding)
        time, height, width = self.padding
        self._padding = (width, width, height, height, 2 * time, 0)
        self.padding = (0, 0, 0)

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        *space, front, back = self._padding
        if front and cache_x is not None:
            x, front = torch.cat((cache_x, x), 2), front - cache_x.shape[2]
        return super().forward(F.pad(x, (*space, front, back)))


class RMS_norm(nn.Module):  # noqa: N801
    def __init__(self, dim: int, channel_first: bool = True, images: bool = True, bias: bool = False) -> None:
        super().__init__()
        shape = (dim,) + (1,) * ((2 if images else 3) if channel_first else 0)
        self.channel_first, self.scale = channel_first, dim**0.5
        self.gamma = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else 0.0

    def forward(self, x: Tensor) -> Tensor:
        unit = F.normalize(x, dim=1 if self.channel_first else -1)
        return unit * self.scale * self.gamma + self.bias


class Upsample(nn.Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def cached(conv: Any, x: Tensor, feat_cache: list[Any] | None, feat_idx: list[int]) -> Tensor:
    """A convolution behind the frames of the chunk before, which then holds its own last two."""
    if feat_cache is None:
        return conv(x)
    slot, kept = feat_idx[0], x[:, :, -2:].clone()
    before = feat_cache[slot]
    if before is not None and kept.shape[2] == 1:
        kept = torch.cat((before[:, :, -1:], kept), 2)
    y = conv(x, before)
    feat_cache[slot] = kept
    feat_idx[0] += 1
    return y


def by_frame(layer: Any, x: Tensor) -> Tensor:
    batch = x.shape[0]
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1)).transpose(1, 2)


class Resample(nn.Module):
    narrowing = 2  # what upsampling divides the width by

    def __init__(self, dim: int, mode: str) -> None:
        super().__init__()
        self.dim, self.mode = dim, mode
        if mode == "none":
            self.resample: nn.Module = nn.Identity()
        elif mode.startswith("up"):
            double = Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact")
            self.resample = nn.Sequential(double, nn.Conv2d(dim, dim // self.narrowing, 3, padding=1))
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=(2, 2)))
        if mode == "upsample3d":
            self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1), padding=(1, 0, 0))
        if mode == "downsample3d":
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: Any = None) -> Tensor:
        if self.mode == "upsample3d" and feat_cache is not None:
            x = self.twice_the_frames(x, feat_cache, feat_idx)
        x = by_frame(self.resample, x)
        if self.mode == "downsample3d" and feat_cache is not None:
            before, kept = feat_cache[feat_idx[0]], x[:, :, -1:].clone()
            if before is not None:
                x = self.time_conv(torch.cat((before[:, :, -1:], x), 2))
            feat_cache[feat_idx[0]] = kept
            feat_idx[0] += 1
        return x

    def twice_the_frames(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        slot = feat_idx[0]
        feat_idx[0] += 1
        before = feat_cache[slot]
        if before is None:
            feat_cache[slot] = "Rep"
            return x
        fresh = isinstance(before, str)
        kept = x[:, :, -2:].clone()
        if kept.shape[2] == 1:
            kept = torch.cat((torch.zeros_like(kept) if fresh else before[:, :, -1:], kept), 2)
        y = self.time_conv(x) if fresh else self.time_conv(x, before)
        feat_cache[slot] = kept
        return y.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_dim, self.out_dim = in_dim, out_dim
        first = RMS_norm(in_dim, images=False), nn.SiLU(), CausalConv3d(in_dim, out_dim, 3, padding=1)
        second = RMS_norm(out_dim, images=False), nn.SiLU(), nn.Dropout(dropout)
        self.residual = nn.Sequential(*first, *second, CausalConv3d(out_dim, out_dim, 3, padding=1))
        self.shortcut = nn.Identity() if in_dim == out_dim else CausalConv3d(in_dim, out_dim, 1)

    def forward(self, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: Any = None) -> Tensor:
        y = x
        for layer in self.residual:
            y = cached(layer, y, feat_cache, feat_idx) if isinstance(layer, CausalConv3d) else layer(y)
        return y + self.shortcut(x)


class AttentionBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.proj = RMS_norm(dim), nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + by_frame(self.mixed, x)

    def mixed(self, frames: Tensor) -> Tensor:
        rows = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        seen = F.scaled_dot_product_attention(*(part.contiguous() for part in rows))
        return self.proj(seen.squeeze(1).transpose(1, 2).unflatten(2, frames.shape[2:]))


def run(layers: Iterable[nn.Module], x: Tensor, feat_cache: list[Any] | None, feat_idx: Any, *more: Any) -> Tensor:
    """Layers one after the other; those with convolutions over frames get the caches."""
    for layer in layers:
        if isinstance(layer, CausalConv3d):
            x = cached(layer, x, feat_cache, feat_idx)
        elif feat_cache is None or isinstance(layer, AttentionBlock | RMS_norm | nn.SiLU):
            x = layer(x)
        else:
            x = layer(x, feat_cache, feat_idx, *more)
    return x


def middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def head(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(RMS_norm(dim, images=False), nn.SiLU(), CausalConv3d(dim, out, 3, padding=1))


class Encoder3d(nn.Module):
    def __init__(self, widths: tuple[int, ...], z_dim: int, times: tuple[bool, ...]) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(3, widths[0], 3, padding=1)
        layers: list[nn.Module] = []
        for i, (cin, cout) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            layers.append(ResidualBlock(cin, cout))
            if i < len(times):
                layers.append(Resample(cout, "downsample3d" if times[i] else "downsample2d"))
        self.downsamples = nn.Sequential(*layers)
        self.middle, self.head = middle(widths[-1]), head(widths[-1], z_dim)

    def forward(self, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: Any = None) -> Tensor:
        layers = self.conv1, *self.downsamples, *self.middle, *self.head
        return run(layers, x, feat_cache, feat_idx)


class Decoder3d(nn.Module):
    def __init__(self, widths: tuple[int, ...], z_dim: int, times: tuple[bool, ...]) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(z_dim, widths[0], 3, padding=1)
        self.middle = middle(widths[0])
        layers: list[nn.Module] = []
        cin = widths[0]
        for i, cout in enumerate(widths):
            layers += [ResidualBlock(cin, cout), ResidualBlock(cout, cout)]
            if i < len(times):
                layers.append(Resample(cout, "upsample3d" if times[i] else "upsample2d"))
                cin = cout // 2
        self.upsamples = nn.Sequential(*layers)
        self.head = head(widths[-1], 3)

    def forward(self, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: Any = None) -> Tensor:
        layers = self.conv1, *self.middle, *self.upsamples, *self.head
        return run(layers, x, feat_cache, feat_idx)


def per_channel(scale: Any) -> list[Any]:
    return [s.reshape(1, -1, 1, 1, 1) if isinstance(s, Tensor) else s for s in scale]


class WanVAE_(nn.Module):  # noqa: N801
    def __init__(self, z_dim: int = 4) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.encoder = Encoder3d((16, 16, 32, 32), 2 * z_dim, (False, True, True))
        self.conv1, self.conv2 = CausalConv3d(2 * z_dim, 2 * z_dim, 1), CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder3d((32, 32, 16, 16), z_dim, (True, True, False))

    def forward(self, x: Tensor) -> Any:
        return self.decode(self.encode(x))  # no scale, as upstream

    def encode(self, x: Tensor, scale: Any) -> Tensor:
        self.clear_cache()
        parts = []
        for chunk in (x[:, :, :1], *x[:, :, 1 : 1 + (x.shape[2] - 1) // 4 * 4].split(4, 2)):
            if chunk.shape[2]:
                self._enc_conv_idx = [0]
                parts.append(self.encoder(chunk, feat_cache=self._enc_feat_map, feat_idx=self._enc_conv_idx))
        mean = self.conv1(torch.cat(parts, 2)).chunk(2, 1)[0]
        shift, factor = per_channel(scale)
        self.clear_cache()
        return (mean - shift) * factor

    def decode(self, z: Tensor, scale: Any) -> Tensor:
        self.clear_cache()
        shift, factor = per_channel(scale)
        parts = []
        for latent in self.conv2(z / factor + shift).split(1, 2):
            self._conv_idx = [0]
            parts.append(self.decoder(latent, feat_cache=self._feat_map, feat_idx=self._conv_idx))
        self.clear_cache()
        return torch.cat(parts, 2)

    def clear_cache(self) -> None:
        self._conv_idx, self._enc_conv_idx = [0], [0]
        self._feat_map, self._enc_feat_map = ([None] * slots(part) for part in (self.decoder, self.encoder))


def slots(network: nn.Module) -> int:
    return sum(isinstance(module, CausalConv3d) for module in network.modules())
