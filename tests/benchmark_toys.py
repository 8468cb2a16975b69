# SPDX-License-Identifier: Apache-2.0
"""A case of four thousand numbers, and fixtures for the tests of the benchmark system."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import limits, registry, runner
from benchmarks.registry import Case

CPU = torch.device("cpu")


def softplus(inputs: dict) -> torch.Tensor:
    return torch.nn.functional.softplus(inputs["x"]) * inputs["w"]


def case(**changes: object) -> Case:
    def make_inputs() -> dict:
        return {"x": torch.randn(64, 65), "w": torch.randn(65)}

    options: dict = dict(name="softplus", make_inputs=make_inputs, ours=softplus, reference=softplus, compile=False)
    return Case(**{**options, **changes})


def settings() -> runner.Settings:
    return runner.Settings(CPU, quick=True)


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that copies 100 GB/s and multiplies 1 TFLOP/s."""
    monkeypatch.setattr(limits, "_copy_gbps", lambda device: 100.0)
    monkeypatch.setattr(limits, "_matmul_tflops", lambda device, dtype: 1.0)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(device: torch.device, quick: bool) -> Iterator[Case]:
        yield case(bytes=10)
        yield case(name="fails", make_inputs=lambda: 1 / 0)

    monkeypatch.setattr(registry, "_FACTORIES", {"toy": [cases]})
    monkeypatch.setattr(registry, "load", lambda stems=(): [])
