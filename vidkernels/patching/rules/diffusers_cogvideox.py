# SPDX-License-Identifier: Apache-2.0
"""Rule for the block of diffusers' `CogVideoXTransformer3DModel` (1.0 and 1.5) and of ConsisID."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, guarded, note_fallback
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._modulation import project
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as adaln
from vidkernels.patching.rules import _dit_units as units
from vidkernels.patching.rules import _qk_norm_units as qk
from vidkernels.patching.rules._latte_units import feed_forward

_MODELS = "diffusers.models.transformers"


class BlockForward(Fused):
    """`CogVideoXBlock.forward` on one tensor of text and video: the two differ in their rows of modulation only."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video [B, N, D] and text [B, M, D] -> (video, text), as views of one tensor."""
        words = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        (shift1, scale1, gate1), (shift2, scale2, gate2) = (_rows(norm, temb) for norm in (self.norm1, self.norm2))
        # The tables alternate video and text, and text comes first.
        rows = units.alternate(words, tokens, gate1) ^ 1
        stream = units.JoinedStream(tokens, gate1, rows, self._vidkernels_backend("adaln_zero"))
        branch = self._attend(stream.open(self.norm1.norm, shift1, scale1), words, image_rotary_emb, attention_kwargs)
        normed = stream.seam(branch, gate1, self.norm2.norm, shift2, scale2)
        x = stream.add(feed_forward(self.ff, normed), gate2)
        return x[:, words:], x[:, :words]

    def _reason(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **rest: Any) -> str | None:
        cls = self._vidkernels_home.CogVideoXLayerNormZero
        reason = call_reason(hidden_states, encoder_hidden_states, temb)
        return reason or adaln.rows_reason(self.norm1, cls) or adaln.rows_reason(self.norm2, cls)

    def _attend(self, x: Tensor, words: int, tables: Any, options: dict[str, Any] | None) -> Tensor:
        reason = "attention_kwargs are given" if options else self._attention_reason()
        if reason is not None:
            note_fallback(self, reason)
            streams = {"hidden_states": x[:, words:], "encoder_hidden_states": x[:, :words]}
            video, text = self.attn1(**streams, image_rotary_emb=tables, **(options or {}))
            return torch.cat([text, video], dim=1)
        attention = self.attn1
        projections = (attention.to_q, attention.to_k, attention.to_v)
        q, k, v = (qk.heads(layer(x), attention.heads) for layer in projections)
        makers = projections[:2]
        if attention.norm_q is not None:
            makers = (attention.norm_q, attention.norm_k)
            q, k = attention.norm_q(q), attention.norm_k(k)
        if tables is not None:
            overwrite = units.may_overwrite(*makers)
            cos, sin = tables
            cos = F.pad(cos, (0, 0, words, 0), value=1.0)[None, :, None]  # text is not rotated
            turn = units.Turn(cos, F.pad(sin, (0, 0, words, 0))[None, :, None], q)
            q, k = turn(q, overwrite), turn(k, overwrite)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        result: Tensor = attention.to_out[1](attention.to_out[0](mixed.transpose(1, 2).flatten(2)))
        return result

    def _attention_reason(self) -> str | None:
        attention, home = self.attn1, self._vidkernels_home
        reason = units.processor_reason(attention, home.Attention, home.CogVideoXAttnProcessor2_0)
        if reason is None and attention.is_cross_attention:
            reason = "an attention is a cross-attention"
        if reason is None and (attention.norm_q is None) != (attention.norm_k is None):
            reason = "the query and key norms differ"
        return reason


def _rows(norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """Tables [2 B, D] of shift, scale and gate: the video's row and the text's row of each sample."""
    return project(norm.linear, norm.silu, temb).unflatten(1, (2, 3, -1)).flatten(0, 1).unbind(1)


def _projections(block: Any) -> list[nn.Module]:
    return [block.norm1.linear, block.norm2.linear]


class _Constant(tuple[Tensor, Tensor]):
    """Tables in which `verify` finds no tensors: the original, which rotates in place, has no gradient of them."""


def _sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = block.attn1.to_q.weight
    options = {"dtype": weight.dtype, "device": weight.device}
    width = block.attn1.to_q.in_features
    x, text = torch.randn(2, 9, width, **options), torch.randn(2, 5, width, **options)
    tables = _Constant(units.sample_tables(9, width // block.attn1.heads, x.device))
    temb = torch.randn(2, block.norm1.linear.in_features, **options)
    return (x, text, temb, tables), {}


RULES = tuple(
    Rule(
        name=f"diffusers.{name}_block",
        ops=("adaln_zero",),
        targets=(f"{_MODELS}.{module}:{cls}",),
        mixin=BlockForward,
        digests={
            f"{cls}.forward": (digest,),
            "CogVideoXLayerNormZero.forward": ("9ae63547d0703a2b",),
            "CogVideoXAttnProcessor2_0.__call__": ("d7bf1129e716da15",),
            "Attention.forward": ("b329f38beafa4c39",),
            "FeedForward.forward": ("ecfc6b9ebf82ecd0",),
        },
        sample=_sample,
        projections=_projections,
        tested_versions=("diffusers 0.42.1",),
    )
    for name, module, cls, digest in (
        ("cogvideox", "cogvideox_transformer_3d", "CogVideoXBlock", "45c44d2e71ba1ae7"),
        ("consisid", "consisid_transformer_3d", "ConsisIDBlock", "97deead136b82481"),
    )
)
