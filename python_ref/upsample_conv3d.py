# SPDX-License-Identifier: Apache-2.0
"""Upsampling, then a causal convolution, then the blend of both, written the obvious way."""

from __future__ import annotations

import math
from typing import Any

import torch

from .causal_conv3d import causal_conv3d, frame_padding, space_padding


def _triple(value: int | tuple[int, int, int]) -> tuple[int, int, int]:
    t, h, w = (value, value, value) if isinstance(value, int) else value
    return t, h, w


def _sources(s: int, total: int | None, factor: int, linear: bool, dropped: int, split: int) -> dict[int, float]:
    """Upsampled frame s >= 0 as {input frame: weight}; `total` None: the clip goes on."""
    if not linear:
        return {(s + dropped) // factor: 1.0}
    length = 2**62 if total is None else total
    split = min(split, length)
    begin, end = (0, split) if s < factor * split else (split, length)
    position = max((s - factor * begin + 0.5) / factor - 0.5, 0.0)
    low, weight = math.floor(position), position - math.floor(position)
    high = min(low + 1, end - begin - 1)
    sources = {begin + low: 1.0 - weight}
    if weight > 0:
        sources[begin + high] = sources.get(begin + high, 0.0) + weight
    return sources


def _ready(total: int, factor: int, linear: bool, dropped: int, split: int) -> int:
    """Upsampled frames that `total` input frames determine, whatever follows."""
    frames = max(factor * total - dropped, 0)
    while frames > 0 and max(_sources(frames - 1, None, factor, linear, dropped, split)) >= total:
        frames -= 1
    return frames


def upsample_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: int | tuple[int, int, int] = (2, 1, 1),
    mode: str = "nearest",
    first_frame: str = "repeat",
    split: int = 0,
    time_padding: str = "zeros",
    history: torch.Tensor | None = None,
    start: int = 0,
    final: bool | None = None,
    pad_frames: int | tuple[int, int] | None = None,
    spatial_padding: int | tuple[int, ...] | None = None,
    spatial_padding_mode: str = "zeros",
    mix_factor: torch.Tensor | None = None,
    return_history: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`u = upsample(x)`, `y = causal_conv3d(u, weight, bias)`; with `mix_factor` m: `y = s(m) u + (1 - s(m)) conv(u)`.

    Args:
        x: [B, C, T, H, W].
        weight: [K, C, kt, kh, kw].
        bias: [K].
        scale: factors of (t, h, w).
        mode: "nearest", or "linear_time": linear in time with half-pixel centres, nearest in space.
        first_frame: "repeat", or "single": the clip's first frame appears once (nearest only).
        split: the first `split` frames are interpolated by themselves ("linear_time"; VidTok 1.1).
        time_padding: frames before the first upsampled one: "zeros" or "replicate".
        history: [B, C, P, H, W], frames of the clip before x, as returned by the call before.
        start: how many frames of the clip lie before x.
        final: whether x ends the clip. Default: unless `return_history`.
        pad_frames, spatial_padding, spatial_padding_mode: as in `causal_conv3d`, counted in upsampled pixels.
        mix_factor: one number; s is the sigmoid.
        return_history: also return the frames that the next chunk needs.

    Returns:
        y [B, K, scale_t T, scale_h H, scale_w W] with default paddings; of a chunk, the frames that are certain by now.

    Source: VidTok (arXiv 2412.13061) and its AlphaBlender; HunyuanVideo's VAE (`first_frame="single"`).
    """
    factor, *space = _triple(scale)
    final = not return_history if final is None else final
    linear, dropped = mode == "linear_time", factor - 1 if first_frame == "single" else 0
    front, back = frame_padding(weight.shape[2], 1, 1, pad_frames)
    past = x[:, :, :0] if history is None else history
    frames, base, total = torch.cat([past, x], 2), start - past.shape[2], start + x.shape[2]
    rule = factor, linear, dropped, split
    upsampled = max(factor * total - dropped, 0)
    first, last = _ready(start, *rule), upsampled if final else _ready(total, *rule)

    def frame(s: int) -> torch.Tensor:
        outside = s < 0 or s >= upsampled
        if outside and time_padding == "zeros":
            return torch.zeros_like(frames[:, :, 0])
        sources = _sources(min(max(s, 0), upsampled - 1), total if final else None, *rule)
        value = torch.zeros_like(frames[:, :, 0], dtype=torch.promote_types(x.dtype, torch.float32))
        for i, c in sources.items():
            value = value + frames[:, :, i - base].to(value.dtype) * c
        return value.to(x.dtype)

    stream = [frame(s) for s in range(first - front, last + back)]
    u = torch.stack(stream, 2) if stream else frames[:, :, :0]
    u = u.repeat_interleave(space[0], 3).repeat_interleave(space[1], 4)
    if x.stride(1) == 1 and not x.is_contiguous():  # the result keeps the layout of x
        u = u.movedim(1, -1).contiguous().movedim(-1, 1)  # which torch.func.vmap knows
    padding = space_padding((weight.shape[3], weight.shape[4]), (1, 1), spatial_padding)
    y = causal_conv3d(
        u, weight, bias, time_padding="none", spatial_padding=padding, spatial_padding_mode=spatial_padding_mode
    )
    assert isinstance(y, torch.Tensor)
    if mix_factor is not None:
        alpha = torch.sigmoid(mix_factor.reshape(()))
        y = alpha * u[:, :, front : front + last - first] + (1 - alpha) * y
    if not return_history:
        return y
    reach = math.ceil(((factor - 1) / 2 + factor // 2 + front) / factor) if linear else math.ceil(front / factor)
    return y, frames[:, :, max(total - reach, 0) - base :].clone()


def downsample_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    mix_factor: torch.Tensor,
    stride: int | tuple[int, int, int] = (2, 1, 1),
    time_padding: str = "zeros",
    history: torch.Tensor | None = None,
    pad_frames: int | tuple[int, int] | None = None,
    return_history: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`y = s(m) mean(x) + (1 - s(m)) conv(x)`: both see the same windows of kt frames at the same stride.

    Args:
        x: [B, C, T, H, W].
        weight: [C, C, kt, kh, kw], kh and kw odd.
        bias: [C].
        mix_factor: one number m; s is the sigmoid.
        stride, time_padding, history, pad_frames, return_history: as in `causal_conv3d`. The padding frames take part
            in the mean, and count.

    Returns:
        y as of `causal_conv3d`.

    Source: VidTok's temporal AlphaBlender (arXiv 2412.13061).
    """
    options: dict[str, Any] = {
        "stride": stride, "time_padding": time_padding, "history": history, "pad_frames": pad_frames,
    }  # fmt: skip
    outcome = causal_conv3d(x, weight, bias, return_history=return_history, **options)
    y, remaining = outcome if isinstance(outcome, tuple) else (outcome, None)
    channels, frames = x.shape[1], weight.shape[2]
    mean = (
        torch.eye(channels, dtype=x.dtype, device=x.device)[:, :, None, None, None].expand(-1, -1, frames, 1, 1)
        / frames
    )
    pooled = causal_conv3d(x, mean, **options)
    alpha = torch.sigmoid(mix_factor.reshape(()))
    assert isinstance(pooled, torch.Tensor)
    blended = alpha * pooled + (1 - alpha) * y
    return blended if remaining is None else (blended, remaining)
