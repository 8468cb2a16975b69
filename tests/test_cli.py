# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels`: info also when torch is broken, doctor's exit code, errors of unknown commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT


def cli(*args: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vidkernels", *args]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def test_info_names_every_op_and_backend() -> None:
    run = cli("info", "--json")
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout)
    for op in ("fsq_quantize", "causal_conv3d", "adaln_zero", "varlen_attention"):
        assert facts["backends"][op]["reference"] == "ok"
    assert (
        "it runs on cuda tensors, got cpu" in facts["backends"]["fsq_quantize"]["cuda"] or "devices" in facts["torch"]
    )


def test_info_answers_when_torch_is_broken(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch is gone')")
    run = subprocess.run(
        [sys.executable, str(ROOT / "vidkernels" / "_info.py"), "--json"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout)
    assert facts["torch"] == "failed: OSError: libtorch is gone"
    assert facts["versions"]["numpy"]
    assert "libtorch is gone" in cli("info", PYTHONPATH=str(tmp_path)).stdout


def test_doctor_passes_and_fails_when_a_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from vidkernels import _doctor

    verdicts = _doctor.examine(torch.device("cpu"))
    assert not [verdict for verdict in verdicts if verdict.bad]
    assert {verdict.op for verdict in verdicts if verdict.verdict == "ok"} >= {
        "fsq_quantize",
        "adaln_zero",
        "causal_conv3d",
    }
    honest = _doctor._run

    def broken(sample, backend, dtype):
        outputs = honest(sample, backend, dtype)
        return [output + 1 for output in outputs] if dtype == torch.float32 else outputs

    monkeypatch.setattr(_doctor, "_run", broken)
    assert _doctor.main(["--device", "cpu"]) == 1


def test_unknown_command_and_env() -> None:
    run = cli("inof")
    assert run.returncode == 2
    assert "invalid choice" in run.stderr
    assert "VIDKERNELS_STRICT=0" in cli("env").stdout
