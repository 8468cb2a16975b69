# SPDX-License-Identifier: Apache-2.0
"""Norm over channels with SiLU, in both memory formats, at VidTok's widths."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.registry import Case, Function, Inputs, register
from vidkernels import ops


def _eager(inputs: Inputs) -> torch.Tensor:
    """What diffusers' VidTok runs: LayerNorm on a channels-last view, then SiLU."""
    x = inputs["x"].permute(0, 2, 3, 4, 1)
    return F.silu(F.layer_norm(x, x.shape[-1:], inputs["weight"], inputs["bias"], 1e-6)).permute(0, 4, 1, 2, 3)


def _liger(inputs: Inputs) -> torch.Tensor:
    """Liger's LayerNorm, a Triton kernel, on the channels-last view; SiLU in torch."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    x = inputs["x"].permute(0, 2, 3, 4, 1)
    normed = LigerLayerNormFunction.apply(x, inputs["weight"], inputs["bias"], 1e-6)
    return F.silu(normed).permute(0, 4, 1, 2, 3)


def _rivals(device: torch.device, memory_format: torch.memory_format) -> dict[str, Function]:
    """In the other format Liger would copy x first: channels have to be neighbours for it."""
    fits = device.type == "cuda" and memory_format == torch.channels_last_3d
    return {"Liger LayerNorm + torch": _liger} if fits and peers.find("liger_kernel.ops.layer_norm") else {}


def _case(
    device: torch.device,
    channels: int,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    backward: bool,
    compiled: bool,
    side: int | None = None,
) -> Case:
    frames, side = (4, side or 4096 // channels) if device.type == "cpu" else (20, 32768 // channels)

    def make() -> Inputs:
        x = torch.randn(1, channels, frames, side, side, device=device, dtype=dtype)
        vector = {name: torch.randn(channels, device=device, dtype=dtype) for name in ("weight", "bias")}
        return {"x": x.contiguous(memory_format=memory_format), **vector}

    layout = "NDHWC" if memory_format == torch.channels_last_3d else "NCDHW"
    return Case(
        name=f"LayerNorm+SiLU {channels}ch {frames}x{side}x{side} {layout} {str(dtype)[6:]}{' fwd+bwd' if backward else ''}",
        make_inputs=make,
        ours=lambda i: ops.channel_norm(i["x"], i["weight"], i["bias"], activation="silu"),
        reference=_eager,
        peers=_rivals(device, memory_format),
        bytes=channels * frames * side * side * dtype.itemsize * (5 if backward else 2),
        backward=backward,
        compile=compiled,
    )


@register(stem="channel_norm")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Widths of VidTok's levels."""
    last, first = torch.channels_last_3d, torch.contiguous_format
    yield _case(device, 128, last, torch.float32, False, True)
    yield _case(device, 128, first, torch.float32, False, False)
    if not quick:
        for channels in (256, 512):
            yield _case(device, channels, last, torch.float32, False, False)
        if device.type == "cpu":  # 24.5 MiB, beyond the caches and below the size of which every tensor is mapped anew
            yield _case(device, 128, last, torch.float32, False, False, side=112)
            yield _case(device, 128, last, torch.bfloat16, True, False)
        yield _case(device, 128, last, torch.bfloat16, False, True)
        yield _case(device, 128, last, torch.float32, True, True)
        yield _case(device, 128, first, torch.float32, True, False)
