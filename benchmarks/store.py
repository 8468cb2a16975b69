# SPDX-License-Identifier: Apache-2.0
"""A stem's cases run into its JSON: after each case the file is whole, and a later run goes on where this one stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import limits, machine, phases, report, runner
from benchmarks.registry import Case
from vidkernels import _files

Say = Callable[[str], None]


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write at once and whole: a run that is stopped leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.write_text(path, json.dumps(document, indent=1) + "\n")


def measured_limits(device: torch.device, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The ceilings the results were compared with."""
    found: dict[str, Any] = {}
    results = [r for r in results if "measured" not in r]  # an earlier run compared those with its own
    if any(r.get("bytes") for r in results):
        found["copy_gbps"] = limits.copy_gbps(device)
    dtypes = sorted({r["dtype"] for r in results if r.get("bound") == "matmul"})
    if dtypes:
        found["matmul_tflops"] = {d: limits.matmul_tflops(device, getattr(torch, d)) for d in dtypes}
    return found


@dataclasses.dataclass
class Earlier:
    """What a JSON holds already.

    Args:
        good: results of this commit in which ours has a time.
        old: the same of other commits, each with "measured", which says when; they stay until they are measured again.
        late: names of cases that failed or that a run did not survive: they come after all others.
    """

    good: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    old: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    late: set[str] = dataclasses.field(default_factory=set)


def earlier(path: Path, facts: dict[str, Any]) -> Earlier:
    """The results of an earlier run on the same kind of device."""
    found = Earlier()
    if not path.exists():
        return found
    document = json.loads(path.read_text())
    before = document["machine"]
    if before.get("device") != facts["device"]:
        return found
    same = all(before.get(name) == facts[name] for name in ("commit", "torch"))
    when = {name: before.get(name) for name in ("commit", "torch", "date")}
    for result in document["results"]:
        fine = result["rows"].get(runner.OURS, {}).get("status") == "ok"
        if fine and same and "measured" not in result:
            found.good.append(result)
        elif fine:
            found.old.append({"measured": when, **result})
        elif same:
            found.late.add(result["case"])
    if same and document.get("begun"):
        found.late.add(document["begun"])
    return found


class _Document:
    """The JSON of a stem while its cases run."""

    def __init__(self, stem: str, settings: runner.Settings, path: Path, resume: bool) -> None:
        self.path, self.settings = path, settings
        facts = machine.facts(settings.device)
        found = earlier(path, facts) if resume else Earlier()
        self.results, self.late = [*found.good, *found.old], found.late
        self.content: dict[str, Any] = {
            "stem": stem, "quick": settings.quick, "machine": facts, "results": self.results
        }  # fmt: skip

    def _found(self, name: str) -> dict[str, Any] | None:
        """The result of a case at this commit, if it has rows."""
        fresh = (r for r in self.results if r["case"] == name and "measured" not in r and r["rows"])
        return next(fresh, None)

    def done(self, case: Case, compiled: bool) -> bool:
        """Whether the case has a result of this commit; with `compiled`, one with torch.compile's row, if it is to have it."""
        found = self._found(case.name)
        return found is not None and (not (compiled and case.compile) or runner.COMPILE in found["rows"])

    def begin(self, case: Case) -> None:
        self.content["begun"] = case.name
        write_json(self.path, self.content)

    def put(self, result: dict[str, Any]) -> None:
        """Add a result in place of an earlier one of the case. A failure with torch.compile leaves the times without it."""
        self.content.pop("begun", None)
        before = next((i for i, r in enumerate(self.results) if r["case"] == result["case"]), None)
        if before is None:
            self.results.append(result)
        elif "error" in result and self._found(result["case"]):
            self.results[before]["rows"][runner.COMPILE] = {"status": "error", "detail": result["error"]}
        else:
            self.results[before] = result
        self.content["limits"] = self.content.get("limits", {}) | measured_limits(self.settings.device, self.results)
        write_json(self.path, self.content)

    def forget_all_but(self, names: Iterable[str]) -> None:
        """Drop results of earlier commits whose cases are gone."""
        known = set(names)
        self.results[:] = [r for r in self.results if "measured" not in r or r["case"] in known]
        write_json(self.path, self.content)


def _lost(device: torch.device) -> bool:
    """Whether a kernel has left the CUDA context unusable: whatever runs in this process from now on fails."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _tell(result: dict[str, Any], say: Say) -> None:
    times = ", ".join(f"{name} {report.cell(row)}" for name, row in result["rows"].items())
    say(f"  {result['case']}: {times or 'failed: ' + result['error']}")
    for name, row in result["rows"].items():
        if row["status"] != "ok":
            say(f"    {name}: {row['status']}, {row['detail']}")
    if result.get("phases"):
        say(f"    {result['seconds']:.1f} s: {phases.line(result['phases'])}")


def run_stem(
    stem: str,
    settings: runner.Settings,
    out: Path,
    say: Say,
    resume: bool = False,
    end: float = math.inf,
    compile_last: bool = False,
) -> dict[str, Any]:
    """Run a stem's cases, writing the JSON after each.

    Args:
        resume: only those without a result of this commit, torch and device in the JSON; results of other commits on the
            same device stay there, marked, until their turn comes.
        end: time.monotonic() from which on no case is begun; the document then says `"unfinished": True` (not in the JSON).
        compile_last: first every case without torch.compile, then again with it those that have it.
    """
    document = _Document(stem, settings, out / f"{stem}.json", resume)
    passes = [settings]
    if compile_last and settings.compile:
        passes.insert(0, dataclasses.replace(settings, compile=False))
    for number, chosen in enumerate(passes):
        cases = deque(runner.chosen(stem, chosen))
        names = [case.name for case in cases]
        if not settings.pattern:
            document.content["cases"] = len(names)
        cases = deque(sorted(cases, key=lambda case: case.name in document.late))
        while cases:
            case = cases.popleft()  # a case holds its model: none is kept longer than needed
            if (resume or number) and document.done(case, compiled=compile_last and chosen.compile):
                continue
            document.begin(case)
            result = runner.run_case(case, chosen)
            document.put(result)
            _tell(result, say)
            del case
            if _lost(settings.device):
                say("the CUDA context is lost: this process ends, and --resume goes on with the other cases")
                return {**document.content, "unfinished": True}
            runner.free_memory(settings.device)
            if time.monotonic() >= end:
                return {**document.content, "unfinished": True}
        if not settings.pattern:
            document.forget_all_but(names)
    return document.content
