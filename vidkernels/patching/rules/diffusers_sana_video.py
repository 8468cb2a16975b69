# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks of diffusers' `SanaVideoTransformer3DModel`: adaLN-single around linear attention and a convolutional
MLP, which stay upstream's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _adaln_zero_units as units
from vidkernels.patching.rules._dit_units import sample_tables

_HOME = "diffusers.models.transformers.transformer_sana_video"


class BlockForward(Fused):
    """`SanaVideoTransformerBlock.forward`."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """[B, N, D] with N = frames * height * width, caption [B, M, D'], modulation [B, 1 or N, 6 D] -> [B, N, D]."""
        assert timestep is not None
        rows = self.scale_shift_table[None, None] + timestep.unflatten(2, (6, -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(2)
        stream = units.Stream(hidden_states, gate1, self._vidkernels_backend("adaln_zero"))
        normed = stream.open(self.norm1, shift1, scale1).to(hidden_states.dtype)
        x = stream.add(self.attn1(normed, rotary_emb=rotary_emb), gate1)
        context = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
        normed = stream.seam(self.attn2(x, **context), None, self.norm2, shift2, scale2)
        # upstream's MLP views its tokens as frames, so they have to lie in their order
        branch = self.ff(normed.contiguous().unflatten(1, (frames, height, width))).flatten(1, 3)
        return stream.add(branch, gate2)

    def _reason(self, hidden_states: Tensor, timestep: Tensor | None, **rest: Any) -> str | None:
        reason = call_reason(hidden_states, timestep) or (None if timestep is not None else "no modulation is given")
        return reason or child_reason(self.norm1, nn.LayerNorm) or child_reason(self.norm2, nn.LayerNorm)


def _sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight, width = block.attn1.to_q.weight, block.scale_shift_table.shape[-1]

    def like(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=weight.dtype, device=weight.device)

    context = like(2, 5, block.attn2.cross_attention_dim)
    tables = sample_tables(8, width // block.attn1.heads, weight.device, (1,), (1,))
    return (like(2, 8, width), None, context, None, like(2, 1, 6 * width), 2, 2, 2, tables), {}


def _check(block: Any) -> str | None:
    return None if getattr(block, "attn2", None) is not None else "it has no attention over a caption"


RULES = (
    Rule(
        name="diffusers.sana_video_block",
        ops=("adaln_zero",),
        targets=(f"{_HOME}:SanaVideoTransformerBlock",),
        mixin=BlockForward,
        digests={"SanaVideoTransformerBlock.forward": ("816d7815735cf3fc",)},
        check=_check,
        sample=_sample,
        tested_versions=("diffusers 0.42.1",),
    ),
)
