# SPDX-License-Identifier: Apache-2.0
"""Machine code of the attention kernels at the configurations they are launched with: no spills, matrix instructions,
16-byte loads."""

from __future__ import annotations

from typing import Any

import aot
import pytest
import torch

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
TENSORS = {"q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v", "q_weight", "k_weight"}
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
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return aot.compile_kernel(function, signature(function, constants), constants, target, **options)


def signature(function: Any, constants: dict[str, Any]) -> dict[str, str]:
    """Types of the arguments that are not constants, as whole bf16 tensors give them."""
    types = {}
    for name in (n for n in function.arg_names if n not in constants):
        if name in TENSORS:
            types[name] = "*bf16:16"
        elif name in {"stats", "delta", "grad_weights", "frequencies"}:
            types[name] = "*fp32:16"
        elif name.startswith("cu_seqlens") or name == "positions":
            types[name] = "*i32:16"
        else:
            types[name] = "fp32" if name in {"unit", "scale", "eps"} else "i32"
    return types


def short_report(kernel: str, target: str, head_dim: int, length: int, prologue: str = "axes") -> aot.Report:
    """The kernel of short segments; `length` 0 is the packed layout; `prologue`: "axes", "table" or "none"."""
    from vidkernels.triton import short_attention, short_attention_bwd

    inside, family = prologue != "none", "amd" if target == "gfx942" else target
    config = short_attention.short_config(kernel, head_dim, 16, family, length == 0, length, inside)
    functions = {
        "fwd": short_attention._short_attention_fwd_kernel,
        "bwd": short_attention_bwd._short_attention_bwd_kernel,
    }
    q = torch.empty(1, 1, 1, 16, head_dim, dtype=torch.bfloat16, device="meta")
    weight = positions = q if inside else None
    table = torch.empty(1, head_dim // 2) if prologue == "table" else None
    last = head_dim // 6 * 2
    axes = [head_dim - 2 * last, last, last] if prologue == "axes" else [head_dim]
    rotation = (axes, [1e4] * len(axes), [1.0] * len(axes))
    constants = short_attention.constants(q, config, length, weight, positions, table, *rotation, inside, False, 1)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants["ALIGN"] = 8
    function = functions[kernel]
    return aot.compile_kernel(function, signature(function, constants), constants, target, **options)


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
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("kernel", ["fwd", "bwd_q", "bwd_kv"])
def test_every_configuration_compiles_without_spills(kernel: str, head_dim: int, target: str) -> None:
    """Long and short segments, causal and not."""
    for causal, longest in ((False, 4096), (True, 4096), (False, 64)):
        found = report(kernel, target, head_dim, causal, longest)
        check(found, target)
        if target == "sm_90" and head_dim <= 128 and longest > 64:
            assert found.count("HGMMA") > 0


@pytest.mark.parametrize(("kernel", "length"), [("fwd", 60), ("bwd", 16), ("fwd", 0), ("bwd", 0)])
def test_tiles_of_64_rows_on_hopper(kernel: str, length: int) -> None:
    """Norm and rotation inside, heads of 72: warpgroup instructions and no spills."""
    found = short_report(kernel, "sm_90", 72, length)
    check(found, "sm_90")
    assert found.count("HGMMA") > 0


@pytest.mark.parametrize(("kernel", "limit", "registers"), [("fwd", 900, 128), ("bwd", 1400, 210)])
def test_latte_over_time_on_hopper(kernel: str, limit: int, registers: int) -> None:
    """One warp on 16 frames of a head of 72: few instructions, registers that leave room for many programs, no barrier
    between warps. In 8 warps a program took 183 registers and had a multiprocessor for itself: 289 us on an H200 where
    memory needs 75."""
    found = short_report(kernel, "sm_90", 72, 16, "none")
    check(found, "sm_90")
    assert sum(found.instructions.values()) < limit
    assert found.registers <= registers


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("kernel", ["fwd", "bwd"])
def test_every_short_configuration_compiles_without_spills(kernel: str, head_dim: int, target: str) -> None:
    """Axial and packed, closed-form angles, a table, and plain attention. Packed segments are refused on AMD."""
    from vidkernels.triton import short_attention

    forms = [(length, prologue) for length in (16, 32) for prologue in ("axes", "table", "none")]
    packed = [(0, "axes"), (0, "none")] if target != "gfx942" else []
    longest = short_attention.longest_short(head_dim, "amd" if target == "gfx942" else target)
    for length, prologue in [form for form in forms if form[0] <= longest] + packed:
        found = short_report(kernel, target, head_dim, length, prologue)
        assert found.spills == 0, (length, prologue, found.spills)
        assert found.shared <= SHARED[target]
        assert found.count("HGMMA", "HMMA", "UTCHMMA", "v_mfma") > 0
        # One for each weight, where a block has as many lanes as a piece of a head has channels; rows would take dozens.
        assert found.count("LDG.E.U16", "LDG.U16") <= (2 if prologue != "none" else 0)
