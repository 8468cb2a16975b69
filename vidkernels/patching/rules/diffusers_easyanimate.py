# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks of diffusers' `EasyAnimateTransformer3DModel`: a stream of video and one of text with shared norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as units
from vidkernels.patching.rules._latte_units import feed_forward

_HOME = "diffusers.models.transformers.transformer_easyanimate"


class BlockForward(Fused):
    """`EasyAnimateTransformerBlock.forward`."""

    @guarded
    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Video [B, N, D], text [B, M, D] and condition [B, D'] -> (video, text)."""
        backend = self._vidkernels_backend("adaln_zero")
        shift1, scale1, gate1, text_shift, text_scale, text_gate = units.rows_of(self.norm1, temb, 6)
        video, text = (units.Stream(x, gate1, backend) for x in (hidden_states, encoder_hidden_states))
        branch, text_branch = self.attn1(
            hidden_states=video.open(self.norm1.norm, shift1, scale1),
            encoder_hidden_states=text.open(self.norm1.norm, text_shift, text_scale),
            image_rotary_emb=image_rotary_emb,
        )
        rows = units.rows_of(self.norm2, temb, 6)
        normed = video.seam(branch, gate1, self.norm2.norm, rows[0], rows[1])
        text_normed = text.seam(text_branch, text_gate, self.norm2.norm, rows[3], rows[4])
        branch = feed_forward(self.ff, normed)
        text_branch = feed_forward(self.ff if self.txt_ff is None else self.txt_ff, text_normed)
        if self.norm3 is not None:
            branch, text_branch = video.normed(branch, self.norm3), text.normed(text_branch, self.norm3)
        return video.add(branch, rows[2]), text.add(text_branch, rows[5])

    def _reason(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **rest: Any) -> str | None:
        reason = call_reason(hidden_states, encoder_hidden_states, temb)
        home = self._vidkernels_home
        for norm in (self.norm1, self.norm2):
            reason = reason or child_reason(norm, home.EasyAnimateLayerNormZero)
            reason = reason or child_reason(norm.norm, nn.LayerNorm, home.FP32LayerNorm)
            reason = reason or child_reason(norm.silu, nn.SiLU)
        if reason is None and self.norm3 is not None:
            reason = child_reason(self.norm3, home.FP32LayerNorm)
        return reason


def _sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = block.norm1.linear.weight
    width = weight.shape[0] // 6

    def like(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=weight.dtype, device=weight.device)

    return (like(2, 6, width), like(2, 5, width), like(2, weight.shape[1])), {}


def _projections(block: Any) -> list[nn.Module]:
    return [block.norm1.linear, block.norm2.linear]


RULES = (
    Rule(
        name="diffusers.easyanimate_block",
        ops=("adaln_zero",),
        targets=(f"{_HOME}:EasyAnimateTransformerBlock",),
        mixin=BlockForward,
        digests={
            "EasyAnimateTransformerBlock.forward": ("04729142b8dd9e97",),
            "EasyAnimateLayerNormZero.forward": ("b30b148aff869f5d",),
            "FP32LayerNorm.forward": ("63b1d144a616ff61",),
            "FeedForward.forward": ("ecfc6b9ebf82ecd0",),
        },
        sample=_sample,
        projections=_projections,
        tested_versions=("diffusers 0.42.1",),
    ),
)
