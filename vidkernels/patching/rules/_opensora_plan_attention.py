# SPDX-License-Identifier: Apache-2.0
"""The joint attention of Open-Sora-Plan 1.5's blocks: norms of queries and keys in one launch, one copy into the heads' layout.

Tokens are [N, B, D], samples innermost. Every k-th token, or every k-th group, makes a clip of its own where the block is sparse;
each of them sees the whole caption, and the caption's results are averaged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels.patching.rules import _dit_units as units
from vidkernels.patching.rules import _qk_norm_units as qk

Sizes = tuple[Any, Any, Any]


def attention_reason(attention: Any, home: Any) -> str | None:
    """Why an attention must be called instead of run from its projections and norms."""
    reason = units.processor_reason(attention, home.Attention, home.OpenSoraAttnProcessor2_0)
    if reason is None and home.npu_config is not None:
        reason = "it runs on an NPU"
    return reason


def attend(
    attention: Any, x: Tensor, text: Tensor, mask: Tensor | None, sizes: Sizes, tables: Any, home: Any, backend: str
) -> tuple[Tensor, Tensor]:
    """`OpenSoraAttnProcessor2_0.__call__`: video [N, B, D] and text [L, B, D] -> both; `tables`: what `RoPE3D` returns."""
    processor = attention.processor
    own = attention.to_q, attention.to_k, attention.to_v, attention.norm_q, attention.norm_k
    q, k, v, owned = _projected(attention, x, own, backend)
    q, k = _rotated(q, k, owned, tables, home)
    projections = attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
    added = (*projections, attention.norm_added_q, attention.norm_added_k)
    text_q, text_k, text_v, _ = _projected(attention, text, added, backend)
    q, padded = _joined(processor, q, text_q, sizes)
    k, _ = _joined(processor, k, text_k, sizes)
    v, _ = _joined(processor, v, text_v, sizes)
    del text_q, text_k, text_v
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)
    del q, k, v
    tokens = mixed.permute(2, 0, 1, 3).flatten(2)  # [S, clips, D]
    video, said = tokens.split([tokens.shape[0] - text.shape[0], text.shape[0]])
    if processor.sparse1d:
        video = processor._reverse_sparse_1d(video, *sizes, padded)
        said = processor._reverse_sparse_1d_enc(said)
    video = attention.to_out[1](attention.to_out[0](video))
    return video, said if attention.context_pre_only else attention.to_add_out(said)


def _projected(attention: Any, x: Tensor, layers: tuple[Any, ...], backend: str) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Queries and keys [N, B, H, D] behind their norms, values, and whether nobody else may hold queries or keys."""
    to_q, to_k, to_v, norm_q, norm_k = layers
    q, k, v = (layer(x).unflatten(-1, (attention.heads, -1)) for layer in (to_q, to_k, to_v))
    owned = not torch.is_grad_enabled()
    if qk.norms_reason([norm_q, norm_k]) is None:  # one launch
        q, k = qk.normalise(q, k, norm_q, norm_k, backend, inplace=units.may_overwrite(to_q, to_k))
    else:  # LayerNorms, and what a hook or another class must see
        q, k, owned = norm_q(q), norm_k(k), False
    return q, k, v, owned


def _rotated(q: Tensor, k: Tensor, owned: bool, tables: Any, home: Any) -> tuple[Tensor, Tensor]:
    """`apply_rotary_emb` of queries and keys, by the model's tables: their angles are rounded to its dtype."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return home.apply_rotary_emb(q, tables), home.apply_rotary_emb(k, tables)
    poses, *axes = tables
    wide = torch.promote_types(q.dtype, torch.float32)
    halves = [
        F.embedding(poses[i // 2], table[:, : table.shape[-1] // 2]).to(wide).unsqueeze(2)
        for i, table in enumerate(axes)
    ]  # cos and sin of each axis in turn, [N, B, 1, pairs]
    space = [torch.stack(halves[first::2], 3) for first in (2, 3)]  # [N, B, 1, 2, pairs]
    turns = [(halves[0], halves[1]), (space[0], space[1])]
    return _turned(q, turns, owned), _turned(k, turns, owned)


def _turned(x: Tensor, turns: list[tuple[Tensor, Tensor]], owned: bool) -> Tensor:
    """x [N, B, H, D], whose axes' first halves turn with their second ones, wide and rounded once; in place where it is ours."""
    y = x if owned else x.clone()
    unit = x.shape[-1] // 16
    for start, stop in units.parts(y.transpose(0, 1)):
        part = y[start:stop]
        wide = part.to(turns[0][0].dtype)
        frames, places = wide[..., : 4 * unit], wide[..., 4 * unit :]
        pairs = frames.unflatten(-1, (2, -1)).unbind(-2), places.unflatten(-1, (2, 2, -1)).unbind(-2)
        for (a, b), (cos, sin) in zip(pairs, turns, strict=True):
            c, s = cos[start:stop], sin[start:stop]
            crossed = a * s
            a.mul_(c).addcmul_(b, s, value=-1)
            b.mul_(c).add_(crossed)
        if wide is not part:
            part.copy_(wide)
    return y


def _joined(processor: Any, video: Tensor, text: Tensor, sizes: Sizes) -> tuple[Tensor, int]:
    """Tokens of both [N, B, H, D] and [L, B, H, D], by clip and head: [clips, H, S, D]; and the tokens that were padded."""
    count, padded = video.shape[2], 0
    if processor.sparse1d:
        rows, padded = processor._sparse_1d(video.flatten(2), *sizes)
        video = rows.unflatten(-1, (count, -1))
        text = processor._sparse_1d_enc(text.flatten(2)).unflatten(-1, (count, -1))
    return torch.cat([part.permute(1, 2, 0, 3) for part in (video, text)], 2), padded
