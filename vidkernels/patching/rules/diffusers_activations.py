# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' `GEGLU` and `SwiGLU`, in the feed-forwards of any model: Latte, Mochi, DiT, UNets.

The projection is called as a module, so LoRA, quantized weights and hooks on it are honoured; what follows it is one pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import call_reason, child_reason, guarded, is_plain
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule

_ACTIVATIONS = "diffusers.models.activations"


def _gated(projected: Tensor, activation: str, backend: str) -> Tensor:
    if is_plain(projected):
        return ops.gated_activation(projected, activation, backend=backend)
    hidden, gate = projected.chunk(2, dim=-1)  # what a sharded or quantized projection has returned
    return hidden * (F.silu(gate) if activation == "silu" else F.gelu(gate))


class GegluForward(Fused):
    """`GEGLU.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, scale: Any = None, **ignored: Any) -> Tensor:
        """[..., E] -> [..., D]; upstream ignores all but its input, and says so of `scale`."""
        return _gated(self.proj(hidden_states), "gelu", self._vidkernels_backend("gated_activation"))

    def _reason(self, hidden_states: Tensor, scale: Any = None, **ignored: Any) -> str | None:
        if scale is not None:
            return "the deprecated `scale` is given"
        if self._vidkernels_home.is_torch_npu_available():
            return "upstream uses the NPU's own operation"
        return call_reason(hidden_states)


class SwigluForward(Fused):
    """`SwiGLU.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., E] -> [..., D]."""
        return _gated(self.proj(hidden_states), "silu", self._vidkernels_backend("gated_activation"))

    def _reason(self, hidden_states: Tensor) -> str | None:
        return call_reason(hidden_states) or child_reason(self.activation, nn.SiLU)


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = module.proj.weight
    return (torch.randn(2, 9, module.proj.in_features, dtype=weight.dtype, device=weight.device),), {}


_COMMON: dict[str, Any] = {
    "ops": ("gated_activation",),
    "sample": _sample,
    "inductor": "the activation and the product are one kernel of Inductor, too",
    "tested_versions": ("diffusers 0.42.1",),
}

RULES = (
    Rule(
        name="diffusers.geglu",
        targets=(f"{_ACTIVATIONS}:GEGLU",),
        mixin=GegluForward,
        digests={"GEGLU.forward": ("98875c7534cb47d2",), "GEGLU.gelu": ("f44d1b45d0e0ffed",)},
        features=("proj",),
        **_COMMON,
    ),
    Rule(
        name="diffusers.swiglu",
        targets=(f"{_ACTIVATIONS}:SwiGLU",),
        mixin=SwigluForward,
        digests={"SwiGLU.forward": ("fccb471e0af33c9e",)},
        features=("proj", "activation"),
        **_COMMON,
    ),
)
