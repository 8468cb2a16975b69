# SPDX-License-Identifier: Apache-2.0
"""The adaLN-Zero family: modulate, gated residual and the chain, at the widths of Latte-XL and Wan-14B."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.registry import Case, Inputs, Outputs, register
from vidkernels import ops

# op -> passes over a tensor of x's size, forward and forward + backward (facts: one read and one write each)
PASSES = {"modulate": (2, 5), "gate+residual": (3, 6), "chain": (4, 10)}


def _norm(i: Inputs, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + i["scale"][:, None]) + i["shift"][:, None]


def _eager(op: str) -> Callable[[Inputs], Outputs]:
    def run(i: Inputs) -> Outputs:
        if op == "modulate":
            return _norm(i, i["x"])
        hidden = i["x"] + i["gate"][:, None] * i["branch"]
        return hidden if op == "gate+residual" else (hidden, _norm(i, hidden))

    return run


def _ours(op: str) -> Callable[[Inputs], Outputs]:
    def run(i: Inputs) -> Outputs:
        if op == "modulate":
            return ops.adaln_modulate(i["x"], i["shift"], i["scale"])
        if op == "gate+residual":
            return ops.gate_residual(i["x"], i["branch"], i["gate"])
        return tuple(ops.adaln_zero(i["x"], i["branch"], i["gate"], i["shift"], i["scale"]))

    return run


def _case(
    device: torch.device, op: str, shape: tuple[int, int, int], dtype: torch.dtype, backward: bool, compiled: bool
) -> Case:
    def make() -> Inputs:
        rows = {
            name: torch.randn(shape[0], shape[2], device=device, dtype=dtype) for name in ("shift", "scale", "gate")
        }
        x = {name: torch.randn(shape, device=device, dtype=dtype) for name in ("x", "branch")}
        used = {"modulate": ("x", "shift", "scale"), "gate+residual": ("x", "branch", "gate")}.get(op, (*x, *rows))
        return {name: value for name, value in {**x, **rows}.items() if name in used}

    size = shape[0] * shape[1] * shape[2] * dtype.itemsize
    return Case(
        name=f"{op} {list(shape)} {str(dtype)[6:]}{' fwd+bwd' if backward else ''}",
        make_inputs=make,
        ours=_ours(op),
        reference=_eager(op),
        bytes=size * PASSES[op][backward],
        backward=backward,
        compile=compiled,
    )


@register(stem="adaln_zero")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """On the CPU float32 tensors stay below 32 MiB: larger fresh ones cost page faults, whoever computes them."""
    on_cpu = device.type == "cpu"
    latte, wan = ((2, 3072, 1152), (1, 1536, 5120)) if on_cpu else ((2, 4096, 1152), (1, 32760, 5120))
    dtype = torch.float32 if on_cpu else torch.bfloat16
    yield _case(device, "modulate", latte, dtype, False, True)
    yield _case(device, "chain", latte, dtype, False, not quick)
    if quick:
        return
    for shape in (latte, wan):
        for op in PASSES:
            for backward in (False, True):
                if (op, shape, backward) not in {("modulate", latte, False), ("chain", latte, False)}:
                    yield _case(device, op, shape, dtype, backward, True)
    if on_cpu:
        for op in ("modulate", "chain"):
            for backward in (False, True):
                yield _case(device, op, (2, 4096, 1152), torch.bfloat16, backward, True)
