# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks and the positions of diffusers' `FluxTransformer2DModel`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded, note_fallback
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as units
from vidkernels.patching.rules import _qk_norm_units as qk
from vidkernels.patching.rules._latte_units import feed_forward

_FLUX = "diffusers.models.transformers.transformer_flux"


class PositionsForward(Fused):
    """`FluxPosEmbed.forward`: the same tables, which remember the positions that they were made from."""

    def forward(self, ids: Tensor) -> Any:
        """[N, axes] -> (cos, sin) [N, D]."""
        tables = super().forward(ids)
        reason = call_reason(ids)
        if reason is not None or ids.ndim != 2 or ids.shape[1] > 3 or ids.requires_grad:
            return tables
        positions = ids.to(torch.float32, copy=True)  # the caller may write to his own
        return qk.rotary(tables, positions, axes=tuple(self.axes_dim), theta=float(self.theta), layout="interleaved")


class BlockForward(Fused):
    """`FluxTransformerBlock.forward`: an image and a text stream, one attention."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image [B, N, D] and text [B, M, D] -> (text, image)."""
        backend = self._vidkernels_backend("adaln_zero")
        rows, text_rows = units.rows_of(self.norm1, temb, 6), units.rows_of(self.norm1_context, temb, 6)
        image = units.Stream(hidden_states, rows[2], backend)
        text = units.Stream(encoder_hidden_states, text_rows[2], backend)
        normed = image.open(self.norm1.norm, rows[0], rows[1])
        text_normed = text.open(self.norm1_context.norm, text_rows[0], text_rows[1])
        branches = _attend(self, normed, text_normed, image_rotary_emb, joint_attention_kwargs)
        normed = image.seam(branches[0], rows[2], self.norm2, rows[3], rows[4])
        image.add(feed_forward(self.ff, normed), rows[5])
        if len(branches) == 3:  # an IP-adapter's branch has no gate
            image.add(branches[2], None)
        normed = text.seam(branches[1], text_rows[2], self.norm2_context, text_rows[3], text_rows[4])
        return _clip(text.add(feed_forward(self.ff_context, normed), text_rows[5])), image.x

    def _reason(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **rest: Any) -> str | None:
        cls = self._vidkernels_home.AdaLayerNormZero
        reason = call_reason(hidden_states, encoder_hidden_states, temb) or units.rows_reason(self.norm1, cls)
        reason = reason or units.rows_reason(self.norm1_context, cls)
        return reason or child_reason(self.norm2, nn.LayerNorm) or child_reason(self.norm2_context, nn.LayerNorm)


class SingleBlockForward(Fused):
    """`FluxSingleTransformerBlock.forward`: text and image in one stream, attention beside the MLP."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image [B, N, D] and text [B, M, D] -> (text, image)."""
        words = encoder_hidden_states.shape[1]
        shift, scale, gate = units.rows_of(self.norm, temb, 3)
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        stream = units.Stream(tokens, gate, self._vidkernels_backend("adaln_zero"))
        normed = stream.open(self.norm.norm, shift, scale)
        hidden = self._activate(self.proj_mlp(normed))
        mixed = _attend(self, normed, None, image_rotary_emb, joint_attention_kwargs)
        x = _clip(stream.add(self.proj_out(torch.cat([mixed, hidden], dim=2)), gate))
        return x[:, :words], x[:, words:]

    def _reason(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **rest: Any) -> str | None:
        reason = call_reason(hidden_states, encoder_hidden_states, temb)
        return reason or units.rows_reason(self.norm, self._vidkernels_home.AdaLayerNormZeroSingle)

    def _activate(self, hidden: Tensor) -> Tensor:
        """The MLP's GELU; without gradients it overwrites its input, the widest tensor of the block."""
        if torch.is_grad_enabled() or child_reason(self.act_mlp, nn.GELU) or child_reason(self.proj_mlp, nn.Linear):
            activated: Tensor = self.act_mlp(hidden)
            return activated
        return torch.ops.aten.gelu_(hidden, approximate=self.act_mlp.approximate)


