# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks of diffusers' `MochiTransformer3DModel` and for the norms of their queries and keys.

Mochi normalises a branch once more before its gate: `x + tanh(gate) * rms(branch)`. The attention, which packs each
sample's valid text tokens, is called as a module; its norms are modules that a rule of their own serves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import call_reason, child_reason, note_fallback
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as units

_MOCHI = "diffusers.models.transformers.transformer_mochi"
_NORMS = "diffusers.models.normalization"


class _RmsStream(units.Stream):
    """A stream whose norms are RMSNorms without weights."""

    def _norm(self, layer: Any) -> dict[str, Any]:
        return {"norm": "rms", "eps": layer.eps, "backend": self.backend}

    def branch(self, branch: Tensor, layer: Any) -> Tensor:
        """The branch normalised, before its gate."""
        return ops.adaln_modulate(branch, None, None, **self._norm(layer))


class BlockForward(Fused):
    """`MochiTransformerBlock.forward`."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        encoder_attention_mask: Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Video [B, N, D] and text [B, M, E] -> (video, text)."""
        reason = call_reason(hidden_states, encoder_hidden_states, temb) or self._reason()
        if reason is not None:
            note_fallback(self, reason)
            arguments = (hidden_states, encoder_hidden_states, temb, encoder_attention_mask, image_rotary_emb)
            original: tuple[Tensor, Tensor] = super().forward(*arguments)
            return original
        backend = self._vidkernels_backend("adaln_zero")
        rows = _rows(self.norm1, temb)
        video = _RmsStream(hidden_states, rows[0], backend)
        normed = video.open(self.norm1.norm, None, rows[0])
        options = {"image_rotary_emb": image_rotary_emb, "attention_mask": encoder_attention_mask}
        if self.context_pre_only:
            context = self.norm1_context(encoder_hidden_states, temb)
            branch, _ = self.attn1(hidden_states=normed, encoder_hidden_states=context, **options)
            return self._finish(video, branch, rows, ""), encoder_hidden_states
        text_rows = _rows(self.norm1_context, temb)
        text = _RmsStream(encoder_hidden_states, text_rows[0], backend)
        context = text.open(self.norm1_context.norm, None, text_rows[0])
        branch, text_branch = self.attn1(hidden_states=normed, encoder_hidden_states=context, **options)
        return self._finish(video, branch, rows, ""), self._finish(text, text_branch, text_rows, "_context")

    def _finish(self, stream: _RmsStream, branch: Tensor, rows: tuple[Tensor, ...], suffix: str) -> Tensor:
        """Gate, norm and MLP of one stream, whose modules end in `suffix`."""
        norm2, norm3, norm4 = (getattr(self, f"norm{i}{suffix}") for i in (2, 3, 4))
        _, gate1, scale2, gate2 = rows
        normed = stream.seam(stream.branch(branch, norm2), gate1.tanh(), norm3, None, scale2)
        hidden = getattr(self, f"ff{suffix}")(normed)
        return stream.add(stream.branch(hidden, norm4), gate2.tanh())

    def _reason(self) -> str | None:
        home = self._vidkernels_home
        outer = [self.norm1] if self.context_pre_only else [self.norm1, self.norm1_context]
        inner = [self.norm2, self.norm3, self.norm4]
        if not self.context_pre_only:
            inner += [self.norm2_context, self.norm3_context, self.norm4_context]
        for norm in outer:
            reason = child_reason(norm, home.MochiRMSNormZero) or child_reason(norm.norm, home.RMSNorm)
            if reason is not None or (reason := child_reason(norm.silu, nn.SiLU)) is not None:
                return reason
        for norm in inner:
            reason = child_reason(norm, home.MochiModulatedRMSNorm) or child_reason(norm.norm, home.RMSNorm)
            if reason is not None:
                return reason
        return None


def _rows(norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """(scale, gate) of the attention, (scale, gate) of the MLP."""
    return units.rows_of(norm, temb, 4)


class HeadNormForward(Fused):
    """`MochiRMSNorm.forward` in one pass: the norm of queries or keys, whichever attention processor calls it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, N, H, D] -> [B, N, H, D]."""
        reason = call_reason(hidden_states)
        if reason is None and (hidden_states.ndim not in (3, 4) or not hidden_states.dtype.is_floating_point):
            reason = "an unusual input is given"
        if reason is not None:
            note_fallback(self, reason)
            original: Tensor = super().forward(hidden_states)
            return original
        backend = self._vidkernels_backend("qk_norm_rope")
        return ops.qk_norm_rope(hidden_states, None, self.weight, eps=self.eps, backend=backend)[0]


def _like(weight: Tensor, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=weight.dtype, device=weight.device)


def _sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = block.attn1.to_q.weight
    width, context = weight.shape[1], block.attn1.add_k_proj.weight.shape[1]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool, device=weight.device)
    return (_like(weight, 2, 9, width), _like(weight, 2, 5, context), _like(weight, 2, width), mask), {}


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
