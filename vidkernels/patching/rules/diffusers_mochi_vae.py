# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' AutoencoderKLMochi: norm of each frame + SiLU in one op, replicated borders as coordinates
(CogVideoX's convolutions, which have a rule of their own), depth to space in one copy."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching.rules import _cogvideox_units as cog
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_memory import may_write, overwriting
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason

_FILE = "autoencoder_kl_mochi"
Caches = dict[str, Any] | None


class _Family(Fused):
    def _conv_reason(self, conv: Any) -> str | None:
        reason = cog.conv_reason(conv, sys.modules[self._vidkernels_home.CogVideoXCausalConv3d.__module__])
        return reason or (None if conv.pad_mode == "replicate" else f"a convolution pads by mode {conv.pad_mode}")

    def _norm_reason(self, norm: Any) -> str | None:
        reason = child_reason(norm, self._vidkernels_home.MochiChunkedGroupNorm3D)
        return reason or units.group_reason(norm.norm_layer)

    def _normed(self, norm: Any, x: Tensor) -> Tensor:
        return units.group_normed(self, norm.norm_layer, x, per_frame=True)


class NormForward(_Family):
    """`MochiChunkedGroupNorm3D.forward`: frames are normalized one by one, so the chunks make no difference."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W]."""
        return units.group_normed(self, self.norm_layer, x, None, per_frame=True)

    def _reason(self, x: Tensor) -> str | None:
        return video_reason(x) or units.group_reason(self.norm_layer)


class BlockForward(_Family):
    """`MochiResnetBlock3D.forward`."""

    @guarded
    def forward(self, inputs: Tensor, conv_cache: Caches = None) -> tuple[Tensor, dict[str, Any]]:
        """[B, C, T, H, W] -> (result, caches, which replicating convolutions leave empty)."""
        kept: dict[str, Any] = {}
        x = channels_last(inputs)
        h, kept["conv1"] = cog.causal(self, self.conv1, self._normed(self.norm1, x), None)
        h, out = self._normed(self.norm2, h), x if may_write(x) else None
        y, kept["conv2"] = cog.causal(self, self.conv2, h, None, x, out)
        return restored(y, inputs), kept

    def _reason(self, inputs: Tensor, **rest: Any) -> str | None:
        reason = video_reason(inputs) or self._norm_reason(self.norm1) or self._norm_reason(self.norm2)
        reason = reason or self._conv_reason(self.conv1) or self._conv_reason(self.conv2)
        return reason or child_reason(self.nonlinearity, nn.SiLU)


class UpBlockForward(_Family):
    """`MochiUpBlock3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, conv_cache: Caches = None) -> tuple[Tensor, dict[str, Any]]:
        """[B, C, T, H, W] -> boxes of a linear map's channels, [B, out, st T, s H, s W]."""
        before = conv_cache or {}
        kept: dict[str, Any] = {}
        x = channels_last(hidden_states)
        for i, resnet in enumerate(self.resnets):
            name = f"resnet_{i}"
            recomputed = torch.is_grad_enabled() and self.gradient_checkpointing
            given = x, before.get(name)
            x, kept[name] = self._gradient_checkpointing_func(resnet, *given) if recomputed else resnet(*given)
        wide = units.as_clip(self.proj(units.as_rows(channels_last(x))))
        side = self.spatial_expansion
        y = units.from_channels(wide, (self.temporal_expansion, side, side))
        return restored(channels_last(y), hidden_states), kept

    def _reason(self, hidden_states: Tensor, **rest: Any) -> str | None:
        return video_reason(hidden_states)


class _Network(_Family):
    def _run(self, blocks: dict[str, tuple[Any, bool]], x: Tensor, before: Any) -> tuple[Tensor, dict[str, Any]]:
        with overwriting(self, x):
            return self._walk(blocks, x, before)

    def _walk(self, blocks: dict[str, tuple[Any, bool]], x: Tensor, before: Any) -> tuple[Tensor, dict[str, Any]]:
        kept: dict[str, Any] = {}
        for name, (block, recomputable) in blocks.items():
            recomputed = torch.is_grad_enabled() and self.gradient_checkpointing and recomputable
            given = x, before.get(name)
            x, kept[name] = self._gradient_checkpointing_func(block, *given) if recomputed else block(*given)
        return channels_last(x), kept


class EncoderForward(_Network):
    """`MochiEncoder3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, conv_cache: Caches = None) -> tuple[Tensor, dict[str, Any]]:
        """[B, C, T, H, W] -> (moments in channels-last memory, caches)."""
        blocks = {"block_in": (self.block_in, True)}
        blocks |= {f"down_block_{i}": (block, True) for i, block in enumerate(self.down_blocks)}
        blocks["block_out"] = self.block_out, False

        def embedded() -> Tensor:  # no name here holds the result while the blocks run
            rows = self.proj_in(units.as_rows(self.fourier_features(hidden_states)))
            return channels_last(units.as_clip(rows))

        x, kept = self._run(blocks, embedded(), conv_cache or {})
        return units.as_clip(self.proj_out(units.as_rows(self._normed(self.norm_out, x)))), kept

    def _reason(self, hidden_states: Tensor, **rest: Any) -> str | None:
        reason = video_reason(hidden_states) or self._norm_reason(self.norm_out)
        return reason or child_reason(self.nonlinearity, nn.SiLU)


class DecoderForward(_Network):
    """`MochiDecoder3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, conv_cache: Caches = None) -> tuple[Tensor, dict[str, Any]]:
        """Latents [B, z, T, H, W] -> (frames in channels-last memory, caches)."""
        blocks = {"block_in": (self.block_in, True)}
        blocks |= {f"up_block_{i}": (block, True) for i, block in enumerate(self.up_blocks)}
        blocks["block_out"] = self.block_out, False
        x = units.pointwise(self, self.conv_in, channels_last(hidden_states))
        x, kept = self._run(blocks, x, conv_cache or {})
        return units.as_clip(self.proj_out(units.as_rows(self.nonlinearity(x)))), kept

    def _reason(self, hidden_states: Tensor, **rest: Any) -> str | None:
        return video_reason(hidden_states) or units.kernel_reason(self.conv_in, nn.Conv3d)


def _decoder_check(module: Any) -> str | None:
    kernel = module.conv_in.kernel_size
    return None if kernel == (1, 1, 1) else f"its first convolution has a kernel of {kernel}"


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = next(p for p in module.parameters() if p.ndim == 5)
    return (units.like_parameters(module, 1, weight.shape[1], 3, 8, 8),), {}


def _norm_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 1, module.norm_layer.num_channels, 3, 8, 8),), {}


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    features = module.fourier_features
    copies = 1 + 2 * len(range(features.start, features.stop, features.step))
    return (units.like_parameters(module, 1, module.proj_in.in_features // copies, 7, 16, 16),), {}


_NORM = {"MochiChunkedGroupNorm3D.forward": "37361eb17a6ba39a"}
_BLOCK = _NORM | {
    "MochiResnetBlock3D.forward": "c259be0a26992864",
    "CogVideoXCausalConv3d.__init__": "44c1f912f27b0a71",
    "CogVideoXCausalConv3d.forward": "7f3183ee6cf1d355",
}
_UP = {"MochiUpBlock3D.forward": "d4a2b89cf1380587"}
_ENCODER = _NORM | {"MochiEncoder3D.forward": "a8a4162f5fd3d5ea"}
_DECODER = {"MochiDecoder3D.forward": "ab66857691f5e504"}

RULES = (
    units.rule("mochi_vae.encoder", f"{_FILE}:MochiEncoder3D", EncoderForward, "group_norm", _ENCODER, _encoder_sample),
    units.rule(
        *("mochi_vae.decoder", f"{_FILE}:MochiDecoder3D", DecoderForward, "causal_conv3d", _DECODER, _sample),
        _decoder_check,
    ),
    units.rule("mochi_vae.up_block", f"{_FILE}:MochiUpBlock3D", UpBlockForward, "causal_conv3d", _UP, _sample),
    units.rule(
        *("mochi_vae.resnet", f"{_FILE}:MochiResnetBlock3D", BlockForward, "causal_conv3d group_norm", _BLOCK, _sample)
    ),
    units.rule("mochi_vae.norm", f"{_FILE}:MochiChunkedGroupNorm3D", NormForward, "group_norm", _NORM, _norm_sample),
)
