# SPDX-License-Identifier: Apache-2.0
"""Rule for diffusers' `AdaLayerNormContinuous`: the final layer of SD3, Flux, Mochi, CogView and others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import call_reason, child_reason, guarded, is_autocast
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules._adaln_zero_units import spread

_NORMS = "diffusers.models.normalization"


class ContinuousForward(Fused):
    """`AdaLayerNormContinuous.forward`: norm and modulation in one pass."""

    @guarded
    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        """[B, N, D] and [B, E] -> [B, N, D]."""
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        x = spread(x, scale)
        layer = isinstance(self.norm, nn.LayerNorm)
        # Under autocast a LayerNorm returns float32, but not on the CPU; rows of a wider type widen the result, too.
        autocast = x.device.type != "cpu" and is_autocast(x)
        wide = torch.float32 if layer and autocast else scale.dtype
        x = x.to(torch.promote_types(x.dtype, wide))
        shift, scale = (row if row.dtype == torch.float32 else row.to(x.dtype) for row in (shift, scale))
        options = {"norm": "layer" if layer else "rms", "weight": self.norm.weight, "bias": self.norm.bias}
        backend = self._vidkernels_backend("adaln_zero")
        return ops.adaln_modulate(x, shift, scale, eps=self.norm.eps, backend=backend, **options)

    def _reason(self, x: Tensor, conditioning_embedding: Tensor) -> str | None:
        reason = call_reason(x, conditioning_embedding) or child_reason(self.silu, nn.SiLU)
        reason = reason or child_reason(self.norm, nn.LayerNorm, self._vidkernels_home.RMSNorm)
        if reason is None and (x.ndim != 3 or conditioning_embedding.ndim != 2):
            reason = "an unusual input is given"
        if reason is None and self.norm.weight is not None and self.norm.weight.dtype != x.dtype:
            reason = "the norm's weight has another dtype than its input"
        return reason


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = module.linear.weight
    options = {"dtype": weight.dtype, "device": weight.device}
    width = module.linear.out_features // 2
    return (torch.randn(2, 9, width, **options), torch.randn(2, module.linear.in_features, **options)), {}


RULES = (
    Rule(
        name="diffusers.adaln_continuous",
        ops=("adaln_zero",),
        targets=(f"{_NORMS}:AdaLayerNormContinuous",),
        mixin=ContinuousForward,
        digests={"AdaLayerNormContinuous.forward": ("bbc5d1d891a8cfa0",), "RMSNorm.forward": ("d6bf5d21fcac4a44",)},
        sample=_sample,
        inductor="one norm with its modulation is one kernel of Inductor, too",
        tested_versions=("diffusers 0.42.1",),
    ),
)
