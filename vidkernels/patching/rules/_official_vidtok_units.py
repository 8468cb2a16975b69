# SPDX-License-Identifier: Apache-2.0
"""The units of VidTok's official encoders and decoders: what `_vidtok_units` computes, behind guards of their own.

The official files name their classes otherwise than diffusers does, have a function for SiLU, and keep no word on
whether they are causal. `call.home` is what a file has, `model_3dcausal`, `model_3dcausal_v1_1` or `model_3dnoncausal`.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import nn

from vidkernels.patching._guard import child_reason
from vidkernels.patching.rules import _vidtok_units as shared
from vidkernels.patching.rules._vidtok_convs import TORCH, Call

_WRAPPERS = ("CausalConv1d", "CausalConv3d")
_BLOCKS = ("ResnetBlock", "ResnetCausalBlock", "ResnetCausalBlock1D", "ResnetBlock1D", "ResnetNoncausalBlock")
_SAMPLERS = (
    "Downsample",
    "Upsample",
    "TimeDownsampleResCausal2x",
    "TimeUpsampleResCausal2x",
    "TimeDownsampleRes2x",
    "TimeUpsampleRes2x",
)
_NAMES = _WRAPPERS, _BLOCKS, _SAMPLERS


class Home(NamedTuple):
    """What the guards know of an official file, looked up once a forward."""

    wrappers: tuple[type, ...]
    blocks: tuple[type, ...]
    samplers: tuple[type, ...]
    layer_norm: type
    attention: type


def home_of(file: Any) -> Home:
    """The classes of an official file; those that it lacks are left out. The non-causal file takes its norm from the
    causal one, by way of a function."""
    found = [tuple(getattr(file, name) for name in names if hasattr(file, name)) for names in _NAMES]
    source: Any = file if hasattr(file, "LayerNorm") else sys.modules[file.AttnBlock.__module__]
    return Home(found[0], found[1], found[2], source.LayerNorm, file.AttnBlockWrapper)


def norm_reason(call: Call, norm: Any) -> str | None:
    """Why a norm has to be called."""
    return child_reason(norm, call.home.layer_norm) or child_reason(norm._modules["norm"], nn.LayerNorm)


def conv_reason(call: Call, conv: Any) -> str | None:
    """Why a convolution, causal or not, has to be called instead of read."""
    kernel = conv
    if type(conv) not in TORCH and hasattr(conv, "time_pad"):
        reason = child_reason(conv, *call.home.wrappers)
        if reason is None and conv.pad_mode != "constant":
            reason = f"a convolution pads by {conv.pad_mode!r}"
        if reason is not None:
            return reason
        kernel = conv._modules["conv"]
    reason = child_reason(kernel, *TORCH)
    if reason is None and (kernel.groups != 1 or kernel.padding_mode != "zeros" or max(kernel.dilation) > 1):
        reason = "a convolution has groups, dilation or a padding mode"
    return reason


def block_reason(call: Call, block: Any) -> str | None:
    """Why a residual block has to be called."""
    parts = block._modules
    reason = child_reason(block, *call.home.blocks) or child_reason(parts["dropout"], nn.Dropout)
    reason = reason or norm_reason(call, parts["norm1"]) or conv_reason(call, parts["conv1"])
    reason = reason or norm_reason(call, parts["norm2"]) or conv_reason(call, parts["conv2"])
    if reason is None and block.in_channels != block.out_channels:
        if block.use_conv_shortcut:
            return "a block has a 3x3 shortcut"
        reason = conv_reason(call, parts["nin_shortcut"])
    return reason


def attention_reason(call: Call, block: Any) -> str | None:
    """Why the attention block has to be called."""
    reason = child_reason(block, call.home.attention) or norm_reason(call, block.norm)
    for name in ("q", "k", "v", "proj_out"):
        reason = reason or conv_reason(call, getattr(block, name))
    return reason


def sampler_reason(call: Call, sampler: Any) -> str | None:
    """Why an up- or down-sampler has to be called."""
    reason = child_reason(sampler, *call.home.samplers)
    if reason is None and not getattr(sampler, "with_conv", True):
        reason = "a sampler has no convolution"
    reason = reason or conv_reason(call, sampler.conv)
    return reason or (child_reason(sampler.avg_pool, nn.AvgPool3d) if hasattr(sampler, "avg_pool") else None)


def _guarded(unit: shared.Unit, guard: Any) -> shared.Unit:
    fused, _, arrange, args = unit
    return fused, guard, arrange, args


FRAME_BLOCK = _guarded(shared.FRAME_BLOCK, block_reason)
TIME_BLOCK = _guarded(shared.TIME_BLOCK, block_reason)
VOLUME_BLOCK = _guarded(shared.VOLUME_BLOCK, block_reason)
ATTENTION = _guarded(shared.ATTENTION, attention_reason)
SPACE_DOWN = _guarded(shared.SPACE_DOWN, sampler_reason)
SPACE_UP = _guarded(shared.SPACE_UP, sampler_reason)
TIME_DOWN = _guarded(shared.TIME_DOWN, sampler_reason)
TIME_UP = _guarded(shared.TIME_UP, sampler_reason)
CONV = _guarded(shared.CONV, conv_reason)
