# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks device``: what a GPU's minutes are for, most valuable first, in parts that can be resumed.

Each part is a process of its own and writes its results at once. The first round gives every part a slice of time, so that
no family starves the others (55 cases of adaLN with a torch.compile each fill ten minutes by themselves); what was not
finished goes on in the next round or call where it was. ``--dry-run`` goes through the same list on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, peers, registry, report

PYTHON = sys.executable
LOGS = machine.ROOT / "build" / "device-logs"
# By value: two memory-bound families first, then the stem on which everything about video decoders hangs.
STEM_ORDER = (
    "adaln_zero",
    "fsq",
    "lfq",
    "entropy",
    "causal_conv3d",
    "upsample_conv3d",
    "channel_norm",
    "group_norm",
    "alpha_blend",
    "qk_norm_rope",
    "varlen_attention",
    "axial_attention",
)
LAST_STEMS = ("models", "transformers", "tokenizers")
# Less than this is not worth starting a part for.
SHORTEST_S = 25.0
# Seconds of a benchmark in the first round, and how long its last case may run on before it is stopped.
SLICE_S, GRACE_S = 35.0, 45.0
LONG_SLICE_S = 60.0
COMPILE_S = 240.0
# Exit code of `benchmarks run` when its time was up before its cases were.
UNFINISHED = 75


