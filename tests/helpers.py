# SPDX-License-Identifier: Apache-2.0
"""Assertions of the suite. A tolerance here always has a reason: the error of an independent computation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vidkernels._conv.cpp import multiplies_tiles

ROOT = Path(__file__).resolve().parent.parent
EPS = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
# AMX, or a library that emulates it under sanitizers (tests/cuda_host).
HAS_TILES = multiplies_tiles(torch.bfloat16) or bool(os.environ.get("VIDKERNELS_HOST_TILES"))


def _max_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return (value.double() - truth).abs().max().item() if value.numel() else 0.0


def assert_within_promise(
    actual: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, name: str = "output"
) -> None:
    """The package's promise: the largest error against float64 is at most twice that of the reference run in the same
    dtype, plus one rounding of the largest value.

    Args:
        actual: result of the kernel.
        reference: result of the plain PyTorch reference in the same dtype.
        truth: result of the reference in float64 on the same (exactly converted) inputs.
        name: what is compared, for the message.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == reference.dtype, f"{name}: dtype {actual.dtype}, expected {reference.dtype}"
    assert_same_nonfinite(actual, truth, name)
    finite = torch.isfinite(truth)
    actual, reference, truth = actual[finite], reference[finite], truth[finite].double()
    scale = truth.abs().max().item() if truth.numel() else 0.0
    budget = 2 * _max_error(reference, truth) + EPS[actual.dtype] * scale
    error = _max_error(actual, truth)
    assert error <= budget, (
        f"{name}: error {error:.3e} against float64 exceeds {budget:.3e} (largest value {scale:.3e})"
    )


def assert_same_nonfinite(actual: torch.Tensor, expected: torch.Tensor, name: str = "output") -> None:
    """NaN where NaN is expected, infinities of the same sign where they are expected, finite elsewhere."""
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (test(actual) != test(expected)).sum().item()
        assert wrong == 0, f"{name}: {what} differs at {wrong} of {actual.numel()} elements"


def assert_gradients_within_promise(
    function: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[torch.Tensor], *, names: Sequence[str]
) -> None:
    """Outputs and gradients of `function` keep the promise against `reference`, for one random cotangent per output.

    Args:
        function, reference: take the inputs, return a tensor or a tuple of tensors (integer outputs get no cotangent).
        inputs: floating tensors; gradients are taken for all of them.
        names: one name per input.
    """
    generator = torch.Generator().manual_seed(7)
    wide = [x.detach().double() for x in inputs]
    outputs = _outputs(reference, wide, None)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs[0]]
    narrow = [c.to(device=inputs[0].device, dtype=inputs[0].dtype) for c in cotangents]
    truth = _outputs(reference, wide, [c.to(inputs[0].device).double() for c in narrow])
    same = _outputs(reference, inputs, narrow)
    actual = _outputs(function, inputs, narrow)
    for i, triple in enumerate(zip(actual[0], same[0], truth[0], strict=True)):
        assert_within_promise(*triple, name=f"output {i}")
    for name, *triple in zip(names, actual[1], same[1], truth[1], strict=True):
        assert_within_promise(*triple, name=f"gradient of {name}")


def _outputs(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor] | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    leaves = [x.detach().requires_grad_(cotangents is not None) for x in inputs]
    result = function(*leaves)
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    floating = [r for r in results if r.dtype.is_floating_point]
    if cotangents is None:
        return floating, []
    used = [c.to(r.dtype).reshape(r.shape) for c, r in zip(cotangents, floating, strict=True)]
    return [r.detach() for r in floating], list(torch.autograd.grad(floating, leaves, used))


def opcheck(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """torch's own checks of a bare op: schema, fake against real, and tracing. Autograd is not registered on bare ops."""
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, args, kwargs or {}, test_utils=tests)


def run_python(code: str, *, env: dict[str, str] | None = None, cwd: Path = ROOT, timeout: float = 300) -> str:
    """Run Python code in a process of its own; returns its standard output, fails with its whole output otherwise."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


_VIEWS = ("view", "permute", "transpose", "detach", "alias", "slice", "select", "unsqueeze", "expand", "device")


class Ops(TorchDispatchMode):
    """Names of the torch ops that are called, without views, which cost a third."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name.strip("_") not in _VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
