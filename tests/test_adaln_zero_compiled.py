# SPDX-License-Identifier: Apache-2.0
"""What the compilers make of the adaLN kernels, read without a GPU: no spills, 16-byte accesses."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import aot
import pytest

needs_triton = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))

ACTIVATIONS = {"x": "*bf16:16", "branch": "*bf16:16"}
SIZES = {"tokens": "i32", "unit": "i32", "count": "i32", "chunk": "i32", "channels": "i32:16"}
QUICK = [("sm_90", 1152), ("gfx942", 1152)]
ALL = [(target, channels) for target in aot.TARGETS for channels in (1152, 3072, 5120, 8192)]


def targets() -> list:
    return [pytest.param(t, c, id=f"{t} {c}", marks=() if (t, c) in QUICK else (pytest.mark.slow,)) for t, c in ALL]


def lanes(channels: int) -> dict[str, int]:
    head = 1 << (channels.bit_length() - 1)
    return {"HEAD": head, "TAIL": max(1, channels - head)}


def warps(channels: int, most: int) -> int:
    """As `row_config` chooses; the launcher itself needs a device."""
    return 1 << (min(most, max(1, channels // 256)).bit_length() - 1)


def check(report: aot.Report, target: str) -> None:
    assert report.spills == 0
    assert report.wide_loads > 0
    # Triton 3.9 stores 8 bytes a lane on AMD, which 64 lanes still make one full request
    assert report.wide_stores > 0 or (
        target == "gfx942" and report.count("global_store_dwordx2", "buffer_store_dwordx2")
    )


@needs_triton
@pytest.mark.parametrize(("target", "channels"), targets())
def test_triton_forward(target: str, channels: int) -> None:
    from vidkernels.triton.adaln_zero import _adaln_fwd_kernel

    signature = {
        **ACTIVATIONS, "hidden": "*bf16:16", "y": "*bf16:16", "mean_out": "*fp32:16", "rstd_out": "*fp32:16",
        "gate": "*fp32:16", "shift": "*fp32:16", "scale": "*fp32:16", "gate_stride": "i32:16", "shift_stride": "i32:16",
        "scale_stride": "i32:16", **SIZES, "eps": "fp32",
    }  # fmt: skip
    constants = {"weight": None, "bias": None, "index": None, "cu_seqlens": None, "NORM": 1, **lanes(channels)}
    check(aot.compile_kernel(_adaln_fwd_kernel, signature, constants, target, num_warps=warps(channels, 16)), target)


@needs_triton
@pytest.mark.parametrize(("target", "channels"), targets())
def test_triton_backward(request: pytest.FixtureRequest, target: str, channels: int) -> None:
    if channels == 8192 and target != "gfx942":
        # Known: three sums and two factors of 32 columns a thread; 72 to 168 bytes with 8 warps, more with 16. The CUDA
        # kernels serve such rows on these targets.
        request.applymarker(pytest.mark.xfail(strict=True, reason="rows of 8192 spill in the Triton backward"))
    from vidkernels.triton.adaln_zero_bwd import _adaln_bwd_kernel

    tensors = ("dhidden", "dy", "x", "branch", "dx", "dbranch")
    sums = ("mean", "rstd", "gate", "scale", "part_p", "part_q", "part_g")
    signature = {
        **dict.fromkeys(tensors, "*bf16:16"), **dict.fromkeys(sums, "*fp32:16"),
        "gate_stride": "i32:16", "scale_stride": "i32:16", **SIZES,
    }  # fmt: skip
    constants = {
        "weight": None, "order": None, "cu_seqlens": None, "part_w": None, "part_b": None, "NORM": 1, **lanes(channels),
    }  # fmt: skip
    check(aot.compile_kernel(_adaln_bwd_kernel, signature, constants, target, num_warps=warps(channels, 8)), target)


CSRC = Path(__file__).resolve().parent.parent / "csrc"
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or aot.tool("cuobjdump") is None, reason="needs nvcc and cuobjdump"
)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90a", "100a"])
@pytest.mark.parametrize("name", ["fwd", "bwd"])
def test_cuda_kernels_of_every_width(name: str, arch: str, tmp_path: Path) -> None:
    """Widths differ only in the kernel's template arguments, so all instances are all widths. Those for 16-byte vectors
    move 16 bytes an instruction, from and to global memory, and spill no more than two registers; those for single
    values, which hold 32 values and are not made for speed, no more than eight."""
    target = tmp_path / "kernels.o"
    flags = (
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        f"-I{CSRC}",
    )
    source = CSRC / "adaln_zero" / f"adaln_zero_{name}.cu"
    run = subprocess.run(["nvcc", *flags, "-c", source, "-o", target], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    reports = aot.sass_report(target, f"sm_{arch}")
    kernels = {k: r for k, r in reports.items() if "forward_kernel" in k or "backward_kernel" in k}
    assert len(kernels) >= 27
    allowed = {k: 32 if "Li1ELi16E" in k else 8 for k in reports}
    assert {k: r.spills for k, r in reports.items() if r.spills > allowed[k]} == {}
    for kernel, report in kernels.items():
        if "Li1ELi16E" in kernel:  # single values, for rows that 16-byte vectors do not fit
            continue
        assert report.wide_loads > 0, kernel
        assert report.wide_stores > 0, kernel
