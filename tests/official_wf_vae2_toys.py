# SPDX-License-Identifier: Apache-2.0
"""A small VAE with the attributes, class names and results of WF-VAE 2, written anew in plain PyTorch: levels of any kind.

Its wavelets are those of `official_wf_vae_toys`, its layers those of `official_opensora_plan_toys`.
"""

from __future__ import annotations

from typing import Any

import torch
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
    Upsample,
    nonlinearity,
)
from official_wf_vae_toys import (
    HaarWaveletTransform2D,
    HaarWaveletTransform3D,
    InverseHaarWaveletTransform2D,
    InverseHaarWaveletTransform3D,
    WFVAEModel,
    up2x,
)
from torch import Tensor, nn

__all__ = ["CausalConv3d", "LayerNorm", "WFVAE2Model"]  # the first two are looked up here by the digests of the rules
npu_config: Any = None


class WFDownBlock(nn.Module):
    """A level that halves space, or space and time ("thw")."""

    def __init__(self, kind: str, widths: tuple[int, int], flow: int, norm: str) -> None:
        super().__init__()
        block, deep = (ResnetBlock3D, True) if kind == "thw" else (ResnetBlock2D, False)
        self.in_channels, self.out_channels, self.energy_flow_size = *widths, flow
        self.wavelet_transform: nn.Module = HaarWaveletTransform3D() if deep else HaarWaveletTransform2D()
        self.in_flow_conv = Conv2d(24 if deep else 12, flow, 3, padding=1)
        self.res_block = nn.Sequential(block((widths[0], widths[0]), norm_type=norm))
        self.down: nn.Module = Spatial2xTime2x3DDownsample(widths[0]) if deep else Downsample(widths[0])
        self.out_res_block = block((widths[0] + flow, widths[1]), norm_type=norm)

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        coeffs = self.wavelet_transform(w[:, :3])
        h = torch.cat([self.down(self.res_block(x)), self.in_flow_conv(coeffs)], 1)
        return self.out_res_block(h), coeffs


class WFUpBlock(nn.Module):
    """A level that doubles space, or space and time ("thw")."""

    def __init__(self, kind: str, widths: tuple[int, int], flow: int, norm: str) -> None:
        super().__init__()
        block, deep = (ResnetBlock3D, True) if kind == "thw" else (ResnetBlock2D, False)
        self.in_channels, self.out_channels, self.energy_flow_size = *widths, flow
        self.branch_conv = block((widths[0], widths[0] + flow), norm_type=norm)
        last = Conv2d(flow, 24 if deep else 12, 3, padding=1)
        self.out_flow_conv = nn.Sequential(block((flow, flow), norm_type=norm), last)
        self.inverse_wavelet_transform: nn.Module = InverseHaarWaveletTransform2D()
        if deep:
            self.inverse_wavelet_transform = InverseHaarWaveletTransform3D()
        self.res_block = nn.Sequential(block((widths[0], widths[0]), norm_type=norm))
        self.up = up2x(widths[0]) if deep else Upsample(widths[0])
        self.out_res_block = block(widths, norm_type=norm)

    def forward(self, x: Tensor, w: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        h, flow = self.branch_conv(x).split([self.in_channels, self.energy_flow_size], 1)
        coeffs = self.out_flow_conv(flow)
        if w is not None:
            coeffs = torch.cat([coeffs[:, :3] + w, coeffs[:, 3:]], 1)
        return self.out_res_block(self.up(self.res_block(h))), self.inverse_wavelet_transform(coeffs), coeffs


def middle(width: int, norm: str, image: bool) -> nn.Module:
    block = ResnetBlock2D if image else ResnetBlock3D
    first, last = (block((width, width), norm_type=norm) for _ in range(2))
    return nn.Sequential(first, last) if image else nn.Sequential(first, AttnBlock3DFix(width, norm), last)


class Encoder(nn.Module):
    def __init__(self, kinds: tuple[str, ...], widths: tuple[int, ...], flow: int, norm: str, image: bool = False):
        super().__init__()
        self.wavelet_transform_in: nn.Module = HaarWaveletTransform2D() if image else HaarWaveletTransform3D()
        self.conv_in = Conv2d(12 if image else 24, widths[0], 3, padding=1)
        levels = zip(kinds, zip(widths, widths[1:], strict=False), strict=True)
        self.down_blocks = nn.ModuleList(WFDownBlock(kind, level, flow, norm) for kind, level in levels)
        self.mid, self.norm_out = middle(widths[-1], norm, image), Normalize(widths[-1], norm)
        self.conv_out = (Conv2d if image else CausalConv3d)(widths[-1], 16, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        coeffs, found = self.wavelet_transform_in(x), []
        h = self.conv_in(coeffs)
        for block in self.down_blocks:
            h, coeffs = block(h, coeffs)
            found.append(coeffs)
        return self.conv_out(nonlinearity(self.norm_out(self.mid(h)))), found


class Decoder(nn.Module):
    def __init__(self, kinds: tuple[str, ...], widths: tuple[int, ...], flow: int, norm: str, image: bool = False):
        super().__init__()
        self.conv_in = (Conv2d if image else CausalConv3d)(8, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], norm, image)
        levels = list(zip(kinds, zip(widths[1:], widths, strict=False), strict=True))
        self.up_blocks = nn.ModuleList(WFUpBlock(kind, level, flow, norm) for kind, level in reversed(levels))
        self.norm_out, self.conv_out = Normalize(widths[0], norm), Conv2d(widths[0], 12 if image else 24, 3, padding=1)
        self.inverse_wavelet_transform_out: nn.Module = InverseHaarWaveletTransform3D()
        if image:
            self.inverse_wavelet_transform_out = InverseHaarWaveletTransform2D()

    def forward(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        h, w, found = self.mid(self.conv_in(z)), None, []
        for block in self.up_blocks:
            h, w, coeffs = block(h, w)
            found.append(coeffs)
        h = self.conv_out(self.norm_out(h))
        return self.inverse_wavelet_transform_out(torch.cat([h[:, :3] + w, h[:, 3:]], 1)), found


class WFVAE2Model(WFVAEModel):
    """`encode` and `decode` return tensors; upstream's has no tiles, its layers can be driven in chunks of time all the same."""

    def __init__(
        self,
        kinds: tuple[str, ...] = ("hw", "thw"),
        widths: tuple[int, ...] = (8, 12, 16),
        norm: str = "layernorm",
        image: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.encoder, self.decoder = (part(kinds, widths, 8, norm, image) for part in (Encoder, Decoder))
        self.use_tiling = False
