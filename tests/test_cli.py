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

from vidkernels import _env
from vidkernels.__main__ import main
from vidkernels._commands import info


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


def test_info_tells_another_pythons_build_from_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vidkernels._C", None)  # as where Python finds no such file
    monkeypatch.setattr(info, "_HERE", tmp_path)
    assert info._build_facts() == {"compiled": "nothing: a pure-Python install"}
    (tmp_path / "_build_info.json").write_text('{"torch": "2.13.0"}')
    facts = info._build_facts()
    assert facts["torch"] == "2.13.0" and "not there for this Python" in facts["module"]


def test_info_answers_when_torch_is_broken(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch is gone')")
    run = subprocess.run(
        [sys.executable, str(ROOT / "vidkernels" / "_commands" / "info.py"), "--json"],
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

    from vidkernels._commands import doctor

    verdicts = doctor.examine(torch.device("cpu"))
    assert not [verdict for verdict in verdicts if verdict.bad]
    assert {verdict.op for verdict in verdicts if verdict.verdict == "ok"} >= {
        "fsq_quantize",
        "adaln_zero",
        "causal_conv3d",
    }
    honest = doctor._run

    def broken(sample, backend, dtype):
        outputs = honest(sample, backend, dtype)
        return [output + 1 for output in outputs] if dtype == torch.float32 else outputs

    monkeypatch.setattr(doctor, "_run", broken)
    assert doctor.main(["--device", "cpu"]) == 1


@pytest.mark.parametrize(
    ("fault_with", "fault_without", "good"), [(0.0, 0.0, True), (4e-3, 0.0, False), (0.0, 5e-4, False)]
)
def test_doctor_allows_float32_products_in_tf32_what_they_cost_the_reference(
    fault_with: float, fault_without: float, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where torch allows TF32 for convolutions: operands of 10 bits, an error that no longer is excused by
    them, and one that stays without TF32."""
    import torch

    from vidkernels._commands import doctor
    from vidkernels._commands.samples import samples

    honest = doctor._run

    def gpu(sample, backend, dtype):
        if dtype != torch.float32:
            return honest(sample, backend, dtype)
        cut, fault = bool(doctor._tf32_switches()), fault_with if doctor._tf32_switches() else fault_without
        outputs = honest(doctor._changed(sample, doctor._cut_to_tf32) if cut else sample, backend, torch.float64)
        return [output + fault * output.abs().max() for output in outputs]

    monkeypatch.setattr(doctor, "_run", gpu)
    convolutions = [s for s in samples(torch.device("cpu")) if s.op in ("causal_conv3d", "upsample_conv3d")]
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    verdicts = doctor.examine(torch.device("cpu"), backends={"cpp", "reference"}, given=convolutions)
    assert len(verdicts) == 4 and all(verdict.bad != good for verdict in verdicts), verdicts
    assert not good or all("TF32" in (verdict.note or "") for verdict in verdicts)
    assert before == (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)


def test_unknown_command_and_env() -> None:
    run = cli("inof")
    assert run.returncode == 2
    assert "invalid choice" in run.stderr
    assert "VIDKERNELS_STRICT=0" in cli("env").stdout


def test_version_and_a_reader_that_goes_away() -> None:
    import vidkernels

    assert cli("--version").stdout.strip() == f"vidkernels {vidkernels.__version__}"
    command = f"{sys.executable} -m vidkernels env | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 141)
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "vidkernels env: interrupted\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "vidkernels env: /x: Permission denied\n"),
    ],
    ids=["Ctrl-C", "unwritable"],
)
def test_interruptions_and_files_end_in_one_line(
    raised: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(argv: list[str]) -> int:
        raise raised

    monkeypatch.setattr(_env, "main", broken)
    assert main(["env"]) == code
    assert capsys.readouterr().err == text


def test_bench_outside_of_the_checkout_says_where_it_is(tmp_path: Path) -> None:
    run = cli("bench", "list", cwd=tmp_path, PYTHONPATH=str(installed_alone(tmp_path)))
    assert run.returncode == 2
    assert run.stderr == (
        "vidkernels bench: the folder `benchmarks` is part of the checkout; run `python -m vidkernels bench` in it.\n"
    )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'av.codec'", name=name)

    monkeypatch.setattr(_env, "main", broken)
    name = "av.codec"
    assert main(["env"]) == 2
    assert capsys.readouterr().err == "vidkernels env: the Python package av is missing: pip install av\n"
    name = "vidkernels.lost"
    with pytest.raises(ModuleNotFoundError):
        main(["env"])


def installed_alone(folder: Path) -> Path:
    """A folder that holds the package and nothing else of the checkout."""
    site = folder / "site"
    site.mkdir()
    (site / "vidkernels").symlink_to(ROOT / "vidkernels")
    return site


@pytest.mark.parametrize("command", ["doctor", "tune", "demo"])
def test_a_device_that_is_not_there_is_refused_in_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("gpu", "mps"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--device", text])
        assert stop.value.code == 2
        assert "argument --device: expected" in capsys.readouterr().err.splitlines()[-1]


def test_doctor_and_info_know_every_op_with_backends() -> None:
    import torch

    from vidkernels import dispatch, ops
    from vidkernels._commands.samples import samples

    for name in ops.__all__:
        getattr(ops, name)
    assert {sample.op for sample in samples(torch.device("cpu"))} == set(dispatch.dispatchers()) & set(ops.__all__)
