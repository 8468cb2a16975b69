# SPDX-License-Identifier: Apache-2.0
"""Rule for the blocks of diffusers' `AllegroTransformer3DModel`: the adaLN-single chain around its attentions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, note_fallback
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _latte_units as units

_ALLEGRO = "diffusers.models.transformers.transformer_allegro"


class BlockForward(Fused):
    """`AllegroTransformerBlock.forward`. Attentions, with masks and rotation, and MLP are called as modules."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        reason = call_reason(hidden_states, encoder_hidden_states, temb)
        reason = reason or child_reason(self.norm1, nn.LayerNorm) or child_reason(self.norm2, nn.LayerNorm)
        # With one token the original's `squeeze(1)` drops the axis of tokens.
        if reason is None and (temb is None or hidden_states.ndim != 3 or hidden_states.shape[1] == 1):
            reason = "an unusual input is given"
        if reason is not None or temb is None:
            note_fallback(self, reason or "")
            masks = (attention_mask, encoder_attention_mask)
            original: Tensor = super().forward(
                hidden_states, encoder_hidden_states, temb, *masks, image_rotary_emb=image_rotary_emb
            )
            return original
        chain = units.Chain(self, temb, self._vidkernels_backend("adaln_zero"))
        x, normed = chain.start(hidden_states)
        options = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
        branch = self.attn1(normed, encoder_hidden_states=None, **options)
        if self.attn2 is None:
            x, normed = chain.between(x, branch)
        else:
            x = chain.before_cross(x, branch)
            options = {"attention_mask": encoder_attention_mask, "image_rotary_emb": None}
            branch = self.attn2(x, encoder_hidden_states=encoder_hidden_states, **options)
            x, normed = chain.after_cross(x, branch)
        return chain.end(x, units.feed_forward(self.ff, normed))


def _sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    table = block.scale_shift_table
    options = {"dtype": table.dtype, "device": table.device}
    width, context = table.shape[1], block.attn2.to_k.in_features
    arguments = (torch.randn(2, 9, width, **options), torch.randn(2, 5, context, **options))
    return (*arguments, torch.randn(2, 6 * width, **options)), {}


RULES = (
    Rule(
        name="diffusers.allegro_block",
        ops=("adaln_zero",),
        targets=(f"{_ALLEGRO}:AllegroTransformerBlock",),
        mixin=BlockForward,
        digests={"AllegroTransformerBlock.forward": ("10e0db050b0a1093",)},
        sample=_sample,
        tested_versions=("diffusers 0.42.1",),
    ),
)
