# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks of diffusers' `Kandinsky5Transformer3DModel`, of text and of video.

Attentions and MLPs are called as modules: the attention's rotation rounds through bfloat16 whatever the model's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._modulation import project
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as adaln

_KANDINSKY = "diffusers.models.transformers.transformer_kandinsky"


class TextBlockForward(Fused):
    """`Kandinsky5TransformerEncoderBlock.forward`: self-attention and MLP."""

    @guarded
    def forward(self, x: Tensor, time_embed: Tensor, rope: Any) -> Tensor:
        """[B, M, D] with the condition [B, E] -> [B, M, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = _rows(self.text_modulation, time_embed, 6)
        # The original computes in float32 and returns to the dtype of its input, so the rows widen nothing here.
        stream = adaln.Stream(x, x, self._vidkernels_backend("adaln_zero"))
        branch = self.self_attention(stream.open(self.self_attention_norm, shift1, scale1), rotary_emb=rope)
        normed = stream.seam(branch, gate1, self.feed_forward_norm, shift2, scale2)
        return stream.add(self.feed_forward(normed), gate2)

    def _reason(self, x: Tensor, time_embed: Tensor, **rest: Any) -> str | None:
        reason = call_reason(x, time_embed) or _modulation_reason(self, self.text_modulation)
        return reason or _norms_reason(self.self_attention_norm, self.feed_forward_norm)


class VideoBlockForward(Fused):
    """`Kandinsky5TransformerDecoderBlock.forward`: the same with a cross-attention between, modulated and gated, too."""

    @guarded
    def forward(
        self, visual_embed: Tensor, text_embed: Tensor, time_embed: Tensor, rope: Any, sparse_params: Any
    ) -> Tensor:
        """[B, N, D], text [B, M, D] and the condition [B, E] -> [B, N, D]."""
        rows = _rows(self.visual_modulation, time_embed, 9)
        stream = adaln.Stream(visual_embed, visual_embed, self._vidkernels_backend("adaln_zero"))
        normed = stream.open(self.self_attention_norm, rows[0], rows[1])
        branch = self.self_attention(normed, rotary_emb=rope, sparse_params=sparse_params)
        normed = stream.seam(branch, rows[2], self.cross_attention_norm, rows[3], rows[4])
        branch = self.cross_attention(normed, encoder_hidden_states=text_embed)
        normed = stream.seam(branch, rows[5], self.feed_forward_norm, rows[6], rows[7])
        return stream.add(self.feed_forward(normed), rows[8])

    def _reason(self, visual_embed: Tensor, text_embed: Tensor, time_embed: Tensor, **rest: Any) -> str | None:
        reason = call_reason(visual_embed, text_embed, time_embed) or _modulation_reason(self, self.visual_modulation)
        norms = (self.self_attention_norm, self.cross_attention_norm, self.feed_forward_norm)
        return reason or _norms_reason(*norms)


def _rows(modulation: Any, condition: Tensor, count: int) -> tuple[Tensor, ...]:
    return project(modulation.out_layer, modulation.activation, condition).chunk(count, dim=1)


def _modulation_reason(block: Any, modulation: Any) -> str | None:
    reason = child_reason(modulation, block._vidkernels_home.Kandinsky5Modulation)
    return reason or child_reason(modulation.activation, nn.SiLU)


def _norms_reason(*norms: Any) -> str | None:
    for norm in norms:
        reason = child_reason(norm, nn.LayerNorm)
        if reason is not None:
            return reason
    return None


def _sample(block: Any) -> tuple[Tensor, Tensor, Tensor]:
    attention = block.self_attention
    weight, width = attention.to_query.weight, attention.to_query.in_features
    x = torch.randn(2, 9, width, dtype=weight.dtype, device=weight.device)
    angles = torch.outer(torch.arange(9.0), torch.linspace(1, 0.1, width // attention.num_heads // 2))
    cos, sin = angles.cos().to(x.device), angles.sin().to(x.device)
    rope = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))[None, :, None]
    layer = (block.text_modulation if hasattr(block, "text_modulation") else block.visual_modulation).out_layer
    time = torch.randn(2, layer.in_features, dtype=layer.weight.dtype, device=x.device)
    return x, time, rope


def _text_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _sample(block), {}


def _video_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, time, rope = _sample(block)
    return (x, torch.randn_like(x[:, :5]), time, rope, None), {}


def _projections(block: Any) -> list[nn.Module]:
    return [module.out_layer for module in block.children() if type(module).__name__ == "Kandinsky5Modulation"]


RULES = tuple(
    Rule(
        name=f"diffusers.kandinsky5_{name}",
        ops=("adaln_zero",),
        targets=(f"{_KANDINSKY}:{cls}",),
        mixin=mixin,
        digests={f"{cls}.forward": (digest,), "Kandinsky5Modulation.forward": ("9a0614d1dfa7e714",)},
        sample=sample,
        projections=_projections,
        tested_versions=("diffusers 0.42.1",),
    )
    for name, cls, mixin, digest, sample in (
        ("text_block", "Kandinsky5TransformerEncoderBlock", TextBlockForward, "c003a1678d3d80ab", _text_sample),
        ("block", "Kandinsky5TransformerDecoderBlock", VideoBlockForward, "49d22efe3f5182e4", _video_sample),
    )
)
