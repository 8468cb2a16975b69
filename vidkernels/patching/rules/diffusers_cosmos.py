# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks and the positions of diffusers' `CosmosTransformer3DModel`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import call_reason, child_reason, guarded, is_autocast, note_fallback
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as units
from vidkernels.patching.rules import _qk_norm_units as qk
from vidkernels.patching.rules._latte_units import feed_forward

_COSMOS = "diffusers.models.transformers.transformer_cosmos"


class PositionsForward(Fused):
    """`CosmosRotaryPosEmbed.forward`: the same tables, which remember the positions that they were made from."""

    def forward(self, hidden_states: Tensor, fps: Any = None) -> Any:
        """[B, C, F, H, W] -> (cos, sin) [N, D]."""
        tables = super().forward(hidden_states, fps)
        if call_reason(hidden_states) is not None or isinstance(fps, Tensor):
            return tables
        sizes = [size // patch for size, patch in zip(hidden_states.shape[2:], self.patch_size, strict=True)]
        axes = [torch.arange(size, device=hidden_states.device, dtype=torch.float32) for size in sizes]
        if fps is not None:
            axes[0] = axes[0] / fps * self.base_fps
        positions = torch.cartesian_prod(*axes)
        factors = (self.t_ntk_factor, self.h_ntk_factor, self.w_ntk_factor)
        theta = tuple(10000.0 * factor for factor in factors)
        return qk.rotary(tables, positions, axes=(self.dim_t, self.dim_h, self.dim_w), theta=theta, layout="half")


class BlockForward(Fused):
    """`CosmosTransformerBlock.forward`: two attentions and an MLP, each behind its own modulated norm and gate."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any,
        embedded_timestep: Tensor,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
        extra_pos_emb: Tensor | None = None,
        attention_mask: Any = None,
        controlnet_residual: Tensor | None = None,
        latents: Tensor | None = None,
        block_idx: int | None = None,
    ) -> Any:
        """[B, N, D] -> [B, N, D], with a projection of it in a control network."""
        if self.before_proj is not None:
            hidden_states = self.before_proj(hidden_states) + latents
        if extra_pos_emb is not None:
            hidden_states = hidden_states + extra_pos_emb
        rows = [_rows(norm, embedded_timestep, temb) for norm in (self.norm1, self.norm2, self.norm3)]
        (shift1, scale1, gate1), (shift2, scale2, gate2), (shift3, scale3, gate3) = rows
        stream = units.Stream(hidden_states, gate1, self._vidkernels_backend("adaln_zero"))
        normed = stream.open(self.norm1.norm, shift1, scale1)
        branch = _attend(self, self.attn1, normed, None, None, image_rotary_emb)
        normed = stream.seam(branch, gate1, self.norm2.norm, shift2, scale2)
        branch = _attend(self, self.attn2, normed, encoder_hidden_states, attention_mask, None)
        normed = stream.seam(branch, gate2, self.norm3.norm, shift3, scale3)
        x = stream.add(feed_forward(self.ff, normed), gate3)
        if controlnet_residual is not None:
            assert self.after_proj is None
            x = x + controlnet_residual
        if self.after_proj is not None:
            assert controlnet_residual is None
            return x, self.after_proj(x)
        return x

    def _reason(
        self,
        hidden_states: Tensor,
        embedded_timestep: Tensor,
        temb: Tensor | None,
        extra_pos_emb: Tensor | None,
        **rest: Any,
    ) -> str | None:
        reason = call_reason(hidden_states, embedded_timestep, temb, extra_pos_emb)
        for norm in (self.norm1, self.norm2, self.norm3):
            reason = reason or child_reason(norm, self._vidkernels_home.CosmosAdaLayerNormZero)
            reason = reason or child_reason(norm.norm, nn.LayerNorm)
        return reason


def _rows(norm: Any, embedded: Tensor, temb: Tensor | None) -> tuple[Tensor, ...]:
    """(shift, scale, gate), each [B, D], or [B, N, D] where frames have timesteps of their own."""
    projected = norm.linear_2(norm.linear_1(norm.activation(embedded)))
    return (projected if temb is None else projected + temb).chunk(3, dim=-1)


def _attend(block: Any, attention: Any, x: Tensor, context: Any, mask: Any, tables: Any) -> Tensor:
    """An attention with the norms of queries and keys fused; the module itself where that is not possible."""
    home = block._vidkernels_home
    if isinstance(attention, home.CosmosAttention):  # it attends to images, too
        return attention(x, encoder_hidden_states=context, attention_mask=mask)
    reason = child_reason(attention, home.Attention)
    if reason is None and type(attention.processor) is not home.CosmosAttnProcessor2_0:
        reason = f"an attention uses {type(attention.processor).__name__}"
    reason = reason or qk.norms_reason((attention.norm_q, attention.norm_k))
    if reason is None:
        return _attention(block, attention, x, x if context is None else context, mask, tables)
    note_fallback(block, reason)
    rotated = {} if tables is None else {"image_rotary_emb": tables}
    return attention(x, encoder_hidden_states=context, attention_mask=mask, **rotated)


def _attention(block: Any, attention: Any, x: Tensor, context: Tensor, mask: Any, tables: Any) -> Tensor:
    """`CosmosAttnProcessor2_0` on [B, N, H, D]. The tables' angles are float32, up to 1e-5 off, which shows in float32
    and not in half precision: there the rotation runs inside the op."""
    backend = block._vidkernels_backend("qk_norm_rope")
    projected = (attention.to_q(x), attention.to_k(context), attention.to_v(context))
    q, k, v = (qk.heads(part, attention.heads) for part in projected)
    known = qk.rotation(tables) if qk.rounds_angles(q.dtype) else {}
    if q.shape[1] == k.shape[1]:
        q, k = qk.normalise(q, k, attention.norm_q, attention.norm_k, backend, **known)
    else:
        options = {"eps": attention.norm_q.eps, "backend": backend}
        q, _ = ops.qk_norm_rope(q, None, attention.norm_q.weight, **options)
        k, _ = ops.qk_norm_rope(k, None, attention.norm_k.weight, **options)
    if tables is not None and not known:
        rotate = sys.modules["diffusers.models.embeddings"].apply_rotary_emb
        q, k = (rotate(part, tables, use_real_unbind_dim=-2, sequence_dim=1) for part in (q, k))
    dispatch = block._vidkernels_home.dispatch_attention_fn
    options = {"attn_mask": mask, "dropout_p": 0.0, "is_causal": False}
    mixed = dispatch(q, qk.by_head(k), qk.by_head(v), **options).flatten(2, 3).type_as(q)
    result: Tensor = attention.to_out[1](attention.to_out[0](mixed))
    return result


class FinalNormForward(Fused):
    """`CosmosAdaLayerNorm.forward`: norm and modulation in one pass."""

    @guarded
    def forward(self, hidden_states: Tensor, embedded_timestep: Tensor, temb: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        projected = self.linear_2(self.linear_1(self.activation(embedded_timestep)))
        if temb is not None:
            projected = projected + temb[..., : 2 * self.embedding_dim]
        shift, scale = projected.chunk(2, dim=-1)
        stream = units.Stream(hidden_states, scale, self._vidkernels_backend("adaln_zero"))
        # Under autocast a LayerNorm returns float32, but not on the CPU.
        if stream.x.device.type != "cpu" and is_autocast(stream.x):
            stream.x = stream.x.float()
        return stream.open(self.norm, shift, scale)

    def _reason(self, hidden_states: Tensor, embedded_timestep: Tensor, temb: Tensor | None) -> str | None:
        return call_reason(hidden_states, embedded_timestep, temb) or child_reason(self.norm, nn.LayerNorm)


def _like(module: Any, *shape: int) -> Tensor:
    weight = module.linear_2.weight
    return torch.randn(*shape, dtype=weight.dtype, device=weight.device)


def _sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    norm, context = block.norm1, block.attn2.to_k.in_features
    width = norm.linear_1.in_features
    text = _like(norm, 2, 5, context)
    encoded = (text, _like(norm, 2, 4, width)) if block.img_context else text
    latents = {"latents": _like(norm, 2, 9, width)} if block.before_proj is not None else {}
    return (_like(norm, 2, 9, width), encoded, _like(norm, 2, width), _like(norm, 2, 3 * width)), latents


def _final_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    width = module.embedding_dim
    return (_like(module, 2, 9, width), _like(module, 2, width), _like(module, 2, 3 * width)), {}


def _positions_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(1, 1, 2 * module.patch_size[0], 4 * module.patch_size[1], 3 * module.patch_size[2]),), {
        "fps": 30
    }


_TESTED = ("diffusers 0.42.1",)

RULES = (
    Rule(
        name="diffusers.cosmos_block",
        ops=("adaln_zero", "qk_norm_rope"),
        targets=(f"{_COSMOS}:CosmosTransformerBlock",),
        mixin=BlockForward,
        digests={
            "CosmosTransformerBlock.forward": ("da2e2471ba6e1c3f",),
            "CosmosAdaLayerNormZero.forward": ("5e8d8175cb8c2381",),
            "CosmosAttnProcessor2_0.__call__": ("4f9800ecb155c14d",),
            "RMSNorm.forward": ("d6bf5d21fcac4a44",),
        },
        sample=_sample,
        tested_versions=_TESTED,
    ),
    Rule(
        name="diffusers.cosmos_final_norm",
        ops=("adaln_zero",),
        targets=(f"{_COSMOS}:CosmosAdaLayerNorm",),
        mixin=FinalNormForward,
        digests={"CosmosAdaLayerNorm.forward": ("ed47f94804f7dceb",)},
        sample=_final_sample,
        inductor="one norm with its modulation is one kernel of Inductor, too",
        tested_versions=_TESTED,
    ),
    Rule(
        name="diffusers.cosmos_positions",
        ops=("qk_norm_rope",),
        targets=(f"{_COSMOS}:CosmosRotaryPosEmbed",),
        mixin=PositionsForward,
        digests={"CosmosRotaryPosEmbed.forward": ("3e5cb71d268e3ef9",)},
        sample=_positions_sample,
        tested_versions=_TESTED,
    ),
)
