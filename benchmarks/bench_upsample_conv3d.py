# SPDX-License-Identifier: Apache-2.0
"""Upsampling with a convolution behind it, and blended samplers, at the shapes of VidTok first."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.convolutions import exact, front, inputs_of, square
from benchmarks.registry import Case, Inputs, register
from vidkernels import ops
from vidkernels._conv.aten import native_on_cpu

# factors, channels, frames, height and width
GPU_UPSAMPLING = (
    ((2, 1, 1), 512, 5, (32, 32)),
    ((2, 1, 1), 256, 10, (128, 128)),
    ((1, 2, 2), 256, 20, (128, 128)),
    ((1, 2, 2), 192, 9, (240, 416)),
    ((2, 2, 2), 256, 5, (128, 128)),
)


def _upsampling(
    scale: tuple[int, int, int],
    channels: int,
    frames: int,
    side: int | tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Case:
    height, width = square(side)
    kernel = (3 if scale[0] > 1 else 1, 3, 3)

    def reference(inputs: Inputs) -> torch.Tensor:
        u = F.interpolate(inputs["x"], scale_factor=tuple(map(float, scale)), mode="nearest")
        return F.conv3d(front(u, kernel[0] - 1, "zeros"), inputs["weight"], inputs["bias"], 1, (0, 1, 1))

    pixels = frames * height * width
    return Case(
        name=f"up {'x'.join(map(str, scale))} + conv {channels}ch {frames}x{height}x{width} {str(dtype)[6:]}",
        make_inputs=lambda: inputs_of(device, dtype, channels, channels, kernel, (frames, height, width)),
        ours=lambda i: ops.upsample_conv3d(i["x"], i["weight"], i["bias"], scale=scale),
        reference=reference,
        truth=exact(reference) if device.type == "cuda" else None,
        bytes=pixels * channels * (1 + math.prod(scale)) * dtype.itemsize,
        flops=2 * pixels * math.prod(scale) * channels * channels * math.prod(kernel),
        compile=False,
        note="flops are those on the upsampled tensor",
    )


def _blended_down(channels: int, frames: int, side: int, device: torch.device, dtype: torch.dtype) -> Case:
    def reference(inputs: Inputs) -> torch.Tensor:
        x = front(inputs["x"], 1, "replicate")
        alpha = torch.sigmoid(inputs["mix"])
        pooled = F.avg_pool3d(x, (3, 1, 1), (2, 1, 1))
        return alpha * pooled + (1 - alpha) * F.conv3d(x, inputs["weight"], inputs["bias"], (2, 1, 1), (0, 1, 1))

    size = (frames, side, side)
    return Case(
        name=f"blended down {channels}ch {frames}x{side}x{side} {str(dtype)[6:]}",
        make_inputs=lambda: {
            **inputs_of(device, dtype, channels, channels, (3, 3, 3), size),
            "mix": torch.full((1,), 2.0, device=device, dtype=dtype),
        },
        ours=lambda i: ops.downsample_conv3d(
            i["x"], i["weight"], i["bias"], mix_factor=i["mix"], time_padding="replicate"
        ),
        reference=reference,
        flops=frames // 2 * side * side * 2 * 27 * channels**2,
        compile=False,
    )


@register(stem="upsample_conv3d")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Float32 on a CPU, bfloat16 on a GPU and where torch multiplies it on a CPU in units of its own."""
    channels, frames = (64, 4) if quick else (256, 20)
    if device.type == "cuda":
        for case in GPU_UPSAMPLING[-1:] if quick else GPU_UPSAMPLING:
            yield _upsampling(*case, device, torch.bfloat16)
        yield _blended_down(channels, frames, 64 if quick else 128, device, torch.bfloat16)
        return
    side = 24 if quick else 64
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and (quick or not native_on_cpu(dtype)):
            continue
        for scale in ((2, 1, 1), (1, 2, 2), (2, 2, 2)):
            yield _upsampling(scale, channels, 3 if quick else 5, side, device, dtype)
        if dtype == torch.float32:  # torch has no pooling of bfloat16 on CPUs
            yield _blended_down(channels, frames, side, device, dtype)
