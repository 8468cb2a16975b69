# SPDX-License-Identifier: Apache-2.0
"""AlphaBlender: plain, with temporal pooling, with temporal upsampling. Tensors stay below 32 MiB on the CPU, where larger
ones cost a page fault every 4 KB whoever computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.registry import Case, Inputs, Outputs, register
from vidkernels import ops
from vidkernels._reference import alpha_blend as reference

Blend = Callable[[object, Inputs], Outputs]


def _plain(module: object, i: Inputs) -> Outputs:
    return module.alpha_blend(i["x"], i["b"], i["mix"])  # type: ignore[attr-defined]


def _down(module: object, i: Inputs) -> Outputs:
    return module.alpha_blend_down(i["x"], i["b"], i["mix"], first_frame="replicate")  # type: ignore[attr-defined]


def _up(module: object, i: Inputs) -> Outputs:
    return module.alpha_blend_up(i["x"], i["b"], i["mix"], mode="nearest")  # type: ignore[attr-defined]


def _case(
    device: torch.device,
    name: str,
    blend: Blend,
    frames: tuple[int, int],
    dtype: torch.dtype,
    backward: bool,
    compiled: bool,
) -> Case:
    channels, side = (128, 32) if device.type == "cpu" else (128, 256)

    def make() -> Inputs:
        def draw(count: int) -> torch.Tensor:
            x = torch.randn(1, channels, count, side, side, device=device, dtype=dtype)
            return x.contiguous(memory_format=torch.channels_last_3d)

        return {"x": draw(frames[0]), "b": draw(frames[1]), "mix": torch.full((1,), 0.7, device=device, dtype=dtype)}

    pixels = channels * side * side * dtype.itemsize
    return Case(
        name=f"{name} {channels}ch {frames[0]}x{side}x{side} {str(dtype)[6:]}{' fwd+bwd' if backward else ''}",
        make_inputs=make,
        ours=lambda i: blend(ops, i),
        reference=lambda i: blend(reference, i),
        bytes=(frames[0] + 2 * frames[1]) * pixels * (2 if backward else 1),
        backward=backward,
        compile=compiled,
    )


@register(stem="alpha_blend")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The three blends of VidTok in channels-last memory."""
    yield _case(device, "blend", _plain, (16, 16), torch.float32, False, True)
    yield _case(device, "blend+down", _down, (16, 8), torch.float32, False, not quick)
    yield _case(device, "blend+up", _up, (8, 16), torch.float32, False, not quick)
    if not quick:
        for dtype, backward in ((torch.bfloat16, False), (torch.float32, True)):
            yield _case(device, "blend", _plain, (16, 16), dtype, backward, True)
            yield _case(device, "blend+up", _up, (8, 16), dtype, backward, False)
