# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks of Open-Sora-Plan 1.3's and 1.5's transformers, found by the digests of their methods.

Tokens come as [N, B, D], samples innermost. In 1.3 attentions, which turn queries and keys and may be sparse, and the MLP are
called as modules; in 1.5 video and text are streams of their own, with one attention and one MLP for both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded, note_fallback, parameter_of
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _opensora_plan_attention as joint
from vidkernels.patching.rules import _qk_norm_units as qk
from vidkernels.patching.rules._adaln_zero_units import Stream, rows_of
from vidkernels.patching.rules._latte_units import feed_forward


class _Interleaved(Stream):
    """A residual stream whose tokens [N * B, D] are of B samples in turn: token i takes row i % B of modulation [B, D]."""

    def __init__(self, x: Tensor, row: Tensor, backend: str) -> None:
        self.size, batch = x.shape, x.shape[1]
        super().__init__(x.flatten(0, 1), row, backend)
        self.rows: dict[str, Tensor] = {}
        if batch > 1:
            index = torch.arange(batch, dtype=torch.int32, device=x.device)
            self.rows = {"rows": index.repeat(x.shape[0])}

    def _norm(self, layer: Any) -> dict[str, Any]:
        return {**super()._norm(layer), **self.rows}

    def _gate_options(self) -> dict[str, Any]:
        return self.rows

    def tokens(self) -> Tensor:
        """The stream as [N, B, D]."""
        return self.x.unflatten(0, self.size[:2])


class PlanSequenceForward(Fused):
    """`BasicTransformerBlock.forward`: self-attention, cross-attention without norm or gate, MLP."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        frame: Any = None,
        height: Any = None,
        width: Any = None,
    ) -> Tensor:
        """[N, B, D] -> [N, B, D]."""
        sizes = {"frame": frame, "height": height, "width": width}
        modulation = self.scale_shift_table[:, None] + timestep.reshape(6, hidden_states.shape[1], -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(0)
        stream = _Interleaved(hidden_states, gate1, self._vidkernels_backend("adaln_zero"))
        shape = hidden_states.shape[:2]
        normed = stream.open(self.norm1, shift1, scale1).unflatten(0, shape)
        branch = self.attn1(normed, encoder_hidden_states=None, attention_mask=attention_mask, **sizes)
        stream.add(branch.flatten(0, 1), gate1)
        caption, mask = encoder_hidden_states, encoder_attention_mask
        branch = self.attn2(stream.tokens(), encoder_hidden_states=caption, attention_mask=mask, **sizes)
        normed = stream.seam(branch.flatten(0, 1), None, self.norm2, shift2, scale2).unflatten(0, shape)
        stream.add(self.ff(normed).flatten(0, 1), gate2)
        return stream.tokens()

    def _reason(self, hidden_states: Tensor, timestep: Tensor | None, **rest: Any) -> str | None:
        reason = call_reason(hidden_states, timestep)
        reason = reason or child_reason(self.norm1, nn.LayerNorm) or child_reason(self.norm2, nn.LayerNorm)
        if reason is None and (timestep is None or hidden_states.ndim != 3):
            reason = "an unusual input is given"
        return reason


class _Joint(_Interleaved):
    """With LayerNorms or with RMSNorms."""

    def _norm(self, layer: Any) -> dict[str, Any]:
        if isinstance(layer, nn.LayerNorm):
            return super()._norm(layer)
        weight = parameter_of(layer, "weight")
        return {"norm": "rms", "weight": weight, "eps": layer.eps, "backend": self.backend, **self.rows}


class PlanJointForward(Fused):
    """`BasicTransformerBlock.forward` of 1.5: one attention and one MLP over the tokens of video and text."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Any = None,
        embedded_timestep: Any = None,
        frame: Any = None,
        height: Any = None,
        width: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Video [N, B, D] and text [L, B, D] -> both."""
        sizes, count, batch = (frame, height, width), *hidden_states.shape[:2]
        device, dtype = hidden_states.device, hidden_states.dtype
        positions = self.position_getter(batch, t=frame, h=height, w=width, device=device)
        tables = self.rope(self.attention_head_dim, positions, device, dtype)
        shift, scale, gate, *text_rows = rows_of(self.norm1, embedded_timestep, 6)
        text_shift, text_scale, text_gate = text_rows
        backend = self._vidkernels_backend("adaln_zero")
        video, text = _Joint(hidden_states, gate, backend), _Joint(encoder_hidden_states, text_gate, backend)
        normed = video.open(self.norm1.norm, shift, scale).unflatten(0, (-1, batch))
        words = text.open(self.norm1.norm_enc, text_shift, text_scale).unflatten(0, (-1, batch))
        branch, said = self._attend(normed, words, attention_mask, sizes, tables)
        shift, scale, next_gate, *text_rows = rows_of(self.norm2, embedded_timestep, 6)
        text_shift, text_scale, next_text_gate = text_rows
        normed = video.seam(branch.flatten(0, 1), gate, self.norm2.norm, shift, scale)
        words = text.seam(said.flatten(0, 1), text_gate, self.norm2.norm_enc, text_shift, text_scale)
        both = torch.cat([normed, words]).unflatten(0, (-1, batch))
        del normed, words, branch, said
        both = feed_forward(self.ff, both)
        video.add(both[:count].flatten(0, 1), next_gate)
        text.add(both[count:].flatten(0, 1), next_text_gate)
        return video.tokens(), text.tokens()

    def _attend(
        self, x: Tensor, text: Tensor, mask: Tensor | None, sizes: joint.Sizes, tables: Any
    ) -> tuple[Tensor, Tensor]:
        home, attention = self._vidkernels_home, self.attn1
        reason = joint.attention_reason(attention, home)
        if reason is None:
            backend = self._vidkernels_backend("qk_norm_rope")
            return joint.attend(attention, x, text, mask, sizes, tables, home, backend)
        note_fallback(self, reason)
        options = dict(zip(("frame", "height", "width"), sizes, strict=True))
        options |= {"attention_mask": mask, "video_rotary_emb": tables}
        video, said = attention(x, encoder_hidden_states=text, **options)
        return video, said

    def _reason(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Any = None,
        embedded_timestep: Any = None,
        **rest: Any,
    ) -> str | None:
        reason = call_reason(hidden_states, attention_mask, encoder_hidden_states, embedded_timestep)
        reason = reason or self._norm_reason(self.norm1) or self._norm_reason(self.norm2)
        given = hidden_states, encoder_hidden_states, embedded_timestep
        if reason is None and any(t is None for t in given):
            reason = "an input is missing"
        if reason is None and (
            [t.ndim for t in given] != [3, 3, 2]
            or len({hidden_states.shape[1], encoder_hidden_states.shape[1], embedded_timestep.shape[0]}) > 1
        ):
            reason = "an unusual input is given"
        return reason

    def _norm_reason(self, norm: Any) -> str | None:
        reason = child_reason(norm, self._vidkernels_home.OpenSoraNormZero) or child_reason(norm.silu, nn.SiLU)
        for layer in () if reason is not None else (norm.norm, norm.norm_enc):
            reason = child_reason(layer, nn.LayerNorm) if isinstance(layer, nn.LayerNorm) else qk.norm_reason(layer)
            if reason is not None:
                return reason
        return reason


def _joint_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two samples, interleaved, with captions of five tokens."""
    linear = block.norm1.linear
    width = linear.out_features // 6

    def like(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=linear.weight.dtype, device=linear.weight.device)

    options = {"encoder_hidden_states": like(5, 2, width), "embedded_timestep": like(2, linear.in_features)}
    return (like(16, 2, width),), {**options, "frame": 1, "height": 4, "width": 4}


