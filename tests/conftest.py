# SPDX-License-Identifier: Apache-2.0
"""Fixtures and markers of the whole suite."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vidkernels import _signature

# Workers of xdist share the cores; and with two threads torch picks other algorithms and layouts for small convolutions,
# which tests that compare layouts with the original would see. Tests of several threads ask for them.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _quicken_interpreter(check_overflow: bool) -> None:
    """Triton's interpreter replaces the functions of `triton.language` at every launch, and again at every call of one jitted
    function by another, when they are replaced already; and it computes every sum of integers twice, to see it overflow. Both
    took 3 of 4 seconds. Tensors of quick tests are too small for an overflow."""
    from triton import language
    from triton.runtime import interpreter

    replace, no_changes = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", lambda: None)

    def replace_once(fn: Any) -> Any:
        seen = [
            module for module in (language, language.core) if any(value is module for value in fn.__globals__.values())
        ]
        return replace(fn) if any(language.core.is_builtin(module.load) for module in seen) else no_changes()

    interpreter._patch_lang = replace_once
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=check_overflow)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        _quicken_interpreter(check_overflow=config.getoption("--slow"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--large", action="store_true", help="also run the tests marked large (tens of GB)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    reasons = {
        "gpu": None if capability else "needs a CUDA device",
        "hopper": None if capability and capability[0] == 9 else "needs an sm_90 device",
        "slow": None if config.getoption("--slow") else "slow: run with --slow",
        "large": None if config.getoption("--large") else "large: run with --large",
        "bench": "timing: run by hand",
        "interpreter": None
        if os.environ.get("TRITON_INTERPRET") == "1"
        else "runs in the process that tests/test_interpreter.py starts",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised allocation, in Python and in C++, is filled with NaN (or the largest integer): a kernel that
    forgets an element fails loudly. Also refuses operations without a deterministic implementation on the CPU."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def fresh_decisions() -> None:
    """Tests change what a machine can do, which no process does otherwise."""
    _signature.forget()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Each test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(20260101)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in a process with one thread, to whose bits a result is compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a test can use here."""
    return torch.device(request.param)
