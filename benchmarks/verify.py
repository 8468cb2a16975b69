# SPDX-License-Identifier: Apache-2.0
"""Calls a contestant and judges its output. A wrong output gets no time."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from benchmarks.phases import phase
from benchmarks.registry import Case, Function, Inputs

SEED = 20240613
Tensors = tuple[torch.Tensor, ...]


def as_tuple(outputs: Any) -> Tensors:
    """Outputs as a tuple of tensors; None entries (an unused gradient) are dropped."""
    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    return tuple(x for x in outputs if x is not None)


def make_inputs(case: Case, index: int = 0) -> Inputs:
    """The ``index``-th set of random inputs, the same ones every time it is asked for."""
    torch.manual_seed(SEED + index)
    return case.make_inputs()


def leaves(inputs: Inputs) -> list[torch.Tensor]:
    """The tensors gradients are asked for, with ``requires_grad`` set."""
    floating = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    chosen = [v for v in floating if v.requires_grad] or floating
    return [v.requires_grad_(True) for v in chosen]


def fresh_leaves(inputs: Inputs) -> Inputs:
    """The same values in the same memory, without what autograd has hung on the tensors (and on their stream)."""
    return {
        name: value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def to_double(inputs: Inputs) -> Inputs:
    """The same inputs with floating-point tensors in float64 and ``requires_grad`` kept."""

    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return {name: convert(value) for name, value in inputs.items()}


def differentiable(outputs: Tensors) -> list[torch.Tensor]:
    """The outputs a gradient flows into."""
    return [x for x in outputs if x.is_floating_point() and x.grad_fn is not None]


def cotangents(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Random output gradients, the same for every contestant whatever its dtype or memory format."""
    made = []
    generators: dict[torch.device, torch.Generator] = {}
    for x in outputs:
        # drawn where they are used: a host needs 2 s for 168 M numbers, and every contestant asks for them several times
        if x.device not in generators:
            generators[x.device] = torch.Generator(x.device).manual_seed(SEED)
        # rounded to bfloat16, so that float64 and the low-precision runs get equal values
        drawn = torch.randn(x.shape, generator=generators[x.device], device=x.device).to(torch.bfloat16)
        made.append(torch.empty_like(x).copy_(drawn))
    return made


def evaluate(function: Function, inputs: Inputs, backward: bool) -> Tensors:
    """Outputs, followed by the gradients if ``backward``."""
    if not backward:
        with torch.no_grad():
            return as_tuple(function(inputs))
    asked = leaves(inputs)
    outputs = as_tuple(function(inputs))
    flowing = differentiable(outputs)
    if not flowing:
        raise RuntimeError("the case asks for a backward pass, but no output has a gradient")
    grads = torch.autograd.grad(flowing, asked, cotangents(flowing), allow_unused=True)
    return tuple(x.detach() for x in outputs) + as_tuple(grads)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a contestant's output is judged by."""

    reference: Tensors
    truth: Tensors


def expect(case: Case) -> Expected:
    """Run the reference in the case's dtype, and the truth in float64."""
    backward = bool(case.backward)
    inputs = make_inputs(case)
    devices = [value.device for value in inputs.values() if isinstance(value, torch.Tensor)]
    device = devices[0] if devices else None
    with phase("eager", device):
        reference = evaluate(case.reference, inputs, backward)
    if backward:
        leaves(inputs)
    with phase("truth", device):
        truth = evaluate(case.truth or case.reference, to_double(inputs), backward)
    return Expected(reference, truth)


def _float_fault(actual: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, slack: float) -> str | None:
    exact = truth.double()
    finite = torch.isfinite(exact)
    if not torch.equal(torch.isfinite(actual), finite) or not torch.equal(torch.isnan(actual), torch.isnan(exact)):
        return "NaN or infinity where the truth has none, or the reverse"
    if not finite.any():
        return None
    actual_exact, own_exact = actual.double(), reference.double()
    if not finite.all():  # else picking them would copy three large tensors for nothing
        actual_exact, own_exact, exact = actual_exact[finite], own_exact[finite], exact[finite]
    error = (actual_exact - exact).abs().max().item()
    own = (own_exact - exact).abs().max().nan_to_num(0.0).item()
    limit = slack * (2 * own + torch.finfo(actual.dtype).eps / 2 * exact.abs().max().item())
    return None if error <= limit else f"max error {error:.3g}, allowed {limit:.3g}"


def fault(case: Case, actual: Tensors, expected: Expected, slack: float = 1.0) -> str | None:
    """None if ``actual`` is right by the case's rule, else one line that says what is wrong.

    ``slack`` multiplies the error that "allclose" allows.
    """
    if callable(case.check):
        return case.check(actual, expected.reference, expected.truth)
    if len(actual) != len(expected.reference):
        return f"{len(actual)} outputs and gradients, expected {len(expected.reference)}"
    for index, (x, reference, truth) in enumerate(zip(actual, expected.reference, expected.truth, strict=True)):
        if x.shape != reference.shape:
            return f"tensor {index} has shape {tuple(x.shape)}, expected {tuple(reference.shape)}"
        if case.check == "exact" or not x.is_floating_point():
            wrong = int((x != reference).sum())
            message = f"{wrong} of {x.numel()} elements differ" if wrong else None
        else:
            message = _float_fault(x, reference, truth, slack)
        if message:
            return f"tensor {index}: {message}"
    return None
