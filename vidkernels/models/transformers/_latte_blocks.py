# SPDX-License-Identifier: Apache-2.0
"""Blocks of Latte over tokens [B, F, S, D]. The adaLN-Zero chain between attention and MLP is one op."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.models.transformers._parts import Mlp, attend, split_heads, zero

NORM_EPS = 1e-6
Rows = Callable[[], Tensor]


class SelfAttention(nn.Module):
    """Multi-head attention with one qkv projection, rows ordered [q; k; v]; keys `qkv`, `proj`."""

    def __init__(self, hidden_size: int, num_heads: int, *, halves: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size // 2 if halves else hidden_size, hidden_size)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] -> q, k, v [..., A, d], views of one projection."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return split_heads(q, self.num_heads), split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def forward(self, x: Tensor, axis: str, frames: int | None = None) -> Tensor:
        """x [B, F, S, D] -> the same shape. `both`: half of the heads attend over each axis and their results are added.

        frames: those of the video; images behind them have no neighbours in time: nothing is added for them.
        """
        q, k, v = self.heads(x)
        if axis != "both":
            return self.proj(attend(q, k, v, axis))
        half = self.num_heads // 2
        space = attend(q[..., :half, :], k[..., :half, :], v[..., :half, :], "space")
        q, k, v = (part[:, :frames, :, half:] for part in (q, k, v))
        return self.proj(space + _with_images(attend(q, k, v, "time"), x.shape[1]))


def _with_images(video: Tensor, total: int) -> Tensor:
    """[B, F, S, D] -> [B, total, S, D], zero for the images behind the video."""
    images = total - video.shape[1]
    return F.pad(video, (0, 0, 0, 0, 0, images)) if images else video


def _modulation(hidden_size: int, chunks: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, chunks * hidden_size))


class LatteBlock(nn.Module):
    """adaLN-Zero block: x += gate1 * Attn(mod1(LN x)); x += gate2 * MLP(mod2(LN x)).

    Args:
        axis: "space", "time" or "both" (variant 4).
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, axis: str) -> None:
        super().__init__()
        self.axis = axis
        self.attn = SelfAttention(hidden_size, num_heads, halves=axis == "both")
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = _modulation(hidden_size, 6)

    def zero_gates(self) -> None:
        """Start as the identity."""
        zero(self.adaLN_modulation[1])

    def forward(self, x: Tensor, condition: Tensor, frames: int | None = None, rows: Rows | None = None) -> Tensor:
        """x [B, F, S, D]; condition [B, D] or one row per frame [B, F, D]; frames: of the video, where images follow it; rows:
        the projected condition, where all blocks' were projected together."""
        projected = self.adaLN_modulation(condition) if rows is None else rows()
        shift1, scale1, gate1, shift2, scale2, gate2 = projected.chunk(6, dim=-1)
        tokens = x.flatten(1, 2)
        normed = ops.adaln_modulate(tokens, shift1, scale1, eps=NORM_EPS)
        branch = self.attn(normed.unflatten(1, x.shape[1:3]), self.axis, frames).flatten(1, 2)
        tokens, normed = ops.adaln_zero(tokens, branch, gate1, shift2, scale2, eps=NORM_EPS)
        return ops.gate_residual(tokens, self.mlp(normed), gate2).unflatten(1, x.shape[1:3])


class SerialBlock(nn.Module):
    """Variant 3: spatial attention, temporal attention, MLP in one block, each with its own shift, scale and gate."""

    axis = "both"

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = SelfAttention(hidden_size, num_heads)
        self.attn_temporal = SelfAttention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = _modulation(hidden_size, 9)

    def zero_gates(self) -> None:
        """Start as the identity."""
        zero(self.adaLN_modulation[1])

    def forward(self, x: Tensor, condition: Tensor, frames: int | None = None, rows: Rows | None = None) -> Tensor:
        """As `LatteBlock`."""
        projected = self.adaLN_modulation(condition) if rows is None else rows()
        parts = projected.chunk(9, dim=-1)
        grid, tokens = x.shape[1:3], x.flatten(1, 2)
        normed = ops.adaln_modulate(tokens, parts[0], parts[1], eps=NORM_EPS)
        for index, (attention, axis) in enumerate(((self.attn, "space"), (self.attn_temporal, "time"))):
            branch = normed.unflatten(1, grid)
            branch = attention(branch if axis == "space" else branch[:, :frames], axis)
            branch = _with_images(branch, grid[0]).flatten(1, 2)
            gate, shift, scale = parts[3 * index + 2 : 3 * index + 5]
            tokens, normed = ops.adaln_zero(tokens, branch, gate, shift, scale, eps=NORM_EPS)
        return ops.gate_residual(tokens, self.mlp(normed), parts[8]).unflatten(1, grid)


class TokenBlock(nn.Module):
    """The paper's "all tokens" conditioning: a plain pre-LN block whose sequences carry the condition as one more token."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, axis: str) -> None:
        super().__init__()
        self.axis = axis
        self.norm1 = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.attn = SelfAttention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    def zero_gates(self) -> None:
        """Nothing is gated."""

    def forward(self, x: Tensor, condition: Tensor, frames: int | None = None, rows: None = None) -> Tensor:
        """x [B, F, S, D]; condition [B, D] or [B, F, D], normalised and projected like any token. `frames`, `rows`: not used."""
        dim = 2 if self.axis == "space" else 1
        frames, positions = x.shape[1:3]
        token = condition if condition.ndim == 3 else condition[:, None]
        token = (
            token[:, :, None].expand(-1, frames, -1, -1)
            if dim == 2
            else token[:, :1, None].expand(-1, -1, positions, -1)
        )
        mixed = self.attn(self.norm1(torch.cat([x, token], dim)), self.axis)
        x = x + mixed.narrow(dim, 0, x.shape[dim])
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    """LayerNorm, (shift, scale) from the condition, Linear to p * p * channels; keys `linear`, `adaLN_modulation.1`."""

    def __init__(self, hidden_size: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * channels)
        self.adaLN_modulation = _modulation(hidden_size, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, N, D]; condition [B, D] or [B, F, D] -> [B, N, p*p*C]."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(ops.adaln_modulate(x, shift, scale, eps=NORM_EPS))
