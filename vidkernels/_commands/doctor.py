# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels doctor`: every op on every backend that can run here, forward and backward, against the
reference in float64. Exit code 1 if anything is wrong or a backend fails."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vidkernels import ops
from vidkernels._commands._options import add_device
from vidkernels._commands.samples import Sample, samples
from vidkernels._explain import explain
from vidkernels.errors import VidkernelsFallbackWarning

# Relative to the largest value, against float64; float32 kernels accumulate a few hundred products here.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Verdict:
    """One op on one backend: "ok", "unavailable: reason", "wrong: ..." or "failed: ..."."""

    op: str
    backend: str
    verdict: str
    error: float | None = None
    seconds: float | None = None

    @property
    def bad(self) -> bool:
        """Whether this line makes the exit code 1."""
        return self.verdict.startswith(("wrong", "failed"))


def _leaves(sample: Sample, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any], list[torch.Tensor]]:
    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            return value.detach().to(dtype).requires_grad_()
        return value

    args = [convert(value) for value in sample.args]
    kwargs = {key: convert(value) for key, value in sample.kwargs.items()}
    leaves = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.requires_grad]
    return args, kwargs, leaves


def _run(sample: Sample, backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs and gradients of the summed squares of the floating outputs."""
    args, kwargs, leaves = _leaves(sample, dtype)
    result = getattr(ops, sample.op)(*args, **kwargs, backend=backend)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    loss = sum(
        (output.double().square().sum() for output in outputs if output.dtype.is_floating_point), torch.zeros(())
    )
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else ()
    return [tensor.detach() for tensor in (*outputs, *gradients) if tensor is not None]


def _error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if not e.dtype.is_floating_point:
            worst = max(worst, 0.0 if torch.equal(a, e) else float("inf"))
            continue
        scale = max(e.abs().max().item(), 1e-30)
        worst = max(worst, (a.double() - e.double()).abs().max().item() / scale)
    return worst


def _judge(sample: Sample, backend: str, reason: str | None, dtype: torch.dtype) -> Verdict:
    if reason is not None:
        return Verdict(sample.op, backend, f"unavailable: {reason}")
    start = time.perf_counter()
    try:
        actual = _run(sample, backend, dtype)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        return Verdict(sample.op, backend, f"failed: {type(error).__name__}: {first_line}")
    seconds = time.perf_counter() - start
    deviation = _error(actual, _run(sample, "reference", torch.float64))
    verdict = "ok" if deviation <= TOLERANCE[dtype] else f"wrong: relative error {deviation:.1e} against float64"
    return Verdict(sample.op, backend, verdict, deviation, seconds)


def examine(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Verdict]:
    """All verdicts for a device."""
    verdicts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VidkernelsFallbackWarning)
        for sample in samples(device, dtype):
            for choice in explain(sample.op, *sample.args, **sample.kwargs).choices:
                verdicts.append(_judge(sample, choice.backend, choice.reason, dtype))
    return verdicts


def main(argv: Sequence[str]) -> int:
    """Print the verdicts; 1 if one of them is bad."""
    parser = argparse.ArgumentParser(prog="vidkernels doctor", description="Run every op on every backend and compare.")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable, for bug reports")
    arguments = parser.parse_args(argv)
    verdicts = examine(arguments.device)
    if arguments.json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    else:
        for verdict in verdicts:
            timing = "" if verdict.seconds is None else f"  {verdict.seconds * 1e3:8.1f} ms first call"
            print(f"{verdict.op:<20} {verdict.backend:<12} {verdict.verdict}{timing}")
    bad = sum(verdict.bad for verdict in verdicts)
    if not arguments.json:
        good = sum(verdict.verdict == "ok" for verdict in verdicts)
        print(f"{good} ok, {bad} bad, {len(verdicts) - good - bad} unavailable")
    return int(bad > 0)
