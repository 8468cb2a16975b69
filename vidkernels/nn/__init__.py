# SPDX-License-Identifier: Apache-2.0
"""Modules over `vidkernels.ops`: `vidkernels.nn.<Name>`."""

from __future__ import annotations

from vidkernels._exports import lazy

_EXPORTS: dict[str, str] = {
    "PackedAttention": "vidkernels.nn.packed_attention",
    "BatchedProjection": "vidkernels.nn.adaln_zero",
    "AdaLNZero": "vidkernels.nn.adaln_zero",
    "AdaLNFinal": "vidkernels.nn.adaln_zero",
    "CodebookUsage": "vidkernels.nn.codebook_usage",
    "FSQ": "vidkernels.nn.fsq",
    "LFQ": "vidkernels.nn.lfq",
    "CausalConv3d": "vidkernels.nn.causal_conv3d",
    "SpatialDownsample": "vidkernels.nn.causal_conv3d",
    "SpatialUpsample": "vidkernels.nn.causal_conv3d",
    "TemporalDownsample": "vidkernels.nn.causal_conv3d",
    "TemporalUpsample": "vidkernels.nn.causal_conv3d",
    "UpsampleState": "vidkernels.nn.causal_conv3d",
    "QKNormRope": "vidkernels.nn.qk_norm_rope",
    "RotaryConfig": "vidkernels.nn.qk_norm_rope",
    "ltx_frequencies": "vidkernels.nn.qk_norm_rope",
    "video_positions": "vidkernels.nn.qk_norm_rope",
    "AlphaBlender": "vidkernels.nn.alpha_blend",
    "ChannelNorm": "vidkernels.nn.channel_norm",
    "GroupNorm": "vidkernels.nn.channel_norm",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy(__name__, _EXPORTS)
