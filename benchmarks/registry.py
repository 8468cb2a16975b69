# SPDX-License-Identifier: Apache-2.0
"""The one list of benchmark cases. Files named ``bench_*.py`` beside this one add to it with :func:`register`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch

import benchmarks

Inputs = dict[str, Any]
Outputs = torch.Tensor | tuple[torch.Tensor, ...]
Function = Callable[[Inputs], Outputs]
# actual, expected (same-dtype reference), truth (float64) -> None, or what is wrong
Check = Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], str | None]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of a benchmark table: the same computation by several contestants on the same inputs.

    Args:
        name: What is computed, its shape and dtype; unique within the stem.
        make_inputs: Builds fresh inputs on the device. Called several times (the runner rotates the sets so that the
            cache is cold) after seeding torch, so draw from torch's generators.
        ours: The function of vidkernels, called with the dict of inputs.
        reference: Plain PyTorch, called likewise: the eager contestant, and the source of the torch.compile one.
        peers: Other libraries by name; leave out those that are not installed.
        truth: Gets the inputs with floating-point tensors in float64. None: ``reference`` serves.
        bytes: Fewest bytes that must move, each input read once and each output written once.
        flops: Floating-point operations that must be done.
        check: "allclose" (error against the truth at most twice the reference's own plus one rounding), "exact" (equal
            to the reference), or a function ``check(actual, expected, truth)`` that returns None or what is wrong.
        backward: False times the forward under ``no_grad``; True forward plus backward; "only" the backward alone.
            Gradients go to the inputs with ``requires_grad``, or to all floating-point inputs if none has it.
        eager: Whether the reference takes part; without it, it serves the check alone.
        compile: Whether ``torch.compile(reference)`` takes part (it costs seconds a case). A function takes its place: for
            models that users compile in parts.
        whole: Whether it is a whole model: on a GPU ours and eager are also replayed from a CUDA graph, beside the comparison,
            so that the difference says what the host costs.
        note: Shown under the table, for example what kind of data the inputs are.
    """

    name: str
    make_inputs: Callable[[], Inputs]
    ours: Function
    reference: Function
    peers: Mapping[str, Function] = dataclasses.field(default_factory=dict)
    truth: Function | None = None
    bytes: int | None = None
    flops: int | None = None
    check: Literal["allclose", "exact"] | Check = "allclose"
    backward: bool | Literal["only"] = False
    eager: bool = True
    compile: bool | Function = True
    whole: bool = False
    note: str = ""


CaseFactory = Callable[[torch.device, bool], Iterable[Case]]
_FACTORIES: dict[str, list[CaseFactory]] = {}


def register(stem: str) -> Callable[[CaseFactory], CaseFactory]:
    """Decorator for a generator ``cases(device, quick)`` of the stem's cases. A stem may have several."""

    def add(factory: CaseFactory) -> CaseFactory:
        _FACTORIES.setdefault(stem, []).append(factory)
        return factory

    return add


@dataclasses.dataclass(frozen=True)
class BrokenFile:
    """A benchmark file that could not be imported: shown as a failed row, so that it is not missed in silence."""

    module: str
    error: str


def load(stems: Collection[str] = ()) -> list[BrokenFile]:
    """Import every ``bench_*.py`` and return those that failed.

    Args:
        stems: Import the files of these alone where each has a file of its name: rivals that others import cost seconds.
    """
    broken = []
    names = [info.name for info in pkgutil.iter_modules(benchmarks.__path__) if info.name.startswith("bench_")]
    wanted = [f"bench_{stem}" for stem in stems]
    for name in wanted if wanted and set(wanted) <= set(names) else names:
        try:
            importlib.import_module(f"benchmarks.{name}")
        except Exception as error:  # one broken file must not hide the others' results; it becomes a failed row
            where = traceback.extract_tb(error.__traceback__)[-1]
            broken.append(BrokenFile(name, f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"))
    return broken


def stems() -> list[str]:
    """Names of the stems that have cases, sorted. Call :func:`load` first."""
    return sorted(_FACTORIES)


def cases(stem: str, device: torch.device, quick: bool) -> Iterator[Case]:
    """All cases of one stem on one device."""
    seen: set[str] = set()
    for factory in _FACTORIES[stem]:
        for case in factory(device, quick):
            if case.name in seen:
                raise ValueError(f"benchmark {stem}: the case name {case.name!r} appears twice")
            seen.add(case.name)
            yield case
