# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' AutoencoderKLHunyuanVideo: replicated borders as coordinates instead of padded copies, norm + SiLU
in one op, 2x2x2 nearest-up + convolution by phases (8/27 of the products), causal attention frame by frame without the
mask of N x N numbers."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_memory import may_write, overwriting
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason

_FILE = "autoencoder_kl_hunyuan_video"
_ATTENTION = "diffusers.models.attention_processor"


def padded(owner: Any, conv: Any, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """A convolution behind its `F.pad`, without the padded tensor."""
    return units.convolve(owner, conv._modules["conv"], x, residual, out, **units.padding_of(conv))


class _Family(Fused):
    def _conv_reason(self, conv: Any) -> str | None:
        return units.padded_reason(conv, self._vidkernels_home.HunyuanVideoCausalConv3d)


class ConvForward(Fused):
    """`HunyuanVideo(15)CausalConv3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W]."""
        return padded(self, self, hidden_states)

    def _reason(self, hidden_states: Tensor) -> str | None:
        return video_reason(hidden_states) or units.kernel_reason(self.conv) or units.padding_reason(self)


def padding_check(module: Any) -> str | None:
    """Why the padding of a causal convolution is not served."""
    return units.padding_reason(module)


class BlockForward(_Family):
    """`HunyuanVideoResnetBlockCausal3D.forward`."""

    def _reason(self, hidden_states: Tensor) -> str | None:
        parts, conv = self._modules, self._vidkernels_home.HunyuanVideoCausalConv3d
        reason = video_reason(hidden_states) or units.group_reason(parts["norm1"], parts["norm2"])
        reason = reason or units.padded_reason(parts["conv1"], conv) or units.padded_reason(parts["conv2"], conv)
        reason = reason or child_reason(parts["nonlinearity"], nn.SiLU) or child_reason(parts["dropout"], nn.Dropout)
        return reason or (None if self.conv_shortcut is None else units.padded_reason(self.conv_shortcut, conv))

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, out_channels, T, H, W]."""
        x, parts = channels_last(hidden_states), self._modules
        h = padded(self, parts["conv1"], units.group_normed(self, parts["norm1"], x))
        h = units.dropped(parts["dropout"], units.group_normed(self, parts["norm2"], h))
        out = x if self.conv_shortcut is None and may_write(x) else None
        shortcut = x if self.conv_shortcut is None else padded(self, self.conv_shortcut, x)
        return restored(padded(self, parts["conv2"], h, shortcut, out), hidden_states)


class UpsampleForward(_Family):
    """`HunyuanVideoUpsampleCausal3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 2 T - 1, 2 H, 2 W] for factors of two: the first frame appears once."""
        conv = self.conv.conv
        options = {"scale": self.upsample_factor, "first_frame": "single", **units.padding_of(self.conv)}
        options["backend"] = self._vidkernels_backend("causal_conv3d")
        y: Tensor = ops.upsample_conv3d(channels_last(hidden_states), conv.weight, conv.bias, **options)
        return restored(y, hidden_states)

    def _reason(self, hidden_states: Tensor) -> str | None:
        return video_reason(hidden_states) or self._conv_reason(self.conv) or upsample_check(self)


def upsample_check(module: Any) -> str | None:
    kernel = module.conv.conv
    if not all(isinstance(factor, int) for factor in module.upsample_factor):
        return f"its factors are {module.upsample_factor}, not integers"
    if kernel.stride != (1, 1, 1) or kernel.dilation != (1, 1, 1):
        return f"its convolution has stride {kernel.stride} and dilation {kernel.dilation}"
    return None


class MidBlockForward(_Family):
    """`HunyuanVideoMidBlock3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W]; residual blocks and, between them, causal attention over all positions."""
        return self._serve(hidden_states)

    def _serve(self, hidden_states: Tensor) -> Tensor:
        x = self._resnet(self.resnets[0], channels_last(hidden_states))
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=False):
            x = x if attention is None else attended(self, attention, x)
            x = self._resnet(resnet, x)
        return restored(x, hidden_states)

    def _reason(self, hidden_states: Tensor) -> str | None:
        reason = video_reason(hidden_states)
        for attention in self.attentions:
            reason = reason or (None if attention is None else attention_reason(attention))
        return reason

    def _resnet(self, resnet: nn.Module, x: Tensor) -> Tensor:
        recomputed = torch.is_grad_enabled() and self.gradient_checkpointing
        y: Tensor = self._gradient_checkpointing_func(resnet, x) if recomputed else resnet(x)
        return channels_last(y)


def attended(owner: Any, attention: Any, x: Tensor) -> Tensor:
    """x and what an attention adds to it, in which a frame sees itself and those before. Projections are called, so that what
    sits on them is honoured."""
    _, _, frames, height, width = x.shape
    normed = units.group_normed(owner, attention.group_norm, x, None)
    rows = units.as_rows(normed).flatten(1, 3)  # [B, N, C]
    heads = [
        project(rows).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    ]
    mixed = units.causal_frame_attention(heads[0], heads[1], heads[2], height * width).transpose(1, 2).flatten(2)
    y = attention.to_out[1](attention.to_out[0](mixed)).unflatten(1, (frames, height, width))
    return channels_last(units.as_clip(y) + x)


def attention_reason(attention: Any) -> str | None:
    """Why the attention must get its mask and run its own forward."""
    home: Any = sys.modules[_ATTENTION]
    reason = child_reason(attention, home.Attention)
    if reason is None and type(attention.processor) is not home.AttnProcessor2_0:
        reason = f"an attention uses {type(attention.processor).__name__}"
    reason = reason or units.group_reason(attention.group_norm)
    extras = ("spatial_norm", "norm_q", "norm_k", "norm_cross")
    if reason is None and any(getattr(attention, name, None) is not None for name in extras):
        reason = "an attention has further norms"
    if reason is None and (not attention.residual_connection or attention.rescale_output_factor != 1):
        reason = "an attention rescales its result or does not add its input"
    return reason


class _Network(_Family):
    def _reason(self, hidden_states: Tensor, **rest: Any) -> str | None:
        reason = video_reason(hidden_states) or self._conv_reason(self.conv_in) or self._conv_reason(self.conv_out)
        return reason or units.group_reason(self.conv_norm_out) or child_reason(self.conv_act, nn.SiLU)

    def _run(self, blocks: list[nn.Module], x: Tensor) -> Tensor:
        x = padded(self, self.conv_in, channels_last(x))
        with overwriting(self, x):
            for block in blocks:
                recomputed = torch.is_grad_enabled() and self.gradient_checkpointing
                x = self._gradient_checkpointing_func(block, x) if recomputed else block(x)
        x = channels_last(x)  # a block without convolutions of ours at its end may have changed it
        return padded(self, self.conv_out, units.group_normed(self, self.conv_norm_out, x)).contiguous()


class EncoderForward(_Network):
    """`HunyuanVideoEncoder3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> moments [B, 2 z, 1 + (T - 1) / 4, H / 8, W / 8]."""
        return self._run([*self.down_blocks, self.mid_block], hidden_states)


class DecoderForward(_Network):
    """`HunyuanVideoDecoder3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, z, T, H, W] -> frames [B, 3, 4 T - 3, 8 H, 8 W]."""
        return self._run([self.mid_block, *self.up_blocks], hidden_states)


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = next(p for p in module.parameters() if p.ndim == 5)
    return (units.like_parameters(module, 1, weight.shape[1], 3, 8, 8),), {}


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 1, module.conv_in.conv.in_channels, 5, 16, 16),), {}


_CONV = {
    "HunyuanVideoCausalConv3d.__init__": "9a893b3b56809af9",
    "HunyuanVideoCausalConv3d.forward": "127bae6ff43c0e34",
}
_BOTH = "causal_conv3d group_norm"

RULES = (
    units.rule(
        "hunyuan_vae.encoder",
        f"{_FILE}:HunyuanVideoEncoder3D",
        EncoderForward,
        _BOTH,
        _CONV | {"HunyuanVideoEncoder3D.forward": "2872656e2aab184d"},
        _encoder_sample,
    ),
    units.rule(
        "hunyuan_vae.decoder",
        f"{_FILE}:HunyuanVideoDecoder3D",
        DecoderForward,
        _BOTH,
        _CONV | {"HunyuanVideoDecoder3D.forward": "4c742486971caeb0"},
        _sample,
    ),
    units.rule(
        "hunyuan_vae.mid_block",
        f"{_FILE}:HunyuanVideoMidBlock3D",
        MidBlockForward,
        "group_norm",
        {"HunyuanVideoMidBlock3D.forward": "440ddab4d409024c"},
        _sample,
    ),
    units.rule(
        "hunyuan_vae.resnet",
        f"{_FILE}:HunyuanVideoResnetBlockCausal3D",
        BlockForward,
        _BOTH,
        _CONV | {"HunyuanVideoResnetBlockCausal3D.forward": "ee069251c6ebef1c"},
        _sample,
    ),
    units.rule(
        "hunyuan_vae.upsample",
        f"{_FILE}:HunyuanVideoUpsampleCausal3D",
        UpsampleForward,
        "causal_conv3d",
        _CONV | {"HunyuanVideoUpsampleCausal3D.forward": "44ad2e57a37cef95"},
        _sample,
        upsample_check,
    ),
    units.rule(
        "hunyuan_vae.conv",
        f"{_FILE}:HunyuanVideoCausalConv3d",
        ConvForward,
        "causal_conv3d",
        _CONV,
        _sample,
        padding_check,
    ),
)
