# SPDX-License-Identifier: Apache-2.0
"""Norm over groups of channels with SiLU, per frame and over the clip, at the widths of the video VAEs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.registry import Case, Function, Inputs, register
from vidkernels import ops

GROUPS = 32


def _eager(per_frame: bool) -> Function:
    """What diffusers' VAEs run: torch's GroupNorm, on one image a frame where statistics are a frame's."""

    def reference(inputs: Inputs) -> torch.Tensor:
        x, affine = inputs["x"], (inputs["weight"], inputs["bias"], 1e-6)
        if not per_frame:
            return F.silu(F.group_norm(x, GROUPS, *affine))
        images = x.transpose(1, 2).flatten(0, 1)
        return F.silu(F.group_norm(images, GROUPS, *affine)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    return reference


def _case(
    device: torch.device, channels: int, per_frame: bool, last: bool, dtype: torch.dtype, backward: bool, compiled: bool
) -> Case:
    frames, side = (4, 4096 // channels) if device.type == "cpu" else (20, 32768 // channels)

    def make() -> Inputs:
        x = torch.randn(1, channels, frames, side, side, device=device, dtype=dtype)
        vector = {name: torch.randn(channels, device=device, dtype=dtype) for name in ("weight", "bias")}
        return {"x": x.contiguous(memory_format=torch.channels_last_3d) if last else x, **vector}

    where, layout = "each frame" if per_frame else "clip", "NDHWC" if last else "NCDHW"
    size = f"{channels}ch {frames}x{side}x{side}"
    return Case(
        name=f"GroupNorm+SiLU {where} {size} {layout} {str(dtype)[6:]}{' fwd+bwd' if backward else ''}",
        make_inputs=make,
        ours=lambda i: ops.group_norm(i["x"], GROUPS, i["weight"], i["bias"], activation="silu", per_frame=per_frame),
        reference=_eager(per_frame),
        bytes=channels * frames * side * side * dtype.itemsize * (5 if backward else 2),
        backward=backward,
        compile=compiled,
    )


@register(stem="group_norm")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Frames of Cosmos and Mochi, clips of HunyuanVideo."""
    yield _case(device, 128, True, True, torch.float32, False, True)
    yield _case(device, 128, False, True, torch.float32, False, False)
    if not quick:
        yield _case(device, 128, True, False, torch.float32, False, False)
        yield _case(device, 512, True, True, torch.float32, False, False)
        yield _case(device, 128, True, True, torch.bfloat16, False, True)
        yield _case(device, 128, True, True, torch.float32, True, True)
        yield _case(device, 128, False, True, torch.float32, True, False)
