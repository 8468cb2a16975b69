# SPDX-License-Identifier: Apache-2.0
"""Causal convolutions, at the shapes of VidTok first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.convolutions import exact, front, inputs_of, square
from benchmarks.registry import Case, Function, Inputs, register
from vidkernels import cudnn, ops
from vidkernels._conv import cuda
from vidkernels._conv.aten import native_on_cpu
from vidkernels.ops._causal_conv3d_call import prepare
from vidkernels.ops.causal_conv3d import _computed, _Decision

Shape = tuple[int, int, tuple[int, int, int], int, int | tuple[int, int], str]
# name: channels, filters, kernel, frames, height and width, time padding
QUICK: dict[str, Shape] = {
    "128ch 3x3x3": (128, 128, (3, 3, 3), 5, 32, "zeros"),
    "128ch 1x3x3": (128, 128, (1, 3, 3), 4, 48, "none"),
    "128ch 3x1x1": (128, 128, (3, 1, 1), 8, 48, "replicate"),
}
FULL: dict[str, Shape] = {
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
# Forward and backward, float32 on a CPU.
TRAINED: dict[str, Shape] = {
    "64ch 3x3x3": (64, 64, (3, 3, 3), 10, 64, "zeros"),
    "128ch 3x3x3": (128, 128, (3, 3, 3), 5, 32, "zeros"),
    "128ch 1x3x3": (128, 128, (1, 3, 3), 4, 48, "none"),
    "256ch 3x3x3": (256, 256, (3, 3, 3), 4, 32, "replicate"),
    "512ch 3x3x3": (512, 512, (3, 3, 3), 5, 16, "replicate"),
    "128ch 3x1x1": (128, 128, (3, 1, 1), 8, 48, "replicate"),
    "3to128 3x3x3": (3, 128, (3, 3, 3), 3, 48, "replicate"),
    "128to3 3x3x3": (128, 3, (3, 3, 3), 3, 48, "replicate"),
}

# On a GPU: VidTok at 17 x 256 x 256, Wan 2.1 at 480 x 832 and Wan 2.2 at 704 x 1280, fewer frames where one tensor would
# take more than 2 GB.
GPU: dict[str, Shape] = {
    "VidTok 128ch 1x3x3": (128, 128, (1, 3, 3), 20, 256, "none"),
    "VidTok 256ch 3x3x3": (256, 256, (3, 3, 3), 20, 256, "zeros"),
    "VidTok 1.1 256ch 3x3x3": (256, 256, (3, 3, 3), 20, 256, "replicate"),
    "VidTok 128ch 3x1x1": (128, 128, (3, 1, 1), 20, 256, "zeros"),
    "VidTok 512ch 3x3x3": (512, 512, (3, 3, 3), 5, 32, "zeros"),
    "VidTok 512ch 1x3x3": (512, 512, (1, 3, 3), 10, 64, "none"),
    "VidTok 256to128 1x1x1": (256, 128, (1, 1, 1), 20, 256, "none"),
    "VidTok conv_in": (3, 128, (3, 3, 3), 17, 256, "replicate"),
    "VidTok conv_out": (128, 3, (3, 3, 3), 17, 256, "replicate"),
    "128ch 3x3x3": (128, 128, (3, 3, 3), 17, 256, "zeros"),
    "Wan 96ch 3x3x3": (96, 96, (3, 3, 3), 21, (480, 832), "zeros"),
    "Wan 192ch 3x3x3": (192, 192, (3, 3, 3), 21, (240, 416), "zeros"),
    "Wan 384ch 3x3x3": (384, 384, (3, 3, 3), 21, (60, 104), "zeros"),
    "Wan 384ch 3x1x1": (384, 384, (3, 1, 1), 21, (60, 104), "zeros"),
    "Wan 2.2 160ch 3x3x3": (160, 160, (3, 3, 3), 9, (352, 640), "zeros"),
    "Wan 2.2 256ch 3x3x3": (256, 256, (3, 3, 3), 9, (352, 640), "zeros"),
    "Wan 2.2 1024ch 3x3x3": (1024, 1024, (3, 3, 3), 5, (44, 80), "zeros"),
}
GPU_GRADIENTS: dict[str, Shape] = {
    "VidTok 128ch 1x3x3": (128, 128, (1, 3, 3), 8, 128, "none"),
    "VidTok 256ch 3x3x3": (256, 256, (3, 3, 3), 8, 128, "zeros"),
    "VidTok 128ch 3x1x1": (128, 128, (3, 1, 1), 8, 128, "zeros"),
    "VidTok 512ch 3x3x3": (512, 512, (3, 3, 3), 5, 32, "zeros"),
    "Wan 96ch 3x3x3": (96, 96, (3, 3, 3), 5, (240, 416), "zeros"),
}


def _on(backend: str, **options: Any) -> Function:
    """One backend of causal_conv3d by name; where only shapes are traced, on a CPU, past the reason why it cannot run there."""

    def run(inputs: Inputs) -> torch.Tensor:
        x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
        if x.is_cuda:
            result = ops.causal_conv3d(x, weight, bias, backend=backend, **options)
            assert isinstance(result, torch.Tensor)
            return result
        call = prepare(x, weight, bias, **options)
        return _computed(call, _Decision(call.geometry, call.activation, call.size, 0, backend, None))

    return run


def _multiplies_boxes() -> bool:
    """Whether the GPU has what our own kernel asks for; without a GPU, where only shapes are traced, as if."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() == (9, 0)


