# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo's own blocks in float64, where they round to float32 in between and FlashAttention refuses them: for `verify`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
_NONE = (None, None, None)


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


def _masked(q: Tensor, k: Tensor, v: Tensor, text_mask: Any) -> Tensor:
    """Attention [B, N, H, D] -> [B, N, H * D] in which padding of the text, the last tokens, neither gives nor takes."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if text_mask is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    valid = F.pad(text_mask.bool(), (q.shape[2] - text_mask.shape[1], 0), value=True)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
    return mixed.transpose(1, 2).flatten(2) * valid[..., None]


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


def _heads(block: Any, kind: str, x: Tensor) -> list[Tensor]:
    """Queries, keys and values [B, N, H, D]."""
    if hasattr(block, f"{kind}_attn_qkv"):
        return list(getattr(block, f"{kind}_attn_qkv")(x).unflatten(2, (3, block.heads_num, -1)).unbind(2))
    return [getattr(block, f"{kind}_attn_{which}")(x).unflatten(2, (block.heads_num, -1)) for which in "qkv"]


def _double(block: Any, img: Tensor, txt: Tensor, vec: Tensor, tables: Any, mix: Any, first: Any) -> Pair:
    """Both streams; `mix` is the attention of [B, N + M, H, D]."""
    streams, found, tokens = {"img": img, "txt": txt}, [], img.shape[1]
    rows = {
        "img": _rows(block.img_mod, vec, 6, tokens, first),
        "txt": _rows(block.txt_mod, vec, 6, txt.shape[1], _NONE),
    }
    for kind, x in streams.items():
        q, k, v = _heads(block, kind, _modulated(getattr(block, f"{kind}_norm1"), x, *rows[kind][:2]))
        norms = (getattr(block, f"{kind}_attn_{which}_norm") for which in "qk")
        own = tables if kind == "img" else None
        found.append((*(_turned(_normed(n, t), own) for n, t in zip(norms, (q, k), strict=True)), v))
    mixed = mix(*(torch.cat(pair, 1) for pair in zip(*found, strict=True)))
    parts = {"img": mixed[:, :tokens], "txt": mixed[:, tokens:]}
    for kind, x in streams.items():
        _, _, gate, shift, scale, last_gate = rows[kind]
        x = x + gate * getattr(block, f"{kind}_attn_proj")(parts[kind])
        normed = _modulated(getattr(block, f"{kind}_norm2"), x, shift, scale)
        streams[kind] = x + last_gate * getattr(block, f"{kind}_mlp")(normed)
    return streams["img"], streams["txt"]


def _single(block: Any, x: Tensor, vec: Tensor, tables: Any, mix: Any, first: Any) -> Tensor:
    shift, scale, gate = _rows(block.modulation, vec, 3, x.shape[1], first)
    width = block.hidden_size
    wide = block.linear1(_modulated(block.pre_norm, x, shift, scale))
    q, k, v = wide[..., : 3 * width].unflatten(2, (3, block.heads_num, -1)).unbind(2)
    q, k = (_turned(_normed(n, t), tables) for n, t in ((block.q_norm, q), (block.k_norm, k)))
    return x + gate * block.linear2(torch.cat((mix(q, k, v), block.mlp_act(wide[..., 3 * width :])), 2))


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
    ) -> Pair:
        """Video [B, N, D] and text [B, M, D] -> (video, text)."""
        first = condition_type, token_replace_vec, frist_frame_token_num
        return _double(self, img, txt, vec, freqs_cis, lambda q, k, v: _mixed(q, k, v, cu_seqlens_q), first)


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
        first = condition_type, token_replace_vec, frist_frame_token_num
        return _single(self, x, vec, freqs_cis, lambda q, k, v: _mixed(q, k, v, cu_seqlens_q), first)


class ExactMaskedDouble(nn.Module):
    """The blocks whose attention takes the text's mask."""

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        freqs_cis: Any = None,
        text_mask: Any = None,
        *rest: Any,
        **more: Any,
    ) -> Pair:
        """Video [B, N, D] and text [B, M, D] -> (video, text)."""
        return _double(self, img, txt, vec, freqs_cis, lambda q, k, v: _masked(q, k, v, text_mask), _NONE)


class ExactMaskedSingle(nn.Module):
    """The same with one stream."""

    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        txt_len: int,
        freqs_cis: Any = None,
        text_mask: Any = None,
        *rest: Any,
        **more: Any,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return _single(self, x, vec, freqs_cis, lambda q, k, v: _masked(q, k, v, text_mask), _NONE)


def widen(block: nn.Module) -> nn.Module:
    """A copy of a block on float64."""
    double = block.double()
    double.__class__ = ExactDouble if hasattr(double, "img_mod") else ExactSingle
    return double


def widen_masked(block: nn.Module) -> nn.Module:
    """The same of a block whose attention takes the text's mask."""
    double = block.double()
    double.__class__ = ExactMaskedDouble if hasattr(double, "img_mod") else ExactMaskedSingle
    return double
