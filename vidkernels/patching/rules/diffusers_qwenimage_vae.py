# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' AutoencoderKLQwenImage, a Wan 2.1 VAE under other names; forwards as in `_wan_units`."""

from __future__ import annotations

from typing import Any

from vidkernels.patching.rules import _wan_calls as calls
from vidkernels.patching.rules import _wan_units as wan
from vidkernels.patching.rules.diffusers_wan_vae import rules_of


class _Family(wan.Family):
    _prefix = "QwenImage"


class ConvForward(_Family, wan.ConvForward):
    """`QwenImageCausalConv3d.forward`."""


class NormForward(_Family, wan.NormForward):
    """`QwenImageRMS_norm.forward`."""


class BlockForward(_Family, wan.BlockForward):
    """`QwenImageResidualBlock.forward`."""


class AttentionForward(_Family, wan.AttentionForward):
    """`QwenImageAttentionBlock.forward`."""


class ResampleForward(_Family, wan.ResampleForward):
    """`QwenImageResample.forward`."""


class EncoderForward(_Family, wan.EncoderForward):
    """`QwenImageEncoder3d.forward`."""


class DecoderForward(_Family, wan.DecoderForward):
    """`QwenImageDecoder3d.forward`."""

    def _block_options(self, first_chunk: bool) -> dict[str, Any]:
        return {}


class AutoencoderCalls(_Family, calls.AutoencoderCalls):
    """`AutoencoderKLQwenImage._encode` and `_decode`."""

    def _patched_size(self) -> int:
        return 1

    def _first(self, first: bool) -> dict[str, Any]:
        return {}


RULES = rules_of(
    "qwenimage_vae",
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage",
    "QwenImage",
    {
        "autoencoder": AutoencoderCalls,
        "encoder": EncoderForward,
        "decoder": DecoderForward,
        "resnet": BlockForward,
        "attention": AttentionForward,
        "resample": ResampleForward,
        "conv": ConvForward,
        "norm": NormForward,
    },
    {
        "CausalConv3d.__init__": "0c3953057471ddb3",
        "CausalConv3d.forward": "01f7c335892ddd78",
        "RMS_norm.__init__": "17913286caba9a38",
        "RMS_norm.forward": "26957f57a59329b9",
        "ResidualBlock.__init__": "d9163fc3e231a719",
        "ResidualBlock.forward": "ba9bbe8daebebd20",
        "AttentionBlock.forward": "75f7ae84894b3181",
        "Upsample.forward": "6c83557b0cc12256",
        "Resample.__init__": "e84c53409e97ad6f",
        "Resample.forward": "704eb30675dd372f",
        "Encoder3d.forward": "a19c63c7fbc146ba",
        "Decoder3d.forward": "d46bb9c16cd342fb",
        "AutoencoderKL._encode": "41ede907989bd8d8",
        "AutoencoderKL._decode": "9b1af755827e1129",
        "AutoencoderKL.clear_cache": "416270b4eb2afee2",
    },
)
