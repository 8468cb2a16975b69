# SPDX-License-Identifier: Apache-2.0
"""Machine code of convolutions with few channels or few filters, as launched on meta tensors: no spills, boxes and matrix
instructions behind a kernel that writes 16 bytes at a time; and a bounded workspace on the longest clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import aot
import launches
import pytest
import torch
from test_triton_launches import BF16, F32, LAST, TRITON, tensor
from test_triton_launches import check as check_spills

from vidkernels import ops

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
MATRIX = {"sm_90": "HGMMA", "sm_100": "UTC"}


def run(
    channels: int,
    filters: int,
    size: tuple[int, ...],
    dtype: torch.dtype,
    *,
    kernel: tuple[int, ...] = (3, 3, 3),
    past: int = 0,
    epilogue: bool = False,
    backward: bool = False,
    **options: Any,
) -> None:
    x = tensor(1, channels, *size, dtype=dtype).to(memory_format=LAST)
    weight, bias = tensor(filters, channels, *kernel, dtype=dtype), tensor(filters, dtype=dtype)
    if past:
        options |= {"history": tensor(1, channels, past, *size[1:], dtype=dtype).to(memory_format=LAST)}
    if epilogue:
        residual = tensor(1, filters, *size, dtype=dtype).to(memory_format=LAST)
        options |= {"residual": residual, "activation": "silu"}
    with torch.set_grad_enabled(backward):
        made = ops.causal_conv3d(x, weight, bias, **options, **TRITON)
    if backward:
        made.sum().backward()


def check(found: list[launches.Launch], target: str) -> None:
    check_spills(found)
    for launch in launches.compilations(found):
        report = launch.report
        if launch.kernel == "pack_kernel":
            assert report.wide_stores > 0 and report.registers <= 64
        if launch.kernel in ("_conv_box_kernel", "_wgrad_box_kernel"):
            assert report.count(MATRIX[target]) > 0 and report.count("UTMALDG") > 0 and report.wide_stores > 0


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "3-128": lambda dtype: run(3, 128, (3, 64, 256), dtype),
    "128-3": lambda dtype: run(128, 3, (3, 64, 256), dtype),
}
SLOW: dict[str, Callable[[torch.dtype], None]] = {
    "3-128 history": lambda dtype: run(3, 128, (3, 64, 256), dtype, past=2, time_padding="history"),
    "3-96 epilogue": lambda dtype: run(3, 96, (3, 64, 256), dtype, epilogue=True, time_padding="replicate"),
    "4-512 small": lambda dtype: run(4, 512, (3, 20, 36), dtype, spatial_padding_mode="replicate"),
    "1-64 1x3x5": lambda dtype: run(1, 64, (3, 64, 256), dtype, kernel=(1, 3, 5)),
    "7-32 down": lambda dtype: run(7, 32, (3, 64, 256), dtype, stride=2, pad_frames=2),
    "3-128 backward": lambda dtype: run(3, 128, (3, 64, 256), dtype, backward=True, time_padding="replicate"),
    "96-3 epilogue": lambda dtype: run(96, 3, (3, 64, 832), dtype, epilogue=True, time_padding="replicate"),
    "512-7 small": lambda dtype: run(512, 7, (3, 20, 36), dtype),
    "128-1 history": lambda dtype: run(128, 1, (3, 64, 256), dtype, past=2, time_padding="history"),
    "128-3 backward": lambda dtype: run(128, 3, (3, 64, 256), dtype, backward=True, time_padding="replicate"),
}


@pytest.mark.parametrize("name", CASES)
def test_hopper(name: str) -> None:
    with launches.record("sm_90") as found:
        CASES[name](BF16)
    kernels = [launch.kernel for launch in found]
    assert kernels == (
        ["pack_kernel", "_conv_box_kernel"] if name == "3-128" else ["_conv_box_kernel", "gather_kernel"]
    )
    check(found, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "tf32"])
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("name", [*CASES, *SLOW])
def test_every_form(name: str, target: str, dtype: torch.dtype) -> None:
    with launches.record(target) as found:
        {**CASES, **SLOW}[name](dtype)
    kernels = {launch.kernel for launch in found}
    assert {"pack_kernel", "gather_kernel"} & kernels
    assert name != "3-128 backward" or "_wgrad_box_kernel" in kernels
    check(found, target)
