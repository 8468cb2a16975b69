# SPDX-License-Identifier: Apache-2.0
"""Causal 3D convolution, written the obvious way: pad, concatenate, `F.conv3d`."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _triple(value: int | tuple[int, int, int]) -> tuple[int, int, int]:
    t, h, w = (value, value, value) if isinstance(value, int) else value
    return t, h, w


def frame_padding(kernel: int, stride: int, dilation: int, pad_frames: int | tuple[int, int] | None) -> tuple[int, int]:
    """Frames (in front, behind) of a causal convolution; by default VidTok's (k-1)*d + (1-s) in front, at least 0."""
    if pad_frames is None:
        return max((kernel - 1) * dilation + (1 - stride), 0), 0
    front, back = (pad_frames, 0) if isinstance(pad_frames, int) else pad_frames
    return front, back


def space_padding(
    kernel: tuple[int, int], dilation: tuple[int, int], padding: int | tuple[int, ...] | None
) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) as in `F.pad`; the default keeps the size at stride 1."""
    if padding is None:
        (height, width) = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        return width // 2, width - width // 2, height // 2, height - height // 2
    if isinstance(padding, int):
        return padding, padding, padding, padding
    if len(padding) == 2:
        return padding[1], padding[1], padding[0], padding[0]
    left, right, top, bottom = padding
    return left, right, top, bottom


def _pad_axis(x: torch.Tensor, dim: int, before: int, behind: int, mode: str) -> torch.Tensor:
    if before == 0 and behind == 0:
        return x
    if mode == "replicate":
        index = torch.arange(-before, x.shape[dim] + behind, device=x.device).clamp(0, x.shape[dim] - 1)
        return x.index_select(dim, index)
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (before, behind))


def causal_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int | tuple[int, int, int] = 1,
    dilation: int | tuple[int, int, int] = 1,
    time_padding: str = "zeros",
    history: torch.Tensor | None = None,
    pad_frames: int | tuple[int, int] | None = None,
    spatial_padding: int | tuple[int, ...] | None = None,
    spatial_padding_mode: str = "zeros",
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    return_history: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`y = residual + act(conv3d(padded x, weight) + bias)`, no output frame depending on a later input frame.

    Args:
        x: [B, C, T, H, W].
        weight: [K, C, kt, kh, kw].
        bias: [K].
        stride, dilation: one int or (t, h, w).
        time_padding: what lies before the first frame, beyond `history`: "zeros", "replicate" (the oldest frame),
            "history" (`history` holds all of it) or "none" (nothing is put in front).
        history: [B, C, P, H, W], the P frames before x.
        pad_frames: frames in front, or (in front, behind). Default ((kt-1)*dt + 1 - st, 0), P for "history".
        spatial_padding: int, (h, w) or (left, right, top, bottom). Default: half of (k-1)*d on each side.
        spatial_padding_mode: "zeros" or "replicate".
        activation: None or "silu".
        residual: like y.
        return_history: also return the frames that the next chunk needs as `history`.

    Returns:
        y [B, K, To, Ho, Wo], and if asked [B, C, P', H, W].

    Source: VidTok (arXiv 2412.13061), MAGVIT-v2 (arXiv 2310.05737) section 3.1, CogVideoX, Wan and HunyuanVideo VAEs.
    """
    stride, dilation = _triple(stride), _triple(dilation)
    taps, *extent = weight.shape[2:]
    front, back = (0, 0) if time_padding == "none" else frame_padding(taps, stride[0], dilation[0], pad_frames)
    past = x[:, :, :0] if history is None else history
    if time_padding == "history" and pad_frames is None:
        front = past.shape[2]
    stream = torch.cat([past[:, :, max(past.shape[2] - front, 0) :], x], 2)
    mode = "replicate" if time_padding == "replicate" else "zeros"
    stream = _pad_axis(stream, 2, front + x.shape[2] - stream.shape[2], 0, mode)

    left, right, top, bottom = space_padding((extent[0], extent[1]), dilation[1:], spatial_padding)
    padded = _pad_axis(stream, 2, 0, back, mode)
    padded = _pad_axis(_pad_axis(padded, 3, top, bottom, spatial_padding_mode), 4, left, right, spatial_padding_mode)
    if x.stride(1) == 1 and not x.is_contiguous():  # the result keeps the layout of x
        padded = padded.movedim(1, -1).contiguous().movedim(-1, 1)  # which torch.func.vmap knows
    missing = dilation[0] * (taps - 1) + 1 - padded.shape[2]
    if missing > 0:  # fewer frames than the kernel spans: no output yet, in streaming
        y = F.conv3d(_pad_axis(padded, 2, missing, 0, "zeros"), weight, bias, stride, 0, dilation)[:, :, :0]
    else:
        y = F.conv3d(padded, weight, bias, stride, 0, dilation)
    consumed = y.shape[2] * stride[0]
    if activation == "silu":
        y = F.silu(y)
    if residual is not None:
        y = residual + y
    return (y, stream[:, :, consumed:].clone()) if return_history else y
