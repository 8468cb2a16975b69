# SPDX-License-Identifier: Apache-2.0
"""A transformer of our own in the place of the official Wan 2.1: the same layers under the same names and the same results.
`official_wan_toys_2_2` has what differs in 2.2. On float64 it stays there, which the official code does not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

T5_CONTEXT_TOKEN_NUMBER = 6


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor | None = None, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    mask = None if k_lens is None else (torch.arange(k.shape[1]) < k_lens[:, None])[:, None, None]
    heads = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).to(q.dtype)


def rope_params(positions: int, dims: int, theta: float = 10000.0) -> Tensor:
    angles = torch.arange(positions)[:, None] / theta ** (torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    return torch.polar(torch.ones_like(angles), angles)


def rope_apply(x: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
    third = x.shape[3] // 6
    tables = freqs.split((x.shape[3] // 2 - 2 * third, third, third), 1)
    pairs = torch.view_as_complex(x.double().unflatten(3, (-1, 2)).contiguous())
    turned = []
    for clip, sizes in zip(pairs, grid_sizes.tolist(), strict=True):
        axes = [
            table[:size].reshape([-1 if i == axis else 1 for i in range(3)] + [table.shape[1]])
            for axis, (table, size) in enumerate(zip(tables, sizes, strict=True))
        ]
        turns = torch.cat([part.expand(*sizes, -1) for part in axes], -1).flatten(0, 2)
        count = turns.shape[0]
        turned.append(torch.cat((clip[:count] * turns[:, None], clip[count:])))
    return torch.view_as_real(torch.stack(turned)).flatten(3).to(wide(x).dtype)


class WanRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.eps, self.weight = dim, eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(wide(x)).to(x.dtype) * self.weight

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class WanLayerNorm(nn.LayerNorm):
    def __init__(self, dim: int, affine: bool = False) -> None:
        super().__init__(dim, eps=1e-6, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(wide(x)).to(x.dtype)


class WanSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool = True) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.window_size, self.qk_norm = (-1, -1), qk_norm
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (WanRMSNorm(dim, 1e-6) if qk_norm else nn.Identity() for _ in range(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1))

    def forward(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
        q, k = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(x)))
        q, k = (rope_apply(part, grid_sizes, freqs) for part in (q, k))
        return self.o(flash_attention(q, k, self.heads(self.v(x)), seq_lens, self.window_size).flatten(2))


class WanT2VCrossAttention(WanSelfAttention):
    def forward(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> Tensor:  # type: ignore[override]
        q, k = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(context)))
        return self.o(flash_attention(q, k, self.heads(self.v(context)), context_lens).flatten(2))


class WanI2VCrossAttention(WanSelfAttention):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool = True) -> None:
        super().__init__(dim, num_heads, qk_norm)
        self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_k_img = WanRMSNorm(dim, 1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> Tensor:  # type: ignore[override]
        text = context[:, -T5_CONTEXT_TOKEN_NUMBER:]
        image = context[:, : context.shape[1] - T5_CONTEXT_TOKEN_NUMBER]
        q, k = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(text)))
        seen = flash_attention(q, k, self.heads(self.v(text)), context_lens)
        k = self.heads(self.norm_k_img(self.k_img(image)))
        return self.o(seen.flatten(2) + flash_attention(q, k, self.heads(self.v_img(image))).flatten(2))


class WanAttentionBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, cross: type, normed: bool = True, qk_norm: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.norm1, self.norm2 = WanLayerNorm(dim), WanLayerNorm(dim)
        self.norm3 = WanLayerNorm(dim, True) if normed else nn.Identity()
        self.self_attn, self.cross_attn = WanSelfAttention(dim, num_heads, qk_norm), cross(dim, num_heads, qk_norm)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        seq_lens: Tensor,
        grid_sizes: Tensor,
        freqs: Tensor,
        context: Tensor,
        context_lens: Tensor | None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e).unsqueeze(1).unbind(2)
        x = x + gate1 * self.self_attn(wide(self.norm1(x)) * (1 + scale1) + shift1, seq_lens, grid_sizes, freqs)
        x = x + self.cross_attn(self.norm3(x), context, context_lens)
        return x + gate2 * self.ffn(wide(self.norm2(x)) * (1 + scale2) + shift2)


class Head(nn.Module):
    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.dim, self.patch_size = dim, (1, 2, 2)
        self.norm, self.head = WanLayerNorm(dim), nn.Linear(dim, out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation + e[:, None]).unsqueeze(1).unbind(2)
        return self.head(self.norm(x) * (1 + scale) + shift)


class Toy(nn.Module):
    """Two blocks and the head."""

    def __init__(self, home: Any, dim: int = 48, num_heads: int = 2, cross: str = "", **options: Any) -> None:
        super().__init__()
        kind = getattr(home, cross or "WanT2VCrossAttention")
        self.blocks = nn.ModuleList(home.WanAttentionBlock(dim, num_heads, kind, **options) for _ in range(2))
        self.head, self.checkpointed = home.Head(dim, 12), False
        width = dim // num_heads
        third = 2 * (width // 6)
        self.freqs = torch.cat([rope_params(32, dims) for dims in (width - 2 * third, third, third)], 1)

    def enable_gradient_checkpointing(self) -> None:
        self.checkpointed = True

    def forward(
        self, hidden_states: Tensor, rows: Tensor, embedding: Tensor, context: Tensor, sizes: Tensor, lens: Any = None
    ) -> Tensor:
        x = hidden_states
        for block in self.blocks:
            call = x, rows, sizes.prod(1), sizes, self.freqs, context, lens
            x = checkpoint(block, *call, use_reentrant=False) if self.checkpointed else block(*call)
        return self.head(x, embedding)
