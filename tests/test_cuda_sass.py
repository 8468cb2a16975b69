# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA C++ kernels, read back from the objects: 16 bytes an instruction wherever a kernel's name
says so, and nothing of weight in local memory. adaLN-Zero's kernels have their own test, in test_adaln_zero_compiled."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import aot
import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = sorted(p.relative_to(CSRC).as_posix() for p in CSRC.glob("*/*.cu") if p.parent.name != "adaln_zero")
# A type followed by the number of its values in 16 bytes, in mangled template arguments (an index type may be between).
# The f of __half is no float: the norm's backward takes 4 values of 16 bits where positions are adjacent.
WIDE = re.compile(r"(?:13__nv_bfloat16|6__half)[il]?Li8E|(?<!_hal)f[il]?Li4E|d[il]?Li2E")
# Loads these do not have: integers are read one by one, and tiles of another type's width are no vectors of this one.
NO_WIDE_LOADS = ("decode_kernel",)
# Kernels for float64, which serve comparisons and not models: some keep 72 bytes in local memory.
DOUBLE = re.compile(r"(?:kernel|Quantizer|Decoder)Id")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("nvcc") is None or aot.tool("cuobjdump") is None, reason="needs nvcc and cuobjdump"
    ),
]


def compiled(source: str, arch: str, folder: Path) -> dict[str, aot.Report]:
    target = folder / "kernels.o"
    flags = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "--expt-extended-lambda", f"-I{CSRC}")
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}", *(("-DVK_SM90A",) if arch == "90a" else ())
    run = subprocess.run(
        ["nvcc", *flags, *code, "-c", CSRC / source, "-o", target], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return aot.sass_report(target, f"sm_{arch}")


@pytest.mark.parametrize("arch", ["80", "90a", "100a"])
@pytest.mark.parametrize("source", SOURCES)
def test_vectors_stay_whole_and_registers_suffice(source: str, arch: str, tmp_path: Path) -> None:
    """A store of 16 bytes that comes out as four of 4 is four transactions: seen with plain assignments of packs. And a
    few words that a division's slow path saves are no matter, but loops that live in local memory are."""
    reports = compiled(source, arch, tmp_path)
    wide = {name: report for name, report in reports.items() if WIDE.search(name) and "rope" not in name}
    assert wide or source.startswith(("lfq/lfq_bwd", "qk_norm_rope", "causal_conv3d"))
    for name, report in wide.items():
        assert report.wide_stores > 0, name
        assert report.wide_loads > 0 or any(part in name for part in NO_WIDE_LOADS), name
    measured = {name: report.spills for name, report in reports.items() if not DOUBLE.search(name)}
    assert {name: spills for name, spills in measured.items() if spills > 24} == {}


def test_products_of_boxes_wait_for_none_but_their_groups(tmp_path: Path) -> None:
    """Where nvcc cannot prove that sums stay in place it waits behind each product, at half the rate, and says so only in a
    remark. Nothing of the loop may live in local memory, and results leave 16 bytes at a time."""
    reports = compiled("causal_conv3d/causal_conv3d_fwd.cu", "90a", tmp_path)
    boxes = {name: report for name, report in reports.items() if "conv_box_kernel" in name}
    assert len(boxes) == 8
    for name, report in boxes.items():
        products, waits = report.count("HGMMA"), report.count("WARPGROUP.DEPBAR")
        assert products >= 18 and waits <= 3, (name, products, waits)
        assert report.spills == 0 and report.wide_stores > 0 and report.wide_loads > 0, name
