# SPDX-License-Identifier: Apache-2.0
"""Networks of our own in the place of the official VAE of Wan 2.2, and of a fork of 2.1's whose `scale` may be missing."""

from __future__ import annotations

from typing import Any

import official_wan_vae_toys as plain
import torch
import torch.nn.functional as F
from official_wan_vae_toys import AttentionBlock, CausalConv3d, ResidualBlock, RMS_norm, Upsample, head, middle, run
from torch import Tensor, nn

__all__ = ["AttentionBlock", "RMS_norm", "Upsample"]


class Resample(plain.Resample):
    narrowing = 1

    def __init__(self, dim: int, mode: str) -> None:
        super().__init__(dim, mode)

    def forward(self, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: Any = None) -> Tensor:
        return super().forward(x, feat_cache, feat_idx)


def patchify(x: Tensor, patch_size: int) -> Tensor:
    rows = x.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))
    return rows.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x: Tensor, patch_size: int) -> Tensor:
    boxes = x.unflatten(1, (-1, patch_size, patch_size))
    return boxes.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


class AvgDown3D(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, factor_t: int, factor_s: int = 1) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.factor_t, self.factor_s = factor_t, factor_s
        self.group_size = in_channels * factor_t * factor_s**2 // out_channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.factor_t, 0))
        boxes = x.unflatten(4, (-1, self.factor_s)).unflatten(3, (-1, self.factor_s)).unflatten(2, (-1, self.factor_t))
        values = boxes.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        return values.unflatten(1, (self.out_channels, self.group_size)).mean(2)


class DupUp3D(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, factor_t: int, factor_s: int = 1) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.factor_t, self.factor_s = factor_t, factor_s
        self.repeats = out_channels * factor_t * factor_s**2 // in_channels

    def forward(self, x: Tensor, first_chunk: bool = False) -> Tensor:
        box = self.factor_t, self.factor_s, self.factor_s
        values = x.repeat_interleave(self.repeats, 1).unflatten(1, (self.out_channels, *box))
        y = values.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return y[:, :, self.factor_t - 1 :] if first_chunk else y


class Down_ResidualBlock(nn.Module):  # noqa: N801
    def __init__(self, cin: int, cout: int, in_time: bool, last: bool) -> None:
        super().__init__()
        self.avg_shortcut = AvgDown3D(cin, cout, 2 if in_time else 1, 1 if last else 2)
        mode = "downsample3d" if in_time else "downsample2d"
        sampler = () if last else (Resample(cout, mode),)
        self.downsamples = nn.Sequential(ResidualBlock(cin, cout), *sampler)

    def forward(self, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: Any = None) -> Tensor:
        mean = self.avg_shortcut(x)
        for layer in self.downsamples:
            x = layer(x, feat_cache, feat_idx)
        return x + mean


class Up_ResidualBlock(nn.Module):  # noqa: N801
    def __init__(self, cin: int, cout: int, in_time: bool, last: bool) -> None:
        super().__init__()
        self.avg_shortcut = None if last else DupUp3D(cin, cout, 2 if in_time else 1, 2)
        mode = "upsample3d" if in_time else "upsample2d"
        sampler = () if last else (Resample(cout, mode),)
        self.upsamples = nn.Sequential(ResidualBlock(cin, cout), ResidualBlock(cout, cout), *sampler)

    def forward(
        self, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: Any = None, first_chunk: bool = False
    ) -> Tensor:
        y = x
        for layer in self.upsamples:
            y = layer(y, feat_cache, feat_idx)
        return y if self.avg_shortcut is None else y + self.avg_shortcut(x, first_chunk)


class Encoder3d(nn.Module):
    def __init__(self, widths: tuple[int, ...], z_dim: int, times: tuple[bool, ...]) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(12, widths[0], 3, padding=1)
        levels = zip((widths[0], *widths), widths, (*times, False), range(len(widths)), strict=False)
        self.downsamples = nn.Sequential(
            *(Down_ResidualBlock(cin, cout, time, i == len(widths) - 1) for cin, cout, time, i in levels)
        )
        self.middle, self.head = middle(widths[-1]), head(widths[-1], z_dim)

    def forward(self, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: Any = None) -> Tensor:
        layers = self.conv1, *self.downsamples, *self.middle, *self.head
        return run(layers, x, feat_cache, feat_idx)


class Decoder3d(nn.Module):
    def __init__(self, widths: tuple[int, ...], z_dim: int, times: tuple[bool, ...]) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(z_dim, widths[0], 3, padding=1)
        self.middle = middle(widths[0])
        levels = zip((widths[0], *widths), widths, (*times, False), range(len(widths)), strict=False)
        self.upsamples = nn.Sequential(
            *(Up_ResidualBlock(cin, cout, time, i == len(widths) - 1) for cin, cout, time, i in levels)
        )
        self.head = head(widths[-1], 12)

    def forward(
        self, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: Any = None, first_chunk: bool = False
    ) -> Tensor:
        x = run((self.conv1, *self.middle), x, feat_cache, feat_idx)
        x = run(self.upsamples, x, feat_cache, feat_idx, first_chunk)
        return run(self.head, x, feat_cache, feat_idx)


class WanVAE_(nn.Module):  # noqa: N801
    def __init__(self, z_dim: int = 4) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.encoder = Encoder3d((16, 16, 32, 32), 2 * z_dim, (False, True, True))
        self.conv1, self.conv2 = CausalConv3d(2 * z_dim, 2 * z_dim, 1), CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder3d((32, 32, 16, 16), z_dim, (True, True, False))

    def forward(self, x: Tensor, scale: Any = (0, 1)) -> Any:
        mean = self.encode(x, scale)
        return self.decode(mean, scale), mean

    def encode(self, x: Tensor, scale: Any) -> Tensor:
        self.clear_cache()
        x, parts = patchify(x, patch_size=2), []
        for chunk in (x[:, :, :1], *x[:, :, 1 : 1 + (x.shape[2] - 1) // 4 * 4].split(4, 2)):
            if chunk.shape[2]:
                self._enc_conv_idx = [0]
                parts.append(self.encoder(chunk, feat_cache=self._enc_feat_map, feat_idx=self._enc_conv_idx))
        mean = self.conv1(torch.cat(parts, 2)).chunk(2, 1)[0]
        shift, factor = plain.per_channel(scale)
        self.clear_cache()
        return (mean - shift) * factor

    def decode(self, z: Tensor, scale: Any) -> Tensor:
        self.clear_cache()
        shift, factor = plain.per_channel(scale)
        parts = []
        for i, latent in enumerate(self.conv2(z / factor + shift).split(1, 2)):
            self._conv_idx = [0]
            options = {"feat_cache": self._feat_map, "feat_idx": self._conv_idx, "first_chunk": i == 0}
            parts.append(self.decoder(latent, **options))
        frames = unpatchify(torch.cat(parts, 2), patch_size=2)
        self.clear_cache()
        return frames

    def clear_cache(self) -> None:
        self._conv_idx, self._enc_conv_idx = [0], [0]
        self._feat_map, self._enc_feat_map = ([None] * plain.slots(part) for part in (self.decoder, self.encoder))