def _gpu_peers(
    reference: Function, channels: int, filters: int, kernel: tuple[int, ...], time_padding: str
) -> dict[str, Function]:
    """Each backend by itself; torch's convolution with padding on both sides of which a slice is kept."""
    peers = {
        "ours, triton": _on("triton", time_padding=time_padding),
        "ours, torch": _on("torch", time_padding=time_padding),
    }
    zeros = time_padding != "replicate" or kernel[0] == 1
    if zeros and channels % 8 == filters % 8 == 0 and (cudnn.missing() is None or not torch.cuda.is_available()):
        peers["ours, cudnn"] = _on("cudnn", time_padding=time_padding)
    if kernel[1:] == (3, 3) and channels % 8 == 0 and cuda.tile_filters(filters) and _multiplies_boxes():
        peers["ours, cuda"] = _on("cuda", time_padding=time_padding)
    if zeros and kernel[0] > 1:
        padding = kernel[0] - 1, kernel[1] // 2, kernel[2] // 2

        def slice_of_symmetric(inputs: Inputs) -> torch.Tensor:
            y = F.conv3d(inputs["x"], inputs["weight"], inputs["bias"], 1, padding)
            return y[:, :, : inputs["x"].shape[2]]

        peers["padded on both sides, sliced"] = slice_of_symmetric
    return peers


def _gradient(name: str, shape: Shape, wanted: str, device: torch.device, dtype: torch.dtype) -> Case:
    """The data gradient (`wanted` x) or the weight gradient alone."""
    whole = _convolution(name, shape, device, dtype, backward=False)

    def make_inputs() -> Inputs:
        inputs = whole.make_inputs()
        inputs[wanted].requires_grad_(True)
        return inputs

    kind = {"x": "dgrad", "weight": "wgrad"}[wanted]
    return dataclasses.replace(whole, name=f"{whole.name} {kind}", make_inputs=make_inputs, backward="only")


def _convolution(
    name: str,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool,
) -> Case:
    channels, filters, kernel, frames, side, time_padding = shape
    height, width = square(side)

    def reference(inputs: Inputs) -> torch.Tensor:
        x = front(inputs["x"], kernel[0] - 1, time_padding)
        return F.conv3d(x, inputs["weight"], inputs["bias"], 1, (0, kernel[1] // 2, kernel[2] // 2))

    def contiguous(inputs: Inputs) -> torch.Tensor:
        return reference({**inputs, "x": inputs["x"].contiguous()})

    on_gpu = device.type == "cuda"
    peers = {} if backward else {"contiguous layout": contiguous}
    if on_gpu:
        peers = _gpu_peers(reference, channels, filters, kernel, time_padding)
    pixels = frames * height * width
    flops = 2 * pixels * channels * filters * math.prod(kernel)
    return Case(
        name=f"{name} {frames}x{height}x{width} {time_padding} {str(dtype)[6:]}{' fwd+bwd' if backward else ''}",
        make_inputs=lambda: inputs_of(device, dtype, channels, filters, kernel, (frames, height, width)),
        ours=lambda i: ops.causal_conv3d(i["x"], i["weight"], i["bias"], time_padding=time_padding),
        reference=reference,
        peers=peers,
        truth=exact(reference) if on_gpu else None,
        bytes=(pixels * (channels + filters) + channels * filters * math.prod(kernel)) * dtype.itemsize,
        flops=flops * (3 if backward else 1),
        backward=backward,
        compile=False,
        note="channels_last_3d; flops are those of the plain convolution",
    )


@register(stem="causal_conv3d")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Float32 on a CPU, and bfloat16 where torch multiplies it in units of its own; elsewhere one row or two of it."""
    if device.type == "cuda":
        return
    dtype = torch.float32
    for name, shape in (QUICK if quick else FULL).items():
        yield _convolution(name, shape, device, dtype, backward=False)
    trained = {"64ch 3x3x3": (64, 64, (3, 3, 3), 3, 24, "zeros")} if quick else TRAINED
    for name, shape in trained.items():
        yield _convolution(name, shape, device, dtype, backward=True)
    small = (32, 32, (3, 3, 3), 3, 12, "zeros")
    yield _convolution("32ch 3x3x3", small, device, torch.bfloat16, backward=False)
    if native_on_cpu(torch.bfloat16):
        for name, shape in ({} if quick else FULL).items():
            yield _convolution(name, shape, device, torch.bfloat16, backward=False)
        for name, shape in ({} if quick else TRAINED).items():
            yield _convolution(name, shape, device, torch.bfloat16, backward=True)
    elif not quick:  # torch's own takes 13 s here, and minutes for 17x64x64
        yield _convolution("128ch 3x3x3", (128, 128, (3, 3, 3), 5, 32, "zeros"), device, torch.bfloat16, backward=False)


@register(stem="causal_conv3d")
def gpu_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """bfloat16 on a GPU: the models' shapes forward, and gradients alone."""
    if device.type != "cuda":
        return
    dtype = torch.bfloat16
    for name, shape in (QUICK if quick else GPU).items():
        yield _convolution(name, shape, device, dtype, backward=False)
    for name, shape in list(GPU_GRADIENTS.items())[: 2 if quick else None]:
        for wanted in ("x", "weight"):
            yield _gradient(name, shape, wanted, device, dtype)
