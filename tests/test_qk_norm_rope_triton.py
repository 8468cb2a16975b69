# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of qk_norm_rope: values in the interpreter, machine code ahead of time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aot import compile_kernel, missing
from helpers import assert_gradients_within_promise, opcheck
from test_qk_norm_rope import SETUPS, Setup, run

from vidkernels import dispatch, errors, ops
from vidkernels._reference import qk_norm_rope as reference

EVEN = [setup for setup in SETUPS if setup.head_dim % 2 == 0]
CPU = torch.device("cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setup", EVEN, ids=[setup.name for setup in EVEN])
def test_values_and_gradients(setup: Setup, dtype: torch.dtype) -> None:
    """Outputs and all gradients keep the promise of error."""
    positions, options = setup.positions(CPU), setup.options(CPU)
    inputs = setup.inputs(dtype, CPU)
    names = ["q", "k", "q_weight", "k_weight"][: len(inputs)]
    actual = run(ops.qk_norm_rope, positions, {**options, "backend": "triton"})
    assert_gradients_within_promise(actual, run(reference.qk_norm_rope, positions, options), inputs, names=names)


@pytest.mark.interpreter
def test_many_tokens_share_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums of the weights' gradients over several rounds of a program, for both norms."""
    from vidkernels.triton import qk_norm_rope_bwd

    monkeypatch.setattr(qk_norm_rope_bwd, "PROGRAMS", 2)
    for norm in ("head", "full"):
        setup = Setup("", (75,), (18, 2), 8, norm=norm, axes=(4, 2, 2))
        positions, options = setup.positions(CPU), setup.options(CPU)
        assert_gradients_within_promise(
            run(ops.qk_norm_rope, positions, {**options, "backend": "triton"}),
            run(reference.qk_norm_rope, positions, options),
            setup.inputs(torch.float32, CPU),
            names=["q", "k", "q_weight", "k_weight"],
        )


@pytest.mark.interpreter
def test_inplace_strides_and_empty() -> None:
    """Views of a fused projection in place; one side missing; no tokens."""
    fused = torch.randn(2, 5, 3, 4, 16)
    q, k, v = fused.unbind(2)
    positions = torch.randint(0, 60, (5, 3))
    expected = ops.qk_norm_rope(q, k, positions=positions, backend="triton")
    kept = v.clone()
    alone, _ = ops.qk_norm_rope(q, None, positions=positions, backend="triton")
    assert torch.equal(alone, expected[0])
    ops.qk_norm_rope(q, k, positions=positions, inplace=True, backend="triton")
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1]) and torch.equal(v, kept)
    assert ops.qk_norm_rope(q[:, :0], None, backend="triton")[0].shape == (2, 0, 4, 16)


@pytest.mark.interpreter
def test_opcheck_and_limits() -> None:
    """Schemas and fakes of the Triton variants; an odd head is refused in words."""
    q, k, *weights = SETUPS[0].inputs(torch.float32, CPU)
    args = q, k, *weights, SETUPS[0].positions(CPU), None, [24, 20, 20], [1e4] * 3, [1.0] * 3, 1, 1e-6, 0
    opcheck(dispatch.op("qk_norm_rope_fwd", "triton"), args)
    opcheck(dispatch.op("qk_norm_rope_", "triton"), args)
    opcheck(dispatch.op("qk_norm_rope_bwd", "triton"), (torch.randn_like(q), torch.randn_like(k), *args, True))
    with pytest.raises(errors.BackendUnavailable, match="even head dimension, got 7"):
        ops.qk_norm_rope(torch.randn(3, 1, 7), None, backend="triton")


def _compile(
    direction: str, target: str, *, head_dim: int, axes: tuple[int, ...], norm: int, layout: int, dtype: str
) -> Any:
    from vidkernels.triton import qk_norm_rope, qk_norm_rope_bwd

    call = qk_norm_rope.Call.of(torch.zeros(1, 3), None, axes, [1e4] * 3, [1.0] * 3)
    values, lanes = 2048 if direction == "fwd" else 1024, 64 if target.startswith("gfx") else 32
    config = qk_norm_rope.tile_of(head_dim, 16, values=values, lanes=lanes)
    constants = {
        **call.constants(head_dim, norm, layout, config),
        "HAS_Q_WEIGHT": True,
        "HAS_K_WEIGHT": True,
        "ALIGN": 8,
    }
    warps = constants.pop("num_warps")
    sides = ["q", "k", "q_out", "k_out"] + (["dq", "dk"] if direction == "bwd" else [])
    pointers = {name: f"*{dtype}" for name in [*sides, "q_weight", "k_weight", "frequencies"]} | {"positions": "*i32"}
    prefixes = ["q", "k", "qo", "ko"] + (["dq", "dk"] if direction == "bwd" else [])
    strides = [f"{prefix}_{axis}" for prefix in prefixes for axis in ("batch", "token", "head")]
    ints = [
        "tokens",
        "batch_tokens",
        "q_heads",
        "k_heads",
        *strides,
        *(f"position_{axis}" for axis in ("batch", "token", "axis")),
    ]
    if direction == "bwd":
        pointers["partial"] = "*fp32"
        ints.append("columns")
        constants["WEIGHT_GRADS"] = True
    module = qk_norm_rope if direction == "fwd" else qk_norm_rope_bwd
    signature = {**{name: f"{kind}:16" for name, kind in pointers.items()}, **dict.fromkeys(ints, "i32"), "eps": "fp32"}
    return compile_kernel(
        getattr(module, f"_qk_norm_rope_{direction}_kernel"), signature, constants, target, num_warps=warps
    )


CODE = [
    pytest.param(
        "fwd", "sm_90", {"head_dim": 64, "axes": (16, 24, 24), "norm": 1, "layout": 0}, id="fwd sm_90 head 64"
    ),
    pytest.param(
        "bwd", "sm_90", {"head_dim": 64, "axes": (16, 24, 24), "norm": 2, "layout": 0}, id="bwd sm_90 full 64"
    ),
    pytest.param(
        "fwd", "gfx942", {"head_dim": 128, "axes": (44, 42, 42), "norm": 2, "layout": 1}, id="fwd gfx942 full half 128"
    ),
]
SHAPES = [
    {"head_dim": 72, "axes": (24, 24, 24), "norm": 1, "layout": 0},
    {"head_dim": 128, "axes": (44, 42, 42), "norm": 2, "layout": 0},
    {"head_dim": 128, "axes": (44, 42, 42), "norm": 1, "layout": 1},
]
MORE = [
    pytest.param(d, t, s, id=f"{d} {t} {s['head_dim']} {s['norm']} {s['layout']}", marks=pytest.mark.slow)
    for d in ("fwd", "bwd")
    for t in ("sm_80", "sm_90", "sm_100", "gfx942")
    for s in SHAPES
]


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize(("direction", "target", "shape"), [*CODE, *MORE])
def test_machine_code(direction: str, target: str, shape: dict[str, Any]) -> None:
    """No spills, and vector loads where neighbours are rotated together."""
    report = _compile(direction, target, dtype="bf16", **shape)
    # Scalar registers of AMD GPUs overflow into lanes of vector registers; only scratch memory would cost traffic.
    spilled = report.count("scratch_") if target.startswith("gfx") else report.spills
    assert spilled == 0, report
    if shape["layout"] == 0:
        assert report.wide_loads > 0 and report.wide_stores > 0, report.instructions
