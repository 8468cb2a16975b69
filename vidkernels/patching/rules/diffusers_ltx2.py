# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks and attentions of diffusers' `LTX2VideoTransformer3DModel`: a stream of video and one of audio."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _dit_units as units
from vidkernels.patching.rules._latte_units import feed_forward
from vidkernels.patching.rules.diffusers_ltx import by_head, heads_reason, like

_LTX = "diffusers.models.transformers.transformer_ltx2"
_NORMS = (
    "norm1",
    "norm2",
    "norm3",
    "audio_norm1",
    "audio_norm2",
    "audio_norm3",
    "audio_to_video_norm",
    "video_to_audio_norm",
)
Rows = tuple[Tensor, ...]


class _Side(NamedTuple):
    """One stream behind an attention whose result is not added yet (None: there was none), and its MLP's rows."""

    stream: units.RmsStream
    branch: Tensor | None
    gate: Tensor | None
    rows: Rows

    def normed(self, norm: Any, shift: Tensor, scale: Tensor) -> Tensor:
        """The stream, with the branch in it from now on, behind a norm and its modulation."""
        if self.branch is None:
            return self.stream.open(norm, shift, scale)
        return self.stream.seam(self.branch, self.gate, norm, shift, scale)


class BlockForward(Fused):
    """`LTX2VideoTransformerBlock.forward`."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        temb: Tensor,
        temb_audio: Tensor,
        temb_ca_scale_shift: Tensor,
        temb_ca_audio_scale_shift: Tensor,
        temb_ca_gate: Tensor,
        temb_ca_audio_gate: Tensor,
        temb_prompt: Tensor | None = None,
        temb_prompt_audio: Tensor | None = None,
        video_rotary_emb: Any = None,
        audio_rotary_emb: Any = None,
        ca_video_rotary_emb: Any = None,
        ca_audio_rotary_emb: Any = None,
        encoder_attention_mask: Tensor | None = None,
        audio_encoder_attention_mask: Tensor | None = None,
        self_attention_mask: Tensor | None = None,
        audio_self_attention_mask: Tensor | None = None,
        a2v_cross_attention_mask: Tensor | None = None,
        v2a_cross_attention_mask: Tensor | None = None,
        use_a2v_cross_attention: bool = True,
        use_v2a_cross_attention: bool = True,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video [B, N, D] and audio [B, M, D'], captions of both, modulation [B, 1 or tokens, rows * width] -> both streams."""
        more: dict[str, Any] = {}
        if self.perturbed_attn:
            more = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
        # Attention over a stream's own tokens, then over its caption.
        turned = {"query_rotary_emb": video_rotary_emb, "attention_mask": self_attention_mask, **more}
        context = encoder_hidden_states, temb_prompt, encoder_attention_mask
        video = self._begun("", hidden_states, temb, turned, *context)
        turned = {"query_rotary_emb": audio_rotary_emb, "attention_mask": audio_self_attention_mask, **more}
        context = audio_encoder_hidden_states, temb_prompt_audio, audio_encoder_attention_mask
        audio = self._begun("audio_", audio_hidden_states, temb_audio, turned, *context)
        used = bool(use_a2v_cross_attention), bool(use_v2a_cross_attention)
        if any(used):
            # Each stream is the queries of one attention and the keys of the other, with rows of its own for each.
            seen, gate = self._seen("video", video, self.audio_to_video_norm, temb_ca_scale_shift, temb_ca_gate, used)
            given = self._seen(
                "audio", audio, self.video_to_audio_norm, temb_ca_audio_scale_shift, temb_ca_audio_gate, used
            )
            heard, audio_gate = given
            branch = audio_branch = None
            if used[0]:
                tables = {"query_rotary_emb": ca_video_rotary_emb, "key_rotary_emb": ca_audio_rotary_emb}
                options = {"attention_mask": a2v_cross_attention_mask, **tables}
                branch = self.audio_to_video_attn(seen[0], encoder_hidden_states=heard[0], **options)
            if used[1]:
                tables = {"query_rotary_emb": ca_audio_rotary_emb, "key_rotary_emb": ca_video_rotary_emb}
                options = {"attention_mask": v2a_cross_attention_mask, **tables}
                audio_branch = self.video_to_audio_attn(heard[1], encoder_hidden_states=seen[1], **options)
            video = _Side(video.stream, branch, gate, video.rows)
            audio = _Side(audio.stream, audio_branch, audio_gate, audio.rows)
        return self._ended(video, self.norm3, self.ff), self._ended(audio, self.audio_norm3, self.audio_ff)

    def _begun(
        self,
        prefix: str,
        x: Tensor,
        temb: Tensor,
        given: dict[str, Any],
        context: Tensor,
        temb_context: Tensor | None,
        mask: Tensor | None,
    ) -> _Side:
        """Attention of a stream over itself and over its caption."""
        rows = self.get_mod_params(getattr(self, f"{prefix}scale_shift_table"), temb, x.shape[0])
        shift, scale, gate = rows[:3]
        stream = units.RmsStream(x, gate, self._vidkernels_backend("adaln_zero"))
        normed = stream.open(getattr(self, f"{prefix}norm1"), shift, scale)
        branch = getattr(self, f"{prefix}attn1")(hidden_states=normed, encoder_hidden_states=None, **given)
        asks = self.audio_cross_attn_adaln if prefix else self.video_cross_attn_adaln
        shift, scale, asked = rows[6:9] if asks else (None, None, None)
        normed = stream.seam(branch, gate, getattr(self, f"{prefix}norm2"), shift, scale)
        if self.cross_attn_adaln:
            table = getattr(self, f"{prefix}prompt_scale_shift_table")
            if temb_context is not None:
                shift, scale = self.get_mod_params(table, temb_context, x.shape[0])
            else:
                shift, scale = table[None, None].to(x.device, x.dtype).unbind(2)
            context = context * (1 + scale) + shift
        options = {"encoder_hidden_states": context, "query_rotary_emb": None, "attention_mask": mask}
        return _Side(stream, getattr(self, f"{prefix}attn2")(normed, **options), asked, rows[3:6])

    def _seen(
        self, kind: str, side: _Side, norm: Any, temb: Tensor, temb_gate: Tensor, used: tuple[bool, bool]
    ) -> tuple[list[Any], Tensor]:
        """A stream as the attentions from audio to video and from video to audio see it, and the gate of its own one."""
        table = getattr(self, f"{kind}_a2v_cross_attn_scale_shift_table")
        batch = side.stream.x.shape[0]
        rows = self.get_mod_params(table[:4], temb, batch)  # scale and shift, twice
        gate = self.get_mod_params(table[4:], temb_gate, batch)[0]
        seen: list[Any] = [None, None]
        for i in (0, 1):
            if used[i]:
                seen[i] = side.normed(norm, rows[2 * i + 1], rows[2 * i])
                side = side._replace(branch=None)
        return seen, gate

    def _ended(self, side: _Side, norm: Any, ff: Any) -> Tensor:
        shift, scale, gate = side.rows
        normed = side.normed(norm, shift, scale)
        return side.stream.add(feed_forward(ff, normed), gate)

    def _reason(self, hidden_states: Tensor, audio_hidden_states: Tensor, temb: Tensor, **rest: Any) -> str | None:
        reason = call_reason(hidden_states, audio_hidden_states, temb)
        for name in _NORMS:
            norm: Any = self._modules[name]
            reason = reason or child_reason(norm, self._vidkernels_home.RMSNorm)
            if reason is None and norm.bias is not None:
                reason = "a norm has a bias"
        return reason


