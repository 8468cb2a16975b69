# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' `LatteTransformer3DModel` as a whole, and for the adaLN-single block that it shares with PixArt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidkernels import ops
from vidkernels.patching._guard import call_reason, child_reason, guarded, note_fallback
from vidkernels.patching._mechanism import Fused, PatchTag
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _latte_units as units

_LATTE = "diffusers.models.transformers.latte_transformer_3d"
_BLOCK = "diffusers.models.attention"


class BlockForward(Fused):
    """`BasicTransformerBlock.forward` with `norm_type="ada_norm_single"`: attentions and MLP are called as modules."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        chain = units.Chain(self, timestep, self._vidkernels_backend("adaln_zero"))
        x, normed = chain.start(hidden_states)
        branch = self.attn1(normed, encoder_hidden_states=None, attention_mask=attention_mask)
        if self.attn2 is None:
            x, normed = chain.between(x, branch)
        else:
            x = chain.before_cross(x, branch)
            branch = self.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
            x, normed = chain.after_cross(x, branch)
        return chain.end(x, units.feed_forward(self.ff, normed))

    def _reason(
        self, hidden_states: Tensor, timestep: Tensor | None, cross_attention_kwargs: Any, **rest: Any
    ) -> str | None:
        reason = call_reason(hidden_states, timestep) or units.unusual(self)
        for norm in (self.norm1, self.norm2):
            reason = reason or child_reason(norm, torch.nn.LayerNorm)
        if reason is None and (cross_attention_kwargs or hidden_states.ndim != 3 or timestep is None):
            reason = "cross_attention_kwargs or an unusual input is given"
        return reason


class LatteForward(Fused):
    """`LatteTransformer3DModel.forward` on tokens [B, F, S, D]: no repeated conditions, no rearranged tokens."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
    ) -> Any:
        """[B, C, F, H, W] -> sample [B, C', F, H, W]."""
        batch, channels, frames, height, width = hidden_states.shape
        images = hidden_states.permute(0, 2, 1, 3, 4).reshape(-1, channels, height, width)
        x = self.pos_embed(images).unflatten(0, (batch, frames))  # [B, F, S, D]
        modulation, embedded = self.adaln_single(
            timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            batch_size=batch,
            hidden_dtype=x.dtype,
        )
        caption = self.caption_projection(encoder_hidden_states)
        for i, (space, time) in enumerate(zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=False)):
            x = self._block(self._space, space, x, modulation, caption, encoder_attention_mask)
            if not enable_temporal_attentions:
                continue
            if i == 0 and frames > 1:
                x = x + self.temp_pos_embed.to(x.dtype)[:, :, None]
            x = self._block(self._time, time, x, modulation)
        sample = self._head(x, embedded, height, width)
        if not return_dict:
            return (sample,)
        return self._vidkernels_home.Transformer2DModelOutput(sample=sample)

    def _reason(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, **rest: Any) -> str | None:
        return call_reason(hidden_states, encoder_hidden_states) or child_reason(self.norm_out, torch.nn.LayerNorm)

    def _block(self, run: Any, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            checkpointed: Tensor = self._gradient_checkpointing_func(run, *arguments)
            return checkpointed
        result: Tensor = run(*arguments)
        return result

    def _rebuilt(self, block: Any) -> bool:
        """Whether a block is run from its parts. One that is sharded, compiled or hooked by itself is called: then its own
        rule serves it, which reads nothing but its own parameters."""
        reason = units.block_reason(block, self._vidkernels_home.BasicTransformerBlock)
        if reason is not None and not isinstance(block, PatchTag):
            note_fallback(self, reason)
        return reason is None

    def _space(self, block: Any, x: Tensor, modulation: Tensor, caption: Tensor, mask: Tensor | None) -> Tensor:
        frames, positions = x.shape[1:3]
        if not self._rebuilt(block):
            repeated = (caption.repeat_interleave(frames, 0), mask, modulation.repeat_interleave(frames, 0))
            y: Tensor = block(x.flatten(0, 1), None, *repeated, None, None)
            return y.unflatten(0, x.shape[:2])
        chain = units.Chain(block, modulation, self._vidkernels_backend("adaln_zero"))
        tokens, normed = chain.start(x.flatten(1, 2))
        sequences = normed.reshape(-1, positions, normed.shape[-1])  # one per frame
        reason = units.attention_reason(block.attn1)
        if reason is None:
            branch = units.attend_in_frames(block.attn1, sequences)
        else:
            note_fallback(self, reason)
            branch = block.attn1(sequences)
        branch = branch.reshape(tokens.shape)
        if block.attn2 is None:
            tokens, normed = chain.between(tokens, branch)
        else:
            tokens = chain.before_cross(tokens, branch)
            tokens, normed = chain.after_cross(tokens, self._cross(block.attn2, tokens, caption, mask, frames))
        return chain.end(tokens, units.feed_forward(block.ff, normed)).unflatten(1, (frames, positions))

    def _cross(self, attention: Any, tokens: Tensor, caption: Tensor, mask: Tensor | None, frames: int) -> Tensor:
        reason = units.attention_reason(attention)
        if reason is None and mask is None:
            return units.attend_to_caption(attention, tokens, caption)
        if reason is not None:
            note_fallback(self, reason)
        by_frame = tokens.unflatten(1, (frames, -1)).flatten(0, 1)
        repeated = caption.repeat_interleave(frames, 0)
        mixed: Tensor = attention(by_frame, encoder_hidden_states=repeated, attention_mask=mask)
        return mixed.reshape(tokens.shape)

    def _time(self, block: Any, x: Tensor, modulation: Tensor) -> Tensor:
        positions = x.shape[2]
        if not self._rebuilt(block):
            tokens = x.transpose(1, 2).flatten(0, 1)  # [B*S, F, D]
            y: Tensor = block(tokens, None, None, None, modulation.repeat_interleave(positions, 0), None, None)
            return y.unflatten(0, (x.shape[0], positions)).transpose(1, 2).contiguous()
        chain = units.Chain(block, modulation, self._vidkernels_backend("adaln_zero"))
        tokens, normed = chain.start(x.flatten(1, 2))
        grid = normed.unflatten(1, x.shape[1:3])
        reason = units.attention_reason(block.attn1)
        if reason is None:
            branch = units.attend_over_time(block.attn1, grid, self._vidkernels_backend("axial_attention"))
        else:
            note_fallback(self, reason)
            branch = block.attn1(grid.transpose(1, 2).flatten(0, 1))
            branch = branch.unflatten(0, (x.shape[0], positions)).transpose(1, 2)
        tokens, normed = chain.between(tokens, branch.reshape(tokens.shape))
        return chain.end(tokens, units.feed_forward(block.ff, normed)).unflatten(1, x.shape[1:3])

    def _head(self, x: Tensor, embedded: Tensor, height: int, width: int) -> Tensor:
        batch, frames, _, _ = x.shape
        patch, channels = self.config.patch_size, self.out_channels
        rows, columns = height // patch, width // patch
        shift, scale = (self.scale_shift_table[None] + embedded[:, None]).unbind(1)
        x = x.to(torch.promote_types(x.dtype, shift.dtype))
        backend = self._vidkernels_backend("adaln_zero")
        x = ops.adaln_modulate(x.flatten(1, 2), shift, scale, eps=self.norm_out.eps, backend=backend)
        x = self.proj_out(x).reshape(batch * frames, rows, columns, patch, patch, channels)
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(batch, frames, channels, rows * patch, columns * patch)
        return x.permute(0, 2, 1, 3, 4)


def _block_check(module: Any) -> str | None:
    return units.unusual(module)


def _latte_check(module: Any) -> str | None:
    for block in [*module.transformer_blocks, *module.temporal_transformer_blocks]:
        if not isinstance(getattr(block, "scale_shift_table", None), torch.Tensor):
            return "its blocks are not ada_norm_single"
    return "norm_out has weights" if module.norm_out.elementwise_affine else None


def _like(module: Any, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=module.scale_shift_table.dtype, device=module.scale_shift_table.device)


def _block_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    arguments = {"timestep": _like(module, 2, 6 * module.dim)}
    if module.attn2 is not None:
        arguments["encoder_hidden_states"] = _like(module, 2, 5, module.attn2.to_k.in_features)
    return (_like(module, 2, 9, module.dim),), arguments


def _latte_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    side, frames = 2 * module.config.patch_size, module.config.video_length
    video = _like(module, 1, module.config.in_channels, frames, side, side)
    caption = _like(module, 1, 5, module.config.caption_channels)
    timestep = torch.tensor([500], device=video.device)
    return (video,), {"timestep": timestep, "encoder_hidden_states": caption, "return_dict": False}


_BLOCK_DIGESTS = {"BasicTransformerBlock.forward": ("6e371c1142494a75",)}
_TESTED = ("diffusers 0.42.1",)

RULES = (
    Rule(
        name="diffusers.latte",
        ops=("adaln_zero", "axial_attention"),
        targets=(f"{_LATTE}:LatteTransformer3DModel",),
        mixin=LatteForward,
        digests=_BLOCK_DIGESTS | {"LatteTransformer3DModel.forward": ("1aff8a1448bd250e",)},
        check=_latte_check,
        sample=_latte_sample,
        tested_versions=_TESTED,
    ),
    Rule(
        name="diffusers.adaln_single_block",
        ops=("adaln_zero",),
        targets=(f"{_BLOCK}:BasicTransformerBlock",),
        mixin=BlockForward,
        digests=_BLOCK_DIGESTS,
        check=_block_check,
        sample=_block_sample,
        tested_versions=_TESTED,
    ),
)
