# SPDX-License-Identifier: Apache-2.0
"""Inputs shared by the alpha blend tests: every mode, odd sizes, both memory formats, slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import assert_gradients_within_promise, assert_same_nonfinite

from vidkernels import ops
from vidkernels._reference import alpha_blend as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """A call: the op, x's shape, its options, and how many frames are given in front of and behind x."""

    op: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    history: int = 0
    lookahead: int = 0
    layout: str = "contiguous"

    def frames_out(self) -> int:
        """Frames of the output, by the formulas of the docstrings."""
        frames = self.shape[2]
        if self.op == "alpha_blend_down":
            return (frames + self.history - 1) // 2 if self.history else frames // 2
        return 2 * frames if self.op == "alpha_blend_up" else frames

    def draw(self, dtype: torch.dtype, device: torch.device | str, mix_dtype: torch.dtype) -> list[torch.Tensor]:
        """x, b, mix_factor and what else the call takes."""

        def normal(frames: int) -> torch.Tensor:
            shape = (*self.shape[:2], frames, *self.shape[3:])
            x = torch.randn(shape).to(device=device, dtype=dtype)
            if self.layout == "slice":
                wide = torch.randn(*shape[:-1], shape[-1] + 5).to(device=device, dtype=dtype)
                return wide[..., 2:-3]
            return x.to(memory_format=torch.channels_last_3d) if self.layout == "channels_last" else x

        given = [normal(count) for count in (self.history, self.lookahead) if count]
        mix = torch.tensor([-0.6], device=device, dtype=mix_dtype)
        return [normal(self.shape[2]), normal(self.frames_out()), mix, *given]

    def call(self, module: Any, **extra: Any) -> Callable[..., torch.Tensor]:
        """The op of a module as a function of the drawn tensors."""
        function = getattr(module, self.op)
        names = ["first_frame"] if self.op == "alpha_blend_down" else ["history", "lookahead"]
        names = [n for n, c in zip(names, (self.history, self.lookahead), strict=False) if c]

        def run(x: torch.Tensor, b: torch.Tensor, mix: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
            return function(x, b, mix, **self.options, **dict(zip(names, given, strict=True)), **extra)

        return run


def _up(frames: int, **options: Any) -> Case:
    return Case("alpha_blend_up", (2, 5, frames, 3, 7), {"mode": "linear", **options})


CASES = {
    "plain": Case("alpha_blend", (2, 5, 3, 7, 9)),
    "plain channels last": Case("alpha_blend", (2, 5, 3, 7, 9), layout="channels_last"),
    "plain slice": Case("alpha_blend", (2, 5, 3, 7, 9), layout="slice"),
    "plain of 4 axes": Case("alpha_blend", (3, 5, 7, 137)),
    "down zeros": Case("alpha_blend_down", (2, 5, 7, 3, 7)),
    "down replicate": Case("alpha_blend_down", (2, 5, 8, 3, 7), {"first_frame": "replicate"}),
    "down replicate of two": Case("alpha_blend_down", (1, 3, 2, 2, 5), {"first_frame": "replicate"}),
    "down noncausal": Case("alpha_blend_down", (2, 5, 6, 3, 7), {"first_frame": "noncausal"}),
    "down noncausal odd": Case("alpha_blend_down", (2, 5, 17, 3, 7), {"first_frame": "noncausal"}),
    "down history of 1": Case("alpha_blend_down", (2, 5, 4, 3, 7), history=1),
    "down history of 2": Case("alpha_blend_down", (2, 5, 17, 3, 7), history=2),
    "down channels last": Case("alpha_blend_down", (2, 16, 19, 3, 4), history=2, layout="channels_last"),
    "nearest": Case("alpha_blend_up", (2, 5, 3, 3, 7)),
    "nearest channels last": Case("alpha_blend_up", (1, 8, 9, 4, 4), layout="channels_last"),
    "nearest slice": Case("alpha_blend_up", (2, 3, 5, 3, 8), layout="slice"),
    "linear": _up(5),
    "linear of one frame": _up(1),
    "linear split 2": _up(9, split=2),
    "linear split behind the end": _up(3, split=4),
    "linear unsplit": _up(4, split=0),
    "linear history": Case("alpha_blend_up", (2, 5, 10, 3, 7), {"mode": "linear", "split": 0}, history=1),
    "linear chunk": Case("alpha_blend_up", (1, 5, 4, 3, 7), {"mode": "linear", "split": 0}, history=1, lookahead=1),
    "linear chunk of one": Case(
        "alpha_blend_up", (1, 8, 1, 4, 4), {"mode": "linear", "split": 0}, 1, 1, "channels_last"
    ),
}


def compare(
    case: Case, dtype: torch.dtype, backend: str, device: torch.device | str, mix_dtype: torch.dtype | None = None
) -> None:
    """Output and every gradient of a backend keep the promise."""
    inputs = case.draw(dtype, device, mix_dtype or dtype)
    names = ["x", "b", "mix_factor", "history or lookahead", "lookahead"][: len(inputs)]
    if dtype is not torch.float64:
        mine = case.call(ops, backend=backend)
        assert_gradients_within_promise(mine, case.call(reference), inputs, names=names)
        return
    cotangent = torch.randn_like(inputs[1])
    results = []
    for function in (case.call(ops, backend=backend), case.call(reference)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, cotangent)])
    for name, actual, expected in zip(["output", *names], *results, strict=True):
        # sums of N terms of either sign: N roundings of the largest
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


INFINITE = ("plain", "down replicate", "nearest channels last", "linear unsplit")


def compare_infinite(case: Case, dtype: torch.dtype, backend: str, device: torch.device | str) -> None:
    """One infinity of x reaches the results that the formula sends it to, the mix factor's gradient among them."""
    inputs = case.draw(dtype, device, dtype)
    inputs[0][0, 0, -1, -1, -1] = float("inf")
    cotangent = torch.ones_like(inputs[1])
    results = []
    for function in (case.call(ops, backend=backend), case.call(reference)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, cotangent)])
    assert results[1][3].isposinf().all()
    for name, actual, expected in zip(("output", "x", "b", "mix_factor"), *results, strict=True):
        assert_same_nonfinite(actual, expected, name)
