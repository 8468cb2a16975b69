# SPDX-License-Identifier: Apache-2.0
"""Rules for the MMDiT blocks of diffusers' `SD3Transformer2DModel` (SD3, SD3.5)."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded, note_fallback
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as units
from vidkernels.patching.rules import _qk_norm_units as qk
from vidkernels.patching.rules._latte_units import feed_forward

_BLOCK = "diffusers.models.attention"
_SD3 = "diffusers.models.transformers.transformer_sd3"
_PROCESSORS = "diffusers.models.attention_processor"


class JointBlockForward(Fused):
    """`JointTransformerBlock.forward`: two streams, one attention; a second attention of the image in SD3.5 medium."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Image [B, N, D] and text [B, M, D] -> (text, image)."""
        options, backend = joint_attention_kwargs or {}, self._vidkernels_backend("adaln_zero")
        rows = units.rows_of(self.norm1, temb, 9 if self.use_dual_attention else 6)
        shift1, scale1, gate1, shift2, scale2, gate2 = rows[:6]
        image = units.Stream(hidden_states, gate1, backend)
        normed = image.open(self.norm1.norm, shift1, scale1)
        second = image.open(self.norm1.norm, rows[6], rows[7]) if self.use_dual_attention else None
        text_rows = () if self.context_pre_only else units.rows_of(self.norm1_context, temb, 6)
        text = units.Stream(encoder_hidden_states, text_rows[2], backend) if text_rows else None
        if text is None:
            context = self.norm1_context(encoder_hidden_states, temb)
        else:
            context = text.open(self.norm1_context.norm, text_rows[0], text_rows[1])
        branch, text_branch = attend(self, self.attn, normed, context, options)
        if second is not None:
            image.add(branch, gate1)
            branch, gate1 = attend(self, self.attn2, second, None, options)[0], rows[8]
        normed = image.seam(branch, gate1, self.norm2, shift2, scale2)
        image.add(feed_forward(self.ff, normed), gate2)
        if text is None or text_branch is None:
            return None, image.x
        normed = text.seam(text_branch, text_rows[2], self.norm2_context, text_rows[3], text_rows[4])
        return text.add(feed_forward(self.ff_context, normed), text_rows[5]), image.x

    def _reason(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **rest: Any) -> str | None:
        home = self._vidkernels_home
        reason = call_reason(hidden_states, encoder_hidden_states, temb) or _unusual(self)
        reason = reason or units.rows_reason(self.norm1, home.AdaLayerNormZero, home.SD35AdaLayerNormZeroX)
        reason = reason or child_reason(self.norm2, nn.LayerNorm)
        if reason is None and not self.context_pre_only:
            reason = units.rows_reason(self.norm1_context, home.AdaLayerNormZero)
            reason = reason or child_reason(self.norm2_context, nn.LayerNorm)
        return reason


