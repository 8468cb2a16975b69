# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of channel_norm and alpha_blend compiled ahead of time: no spills, 16 bytes a load and store."""

from __future__ import annotations

import aot
import pytest
import torch

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))

TYPES = {torch.bfloat16: "*bf16:16", torch.float32: "*fp32:16"}
STRIDES = ("x_outer", "x_inner", "x_channel", "y_outer", "y_inner", "y_channel")


def norm_report(rows: bool, channels: int, dtype: torch.dtype, backward: bool, target: str) -> aot.Report:
    from vidkernels.triton import channel_norm as kernels

    config = kernels.norm_config(channels, rows, backward)
    pointers = ("dy", "x", "weight", "bias", "dx") if backward else ("x", "weight", "bias", "y")
    signature = dict.fromkeys(pointers, TYPES[dtype]) | {"inner": "i32:16", "channels": "i32:16", "eps": "fp32"}
    ones = {"x_channel", "y_channel"} if rows else {"x_inner", "y_inner"}
    signature |= {name: "i64:16" for name in STRIDES if name not in ones}
    constants = dict.fromkeys(ones, 1)
    constants |= {"KIND": 0, "SILU": True, "HAS_WEIGHT": True, "HAS_BIAS": True}
    constants |= {"BLOCK_P": config.block_p, "BLOCK_C": config.block_c}
    if backward:
        signature |= {"partial": "*fp32:16", "tiles": "i32"}
        constants |= {"WANT_X": True}
    fn = kernels._channel_norm_bwd_kernel if backward else kernels._channel_norm_fwd_kernel
    return aot.compile_kernel(fn, signature, constants, target, num_warps=config.num_warps)


NORMS = [
    pytest.param(
        rows, channels, dtype, backward, target, id=f"{'rows' if rows else 'planes'} {channels} {dtype} {target}"
    )
    for rows, channels, dtype, backward, target in (
        (True, 128, torch.bfloat16, False, "sm_90"),
        (True, 512, torch.float32, False, "sm_80"),
        (False, 128, torch.bfloat16, False, "sm_90"),
        (True, 128, torch.bfloat16, False, "gfx942"),
    )
]
SLOW = [
    pytest.param(
        rows, channels, torch.bfloat16, False, target, id=f"{'rows' if rows else 'planes'} {channels} {target}"
    )
    for rows in (True, False)
    for channels in (96, 256, 512)
    for target in aot.TARGETS
]


@pytest.mark.parametrize(("rows", "channels", "dtype", "backward", "target"), NORMS)
def test_norm(rows: bool, channels: int, dtype: torch.dtype, backward: bool, target: str) -> None:
    report = norm_report(rows, channels, dtype, backward, target)
    # the report of an AMD kernel ends at its first exit, ahead of the stores
    assert report.spills == 0 and report.wide_loads > 0 and (report.wide_stores > 0 or target == "gfx942"), report


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "channels", "dtype", "backward", "target"), SLOW)
def test_norm_everywhere(rows: bool, channels: int, dtype: torch.dtype, backward: bool, target: str) -> None:
    assert norm_report(rows, channels, dtype, backward, target).spills == 0


@pytest.mark.parametrize(("rows", "target"), [(True, "sm_90"), (False, "sm_90"), (True, "gfx942")])
def test_norm_backward(rows: bool, target: str) -> None:
    report = norm_report(rows, 256, torch.bfloat16, True, target)
    assert report.spills == 0 and (report.wide_stores > 0 or target == "gfx942"), report


def blend_report(mode: int, dtype: torch.dtype, target: str) -> aot.Report:
    from vidkernels.triton import alpha_blend as launcher
    from vidkernels.triton._alpha_blend_kernels import _alpha_blend_fwd_kernel as fn

    config = launcher.blend_config(dtype.itemsize)
    signature = dict.fromkeys(("x", "b", "y"), TYPES[dtype]) | {"mix_ptr": "*fp32"}
    strides = ("x_outer", "x_frame", "y_outer", "y_frame", "inner")
    signature |= dict.fromkeys(strides, "i64:16") | dict.fromkeys(("frames", "out_frames", "split"), "i32")
    constants = dict.fromkeys(("history_ptr", "lookahead_ptr")) | dict.fromkeys(("h_outer", "h_frame", "l_outer"), 0)
    constants |= {"history": 0, "lookahead": 0, "MODE": mode, "HAS_HISTORY": False, "HAS_LOOKAHEAD": False}
    constants |= {"TERMS": {0: 1, 5: 1, 6: 2}.get(mode, 3), "SCALE": 1.0, "BLOCK": config.block}
    return aot.compile_kernel(fn, signature, constants, target, num_warps=config.num_warps)


@pytest.mark.parametrize(
    ("mode", "dtype", "target"),
    [
        (0, torch.bfloat16, "sm_90"),
        (2, torch.float32, "sm_80"),
        (6, torch.bfloat16, "sm_100"),
        (6, torch.float32, "gfx942"),
    ],
    ids=str,
)
def test_blend(mode: int, dtype: torch.dtype, target: str) -> None:
    report = blend_report(mode, dtype, target)
    assert report.spills == 0, report
    if target == "gfx942":
        assert report.wide_loads > 0, report
    else:
        terms = {0: 1, 6: 2}.get(mode, 3)
        assert report.wide_loads >= terms + 1 and report.wide_stores > 0, report