def _clip(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _attend(block: Any, x: Tensor, context: Tensor | None, tables: Any, options: dict[str, Any] | None) -> Any:
    """The block's attention: norms and rotation of q and k in one launch per stream, else the module itself."""
    reason = "joint_attention_kwargs are given" if options else _attention_reason(block, context)
    if reason is None:
        return _flux_attention(block, x, context, tables)
    note_fallback(block, reason)
    streams = {} if context is None else {"encoder_hidden_states": context}
    return block.attn(hidden_states=x, image_rotary_emb=tables, **streams, **(options or {}))


def _attention_reason(block: Any, context: Tensor | None) -> str | None:
    attention, home = block.attn, block._vidkernels_home
    reason = child_reason(attention, home.FluxAttention)
    if reason is None and type(attention.processor) is not home.FluxAttnProcessor:
        reason = f"an attention uses {type(attention.processor).__name__}"
    norms = [attention.norm_q, attention.norm_k]
    if context is not None:
        norms += [attention.norm_added_q, attention.norm_added_k]
    return reason or qk.norms_reason(norms)


def _flux_attention(block: Any, x: Tensor, context: Tensor | None, tables: Any) -> Any:
    """`FluxAttnProcessor`, text first. The attention backend and the parallel configuration are the processor's."""
    attention, home = block.attn, block._vidkernels_home
    backend = block._vidkernels_backend("qk_norm_rope")
    projected = home._get_qkv_projections(attention, x, context)
    words = 0 if context is None else context.shape[1]
    known = None if x.dtype == torch.float64 else tables  # in float64 the tables' own float32 would show
    q, k, v = (qk.heads(part, width=attention.head_dim) for part in projected[:3])
    q, k = qk.normalise(q, k, attention.norm_q, attention.norm_k, backend, **qk.rotation(known, words))
    if context is not None:
        text_q, text_k, text_v = (qk.heads(part, width=attention.head_dim) for part in projected[3:])
        added = (attention.norm_added_q, attention.norm_added_k)
        text_q, text_k = qk.normalise(text_q, text_k, *added, backend, **qk.rotation(known, 0, words))
        q, k, v = qk.join(text_q, q), qk.join(text_k, k), qk.join(text_v, v)
    if tables is not None and not qk.rotation(known):
        q, k = (home.apply_rotary_emb(part, tables, sequence_dim=1) for part in (q, k))
    where = {"backend": attention.processor._attention_backend, "parallel_config": attention.processor._parallel_config}
    mixed = home.dispatch_attention_fn(q, qk.by_head(k), qk.by_head(v), attn_mask=None, **where)
    mixed = mixed.flatten(2, 3).to(q.dtype)
    if context is None:
        return mixed
    image = attention.to_out[1](attention.to_out[0](mixed[:, words:].contiguous()))
    return image, attention.to_add_out(mixed[:, :words].contiguous())


def _like(block: Any, *shape: int) -> Tensor:
    weight = block.attn.to_q.weight
    return torch.randn(*shape, dtype=weight.dtype, device=weight.device)


def _sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width, head = block.attn.query_dim, block.attn.head_dim
    angles = torch.outer(torch.arange(14.0), torch.linspace(1, 0.1, head // 2)).repeat_interleave(2, 1)
    tables = tuple(table.to(block.attn.to_q.weight.device) for table in (angles.cos(), angles.sin()))
    streams = (_like(block, 2, 9, width), _like(block, 2, 5, width), _like(block, 2, width))
    return streams, {"image_rotary_emb": tables}


def _projections(block: Any) -> list[nn.Module]:
    return [block.norm1.linear, block.norm1_context.linear]


def _single_projections(block: Any) -> list[nn.Module]:
    return [block.norm.linear]


def _positions_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.arange(15.0).reshape(5, 3),), {}


_TESTED = ("diffusers 0.42.1",)
_ATTENTION = {"FluxAttention.forward": ("abe9833f54bc8a8a",), "FluxAttnProcessor.__call__": ("6ddc29f47ceb323a",)}

RULES = (
    Rule(
        name="diffusers.flux_block",
        ops=("adaln_zero", "qk_norm_rope"),
        targets=(f"{_FLUX}:FluxTransformerBlock",),
        mixin=BlockForward,
        digests=_ATTENTION
        | {"FluxTransformerBlock.forward": ("d0b5a5d64d736fd5",), "AdaLayerNormZero.forward": ("73a3ec4bba8a9f2a",)},
        sample=_sample,
        projections=_projections,
        tested_versions=_TESTED,
    ),
    Rule(
        name="diffusers.flux_single_block",
        ops=("adaln_zero", "qk_norm_rope"),
        targets=(f"{_FLUX}:FluxSingleTransformerBlock",),
        mixin=SingleBlockForward,
        digests=_ATTENTION
        | {
            "FluxSingleTransformerBlock.forward": ("55cbabeddc69ece8",),
            "AdaLayerNormZeroSingle.forward": ("10deba49869ebce5",),
        },
        sample=_sample,
        projections=_single_projections,
        tested_versions=_TESTED,
    ),
    Rule(
        name="diffusers.flux_positions",
        ops=("qk_norm_rope",),
        targets=(f"{_FLUX}:FluxPosEmbed",),
        mixin=PositionsForward,
        digests={"FluxPosEmbed.forward": ("2713d5deb3be06b1",)},
        sample=_positions_sample,
        tested_versions=_TESTED,
    ),
)
