# SPDX-License-Identifier: Apache-2.0
"""What the rules for Cosmos's tokenizers share, diffusers' file and NVIDIA's own: samplers that add repeated or mean values to a
convolution of them, and attention with the positions of a frame or the frames of a position.

Each takes torch's convolution and what its module pads in front of it, as options of `ops.causal_conv3d`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels import ops
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_units import channels_last

Padding = dict[str, Any]


def plus_repeated(y: Tensor, x: Tensor, factor: int, first_single: bool) -> Tensor:
    """y + x with its frames doubled (the first one once) or its pixels doubled, without the doubled tensor."""
    big, small = units.as_rows(y), units.as_rows(x)
    if not first_single:
        pairs = big.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)), small[:, :, :, None, :, None]
        if not torch.is_grad_enabled() and x.dtype == y.dtype:
            pairs[0].add_(pairs[1])
            return y
        return units.as_clip((pairs[0] + pairs[1]).flatten(4, 5).flatten(2, 3))
    rest, more = big[:, 1:].unflatten(1, (-1, factor)), small[:, 1:, None]
    if not torch.is_grad_enabled() and x.dtype == y.dtype:
        big[:, :1].add_(small[:, :1])
        rest.add_(more)
        return y
    return units.as_clip(torch.cat([big[:, :1] + small[:, :1], (rest + more).flatten(1, 2)], 1))


def doubled_in_time(owner: Any, kernel: Any, padding: Padding, x: Tensor) -> Tensor:
    """Frames doubled, the first one once, plus their convolution."""
    return plus_repeated(upsampled(owner, kernel, padding, x, (2, 1, 1)), x, 2, first_single=True)


def doubled_in_space(owner: Any, kernel: Any, padding: Padding, x: Tensor) -> Tensor:
    """Pixels doubled, plus their convolution."""
    return plus_repeated(upsampled(owner, kernel, padding, x, (1, 2, 2)), x, 2, first_single=False)


def upsampled(owner: Any, kernel: Any, padding: Padding, x: Tensor, scale: tuple[int, int, int]) -> Tensor:
    """The convolution of repeated values, without the tensor of them; the first frame is there once."""
    backend = owner._vidkernels_backend("causal_conv3d")
    options = {"scale": scale, "first_frame": "single", "backend": backend, **padding}
    y: Tensor = ops.upsample_conv3d(x, kernel.weight, kernel.bias, **options)
    return y


def halved_in_space(owner: Any, kernel: Any, padding: Padding, x: Tensor) -> Tensor:
    """Means of 2 x 2 pixels, plus a strided convolution behind one zero row below and one zero column to the right."""
    frames = units.as_rows(x).flatten(0, 1).permute(0, 3, 1, 2)  # avg_pool3d has no bfloat16 on CPUs
    pooled = F.avg_pool2d(frames, 2).permute(0, 2, 3, 1).unflatten(0, (x.shape[0], -1))
    options = padding | {"spatial_padding": (0, 1, 0, 1), "spatial_padding_mode": "zeros"}
    return units.convolve(owner, kernel, x, channels_last(units.as_clip(pooled)), **options)


def halved_in_time(owner: Any, kernel: Any, padding: Padding, x: Tensor) -> Tensor:
    """Means of frames (0, 0), (1, 2), (3, 4), ..., plus a strided convolution with one more frame in front."""
    options = padding | {"pad_frames": padding["pad_frames"] + 1}
    return units.convolve(owner, kernel, x, frame_means(x), **options)


def frame_means(x: Tensor) -> Tensor:
    """The first frame, then the means of frames (1, 2), (3, 4), ...; one that is left over is left out."""
    count = (x.shape[2] + 1) // 2
    first, pairs = x[:, :, :1], (x[:, :, 1 : 2 * count - 2 : 2] + x[:, :, 2 : 2 * count - 1 : 2]) / 2
    return channels_last(torch.cat([first, pairs], 2))


def attended(
    parts: list[Tensor], heads: int, temporal: bool, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Queries, keys and values [B, C, T, H, W] in channels-last memory, mixed within each frame, or along each position."""
    order = (0, 2, 3, 1, 4) if temporal else (0, 1, 2, 3, 4)  # of the rows [B, T, H, W, C]
    rows = [units.as_rows(part).permute(order) for part in parts]
    split = [
        (row.flatten(0, 2) if temporal else row.flatten(2, 3).flatten(0, 1)).unflatten(2, (heads, -1)).transpose(1, 2)
        for row in rows
    ]
    if causal and torch.is_grad_enabled():
        mixed = _by_scores(split[0], split[1], split[2])
    else:
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2], attn_mask=mask, is_causal=causal)
    back = mixed.transpose(1, 2).flatten(2).reshape(rows[0].shape)
    return channels_last(units.as_clip(back.permute(0, 3, 1, 2, 4) if temporal else back))


def _by_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with its scores written out, which are few along time: where frames are nearly alike, torch's fused backward
    gives queries and keys gradients with 2 to 4 times the error of this one."""
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    scores = torch.matmul(q, k.mT) * q.shape[-1] ** -0.5
    return torch.matmul(scores.masked_fill(later, -torch.inf).softmax(-1), v)
