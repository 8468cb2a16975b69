# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks device`: the parts, their limits and slices, resuming."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import device, machine, sanitize
from benchmarks import device_parts as parts


def device_arguments(tmp_path: Path, *words: str) -> argparse.Namespace:
    return bench.parser().parse_args(["device", "--dry-run", "--out", str(tmp_path / "out"), *words])


def test_device_parts_stop_at_their_limit_and_resume(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def python(code: str) -> tuple[str, ...]:
        return (parts.PYTHON, "-c", code)

    runs = tmp_path / "runs"
    count = f"open({str(runs)!r}, 'a').write('x'); print('fine')"
    listed = [
        parts.Part("quick", python("0"), 60, python(count)),
        parts.Part("slow", python("0"), 0.5, python("import time; print('so far', flush=True); time.sleep(60)")),
        parts.Part("bad", python("0"), 60, python("raise SystemExit('broken')")),
        parts.Part("gpu only", python("0"), 60),
    ]
    monkeypatch.setattr(device, "parts", lambda out, flags, commit: listed)
    monkeypatch.setattr(device, "LOGS", tmp_path / "logs")
    archive = tmp_path / "all.tar.gz"
    assert device.main(device_arguments(tmp_path, "--archive", str(archive))) == 1
    found = json.loads((tmp_path / "out" / "state.json").read_text())["parts"]
    assert {name: p["status"] for name, p in found.items()} == {
        "quick": "done",
        "slow": "stopped",
        "bad": "failed",
        "gpu only": "skipped",
    }
    assert found["slow"]["line"].endswith("so far") and found["bad"]["line"] == "broken"
    assert archive.stat().st_size > 0
    assert "| quick" in capsys.readouterr().out
    device.main(device_arguments(tmp_path))
    assert runs.read_text() == "x"  # done parts are not run again
    device.main(device_arguments(tmp_path, "--again", "--only", "quick"))
    assert runs.read_text() == "xx"


def test_device_gives_every_part_a_slice_before_it_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A benchmark that its first slice did not finish comes again after all others; what is told a limit gets one."""
    runs = tmp_path / "runs"

    def part(name: str, finishes_at: int) -> device.Part:
        code = f"""
import pathlib, sys
runs = pathlib.Path({str(runs)!r})
runs.write_text((runs.read_text() if runs.exists() else '') + '{name}')
sys.exit(0 if runs.read_text().count('{name}') >= {finishes_at} else {device.UNFINISHED})"""
        return parts.Part(name, ("-",), 60, (parts.PYTHON, "-c", code), slice_s=1, sliced=True)

    monkeypatch.setattr(device, "parts", lambda out, flags, commit: [part("a", 2), part("b", 1), part("c", 3)])
    monkeypatch.setattr(device, "LOGS", tmp_path / "logs")
    assert device.main(device_arguments(tmp_path)) == 1
    assert runs.read_text() == "abcac"
    found = json.loads((tmp_path / "out" / "state.json").read_text())["parts"]
    assert [found[name]["status"] for name in "abc"] == ["done", "done", "stopped"]
    timed = device._command(part("a", 1), 100, dry=False)
    assert timed is not None and timed[-2:] == ("--time-limit", "55")


def test_tests_that_were_stopped_tell_what_they_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("[gw0] [ 1%] PASSED tests/a.py::b\n[gw1] [ 2%] FAILED tests/a.py::c\ntests/a.py::d PASSED [ 3%]\n")
    assert device._last_line(log) == "so far 2 passed, 1 failed, 0 errors"
    log.write_text(log.read_text() + "== 1 failed, 2 passed in 3.00s ==\n")
    assert device._last_line(log) == "== 1 failed, 2 passed in 3.00s =="


def results(folder: Path, stem: str, commit: str, count: int, cases: int = 9) -> None:
    rows = {"vidkernels": {"status": "ok", "ms": 1.0}}
    found = [{"case": f"case {i}", "rows": rows, "seconds": 2.0} for i in range(count)]
    document = {"stem": stem, "machine": {"commit": commit}, "cases": cases, "results": found}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(document))


def test_device_list_is_by_value(tmp_path: Path) -> None:
    """Tests, whole models, convolutions, then what was never measured, then the others."""
    results(tmp_path, "adaln_zero", "old", 3)
    found = parts.parts(tmp_path, commit="new")
    names = [p.name for p in found]
    assert names[:6] == ["build", "smoke", "compile models", "compile", "tests", "bench models"]
    benchmarks = [n.removeprefix("bench ") for n in names if n.startswith("bench ")]
    assert benchmarks[:6] == list(parts.STEM_ORDER[:6]) and benchmarks[-2:] == list(parts.LAST_STEMS)
    assert benchmarks[6:-2] == [s for s in parts.STEM_ORDER[6:] if s != "adaln_zero"] + ["adaln_zero"]
    assert names.index("limits") < names.index("tests large") < names.index("sanitizer memcheck") < names.index("ncu")
    (known,) = [p for p in found if p.name == "bench adaln_zero"]
    assert known.expected() == min(60.0, 8 + 3 * 2.0 + 6 * 5.0)  # the process, 3 rows again, 6 that are new
    ncu = next(p for p in found if p.name == "ncu").command
    assert ncu[1:3] == ("--clock-control", "none")  # it would fix the clocks of a machine that is only lent


@pytest.mark.parametrize(("minutes", "last"), [("13", "bench"), ("4", "bench models")])
def test_plan_says_what_fits(minutes: str, last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["device", "--plan", "--prebuilt", "--minutes", minutes, "--out", str(tmp_path)]
    assert bench.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{float(minutes) * 60:.0f} s, commit {machine.commit()}" in lines
    fits = [line for line in lines if line.startswith("| ") and "a later call" not in line]
    assert any(line.startswith("| tests ") for line in fits)
    assert any(line.startswith(f"| {last}") for line in fits)
    assert not (tmp_path / "state.json").exists()


def test_unknown_parts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert device.main(device_arguments(tmp_path, "--only", "doctor", "nonsense")) == 2
    assert capsys.readouterr().err == "no part's name contains nonsense; --list shows them\n"


def test_compilers_run_beside_the_tests_for_the_stems_that_are_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What compiles starts before the tests and has ended before anything is timed; it knows no stem but those asked for."""
    log = tmp_path / "order"

    def python(name: str, before: str = "") -> tuple[str, ...]:
        code = f"""
import pathlib, time
log = pathlib.Path({str(log)!r})
def say(word):
    with log.open("a") as file:
        file.write(word)
say("{name}+")
for _ in range(200):  # 20 s at most, if the other never comes
    if "{before}" in log.read_text():
        break
    time.sleep(0.1)
say("{name}-")"""
        return (parts.PYTHON, "-c", code)

    listed = [
        parts.Part("compile", ("-", "fsq", "lfq"), 60, python("compile", before="tests-"), beside=True),
        parts.Part("tests", ("-",), 60, python("tests")),
        parts.Part("bench fsq", ("-",), 60, python("fsq"), slice_s=1, sliced=True, timed=True),
    ]
    monkeypatch.setattr(device, "parts", lambda out, flags, commit: listed)
    monkeypatch.setattr(device, "LOGS", tmp_path / "logs")
    assert device.main(device_arguments(tmp_path)) == 0
    order = log.read_text()
    assert order.endswith("compile-fsq+fsq-") and order.index("tests-") < order.index("compile-")
    found = json.loads((tmp_path / "out" / "state.json").read_text())["parts"]
    assert {name: part["status"] for name, part in found.items()} == dict.fromkeys(found, "done") and len(found) == 3
    state = device.State(tmp_path / "out" / "state.json", None)
    arguments = device_arguments(tmp_path, "--again")
    compiles = device._wanted(listed, arguments, state)[0]
    assert compiles.command == ("-", "fsq")
    assert [p.name for p in device._wanted(listed[:2], arguments, state)] == ["tests"]  # nothing to be timed


def test_nothing_runs_where_the_kernels_do_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = [
        parts.Part("smoke", ("-",), 60, (parts.PYTHON, "-c", "raise SystemExit('no library')"), vital=True),
        parts.Part("tests", ("-",), 60, (parts.PYTHON, "-c", "")),
    ]
    monkeypatch.setattr(device, "parts", lambda out, flags, commit: listed)
    monkeypatch.setattr(device, "LOGS", tmp_path / "logs")
    assert device.main(device_arguments(tmp_path)) == 1
    found = json.loads((tmp_path / "out" / "state.json").read_text())["parts"]
    assert {name: part["status"] for name, part in found.items()} == {"smoke": "failed"}


def test_smoke_compares_two_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import smoke
    from vidkernels import _library

    cpu = torch.device("cpu")
    if _library.cpu_missing is None:
        assert smoke.faults(cpu) == []
    monkeypatch.setattr(_library, "cpu_missing", "not built")
    assert smoke.faults(cpu) == ["the compiled library: not built"]


def test_commit_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDKERNELS_COMMIT", "0123456789")
    assert machine.commit() == "0123456789" == machine.facts(torch.device("cpu"))["commit"]
    monkeypatch.delenv("VIDKERNELS_COMMIT")
    assert machine.commit() != "0123456789"


SANITIZER = """#!{python}
import os, signal, subprocess, sys
if sys.argv[1:] == ["--help"]:
    print("  --padding arg  bytes")
    sys.exit(0)
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
assert sys.argv[1:].count("--padding") == (sys.argv[2] == "memcheck")
print("========= COMPUTE-SANITIZER", flush=True)
if {killed}:
    sys.exit(0)
code = subprocess.call(sys.argv[sys.argv.index({interpreter!r}):]) if {real} else print("all calls were made") or 0
print("========= {summary}")
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("tool", "summary", "killed", "says"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors", False, "clean"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", False, "clean"),
        ("memcheck", "ERROR SUMMARY: 3 errors", False, "no summary of the tool that counts nothing"),
        ("racecheck", "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", False, "no summary of the tool"),
        ("synccheck", "", True, "the process ended before it had made every call; no summary"),
    ],
)
def test_sanitizer_fails_on_errors_and_where_the_process_was_killed(
    tool: str,
    summary: str,
    killed: bool,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Over the C++ kernels: they are all right, and what the tool says or that it said nothing decides."""
    program = tmp_path / "compute-sanitizer"
    interpreter = parts.PYTHON
    real = summary == "ERROR SUMMARY: 0 errors"
    filled = SANITIZER.format(python=interpreter, interpreter=interpreter, killed=killed, summary=summary, real=real)
    program.write_text(filled)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert sanitize.main([tool, "--backend", "cpp", "--device", "cpu"]) == (says != "clean")
    assert f"{tool}, cpp: {says}" in capfd.readouterr().out


def test_sanitizer_without_a_kernel_or_with_a_wrong_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sanitize.make_calls(torch.device("cpu"), "cuda") == 1  # none of them ran
    monkeypatch.setattr(sanitize.doctor, "_run", lambda *a: [torch.tensor(1.0 if a[2] == torch.float64 else 2.0)])
    assert sanitize.make_calls(torch.device("cpu"), "cpp") > 0
