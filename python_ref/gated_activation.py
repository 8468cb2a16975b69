# SPDX-License-Identifier: Apache-2.0
"""Gated linear units: one half of the last axis times an activation of the other half.

Low-precision inputs are computed in float32 and rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .channel_norm import widen


def gated_activation(x: torch.Tensor, activation: str = "gelu", *, gate_first: bool = False) -> torch.Tensor:
    """`hidden * act(gate)` of [..., 2 D]: (hidden, gate) are the halves of the last axis, swapped by `gate_first`.

    activation `gelu`: z (1 + erf(z / sqrt(2))) / 2; `gelu_tanh`: its approximation by tanh; `silu`: z / (1 + exp(-z)).
    """
    hidden, gate = widen(x).chunk(2, dim=-1)
    if gate_first:
        hidden, gate = gate, hidden
    if activation == "silu":
        return (hidden * F.silu(gate)).to(x.dtype)
    return (hidden * F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")).to(x.dtype)
