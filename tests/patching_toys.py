# SPDX-License-Identifier: Apache-2.0
"""A small upstream library and rules for it, in plain PyTorch: the patching machinery is tested without kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vidkernels
from vidkernels.patching import Rule, _guard, _rule, digest
from vidkernels.patching._guard import call_reason, child_reason, note_fallback

CALLS: Counter[str] = Counter()


class Gate(nn.Module):
    """Upstream: a learned mixture of the input and a linear map of it, with a running mean as non-parameter state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width)
        self.mix = nn.Parameter(torch.full((1,), 2.0))
        self.register_buffer("calls", torch.zeros(1))
        self.cache: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        alpha = torch.sigmoid(self.mix)
        h = self.lin(x)
        self.cache = h.detach().clone()
        if mask is not None:
            h = h * mask
        return alpha * x + (1 - alpha) * h


class FastGate(nn.Module):
    """Rule's mixin: the same in one `lerp`; reads the child's weight without calling the child."""

    lin: nn.Linear
    mix: torch.Tensor
    calls: torch.Tensor

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        reason = call_reason(x) or child_reason(self.lin, nn.Linear)
        if mask is not None:
            reason = reason or "a mask is given"
        if reason is not None:
            note_fallback(self, reason)
            out: torch.Tensor = super().forward(x, mask)
            return out
        if not torch.compiler.is_compiling():
            CALLS[self._vidkernels_backend("toy_gate")] += 1  # type: ignore[operator]
        self.calls += 1
        h = F.linear(x, self.lin.weight, self.lin.bias)
        self.cache = h.detach().clone()
        return torch.lerp(h.to(x.dtype), x, torch.sigmoid(self.mix).to(x.dtype))


class WrongGate(FastGate):
    """A mixin whose numbers are off by one part in a thousand: `verify` must refuse it."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, mask) * 1.001


class Pair(nn.Module):
    """Upstream: a block of two gates, for the rule that serves a whole subtree."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = Gate(width), Gate(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class FastPair(nn.Module):
    """Rule's mixin for `Pair`."""

    first: Gate
    second: Gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in (self.first, self.second):
            reason = call_reason(x) or child_reason(child, Gate) or child_reason(child.lin, nn.Linear)
            if reason is not None:
                note_fallback(self, reason)
                out: torch.Tensor = super().forward(x)
                return out
            x = torch.lerp(F.linear(x, child.lin.weight, child.lin.bias), x, torch.sigmoid(child.mix))
        return x


class Model(nn.Module):
    """A model of the upstream library: gates, a tied gate, and an unknown layer between."""

    def __init__(self, width: int = 6, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gate(width) for _ in range(depth))
        self.between = nn.Tanh()
        self.again = self.blocks[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.between(block(x))
        return self.again(x)


def sample(module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Synthetic inputs of a gate or pair."""
    weight = next(p for name, p in module.named_parameters() if name.endswith("lin.weight"))
    return (torch.randn(3, weight.shape[1], dtype=weight.dtype, device=weight.device),), {}


def gate_rule(**changes: Any) -> Rule:
    """The rule for `Gate`, with fields changed."""
    fields: dict[str, Any] = {
        "name": "toys.gate",
        "ops": ("toy_gate",),
        "targets": ("patching_toys:Gate",),
        "mixin": FastGate,
        "digests": {"Gate.forward": (digest(Gate.forward),)},
        "reads": ("lin",),
        "sample": sample,
        "tested_versions": ("toys 1.0",),
    }
    return Rule(**{**fields, **changes})


def pair_rule() -> Rule:
    """The rule for `Pair`; it serves the gates below as well."""
    return Rule(
        name="toys.pair",
        ops=("toy_pair",),
        targets=("patching_toys:Pair",),
        mixin=FastPair,
        reads=("*",),
        subsumes=True,
        sample=sample,
    )


@pytest.fixture(autouse=True)
def toy_rules() -> Iterator[None]:
    """The toy rules are known during the test only, and every test sees the first fallback warning. Import it."""
    before = list(_rule._USER)
    vidkernels.register_rule(gate_rule())
    CALLS.clear()
    _guard._WARNED.clear()
    yield
    _rule._USER[:] = before


def fused_calls() -> int:
    """How many calls of toys ran fused in this test."""
    return sum(CALLS.values())
