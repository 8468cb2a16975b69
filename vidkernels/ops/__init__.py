# SPDX-License-Identifier: Apache-2.0
"""The public ops: `vidkernels.ops.<name>`. The only door to kernels."""

from __future__ import annotations

from vidkernels._exports import lazy

_EXPORTS: dict[str, str] = {
    "norm_rope_attention": "vidkernels.ops.axial_attention",
    "axial_attention": "vidkernels.ops.axial_attention",
    "group_norm": "vidkernels.ops.group_norm",
    "lfq_entropy": "vidkernels.ops.entropy",
    "fsq_entropy": "vidkernels.ops.entropy",
    "lfq_quantize": "vidkernels.ops.lfq",
    "lfq_codes_to_indices": "vidkernels.ops.lfq",
    "lfq_indices_to_codes": "vidkernels.ops.lfq",
    "varlen_attention": "vidkernels.ops.varlen_attention",
    "fsq_quantize": "vidkernels.ops.fsq",
    "fsq_codes_to_indices": "vidkernels.ops.fsq",
    "fsq_indices_to_codes": "vidkernels.ops.fsq",
    "gate_residual": "vidkernels.ops.gate_residual",
    "adaln_zero": "vidkernels.ops.adaln_zero",
    "adaln_modulate": "vidkernels.ops.adaln_modulate",
    "causal_conv3d": "vidkernels.ops.causal_conv3d",
    "downsample_conv3d": "vidkernels.ops.upsample_conv3d",
    "upsample_conv3d": "vidkernels.ops.upsample_conv3d",
    "qk_norm_rope": "vidkernels.ops.qk_norm_rope",
    "alpha_blend": "vidkernels.ops.alpha_blend",
    "alpha_blend_down": "vidkernels.ops.alpha_blend",
    "alpha_blend_up": "vidkernels.ops.alpha_blend",
    "fold_alpha_blend": "vidkernels.ops.alpha_blend_fold",
    "channel_norm": "vidkernels.ops.channel_norm",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy(__name__, _EXPORTS)