@dataclasses.dataclass(frozen=True)
class Part:
    """One step: a command, the seconds it may take at most, and what stands for it in a dry run (None: nothing)."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    dry: tuple[str, ...] | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs: str | None = None  # a program on PATH without which the part is left out
    slice_s: float = math.inf  # at most this in the first round
    sliced: bool = False  # whether it takes --time-limit and stops by itself
    beside: bool = False  # runs beside the parts after it, up to the first that is sliced


def _module(*words: str) -> tuple[str, ...]:
    return (PYTHON, "-m", *words)


def _arch() -> str:
    if not torch.cuda.is_available():
        return "9.0a"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if major >= 9 else "")


def _tests() -> list[Part]:
    workers = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    # one line a test, so that a part that is stopped has told what it found
    common = ("pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *workers)
    collect = _module("pytest", "-q", "--collect-only", "-m", "gpu", "--no-header")
    return [
        Part("tests", _module(*common, "-m", "gpu"), 420, collect, slice_s=240),
        Part("tests slow", _module(*common, "-m", "gpu", "--slow"), 540),
        Part("tests large", _module("pytest", "-v", "--tb=short", "-m", "gpu and large", "--large"), 300),
    ]


def _benchmarks(out: Path, stem: str, flags: tuple[str, ...]) -> Part:
    run = _module("benchmarks", "run", stem, "--resume", "--out", str(out), *flags)
    seconds = LONG_SLICE_S if stem in ("adaln_zero", "causal_conv3d", *LAST_STEMS) else SLICE_S
    return Part(f"bench {stem}", run, 540, _module("benchmarks", "check", stem), slice_s=seconds, sliced=True)


def _compile(stems: list[str], flags: tuple[str, ...]) -> Part:
    """Compilers are paid for beside the tests, by the other half of the cores, and not one case after the other later."""
    run = _module("benchmarks", "run", "--compile-only", "--workers", "8")
    dry = _module("benchmarks", "run", "alpha_blend", "--quick", "--no-compile", "--compile-only", "--workers", "1")
    limit = ("--time-limit", f"{COMPILE_S - GRACE_S:.0f}", *flags)
    return Part("compile", (*run, *limit, *stems), COMPILE_S, dry, beside=True)


def _sanitizers() -> list[Part]:
    doctor = _module("vidkernels", "doctor", "--device", "cuda")
    return [
        Part(
            f"sanitizer {tool}",
            ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *doctor),
            300,
            needs="compute-sanitizer",
        )
        for tool in ("memcheck", "racecheck", "synccheck")
    ]


def parts(out: Path, flags: tuple[str, ...] = ()) -> list[Part]:
    """The whole list in order of value. ``flags`` go to every ``benchmarks run``."""
    registry.load()
    known = registry.stems()
    order = [s for s in STEM_ORDER if s in known]
    order += [s for s in known if s not in STEM_ORDER and s not in LAST_STEMS]
    tests, slow, large = _tests()
    build = Part(
        "build",
        (PYTHON, "setup.py", "build_ext", "--inplace"),
        540,
        (PYTHON, "setup.py", "--version"),
        {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", _arch()), "VIDKERNELS_FORCE_BUILD": "1"},
    )
    doctor = _module("vidkernels", "doctor")
    limits = _module("benchmarks", "limits", "--out", str(out))
    demo = _module("vidkernels", "demo", "--no-micro", "--out", str(out / "demo"))
    found = [
        build,
        Part("doctor", (*doctor, "--device", "cuda"), 180, doctor),
        Part("limits", limits, 120, limits),
        _compile(order, flags),  # whole models are left out: several at once need not fit into a GPU's memory
        tests,
    ]
    found += [_benchmarks(out, s, flags) for s in order]
    found += [_benchmarks(out, s, flags) for s in LAST_STEMS if s in known]
    found += [Part("demo", demo, 300), *_sanitizers(), slow, large]
    return [*found, Part("tune", _module("vidkernels", "tune", "--out", str(out / "configs")), 540)]


class State:
    """Which parts are done, kept in a file beside the results."""

    def __init__(self, path: Path, commit: str | None) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.document: dict[str, Any] = {"commit": commit, "parts": {}}
        if path.exists():
            earlier = json.loads(path.read_text())
            if earlier.get("commit") == commit:
                self.document = earlier

    def done(self, part: Part) -> bool:
        return self.document["parts"].get(part.name, {}).get("status") == "done"

    def record(self, part: Part, status: str, seconds: float, line: str) -> None:
        with self.lock:
            self.document["parts"][part.name] = {"status": status, "seconds": round(seconds, 1), "line": line}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.document, indent=1) + "\n")


def _environment(part: Part) -> dict[str, str]:
    path = [str(peers.SITE)] if peers.SITE.exists() else []
    path += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return {**os.environ, **part.environment, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    found = [
        sum(f" {word}" in line or line.startswith(word) for line in lines) for word in ("PASSED", "FAILED", "ERROR")
    ]
    if found[0] and " in " not in lines[-1]:  # pytest, stopped before its summary
        return "so far {} passed, {} failed, {} errors".format(*found)
    # pytest and the runner end with their summary; a traceback ends with its message
    return re.sub(r"\x1b\[[0-9;]*m", "", lines[-1])[:100] if lines else ""


def run_part(part: Part, command: tuple[str, ...], seconds: float, log: Path) -> tuple[str, str]:
    """Run one command with a time limit. Returns (done, failed or stopped; its last line)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as sink:
        process = subprocess.Popen(
            command,
            cwd=machine.ROOT,
            env=_environment(part),
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            # its whole group: workers of pytest and of the compiler would go on and disturb what is timed next
            os.killpg(process.pid, 9)
            process.wait()
            return "stopped", f"after {seconds:.0f} s; {_last_line(log)}"
    status = "done" if code == 0 else "stopped" if code == UNFINISHED and part.sliced else "failed"
    return status, _last_line(log) or f"exit code {code}"


def _archive(path: Path, out: Path) -> None:
    with tarfile.open(path, "w:gz") as packed:
        for folder, name in ((out, out.name), (LOGS, "logs")):
            if folder.exists():
                packed.add(folder, arcname=name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m benchmarks device``."""
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument(
        "--time-limit", type=float, default=570, metavar="S", help="seconds for this call (default 570)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help="only parts whose name contains one of these"
    )
    parser.add_argument("--again", action="store_true", help="also parts that are done")
    parser.add_argument(
        "--prebuilt",
        action="store_true",
        help="take the libraries beside the package (they serve every Python) as they are",
    )
    parser.add_argument("--peers", type=Path, nargs="+", default=[], help="packed peers to unpack first")
    parser.add_argument("--archive", type=Path, help="pack results and logs into this .tar.gz at the end")
    parser.add_argument("--max-autotune", action="store_true", help="time torch.compile(mode=max-autotune) too (slow)")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    parser.add_argument("--dry-run", action="store_true", help="go through the list on a machine without a GPU")
    parser.set_defaults(function=main)


def _wanted(found: list[Part], arguments: argparse.Namespace, state: State) -> list[Part]:
    chosen = [p for p in found if not arguments.only or any(word in p.name for word in arguments.only)]
    built = (machine.ROOT / "vidkernels" / "libvidkernels_cuda.so").exists()
    if arguments.prebuilt and built:
        chosen = [p for p in chosen if p.name != "build"]
    # A new machine has no build and empty caches, whatever the file says about an earlier one.
    left = [p for p in chosen if arguments.again or p.beside or not state.done(p) or (p.name == "build" and not built)]
    stems = {p.name.removeprefix("bench ") for p in left if p.sliced}
    return [p for p in (_narrowed(p, stems) if p.beside else p for p in left) if p is not None]


def _narrowed(part: Part, stems: set[str]) -> Part | None:
    """What compiles, for those stems alone that are still to be timed; None if there are none of its."""
    if not stems.intersection(part.command):
        return None
    known = set(registry.stems())
    return dataclasses.replace(part, command=tuple(w for w in part.command if w not in known or w in stems))


def _command(part: Part, seconds: float, dry: bool) -> tuple[str, ...] | None:
    if dry or not part.sliced:
        return part.dry if dry else part.command
    return (*part.command, "--time-limit", f"{max(1.0, seconds - GRACE_S):.0f}")


def _run_part(part: Part, seconds: float, left: float, arguments: argparse.Namespace, state: State) -> str:
    """Run one part for at most about `seconds`, record and return its status."""
    seconds = min(part.limit_s, seconds + (GRACE_S if part.sliced else 0.0), left - 5)
    command = _command(part, seconds, arguments.dry_run)
    if command is None or (part.needs and not shutil.which(part.needs) and not arguments.dry_run):
        reason = "no dry run of this part" if command is None else f"{part.needs} is not on PATH"
        state.record(part, "skipped", 0, reason)
        return "skipped"
    start = time.monotonic()
    print(f"[{arguments.time_limit - left:4.0f} s] {part.name}", flush=True)
    log = LOGS / f"{part.name.replace(' ', '_')}.log"
    status, line = run_part(part, command, seconds, log)
    state.record(part, status, time.monotonic() - start, line)
    if part.name == "build" and status != "done":
        print(log.read_text(errors="replace")[-3000:])
    return status


def _run_all(wanted: list[Part], arguments: argparse.Namespace, state: State) -> bool:
    """Run parts until the time is up, each for its slice, then on with those that were stopped. True if all were done."""
    end = time.monotonic() + arguments.time_limit
    good = True
    beside: list[concurrent.futures.Future[str]] = []
    pool = concurrent.futures.ThreadPoolExecutor(1)
    for first in (True, False):
        unfinished = []
        for part in wanted:
            if part.sliced:  # it is timed, so nothing may run beside it
                good &= _finished(beside)
            left = end - time.monotonic()
            if left < SHORTEST_S:
                if first:
                    state.record(part, "waiting", 0, "the time of this call was up")
                good = False
                continue
            if part.beside:
                beside.append(pool.submit(_run_part, part, part.limit_s, left, arguments, state))
                continue
            sliced = first and len(wanted) > 1
            status = _run_part(part, part.slice_s if sliced else math.inf, left, arguments, state)
            if part.name == "build" and status not in ("done", "skipped"):
                return False
            if sliced and status == "stopped" and part.sliced:  # the others would begin anew
                unfinished.append(part)
            else:
                good &= status in ("done", "skipped")
        wanted = unfinished
    return good & _finished(beside)


def _finished(beside: list[concurrent.futures.Future[str]]) -> bool:
    """Wait for what runs beside and forget it. True if all of it went well."""
    good = all([future.result() in ("done", "skipped") for future in beside])
    beside.clear()
    return good


def main(arguments: Any) -> int:
    """``python -m benchmarks device``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (arguments.dry_run or arguments.list):
        print("no CUDA device: nothing to measure; --dry-run goes through the list without one", file=sys.stderr)
        return 2
    folder = machine.ROOT / "build" / "device-dry-run" if arguments.dry_run else machine.ROOT / "benchmarks" / "results"
    out = (arguments.out or folder / machine.slug(device)).resolve()
    for archive in arguments.peers:
        peers.unpack(archive)
    found = parts(out, ("--max-autotune",) if arguments.max_autotune else ())
    if arguments.list:
        print("\n".join(f"{p.name:24} at most {p.limit_s:3.0f} s: {' '.join(p.command[1:])}" for p in found))
        return 0
    lost = [word for word in arguments.only if not any(word in part.name for part in found)]
    if lost:
        print(f"no part's name contains {', '.join(lost)}; --list shows them", file=sys.stderr)
        return 2
    state = State(out / "state.json", machine.facts(device)["commit"])
    good = _run_all(_wanted(found, arguments, state), arguments, state)
    documents = report.read(out)
    if documents:
        (out / "benchmarks.md").write_text(report.markdown(documents))
    if arguments.archive:
        _archive(arguments.archive, out)
    rows = [[n, p["status"], f"{p['seconds']:.0f} s", p["line"]] for n, p in state.document["parts"].items()]
    print("\n" + report.table(["part", "status", "time", "last line"], rows))
    if documents:
        print("\n" + report.summary(documents))
    return 0 if good else 1
