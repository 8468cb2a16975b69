# SPDX-License-Identifier: Apache-2.0
"""CogVideoX's causal convolution, which Mochi has too, and its spatially conditioned norm.

A convolution returns its result and the frames that the next chunk needs. The original keeps the whole input of every
convolution of one tap, which nobody reads; here those caches have no frames.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels.patching._guard import child_reason
from vidkernels.patching.rules import _vae_units as units


def conv_reason(conv: Any, home: Any) -> str | None:
    """Why a causal convolution must be called."""
    reason = units.wrapped_reason(conv, home.CogVideoXCausalConv3d, home.CogVideoXSafeConv3d)
    return reason or padding_reason(conv)


def padding_reason(conv: Any) -> str | None:
    """Why the padding of a causal convolution is not served; beside frames from a cache, torch's pads height and width."""
    return units.unpadded_reason(conv._modules["conv"], 3 if conv.pad_mode == "replicate" else 1)


def causal(
    owner: Any,
    conv: Any,
    x: Tensor,
    cache: Tensor | None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(`conv(x) + residual` behind the frames of `cache`, or the first frame repeated; the next chunk's cache).

    out: receives the result, as in `_vae_units.convolve`.
    """
    kernel = conv._modules["conv"]
    if conv.pad_mode == "replicate":
        return units.convolve(owner, kernel, x, residual, out, **units.padding_of(conv)), None
    front = conv.time_kernel_size - 1
    history = None if cache is None or front == 0 else cache.to(x)
    options = {"time_padding": "replicate", "pad_frames": front, "history": history}
    y = units.convolve(owner, kernel, x, residual, out, spatial_padding=kernel.padding[1:], **options)
    if front == 0:
        return y, x.new_empty((*x.shape[:2], 0, *x.shape[3:]))
    oldest = x[:, :, :1].expand(-1, -1, front, -1, -1) if history is None else history
    return y, units.last_frames(x, oldest, front)


def spatial_norm_reason(norm: Any, home: Any) -> str | None:
    """Why a spatially conditioned norm must be called."""
    parts = norm._modules
    reason = child_reason(norm, home.CogVideoXSpatialNorm3D) or units.group_reason(parts["norm_layer"])
    reason = reason or conv_reason(parts["conv_y"], home) or conv_reason(parts["conv_b"], home)
    if reason is None and (parts["conv_y"].time_kernel_size != 1 or parts["conv_b"].time_kernel_size != 1):
        reason = "a norm's convolutions have more than one tap"
    return reason


def _segments(frames: int, latent: int) -> tuple[tuple[int, int], ...] | None:
    """(frames, latent frames) of the parts in which each latent frame stands for equally many frames."""
    parts = ((1, 1), (frames - 1, latent - 1)) if frames > 1 and frames % 2 == 1 else ((frames, latent),)
    fits = all(b > 0 and a % b == 0 for a, b in parts)
    return parts if fits else None


def scale_reason(f: Tensor, zq: Tensor) -> str | None:
    """Why latents cannot be repeated onto f: PyTorch's nearest index is exact for factors that are powers of two."""
    factors = [f.shape[axis] / zq.shape[axis] for axis in (3, 4)]
    powers = all(factor in (1, 2, 4, 8, 16, 32) for factor in factors)
    return None if powers and _segments(f.shape[2], zq.shape[2]) else f"latents {tuple(zq.shape)} do not repeat evenly"


def spatial_normed(owner: Any, norm: Any, f: Tensor, zq: Tensor, silu: bool = True) -> Tensor:
    """`silu(GroupNorm(f) * up(conv_y(zq)) + up(conv_b(zq)))`.

    A convolution of one tap commutes with nearest upsampling: it runs on the latents, and its result is repeated by
    strides of zero, where the original convolves latents that are as large as f, to tensors as large as f.
    """
    y, b = (
        units.as_rows(units.pointwise(owner, conv._modules["conv"], zq))
        for conv in (norm._modules["conv_y"], norm._modules["conv_b"])
    )
    h = units.group_normed(owner, norm._modules["norm_layer"], f, None)
    rows = units.as_rows(h)
    inplace = not torch.is_grad_enabled() and y.dtype == h.dtype and not torch.compiler.is_compiling()
    batch, known, height, width, channels = y.shape
    y, b = (t.view(batch, known, 1, height, 1, width, 1, channels) for t in (y, b))
    parts, start, first = [], 0, 0
    for frames, latent in _segments(f.shape[2], zq.shape[2]) or ():
        boxes = (frames // latent, height, rows.shape[2] // height, width, rows.shape[3] // width)
        part = rows.narrow(1, start, frames).view(batch, latent, *boxes, channels)
        factor, shift = y.narrow(1, first, latent), b.narrow(1, first, latent)
        if inplace:
            torch.addcmul(shift, part, factor, out=part)
        else:
            parts.append(torch.addcmul(shift, part, factor).flatten(5, 6).flatten(3, 4).flatten(1, 2))
        start, first = start + frames, first + latent
    if inplace:
        return F.silu(h, inplace=True) if silu else h
    result = units.as_clip(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
    return F.silu(result) if silu else result
