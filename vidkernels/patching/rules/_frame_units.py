# SPDX-License-Identifier: Apache-2.0
"""Units of 2-D networks for frames (VAEs of images, and 2-D blocks of video VAEs), fused on one layout.

Frames [N, C, H, W] in channels-last memory and a clip [1, C, N, H, W] are the same memory: units take and return clips, for
which the ops have 1x3x3 convolutions and norms of each frame. They take the layers of a module (norms, convolutions, linear
layers), whatever class the module has, and guards that belong to them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels.nn._residual import in_pieces
from vidkernels.patching._guard import call_reason, child_reason, parameter_of
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_memory import may_write


class ResidualLayers(NamedTuple):
    """`x + conv2(dropout(silu(norm2(conv1(silu(norm1(x)))))))`, or `shortcut(x) + ...`."""

    norm1: Any
    conv1: Any
    norm2: Any
    conv2: Any
    shortcut: Any = None
    dropout: Any = None


class AttentionLayers(NamedTuple):
    """A norm, and projections that are linear layers or convolutions of one tap."""

    norm: Any
    query: Any
    key: Any
    value: Any
    out: Any


def as_frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] in channels-last memory as frames [B*T, C, H, W]; a view."""
    return units.as_rows(x).flatten(0, 1).permute(0, 3, 1, 2)


