# SPDX-License-Identifier: Apache-2.0
"""A small VAE with the attributes, class names and results of WF-VAE (Open-Sora-Plan 1.3), written anew in plain PyTorch.

Its blocks, samplers and convolutions are those of `official_opensora_plan_toys`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.nn.functional as F
from official_opensora_plan_toys import (
    AttnBlock3DFix,
    CausalConv3d,
    Conv2d,
    Downsample,
    LayerNorm,
    Normalize,
    ResnetBlock2D,
    ResnetBlock3D,
    Spatial2xTime2x3DDownsample,
    Spatial2xTime2x3DUpsample,
    Upsample,
    nonlinearity,
    of_frames,
)
from torch import Tensor, nn

__all__ = ["CausalConv3d", "LayerNorm", "nonlinearity"]  # looked up here by the digests of the rules
npu_config: Any = None

VOLUME = ("h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v")
FRAME = ("aa", "ad", "da", "dd")
BY_CHANNEL = (
    False  # whether a wavelet calls its convolutions for one channel after the other, as WF-VAE's own repository
)


def haar(index: int, axes: int) -> Tensor:
    """The weights of band `index`: in its binary digits, last axis first, which axes change sign."""
    weight = torch.ones(2, 2, 2)[: 1 if axes == 2 else 2]
    for axis, bit in zip((2, 1, 0), (index & 1, index >> 1 & 1, index >> 2 & 1), strict=True):
        if bit:
            weight = weight * torch.tensor([1.0, -1.0]).reshape([2 if i == axis else 1 for i in range(3)])
    return weight * (0.5 if axes == 2 else 0.3536)


class HaarWaveletTransform3D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for index, name in enumerate(VOLUME):
            conv = CausalConv3d(1, 1, 2, 2, bias=False)
            conv.conv.weight.data = haar(index, 3)[None, None]
            setattr(self, f"{name}_conv", conv.requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        volumes = x.flatten(0, 1).unsqueeze(1)
        calls = volumes.split(1) if BY_CHANNEL else [volumes]
        bands = [torch.cat([getattr(self, f"{name}_conv")(call) for call in calls]).squeeze(1) for name in VOLUME]
        return torch.cat([band.unflatten(0, x.shape[:2]) for band in bands], 1)


class InverseHaarWaveletTransform3D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for index, name in enumerate(VOLUME):
            self.register_buffer(name, haar(index, 3)[None, None])
        self.enable_cached, self.is_first_chunk = False, True

    def forward(self, coeffs: Tensor) -> Tensor:
        total: Any = 0
        first = 0 if self.enable_cached and not self.is_first_chunk else 1
        for name, band in zip(VOLUME, coeffs.chunk(8, 1), strict=True):
            volumes = band.flatten(0, 1).unsqueeze(1)
            total = total + F.conv_transpose3d(volumes, getattr(self, name), stride=2)[:, 0, first:]
        return total.unflatten(0, (coeffs.shape[0], -1))


class HaarWaveletTransform2D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for index, name in enumerate(("aa", "da", "ad", "dd")):
            self.register_buffer(name, haar(index, 2)[None])

    @of_frames
    def forward(self, x: Tensor) -> Tensor:
        images = x.flatten(0, 1).unsqueeze(1)
        bands = [F.conv2d(images, getattr(self, name), stride=2).squeeze(1) for name in FRAME]
        return torch.cat([band.unflatten(0, x.shape[:2]) for band in bands], 1)


class InverseHaarWaveletTransform2D(HaarWaveletTransform2D):
    @of_frames
    def forward(self, coeffs: Tensor) -> Tensor:
        total: Any = 0
        for name, band in zip(FRAME, coeffs.chunk(4, 1), strict=True):
            total = total + F.conv_transpose2d(band.flatten(0, 1).unsqueeze(1), getattr(self, name), stride=2)
        return total.squeeze(1).unflatten(0, (coeffs.shape[0], -1))


def up2x(width: int) -> nn.Module:
    sampler = Spatial2xTime2x3DUpsample(width)
    sampler.t_interpolation = "trilinear"
    return sampler


class Encoder(nn.Module):
    def __init__(self, width: int, flow: int, norm: str) -> None:
        super().__init__()
        wide, top = 2 * width, 4 * width

        def block(cin: int, cout: int) -> nn.Module:
            return ResnetBlock3D((cin, cout), norm_type=norm)

        frames = ResnetBlock2D((width, width), norm_type=norm)
        self.down1 = nn.Sequential(Conv2d(24, width, 3, padding=1), frames, Downsample(width))
        middle = Conv2d(width + flow, wide, 3, padding=1), block(wide, wide)
        self.down2 = nn.Sequential(*middle, Spatial2xTime2x3DDownsample(wide))
        self.connect_l1, self.connect_l2 = Conv2d(12, flow, 3, padding=1), Conv2d(24, flow, 3, padding=1)
        self.mid = nn.Sequential(block(wide + flow, top), AttnBlock3DFix(top, norm), block(top, top))
        self.norm_out, self.conv_out = Normalize(top, norm), CausalConv3d(top, 16, padding=1)
        self.wavelet_transform_in, self.wavelet_transform_l1 = HaarWaveletTransform3D(), HaarWaveletTransform2D()
        self.wavelet_transform_l2 = HaarWaveletTransform3D()

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        coeffs = self.wavelet_transform_in(x)
        fine = self.wavelet_transform_l1(coeffs[:, :3])
        coarse = self.wavelet_transform_l2(fine[:, :3])
        h = self.down2(torch.cat([self.down1(coeffs), self.connect_l1(fine)], 1))
        h = self.mid(torch.cat([h, self.connect_l2(coarse)], 1))
        return self.conv_out(nonlinearity(self.norm_out(h))), (fine, coarse)


class Decoder(nn.Module):
    def __init__(self, width: int, flow: int, norm: str) -> None:
        super().__init__()
        wide, top = 2 * width, 4 * width

        def block(cin: int, cout: int) -> nn.Module:
            return ResnetBlock3D((cin, cout), norm_type=norm)

        self.energy_flow_hidden_size = flow
        self.conv_in = CausalConv3d(8, top, padding=1)
        self.mid = nn.Sequential(block(top, top), AttnBlock3DFix(top, norm), block(top, top + flow))
        self.up2 = nn.Sequential(block(top, top), up2x(top), block(top, top + flow))
        self.up1 = nn.Sequential(block(top, wide), Upsample(wide), block(wide, wide))
        self.layer = nn.Sequential(block(wide, width), block(width, width))
        self.connect_l1 = nn.Sequential(block(flow, flow), Conv2d(flow, 12, 3, padding=1))
        self.connect_l2 = nn.Sequential(block(flow, flow), Conv2d(flow, 24, 3, padding=1))
        self.norm_out, self.conv_out = Normalize(width, norm), Conv2d(width, 24, 3, padding=1)
        self.inverse_wavelet_transform_out = InverseHaarWaveletTransform3D()
        self.inverse_wavelet_transform_l1 = InverseHaarWaveletTransform2D()
        self.inverse_wavelet_transform_l2 = InverseHaarWaveletTransform3D()

    def forward(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        flow = self.energy_flow_hidden_size
        h = self.mid(self.conv_in(z))
        coarse = self.connect_l2(h[:, -flow:])
        detail = self.inverse_wavelet_transform_l2(coarse)
        h = self.up2(h[:, :-flow])
        fine = self.connect_l1(h[:, -flow:])
        fine = torch.cat([fine[:, :3] + detail, fine[:, 3:]], 1)
        detail = self.inverse_wavelet_transform_l1(fine)
        h = self.conv_out(nonlinearity(self.norm_out(self.layer(self.up1(h[:, :-flow])))))
        h = torch.cat([h[:, :3] + detail, h[:, 3:]], 1)
        return self.inverse_wavelet_transform_out(h), (fine, coarse)


class WFVAEModel(nn.Module):
    """`encode` and `decode` return tensors; with tiling a clip goes through in chunks of 8 frames, or 2 latents."""

    def __init__(self, norm: str = "layernorm", width: int = 8, flow: int = 8) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(width, flow, norm), Decoder(width, flow, norm)
        self.use_tiling, deep, late = False, self.decoder, self.decoder.up2[-2:]
        for part in (deep.up2, deep.connect_l2, deep.conv_in, deep.mid):
            self.tell(part, cache_offset=1)
        for part in (late, deep.up1, deep.connect_l1, deep.layer):
            self.tell(part, cache_offset=2)

    def tell(self, part: Any, **values: Any) -> None:
        for module in part.modules():
            for name, value in values.items():
                if hasattr(module, name):
                    setattr(module, name, value)

    def enable_tiling(self) -> None:
        self.use_tiling = True
        self.tell(self, enable_cached=True)

    def start(self) -> None:
        for module in self.modules():
            if hasattr(module, "causal_cached"):
                module.causal_cached = deque()
        self.tell(self, is_first_chunk=True)

    def encode(self, x: Tensor) -> Tensor:
        self.start()
        if not self.use_tiling:
            return self.encoder(x)[0]
        parts = [self.encoder(x[:, :, :1])[0]]
        self.tell(self, is_first_chunk=False)
        parts += [self.encoder(chunk)[0] for chunk in x[:, :, 1:].split(8, 2) if chunk.shape[2]]
        return torch.cat(parts, 2)

    def decode(self, z: Tensor) -> Tensor:
        self.start()
        if not self.use_tiling:
            return self.decoder(z)[0]
        parts, start = [], 0
        for end in [1, *range(3, z.shape[2] + 2, 2)][: 1 + z.shape[2] // 2]:
            again = int(end + 1 < z.shape[2])  # the latent behind a chunk comes again
            frames = self.decoder(z[:, :, start : end + again])[0]
            parts.append(frames[:, :, : frames.shape[2] - 4 * again])
            self.tell(self, is_first_chunk=False)
            start = end
        return torch.cat(parts, 2)
