# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks device`: the parts, their limits and slices, resuming."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import device


def device_arguments(tmp_path: Path, *words: str) -> argparse.Namespace:
    return bench.parser().parse_args(["device", "--dry-run", "--out", str(tmp_path / "out"), *words])


def test_device_parts_stop_at_their_limit_and_resume(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def python(code: str) -> tuple[str, ...]:
        return (device.PYTHON, "-c", code)

    runs = tmp_path / "runs"
    count = f"open({str(runs)!r}, 'a').write('x'); print('fine')"
    listed = [
        device.Part("quick", python("0"), 60, python(count)),
        device.Part("slow", python("0"), 0.5, python("import time; print('so far', flush=True); time.sleep(60)")),
        device.Part("bad", python("0"), 60, python("raise SystemExit('broken')")),
        device.Part("gpu only", python("0"), 60),
    ]
    monkeypatch.setattr(device, "parts", lambda out, flags: listed)
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
        return device.Part(name, ("-",), 60, (device.PYTHON, "-c", code), slice_s=1, sliced=True)

    monkeypatch.setattr(device, "parts", lambda out, flags: [part("a", 2), part("b", 1), part("c", 3)])
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


def test_device_list_is_by_value(tmp_path: Path) -> None:
    names = [p.name for p in device.parts(tmp_path)]
    assert names[:5] == ["build", "doctor", "limits", "compile", "tests"]
    benchmarks = [n.removeprefix("bench ") for n in names if n.startswith("bench ")]
    known = [s for s in device.STEM_ORDER if s in benchmarks]
    assert benchmarks[: len(known)] == known


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
        return (device.PYTHON, "-c", code)

    listed = [
        device.Part("compile", ("-", "fsq", "lfq"), 60, python("compile", before="tests-"), beside=True),
        device.Part("tests", ("-",), 60, python("tests")),
        device.Part("bench fsq", ("-",), 60, python("fsq"), slice_s=1, sliced=True),
    ]
    monkeypatch.setattr(device, "parts", lambda out, flags: listed)
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
