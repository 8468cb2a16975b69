# SPDX-License-Identifier: Apache-2.0
"""What the transformers share: embeddings, position tables, MLP, attention over space or time, patch layout."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels._hooks import is_unseen
from vidkernels.nn.adaln_zero import BatchedProjection

FREQUENCIES = 256


def timestep_features(t: Tensor, width: int = FREQUENCIES) -> Tensor:
    """[cos(t f), sin(t f)] with f_i = 10000^(-i / (width/2)); t [B] -> float32 [B, width] (DiT, arXiv 2212.09748)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoid features through Linear, SiLU, Linear; keys `mlp.0`, `mlp.2`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """t [B] -> [B, D] in the parameters' dtype."""
        return self.mlp(timestep_features(t).to(self.linears[0].weight.dtype))

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The two layers that have parameters."""
        return cast(nn.Linear, self.mlp[0]), cast(nn.Linear, self.mlp[2])


class PatchEmbed(nn.Module):
    """The convolution that makes tokens of patches, under the key `proj`."""

    def __init__(self, proj: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.proj = proj


class StepRows:
    """Modulation rows of all blocks for one condition, in one product. Without gradients it is made when the first block asks: a
    step whose blocks are skipped by a cache reads no weights.

    Args:
        projection: of all blocks.
        condition: [B, D] or one row per frame [B, F, D].
    """

    def __init__(self, projection: BatchedProjection, condition: Tensor) -> None:
        self._projection, self._condition = projection, condition
        # A block that is recomputed in a backward pass must find what it found before.
        self._rows = projection(condition) if torch.is_grad_enabled() else None

    def of(self, index: int, first_frame: bool = False) -> Tensor:
        """Rows of a block, [B, n * D] or [B, F, n * D]; the first frame's alone where asked for."""
        if self._rows is None:
            self._rows = self._projection(self._condition)
        rows = self._rows[index]
        return rows[:, 0] if first_frame else rows


def activated(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU (tanh) of `layer(x)`. Without gradients in place: the widest tensor of a block exists once, which is a third of the
    peak of a step."""
    hidden = layer(x)
    if torch.compiler.is_compiling() or hidden.requires_grad or not is_unseen(layer):
        return F.gelu(hidden, approximate="tanh")
    return torch.ops.aten.gelu_(hidden, approximate="tanh")


class Mlp(nn.Module):
    """Linear, GELU (tanh), Linear; keys `fc1`, `fc2`."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C']."""
        return self.fc2(activated(self.fc1, x))


def sincos(positions: Tensor, width: int) -> Tensor:
    """[sin(p w), cos(p w)], w_k = 10000^(-2k / width); float64 positions [N] -> [N, width]."""
    omega = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64, device=positions.device) / (width / 2))
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Table of a grid, row-major: the first half of the channels encodes the column, the second the row. -> [h*w, width]."""
    column_part = sincos(columns, width // 2)[None].expand(len(rows), -1, -1)
    row_part = sincos(rows, width // 2)[:, None].expand(-1, len(columns), -1)
    return torch.cat([column_part, row_part], dim=-1).flatten(0, 1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., A*d] -> [..., A, d], a view."""
    return x.unflatten(-1, (heads, -1))


def attend(q: Tensor, k: Tensor, v: Tensor, axis: str) -> Tensor:
    """Softmax attention of a video's tokens over one axis.

    Args:
        q, k, v: [B, F, S, A, d]: frames, positions of a frame, heads.
        axis: "space": each frame attends over its S positions; "time": each position attends over the F frames.

    Returns:
        [B, F, S, A*d].
    """
    batch, frames, positions, heads, width = q.shape
    if axis == "space":
        q, k, v = (x.reshape(batch * frames, positions, heads, width).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [B*F, S, A, d]
        return mixed.reshape(batch, frames, positions, heads * width)
    return ops.axial_attention(q, k, v, 1).flatten(3)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int], channels: int) -> Tensor:
    """[B, T*h*w, pt*ph*pw*C] with the vector read as (pt, ph, pw, C) -> [B, C, T*pt, h*ph, w*pw]."""
    batch = tokens.shape[0]
    x = tokens.reshape(batch, *grid, *patch, channels)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(batch, channels, grid[0] * patch[0], grid[1] * patch[1], grid[2] * patch[2])


def guide(outputs: Tensor, scale: float, channels: int, dim: int) -> Tensor:
    """Classifier-free guidance of a [conditional, null] batch on the first `channels` of axis `dim`.

    The guided prediction null + scale * (conditional - null) goes to both halves; other channels stay as they are.
    """
    guided, rest = outputs.split([channels, outputs.shape[dim] - channels], dim=dim)
    conditional, null = guided.chunk(2)
    half = null + scale * (conditional - null)
    return torch.cat([torch.cat([half, half]), rest], dim=dim)


def xavier(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear inside a module."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def zero(*layers: nn.Module) -> None:
    """Zero weight and bias."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
