# SPDX-License-Identifier: Apache-2.0
"""Rule for the blocks of Open-Sora-Plan 1.3's transformer, found by the digest of their forward.

Tokens come as [N, B, D], samples innermost. Attentions, which turn queries and keys and may be sparse, and the MLP are called as
modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules._adaln_zero_units import Stream


class _Interleaved(Stream):
    """A residual stream whose tokens [N * B, D] are of B samples in turn: token i takes row i % B of modulation [B, D]."""

    def __init__(self, x: Tensor, row: Tensor, backend: str) -> None:
        self.size, batch = x.shape, x.shape[1]
        super().__init__(x.flatten(0, 1), row, backend)
        self.rows: dict[str, Tensor] = {}
        if batch > 1:
            index = torch.arange(batch, dtype=torch.int32, device=x.device)
            self.rows = {"rows": index.repeat(x.shape[0])}

    def _norm(self, layer: Any) -> dict[str, Any]:
        return {**super()._norm(layer), **self.rows}

    def _gate_options(self) -> dict[str, Any]:
        return self.rows

    def tokens(self) -> Tensor:
        """The stream as [N, B, D]."""
        return self.x.unflatten(0, self.size[:2])


class PlanSequenceForward(Fused):
    """`BasicTransformerBlock.forward`: self-attention, cross-attention without norm or gate, MLP."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        frame: Any = None,
        height: Any = None,
        width: Any = None,
    ) -> Tensor:
        """[N, B, D] -> [N, B, D]."""
        sizes = {"frame": frame, "height": height, "width": width}
        modulation = self.scale_shift_table[:, None] + timestep.reshape(6, hidden_states.shape[1], -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(0)
        stream = _Interleaved(hidden_states, gate1, self._vidkernels_backend("adaln_zero"))
        shape = hidden_states.shape[:2]
        normed = stream.open(self.norm1, shift1, scale1).unflatten(0, shape)
        branch = self.attn1(normed, encoder_hidden_states=None, attention_mask=attention_mask, **sizes)
        stream.add(branch.flatten(0, 1), gate1)
        caption, mask = encoder_hidden_states, encoder_attention_mask
        branch = self.attn2(stream.tokens(), encoder_hidden_states=caption, attention_mask=mask, **sizes)
        normed = stream.seam(branch.flatten(0, 1), None, self.norm2, shift2, scale2).unflatten(0, shape)
        stream.add(self.ff(normed).flatten(0, 1), gate2)
        return stream.tokens()

    def _reason(self, hidden_states: Tensor, timestep: Tensor | None, **rest: Any) -> str | None:
        reason = call_reason(hidden_states, timestep)
        reason = reason or child_reason(self.norm1, nn.LayerNorm) or child_reason(self.norm2, nn.LayerNorm)
        if reason is None and (timestep is None or hidden_states.ndim != 3):
            reason = "an unusual input is given"
        return reason


def _sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two samples, interleaved, with captions of five tokens."""
    table = block.scale_shift_table

    def like(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=table.dtype, device=table.device)

    options = {
        "timestep": like(6, 2, table.shape[1]),
        "encoder_hidden_states": like(5, 2, block.attn2.to_k.in_features),
    }
    return (like(16, 2, table.shape[1]),), {**options, "frame": 1, "height": 4, "width": 4}


RULES = (
    Rule(
        name="official.plan_sequence_block",
        ops=("adaln_zero",),
        targets=("opensora.models.diffusion.opensora_v1_3.modules:BasicTransformerBlock",),
        features=(
            "scale_shift_table",
            "norm1",
            "norm2",
            "attn1",
            "attn2",
            "ff",
            "!norm3",
            "!use_ada_layer_norm_single",
        ),
        mixin=PlanSequenceForward,
        digests={"BasicTransformerBlock.forward": ("0ae269a40c5a7be5",)},
        sample=_sample,
        tested_versions=("PKU-YuanGroup/Open-Sora-Plan 254e2cf",),
    ),
)
