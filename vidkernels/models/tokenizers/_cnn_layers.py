# SPDX-License-Identifier: Apache-2.0
"""Blocks of the GroupNorm tokenizers (VQGAN, MAGVIT, MAGVIT-v2) over [B, C, T, H, W] in channels-last memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidkernels import ops
from vidkernels.errors import OptionError
from vidkernels.models.tokenizers._vidtok_layers import FrameConv
from vidkernels.ops._checks import is_whole

GROUPS, NORM_EPS = 32, 1e-6


def check_counts(**values: object) -> None:
    """Numbers of a configuration, or tuples of them, are whole and from 1 on.

    Raises:
        OptionError: names the first that is not.
    """
    for name, value in values.items():
        each = value if isinstance(value, (tuple, list)) else (value,)
        if not each or not all(map(is_whole, each)):
            kind = "a whole number" if len(each) == 1 else "whole numbers"
            raise OptionError(name, f"{kind} of at least 1", repr(value))


def check_widths(channels: int, multipliers: tuple[int, ...]) -> None:
    """Every width can be split into the groups of `GroupNorm`."""
    check_counts(channels=channels, channel_multipliers=multipliers)
    wrong = [n for n in (channels * m for m in (1, *multipliers)) if n > GROUPS and n % GROUPS]
    if wrong:
        raise OptionError(
            "channels", f"widths of at most {GROUPS}, or multiples of it", f"{wrong[0]} channels at a level"
        )


class GroupNorm(nn.Module):
    """GroupNorm with SiLU behind it or not; `per_frame` statistics do not see other frames.

    Args:
        affine: with a weight and a bias.
    """

    def __init__(
        self,
        channels: int,
        *,
        activation: str | None = "silu",
        per_frame: bool = True,
        groups: int = GROUPS,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.groups, self.activation, self.per_frame = min(groups, channels), activation, per_frame

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> the same shape."""
        return ops.group_norm(
            x, self.groups, self.weight, self.bias, eps=NORM_EPS, activation=self.activation, per_frame=self.per_frame
        )


class Block(nn.Module):
    """A residual block that can be recomputed in the backward pass; subclasses define `compute`."""

    gradient_checkpointing = False

    def compute(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, K, T, H, W]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`compute`, whose activations are kept only without `gradient_checkpointing`."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(self.compute, x, use_reentrant=False)
        return self.compute(x)


def recompute_blocks(model: nn.Module, enabled: bool) -> None:
    """Switch gradient checkpointing of every block of a model."""
    for module in model.modules():
        if isinstance(module, Block):
            module.gradient_checkpointing = enabled


class ImageBlock(Block):
    """2-D residual block of VQGAN; keys `norm1`, `conv1`, `norm2`, `conv2`, `nin_shortcut`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = FrameConv(in_channels, out_channels)
        self.norm2 = GroupNorm(out_channels)
        self.conv2 = FrameConv(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = FrameConv(in_channels, out_channels, 1)

    def compute(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, K, T, H, W]."""
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return self.conv2(self.norm2(self.conv1(self.norm1(x))), residual=shortcut)


class ImageAttention(nn.Module):
    """Single-head attention over the positions of each frame; keys `norm`, `q`, `k`, `v`, `proj_out`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, activation=None)
        self.q, self.k, self.v, self.proj_out = (FrameConv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> the same shape."""
        batch, channels, frames, height, width = x.shape
        normed = self.norm(x)
        q, k, v = (
            layer(normed).permute(0, 2, 3, 4, 1).reshape(batch * frames, 1, height * width, channels)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).reshape(batch, frames, height, width, channels)
        return self.proj_out(mixed.permute(0, 4, 1, 2, 3), residual=x)


def depth_to_space(
    x: Tensor, block: tuple[int, int, int], order: str = "block_first", drop: int | None = None
) -> Tensor:
    """[B, C * bt*bh*bw, T, H, W] -> [B, C, T*bt, H*bh, W*bw].

    Args:
        x: channels-last or not; the result is channels-last.
        block: (bt, bh, bw).
        order: "block_first": the channel axis reads as (bt, bh, bw, C) (Open-MAGVIT2); "channel_first": (C, bt, bh, bw), the
            order of `torch.nn.functional.pixel_shuffle`.
        drop: index of the frame to leave out after a temporal doubling: 0 as in MAGVIT-v2's paper, 1 as in Open-MAGVIT2.
    """
    batch, _, frames, height, width = x.shape
    bt, bh, bw = block
    channels = x.shape[1] // (bt * bh * bw)
    rows = x.permute(0, 2, 3, 4, 1)
    if order == "block_first":
        rows = rows.reshape(batch, frames, height, width, bt, bh, bw, channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
    else:
        rows = rows.reshape(batch, frames, height, width, channels, bt, bh, bw).permute(0, 1, 5, 2, 6, 3, 7, 4)
    video = rows.reshape(batch, frames * bt, height * bh, width * bw, channels).permute(0, 4, 1, 2, 3)
    if drop is None or bt == 1:
        return video
    keep = [i for i in range(frames * bt) if i != drop]
    return video[:, :, keep] if drop else video[:, :, 1:]
