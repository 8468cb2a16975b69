# SPDX-License-Identifier: Apache-2.0
"""Inputs shared by the channel norm tests: every kind, odd sizes, every way channels and positions can lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import assert_gradients_within_promise

from vidkernels import ops
from vidkernels._reference import channel_norm as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _frames(x: torch.Tensor) -> torch.Tensor:
    """[B, C, T, H, W] as T * B images, a view where the batch has one clip: slices of a channels-last clip."""
    return _channels_last(x).permute(0, 2, 1, 3, 4).flatten(0, 1)


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """[B, C, T, H, W] as one sequence per pixel, as VidTok's temporal blocks see it."""
    return _channels_last(x).permute(0, 3, 4, 1, 2).flatten(0, 2)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": _channels_last,
    "frames": _frames,
    "pixels": _pixels,
    "inner slice": lambda x: torch.cat([x, x, x[..., :3]], dim=-1)[..., 1 : x.shape[-1] + 1],
    "channel slice": lambda x: torch.cat([x, x], dim=1)[:, ::2],
    "every other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "frame slice": lambda x: _channels_last(torch.cat([x, x], dim=2))[:, :, 1 : x.shape[2] + 1],
}


@dataclass(frozen=True)
class Case:
    """Shape of x, how it lies in memory, the op's options, and which affine parameters there are."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    options: dict[str, Any] = field(default_factory=dict)
    weight: bool = True
    bias: bool = True
    scale: float = 1.0
    offset: float = 0.0

    def draw(self, dtype: torch.dtype, device: torch.device | str, affine: torch.dtype) -> list[torch.Tensor]:
        """x and those of weight and bias that the case has."""
        x = (torch.randn(self.shape) * self.scale + self.offset).to(device=device, dtype=dtype)
        x = LAYOUTS[self.layout](x)
        channels = x.shape[self.options.get("dim", 1)]
        weight, bias = (torch.randn(channels).to(device=device, dtype=affine) for _ in range(2))
        return [x, *([weight] if self.weight else []), *([bias] if self.bias else [])]

    def call(self, module: Any, **extra: Any) -> Callable[..., torch.Tensor]:
        """The op of a module as a function of the drawn tensors."""

        def run(x: torch.Tensor, *affine: torch.Tensor) -> torch.Tensor:
            given = iter(affine)
            weight = next(given) if self.weight else None
            bias = next(given) if self.bias else None
            return module.channel_norm(x, weight, bias, **self.options, **extra)

        return run

    def names(self) -> list[str]:
        """Of the drawn tensors."""
        return ["x", *(["weight"] if self.weight else []), *(["bias"] if self.bias else [])]


SILU = {"activation": "silu"}
CASES = {
    "layer": Case((2, 37, 3, 5, 7)),
    "layer silu": Case((2, 37, 3, 5, 7), options=SILU),
    "layer silu channels last": Case((2, 37, 3, 5, 7), "channels_last", SILU),
    "layer silu even channels last": Case((2, 128, 2, 3, 5), "channels_last", SILU),
    "rms": Case((2, 24, 3, 4, 8), options={"kind": "rms"}, bias=False),
    "rms silu channels last": Case((1, 96, 3, 3, 5), "channels_last", {"kind": "rms", **SILU}),
    "l2": Case((2, 33, 2, 5, 6), options={"kind": "l2"}, bias=False),
    "l2 silu channels last": Case((2, 160, 2, 3, 4), "channels_last", {"kind": "l2", **SILU}),
    "l2 below eps": Case((2, 16, 3, 5, 7), options={"kind": "l2", "eps": 0.5}, scale=0.01),
    "l2 below eps channels last": Case((2, 16, 3, 5, 7), "channels_last", {"kind": "l2", "eps": 0.5}, scale=0.01),
    "no affine": Case((3, 40, 9), options=SILU, weight=False, bias=False),
    "bias alone": Case((3, 40, 9), "channels_last", weight=False),
    "images": Case((3, 48, 9, 11), options=SILU),
    "frames": Case((1, 32, 3, 4, 5), "frames", SILU),
    "pixels": Case((1, 32, 5, 3, 4), "pixels", SILU),
    "sequences of 17": Case((5, 64, 17), options=SILU),
    "sequences of 5": Case((7, 48, 5), options=SILU),
    "sequences of 1": Case((6, 20, 1), options=SILU),
    "70 positions": Case((2, 8, 70), options=SILU),
    "vector": Case((19, 64)),
    "last axis": Case((3, 7, 33), options={"dim": -1, **SILU}),
    "one channel": Case((2, 1, 3, 4), weight=False),
    "two channels": Case((2, 2, 30)),
    "inner slice": Case((2, 12, 3, 5, 9), "inner slice", SILU),
    "channel slice": Case((2, 12, 3, 5, 9), "channel slice", SILU),
    "frame slice": Case((2, 16, 3, 5, 4), "frame slice", SILU),
    "every other": Case((2, 12, 3, 5, 9), "every other", SILU),
    "expanded": Case((4, 40, 33), "expanded", SILU),
    "large mean": Case((2, 64, 3, 5), offset=100.0, scale=0.1),
    "large mean channels last": Case((2, 64, 3, 5), "channels_last", offset=100.0, scale=0.1),
}
# Sizes at which the CUDA kernels change their form: vectors a thread, threads a row, and the forms that do not fit.
WIDE = {
    "rows of 512": Case((3, 512, 5), "channels_last", SILU),
    "rows of 1152": Case((2, 1152, 3), "channels_last", SILU),
    "rows of 2056": Case((2, 2056, 3), "channels_last", SILU),
    "rows of 4104": Case((1, 4104, 3), "channels_last", SILU),
    "rows of 301": Case((2, 301, 3), "channels_last", SILU),
    # Three rows a group of lanes on the 4 multiprocessors of tests/cuda_host.
    "many rows of 24": Case((2, 24, 1400), "channels_last", SILU),
    "planes of 256": Case((1, 256, 64), options=SILU),
    "planes of 520": Case((1, 520, 64), options=SILU),
    "planes of 1100": Case((1, 1100, 16), options=SILU),
    "planes of 300, odd": Case((1, 300, 33), options=SILU),
}


def compare(
    case: Case, dtype: torch.dtype, backend: str, device: torch.device | str, affine: torch.dtype | None = None
) -> None:
    """Output and every gradient of a backend keep the promise."""
    inputs = case.draw(dtype, device, affine or dtype)
    mine, other = case.call(ops, backend=backend), case.call(reference)
    if dtype is not torch.float64:
        assert_gradients_within_promise(mine, other, inputs, names=case.names())
        return
    cotangent = torch.randn_like(inputs[0])
    results = []
    for function in (mine, other):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, cotangent)])
    for name, actual, expected in zip(["output", *case.names()], *results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11 * scale, msg=lambda m, n=name: f"{n}: {m}")
