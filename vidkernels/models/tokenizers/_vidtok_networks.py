# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoder of VidTok (arXiv 2412.13061), built from `_vidtok_layers`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidkernels.models.tokenizers._vidtok_layers import (
    ChannelNorm,
    FrameAttention,
    FrameBlock,
    SpatialDown,
    SpatialUp,
    State,
    TemporalDown,
    TemporalUp,
    TimeBlock,
    TimeConv,
)
from vidkernels.models.tokenizers.vidtok_config import VidTokConfig
from vidkernels.nn._residual import may_overwrite


class _Level(nn.Module):
    """`block` list of one level and, where it resamples, `downsample` or `upsample`."""

    downsample: nn.Module
    upsample: nn.Module

    def __init__(self, blocks: list[nn.Module], **resample: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        for name, module in resample.items():
            setattr(self, name, module)


class _Middle(nn.Module):
    """3-D block, per-frame attention, 3-D block."""

    def __init__(self, channels: int, time_padding: str) -> None:
        super().__init__()
        self.block_1 = TimeBlock(channels, (3, 3, 3), time_padding)
        self.attn_1 = FrameAttention(channels, time_padding)
        self.block_2 = TimeBlock(channels, (3, 3, 3), time_padding)


class _Network(nn.Module):
    """What encoder and decoder share: running blocks, with recomputation in the backward pass if asked."""

    gradient_checkpointing = False
    mid: _Middle

    def _run(self, module: nn.Module, x: Tensor, *args: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled() and self.training:
            return checkpoint(module, x, *args, use_reentrant=False)
        return module(x, *args)

    def _pairs(self, frames: _Level, times: _Level, x: Tensor, state: State | None, inplace: bool) -> Tensor:
        """The residual blocks of a level: one per frame, one per pixel, and so on."""
        for frame_block, time_block in zip(frames.block, times.block, strict=True):
            x = self._run(frame_block, x, None, inplace)
            x = self._run(time_block, x, state, inplace)
        return x

    def _middle(self, x: Tensor, state: State | None) -> Tensor:
        x = self._run(self.mid.block_1, x, state)
        x = self._run(self.mid.attn_1, x, state)
        return self._run(self.mid.block_2, x, state)


class Encoder(_Network):
    """[B, 3, T, H, W] -> [B, encoder_channels, T / f, H / s, W / s]."""

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        padding = config.time_padding
        self.conv_in = TimeConv(3, config.channels, (3, 3, 3), padding)
        down, down_temporal = [], []
        width = config.channels
        for level in range(len(config.channel_multipliers)):
            previous, width = width, config.width(level)
            frame_blocks: list[nn.Module] = [
                FrameBlock(previous if i == 0 else width, width) for i in range(config.residual_blocks)
            ]
            time_blocks: list[nn.Module] = [TimeBlock(width, (3,), padding) for _ in range(config.residual_blocks)]
            spatial = level in config.spatial_down
            temporal = spatial and level in config.temporal_down
            down.append(_Level(frame_blocks, **({"downsample": SpatialDown(width)} if spatial else {})))
            down_temporal.append(
                _Level(time_blocks, **({"downsample": TemporalDown(width, padding)} if temporal else {}))
            )
        self.down, self.down_temporal = nn.ModuleList(down), nn.ModuleList(down_temporal)
        self.mid = _Middle(width, padding)
        self.norm_out = ChannelNorm(width)
        self.conv_out = TimeConv(width, config.encoder_channels, (3, 3, 3), padding)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """x [B, 3, T, H, W], T a multiple of the temporal factor (or one chunk of such a clip, with `state`)."""
        inplace = may_overwrite(self, x)
        x = self.conv_in(x, state)
        for frames, times in zip(self.down, self.down_temporal, strict=True):
            assert isinstance(frames, _Level) and isinstance(times, _Level)
            x = self._pairs(frames, times, x, state, inplace)
            if hasattr(frames, "downsample"):
                x = frames.downsample(x)
            if hasattr(times, "downsample"):
                x = times.downsample(x, state)
        return self.conv_out(self.norm_out(self._middle(x, state)), state)


class Decoder(_Network):
    """[B, z, T', H', W'] -> [B, 3, f T', s H', s W']."""

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        padding = config.time_padding
        levels = len(config.channel_multipliers)
        width = config.width(levels - 1)
        self.conv_in = TimeConv(config.z_channels, width, (3, 3, 3), padding)
        self.mid = _Middle(width, padding)
        up: list[nn.Module] = []
        up_temporal: list[nn.Module] = []
        split = 1
        for level in reversed(range(levels)):
            previous, width = width, config.width(level)
            blocks = config.residual_blocks + 1
            frame_blocks: list[nn.Module] = [FrameBlock(previous if i == 0 else width, width) for i in range(blocks)]
            time_blocks: list[nn.Module] = [TimeBlock(width, (3,), padding) for _ in range(blocks)]
            spatial = level in config.spatial_up
            temporal = spatial and level in config.temporal_up
            up.insert(0, _Level(frame_blocks, **({"upsample": SpatialUp(width)} if spatial else {})))
            resample = {"upsample": TemporalUp(width, padding, split)} if temporal else {}
            up_temporal.insert(0, _Level(time_blocks, **resample))
            split *= 2 if temporal else 1
        self.up, self.up_temporal = nn.ModuleList(up), nn.ModuleList(up_temporal)
        self.norm_out = ChannelNorm(width)
        self.conv_out = TimeConv(width, 3, (3, 3, 3), padding)

    def forward(self, z: Tensor, state: State | None = None, last: bool = True) -> Tensor:
        """z [B, z, T', H', W'] (or one chunk, with `state`; `last` marks the clip's end)."""
        inplace = may_overwrite(self, z)
        x = self._middle(self.conv_in(z, state), state)
        for frames, times in zip(reversed(self.up), reversed(self.up_temporal), strict=True):
            assert isinstance(frames, _Level) and isinstance(times, _Level)
            x = self._pairs(frames, times, x, state, inplace)
            if hasattr(frames, "upsample"):
                x = frames.upsample(x)
            if hasattr(times, "upsample"):
                x = times.upsample(x, state, last)
                if x.shape[2] == 0:  # the interpolation of a chunk's first frame waits for the next one
                    return x.new_empty(x.shape[0], 3, 0, 0, 0)
        return self.conv_out(self.norm_out(x), state)
