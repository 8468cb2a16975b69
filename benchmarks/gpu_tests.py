# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu_tests``: the tests marked `gpu`, first those that nobody has run, over as many calls as it takes.

A ledger beside the results has a line a test: outcome, commit, seconds, name. Tests that failed come first, then those never
reached, then those last run at another commit; what passed at this commit is left out. The ledger grows with each test, so a
call may end anywhere. Tracebacks of failures lie beside it, a file for each file of tests.

This file is also the plugin of pytest that does so (`-p benchmarks.gpu_tests`). A test that hangs is ended with its process by
pytest-timeout's thread; a process whose CUDA context was lost ends itself, or all its other tests would fail too.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# No import of torch here: it would cost every process of pytest, and every caller of --help, seconds.
ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
LEDGER, NEWS, FAILURES = "gpu-tests.txt", "gpu-tests.partial", "gpu-failures"
# Exit code where the time was up before all tests had run (that of `benchmarks run`).
UNFINISHED = 75
# A test that was never run is taken to last this long, and processes need so long to import and to list all tests.
TEST_S, START_S = 2.5, 15.0  # 900 tests took 14 processes of an H100 machine 215 s, compilers included
TESTS_ABOUT = 1400
# One test, its compilations included.
TIMEOUT_S = 120
MOST_TRACEBACKS = 40


@dataclasses.dataclass(frozen=True)
class Line:
    """What became of a test: "passed", "failed" or "skipped", at which commit, in how many seconds."""

    outcome: str
    commit: str
    seconds: float
    name: str

    def __str__(self) -> str:
        return f"{self.outcome} {self.commit} {self.seconds:.2f} {self.name}"


def read(path: Path) -> dict[str, Line]:
    """The last line of each test."""
    found: dict[str, Line] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        words = text.split(maxsplit=3)
        if len(words) == 4:  # the last one may be cut off
            found[words[3]] = Line(words[0], words[1], float(words[2]), words[3])
    return found


def merge(folder: Path) -> dict[str, Line]:
    """Put what the last run found into the ledger, also if that run was killed."""
    ledger, news = folder / LEDGER, folder / NEWS
    found = read(ledger) | read(news)
    if news.exists():
        ledger.write_text("".join(f"{found[name]}\n" for name in sorted(found)))
        news.unlink()
    return found


def rank(line: Line | None, commit: str) -> int | None:
    """Place of a test in the order of value; None if it need not run."""
    if line is None:
        return 1
    if line.outcome == "failed":
        return 0
    return None if line.commit == commit else 2


def files() -> list[Path]:
    """The files that may hold tests for a GPU: to import the others takes each process seconds."""
    word = re.compile(r"\b(gpu|device)\b")
    return [path for path in sorted(TESTS.glob("test_*.py")) if word.search(path.read_text())]


