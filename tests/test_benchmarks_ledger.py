# SPDX-License-Identifier: Apache-2.0
"""The ledger of GPU tests: what was never reached comes first, what passed stays out, failures keep their tracebacks."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_tests, machine
from benchmarks.gpu_tests import Line

TOY = """
import os, pytest
pytestmark = pytest.mark.gpu

def note(word):
    with open({notes!r}, "a") as sink:
        sink.write(word + " ")

@pytest.mark.parametrize("name", ["known", "new", "older", "again"])
def test_fine(name):
    note(name)

def test_bad():
    note("bad")
    left, right = 1, 2
    assert left == right

def test_absent():
    pytest.skip("no such chip")
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A file of tests, and a folder `out` for the ledger."""
    (tmp_path / "out").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n    large: x\n")
    path = tmp_path / "test_toy.py"
    path.write_text(TOY.format(notes=str(tmp_path / "notes")))
    return path


def run(toy: Path, monkeypatch: pytest.MonkeyPatch, *words: str, commit: str = "c2", workers: int = 1) -> int:
    monkeypatch.setenv("VIDKERNELS_COMMIT", commit)
    # other plugins take seconds to import
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    wanted = {"xdist": "xdist.plugin", "pytest_timeout": "pytest_timeout"}
    found = [plugin for module, plugin in wanted.items() if importlib.util.find_spec(module)]
    monkeypatch.setenv("PYTEST_PLUGINS", ",".join(found))
    out = str(toy.parent / "out")
    return gpu_tests.main([str(toy), "--out", out, "--workers", str(workers), *words])


def ledger(toy: Path) -> dict[str, tuple[str, str]]:
    lines = gpu_tests.read(toy.parent / "out" / gpu_tests.LEDGER).values()
    return {re.split(r"::test_|\[", line.name.rstrip("]"))[-1]: (line.outcome, line.commit) for line in lines}


def test_what_was_never_reached_comes_before_what_passed_at_another_commit(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [("passed", "c2", "known"), ("passed", "c1", "older"), ("failed", "c1", "again")]
    lines = [Line(outcome, commit, 1.0, f"test_toy.py::test_fine[{name}]") for outcome, commit, name in before]
    (toy.parent / "out" / gpu_tests.LEDGER).write_text("".join(f"{line}\n" for line in lines))
    assert run(toy, monkeypatch) == 1
    assert (toy.parent / "notes").read_text().split() == ["again", "new", "bad", "older"]
    assert ledger(toy) == {
        "known": ("passed", "c2"),
        "new": ("passed", "c2"),
        "older": ("passed", "c2"),
        "again": ("passed", "c2"),
        "bad": ("failed", "c2"),
        "absent": ("skipped", "c2"),
    }
    said = capfd.readouterr().out
    assert "failed test_toy.py::test_bad" in said and "3 passed, 1 failed, 1 skipped in" in said
    kept = (toy.parent / "out" / gpu_tests.FAILURES / "test_toy.txt").read_text()
    assert (
        kept.startswith("test_toy at c2\n") and "assert 1 == 2" in kept and "=== test_toy.py::test_bad (call)" in kept
    )
    assert not (toy.parent / "out" / gpu_tests.NEWS).exists()
    (toy.parent / "notes").unlink()
    run(toy, monkeypatch)
    assert (toy.parent / "notes").read_text().split() == ["bad"]  # the others passed at this commit
    run(toy, monkeypatch, "--again")
    assert (toy.parent / "notes").read_text().split() == ["bad", "known", "new", "older", "again", "bad"]


def test_a_killed_run_keeps_what_it_found(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.write_text(toy.read_text().replace('note("bad")', "os.killpg(0, 9)"))
    assert run(toy, monkeypatch) == -9
    assert ledger(toy) == dict.fromkeys(("known", "new", "older", "again"), ("passed", "c2"))
    (toy.parent / "out" / gpu_tests.NEWS).write_text(
        "passed c3 0.10 a\npassed c3 0.1"
    )  # and if the runner was killed too
    assert gpu_tests.merge(toy.parent / "out")["a"] == Line("passed", "c3", 0.1, "a")


def test_time_is_up_for_all_processes(tmp_path: Path) -> None:
    child = f"import time; time.sleep(30); open({str(tmp_path / 'late')!r}, 'w')"
    both = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu_tests._run([sys.executable, "-c", both], 1.0) is None
    assert not (tmp_path / "late").exists()
    assert gpu_tests._run([sys.executable, "-c", "raise SystemExit(7)"], 60.0) == 7


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_a_process_that_lost_its_context_is_replaced(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for torch whose device fails after a bad test: the others run all the same, in another process."""
    lost = """
import sys, types
def synchronize():
    if os.path.exists(STATE) and open(STATE).read() == str(os.getpid()):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
STATE = {state!r}
"""
    state = str(toy.parent / "lost")
    text = toy.read_text().replace('note("bad")', "open(STATE, 'w').write(str(os.getpid()))")
    toy.write_text(text.replace("pytestmark", lost.format(state=state) + "pytestmark", 1))
    bad, fine = "def test_bad", '@pytest.mark.parametrize("name"'
    body = toy.read_text()
    head, rest = body.split(fine)
    middle, tail = rest.split(bad)
    toy.write_text(f"{head}{bad}{tail}\n{fine}{middle}")  # the bad one first
    assert run(toy, monkeypatch, workers=2) == 1
    found = ledger(toy)
    assert found.pop("bad") == ("failed", "c2")
    assert {outcome for outcome, _ in found.values()} == {"passed", "skipped"} and len(found) == 5
    assert "crashed" in capfd.readouterr().out


def test_estimate_counts_what_is_left(tmp_path: Path) -> None:
    lines = [Line("passed", "c1", 40.0, "a"), Line("passed", "c2", 80.0, "b")]
    (tmp_path / gpu_tests.LEDGER).write_text("".join(f"{line}\n" for line in lines))
    new, both = gpu_tests.expected_s(tmp_path, "c2"), gpu_tests.expected_s(tmp_path, "c3")
    assert both - new == pytest.approx(80.0 / gpu_tests.default_workers())


@pytest.mark.slow
def test_every_file_with_gpu_tests_is_among_those_that_are_read() -> None:
    words = ["-m", "pytest", "-q", "--collect-only", "-m", "gpu", "--no-header", "-p", "no:cacheprovider"]
    run = subprocess.run([sys.executable, "-W", "ignore", *words], cwd=machine.ROOT, capture_output=True, text=True)
    holding = {line.partition("::")[0] for line in run.stdout.splitlines() if "::" in line}
    assert len(holding) > 10
    assert holding <= {str(path.relative_to(machine.ROOT)) for path in gpu_tests.files()}
