# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels run on the CPU through the SIMT shim, and C++ kernels, all under sanitizers: tests/cuda_host/."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOST = Path(__file__).resolve().parent / "cuda_host"
sys.path.insert(0, str(HOST))

import host_build  # noqa: E402

pytestmark = pytest.mark.skipif(host_build.missing() is not None, reason=str(host_build.missing()))
STEMS = sorted(path.stem.removeprefix("case_") for path in HOST.glob("case_*.py"))
QUICK = ("fsq",)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with the shim's own test kernels."""
    work = tmp_path_factory.mktemp("toy")
    sources = [(HOST / name, host_build.shim_flags()) for name in ("simt.cpp", "toy.cu", "toy_main.cpp")]
    objects = host_build.compile_all(sources, work)
    host_build.run(["g++", *host_build.SANITIZE, *objects, "-o", work / "toy"])
    return work / "toy"


def run_toy(toy: Path, name: str, order: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([toy, name, str(order)], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_right_kernel_is_right_in_every_order(toy: Path, order: int) -> None:
    result = run_toy(toy, "center", order)
    assert result.returncode == 0, result.stderr
    # float32 sums 101 values in a tree (2 roundings or so beyond the last); the narrow types round once at the end
    errors = [float(x) for x in result.stdout.split()]
    assert errors[0] < 3 and errors[1] < 1.05 and errors[2] < 1.05, errors


def test_missing_barrier_shows_as_dependence_on_the_order(toy: Path) -> None:
    outputs = {run_toy(toy, "race", order).stdout for order in range(3)}
    assert len(outputs) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("overrun", "heap-buffer-overflow"),
        ("divergent", "different __syncthreads()"),
        ("deadlock", "deadlock"),
        ("greedy", "more dynamic shared memory"),
    ],
    ids=["write beyond shared memory", "divergent barrier", "deadlock", "shared memory not asked for"],
)
def test_faults_stop_the_program(toy: Path, name: str, message: str) -> None:
    result = run_toy(toy, name, 0)
    assert result.returncode != 0
    assert message in result.stderr


def test_refused_launches_say_what_to_do(toy: Path) -> None:
    driver, device = run_toy(toy, "errors", 0).stdout.splitlines()
    assert "update the driver" in driver and "built with CUDA 1" in driver
    assert "compute capability 9.0" in device and "TORCH_CUDA_ARCH_LIST=9.0" in device


def run_cases(stem: str, library: Path, kernels: str) -> None:
    """Run one stem's case file in a process with the sanitizer's runtime."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HOST / f"case_{stem}.py")]
    result = subprocess.run(
        command,
        cwd=host_build.ROOT,
        env=host_build.environment(library, kernels),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
    assert " passed" in result.stdout, result.stdout


def _stems(pattern: str) -> list[str]:
    return [stem for stem in STEMS if any((host_build.CSRC / stem).glob(pattern))]


def _marks(quick: bool) -> tuple:
    return () if quick else (pytest.mark.slow,)


@pytest.mark.parametrize("stem", [pytest.param(s, marks=_marks(s in QUICK), id=s) for s in _stems("*.cu")])
def test_cuda_kernels_on_the_host(stem: str, tmp_path: Path) -> None:
    run_cases(stem, host_build.build_cuda([stem], tmp_path), "cuda")


# What copies and products of causal_conv3d.cu could do too early: each has another result, or ends the program.
FAULTS = {
    "copies that nobody waits for": ("        copy_wait<1>();\n", ""),
    "copies that products may not see": (
        "        copy_wait<1>();\n        fence_async_proxy();\n",
        "        copy_wait<1>();\n",
    ),
    "a buffer free before its products are done": ("products_wait<1>();", "products_wait<2>();"),
    "a box copied over one that is read": ("barrier_wait(&barriers.empty_box[cursor.at], cursor.parity ^ 1);", ""),
    "weights copied over some that are read": ("barrier_wait(&barriers.empty_row[cursor.at], cursor.parity ^ 1);", ""),
    "another phase": ("row_cursor.parity);", "row_cursor.parity ^ 1);"),
    "a bias copied over one that is read": ("barrier_wait(&barriers.empty_bias, bias_cursor.parity ^ 1);", ""),
    "a bias that has not come": ("barrier_wait(&barriers.full_bias, bias_cursor.parity);", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_asynchronous_kernels_show(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(host_build.CSRC, csrc)
    source, (right, wrong) = csrc / "causal_conv3d" / "causal_conv3d_fwd.cu", FAULTS[fault]
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    monkeypatch.setattr(host_build, "CSRC", csrc)
    library = host_build.build_cuda(["causal_conv3d"], tmp_path / "library")
    with pytest.raises(AssertionError):
        run_cases("causal_conv3d", library, "cuda")


VARIANTS = host_build.variants() if host_build.missing() is None else []


@pytest.mark.parametrize(
    ("stem", "variant"),
    [
        pytest.param(s, v, marks=pytest.mark.slow, id=f"{s} {v.removeprefix('cpu_')}")
        for s in _stems("*_cpu.cpp")
        for v in VARIANTS
    ],
)
def test_cpp_kernels_under_sanitizers(stem: str, variant: str, tmp_path: Path) -> None:
    run_cases(stem, host_build.build_cpp([stem], tmp_path, variant), "cpp")
