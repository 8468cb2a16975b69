# SPDX-License-Identifier: Apache-2.0
"""Steps of Latte and of STDiT3 (Open-Sora 1.2) the way the published code computes them, on the weights of this package's models.

Tokens are rearranged between space and time, the condition is repeated for every frame and every position, modulation, gate
and residual are operations of their own, attention is two products and a softmax. Where the published code takes a
fused kernel of its own (apex's LayerNorm, flash attention in space, xformers in the cross-attention), torch's fused
operation stands for it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine, shifted and scaled by rows that broadcast against x [..., N, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt d) v over [..., A, N, d], the weights in float32 at least."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    wide = torch.promote_types(weights.dtype, torch.float32)
    return weights.to(wide).softmax(-1).to(v.dtype) @ v


def heads(linear: Any, x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [rows, A, N, d] of x [rows, N, D]."""
    q, k, v = linear(x).unflatten(-1, (3, count, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def merged(x: Tensor) -> Tensor:
    """[rows, A, N, d] -> [rows, N, D]."""
    return x.transpose(1, 2).flatten(2)


def feed_forward(mlp: Any, x: Tensor) -> Tensor:
    """Linear, GELU (tanh), Linear."""
    return mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh"))


class OfficialLatte:
    """The class-conditional Latte, variant 1. `fused`: torch's attention instead of the default of the published code."""

    def __init__(self, model: Any, fused: bool = False) -> None:
        self.model = model
        self.attention = F.scaled_dot_product_attention if fused else math_attention

    def _block(self, block: Any, x: Tensor, condition: Tensor) -> Tensor:
        """x [rows, N, D], condition [rows, D]."""
        rows = block.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        q, k, v = heads(block.attn.qkv, modulate(x, rows[0], rows[1]), block.attn.num_heads)
        x = x + rows[2] * block.attn.proj(merged(self.attention(q, k, v)))
        return x + rows[5] * feed_forward(block.mlp, modulate(x, rows[3], rows[4]))

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x [B, F, C, H, W] -> [B, F, 2C, H, W]."""
        model, (batch, frames) = self.model, x.shape[:2]
        tokens = model.x_embedder.proj(x.flatten(0, 1)).flatten(2).transpose(1, 2) + model.pos_embed
        positions = tokens.shape[1]
        time, label = model.t_embedder(t), model.y_embedder(y)
        spatial = time.repeat_interleave(frames, 0) + label.repeat_interleave(frames, 0)
        temporal = time.repeat_interleave(positions, 0) + label.repeat_interleave(positions, 0)
        for i in range(0, len(model.blocks), 2):
            tokens = self._block(model.blocks[i], tokens, spatial)
            tokens = tokens.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
            if i == 0:
                tokens = tokens + model.temp_embed
            tokens = self._block(model.blocks[i + 1], tokens, temporal)
            tokens = tokens.unflatten(0, (batch, positions)).transpose(1, 2).flatten(0, 1)
        shift, scale = model.final_layer.adaLN_modulation(spatial)[:, None].chunk(2, dim=-1)
        output = model.final_layer.linear(modulate(tokens, shift, scale))
        side, patch = model.config.input_size // model.config.patch_size, model.config.patch_size
        output = output.unflatten(1, (side, side)).unflatten(-1, (patch, patch, -1))
        return output.permute(0, 5, 1, 3, 2, 4).reshape(batch, frames, -1, side * patch, side * patch)


def stdit3_positions(grid: tuple[int, int], pixels: tuple[float, float], width: int, base_pixels: int = 512) -> Tensor:
    """Table [h * w, width] of a frame, float64: [sin, cos] of the column in the first half of the channels, of the row in
    the second; positions are divided by sqrt(pixels) / 512 and stretched to a square grid."""
    side, scale = round((grid[0] * grid[1]) ** 0.5), (pixels[0] * pixels[1]) ** 0.5 / base_pixels
    frequencies = 10000.0 ** (-2 * torch.arange(width // 4, dtype=torch.float64) / (width // 2))
    axes = [torch.arange(n, dtype=torch.float64) / scale * (side / n) for n in grid]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    parts = [(axis.reshape(-1, 1) * frequencies) for axis in (columns, rows)]
    return torch.cat([turned for part in parts for turned in (part.sin(), part.cos())], dim=1)


class OfficialSTDiT3:
    """STDiT3 with captions of full length."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self, x: Tensor, timestep: Tensor, y: Tensor, fps: Tensor, positions: Tensor, x_mask: Tensor | None = None
    ) -> Tensor:
        """x [B, C, T, H, W] with even H and W -> float32 (float64 for float64) [B, 2C, T, H, W].

        positions: table [S, D], see `stdit3_positions`; the published code computes it once a size, too.
        """
        model, (batch, _, frames, height, width) = self.model, x.shape
        captions = model.y_embedder(y)
        added = model.fps_embedder(fps.expand(batch))
        e, zero = model.t_embedder(timestep) + added, model.t_embedder(torch.zeros_like(timestep)) + added
        tokens = model.x_embedder.proj(x).flatten(2).transpose(1, 2)
        tokens = (tokens.unflatten(1, (frames, -1)) + positions).flatten(1, 2)
        six, six_zero = model.t_block(e), model.t_block(zero)
        for pair in zip(model.spatial_blocks, model.temporal_blocks, strict=True):
            for temporal, block in enumerate(pair):
                tokens = self._block(block, tokens, captions, six, six_zero, x_mask, frames, bool(temporal))
        output = self._final(tokens, e, zero, x_mask, frames).unflatten(1, (frames, height // 2, width // 2))
        output = output.unflatten(-1, (2, 2, -1)).permute(0, 6, 1, 2, 4, 3, 5)
        output = output.reshape(batch, -1, frames, height, width)
        return output if output.dtype == torch.float64 else output.float()

    @staticmethod
    def _select(x_mask: Tensor | None, noisy: Tensor, clean: Tensor, frames: int) -> Tensor:
        if x_mask is None:
            return noisy
        parts = (part.unflatten(1, (frames, -1)) for part in (noisy, clean))
        return torch.where(x_mask[:, :, None, None], *parts).flatten(1, 2)

    def _block(
        self,
        block: Any,
        x: Tensor,
        captions: Tensor,
        six: Tensor,
        six_zero: Tensor,
        x_mask: Tensor | None,
        frames: int,
        temporal: bool,
    ) -> Tensor:
        """x [B, T * S, D]. With conditioning frames every modulation and gate is computed twice and selected."""
        rows = (block.scale_shift_table + six.unflatten(-1, (6, -1))).chunk(6, dim=1)
        clean = rows if x_mask is None else (block.scale_shift_table + six_zero.unflatten(-1, (6, -1))).chunk(6, dim=1)

        def modulated(x: Tensor, at: int) -> Tensor:
            noisy = modulate(x, rows[at], rows[at + 1])
            again = noisy if x_mask is None else modulate(x, clean[at], clean[at + 1])
            return self._select(x_mask, noisy, again, frames)

        def gated(branch: Tensor, at: int) -> Tensor:
            noisy = rows[at] * branch
            return self._select(x_mask, noisy, noisy if x_mask is None else clean[at] * branch, frames)

        x = x + gated(self._attend(block.attn, modulated(x, 0), frames, temporal), 2)
        x = x + self._cross(block.cross_attn, x, captions)
        return x + gated(feed_forward(block.mlp, modulated(x, 3)), 5)

    def _attend(self, attention: Any, x: Tensor, frames: int, temporal: bool) -> Tensor:
        folded = x.unflatten(1, (frames, -1))
        folded = (folded.transpose(1, 2) if temporal else folded).flatten(0, 1)
        q, k, v = heads(attention.qkv, folded, attention.heads)
        q, k = self._normed(q, attention.q_norm.weight), self._normed(k, attention.k_norm.weight)
        if temporal:  # fewer frames than rows: the published code leaves flash attention out here
            mixed = math_attention(self._rotated(q), self._rotated(k), v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = attention.proj(merged(mixed)).unflatten(0, (x.shape[0], -1))
        return (mixed.transpose(1, 2) if temporal else mixed).flatten(1, 2)

    @staticmethod
    def _normed(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)

    def _rotated(self, x: Tensor) -> Tensor:
        """Adjacent pairs (a, b) -> (a cos - b sin, b cos + a sin)."""
        frequencies = self.model.rope.freqs
        frequencies = frequencies.to(torch.promote_types(frequencies.dtype, torch.float32))
        angles = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies
        cos, sin = (table.repeat_interleave(2, -1).to(x.dtype) for table in (angles.cos(), angles.sin()))
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack((-b, a), -1).flatten(-2) * sin

    @staticmethod
    def _cross(attention: Any, x: Tensor, captions: Tensor) -> Tensor:
        q = attention.q_linear(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        k, v = attention.kv_linear(captions).unflatten(-1, (2, attention.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return attention.proj(merged(F.scaled_dot_product_attention(q, k, v)))

    def _final(self, x: Tensor, e: Tensor, zero: Tensor, x_mask: Tensor | None, frames: int) -> Tensor:
        layer = self.model.final_layer
        shift, scale = (layer.scale_shift_table + e[:, None]).chunk(2, dim=1)
        noisy = modulate(x, shift, scale)
        if x_mask is None:
            return layer.linear(noisy)
        shift, scale = (layer.scale_shift_table + zero[:, None]).chunk(2, dim=1)
        return layer.linear(self._select(x_mask, noisy, modulate(noisy, shift, scale), frames))
