# SPDX-License-Identifier: Apache-2.0
"""The public ops: `vidkernels.ops.<name>`. The only door to kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

from vidkernels._exports import lazy

if TYPE_CHECKING:
    from vidkernels.ops.adaln_modulate import adaln_modulate as adaln_modulate
    from vidkernels.ops.adaln_zero import adaln_zero as adaln_zero
    from vidkernels.ops.alpha_blend import alpha_blend as alpha_blend
    from vidkernels.ops.alpha_blend import alpha_blend_down as alpha_blend_down
    from vidkernels.ops.alpha_blend import alpha_blend_up as alpha_blend_up
    from vidkernels.ops.alpha_blend_fold import fold_alpha_blend as fold_alpha_blend
    from vidkernels.ops.axial_attention import axial_attention as axial_attention
    from vidkernels.ops.axial_attention import norm_rope_attention as norm_rope_attention
    from vidkernels.ops.causal_conv3d import causal_conv3d as _causal_conv3d
    from vidkernels.ops.channel_norm import channel_norm as channel_norm
    from vidkernels.ops.downsample_conv3d import downsample_conv3d as _downsample_conv3d
    from vidkernels.ops.entropy import fsq_entropy as fsq_entropy
    from vidkernels.ops.entropy import lfq_entropy as lfq_entropy
    from vidkernels.ops.fsq import fsq_codes_to_indices as fsq_codes_to_indices
    from vidkernels.ops.fsq import fsq_indices_to_codes as fsq_indices_to_codes
    from vidkernels.ops.fsq import fsq_quantize as _fsq_quantize
    from vidkernels.ops.gate_residual import gate_residual as gate_residual
    from vidkernels.ops.gated_activation import gated_activation as gated_activation
    from vidkernels.ops.group_norm import group_norm as group_norm
    from vidkernels.ops.lfq import lfq_codes_to_indices as lfq_codes_to_indices
    from vidkernels.ops.lfq import lfq_indices_to_codes as lfq_indices_to_codes
    from vidkernels.ops.lfq import lfq_quantize as _lfq_quantize
    from vidkernels.ops.qk_norm_rope import qk_norm_rope as _qk_norm_rope
    from vidkernels.ops.upsample_conv3d import upsample_conv3d as _upsample_conv3d
    from vidkernels.ops.varlen_attention import varlen_attention as varlen_attention

    # How many tensors these return depends on their arguments: those are checked, the result is Any.
    _P = ParamSpec("_P")

    def _any_result(function: Callable[_P, object]) -> Callable[_P, Any]: ...

    causal_conv3d = _any_result(_causal_conv3d)
    downsample_conv3d = _any_result(_downsample_conv3d)
    fsq_quantize = _any_result(_fsq_quantize)
    lfq_quantize = _any_result(_lfq_quantize)
    qk_norm_rope = _any_result(_qk_norm_rope)
    upsample_conv3d = _any_result(_upsample_conv3d)

_EXPORTS: dict[str, str] = {
    "norm_rope_attention": "vidkernels.ops.axial_attention",
    "axial_attention": "vidkernels.ops.axial_attention",
    "gated_activation": "vidkernels.ops.gated_activation",
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
    "downsample_conv3d": "vidkernels.ops.downsample_conv3d",
    "upsample_conv3d": "vidkernels.ops.upsample_conv3d",
    "qk_norm_rope": "vidkernels.ops.qk_norm_rope",
    "alpha_blend": "vidkernels.ops.alpha_blend",
    "alpha_blend_down": "vidkernels.ops.alpha_blend",
    "alpha_blend_up": "vidkernels.ops.alpha_blend",
    "fold_alpha_blend": "vidkernels.ops.alpha_blend_fold",
    "channel_norm": "vidkernels.ops.channel_norm",
}

__all__ = sorted(_EXPORTS)
if not TYPE_CHECKING:  # type checkers know the names above, and no others
    __getattr__, __dir__ = lazy(__name__, _EXPORTS)
