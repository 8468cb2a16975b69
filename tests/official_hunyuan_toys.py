# SPDX-License-Identifier: Apache-2.0
"""A small transformer with the attributes, class names and results of HunyuanVideo-I2V's `hyvideo.modules`, written anew in plain
PyTorch; without its conditions it is HunyuanVideo's.

The official files are no package and not part of this one; their attention (FlashAttention) needs a GPU. What they compute in float32
is computed in float64 here for float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, batch_size: int = 1, **others: Any) -> Tensor:
    """[B, N, H, D] -> [B, N, H * D]; a sample and its padding, which begin at these tokens of all, do not see each other."""
    q, k, v = (x.view(-1, *x.shape[2:]) for x in (q, k, v))  # as FlashAttention is handed them
    part = torch.bucketize(torch.arange(q.shape[0], dtype=torch.int32, device=q.device), cu_seqlens_q[1:], right=True)
    mixed = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=part[:, None] == part)
    return mixed.transpose(0, 1).reshape(batch_size, -1, q.shape[1] * q.shape[2])


def parallel_attention(
    hybrid: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    img_q_len: int,
    img_kv_len: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
) -> Tensor:
    assert img_q_len == img_kv_len
    return hybrid(attention(q, k, v, cu_seqlens_q, q.shape[0]), img_q_len)


def get_cu_seqlens(mask: Tensor, image: int) -> Tensor:
    """0 and, for each sample, where its padding and the next sample begin."""
    ends = torch.arange(1, mask.shape[0] + 1, device=mask.device) * (mask.shape[1] + image)
    starts = torch.stack((ends - mask.shape[1] + mask.sum(1), ends), 1).flatten()
    return F.pad(starts, (1, 0)).int()


def reshape_for_broadcast(tables: Any, x: Tensor, head_first: bool = False) -> Any:
    assert tables[0].shape == (x.shape[1], x.shape[3])
    return tuple(table[None, :, None].to(x.device) for table in tables)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), -1).flatten(-2)


def apply_rotary_emb(q: Tensor, k: Tensor, tables: Any, head_first: bool = False) -> Any:
    """[B, N, H, D] by tables [N, D]."""
    cos, sin = reshape_for_broadcast(tables, q, head_first)
    return tuple((wide(x) * cos + rotate_half(wide(x)) * sin).to(x.dtype) for x in (q, k))


def rotary_tables(axes: tuple[int, ...], grid: tuple[int, ...], theta: float = 256.0) -> tuple[Tensor, Tensor]:
    places = torch.stack(torch.meshgrid(*(torch.arange(n * 1.0) for n in grid), indexing="ij"), -1).flatten(0, 2)
    pairs = [theta ** -(torch.arange(0, width, 2) / width) for width in axes]
    angles = torch.cat([places[:, i, None] * pairs[i] for i in range(len(axes))], 1).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(wide(x)).to(x.dtype) * self.weight


class ModulateDiT(nn.Module):
    def __init__(self, dim: int, factor: int) -> None:
        super().__init__()
        self.act, self.linear = nn.SiLU(), nn.Linear(dim, factor * dim)

    def forward(self, x: Tensor, condition_type: Any = None, token_replace_vec: Any = None) -> Any:
        rows = self.linear(self.act(x))
        return (rows, self.linear(self.act(token_replace_vec))) if condition_type == "token_replace" else rows


def chosen(row: Tensor, first: Tensor | None, tokens: int, count: Any) -> Tensor:
    """Rows [B, D] for tokens [B, N, D], of which the first `count` have their own."""
    if first is None:
        return row[:, None]
    return torch.where((torch.arange(tokens, device=row.device) < count)[:, None], first[:, None], row[:, None])


def modulate(x: Tensor, shift: Tensor, scale: Tensor, first: Any = (None, None), count: Any = None) -> Tensor:
    tokens = x.shape[1]
    return x * (1 + chosen(scale, first[1], tokens, count)) + chosen(shift, first[0], tokens, count)


def apply_gate(x: Tensor, gate: Tensor, first: Tensor | None = None, count: Any = None) -> Tensor:
    return x * chosen(gate, first, x.shape[1], count)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.norm_final, self.linear = nn.LayerNorm(dim, 1e-6, False), nn.Linear(dim, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class _Block(nn.Module):
    hybrid_seq_parallel_attn: Any = None

    def rows(self, modulation: Any, vec: Tensor, count: int, kind: Any, condition: Any) -> tuple[Any, Any]:
        if kind != "token_replace":
            return modulation(vec).chunk(count, -1), (None,) * count
        return tuple(rows.chunk(count, -1) for rows in modulation(vec, kind, condition))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, image: int, starts: Tensor, most: int) -> Tensor:
        if self.hybrid_seq_parallel_attn:
            return parallel_attention(self.hybrid_seq_parallel_attn, q, k, v, image, image, starts, starts)
        lengths = {"cu_seqlens_q": starts, "cu_seqlens_kv": starts, "max_seqlen_q": most, "max_seqlen_kv": most}
        return attention(q, k, v, **lengths, batch_size=q.shape[0])


class MMDoubleStreamBlock(_Block):
    def __init__(self, dim: int, heads: int, norm: Any = RMSNorm) -> None:
        super().__init__()
        self.heads_num = heads
        for kind in ("img", "txt"):
            setattr(self, f"{kind}_mod", ModulateDiT(dim, 6))
            setattr(self, f"{kind}_norm1", nn.LayerNorm(dim, 1e-6, False))
            setattr(self, f"{kind}_attn_qkv", nn.Linear(dim, 3 * dim))
            setattr(self, f"{kind}_attn_q_norm", norm(dim // heads))
            setattr(self, f"{kind}_attn_k_norm", norm(dim // heads))
            setattr(self, f"{kind}_attn_proj", nn.Linear(dim, dim))
            setattr(self, f"{kind}_norm2", nn.LayerNorm(dim, 1e-6, False))
            setattr(self, f"{kind}_mlp", MLP(dim, 2 * dim))

    def split(self, kind: str, x: Tensor, rows: Any, first: Any, count: Any) -> list[Tensor]:
        parts = self._modules
        x = modulate(parts[f"{kind}_norm1"](x), rows[0], rows[1], first[:2], count)
        q, k, v = parts[f"{kind}_attn_qkv"](x).unflatten(2, (3, self.heads_num, -1)).unbind(2)
        return [parts[f"{kind}_attn_q_norm"](q).to(v), parts[f"{kind}_attn_k_norm"](k).to(v), v]

    def end(self, kind: str, x: Tensor, branch: Tensor, rows: Any, first: Any, count: Any) -> Tensor:
        parts = self._modules
        x = x + apply_gate(parts[f"{kind}_attn_proj"](branch), rows[2], first[2], count)
        normed = modulate(parts[f"{kind}_norm2"](x), rows[3], rows[4], first[3:5], count)
        return x + apply_gate(parts[f"{kind}_mlp"](normed), rows[5], first[5], count)

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
        count, tokens = frist_frame_token_num, img.shape[1]
        rows, first = self.rows(self.img_mod, vec, 6, condition_type, token_replace_vec)
        text_rows, none = self.rows(self.txt_mod, vec, 6, None, None)
        q, k, v = self.split("img", img, rows, first, count)
        if freqs_cis is not None:
            q, k = apply_rotary_emb(q, k, freqs_cis)
        text = self.split("txt", txt, text_rows, none, None)
        joined = [torch.cat(pair, 1) for pair in zip((q, k, v), text, strict=True)]
        mixed = self.mixed(*joined, tokens, cu_seqlens_q, max_seqlen_q)
        img = self.end("img", img, mixed[:, :tokens], rows, first, count)
        return img, self.end("txt", txt, mixed[:, tokens:], text_rows, none, None)


class MMSingleStreamBlock(_Block):
    def __init__(self, dim: int, heads: int, norm: Any = RMSNorm) -> None:
        super().__init__()
        self.hidden_size, self.heads_num, self.mlp_hidden_dim = dim, heads, 2 * dim
        self.linear1, self.linear2 = nn.Linear(dim, 5 * dim), nn.Linear(3 * dim, dim)
        self.q_norm, self.k_norm, self.pre_norm = norm(dim // heads), norm(dim // heads), nn.LayerNorm(dim, 1e-6, False)
        self.mlp_act, self.modulation = nn.GELU(approximate="tanh"), ModulateDiT(dim, 3)

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
        count, image = frist_frame_token_num, x.shape[1] - txt_len
        rows, first = self.rows(self.modulation, vec, 3, condition_type, token_replace_vec)
        h = self.linear1(modulate(self.pre_norm(x), rows[0], rows[1], first[:2], count))
        qkv, hidden = h.split([3 * self.hidden_size, self.mlp_hidden_dim], -1)
        q, k, v = qkv.unflatten(2, (3, self.heads_num, -1)).unbind(2)
        q, k = self.q_norm(q).to(v), self.k_norm(k).to(v)
        if freqs_cis is not None:
            turned = apply_rotary_emb(q[:, :image], k[:, :image], freqs_cis)
            q, k = (torch.cat((part, whole[:, image:]), 1) for part, whole in zip(turned, (q, k), strict=True))
        mixed = self.mixed(q, k, v, image, cu_seqlens_q, max_seqlen_q)
        y = self.linear2(torch.cat((mixed, self.mlp_act(hidden)), 2))
        return x + apply_gate(y, rows[2], first[2], count)


class HYVideoDiffusionTransformer(nn.Module):
    kinds: Any = (MMDoubleStreamBlock, MMSingleStreamBlock)

    def __init__(
        self, heads: int = 2, axes: tuple[int, ...] = (4, 14, 14), singles: int = 2, theta: float = 256.0
    ) -> None:
        super().__init__()
        dim = heads * sum(axes)
        self.axes, self.theta, self.recomputes, self.condition = axes, theta, False, None
        self.img_in, self.txt_in, self.vector_in = nn.Linear(6, dim), nn.Linear(10, dim), nn.Linear(12, dim)
        self.double_blocks = nn.ModuleList([self.kinds[0](dim, heads)])
        self.single_blocks = nn.ModuleList(self.kinds[1](dim, heads) for _ in range(singles))
        self.final_layer = FinalLayer(dim, 6)

    def enable_gradient_checkpointing(self) -> None:
        self.recomputes = True

    def through(self, block: Any, *call: Any) -> Any:
        return checkpoint(block, *call, use_reentrant=False) if self.recomputes else block(*call)

    def forward(
        self, img: Tensor, txt: Tensor, mask: Tensor, vec: Tensor, grid: tuple[int, ...], t: Any = None
    ) -> Tensor:
        img, txt, vec = self.img_in(img), self.txt_in(txt), self.vector_in(vec)
        vec = vec if t is None else vec + t[:, None]
        tokens, words = img.shape[1], txt.shape[1]
        rest = self.told(mask, tokens, vec, grid)
        for block in self.double_blocks:
            img, txt = self.through(block, img, txt, vec, *rest)
        x = torch.cat((img, txt), 1)
        for block in self.single_blocks:
            x = self.through(block, x, vec, words, *rest)
        return self.final_layer(x[:, :tokens], vec)

    def told(self, mask: Tensor, tokens: int, vec: Tensor, grid: tuple[int, ...]) -> list[Any]:
        """What blocks are given behind streams and condition."""
        starts, most = get_cu_seqlens(mask, tokens), tokens + mask.shape[1]
        told = [starts, starts, most, most, self.tables(grid)]
        return told if self.condition is None else [*told, self.condition, vec.sin(), grid[1] * grid[2]]

    def tables(self, grid: tuple[int, ...]) -> Any:
        return rotary_tables(self.axes, grid, self.theta)
