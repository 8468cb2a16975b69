# SPDX-License-Identifier: Apache-2.0
"""Runs every GPU case without a GPU and without memory: shapes, dtypes and names are checked with fake tensors.

A typing error in a case would otherwise cost GPU minutes to find.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from benchmarks import registry, verify
from benchmarks.registry import Case


class _CudaOnCpu(TorchFunctionMode):
    """Answers requests for CUDA tensors with CPU ones, so that a CPU-only torch can trace GPU cases."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: self._moved(value) for name, value in (kwargs or {}).items()}
        return func(*(self._moved(value) for value in args), **kwargs)

    @staticmethod
    def _moved(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


def check_case(case: Case, mode: FakeTensorMode) -> list[str]:
    """What is wrong with a case, one line each; empty if its contestants trace and agree in shape and dtype."""
    faults: list[str] = []
    expected = None
    for name, function in (("reference", case.reference), ("ours", case.ours), *case.peers.items()):
        try:
            with mode:
                outputs = verify.evaluate(function, case.make_inputs(), bool(case.backward))
        except (DataDependentOutputException, DynamicOutputShapeException):
            continue  # it reads values, which fake tensors do not have: not a fault
        except Exception as error:  # every fault of every case is wanted in one run
            faults.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        found = [(tuple(x.shape), x.dtype) for x in outputs]
        expected = found if expected is None else expected
        if found != expected and not callable(case.check):
            faults.append(f"{name}: outputs {found}, the reference's are {expected}")
    return faults


def check_stem(stem: str, quick: bool = False) -> dict[str, list[str]]:
    """Faults by case of all cases that a GPU would run."""
    # Cases are listed with real tensors (some build a rival's small module then), and traced with fake ones.
    # One mode for all of a stem, since its cases may share a model.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    gpu = torch.device("cuda")  # made outside: inside, it would be a CPU, and its cases those of a CPU
    with _CudaOnCpu():
        return {case.name: check_case(case, mode) for case in registry.cases(stem, gpu, quick)}
