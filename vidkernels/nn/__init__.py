# SPDX-License-Identifier: Apache-2.0
"""Modules over `vidkernels.ops`: `vidkernels.nn.<Name>`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vidkernels._exports import lazy

if TYPE_CHECKING:
    from vidkernels.nn.adaln_zero import AdaLNFinal as AdaLNFinal
    from vidkernels.nn.adaln_zero import AdaLNZero as AdaLNZero
    from vidkernels.nn.adaln_zero import BatchedProjection as BatchedProjection
    from vidkernels.nn.alpha_blend import AlphaBlender as AlphaBlender
    from vidkernels.nn.causal_conv3d import CausalConv3d as CausalConv3d
    from vidkernels.nn.causal_conv3d import SpatialDownsample as SpatialDownsample
    from vidkernels.nn.causal_conv3d import SpatialUpsample as SpatialUpsample
    from vidkernels.nn.causal_conv3d import TemporalDownsample as TemporalDownsample
    from vidkernels.nn.causal_conv3d import TemporalUpsample as TemporalUpsample
    from vidkernels.nn.causal_conv3d import UpsampleState as UpsampleState
    from vidkernels.nn.channel_norm import ChannelNorm as ChannelNorm
    from vidkernels.nn.channel_norm import GroupNorm as GroupNorm
    from vidkernels.nn.codebook_usage import CodebookUsage as CodebookUsage
    from vidkernels.nn.fsq import FSQ as FSQ
    from vidkernels.nn.lfq import LFQ as LFQ
    from vidkernels.nn.packed_attention import PackedAttention as PackedAttention
    from vidkernels.nn.qk_norm_rope import QKNormRope as QKNormRope
    from vidkernels.nn.qk_norm_rope import RotaryConfig as RotaryConfig
    from vidkernels.nn.qk_norm_rope import ltx_frequencies as ltx_frequencies
    from vidkernels.nn.qk_norm_rope import video_positions as video_positions

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
if not TYPE_CHECKING:  # type checkers know the names above, and no others
    __getattr__, __dir__ = lazy(__name__, _EXPORTS)