def as_video(frames: Tensor, batch: int = 1) -> Tensor:
    """Frames [B*T, C, H, W] as [B, C, T, H, W] in channels-last memory; a view of frames that are channels last."""
    rows = frames.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return units.channels_last(units.as_clip(rows.unflatten(0, (batch, frames.shape[0] // batch))))


def frames_like(y: Tensor, like: Tensor) -> Tensor:
    """A clip as frames in the memory format of `like`, the frames that a module got."""
    frames = as_frames(y)
    is_last = like.shape[1] > 1 and like.stride(1) == 1
    return frames if is_last else frames.contiguous()


def frames_reason(x: Any, *others: Tensor | None) -> str | None:
    """Why a call cannot use kernels whatever the module; its first input has to be frames [N, C, H, W]."""
    reason = call_reason(x, *others)
    if reason is None and (x.ndim != 4 or not x.dtype.is_floating_point):
        reason = f"an input has {x.ndim} axes and dtype {x.dtype}"
    return reason


def conv_reason(conv: Any) -> str | None:
    """Why a 2-D convolution must be called."""
    reason = units.kernel_reason(conv, nn.Conv2d)
    if reason is None and isinstance(conv.padding, str):
        reason = f"a convolution has the padding {conv.padding!r}"
    return reason


def per_frame(owner: Any, conv: Any, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """A 2-D convolution with zero padding, plus the residual."""
    return units.convolve(owner, conv, x, residual, out, time_padding="none", spatial_padding=conv.padding)


def over_time(owner: Any, conv: Any, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """A 3-D convolution with zero padding on all sides, plus the residual."""
    padding = conv.padding
    return units.convolve(owner, conv, x, residual, out, pad_frames=(padding[0],) * 2, spatial_padding=padding[1:])


def residual_reason(layers: ResidualLayers, norm_reason: Any = units.group_reason) -> str | None:
    """Why the layers of a residual block must be called; `norm_reason(*norms)` says it of its norms."""
    reason = norm_reason(layers.norm1, layers.norm2) or conv_reason(layers.conv1) or conv_reason(layers.conv2)
    if reason is None and layers.dropout is not None:
        reason = child_reason(layers.dropout, nn.Dropout)
    if reason is None and layers.shortcut is not None:
        reason = conv_reason(layers.shortcut)
    return reason


def residual_block(owner: Any, layers: ResidualLayers, x: Tensor, normed: Any = units.group_normed) -> Tensor:
    """Residual block over the frames of [B, C, T, H, W] in channels-last memory; `normed` is called as `group_normed`.

    Where nobody reads x again (`_vae_memory.overwriting`) it goes frame by frame, over x if there is no shortcut.
    """
    if not may_write(x):
        return _residual(owner, layers, x, None, False, normed)
    inplace = layers.shortcut is None
    channels = layers.conv2.out_channels
    return in_pieces(lambda x, out: _residual(owner, layers, x, out, True, normed), x, 2, channels, inplace=inplace)


def _residual(owner: Any, layers: ResidualLayers, x: Tensor, out: Tensor | None, may_add: bool, normed: Any) -> Tensor:
    h = per_frame(owner, layers.conv1, normed(owner, layers.norm1, x, per_frame=True))
    h = normed(owner, layers.norm2, h, per_frame=True)
    h = h if layers.dropout is None else units.dropped(layers.dropout, h)
    shortcut = x
    if layers.shortcut is not None:
        shortcut = per_frame(owner, layers.shortcut, x, out=out)
        out = shortcut if may_add else out
    return per_frame(owner, layers.conv2, h, shortcut, out)


def doubling_reason(conv: Any) -> str | None:
    """Why the convolution behind a nearest doubling must be called."""
    reason = conv_reason(conv)
    given = (3, 3), (1, 1), (1, 1), (1, 1)
    if reason is None and (conv.kernel_size, conv.padding, conv.stride, conv.dilation) != given:
        reason = f"an upsampler's convolution has a kernel of {conv.kernel_size} and padding {conv.padding}"
    return reason


def doubled(owner: Any, conv: Any, x: Tensor) -> Tensor:
    """Nearest doubling of height and width and a convolution, without the doubled tensor, or with a small one."""
    return units.doubled_in_space(owner, conv, x)


def halving_reason(conv: Any) -> str | None:
    """Why the convolution behind a zero row below and a zero column to the right must be called."""
    reason = conv_reason(conv)
    given = (3, 3), (0, 0), (2, 2), (1, 1)
    if reason is None and (conv.kernel_size, conv.padding, conv.stride, conv.dilation) != given:
        reason = f"a downsampler's convolution has a kernel of {conv.kernel_size} and padding {conv.padding}"
    return reason


def halved(owner: Any, conv: Any, x: Tensor) -> Tensor:
    """A convolution of stride 2 behind one zero row below and one zero column to the right, without the padded copy."""
    return units.halved_in_space(owner, conv, x)


def attention_reason(layers: AttentionLayers) -> str | None:
    """Why the layers of an attention over positions must be called."""
    reason = units.group_reason(layers.norm)
    for layer in layers[1:]:
        reason = reason or child_reason(layer, nn.Linear, nn.Conv2d)
        if reason is None and getattr(layer, "kernel_size", (1, 1)) != (1, 1):
            reason = f"a projection has a kernel of {layer.kernel_size}"
        if reason is None and isinstance(layer, nn.Conv2d):
            reason = conv_reason(layer)
    return reason


def attention(owner: Any, layers: AttentionLayers, x: Tensor, heads: int = 1, residual: bool = True) -> Tensor:
    """Attention over the positions of each frame of [B, C, T, H, W] in channels-last memory, plus x."""
    batch, _, frames, height, width = x.shape
    normed = units.as_rows(units.group_normed(owner, layers.norm, x, None, per_frame=True))
    rows = normed.reshape(batch * frames, height * width, -1)
    q, k, v = (
        _projected(layer, rows).unflatten(-1, (heads, -1)).transpose(1, 2)
        for layer in (layers.query, layers.key, layers.value)
    )  # [B*T, heads, H*W, d]
    mixed = F.scaled_dot_product_attention(q, k, v)
    y = _projected(layers.out, mixed.transpose(1, 2).flatten(2))
    clip = units.as_clip(y.reshape(batch, frames, height, width, -1))
    return clip + x if residual else clip


def _projected(layer: Any, rows: Tensor) -> Tensor:
    bias = parameter_of(layer, "bias")
    return F.linear(rows, parameter_of(layer, "weight").flatten(1), bias)
