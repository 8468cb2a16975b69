# SPDX-License-Identifier: Apache-2.0
"""Rule for the blocks of diffusers' `AllegroTransformer3DModel`: the adaLN-single chain around its attentions, and the
rotation of queries and keys."""

from __future__ import annotations

import sys
from math import atan2
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import call_reason, child_reason, guarded, is_autocast, note_fallback
from vidkernels.patching._match import digest
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching._values import ReadOnce
from vidkernels.patching.rules import _dit_units as dit
from vidkernels.patching.rules import _latte_units as units
from vidkernels.patching.rules import _qk_norm_units as qk

_ALLEGRO = "diffusers.models.transformers.transformer_allegro"
_EMBEDDINGS = "diffusers.models.embeddings"
_ROTATES = ("ef64480bd1b758bc",)  # digests of `apply_rotary_emb_allegro`, which its attention imports at each call
_THETA = 10000.0


class BlockForward(Fused):
    """`AllegroTransformerBlock.forward`. Projections and MLP are called as modules, the attention of the caption, too."""

    @guarded
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        temb: Any = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        chain = units.Chain(self, temb, self._vidkernels_backend("adaln_zero"))
        x, normed = chain.start(hidden_states)
        branch = _attend(self, normed, attention_mask, image_rotary_emb)
        if self.attn2 is None:
            x, normed = chain.between(x, branch)
        else:
            x = chain.before_cross(x, branch)
            options = {"attention_mask": encoder_attention_mask, "image_rotary_emb": None}
            branch = self.attn2(x, encoder_hidden_states=encoder_hidden_states, **options)
            x, normed = chain.after_cross(x, branch)
        return chain.end(x, units.feed_forward(self.ff, normed))

    def _reason(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, temb: Tensor | None, **rest: Any
    ) -> str | None:
        reason = call_reason(hidden_states, encoder_hidden_states, temb)
        reason = reason or child_reason(self.norm1, nn.LayerNorm) or child_reason(self.norm2, nn.LayerNorm)
        # With one token the original's `squeeze(1)` drops the axis of tokens.
        if reason is None and (temb is None or hidden_states.ndim != 3 or hidden_states.shape[1] == 1):
            reason = "an unusual input is given"
        return reason


def _attend(block: Any, x: Tensor, mask: Tensor | None, tables: Any) -> Tensor:
    """Self-attention, in half precision with the rotation of queries and keys in one launch; else the module itself."""
    attention, device = block.attn1, x.device.type
    dtype = torch.get_autocast_dtype(device) if is_autocast(x) else x.dtype
    rotated = {} if tables is None or not qk.rounds_angles(dtype) else _rotation(*tables)
    if rotated:
        reason = units.attention_reason(attention, block._vidkernels_home.AllegroAttnProcessor2_0)
        if reason is None:
            return _rotated_attention(block, x, mask, rotated)
        note_fallback(block, reason)
    called: Tensor = attention(x, encoder_hidden_states=None, attention_mask=mask, image_rotary_emb=tables)
    return called


def _rotated_attention(block: Any, x: Tensor, mask: Tensor | None, rotated: dict[str, Any]) -> Tensor:
    """`AllegroAttnProcessor2_0` on [B, N, D]."""
    attention, backend = block.attn1, block._vidkernels_backend("qk_norm_rope")
    q, k, v = (qk.heads(layer(x), attention.heads) for layer in (attention.to_q, attention.to_k, attention.to_v))
    rotated["inplace"] = dit.may_overwrite(attention.to_q, attention.to_k)
    q, k = ops.qk_norm_rope(q, k, norm=None, backend=backend, **rotated)
    if mask is not None:
        batch, tokens, _ = x.shape
        mask = attention.prepare_attention_mask(mask, tokens, batch).view(batch, attention.heads, -1, tokens)
    queries, keys, values = (part.transpose(1, 2) for part in (q, qk.by_head(k), qk.by_head(v)))
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    result: Tensor = attention.to_out[1](attention.to_out[0](mixed.transpose(1, 2).flatten(2)))
    return result