class AttentionForward(Fused):
    """`LTX2Attention.forward` with either of its processors: both norms in one launch, rotation by the model's tables.

    Projections and the attention itself stay diffusers': LoRA, masks, attention backends.
    """

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, N, D], context [B, M, D'] -> [B, N, D]."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = by_head(self, attention_mask, context)
        logits = None if self.to_gate_logits is None else self.to_gate_logits(hidden_states)
        value = self.to_v(context)
        weight = kwargs.get("perturbation_mask")
        skipped = kwargs.get("all_perturbed")
        if skipped is None:
            skipped = weight is not None and torch.all(weight == 0)
        if skipped:
            mixed = value
        else:
            mixed = self._mixed(hidden_states, context, value, mask, query_rotary_emb, key_rotary_emb)
            mixed = mixed if weight is None else torch.lerp(value, mixed, weight)
        if logits is not None:
            gates = 2.0 * torch.sigmoid(logits)  # [B, N, H]
            mixed = (mixed.unflatten(2, (self.heads, -1)) * gates.unsqueeze(-1)).flatten(2)
        result: Tensor = self.to_out[1](self.to_out[0](mixed))
        return result

    def _mixed(
        self, x: Tensor, context: Tensor, value: Tensor, mask: Tensor | None, query_tables: Any, key_tables: Any
    ) -> Tensor:
        """[B, N, H * D]."""
        backend, overwrite = self._vidkernels_backend("qk_norm_rope"), units.may_overwrite(self.to_q, self.to_k)
        q, k = self.to_q(x), self.to_k(context)
        q, k = units.norm_across_heads(q, k, (self.norm_q, self.norm_k), self.heads, backend, overwrite)
        if query_tables is not None:
            key_tables = query_tables if key_tables is None else key_tables
            turn = _turned if self.rope_type == "interleaved" else _turned_halves
            q, k = turn(q, query_tables, overwrite), turn(k, key_tables, overwrite)
        mixed = self._vidkernels_home.dispatch_attention_fn(
            q,
            k,
            value.unflatten(2, (self.heads, -1)),
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self.processor._attention_backend,
            parallel_config=self.processor._parallel_config,
        )
        flat: Tensor = mixed.flatten(2, 3).to(q.dtype)
        return flat

    def _reason(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Any,
        query_rotary_emb: Any,
        key_rotary_emb: Any,
        **kwargs: Any,
    ) -> str | None:
        reason = call_reason(hidden_states, encoder_hidden_states)
        home: Any = self._vidkernels_home
        plain = type(self.processor) is home.LTX2AudioVideoAttnProcessor
        if reason is None and not plain and type(self.processor) is not home.LTX2PerturbedAttnProcessor:
            reason = f"an attention uses {type(self.processor).__name__}"
        reason = reason or heads_reason(self)
        if (
            reason is None
            and query_rotary_emb is not None
            and self.rope_type == "split"
            and query_rotary_emb[0].ndim != 4
        ):
            reason = "a rotation's tables are not by head"
        known = set() if plain else {"perturbation_mask", "all_perturbed"}
        return reason or ("attention arguments are given" if not kwargs.keys() <= known else None)


def _turned(x: Tensor, tables: Any, overwrite: bool) -> Tensor:
    """x [B, N, H, D] whose neighbours are turned by tables [B, N, H * D]."""
    cos, sin = (table.unsqueeze(2) for table in tables)
    turn = units.Turn(cos, sin, x)
    return turn(x.flatten(2).unsqueeze(2), overwrite).reshape(x.shape)


def _turned_halves(x: Tensor, tables: Any, overwrite: bool) -> Tensor:
    """x [B, N, H, D] whose value p is turned with value p + D / 2 by tables [B, H, N, D / 2], wide and rounded once."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.transpose(1, 2) for table in tables)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        a, b = x.to(dtype).chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
    y = x if overwrite else x.clone()
    for start, stop in units.parts(y):
        part = y[:, start:stop]
        wide = part.to(dtype)
        a, b = wide.chunk(2, -1)
        c, s = cos[:, start:stop], sin[:, start:stop]
        crossed = a * s
        a.mul_(c).addcmul_(b, s, value=-1)
        b.mul_(c).add_(crossed)
        if wide is not part:
            part.copy_(wide)
    return y


def _tables(attention: Any, tokens: int) -> tuple[Tensor, Tensor]:
    device, width = attention.to_q.weight.device, attention.inner_dim
    cos, sin = units.sample_tables(tokens, width, device, (2,))
    if attention.rope_type == "interleaved":
        return cos, sin
    cos, sin = (t[..., ::2].unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (cos, sin))
    return cos, sin


def _block_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (count, width), (audio_count, audio_width) = block.scale_shift_table.shape, block.audio_scale_shift_table.shape
    streams = like(block, 2, 6, width), like(block, 2, 4, audio_width)
    captions = (
        like(block, 2, 5, block.attn2.cross_attention_dim),
        like(block, 2, 5, block.audio_attn2.cross_attention_dim),
    )
    rows = [like(block, 2, 1, n) for n in (count * width, audio_count * audio_width)]
    rows += [like(block, 2, 1, n) for n in (4 * width, 4 * audio_width, width, audio_width)]
    prompts = [like(block, 2, 1, 2 * n) for n in (width, audio_width)] if block.cross_attn_adaln else [None, None]
    tables = _tables(block.attn1, 6), _tables(block.audio_attn1, 4)
    crossed = _tables(block.audio_to_video_attn, 6), _tables(block.video_to_audio_attn, 4)
    return (*streams, *captions, *rows, *prompts, *tables, *crossed), {}


def _attention_sample(attention: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, context = like(attention, 2, 6, attention.query_dim), like(attention, 2, 6, attention.cross_attention_dim)
    return (x, context), {"query_rotary_emb": _tables(attention, 6)}


_TESTED = ("diffusers 0.42.1",)

RULES = (
    Rule(
        name="diffusers.ltx2_block",
        ops=("adaln_zero",),
        targets=(f"{_LTX}:LTX2VideoTransformerBlock",),
        mixin=BlockForward,
        digests={
            "LTX2VideoTransformerBlock.forward": ("1a07950d3da66da9",),
            "LTX2VideoTransformerBlock.get_mod_params": ("3d7afb64335effba",),
            "RMSNorm.forward": ("d6bf5d21fcac4a44",),
            "FeedForward.forward": ("ecfc6b9ebf82ecd0",),
        },
        sample=_block_sample,
        tested_versions=_TESTED,
    ),
    Rule(
        name="diffusers.ltx2_attention",
        ops=("qk_norm_rope",),
        targets=(f"{_LTX}:LTX2Attention",),
        mixin=AttentionForward,
        digests={
            "LTX2Attention.forward": ("92414f09271e87a6",),
            "LTX2AudioVideoAttnProcessor.__call__": ("1ae367c6646978b4",),
            "LTX2PerturbedAttnProcessor.__call__": ("d8a38f7a8bd7fc88",),
        },
        sample=_attention_sample,
        tested_versions=_TESTED,
    ),
)
