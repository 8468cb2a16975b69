# SPDX-License-Identifier: Apache-2.0
"""The adaLN-Zero family: modulate, gated residual and the chain, at the widths of Latte-XL and Wan-14B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F

from benchmarks import cudnn_adaln, peers
from benchmarks.registry import Case, Function, Inputs, Outputs, register
from vidkernels import ops

# op -> passes over a tensor of x's size: forward, forward + backward, backward alone (one read and one write each)
PASSES: dict[str, dict[bool | str, int]] = {
    "modulate": {False: 2, True: 5, "only": 3},
    "gate+residual": {False: 3, True: 6, "only": 3},
    "chain": {False: 4, True: 10, "only": 6},
}
LABELS = {False: "", True: " fwd+bwd", "only": " bwd"}
WIDTHS = (1152, 1536, 1792, 2048, 2240, 3072, 4096, 5120, 8192)  # models' widths and, for comparison, powers of two


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


def _liger(op: str) -> Function:
    """Liger's LayerNorm, a Triton kernel that wants a weight and a bias, with the rest in torch."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    vectors: dict[tuple[torch.device, torch.dtype, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def modulate(i: Inputs, x: torch.Tensor) -> torch.Tensor:
        key = (x.device, x.dtype, x.shape[-1])
        if key not in vectors:
            vectors[key] = x.new_ones(x.shape[-1:]), x.new_zeros(x.shape[-1:])
        return LigerLayerNormFunction.apply(x, *vectors[key], 1e-6) * (1 + i["scale"][:, None]) + i["shift"][:, None]

    def run(i: Inputs) -> Outputs:
        if op == "modulate":
            return modulate(i, i["x"])
        hidden = i["x"] + i["gate"][:, None] * i["branch"]
        return hidden, modulate(i, hidden)

    return run


def _rivals(device: torch.device, op: str) -> dict[str, Function]:
    """Libraries that compute the norm on a GPU. None has the gate and the residual."""
    found: dict[str, Function] = {}
    if device.type != "cuda" or op == "gate+residual":
        return found
    if peers.find("liger_kernel.ops.layer_norm"):
        found["Liger LayerNorm + torch"] = _liger(op)
    cudnn = cudnn_adaln.peer()
    if cudnn is not None and op == "modulate":
        found["cuDNN AdaLN"] = cudnn
    elif cudnn is not None:
        found["torch + cuDNN AdaLN"] = _after_gate(cudnn)
    return found


def _after_gate(modulate: Function) -> Function:
    def run(i: Inputs) -> Outputs:
        hidden = i["x"] + i["gate"][:, None] * i["branch"]
        return hidden, modulate({**i, "x": hidden})  # type: ignore[return-value]

    return run


def _case(
    device: torch.device,
    op: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    backward: bool | Literal["only"],
    compiled: bool,
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
        name=f"{op} {list(shape)} {str(dtype)[6:]}{LABELS[backward]}",
        make_inputs=make,
        ours=_ours(op),
        reference=_eager(op),
        peers=_rivals(device, op),
        bytes=size * PASSES[op][backward],
        backward=backward,
        compile=compiled,
    )


def _packed(device: torch.device, tokens: int, channels: int, segments: int, dtype: torch.dtype) -> Case:
    """Packed samples with float32 rows, against what models do: rows expanded to tokens."""

    def make() -> Inputs:
        ends = torch.linspace(0, tokens, segments + 1, device=device).to(torch.int32)
        rows = {name: torch.randn(segments, channels, device=device) for name in ("shift", "scale", "gate")}
        x = {name: torch.randn(tokens, channels, device=device, dtype=dtype) for name in ("x", "branch")}
        return {**x, **rows, "cu_seqlens": ends, "lengths": ends.diff().long()}

    def expanded(i: Inputs) -> Outputs:
        shift, scale, gate = (
            i[n].repeat_interleave(i["lengths"], 0, output_size=tokens) for n in ("shift", "scale", "gate")
        )
        hidden = (i["x"] + gate * i["branch"]).to(i["x"].dtype)
        return hidden, (F.layer_norm(hidden.to(gate.dtype), (channels,), eps=1e-6) * (1 + scale) + shift).to(
            hidden.dtype
        )

    return Case(
        name=f"chain packed [{tokens}, {channels}] of {segments} samples, float32 rows, {str(dtype)[6:]}",
        make_inputs=make,
        ours=lambda i: tuple(
            ops.adaln_zero(i["x"], i["branch"], i["gate"], i["shift"], i["scale"], cu_seqlens=i["cu_seqlens"])
        ),
        reference=expanded,
        bytes=4 * tokens * channels * dtype.itemsize,
        compile=False,
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
            for backward in PASSES[op]:
                if (op, shape, backward) not in {("modulate", latte, False), ("chain", latte, False)}:
                    yield _case(device, op, shape, dtype, backward, True)
    if on_cpu:
        for op in ("modulate", "chain"):
            for backward in PASSES[op]:
                yield _case(device, op, (2, 4096, 1152), torch.bfloat16, backward, True)
        yield _packed(device, 6000, 1152, 7, torch.bfloat16)
        return
    yield _packed(device, 32760, 3072, 64, torch.bfloat16)
    for channels in WIDTHS:
        for op, backward in (("modulate", False), ("modulate", "only"), ("chain", False), ("chain", "only")):
            shape = (1, 2**26 // channels, channels)
            if shape not in (latte, wan):
                yield _case(device, op, shape, dtype, backward, True)
