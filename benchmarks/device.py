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
from pathlib import Path
from typing import Any

import torch

from benchmarks import device_parts, machine, peers, registry, report
from benchmarks.device_parts import GRACE_S, Part, parts
from benchmarks.gpu_tests import UNFINISHED
from benchmarks.store import write_json
from vidkernels import _files
from vidkernels._commands._options import output_folder, positive

LOGS = machine.ROOT / "build" / "device-logs"
# Less than this is not worth starting a part for.
SHORTEST_S = 25.0


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
            write_json(self.path, self.document)


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
    time_ = parser.add_mutually_exclusive_group()
    time_.add_argument("--minutes", type=positive, metavar="M", help="how long this call may take (default 9.5)")
    time_.add_argument("--time-limit", type=positive, default=570, metavar="S", help="the same in seconds")
    parser.add_argument(
        "--out", type=output_folder, metavar="FOLDER", help="results and state (default: benchmarks/results/<device>)"
    )
    what = parser.add_argument_group("which parts")
    what.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help="only parts whose name contains one of these words"
    )
    what.add_argument("--again", action="store_true", help="also parts that are done at this commit")
    what.add_argument(
        "--prebuilt", action="store_true", help="no build: take the libraries beside the package as they are"
    )
    what.add_argument("--max-autotune", action="store_true", help="time torch.compile(mode=max-autotune) too (slow)")
    what.add_argument("--list", action="store_true", help="print the parts with their commands, and stop")
    what.add_argument(
        "--plan", action="store_true", help="print what this call would do, with estimated seconds, and stop"
    )
    what.add_argument(
        "--dry-run", action="store_true", help="rehearse on a machine without a GPU: small stand-ins of the same parts"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--peers", type=Path, nargs="+", default=[], metavar="FILE", help="packed peers to unpack first")
    files.add_argument(
        "--archive", type=Path, metavar="FILE", help="pack results and logs into this .tar.gz at the end"
    )
    parser.set_defaults(function=main)


def _wanted(found: list[Part], arguments: argparse.Namespace, state: State) -> list[Part]:
    chosen = [p for p in found if not arguments.only or any(word in p.name for word in arguments.only)]
    built = (machine.ROOT / "vidkernels" / "libvidkernels_cuda.so").exists()
    if arguments.prebuilt and built:
        chosen = [p for p in chosen if p.name != "build"]
    # A new machine has no build and empty caches, whatever the file says about an earlier one.
    left = [
        p
        for p in chosen
        if arguments.again or p.beside or p.name == "smoke" or not state.done(p) or (p.name == "build" and not built)
    ]
    stems = {p.name.removeprefix("bench ") for p in left if p.timed}
    return [p for p in (_narrowed(p, stems) if p.beside else p for p in left) if p is not None]


def _narrowed(part: Part, stems: set[str]) -> Part | None:
    """What compiles, for those stems alone that are still to be timed; None if there are none of its."""
    if not stems.intersection(part.command):
        return None
    known = set(registry.stems())
    return dataclasses.replace(part, command=tuple(w for w in part.command if w not in known or w in stems))


def _slice(part: Part, arguments: argparse.Namespace) -> float:
    """Seconds of a part in the first round."""
    if part.share is None:
        return part.slice_s
    return max(part.share * float(arguments.time_limit), SHORTEST_S)


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
    if part.vital and status != "done":
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
            if part.timed:
                good &= _finished(beside)
            left = end - time.monotonic()
            if left < SHORTEST_S:
                if first:
                    state.record(part, "waiting", 0, "the time of this call was up")
                good = False
                continue
            if part.beside:
                seconds = min(part.limit_s, _slice(part, arguments))
                beside.append(pool.submit(_run_part, part, seconds, left, arguments, state))
                continue
            sliced = first and len(wanted) > 1
            status = _run_part(part, _slice(part, arguments) if sliced else math.inf, left, arguments, state)
            if part.vital and status not in ("done", "skipped"):
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


def _plan(wanted: list[Part], arguments: argparse.Namespace, out: Path, commit: str | None) -> str:
    """What this call would do by its estimates: a table, with the part at which the time will be up."""
    rows, start, ahead = [], 0.0, 0.0
    for part in wanted:
        seconds = min(part.expected(), _slice(part, arguments))
        if part.timed:  # waits for what runs beside
            start = max(start, ahead)
        if start >= arguments.time_limit - SHORTEST_S:
            rows.append([part.name, "", f"{seconds:.0f} s", "a later call"])
            continue
        begins = ahead if part.beside and ahead > start else start
        note = "beside the next" if part.beside else ""
        if part.timed and part.name.startswith("bench "):
            fresh, old, _ = device_parts.stem_rows(out, part.name.removeprefix("bench "), commit)
            note = f"{fresh} rows of this commit, {old} of others"
        rows.append([part.name, f"{begins:.0f} s", f"{seconds:.0f} s", note])
        if part.beside:
            ahead = begins + seconds
        else:
            start += seconds
    return (
        report.table(["part", "begins at", "estimate", ""], rows) + f"\n{arguments.time_limit:.0f} s, commit {commit}\n"
    )


def main(arguments: Any) -> int:
    """``python -m benchmarks device``."""
    if arguments.minutes is not None:
        arguments.time_limit = 60 * arguments.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (arguments.dry_run or arguments.list or arguments.plan):
        print("no CUDA device: nothing to measure; --dry-run goes through the list without one", file=sys.stderr)
        return 2
    folder = machine.ROOT / "build" / "device-dry-run" if arguments.dry_run else machine.ROOT / "benchmarks" / "results"
    out = (arguments.out or folder / machine.slug(device)).resolve()
    for archive in arguments.peers:
        peers.unpack(archive)
    commit = machine.commit()
    found = parts(out, ("--max-autotune",) if arguments.max_autotune else (), commit)
    if arguments.list:
        print("\n".join(f"{p.name:24} at most {p.limit_s:3.0f} s: {' '.join(p.command[1:])}" for p in found))
        return 0
    lost = [word for word in arguments.only if not any(word in part.name for part in found)]
    if lost:
        print(f"no part's name contains {', '.join(lost)}; --list shows them", file=sys.stderr)
        return 2
    state = State(out / "state.json", commit)
    wanted = _wanted(found, arguments, state)
    print(_plan(wanted, arguments, out, commit), flush=True)
    if arguments.plan:
        return 0
    good = _run_all(wanted, arguments, state)
    documents = report.read(out)
    if documents:
        _files.write_text(out / "benchmarks.md", report.markdown(documents))
    if arguments.archive:
        _archive(arguments.archive, out)
    rows = [[n, p["status"], f"{p['seconds']:.0f} s", p["line"]] for n, p in state.document["parts"].items()]
    print("\n" + report.table(["part", "status", "time", "last line"], rows))
    if documents:
        print("\n" + report.summary(documents))
    return 0 if good else 1
