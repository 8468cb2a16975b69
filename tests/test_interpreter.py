# SPDX-License-Identifier: Apache-2.0
"""Runs every test marked `interpreter` with TRITON_INTERPRET=1, which Triton reads when it is imported: hence a process
of its own, one per test file."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


MARK = "mark.interpreter"


def _files() -> list[str]:
    """Test files with the marker, or whose shared cases have it."""
    found = []
    for path in sorted(p for p in HERE.glob("test_*.py") if p.name != Path(__file__).name):
        text = path.read_text()
        cases = [HERE / f"{name}.py" for name in re.findall(r"^from (\w+_cases) import", text, re.MULTILINE)]
        if any(MARK in part for part in (text, *(case.read_text() for case in cases))):
            found.append(path.name)
    return found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the triton package is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already inside the interpreter")
@pytest.mark.parametrize("name", _files())
def test_kernels_in_the_interpreter(name: str, request: pytest.FixtureRequest) -> None:
    """All interpreter tests of one file pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "interpreter", "-p", "no:cacheprovider", name]
    if request.config.getoption("--slow"):
        command.append("--slow")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_XDIST_WORKER": ""}
    environment.pop("PYTEST_XDIST_WORKER")
    result = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
