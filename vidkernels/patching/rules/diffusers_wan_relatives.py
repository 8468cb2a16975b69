# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks of diffusers' models made from Wan's: AnyFlow, also with a causal cache of keys, and Helios, whose
history of earlier frames is not shown to the caption."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as adaln
from vidkernels.patching.rules import _wan_block_units as blocks
from vidkernels.patching.rules._latte_units import feed_forward
from vidkernels.patching.rules.diffusers_wan import PARTS

_HOME = "diffusers.models.transformers"


class AnyFlowForward(Fused):
    """`AnyFlowTransformerBlock.forward`."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
        attention_mask: Any,
        kv_cache: Any = None,
        kv_cache_flag: Any = None,
    ) -> Tensor:
        """[B, N, D], context [B, M, D], modulation [B, N, 6, D] -> [B, N, D]."""
        given: dict[str, Any] = {"rotary_emb": rotary_emb, "attention_mask": attention_mask}
        if kv_cache is not None:
            given |= {"kv_cache": kv_cache, "kv_cache_flag": kv_cache_flag}
        attention: Any = self._modules["attn1"]
        to_caption: Any = self._modules["attn2"]
        return blocks.chain(
            *(self, hidden_states, blocks.rows_of(self, temb)),
            attend=lambda normed: attention(hidden_states=normed, **given),
            look=lambda normed: to_caption(hidden_states=normed, encoder_hidden_states=encoder_hidden_states),
        )

    def _reason(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **rest: Any) -> str | None:
        return call_reason(hidden_states, encoder_hidden_states, temb) or blocks.norms_reason(self)


class HeliosForward(Fused):
    """`HeliosTransformerBlock.forward`."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
        original_context_length: int | None = None,
    ) -> Tensor:
        """[B, N, D] of which the last `original_context_length` are of this clip, context [B, M, D], modulation [B, 6, D] or
        [B, N, 6, D] -> [B, N, D]."""
        rows, length = blocks.rows_of(self, temb), original_context_length
        attention: Any = self._modules["attn1"]
        to_caption: Any = self._modules["attn2"]

        def attend(normed: Tensor) -> Any:
            return attention(normed, None, None, rotary_emb, length)

        def look(normed: Tensor) -> Any:
            return to_caption(normed, encoder_hidden_states, None, None, length)

        if not self.guidance_cross_attn or length is None:
            return blocks.chain(self, hidden_states, rows, attend, look)
        shift1, scale1, gate1, shift3, scale3, gate3 = rows
        stream = adaln.Stream(hidden_states, hidden_states, self._vidkernels_backend("adaln_zero"))
        stream.add(attend(stream.open(self.norm1, shift1, scale1)), gate1)
        before, now = stream.x.tensor_split([stream.x.shape[1] - length], 1)
        shown = now
        if isinstance(self.norm2, nn.LayerNorm):
            shown = adaln.Stream(now, now, stream.backend).open(self.norm2, None, None)
        stream.x = torch.cat([before, now + look(shown)], 1)
        normed = stream.open(self.norm3, shift3, scale3)
        return stream.add(feed_forward(self.ffn, normed), gate3)

    def _reason(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **rest: Any) -> str | None:
        return call_reason(hidden_states, encoder_hidden_states, temb) or blocks.norms_reason(self)


def _like(module: Any, *shape: int) -> Tensor:
    weight = module.attn1.to_q.weight
    return torch.randn(*shape, dtype=weight.dtype, device=weight.device)


def _tables(block: Any, tokens: int) -> Tensor:
    """Angles of AnyFlow's complex and Helios's paired tables, [tokens, D / 2] of a head."""
    width = block.attn1.inner_dim // block.attn1.heads
    device = block.attn1.to_q.weight.device
    return torch.arange(tokens, device=device)[:, None] * 10.0 ** -torch.arange(width // 2, device=device).remainder(4)


def _anyflow_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width, angles = block.scale_shift_table.shape[-1], _tables(block, 6).double()
    turns = torch.polar(torch.ones_like(angles), angles)[None, None]
    tables = {"query": turns, "key": turns}
    context = _like(block, 2, 5, block.attn2.to_k.in_features)
    return (_like(block, 2, 6, width), context, _like(block, 2, 6, 6, width), tables, None), {}


def _helios_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width, angles = block.scale_shift_table.shape[-1], _tables(block, 6)
    tables = torch.cat([angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)], -1)
    context = _like(block, 2, 5, block.attn2.to_k.in_features)
    return (_like(block, 2, 6, width), context, _like(block, 2, 6, 6, width), tables.expand(2, -1, -1), 4), {}


def _rule(name: str, path: str, cls: str, mixin: type[Fused], digest: str, sample: Any) -> Rule:
    return Rule(
        name=f"diffusers.{name}_block",
        ops=("adaln_zero",),
        targets=(f"{_HOME}.{path}:{cls}",),
        mixin=mixin,
        digests=PARTS | {f"{cls}.forward": (digest,)},
        sample=sample,
        tested_versions=("diffusers 0.42.1",),
    )


_ANYFLOW = ("AnyFlowTransformerBlock", AnyFlowForward, "c34ca4e463d36106", _anyflow_sample)

RULES = (
    _rule("anyflow", "transformer_anyflow", *_ANYFLOW),
    _rule("anyflow_far", "transformer_anyflow_far", *_ANYFLOW),
    _rule("helios", "transformer_helios", "HeliosTransformerBlock", HeliosForward, "2d5bf0b5df10c3f9", _helios_sample),
)
