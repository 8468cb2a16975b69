# SPDX-License-Identifier: Apache-2.0
"""Runs cases: every contestant is verified, then those that are right are timed in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import limits, memory, phases, registry, timing, verify
from benchmarks.phases import phase
from benchmarks.registry import Case, Function, Inputs

OURS, EAGER, COMPILE, MAX_AUTOTUNE = "vidkernels", "eager", "torch.compile", "torch.compile max-autotune"
TIMED = ("ok", "loose")
# Between calls the data of the last one must have left the cache: rotate through sets that hold several times its size.
ROTATE_BYTES = {"cuda": 512 << 20, "cpu": 128 << 20}
MAX_SETS = 16
# glibc maps a fresh block for every tensor above this size: 2 us per 4 KB page, whoever computes into it.
FRESH_PAGES_BYTES = 32 << 20
# Below this the host's queueing shows in the events (a backward alone takes it 0.1 ms or more), so that a graph is replayed
# too; its rivals' graphs up to the second number, so that like is compared with like. Replays take 0.1 s at most.
GRAPH_BELOW_MS, GRAPH_RIVAL_MS, GRAPH_TOTAL_MS = 0.5, 5.0, 100.0
# Whole models: one call a graph, which takes the host as long as a call to capture, and the call's memory once more.
GRAPH_WHOLE_MS, GRAPH_WHOLE_REPLAYS = 400.0, 3
# Freed blocks are kept for the next case (to map 1 GiB again takes milliseconds) until torch holds this part of the memory.
MEMORY_IS_SHORT = 0.5
# Ours must keep the promise. A rival up to this factor outside it (torch.compile's running sums are, now and then) is
# timed all the same and marked: to withhold its time would be to win by default.
RIVAL_SLACK = 16.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a run is done."""

    device: torch.device
    quick: bool = False
    compile: bool = True
    max_autotune: bool = False
    pattern: str = ""
    case_limit: float = math.inf  # seconds

    @property
    def budget(self) -> timing.Budget:
        return timing.budget(self.device, self.quick)


def _size(values: Any) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


def _dtype(inputs: Inputs) -> torch.dtype:
    floating = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return max(floating, key=torch.Tensor.numel).dtype if floating else torch.float32


def contestants(case: Case, settings: Settings) -> dict[str, Function]:
    found: dict[str, Function] = {OURS: case.ours}
    if case.eager:
        found[EAGER] = case.reference
    if settings.compile and case.compile:
        own = None if isinstance(case.compile, bool) else case.compile
        found[COMPILE] = own or torch.compile(case.reference, dynamic=False)
        if settings.max_autotune and own is None:
            found[MAX_AUTOTUNE] = torch.compile(case.reference, dynamic=False, mode="max-autotune-no-cudagraphs")
    return found | dict(case.peers)


def one_call(function: Function, inputs: Inputs, backward: bool | str) -> Callable[[], object]:
    """A call without arguments that does exactly what is to be timed."""
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return function(inputs)

        return forward
    asked = verify.leaves(inputs)
    flowing = verify.differentiable(verify.as_tuple(function(inputs)))
    grads = verify.cotangents(flowing)
    if backward == "only":
        return lambda: torch.autograd.grad(flowing, asked, grads, retain_graph=True, allow_unused=True)

    def forward_backward() -> object:
        outputs = verify.differentiable(verify.as_tuple(function(inputs)))
        return torch.autograd.grad(outputs, asked, grads, allow_unused=True)

    return forward_backward


def _rotating(function: Function, sets: list[Inputs], backward: bool | str) -> Callable[[], object]:
    calls = [one_call(function, inputs, backward) for inputs in sets]
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(calls)
        return calls[turn]()

    return call


