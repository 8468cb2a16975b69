# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks and attentions of diffusers' `LTXVideoTransformer3DModel`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _dit_units as units
from vidkernels.patching.rules._latte_units import feed_forward

_LTX = "diffusers.models.transformers.transformer_ltx"


class BlockForward(Fused):
    """`LTXVideoTransformerBlock.forward`: RMSNorms; rows of modulation per sample, or per token for given frames."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, N, D], caption [B, M, D'], modulation [B, 1 or N, 6 D] -> [B, N, D]."""
        table = self.scale_shift_table
        rows = table[None, None].to(temb.device) + temb.unflatten(2, (table.shape[0], -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(2)
        stream = units.RmsStream(hidden_states, gate1, self._vidkernels_backend("adaln_zero"))
        normed = stream.open(self.norm1, shift1, scale1)
        branch = self.attn1(hidden_states=normed, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)
        context = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
        branch = self.attn2(stream.add(branch, gate1), image_rotary_emb=None, **context)
        normed = stream.seam(branch, None, self.norm2, shift2, scale2)
        return stream.add(feed_forward(self.ff, normed), gate2)

    def _reason(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **rest: Any) -> str | None:
        reason = call_reason(hidden_states, encoder_hidden_states, temb)
        for norm in (self.norm1, self.norm2):
            reason = reason or child_reason(norm, self._vidkernels_home.RMSNorm)
            if reason is None and norm.bias is not None:
                reason = "a norm has a bias"
        return reason


class AttentionForward(Fused):
    """`LTXAttention.forward` with `LTXVideoAttnProcessor`: both norms in one launch, rotation by the model's tables.

    Projections and the attention itself stay diffusers': LoRA, masks, attention backends.
    """

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, N, D], context [B, M, D'] -> [B, N, D]."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = by_head(self, attention_mask, context)
        q, k, v = self.to_q(hidden_states), self.to_k(context), self.to_v(context)
        backend, overwrite = self._vidkernels_backend("qk_norm_rope"), units.may_overwrite(self.to_q, self.to_k)
        q, k = units.norm_across_heads(q, k, (self.norm_q, self.norm_k), self.heads, backend, overwrite)
        if image_rotary_emb is not None:
            cos, sin = (table.unsqueeze(2) for table in image_rotary_emb)  # over all heads: [B, N, 1, D]
            turn = units.Turn(cos, sin, q)
            q, k = (turn(x.flatten(2).unsqueeze(2), overwrite).reshape(x.shape) for x in (q, k))
        mixed = self._vidkernels_home.dispatch_attention_fn(
            q,
            k,
            v.unflatten(2, (self.heads, -1)),
            attn_mask=mask,
            backend=self.processor._attention_backend,
            parallel_config=self.processor._parallel_config,
        )
        result: Tensor = self.to_out[1](self.to_out[0](mixed.flatten(2, 3).to(q.dtype)))
        return result

    def _reason(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Any,
        image_rotary_emb: Any,
        **kwargs: Any,
    ) -> str | None:
        reason = call_reason(hidden_states, encoder_hidden_states)
        if reason is None and type(self.processor) is not self._vidkernels_home.LTXVideoAttnProcessor:
            reason = f"an attention uses {type(self.processor).__name__}"
        return reason or heads_reason(self) or ("attention arguments are given" if kwargs else None)


def by_head(attention: Any, mask: Tensor | None, context: Tensor) -> Tensor | None:
    """A mask of the tokens of context [B, M, D'] as [B, heads, 1 or N, M], as upstream's processors make it."""
    if mask is None:
        return None
    batch, length, _ = context.shape
    prepared: Tensor = attention.prepare_attention_mask(mask, length, batch)
    return prepared.view(batch, attention.heads, -1, prepared.shape[-1])


def heads_reason(attention: Any) -> str | None:
    """Why the norms of an attention over all its heads must be called."""
    if attention.inner_kv_dim != attention.inner_dim:
        return "keys have other heads than queries"
    return child_reason(attention.norm_q, nn.RMSNorm) or child_reason(attention.norm_k, nn.RMSNorm)


def like(module: Any, *shape: int) -> Tensor:
    """Standard normal numbers where a module's first parameter is, and in its dtype."""
    weight = next(module.parameters())
    return torch.randn(*shape, dtype=weight.dtype, device=weight.device)


def _tables(attention: Any) -> tuple[Tensor, Tensor]:
    return units.sample_tables(6, attention.inner_dim, attention.to_q.weight.device, (2,), ())


def _block_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width = block.scale_shift_table.shape[-1]
    x, temb = like(block, 2, 6, width), like(block, 2, 6, 6 * width)
    context = like(block, 2, 5, block.attn2.cross_attention_dim)
    mask = torch.zeros(2, 1, 5, dtype=x.dtype, device=x.device)
    mask[1, :, 3:] = -10000.0
    return (x, context, temb, _tables(block.attn1), mask), {}


def _attention_sample(attention: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (like(attention, 2, 6, attention.query_dim), like(attention, 2, 6, attention.cross_attention_dim)), {
        "image_rotary_emb": _tables(attention)
    }


_TESTED = ("diffusers 0.42.1",)

RULES = (
    Rule(
        name="diffusers.ltx_block",
        ops=("adaln_zero",),
        targets=(f"{_LTX}:LTXVideoTransformerBlock",),
        mixin=BlockForward,
        digests={
            "LTXVideoTransformerBlock.forward": ("2874e0eb7a4509c5",),
            "RMSNorm.forward": ("d6bf5d21fcac4a44",),
            "FeedForward.forward": ("ecfc6b9ebf82ecd0",),
        },
        sample=_block_sample,
        tested_versions=_TESTED,
    ),
    Rule(
        name="diffusers.ltx_attention",
        ops=("qk_norm_rope",),
        targets=(f"{_LTX}:LTXAttention",),
        mixin=AttentionForward,
        digests={
            "LTXAttention.forward": ("29887bde13494be9",),
            "LTXVideoAttnProcessor.__call__": ("b1fe3dfcfc883865",),
        },
        sample=_attention_sample,
        tested_versions=_TESTED,
    ),
)
