# SPDX-License-Identifier: Apache-2.0
"""The registry under pytest-benchmark: ``pytest benchmarks``. Quick cases; each contestant is verified first.
``pytest benchmarks -k "fsq and vidkernels"`` picks by stem, case and contestant; ``--benchmark-json FILE`` keeps the numbers."""

from __future__ import annotations

import pytest
import torch

from benchmarks import registry, runner, verify

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BROKEN = registry.load()


def _parameters() -> list:
    found = []
    for stem in registry.stems():
        for case in registry.cases(stem, DEVICE, True):
            for name in (runner.OURS, runner.EAGER, *case.peers):
                found.append(pytest.param(stem, case, name, id=f"{stem}: {case.name}: {name}"))
    return found


def test_every_file_imports() -> None:
    assert not BROKEN, BROKEN


@pytest.mark.parametrize(("stem", "case", "contestant"), _parameters())
def test_case(benchmark, stem: str, case: registry.Case, contestant: str) -> None:
    function = runner.contestants(case, runner.Settings(DEVICE, quick=True, compile=False))[contestant]
    actual = verify.evaluate(function, verify.make_inputs(case), bool(case.backward))
    fault = verify.fault(case, actual, verify.expect(case))
    assert fault is None, fault
    call = runner.one_call(function, verify.make_inputs(case), case.backward)

    def synchronised() -> object:
        out = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)
        return out

    benchmark.group = f"{stem}: {case.name}"
    benchmark(synchronised)