def attend(
    block: Any, attention: Any, x: Tensor, context: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """(image, text) of an attention; q and k norms, which SD3.5 has and SD3 has not, in one launch per stream."""
    if attention.norm_q is not None:
        reason = "joint_attention_kwargs are given" if options else _attention_reason(attention, context)
        if reason is None:
            return _joint_attention(attention, x, context, block._vidkernels_backend("qk_norm_rope"))
        note_fallback(block, reason)
    mixed = attention(hidden_states=x, encoder_hidden_states=context, **options)
    return (mixed, None) if context is None else mixed


def _attention_reason(attention: Any, context: Tensor | None) -> str | None:
    home: Any = sys.modules[_PROCESSORS]
    reason = child_reason(attention, home.Attention)
    if reason is None and type(attention.processor) is not home.JointAttnProcessor2_0:
        reason = f"an attention uses {type(attention.processor).__name__}"
    norms = [attention.norm_q, attention.norm_k]
    if context is not None:
        norms += [attention.norm_added_q, attention.norm_added_k]
    return reason or qk.norms_reason(norms)


def _joint_attention(attention: Any, x: Tensor, context: Tensor | None, backend: str) -> tuple[Tensor, Tensor | None]:
    """`JointAttnProcessor2_0`: the image's tokens first, then the text's."""
    q, k, v = (qk.heads(project(x), attention.heads) for project in (attention.to_q, attention.to_k, attention.to_v))
    q, k = qk.normalise(q, k, attention.norm_q, attention.norm_k, backend)
    if context is not None:
        added = (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
        text_q, text_k, text_v = (qk.heads(project(context), attention.heads) for project in added)
        text_q, text_k = qk.normalise(text_q, text_k, attention.norm_added_q, attention.norm_added_k, backend)
        q, k, v = qk.join(q, text_q), qk.join(k, text_k), qk.join(v, text_v)
    queries, keys, values = (part.transpose(1, 2) for part in (q, qk.by_head(k), qk.by_head(v)))
    mixed = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
    image, text = mixed[:, : x.shape[1]], None if context is None else mixed[:, x.shape[1] :]
    if text is not None and not attention.context_pre_only:
        text = attention.to_add_out(text)
    return attention.to_out[1](attention.to_out[0](image)), text


class SingleBlockForward(Fused):
    """`SD3SingleTransformerBlock.forward`: one stream, of control networks."""

    @guarded
    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = units.rows_of(self.norm1, temb, 6)
        stream = units.Stream(hidden_states, gate1, self._vidkernels_backend("adaln_zero"))
        branch = self.attn(hidden_states=stream.open(self.norm1.norm, shift1, scale1), encoder_hidden_states=None)
        normed = stream.seam(branch, gate1, self.norm2, shift2, scale2)
        return stream.add(feed_forward(self.ff, normed), gate2)

    def _reason(self, hidden_states: Tensor, temb: Tensor) -> str | None:
        reason = call_reason(hidden_states, temb) or child_reason(self.norm2, nn.LayerNorm)
        return reason or units.rows_reason(self.norm1, self._vidkernels_home.AdaLayerNormZero)


def _unusual(block: Any) -> str | None:
    return None if block._chunk_size is None else "its feed-forward is chunked"


def _check(block: Any) -> str | None:
    """SD3 has no norms of queries and keys, SD3.5 RMSNorms."""
    attentions = [block.attn, block.attn2] if block.use_dual_attention else [block.attn]
    reasons = [qk.norms_check(attention) for attention in attentions if attention.norm_q is not None]
    return next((reason for reason in (_unusual(block), *reasons) if reason is not None), None)


def _like(block: Any, *shape: int) -> Tensor:
    weight = block.norm1.linear.weight
    return torch.randn(*shape, dtype=weight.dtype, device=weight.device)


def _joint_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width = block.norm1.linear.in_features
    return (_like(block, 2, 9, width), _like(block, 2, 5, width), _like(block, 2, width)), {}


def _projections(block: Any) -> list[nn.Module]:
    one = getattr(block, "context_pre_only", True)  # a block of one stream has no text
    return [norm.linear for norm in ([block.norm1] if one else [block.norm1, block.norm1_context])]


def _single_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width = block.norm1.linear.in_features
    return (_like(block, 2, 9, width), _like(block, 2, width)), {}


_TESTED = ("diffusers 0.42.1",)
_ZERO = {"AdaLayerNormZero.forward": ("73a3ec4bba8a9f2a",)}

RULES = (
    Rule(
        name="diffusers.sd3_block",
        ops=("adaln_zero", "qk_norm_rope"),
        targets=(f"{_BLOCK}:JointTransformerBlock",),
        mixin=JointBlockForward,
        digests=_ZERO
        | {
            "JointTransformerBlock.forward": ("61281e010efe2567",),
            "SD35AdaLayerNormZeroX.forward": ("342771835f76f31f",),
            "JointAttnProcessor2_0.__call__": ("b01f961bb1aeefb6",),
        },
        check=_check,
        sample=_joint_sample,
        projections=_projections,
        tested_versions=_TESTED,
    ),
    Rule(
        name="diffusers.sd3_single_block",
        ops=("adaln_zero",),
        targets=(f"{_SD3}:SD3SingleTransformerBlock",),
        mixin=SingleBlockForward,
        digests=_ZERO | {"SD3SingleTransformerBlock.forward": ("61d0693c65ee07f8",)},
        sample=_single_sample,
        projections=_projections,
        tested_versions=_TESTED,
    ),
)
