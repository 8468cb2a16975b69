# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks, attentions and positions of diffusers' `MochiTransformer3DModel`.

Mochi normalises a branch once more before its gate: `x + tanh(gate) * rms(branch)`. A video attends with the valid ones
of its text tokens: the original gathers them sample by sample, here a batch is one pack of segments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as adaln
from vidkernels.patching.rules import _dit_units as units
from vidkernels.patching.rules import _qk_norm_units as qk

_MOCHI = "diffusers.models.transformers.transformer_mochi"
_NORMS = "diffusers.models.normalization"
_ATTENTION = "diffusers.models.attention_processor"


class BlockForward(Fused):
    """`MochiTransformerBlock.forward`."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        encoder_attention_mask: Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Video [B, N, D] and text [B, M, E] -> (video, text)."""
        backend = self._vidkernels_backend("adaln_zero")
        rows = _rows(self.norm1, temb)
        video = units.RmsStream(hidden_states, rows[0], backend)
        normed = video.open(self.norm1.norm, None, rows[0])
        options = {"image_rotary_emb": image_rotary_emb, "attention_mask": encoder_attention_mask}
        if self.context_pre_only:
            context = self.norm1_context(encoder_hidden_states, temb)
            branch, _ = self.attn1(hidden_states=normed, encoder_hidden_states=context, **options)
            return self._finish(video, branch, rows, ""), encoder_hidden_states
        text_rows = _rows(self.norm1_context, temb)
        text = units.RmsStream(encoder_hidden_states, text_rows[0], backend)
        context = text.open(self.norm1_context.norm, None, text_rows[0])
        branch, text_branch = self.attn1(hidden_states=normed, encoder_hidden_states=context, **options)
        return self._finish(video, branch, rows, ""), self._finish(text, text_branch, text_rows, "_context")

    def _finish(self, stream: units.RmsStream, branch: Tensor, rows: tuple[Tensor, ...], suffix: str) -> Tensor:
        """Gate, norm and MLP of one stream, whose modules end in `suffix`."""
        norm2, norm3, norm4 = (getattr(self, f"norm{i}{suffix}").norm for i in (2, 3, 4))
        _, gate1, scale2, gate2 = rows
        normed = stream.seam(stream.normed(branch, norm2), gate1.tanh(), norm3, None, scale2)
        hidden = getattr(self, f"ff{suffix}")(normed)
        return stream.add(stream.normed(hidden, norm4), gate2.tanh())

    def _reason(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **rest: Any) -> str | None:
        reason = call_reason(hidden_states, encoder_hidden_states, temb)
        home = self._vidkernels_home
        outer = [self.norm1] if self.context_pre_only else [self.norm1, self.norm1_context]
        inner = [self.norm2, self.norm3, self.norm4]
        if not self.context_pre_only:
            inner += [self.norm2_context, self.norm3_context, self.norm4_context]
        for norm in outer:
            reason = reason or child_reason(norm, home.MochiRMSNormZero) or child_reason(norm.norm, home.RMSNorm)
            reason = reason or child_reason(norm.silu, nn.SiLU)
        for norm in inner:
            reason = reason or child_reason(norm, home.MochiModulatedRMSNorm) or child_reason(norm.norm, home.RMSNorm)
        return reason


