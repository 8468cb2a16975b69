# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels doctor`: every op on every backend that can run here, forward and backward, against the
reference in float64. Exit code 1 if anything is wrong or a backend fails."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from vidkernels import ops
from vidkernels._commands._options import add_device
from vidkernels._commands.samples import Sample, samples
from vidkernels._explain import explain
from vidkernels.errors import VidkernelsFallbackWarning

# Relative to the largest value, against float64; float32 kernels accumulate a few hundred products here.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Half the distance of neighbours among the numbers of 11 significant bits that TF32 products are made of.
TF32_ROUNDING = 2.0**-11


@dataclass(frozen=True)
class Verdict:
    """One op on one backend: "ok", "unavailable: reason", "wrong: ..." or "failed: ..."."""

    op: str
    backend: str
    verdict: str
    error: float | None = None
    seconds: float | None = None
    note: str | None = None  # why an error this large is right

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
    return [tensor.detach().cpu() for tensor in (*outputs, *gradients) if tensor is not None]


def _error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if not e.dtype.is_floating_point:
            worst = max(worst, 0.0 if torch.equal(a, e) else float("inf"))
            continue
        scale = max(e.abs().max().item(), 1e-30)
        worst = max(worst, (a.double() - e.double()).abs().max().item() / scale)
    return worst


def _tf32_switches() -> list[tuple[Any, str, Any]]:
    """What makes torch take TF32 for float32 products on this machine, as (where, attribute, the value that forbids it).
    From 2.9 on torch has a second interface, and refuses the old one where the two differ."""
    convolution = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
    found = []
    for place in (convolution, torch.backends.cuda.matmul):
        name, on, off = (
            ("fp32_precision", "tf32", "ieee") if hasattr(place, "fp32_precision") else ("allow_tf32", True, False)
        )
        if getattr(place, name) == on:
            found.append((place, name, off))
    return found


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """float32 products in full, and torch's switches as they were afterwards."""
    switches = _tf32_switches()
    before = [getattr(place, name) for place, name, _ in switches]
    try:
        for place, name, off in switches:
            setattr(place, name, off)
        yield
    finally:
        for (place, name, _), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def _changed(sample: Sample, change: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, torch.Tensor) else value

    kwargs = {key: changed(value) for key, value in sample.kwargs.items()}
    return replace(sample, args=tuple(map(changed, sample.args)), kwargs=kwargs)


def _truth(sample: Sample) -> list[torch.Tensor]:
    """The reference in float64, on the CPU: a GPU would load a kernel of torch's for each of its steps, at 10 to 100 ms."""
    return _run(_changed(sample, torch.Tensor.cpu), "reference", torch.float64)


def _cut_to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """float32 with the 10 bits of fraction that TF32 keeps, the others cut off as the hardware may."""
    return (tensor.view(torch.int32) & -(2**13)).view(torch.float32) if tensor.dtype == torch.float32 else tensor


def _excuse(sample: Sample, backend: str, deviation: float, truth: list[torch.Tensor]) -> str | None:
    """Why a float32 error above the tolerance is right, or None: torch allows TF32, the error is at most twice what the
    operands of TF32 cost the reference and one rounding, and without TF32 the backend keeps the tolerance."""
    if not _tf32_switches():
        return None
    theirs = _error(_truth(_changed(sample, _cut_to_tf32)), truth)
    if deviation > 2 * theirs + TF32_ROUNDING:
        return None
    says = f"relative error {deviation:.1e} in TF32, which torch allows and costs the reference {theirs:.1e}"
    with _without_tf32():
        choices = {c.backend: c.reason for c in explain(sample.op, *sample.args, **sample.kwargs).choices}
        if choices[backend] is not None:
            return f"{says}; it has no other float32"
        full = _error(_run(sample, backend, torch.float32), truth)
    return f"{says}; {full:.1e} without" if full <= TOLERANCE[torch.float32] else None


def _judge(sample: Sample, backend: str, reason: str | None, dtype: torch.dtype, truth: list[torch.Tensor]) -> Verdict:
    if reason is not None:
        return Verdict(sample.op, backend, f"unavailable: {reason}")
    start = time.perf_counter()
    try:
        actual = _run(sample, backend, dtype)
        seconds = time.perf_counter() - start
        deviation, note = _error(actual, truth), None
        good = deviation <= TOLERANCE[dtype]
        if not good and dtype == torch.float32:
            note = _excuse(sample, backend, deviation, truth)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        return Verdict(sample.op, backend, f"failed: {type(error).__name__}: {first_line}")
    verdict = "ok" if good or note else f"wrong: relative error {deviation:.1e} against float64"
    return Verdict(sample.op, backend, verdict, deviation, seconds, note)


def examine(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    backends: Collection[str] | None = None,
    given: Sequence[Sample] | None = None,
) -> list[Verdict]:
    """All verdicts for a device; only those of some backends where they are named, on other samples where they are given."""
    verdicts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VidkernelsFallbackWarning)
        for sample in samples(device, dtype) if given is None else given:
            choices = explain(sample.op, *sample.args, **sample.kwargs).choices
            wanted = [choice for choice in choices if backends is None or choice.backend in backends]
            truth = _truth(sample) if wanted else []
            verdicts += [_judge(sample, choice.backend, choice.reason, dtype, truth) for choice in wanted]
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
            note = "" if verdict.note is None else f"  {verdict.note}"
            print(f"{verdict.op:<20} {verdict.backend:<12} {verdict.verdict}{timing}{note}")
    bad = sum(verdict.bad for verdict in verdicts)
    if not arguments.json:
        good = sum(verdict.verdict == "ok" for verdict in verdicts)
        print(f"{good} ok, {bad} bad, {len(verdicts) - good - bad} unavailable")
    return int(bad > 0)
