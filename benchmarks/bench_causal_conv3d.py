# SPDX-License-Identifier: Apache-2.0
"""Causal convolutions, upsampling convolutions and blended samplers, at the shapes of VidTok first."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.registry import Case, Inputs, register
from vidkernels import ops

CHANNELS_LAST = torch.channels_last_3d
# name: channels, filters, kernel, frames, height and width, time padding
QUICK = {
    "128ch 3x3x3": (128, 128, (3, 3, 3), 5, 32, "zeros"),
    "128ch 1x3x3": (128, 128, (1, 3, 3), 4, 48, "none"),
    "128ch 3x1x1": (128, 128, (3, 1, 1), 8, 48, "replicate"),
}
FULL = {
    "128ch 3x3x3": (128, 128, (3, 3, 3), 17, 64, "zeros"),
    "96ch 3x3x3": (96, 96, (3, 3, 3), 17, 64, "zeros"),
    "256ch 3x3x3": (256, 256, (3, 3, 3), 10, 64, "replicate"),
    "512ch 3x3x3": (512, 512, (3, 3, 3), 5, 32, "replicate"),
    "128ch 1x3x3": (128, 128, (1, 3, 3), 20, 128, "none"),
    "256to128 1x3x3": (256, 128, (1, 3, 3), 20, 64, "none"),
    "512ch 1x3x3": (512, 512, (1, 3, 3), 5, 32, "none"),
    "128ch 3x1x1": (128, 128, (3, 1, 1), 20, 128, "replicate"),
    "512ch 3x1x1": (512, 512, (3, 1, 1), 5, 32, "replicate"),
    "256to128 1x1x1": (256, 128, (1, 1, 1), 20, 64, "none"),
    "3to128 3x3x3": (3, 128, (3, 3, 3), 5, 128, "replicate"),
    "128to3 3x3x3": (128, 3, (3, 3, 3), 5, 128, "replicate"),
}


def _front(x: torch.Tensor, frames: int, time_padding: str) -> torch.Tensor:
    """What models do: a padded copy."""
    if frames == 0 or time_padding == "none":
        return x
    if time_padding == "zeros":
        return F.pad(x, (0, 0, 0, 0, frames, 0))
    return torch.cat([x[:, :, :1].repeat(1, 1, frames, 1, 1), x], 2)


def _inputs(
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    filters: int,
    kernel: tuple[int, ...],
    size: tuple[int, ...],
) -> Inputs:
    scale = 1 / math.sqrt(channels * math.prod(kernel))
    x = F.silu(torch.randn(1, channels, *size, device=device)).to(dtype)  # a norm and SiLU produce most inputs
    return {
        "x": x.contiguous(memory_format=CHANNELS_LAST),
        "weight": (torch.randn(filters, channels, *kernel, device=device) * scale).to(dtype),
        "bias": torch.randn(filters, device=device).to(dtype),
    }


def _convolution(
    name: str,
    shape: tuple[int, int, tuple[int, ...], int, int, str],
    device: torch.device,
    dtype: torch.dtype,
    backward: bool,
) -> Case:
    channels, filters, kernel, frames, side, time_padding = shape

    def reference(inputs: Inputs) -> torch.Tensor:
        x = _front(inputs["x"], kernel[0] - 1, time_padding)
        return F.conv3d(x, inputs["weight"], inputs["bias"], 1, (0, kernel[1] // 2, kernel[2] // 2))

    def contiguous(inputs: Inputs) -> torch.Tensor:
        return reference({**inputs, "x": inputs["x"].contiguous()})

    pixels = frames * side * side
    flops = 2 * pixels * channels * filters * math.prod(kernel)
    return Case(
        name=f"{name} {frames}x{side}x{side} {time_padding} {str(dtype)[6:]}{' fwd+bwd' if backward else ''}",
        make_inputs=lambda: _inputs(device, dtype, channels, filters, kernel, (frames, side, side)),
        ours=lambda i: ops.causal_conv3d(i["x"], i["weight"], i["bias"], time_padding=time_padding),
        reference=reference,
        peers={} if backward else {"contiguous layout": contiguous},
        bytes=(pixels * (channels + filters) + channels * filters * math.prod(kernel)) * dtype.itemsize,
        flops=flops * (3 if backward else 1),
        backward=backward,
        compile=False,
        note="channels_last_3d; flops are those of the plain convolution",
    )


def _upsampling(
    scale: tuple[int, int, int], channels: int, frames: int, side: int, device: torch.device, dtype: torch.dtype
) -> Case:
    kernel = (3 if scale[0] > 1 else 1, 3, 3)

    def reference(inputs: Inputs) -> torch.Tensor:
        u = F.interpolate(inputs["x"], scale_factor=tuple(map(float, scale)), mode="nearest")
        return F.conv3d(_front(u, kernel[0] - 1, "zeros"), inputs["weight"], inputs["bias"], 1, (0, 1, 1))

    pixels = frames * side * side
    return Case(
        name=f"up {'x'.join(map(str, scale))} + conv {channels}ch {frames}x{side}x{side} {str(dtype)[6:]}",
        make_inputs=lambda: _inputs(device, dtype, channels, channels, kernel, (frames, side, side)),
        ours=lambda i: ops.upsample_conv3d(i["x"], i["weight"], i["bias"], scale=scale),
        reference=reference,
        bytes=pixels * channels * (1 + math.prod(scale)) * dtype.itemsize,
        flops=2 * pixels * math.prod(scale) * channels * channels * math.prod(kernel),
        compile=False,
        note="flops are those on the upsampled tensor",
    )


def _blended_down(channels: int, frames: int, side: int, device: torch.device, dtype: torch.dtype) -> Case:
    def reference(inputs: Inputs) -> torch.Tensor:
        x = _front(inputs["x"], 1, "replicate")
        alpha = torch.sigmoid(inputs["mix"])
        pooled = F.avg_pool3d(x, (3, 1, 1), (2, 1, 1))
        return alpha * pooled + (1 - alpha) * F.conv3d(x, inputs["weight"], inputs["bias"], (2, 1, 1), (0, 1, 1))

    size = (frames, side, side)
    return Case(
        name=f"blended down {channels}ch {frames}x{side}x{side} {str(dtype)[6:]}",
        make_inputs=lambda: {
            **_inputs(device, dtype, channels, channels, (3, 3, 3), size),
            "mix": torch.full((1,), 2.0, device=device, dtype=dtype),
        },
        ours=lambda i: ops.downsample_conv3d(
            i["x"], i["weight"], i["bias"], mix_factor=i["mix"], time_padding="replicate"
        ),
        reference=reference,
        flops=frames // 2 * side * side * 2 * 27 * channels**2,
        compile=False,
    )


@register(stem="causal_conv3d")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Float32 on the CPU, bfloat16 on a GPU; one bfloat16 row on the CPU."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for name, shape in (QUICK if quick else FULL).items():
        yield _convolution(name, shape, device, dtype, backward=False)
    side, frames = (24, 3) if quick else (64, 10)
    yield _convolution("64ch 3x3x3", (64, 64, (3, 3, 3), frames, side, "zeros"), device, dtype, backward=True)
    if device.type == "cpu":
        small = (32, 32, (3, 3, 3), 3, 12, "zeros")  # torch's own takes seconds here without bfloat16 units
        yield _convolution("32ch 3x3x3", small, device, torch.bfloat16, backward=False)
    for scale in ((2, 1, 1), (1, 2, 2), (2, 2, 2)):
        yield _upsampling(scale, 64 if quick else 256, 3 if quick else 5, side, device, dtype)
    yield _blended_down(64 if quick else 256, 4 if quick else 20, side, device, dtype)