def _input_sets(case: Case, device: torch.device) -> list[Inputs]:
    first = verify.make_inputs(case)
    wanted = -(-ROTATE_BYTES[device.type] // max(1, _size(first.values())))
    return [first] + [verify.make_inputs(case, i) for i in range(1, min(MAX_SETS, wanted))]


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _verified(case: Case, settings: Settings, expected: verify.Expected) -> Iterator[tuple[str, Function, str, str]]:
    """Yield (contestant, function, status, detail) for each contestant, status "ok", "loose", "WRONG" or "error"."""
    for name, function in contestants(case, settings).items():
        try:
            # expect() has called the reference: models that run for half a minute are not called again for it
            known = function is case.reference
            with phase(name, settings.device):
                actual = (
                    expected.reference
                    if known
                    else verify.evaluate(function, verify.make_inputs(case), bool(case.backward))
                )
            with phase("compare"):
                fault = verify.fault(case, actual, expected)
                status = "WRONG" if fault else "ok"
                if fault and name != OURS and verify.fault(case, actual, expected, RIVAL_SLACK) is None:
                    status = "loose"
            del actual
            yield name, function, status, fault or ""
        except Exception as error:  # a contestant that cannot run is a row that says why
            yield name, function, "error", one_line(error)


@contextlib.contextmanager
def compiler_settings(settings: Settings) -> Iterator[None]:
    """Let a compiled backward run twice on one graph (the "only backward" rows keep it)."""
    if not settings.compile:  # the compiler takes seconds to import
        yield
        return
    import torch._dynamo
    import torch._functorch.config as functorch

    torch._dynamo.reset()
    with functorch.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


class CaseTooLong(BaseException):
    """A case's time is up. No Exception: it must pass what makes a row of a contestant that fails."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `CaseTooLong` in the block after `seconds`, at the next line of Python; only in the main thread, and not on Windows."""
    if seconds == math.inf or not hasattr(signal, "SIGALRM") or threading.current_thread() != threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise CaseTooLong(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_case(case: Case, settings: Settings) -> dict[str, Any]:
    """Verify and time one case. The result is what goes into the JSON; a case that fails as a whole has "error" in it."""
    phases.collect()
    try:
        with time_limit(settings.case_limit), compiler_settings(settings):
            return _run_case(case, settings)
    except CaseTooLong as error:
        went = phases.line(phases.collect())
        return {"case": case.name, "error": f"{error} ({went})" if went else str(error), "rows": {}}
    except Exception as error:  # the next case may still run
        return {"case": case.name, "error": one_line(error), "rows": {}}


def _run_case(case: Case, settings: Settings) -> dict[str, Any]:
    device, started = settings.device, time.perf_counter()
    rows: dict[str, dict[str, Any]] = {}
    functions: dict[str, Function] = {}
    expected = verify.expect(case)
    largest = max((_size([x]) for x in expected.reference), default=0)
    for name, function, status, detail in _verified(case, settings, expected):
        rows[name] = {"status": status, "detail": detail}
        if status in TIMED:
            functions[name] = function
    del expected
    sets = _input_sets(case, device)
    calls = {name: _rotating(function, sets, case.backward) for name, function in functions.items()}
    with phase("timing", device):
        times = timing.interleave(calls, timing.timer(device), settings.budget)
    dtype = _dtype(sets[0])
    with phase("limits"):
        floor = limits.floor(device, dtype, case.bytes, case.flops)
    for name, measured in times.items():
        rows[name] |= _figures(case, measured, floor)
        with phase("memory", device):
            rows[name]["peak_bytes"] = memory.peak_bytes(calls[name], device)
    if device.type == "cuda":
        with phase("graphs"):
            _add_graph_times(rows, functions, sets, case.backward, device)
            if case.whole:
                _add_whole_graph_times(rows, functions, sets[0], device)
    return {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "backward": case.backward,
        "bytes": case.bytes,
        "flops": case.flops,
        "floor_ms": floor.ms if floor else None,
        "bound": floor.bound if floor else None,
        "input_sets": len(sets),
        "fresh_pages": device.type == "cpu" and largest > FRESH_PAGES_BYTES,
        "note": case.note,
        "seconds": round(time.perf_counter() - started, 2),
        "phases": phases.collect(),
        "rows": rows,
    }


def _add_graph_times(
    rows: dict[str, dict[str, Any]],
    functions: dict[str, Function],
    sets: list[Inputs],
    backward: bool | str,
    device: torch.device,
) -> None:
    """Put "graph_ms" into the rows of a case whose fastest contestant is short."""
    times = {name: rows[name]["ms"] for name in functions}
    if min(times.values(), default=GRAPH_BELOW_MS) >= GRAPH_BELOW_MS:
        return
    repeats = max(8, len(sets))
    for name, ms in times.items():
        if ms < GRAPH_RIVAL_MS:
            prepare = functools.partial(_for_graph, functions[name], sets, backward)
            replays = max(3, min(20, int(GRAPH_TOTAL_MS / (repeats * ms))))
            rows[name]["graph_ms"] = timing.graph_ms(prepare, device, repeats, replays)


def _add_whole_graph_times(
    rows: dict[str, dict[str, Any]], functions: dict[str, Function], inputs: Inputs, device: torch.device
) -> None:
    """Put "whole_graph_ms" into the rows of ours and of eager: a forward without what the host takes to start it."""
    for name in (OURS, "eager"):
        if name in functions and rows[name]["ms"] < GRAPH_WHOLE_MS:
            prepare = functools.partial(_for_graph, functions[name], [inputs], False)
            rows[name]["whole_graph_ms"] = timing.graph_ms(prepare, device, 1, GRAPH_WHOLE_REPLAYS)
            free_memory(device)


def _for_graph(function: Function, sets: list[Inputs], backward: bool | str) -> Callable[[], object]:
    return _rotating(function, [verify.fresh_leaves(inputs) for inputs in sets], backward)


def _figures(case: Case, measured: timing.Timing, floor: limits.Floor | None) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "ms": measured.median,
        "p20_ms": measured.p20,
        "p80_ms": measured.p80,
        "samples": measured.samples,
        "noisy": measured.noisy,
    }
    if case.bytes:
        figures["gbps"] = case.bytes / measured.median / 1e6
    if case.flops:
        figures["tflops"] = case.flops / measured.median / 1e9
    if floor:
        figures["percent_of_limit"] = 100 * floor.ms / measured.median
    return figures


def free_memory(device: torch.device, always: bool = False) -> None:
    """Collect what the last case left in reference cycles and, where a GPU's memory is short, give cached blocks back."""
    if device.type == "cuda" and not always:
        held = torch.cuda.memory_reserved(device) / torch.cuda.get_device_properties(device).total_memory
        if held < MEMORY_IS_SHORT:
            return
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def chosen(stem: str, settings: Settings) -> Iterator[Case]:
    """A stem's cases whose names match the settings' pattern."""
    for case in registry.cases(stem, settings.device, settings.quick):
        if not settings.pattern or re.search(settings.pattern, case.name):
            yield case