def default_workers() -> int:
    """Compilers beside the tests want the other cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(12, cores * 5 // 8))


def expected_s(folder: Path, commit: str) -> float:
    """How long the tests that are left will take, as far as the ledger knows them."""
    known = merge(folder)
    left = [line.seconds for line in known.values() if rank(line, commit) is not None]
    never = max(0, TESTS_ABOUT - len(known))
    return START_S + (sum(left) + never * TEST_S) / default_workers()


class _Plugin:
    """Orders tests by the ledger, and writes what becomes of them. With xdist all processes order, and the first one writes."""

    def __init__(self, folder: Path, commit: str, again: bool, writes: bool) -> None:
        self.folder, self.commit, self.again, self.writes = folder, commit, again, writes
        # not merged here: processes that replace others must find the same list
        self.known = read(folder / LEDGER)
        self.outcomes: dict[str, tuple[str, float]] = {}
        self.begun: set[str] = set()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        places = {
            item: rank(None if self.again else self.known.get(item.nodeid), self.commit)
            for item in items
            if item.get_closest_marker("gpu")
        }
        chosen = [item for item in items if places.get(item) is not None]
        gone = [item for item in items if places.get(item) is None]
        items[:] = sorted(chosen, key=lambda item: places[item] or 0)
        if gone:
            config.hook.pytest_deselected(items=gone)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self.writes:
            return
        before, seconds = self.outcomes.get(report.nodeid, ("passed", 0.0))
        outcome = report.outcome if before == "passed" and report.outcome != "passed" else before
        self.outcomes[report.nodeid] = outcome, seconds + report.duration
        if report.failed:
            self._keep_traceback(report)
        # a process that died sends one report, of no phase of ours
        if report.when not in ("setup", "call"):
            self._write(report.nodeid)

    def _write(self, nodeid: str) -> None:
        outcome, seconds = self.outcomes[nodeid]
        with (self.folder / NEWS).open("a") as sink:
            sink.write(f"{Line(outcome, self.commit, seconds, nodeid)}\n")

    def _keep_traceback(self, report: pytest.TestReport) -> None:
        stem = Path(report.nodeid.partition("::")[0]).stem
        path = self.folder / FAILURES / f"{stem}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        first = stem not in self.begun
        self.begun.add(stem)
        head = f"{stem} at {self.commit}\n\n" if first else ""
        with path.open("w" if first else "a") as sink:
            if not first and path.stat().st_size > MOST_TRACEBACKS * 4000:
                sink.write(f"{head}{report.nodeid} ({report.when}): no room for more\n")
            else:
                sink.write(f"{head}=== {report.nodeid} ({report.when})\n{report.longreprtext}\n\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        result = yield
        if "PYTEST_XDIST_WORKER" in os.environ and _context_is_lost():
            os._exit(3)  # xdist starts another process in its place
        return result


def _context_is_lost() -> bool:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ledger", type=Path, help="folder of the ledger")
    parser.addoption("--ledger-commit", default="unknown")
    parser.addoption("--ledger-again", action="store_true", help="also tests that passed at this commit")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--ledger")
    if folder is not None:
        again, writes = config.getoption("--ledger-again"), not hasattr(config, "workerinput")
        plugin = _Plugin(folder, config.getoption("--ledger-commit"), again, writes)
        config.pluginmanager.register(plugin, "gpu-tests")


def command(arguments: argparse.Namespace, commit: str) -> list[str]:
    """pytest's command line."""
    found = ["-p", "benchmarks.gpu_tests", "--ledger", str(arguments.out), "--ledger-commit", commit]
    found += ["--ledger-again"] if arguments.again else []
    found += ["-m", arguments.marks, "-q", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout"):
        # the signal of the other method does not reach a process that waits for a kernel
        found += ["--timeout", str(TIMEOUT_S), "--timeout-method", "thread"]
    if arguments.workers > 1 and importlib.util.find_spec("xdist"):
        found += ["-n", str(arguments.workers), "--maxschedchunk", "1", "--max-worker-restart", "50"]
    found += ["--slow"] if arguments.slow else []
    found += ["--large"] if arguments.large else []
    return [sys.executable, "-W", "ignore", "-m", "pytest", *found, *map(str, arguments.files or files())]


def _run(words: list[str], seconds: float) -> int | None:
    """Exit code, or None if it was ended after so many seconds."""
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def _told(folder: Path, start: float, stopped: bool) -> int:
    """Say what this run found; the exit code."""
    news = read(folder / NEWS).values()
    merge(folder)
    counts = {outcome: sum(line.outcome == outcome for line in news) for outcome in ("passed", "failed", "skipped")}
    for line in news:
        if line.outcome == "failed":
            print(f"failed {line.name}")
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    print(f"{told}{', time is up' if stopped else ''} in {time.monotonic() - start:.0f} s")
    return UNFINISHED if stopped else int(counts["failed"] > 0)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tests", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all that may hold GPU tests")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the ledger and the tracebacks")
    parser.add_argument("--time-limit", type=float, default=3600.0, metavar="S", help="end after S seconds")
    workers = default_workers()
    parser.add_argument("--workers", type=int, default=workers, metavar="N", help=f"processes (default {workers})")
    parser.add_argument("--marks", default="gpu", metavar="EXPRESSION", help="pytest's -m (default: gpu)")
    parser.add_argument("--slow", action="store_true", help="also slow ones")
    parser.add_argument("--large", action="store_true", help="also those of tens of GB")
    parser.add_argument("--again", action="store_true", help="also those that passed at this commit")
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    merge(arguments.out)
    start = time.monotonic()
    from benchmarks import machine

    code = _run(command(arguments, machine.commit() or "unknown"), arguments.time_limit)
    told = _told(arguments.out, start, stopped=code is None)
    return told if code in (None, 0, 1, 5) else code  # 5: no test was left


if __name__ == "__main__":
    sys.exit(main())