def _rows(norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """(scale, gate) of the attention, (scale, gate) of the MLP."""
    return adaln.rows_of(norm, temb, 4)


class AttentionForward(Fused):
    """`MochiAttention.forward` with `MochiAttnProcessor2_0`: norms and rotation of queries and keys in one launch, one
    attention for a batch of texts of any lengths. Projections are called as modules."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        *,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Video [B, N, D], text [B, M, E], mask [B, M] -> (video, text, its valid tokens first)."""
        tokens, backend = hidden_states.shape[1], self._vidkernels_backend("qk_norm_rope")
        video = [qk.heads(layer(hidden_states), self.heads) for layer in (self.to_q, self.to_k, self.to_v)]
        overwrite = units.may_overwrite(self.to_q, self.to_k)
        known = units.known_positions(image_rotary_emb, video[0]) if qk.rounds_angles(video[0].dtype) else {}
        options = {"inplace": overwrite, **known}
        video[:2] = qk.normalise(video[0], video[1], self.norm_q, self.norm_k, backend, **options)
        if image_rotary_emb is not None and not known:
            cos, sin = image_rotary_emb  # [N, H, D / 2]
            turn = units.Turn(cos[None], sin[None], video[0], times=1)
            video[:2] = (turn(part, overwrite) for part in video[:2])
        added = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        text = [qk.heads(layer(encoder_hidden_states), self.heads) for layer in added]
        overwrite = units.may_overwrite(*added[:2])
        text[:2] = qk.normalise(text[0], text[1], self.norm_added_q, self.norm_added_k, backend, inplace=overwrite)
        rows, queries, keys = _segments(attention_mask, tokens)
        text = [part.flatten(0, 1).index_select(0, rows).view_as(part) for part in text]
        q, k, v = (torch.cat(parts, 1).flatten(0, 1) for parts in zip(video, text, strict=True))
        longest = tokens + attention_mask.shape[1]
        backend = self._vidkernels_backend("varlen_attention")
        mixed = ops.varlen_attention(q, k, v, queries, keys, longest, longest, backend=backend)
        mixed = mixed.flatten(1).unflatten(0, (-1, longest))
        words = mixed[:, tokens:]
        if hasattr(self, "to_add_out"):
            words = self.to_add_out(words)
        return self.to_out[1](self.to_out[0](mixed[:, :tokens])), words

    def _reason(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> str | None:
        reason = call_reason(hidden_states, encoder_hidden_states, attention_mask)
        if reason is None and kwargs:
            reason = "attention arguments are given"
        if reason is None and type(self.processor) is not self._vidkernels_home.MochiAttnProcessor2_0:
            reason = f"an attention uses {type(self.processor).__name__}"
        if reason is None and (attention_mask is None or attention_mask.shape != encoder_hidden_states.shape[:2]):
            reason = "an unusual mask is given"
        return reason or qk.norms_reason((self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k))


def _segments(mask: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of `tokens` tokens of video and `[B, M]` masked ones of text each as one pack; nothing waits for the device.

    Returns:
        The rows of text that put each sample's valid ones first; offsets of queries, and of keys, of three segments a
        sample: video and valid text; queries of the text that is left over, without keys, which gives zeros; its keys.
    """
    batch, words = mask.shape
    wanted = mask != 0
    sample = torch.arange(batch, device=mask.device)[:, None]
    rows = sample * words + wanted.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    start, total = sample * (tokens + words), tokens + words
    used = start + tokens + wanted.sum(1, keepdim=True)
    ends = torch.cat([used, start + total, start + total, used, used, start + total], 1).to(torch.int32)
    queries, keys = (nn.functional.pad(part.flatten(), (1, 0)) for part in (ends[:, :3], ends[:, 3:]))
    return rows.flatten(), queries, keys


class PositionsForward(Fused):
    """`MochiRoPE.forward`: the same tables, which remember the positions and frequencies that they were made from."""

    def forward(
        self,
        pos_frequencies: Tensor,
        num_frames: int,
        height: int,
        width: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Frequencies [3, H, D / 2] -> (cos, sin) [N, H, D / 2]."""
        tables = super().forward(pos_frequencies, num_frames, height, width, device, dtype)
        if call_reason(pos_frequencies) is not None:
            return tables
        positions = self._get_positions(num_frames, height, width, device, torch.float32)
        return qk.rotary(tables, positions, frequencies=pos_frequencies.detach(), layout="interleaved")


class HeadNormForward(Fused):
    """`MochiRMSNorm.forward` in one pass: the norm of queries or keys where another attention processor calls it."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, N, H, D] -> [B, N, H, D]."""
        backend = self._vidkernels_backend("qk_norm_rope")
        return ops.qk_norm_rope(hidden_states, None, self.weight, eps=self.eps, backend=backend)[0]

    def _reason(self, hidden_states: Tensor) -> str | None:
        reason = call_reason(hidden_states)
        if reason is None and (hidden_states.ndim not in (3, 4) or not hidden_states.dtype.is_floating_point):
            reason = "an unusual input is given"
        return reason


def _like(weight: Tensor, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=weight.dtype, device=weight.device)


def _sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (x, text, mask), rotated = _attention_sample(block.attn1)
    return (x, text, _like(x, 2, x.shape[-1]), mask), rotated


def _attention_sample(attention: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = attention.to_q.weight
    x, text = _like(weight, 2, 9, weight.shape[1]), _like(weight, 2, 5, attention.add_k_proj.weight.shape[1])
    mask = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.bool, device=weight.device)
    return (x, text, mask), {"image_rotary_emb": _sample_tables(9, attention)}


def _sample_tables(tokens: int, attention: Any) -> Any:
    pairs, device = attention.norm_q.weight.shape[0] // 2, attention.to_q.weight.device
    frequencies = torch.randn(1, attention.heads, pairs, device=device)
    positions = torch.arange(tokens, device=device, dtype=torch.float32)[:, None]
    angles = positions[..., None] * frequencies
    return qk.rotary((angles.cos(), angles.sin()), positions, frequencies=frequencies, layout="interleaved")


def _positions_sample(rope: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(3, 2, 4), 2, 3, 4), {"dtype": torch.float32}


def _projections(block: Any) -> list[nn.Module]:
    norms = [block.norm1] if block.context_pre_only else [block.norm1, block.norm1_context]
    return [norm.linear for norm in norms]


def _head_sample(norm: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_like(norm.weight, 2, 5, 3, norm.weight.shape[0]),), {}


def _head_check(norm: Any) -> str | None:
    return None if norm.weight is not None else "it has no weight"


_TESTED = ("diffusers 0.42.1",)

RULES = (
    Rule(
        name="diffusers.mochi_block",
        ops=("adaln_zero",),
        targets=(f"{_MOCHI}:MochiTransformerBlock",),
        mixin=BlockForward,
        digests={
            "MochiTransformerBlock.forward": ("d4df80eb1353105d",),
            "MochiRMSNormZero.forward": ("a2eeb1b434fe4109",),
            "MochiModulatedRMSNorm.forward": ("116750750dc4dfe6",),
            "RMSNorm.forward": ("d6bf5d21fcac4a44",),
        },
        sample=_sample,
        projections=_projections,
        tested_versions=_TESTED,
    ),
    Rule(
        name="diffusers.mochi_attention",
        ops=("qk_norm_rope", "varlen_attention"),
        targets=(f"{_ATTENTION}:MochiAttention",),
        mixin=AttentionForward,
        digests={
            "MochiAttention.forward": ("eaf34940e03fc07f",),
            "MochiAttnProcessor2_0.__call__": ("d72e9450faa8b8b9",),
        },
        sample=_attention_sample,
        tested_versions=_TESTED,
    ),
    Rule(
        name="diffusers.mochi_positions",
        ops=("qk_norm_rope",),
        targets=(f"{_MOCHI}:MochiRoPE",),
        mixin=PositionsForward,
        digests={
            "MochiRoPE.forward": ("46ff0c226ac4ed43",),
            "MochiRoPE._get_positions": ("efdfd7a450ff65e7",),
            "MochiRoPE._create_rope": ("ae2be38deb7a190e",),
        },
        sample=_positions_sample,
        tested_versions=_TESTED,
    ),
    Rule(
        name="diffusers.mochi_head_norm",
        ops=("qk_norm_rope",),
        targets=(f"{_NORMS}:MochiRMSNorm",),
        mixin=HeadNormForward,
        digests={"MochiRMSNorm.forward": ("0e56dafb6d57f417",)},
        check=_head_check,
        sample=_head_sample,
        inductor="the norm of a head joins the rotation behind it in one kernel of Inductor",
        tested_versions=_TESTED,
    ),
)
