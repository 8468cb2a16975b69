# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of `official_wan_vae_toys` as a fork of Wan 2.1 has it: means and variances, and no scale needed."""

from __future__ import annotations

from typing import Any

import official_wan_vae_toys as plain
import torch
from official_wan_vae_toys import CausalConv3d, Decoder3d, Encoder3d, Resample
from torch import Tensor

__all__ = ["CausalConv3d", "Decoder3d", "Encoder3d", "Resample"]


class WanVAE_(plain.WanVAE_):  # noqa: N801
    def forward(self, x: Tensor) -> Any:
        mean, log_variance = self.encode(x)
        return self.decode(mean), mean, log_variance

    def encode(self, x: Tensor, scale: Any = None) -> Any:
        self.clear_cache()
        parts = []
        for chunk in (x[:, :, :1], *x[:, :, 1:].split(4, 2)):
            if chunk.shape[2] in (1, 4):
                self._enc_conv_idx = [0]
                parts.append(self.encoder(chunk, feat_cache=self._enc_feat_map, feat_idx=self._enc_conv_idx))
        mean, log_variance = self.conv1(torch.cat(parts, 2)).chunk(2, 1)
        if scale is not None:
            shift, factor = plain.per_channel(scale)
            mean = (mean - shift) * factor
        self.clear_cache()
        return mean, log_variance

    def decode(self, z: Tensor, scale: Any = None) -> Tensor:
        return super().decode(z, (0, 1) if scale is None else scale)

    def clear_cache(self) -> None:
        super().clear_cache()
