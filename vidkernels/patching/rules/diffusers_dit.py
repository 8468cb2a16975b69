# SPDX-License-Identifier: Apache-2.0
"""Rule for the adaLN-Zero block of diffusers' `DiTTransformer2DModel`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as units
from vidkernels.patching.rules._latte_units import feed_forward

_BLOCK = "diffusers.models.attention"


class ZeroBlockForward(Fused):
    """`BasicTransformerBlock.forward` with `norm_type="ada_norm_zero"`: attentions and MLP are called as modules."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        embedding = self.norm1.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = units.rows_of(self.norm1, embedding, 6)
        stream = units.Stream(hidden_states, gate1, self._vidkernels_backend("adaln_zero"))
        normed = stream.open(self.norm1.norm, shift1, scale1)
        condition = encoder_hidden_states if self.only_cross_attention else None
        branch = self.attn1(normed, encoder_hidden_states=condition, attention_mask=attention_mask)
        if self.attn2 is None:
            normed = stream.seam(branch, gate1, self.norm3, shift2, scale2)
        else:
            normed = stream.seam(branch, gate1, self.norm2, None, None)
            cross_options = {"attention_mask": encoder_attention_mask}
            branch = self.attn2(normed, encoder_hidden_states=encoder_hidden_states, **cross_options)
            normed = stream.seam(branch, None, self.norm3, shift2, scale2)
        return stream.add(feed_forward(self.ff, normed), gate2)

    def _reason(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, cross_attention_kwargs: Any, **rest: Any
    ) -> str | None:
        reason = call_reason(hidden_states, encoder_hidden_states) or _unusual(self)
        reason = reason or units.rows_reason(self.norm1, self._vidkernels_home.AdaLayerNormZero)
        for norm in (self.norm2, self.norm3):
            reason = reason or (None if norm is None else child_reason(norm, nn.LayerNorm))
        if reason is None and (cross_attention_kwargs or hidden_states.ndim != 3):
            reason = "cross_attention_kwargs or an unusual input is given"
        return reason


def _unusual(block: Any) -> str | None:
    if block.norm_type != "ada_norm_zero":
        return f"norm_type {block.norm_type} is not ada_norm_zero"
    if block.norm1.emb is None or block.pos_embed is not None:
        return "the block has no embedding of its own, or positional embeddings"
    return None if block._chunk_size is None else "its feed-forward is chunked"


def _sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = block.norm1.linear.weight
    options = {"dtype": weight.dtype, "device": weight.device}
    arguments = {
        "timestep": torch.tensor([3, 700], device=weight.device),
        "class_labels": torch.tensor([0, 0], device=weight.device),
    }
    if block.attn2 is not None:
        arguments["encoder_hidden_states"] = torch.randn(2, 5, block.attn2.to_k.in_features, **options)
    return (torch.randn(2, 9, block.dim, **options),), arguments


RULES = (
    Rule(
        name="diffusers.dit_block",
        ops=("adaln_zero",),
        targets=(f"{_BLOCK}:BasicTransformerBlock",),
        mixin=ZeroBlockForward,
        digests={
            "BasicTransformerBlock.forward": ("6e371c1142494a75",),
            "AdaLayerNormZero.forward": ("73a3ec4bba8a9f2a",),
        },
        check=_unusual,
        sample=_sample,
        tested_versions=("diffusers 0.42.1",),
    ),
)
