# SPDX-License-Identifier: Apache-2.0
"""Blocks of STDiT3 over tokens [B, T, S, D]. Frames held clean pick their own modulation row: the norm is computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.models.transformers._parts import Mlp, attend, split_heads

if TYPE_CHECKING:
    from vidkernels.models.transformers.stdit3 import STDiT3Config

NORM_EPS = 1e-6


class Rows(NamedTuple):
    """Captions of different lengths in one tensor, and the video tokens that look at them.

    Attributes:
        tokens: [N, D]. offsets: int32, where each caption begins, and N. longest: length of one, or more.
        readers: int32, like `offsets`: where the video tokens begin that attend to it.
    """

    tokens: Tensor
    offsets: Tensor
    longest: int
    readers: Tensor


class _HeadNorm(nn.Module):
    """RMSNorm weight over the head's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class _SelfAttention(nn.Module):
    """Attention over space or time with RMSNorm of q and k per head, and rotary positions in time."""

    def __init__(self, config: STDiT3Config, temporal: bool) -> None:
        super().__init__()
        width, self.heads, self.temporal = config.hidden_size, config.num_heads, temporal
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = _HeadNorm(width // self.heads) if config.qk_norm else nn.Identity()
        self.k_norm = _HeadNorm(width // self.heads) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, frequencies: Tensor) -> Tensor:
        """x [B, T, S, D] -> the same shape; `frequencies`: radians per frame of every pair of channels."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        normed = isinstance(self.q_norm, _HeadNorm)
        weights = {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight} if normed else {}
        options: dict[str, Any] = {**weights, "norm": "head" if normed else None, "eps": NORM_EPS}
        if self.temporal:
            index = torch.arange(x.shape[1], device=x.device)[:, None]
            # The checkpoint's own table, which a bfloat16 model has rounded to bfloat16.
            mixed = ops.axial_attention(q, k, v, 1, positions=index, frequencies=frequencies.float()[None], **options)
            return self.proj(mixed.flatten(3))
        if normed:
            turned = ops.qk_norm_rope(q.flatten(1, 2), k.flatten(1, 2), **options)
            q, k = (part.view(q.shape) for part in turned)
        return self.proj(attend(q, k, v, "space"))


class _CrossAttention(nn.Module):
    """Attention of all tokens of a sample over its own caption tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, captions: Rows) -> Tensor:
        """x [B, N, D] -> the same shape."""
        batch, count, width = x.shape
        q = split_heads(self.q_linear(x).reshape(-1, width), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.kv_linear(captions.tokens).chunk(2, dim=-1))
        mixed = ops.varlen_attention(q, k, v, captions.readers, captions.offsets, count, captions.longest)
        return self.proj(mixed.reshape(batch, count, width))


class STDiT3Block(nn.Module):
    """x += gate1 * SelfAttn(mod1(LN x)); x += CrossAttn(x, caption); x += gate2 * MLP(mod2(LN x))."""

    def __init__(self, config: STDiT3Config, temporal: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = _SelfAttention(config, temporal)
        self.cross_attn = _CrossAttention(width, config.num_heads)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))

    def rows(self, six: Tensor, six_clean: Tensor | None, selector: Tensor | None) -> Tensor:
        """Shift, scale and gate of both branches, [B, 6, D] or per frame [B, T, 6, D]."""
        table = self.scale_shift_table
        return frame_rows(table + six, None if six_clean is None else table + six_clean, selector)

    def forward(
        self,
        x: Tensor,
        captions: Rows,
        six: Tensor,
        six_clean: Tensor | None,
        selector: Tensor | None,
        frequencies: Tensor,
    ) -> Tensor:
        """x [B, T, S, D]; six [B, 6, D]; selector [B, T], 1 where a frame takes its rows from `six_clean`."""
        grid, tokens = x.shape[1:3], x.flatten(1, 2)
        rows = self.rows(six, six_clean, selector)
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(-2)  # each [B, D] or [B, T, D]
        normed = ops.adaln_modulate(tokens, shift1, scale1, eps=NORM_EPS)
        branch = self.attn(normed.unflatten(1, grid), frequencies).flatten(1, 2)
        tokens = ops.gate_residual(tokens, branch, gate1)
        tokens, normed = ops.adaln_zero(tokens, self.cross_attn(tokens, captions), None, shift2, scale2, eps=NORM_EPS)
        return ops.gate_residual(tokens, self.mlp(normed), gate2).unflatten(1, grid)


def frame_rows(noisy: Tensor, clean: Tensor | None, selector: Tensor | None) -> Tensor:
    """Rows [B, n, D], or per frame [B, T, n, D] where some frames are clean. Rows are small; activations are not copied."""
    if clean is None or selector is None:
        return noisy
    return torch.where(selector[:, :, None, None] != 0, clean[:, None], noisy[:, None])


class STDiT3FinalLayer(nn.Module):
    """LayerNorm, (shift, scale) = table + e, Linear; keys `linear`, `scale_shift_table`."""

    def __init__(self, hidden_size: int, patch_size: tuple[int, int, int], channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size[0] * patch_size[1] * patch_size[2] * channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(self, x: Tensor, e: Tensor, e_clean: Tensor | None, selector: Tensor | None) -> Tensor:
        """x [B, T, S, D]; e [B, D] -> [B, T, S, p*C]."""
        grid, tokens = x.shape[1:3], x.flatten(1, 2)
        shift, scale = (self.scale_shift_table + e[:, None]).unbind(1)
        modulated = ops.adaln_modulate(tokens, shift, scale, eps=NORM_EPS).unflatten(1, grid)
        if e_clean is not None and selector is not None:
            # The official code normalises the already modulated tensor once more for clean frames; checkpoints expect it.
            shift, scale = (self.scale_shift_table + e_clean[:, None]).unbind(1)
            again = ops.adaln_modulate(modulated.flatten(1, 2), shift, scale, eps=NORM_EPS).unflatten(1, grid)
            modulated = torch.where(selector[:, :, None, None] != 0, again, modulated)
        return self.linear(modulated)
