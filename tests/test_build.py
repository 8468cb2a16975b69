# SPDX-License-Identifier: Apache-2.0
"""The build: what is chosen from what is found, wheel and sdist contents, installs in and outside the checkout."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from helpers import ROOT

import vidkernels

HAS_CXX = shutil.which("c++") or shutil.which("g++")
BUILD_TOOLS = all(importlib.util.find_spec(name) for name in ("pybind11", "setuptools", "wheel"))
needs_build = pytest.mark.skipif(
    not (HAS_CXX and BUILD_TOOLS), reason="needs a C++ compiler, pybind11, setuptools and wheel"
)


@pytest.fixture(scope="module")
def native() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vidkernels_build_under_test", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def copy_checkout(target: Path) -> Path:
    """The tracked part of the checkout: what a clone would hold."""
    ignore = shutil.ignore_patterns(
        ".git",
        ".venv",
        "build",
        "report",
        "*.so",
        "__pycache__",
        "*.egg-info",
        ".*_cache",
        ".benchmarks",
        "golden",
        "results",
        "dist",
    )
    shutil.copytree(ROOT, target, ignore=ignore)
    return target


def setup_py(checkout: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *args],
        cwd=checkout,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_arch_list_becomes_gencode_flags(native: ModuleType) -> None:
    assert native.gencode_flags("8.0;9.0a 10.0a+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100a,code=sm_100a",
        "-gencode=arch=compute_100a,code=compute_100a",
    ]
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: expected entries such as 8.0"):
        native.gencode_flags("hopper")


@pytest.mark.parametrize(("archs", "built"), [("8.0;9.0a;10.0a", True), ("9.0a+PTX", True), ("8.0 9.0", False)])
def test_kernels_of_sm_90a_are_built_where_the_list_has_it(native: ModuleType, archs: str, built: bool) -> None:
    assert native.arch_defines(archs) == ("-DVK_SM90A" if built else "")


def test_compilers_that_do_not_know_an_instruction_set_build_the_others(native: ModuleType, tmp_path: Path) -> None:
    old = tmp_path / "g++"
    old.write_text('#!/bin/sh\ncase "$*" in *avx512bf16*) exit 1;; esac\n')
    old.chmod(0o755)
    expected = [name for name in native.X86_VARIANTS if native._is_x86() or name == "cpu_default"]
    assert list(native.cpu_variants(("true",))) == expected
    assert list(native.cpu_variants((str(old),))) == [name for name in expected if name != "cpu_avx512_bf16"]


def test_tiles_are_left_out_where_the_assembler_does_not_know_them(native: ModuleType, tmp_path: Path) -> None:
    old = tmp_path / "g++"
    old.write_text('#!/bin/sh\nif grep -q tdpbf16ps; then echo "no such instruction" >&2; exit 1; fi\n')
    old.chmod(0o755)
    assert native.knows_amx(("true",)) == native._is_x86()
    assert not native.knows_amx((str(old),))


def test_jobs_follow_cores_memory_and_max_jobs(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(native, "memory_limit", lambda: 9e9)
    assert native.max_jobs() == 4
    monkeypatch.setattr(native, "memory_limit", lambda: 1e8)
    assert native.max_jobs() == 1
    assert native.max_jobs("7") == 7


def test_classifiers_name_the_versions_of_python_from_the_oldest_on() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    named = [int(minor) for minor in re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text)]
    oldest = re.search(r'^requires-python = ">=3\.(\d+)"$', text, re.M)
    assert oldest and named == list(range(int(oldest[1]), max(named, default=0) + 1))


@needs_build
@pytest.mark.slow
def test_wheel_and_sdist_hold_everything(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    for stale in ("libvidkernels_cuda.so", "_build_info.json"):  # of another build, made in place
        (checkout / "vidkernels" / stale).write_text("{}")
    run = setup_py(
        checkout, "sdist", "bdist_wheel", "--dist-dir", str(tmp_path / "dist"), VIDKERNELS_SKIP_CPU_BUILD="1"
    )
    assert run.returncode == 0, run.stderr[-3000:]
    dist = [*(tmp_path / "dist").iterdir(), *(checkout / "dist").glob("*")]
    with zipfile.ZipFile(next(p for p in dist if p.suffix == ".whl")) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert f"\nVersion: {vidkernels.__version__}\n" in metadata
    assert "vidkernels.configs" not in run.stderr  # no folder of data that setuptools takes for a package
    package = {f"vidkernels/{p.relative_to(checkout / 'vidkernels')}" for p in (checkout / "vidkernels").rglob("*.py")}
    references = {f"vidkernels/_python_ref/{p.name}" for p in (checkout / "python_ref").glob("*.py")}
    configs = {
        f"vidkernels/{p.relative_to(checkout / 'vidkernels')}"
        for p in (checkout / "vidkernels/configs").rglob("*.json")
    }
    assert package | references | configs | {"vidkernels/py.typed"} <= names
    assert not any(name.endswith((".so", "_build_info.json")) for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/", "python_ref/")) for name in names)
    with tarfile.open(next(p for p in dist if p.name.endswith(".tar.gz"))) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False
    ).stdout.split()
    copied = {name for name in tracked if (checkout / name).is_file()}
    assert copied - {".gitignore"} <= held  # the tests run from it
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "vidkernels/py.typed"} <= held


@needs_build
@pytest.mark.slow
def test_installed_wheel_works_inside_and_outside_the_checkout(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    target = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
        str(checkout),
    ]
    env = {**os.environ, "VIDKERNELS_OPS": "fsq", "VIDKERNELS_SKIP_CUDA_BUILD": "1"}
    run = subprocess.run(install, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    code = (
        "import torch, vidkernels; from vidkernels import ops, _library\n"
        "codes, indices = ops.fsq_quantize(torch.zeros(2, 3), [8, 5, 5])\n"
        "print(vidkernels.__file__, indices.tolist(), _library.cpu_missing)"
    )
    for folder in (tmp_path, checkout):
        env = {**os.environ, "PYTHONPATH": str(target)}
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        file, rest = result.stdout.split(" ", 1)
        assert rest.startswith("[180, 180]") or rest.startswith("["), rest
        inside = Path(file).is_relative_to(checkout)
        assert inside == (folder == checkout)
        # In the checkout, Python imports the source tree: the message must name the built copy.
        assert ("None" in rest) if not inside else (f"the built copy is at {target}" in rest)


@needs_build
@pytest.mark.parametrize(
    ("env", "code", "text"),
    [
        ({"PATH": "/nonexistent", "CXX": "", "CUDA_HOME": ""}, 0, "no C++ compiler on PATH: pure-Python install"),
        (
            {"PATH": "/nonexistent", "CXX": "", "CUDA_HOME": "", "VIDKERNELS_FORCE_BUILD": "1"},
            1,
            "no C++ compiler is on PATH",
        ),
        ({"VIDKERNELS_SKIP_CPU_BUILD": "yes"}, 0, "no kernels are compiled"),
    ],
    ids=["no compiler", "no compiler but forced", "skipped"],
)
def test_missing_compilers_give_a_smaller_build_and_one_clear_line(env: dict[str, str], code: int, text: str) -> None:
    run = setup_py(ROOT, "--version", **env)
    assert (run.returncode != 0) == bool(code)
    assert text in run.stderr


@needs_build
@pytest.mark.parametrize(
    ("env", "code", "text"),
    [
        ({"VIDKERNELS_OPS": "fsq,nothing"}, 1, "VIDKERNELS_OPS names nothing; known stems: fsq, lfq"),
        ({"VIDKERNELS_FORCE_BUILD": "1", "CUDA_HOME": "/nonexistent"}, 1, "nvcc is not on PATH"),
    ],
    ids=["unknown stem", "no nvcc but forced"],
)
def test_build_requests_that_cannot_be_met_are_refused(
    env: dict[str, str], code: int, text: str, tmp_path: Path
) -> None:
    run = setup_py(
        ROOT, "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "tmp"), **env
    )
    assert run.returncode == code
    assert text in run.stderr


@needs_build
def test_build_without_torch_ends_in_one_sentence(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, runpy, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        f"sys.argv = ['setup.py', 'build_ext', '--build-lib', {str(tmp_path)!r}, '--build-temp', {str(tmp_path)!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "the build needs the Python package torch" in run.stderr
    assert "pip install . --no-build-isolation" in run.stderr
    assert "Traceback" not in run.stderr