def _joint_projections(block: Any) -> list[nn.Module]:
    return [block.norm1.linear, block.norm2.linear]


def _sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two samples, interleaved, with captions of five tokens."""
    table = block.scale_shift_table

    def like(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=table.dtype, device=table.device)

    options = {
        "timestep": like(6, 2, table.shape[1]),
        "encoder_hidden_states": like(5, 2, block.attn2.to_k.in_features),
    }
    return (like(16, 2, table.shape[1]),), {**options, "frame": 1, "height": 4, "width": 4}


RULES = (
    Rule(
        name="official.plan_sequence_block",
        ops=("adaln_zero",),
        targets=("opensora.models.diffusion.opensora_v1_3.modules:BasicTransformerBlock",),
        features=(
            "scale_shift_table",
            "norm1",
            "norm2",
            "attn1",
            "attn2",
            "ff",
            "!norm3",
            "!use_ada_layer_norm_single",
        ),
        mixin=PlanSequenceForward,
        digests={"BasicTransformerBlock.forward": ("0ae269a40c5a7be5",)},
        sample=_sample,
        tested_versions=("PKU-YuanGroup/Open-Sora-Plan 254e2cf",),
    ),
    Rule(
        name="official.plan_joint_block",
        ops=("adaln_zero", "qk_norm_rope"),
        targets=("opensora.models.diffusion.opensora_v1_5.modules:BasicTransformerBlock",),
        features=("norm1.norm_enc", "norm2.norm_enc", "attn1", "ff", "rope", "position_getter", "!attn2"),
        mixin=PlanJointForward,
        digests={
            "BasicTransformerBlock.forward": ("2d03302a3442e984",),
            "OpenSoraNormZero.forward": ("e1a9c05fc5c53ee7",),
            "OpenSoraAttnProcessor2_0.__call__": ("d6ec6b6d96cb5ac8",),
            "RoPE3D.forward": ("9f24518d5c16d18a",),
            "apply_rotary_emb": ("d8f6e7a403471237",),
            "apply_rope1d": ("3bfabca5112f60ee",),
            "rotate_half": ("76266edffaa21645",),
        },
        reads=("norm1.norm", "norm1.norm_enc", "norm2.norm", "norm2.norm_enc"),
        projections=_joint_projections,
        sample=_joint_sample,
        tested_versions=("PKU-YuanGroup/Open-Sora-Plan 3187ceb",),
    ),
)
