# SPDX-License-Identifier: Apache-2.0
"""The ahead-of-time tools themselves, on small kernels whose machine code is known."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import aot
import pytest

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _scale_kernel(x, y, factor, n, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < n).to(tl.float32)
        tl.store(y + at, value * factor, mask=at < n)

    @triton.jit
    def _product_kernel(a, b, c, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
        row = tl.arange(0, BLOCK)
        at = row[:, None] * BLOCK + row[None, :]
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for _ in range(DEPTH):
            total = tl.dot(tl.load(a + at), tl.load(b + at), total)
            a += BLOCK * BLOCK
            b += BLOCK * BLOCK
        tl.store(c + at, total)


SCALE = {"x": "*bf16:16", "y": "*bf16:16", "factor": "fp32", "n": "i32:16"}
PRODUCT = {"a": "*bf16:16", "b": "*bf16:16", "c": "*fp32:16"}


@pytest.mark.parametrize("target", aot.TARGETS)
def test_streaming_kernel(target: str) -> None:
    report = aot.compile_kernel(_scale_kernel, SCALE, {"BLOCK": 2048}, target, num_warps=4)
    assert report.name == "_scale_kernel"
    assert report.spills == 0
    assert 0 < report.registers < 64
    # 2048 values over 128 threads are 32 bytes each; over AMD's 256 threads 16 bytes
    expected = 1 if target.startswith("gfx") else 2
    assert report.wide_loads == expected and report.wide_stores == expected


@pytest.mark.parametrize(
    ("target", "instruction"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")]
)
def test_matrix_kernel_uses_the_matrix_unit(target: str, instruction: str) -> None:
    report = aot.compile_kernel(_product_kernel, PRODUCT, {"BLOCK": 128, "DEPTH": 4}, target, num_warps=4, num_stages=2)
    assert report.count(instruction) > 0, report.instructions
    assert report.shared > 0


def test_spills_are_seen() -> None:
    # One warp cannot hold a 128 x 128 accumulator: 512 registers a lane of 255.
    report = aot.compile_kernel(_product_kernel, PRODUCT, {"BLOCK": 128, "DEPTH": 4}, "sm_80", num_warps=1)
    assert report.spills > 0
    assert report.count("STL") > 0


def test_missing_argument_type() -> None:
    with pytest.raises(ValueError, match="signature: no type for n"):
        aot.compile_kernel(_scale_kernel, {k: v for k, v in SCALE.items() if k != "n"}, {"BLOCK": 128})


def test_object_file_of_nvcc(tmp_path: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_host"))
    import host_build

    nvcc = host_build.native().Toolchain.find().nvcc
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    source = Path(__file__).resolve().parent / "cuda_host" / "toy.cu"
    binary = tmp_path / "toy.o"
    archs = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    flags = ["-std=c++17", "--expt-relaxed-constexpr", "--expt-extended-lambda", f"-I{host_build.CSRC}"]
    subprocess.run([nvcc, *archs, *flags, "-c", source, "-o", binary], check=True, capture_output=True)
    reports = aot.sass_report(binary, "sm_90a")
    centered = [r for name, r in reports.items() if "center_kernel" in name]
    assert len(centered) == 4  # float, double, half, bfloat16
    assert all(r.spills == 0 and r.count("BAR.SYNC") == 2 and r.count("SHFL") >= 5 for r in centered)
