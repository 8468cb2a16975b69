# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers with the attributes, class names and results of NVIDIA's own Cosmos code, written anew in plain PyTorch.

The official files are no package and not part of this one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def nonlinearity(x: Tensor) -> Tensor:
    return F.silu(x)


def replication_pad(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, :1], x], 2)


def time2batch(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def batch2time(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def space2batch(x: Tensor) -> Tensor:
    return x.permute(0, 3, 4, 2, 1).flatten(0, 2)


def batch2space(x: Tensor, batch: int, height: int) -> Tensor:
    return x.unflatten(0, (batch, height, -1)).permute(0, 4, 3, 1, 2)


def parted(x: Tensor, wavelet: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Low and high numbers of pairs along an axis; one that is left over is paired with the one before it."""
    if x.shape[axis] % 2:
        x = torch.cat([x, x.narrow(axis, x.shape[axis] - 2, 1)], axis)
    one, two = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return wavelet[1] * one + wavelet[0] * two, wavelet[0] * one - wavelet[1] * two


def joined(low: Tensor, high: Tensor, wavelet: Tensor, axis: int) -> Tensor:
    one, two = wavelet[1] * low + wavelet[0] * high, wavelet[0] * low - wavelet[1] * high
    return torch.stack([one, two], axis + 1).flatten(axis, axis + 1)


class _Wavelet(nn.Module):
    def __init__(self, patch_size: int, patch_method: str = "haar") -> None:
        super().__init__()
        self.patch_size, self.patch_method, self.range = patch_size, patch_method, range(int(math.log2(patch_size)))
        self.register_buffer("wavelets", torch.full((2,), 0.5**0.5), persistent=False)


class Patcher(_Wavelet):
    axes = (3, 2)

    def _dwt(self, x: Tensor) -> Tensor:
        parts = [x]
        for axis in self.axes:
            parts = [half for part in parts for half in parted(part, self.wavelets.to(x), axis)]
        return torch.cat(parts, 1) / math.sqrt(len(parts))

    def _haar(self, x: Tensor) -> Tensor:
        for _ in self.range:
            x = self._dwt(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self._haar(x) if self.patch_method == "haar" else F.pixel_unshuffle(x, self.patch_size)


class Patcher3D(Patcher):
    axes = (2, 3, 4)

    def _dwt(self, x: Tensor) -> Tensor:
        return super()._dwt(x)

    def _haar(self, x: Tensor) -> Tensor:
        return super()._haar(torch.cat([x[:, :, :1]] * (self.patch_size - 1) + [x], 2))


class UnPatcher(_Wavelet):
    axes = (2, 3)

    def _idwt(self, x: Tensor) -> Tensor:
        parts = list(x.chunk(2 ** len(self.axes), 1))
        scale = math.sqrt(len(parts))
        for axis in self.axes:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [joined(low, high, self.wavelets.to(x), axis) for low, high in pairs]
        return parts[0] * scale

    def _ihaar(self, x: Tensor) -> Tensor:
        for _ in self.range:
            x = self._idwt(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self._ihaar(x) if self.patch_method == "haar" else F.pixel_shuffle(x, self.patch_size)


class UnPatcher3D(UnPatcher):
    axes = (4, 3, 2)

    def _idwt(self, x: Tensor) -> Tensor:
        return super()._idwt(x)

    def _ihaar(self, x: Tensor) -> Tensor:
        return super()._ihaar(x)[:, :, self.patch_size - 1 :]


class CausalNormalize(nn.Module):
    def __init__(self, width: int, num_groups: int = 1) -> None:
        super().__init__()
        self.norm, self.num_groups = nn.GroupNorm(num_groups, width, 1e-6), num_groups

    def forward(self, x: Tensor) -> Tensor:
        return batch2time(self.norm(time2batch(x)), x.shape[0]) if self.num_groups == 1 else self.norm(x)


class CausalConv3d(nn.Module):
    def __init__(
        self, cin: int, cout: int, size: Any = 3, stride: int = 1, time_stride: int = 1, padding: int = 0,
        pad_mode: str = "constant",
    ) -> None:  # fmt: skip
        super().__init__()
        size = size if isinstance(size, tuple) else (size,) * 3
        self.pad_mode, self.time_pad, self.spatial_pad = pad_mode, size[0] - time_stride, (padding,) * 4
        self.conv3d = nn.Conv3d(cin, cout, size, (time_stride, stride, stride))

    def _replication_pad(self, x: Tensor) -> Tensor:
        return F.pad(torch.cat([x[:, :, :1]] * self.time_pad + [x], 2), (*self.spatial_pad, 0, 0), self.pad_mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(self._replication_pad(x))


def in_turn(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(CausalConv3d(cin, cout, (1, 3, 3), padding=1), CausalConv3d(cout, cout, (3, 1, 1)))


class CausalHybridDownsample3d(nn.Module):
    def __init__(self, width: int, space: bool = True, time: bool = True) -> None:
        super().__init__()
        self.spatial_down, self.temporal_down, self.conv3 = space, time, CausalConv3d(width, width, 1)
        self.conv1 = CausalConv3d(width, width, (1, 3, 3), stride=2)
        self.conv2 = CausalConv3d(width, width, (3, 1, 1), time_stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.spatial_down:
            x = F.pad(x, (0, 1, 0, 1))
            x = self.conv1(x) + means(x, (1, 2, 2))
        if self.temporal_down:
            x = replication_pad(x)
            x = self.conv2(x) + means(x, (2, 1, 1))
        return self.conv3(x) if self.spatial_down or self.temporal_down else x


def means(x: Tensor, box: tuple[int, int, int]) -> Tensor:
    """`F.avg_pool3d`, which has no bfloat16 on CPUs."""
    return F.avg_pool3d(x.float(), box).to(x.dtype) if x.dtype == torch.bfloat16 else F.avg_pool3d(x, box)


class CausalHybridUpsample3d(nn.Module):
    def __init__(self, width: int, space: bool = True, time: bool = True) -> None:
        super().__init__()
        self.spatial_up, self.temporal_up, self.conv3 = space, time, CausalConv3d(width, width, 1)
        self.conv1 = CausalConv3d(width, width, (3, 1, 1)) if time else nn.Identity()
        self.conv2 = CausalConv3d(width, width, (1, 3, 3), padding=1) if space else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.temporal_up:
            x = x.repeat_interleave(2, 2)[:, :, 1:]
            x = self.conv1(x) + x
        if self.spatial_up:
            x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
            x = self.conv2(x) + x
        return self.conv3(x) if self.spatial_up or self.temporal_up else x


class CausalDownsample3d(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, stride=2, time_stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(replication_pad(F.pad(x, (0, 1, 0, 1))))


class CausalUpsample3d(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
        return self.conv(wide.repeat_interleave(2, 2)[:, :, 1:])


class _Block(nn.Module):
    def __init__(self, cin: int, cout: int, groups: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2, self.dropout = *self.norms(cin, cout, groups), nn.Dropout(dropout)
        self.conv1, self.conv2 = self.convs(cin, cout)
        self.nin_shortcut = self.shortcut(cin, cout) if cin != cout else nn.Identity()

    def norms(self, cin: int, cout: int, groups: int) -> tuple[nn.Module, nn.Module]:
        return CausalNormalize(cin, groups), CausalNormalize(cout, groups)

    def shortcut(self, cin: int, cout: int) -> nn.Module:
        return CausalConv3d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(nonlinearity(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(self.dropout(nonlinearity(self.norm2(h))))


class CausalResnetBlockFactorized3d(_Block):
    def convs(self, cin: int, cout: int) -> tuple[nn.Module, nn.Module]:
        return in_turn(cin, cout), in_turn(cout, cout)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class CausalResnetBlock3d(_Block):
    def convs(self, cin: int, cout: int) -> tuple[nn.Module, nn.Module]:
        return CausalConv3d(cin, cout, padding=1), CausalConv3d(cout, cout, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class CausalAttnBlock(nn.Module):
    def __init__(self, width: int, num_groups: int = 1) -> None:
        super().__init__()
        self.norm = CausalNormalize(width, num_groups)
        self.q, self.k, self.v, self.proj_out = (CausalConv3d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (time2batch(layer(h)).flatten(2).mT for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).mT.unflatten(2, x.shape[3:])
        return x + self.proj_out(batch2time(mixed, x.shape[0]))


class CausalTemporalAttnBlock(CausalAttnBlock):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (space2batch(layer(h)) for layer in (self.q, self.k, self.v))
        scores = (q @ k.mT * q.shape[2] ** -0.5).masked_fill(torch.ones_like(q[:1] @ k[:1].mT).tril() == 0, -torch.inf)
        mixed = scores.softmax(-1) @ v
        return x + self.proj_out(batch2space(mixed, x.shape[0], x.shape[3]))