def _rotation(tables: Any, places: Any) -> dict[str, Any]:
    """Arguments of `ops.qk_norm_rope`, or none where the tables hold other angles than Allegro's or cannot be read now.

    Args:
        tables: (cos, sin) [positions, D / 3] of each axis.
        places: position [1 or B, N] of every token on each axis.
    """
    tensors = [*places, *(part for table in tables for part in table)]
    if torch.compiler.is_compiling() or any(type(x) is not Tensor or x.requires_grad for x in tensors):
        return {}
    scales = [_scale(cos, sin) for cos, sin in tables]
    if None in scales:
        return {}
    positions = torch.stack(places, -1)
    axes = tuple(cos.shape[-1] for cos, _ in tables)
    options = {"axes": axes, "theta": _THETA, "position_scale": scales, "layout": "axis_half"}
    return {"positions": positions[0] if positions.shape[0] == 1 else positions, **options}


def _find_scale(cos: Tensor, sin: Tensor) -> float | None:
    """What positions are multiplied with in a table; None if its angles are no multiples of Allegro's."""
    if cos.device.type == "meta" or cos.ndim != 2 or sin.shape != cos.shape or cos.shape[1] % 2 or not cos.numel():
        return None
    cos, sin = cos.detach().cpu().double(), sin.detach().cpu().double()
    scale = atan2(float(sin[1, 0]), float(cos[1, 0])) if cos.shape[0] > 1 else 1.0
    pairs = _THETA ** (-torch.arange(0, cos.shape[1], 2, dtype=torch.float64) / cos.shape[1])
    angles = scale * torch.arange(cos.shape[0], dtype=torch.float64)[:, None] * pairs.repeat(2)
    error = max(float((cos - angles.cos()).abs().max()), float((sin - angles.sin()).abs().max()))
    # The tables' angles are float32; a quarter of float16's rounding hides that.
    return scale if error <= 2.0**-13 else None


_scale = ReadOnce(_find_scale)


def _check(block: Any) -> str | None:
    known = digest(getattr(sys.modules[_EMBEDDINGS], "apply_rotary_emb_allegro", None)) in _ROTATES
    return None if known else "its attention rotates by other code than diffusers 0.42"


def _sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    table = block.scale_shift_table
    options = {"dtype": table.dtype, "device": table.device}
    width, context = table.shape[1], block.attn2.to_k.in_features
    arguments = (torch.randn(2, 12, width, **options), torch.randn(2, 5, context, **options))
    rotary = _sample_rotary(width // block.attn1.heads // 3, table.device)
    return (*arguments, torch.randn(2, 6 * width, **options)), {"image_rotary_emb": rotary}


def _sample_rotary(width: int, device: torch.device) -> Any:
    """Tables and places of 2 x 2 x 3 tokens."""
    pairs = _THETA ** (-torch.arange(0, width, 2, device=device) / width)
    angles = [torch.arange(size, device=device)[:, None] / 2.0 * pairs.repeat(2) for size in (2, 2, 3)]
    places = torch.cartesian_prod(*(torch.arange(size, device=device) for size in (2, 2, 3)))
    return [(angle.cos(), angle.sin()) for angle in angles], [place[None] for place in places.T]


RULES = (
    Rule(
        name="diffusers.allegro_block",
        ops=("adaln_zero", "qk_norm_rope"),
        targets=(f"{_ALLEGRO}:AllegroTransformerBlock",),
        mixin=BlockForward,
        digests={
            "AllegroTransformerBlock.forward": ("10e0db050b0a1093",),
            "AllegroAttnProcessor2_0.__call__": ("abb266f09fdcc89c",),
            "Attention.forward": ("b329f38beafa4c39",),
        },
        check=_check,
        sample=_sample,
        tested_versions=("diffusers 0.42.1",),
    ),
)
