# SPDX-License-Identifier: Apache-2.0
"""Machine code of the attention kernels at the configurations they are launched with: no spills, matrix instructions,
16-byte loads."""

from __future__ import annotations

import pytest
import torch

import aot

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
TENSORS = {"q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"}
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def report(kernel: str, target: str, head_dim: int, causal: bool, longest: int = 4096) -> aot.Report:
    from vidkernels.triton import varlen_attention, varlen_attention_bwd
    from vidkernels.triton._attention import head_pieces
    from vidkernels.triton._attention_configs import attention_config

    family = "amd" if target == "gfx942" else target
    config = attention_config(kernel, head_dim, torch.bfloat16, longest, family)
    function = {
        "fwd": varlen_attention._varlen_attention_fwd_kernel,
        "bwd_q": varlen_attention_bwd._varlen_attention_bwd_q_kernel,
        "bwd_kv": varlen_attention_bwd._varlen_attention_bwd_kv_kernel,
    }[kernel]
    first, second = head_pieces(head_dim)
    block_m, block_n = config.resident, config.streamed
    if kernel == "bwd_kv":
        block_m, block_n = block_n, block_m
    constants = {"HEAD_DIM": head_dim, "D0": first, "D1": second, "BLOCK_M": block_m, "BLOCK_N": block_n}
    constants |= {"CAUSAL": causal, "SIGN": 1, "EXACT": False, "UPCAST": False, "PRECISION": "ieee", "ALIGN": 8}
    constants |= {"WANTED": True} if kernel == "bwd_q" else {}
    signature = {}
    for name in (n for n in function.arg_names if n not in constants):
        if name in TENSORS:
            signature[name] = "*bf16:16"
        elif name in {"stats", "delta"}:
            signature[name] = "*fp32:16"
        elif name.startswith("cu_seqlens"):
            signature[name] = "*i32:16"
        else:
            signature[name] = "fp32" if name in {"unit", "scale"} else "i32"
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return aot.compile_kernel(function, signature, constants, target, **options)


def check(found: aot.Report, target: str) -> None:
    assert found.spills == 0
    assert found.shared <= SHARED[target]
    assert found.count("HGMMA", "HMMA", "UTCHMMA", "v_mfma") > 0
    if target != "gfx942":
        assert found.wide_loads > 0 and found.wide_stores > 0
        assert found.count("LDG.E.U16", "LDG.U16") == 0  # no channel is loaded alone, also with heads of 72


@pytest.mark.parametrize("kernel", ["fwd", "bwd_q", "bwd_kv"])
def test_hopper_runs_72_channels_on_warpgroup_instructions(kernel: str) -> None:
    """Heads of 72 take 64 + 16 channels of wgmma, not 128."""
    found = report(kernel, "sm_90", 72, False)
    check(found, "sm_90")
    assert found.count("HGMMA") > 0
    depths = {name for name in found.instructions if name.startswith("HGMMA")}
    assert any("x16x16" in name for name in depths), depths  # the second piece is 16 wide where it is an output


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128, 256])
@pytest.mark.parametrize("kernel", ["fwd", "bwd_q", "bwd_kv"])
def test_every_configuration_compiles_without_spills(kernel: str, head_dim: int, target: str) -> None:
    """Long and short segments, causal and not."""
    for causal, longest in ((False, 4096), (True, 4096), (False, 64)):
        found = report(kernel, target, head_dim, causal, longest)
        check(found, target)
        if target == "sm_90" and head_dim <= 128 and longest > 64:
            assert found.count("HGMMA") > 0
