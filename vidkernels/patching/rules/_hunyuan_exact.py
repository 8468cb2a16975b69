# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo's own blocks in float64, where they round to float32 in between and FlashAttention refuses them: for `verify`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _normed(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def _turned(x: Tensor, tables: Any) -> Tensor:
    """The first tokens of [B, N, H, D] by tables for them."""
    if tables is None:
        return x
    cos, sin = (table.double()[:, None] for table in tables)
    part, rest = x.split((cos.shape[0], x.shape[1] - cos.shape[0]), 1)
    a, b = part.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((part * cos + torch.stack((-b, a), -1).flatten(-2) * sin, rest), 1)


def _mixed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """Attention [B, N, H, D] -> [B, N, H * D] within the parts of all tokens that begin at `starts`."""
    batch, tokens = q.shape[:2]
    places = torch.arange(batch * tokens, device=q.device)
    part = torch.bucketize(places, starts[1:].to(places.dtype), right=True).view(batch, 1, tokens)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = part[..., None] == part[:, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _rows(modulation: Any, vec: Tensor, count: int, tokens: int, first: tuple[Any, Any, Any]) -> tuple[Tensor, ...]:
    """Rows of modulation [B, 1 or N, D]: the first tokens may have a condition of their own."""
    rows = modulation.linear(F.silu(vec))[:, None]
    kind, condition, number = first
    if kind == "token_replace":
        own = modulation.linear(F.silu(condition))[:, None]
        is_first = (torch.arange(tokens, device=vec.device) < number)[:, None]
        rows = torch.where(is_first, own, rows)
    return rows.chunk(count, -1)


def _modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed: Tensor = norm(x)
    return normed * (1 + scale) + shift


class ExactDouble(nn.Module):
    """`MMDoubleStreamBlock` with upstream's arguments."""

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        cu_seqlens_q: Any = None,
        cu_seqlens_kv: Any = None,
        max_seqlen_q: Any = None,
        max_seqlen_kv: Any = None,
        freqs_cis: Any = None,
        condition_type: Any = None,
        token_replace_vec: Any = None,
        frist_frame_token_num: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Video [B, N, D] and text [B, M, D] -> (video, text)."""
        block: Any = self
        first = condition_type, token_replace_vec, frist_frame_token_num
        streams, found, tokens = {"img": img, "txt": txt}, [], img.shape[1]
        rows = {
            "img": _rows(block.img_mod, vec, 6, tokens, first),
            "txt": _rows(block.txt_mod, vec, 6, txt.shape[1], (None, None, None)),
        }
        for kind, x in streams.items():
            shift, scale = rows[kind][:2]
            normed = _modulated(getattr(block, f"{kind}_norm1"), x, shift, scale)
            q, k, v = getattr(block, f"{kind}_attn_qkv")(normed).unflatten(2, (3, block.heads_num, -1)).unbind(2)
            tables = freqs_cis if kind == "img" else None
            norms = (getattr(block, f"{kind}_attn_{which}_norm") for which in "qk")
            found.append((*(_turned(_normed(n, t), tables) for n, t in zip(norms, (q, k), strict=True)), v))
        q, k, v = (torch.cat(pair, 1) for pair in zip(*found, strict=True))
        mixed = _mixed(q, k, v, cu_seqlens_q)
        parts = {"img": mixed[:, :tokens], "txt": mixed[:, tokens:]}
        for kind, x in streams.items():
            _, _, gate, shift, scale, last_gate = rows[kind]
            x = x + gate * getattr(block, f"{kind}_attn_proj")(parts[kind])
            normed = _modulated(getattr(block, f"{kind}_norm2"), x, shift, scale)
            streams[kind] = x + last_gate * getattr(block, f"{kind}_mlp")(normed)
        return streams["img"], streams["txt"]


class ExactSingle(nn.Module):
    """`MMSingleStreamBlock` with upstream's arguments."""

    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        txt_len: int,
        cu_seqlens_q: Any = None,
        cu_seqlens_kv: Any = None,
        max_seqlen_q: Any = None,
        max_seqlen_kv: Any = None,
        freqs_cis: Any = None,
        condition_type: Any = None,
        token_replace_vec: Any = None,
        frist_frame_token_num: Any = None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        block: Any = self
        first = condition_type, token_replace_vec, frist_frame_token_num
        shift, scale, gate = _rows(block.modulation, vec, 3, x.shape[1], first)
        width = block.hidden_size
        wide = block.linear1(_modulated(block.pre_norm, x, shift, scale))
        q, k, v = wide[..., : 3 * width].unflatten(2, (3, block.heads_num, -1)).unbind(2)
        q, k = (_turned(_normed(n, t), freqs_cis) for n, t in ((block.q_norm, q), (block.k_norm, k)))
        mixed = _mixed(q, k, v, cu_seqlens_q)
        return x + gate * block.linear2(torch.cat((mixed, block.mlp_act(wide[..., 3 * width :])), 2))


def widen(block: nn.Module) -> nn.Module:
    """A copy of a block on float64."""
    double = block.double()
    double.__class__ = ExactDouble if hasattr(double, "img_mod") else ExactSingle
    return double
