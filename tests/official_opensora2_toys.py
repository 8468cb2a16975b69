# SPDX-License-Identifier: Apache-2.0
"""A small transformer with the attributes, class names and results of Open-Sora 2.0's `mmdit`, written anew in plain PyTorch.

The official files are no package and not part of this one; their kernels (FlashAttention, Liger) need a GPU. What they compute in
float32 is computed in float64 here for float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Tables = tuple[Tensor, Tensor]


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, H, D]."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class LigerRopeFunction:
    @staticmethod
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tables:
        """[B, H, N, D], turned by halves."""

        def turned(x: Tensor) -> Tensor:
            first, second = wide(x).chunk(2, -1)
            return (wide(x) * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]).to(x.dtype)

        return turned(q), turned(k)


def apply_rope(q: Tensor, k: Tensor, table: Tensor) -> Tables:
    """[B, H, N, D], neighbours turned by matrices [B, 1, N, D / 2, 2, 2]."""

    def turned(x: Tensor) -> Tensor:
        return (wide(x).unflatten(-1, (-1, 1, 2)) * table).sum(-1).flatten(-2).to(x.dtype)

    return turned(q), turned(k)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Any) -> Tensor:
    q, k = apply_rope(q, k, pe) if isinstance(pe, Tensor) else LigerRopeFunction.apply(q, k, *pe)
    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).flatten(2)


def _angles(places: Tensor, width: int, theta: float, dtype: torch.dtype) -> Tensor:
    steps = torch.arange(0, width, 2, dtype=dtype, device=places.device) / width
    return places[..., None] * theta**-steps


def rope(places: Tensor, width: int, theta: float) -> Tensor:
    angles = _angles(places, width, theta, torch.float64)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2).float()


def liger_rope(places: Tensor, width: int, theta: float) -> Tables:
    angles = _angles(places, width, theta, torch.float32)
    return angles.cos(), angles.sin()


class EmbedND(nn.Module):
    def __init__(self, axes: tuple[int, ...], theta: float) -> None:
        super().__init__()
        self.axes_dim, self.theta = axes, theta

    def forward(self, ids: Tensor) -> Tensor:
        tables = [rope(ids[..., i], width, self.theta) for i, width in enumerate(self.axes_dim)]
        return torch.cat(tables, 2)[:, None]


class LigerEmbedND(EmbedND):
    def forward(self, ids: Tensor) -> Tables:
        pairs = [liger_rope(ids[..., i], width, self.theta) for i, width in enumerate(self.axes_dim)]
        cos, sin = (torch.cat(tables, -1).repeat(1, 1, 2) for tables in zip(*pairs, strict=True))
        return cos, sin


class FusedRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (F.rms_norm(wide(x), x.shape[-1:], eps=1e-6).to(x.dtype) * self.scale).to(x.dtype)


class QKNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = FusedRMSNorm(width), FusedRMSNorm(width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tables:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused_qkv = heads, fused
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm, self.proj = QKNorm(dim // heads), nn.Linear(dim, dim)

    def split(self, x: Tensor) -> list[Tensor]:
        """Queries and keys, normalised, and values: [B, H, N, D]."""
        parts = self.qkv(x).chunk(3, -1) if self.fused_qkv else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return normed(self, parts)


def normed(owner: Any, parts: Any) -> list[Tensor]:
    q, k, v = (part.unflatten(-1, (owner.num_heads, -1)).transpose(1, 2) for part in parts)
    return [*owner.norm(q, k, v), v]


class Rows(NamedTuple):
    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    def __init__(self, dim: int, double: bool) -> None:
        super().__init__()
        self.is_double, self.multiplier = double, 6 if double else 3
        self.lin = nn.Linear(dim, self.multiplier * dim)

    def forward(self, vec: Tensor) -> tuple[Rows, Rows | None]:
        rows = self.lin(F.silu(vec))[:, None].chunk(self.multiplier, -1)
        return Rows(*rows[:3]), Rows(*rows[3:]) if self.is_double else None


def _modulated(norm: Any, x: Tensor, rows: Rows) -> Tensor:
    return norm(x) * (1 + rows.scale) + rows.shift


def _norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class DoubleStreamBlockProcessor:
    def __call__(self, attn: Any, img: Tensor, txt: Tensor, vec: Tensor, pe: Any) -> Tables:
        (rows, later), (text_rows, text_later) = attn.img_mod(vec), attn.txt_mod(vec)
        image = attn.img_attn.split(_modulated(attn.img_norm1, img, rows))
        text = attn.txt_attn.split(_modulated(attn.txt_norm1, txt, text_rows))
        mixed = attention(*(torch.cat(pair, 2) for pair in zip(text, image, strict=True)), pe=pe)
        words = txt.shape[1]
        img = img + rows.gate * attn.img_attn.proj(mixed[:, words:])
        txt = txt + text_rows.gate * attn.txt_attn.proj(mixed[:, :words])
        img = img + later.gate * attn.img_mlp(_modulated(attn.img_norm2, img, later))
        return img, txt + text_later.gate * attn.txt_mlp(_modulated(attn.txt_norm2, txt, text_later))


class DoubleStreamBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.hidden_size, self.head_dim = heads, dim, dim // heads
        for name in ("img", "txt"):
            setattr(self, f"{name}_mod", Modulation(dim, True))
            setattr(self, f"{name}_norm1", _norm(dim))
            setattr(self, f"{name}_attn", SelfAttention(dim, heads, fused))
            setattr(self, f"{name}_norm2", _norm(dim))
            mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
            setattr(self, f"{name}_mlp", mlp)
        self.processor = DoubleStreamBlockProcessor()

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Any, **kwargs: Any) -> Tables:
        return self.processor(self, img, txt, vec, pe)


class SingleStreamBlockProcessor:
    def __call__(self, attn: Any, x: Tensor, vec: Tensor, pe: Any) -> Tensor:
        rows, _ = attn.modulation(vec)
        h, dim = _modulated(attn.pre_norm, x, rows), attn.hidden_size
        if attn.fused_qkv:
            *parts, hidden = attn.linear1(h).split([dim, dim, dim, attn.mlp_hidden_dim], -1)
        else:
            v, hidden = attn.v_mlp(h).split([dim, attn.mlp_hidden_dim], -1)
            parts = [attn.q_proj(h), attn.k_proj(h), v]
        mixed = attention(*normed(attn, parts), pe=pe)
        return x + rows.gate * attn.linear2(torch.cat((mixed, attn.mlp_act(hidden)), 2))


class SingleStreamBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.hidden_size, self.head_dim, self.fused_qkv = heads, dim, dim // heads, fused
        self.mlp_hidden_dim = hidden
        if fused:
            self.linear1 = nn.Linear(dim, 3 * dim + hidden)
        else:
            self.q_proj, self.k_proj, self.v_mlp = (
                nn.Linear(dim, dim),
                nn.Linear(dim, dim),
                nn.Linear(dim, dim + hidden),
            )
        self.linear2, self.norm, self.pre_norm = nn.Linear(dim + hidden, dim), QKNorm(dim // heads), _norm(dim)
        self.mlp_act, self.modulation = nn.GELU(approximate="tanh"), Modulation(dim, False)
        self.processor = SingleStreamBlockProcessor()

    def forward(self, x: Tensor, vec: Tensor, pe: Any, **kwargs: Any) -> Tensor:
        return self.processor(self, x, vec, pe)


class LastLayer(nn.Module):
    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.norm_final, self.linear = _norm(dim), nn.Linear(dim, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class MMDiTModel(nn.Module):
    """Its forward is an attribute of the instance, as upstream's is, which has two of them."""

    def __init__(
        self,
        dim: int = 32,
        heads: int = 2,
        axes: tuple[int, ...] = (4, 6, 6),
        depth: int = 1,
        singles: int = 2,
        fused: bool = True,
        liger: bool = False,
        theta: float = 10000.0,
    ) -> None:
        super().__init__()
        self.pe_embedder = (LigerEmbedND if liger else EmbedND)(axes, theta)
        self.img_in, self.txt_in, self.vector_in = nn.Linear(6, dim), nn.Linear(10, dim), nn.Linear(12, dim)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(dim, heads, 2 * dim, fused) for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(dim, heads, 2 * dim, fused) for _ in range(singles))
        self.final_layer, self.recomputes = LastLayer(dim, 6), False
        self.forward = self.forward_ckpt

    def enable_gradient_checkpointing(self) -> None:
        self.recomputes = True

    def through(self, block: Any, *call: Any) -> Any:
        return checkpoint(block, *call, use_reentrant=False) if self.recomputes else block(*call)

    def forward_ckpt(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y_vec: Tensor
    ) -> Tensor:
        img, txt = self.img_in(img), self.txt_in(txt)
        vec = self.vector_in(y_vec) + timesteps[:, None]
        pe = self.pe_embedder(torch.cat((txt_ids, img_ids), 1))
        for block in self.double_blocks:
            img, txt = self.through(block, img, txt, vec, pe)
        x = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            x = self.through(block, x, vec, pe)
        return self.final_layer(x[:, txt.shape[1] :], vec)
