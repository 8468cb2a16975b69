# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of causal and of upsampling convolutions share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from benchmarks.registry import Function, Inputs, Outputs


def front(x: torch.Tensor, frames: int, time_padding: str) -> torch.Tensor:
    """What models do: a padded copy."""
    if frames == 0 or time_padding == "none":
        return x
    if time_padding == "zeros":
        return F.pad(x, (0, 0, 0, 0, frames, 0))
    return torch.cat([x[:, :, :1].repeat(1, 1, frames, 1, 1), x], 2)


def inputs_of(
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
        "x": x.contiguous(memory_format=torch.channels_last_3d),
        "weight": (torch.randn(filters, channels, *kernel, device=device) * scale).to(dtype),
        "bias": torch.randn(filters, device=device).to(dtype),
    }


def square(side: int | tuple[int, int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else side


def exact(reference: Function) -> Function:
    """The truth for half-precision rows on a GPU: float32 without TF32. In float64 cuDNN has no fast convolution, and
    torch's own unfolds the input to 27 times its size."""

    def truth(inputs: Inputs) -> Outputs:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return reference({name: value.float() for name, value in inputs.items()})

    return truth
