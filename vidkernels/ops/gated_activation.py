# SPDX-License-Identifier: Apache-2.0
"""Gated linear units (GEGLU, SwiGLU): one half of the last axis times an activation of the other, in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels import dispatch
from vidkernels._reference import gated_activation as reference
from vidkernels.errors import ShapeError
from vidkernels.ops._autograd import first_order, needs_grad
from vidkernels.ops._checks import check_flag, check_floating, check_option
from vidkernels.ops._register import define

# The bare ops take an activation's place in this tuple.
ACTIVATIONS = ("gelu", "gelu_tanh", "silu")


def _fwd_fake(x: Tensor, activation: int, gate_first: bool) -> Tensor:
    torch._check(x.ndim >= 1 and x.shape[-1] % 2 == 0, lambda: "gated_activation_fwd: x must be [..., 2 D]")
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _bwd_fake(dy: Tensor, x: Tensor, activation: int, gate_first: bool) -> Tensor:
    torch._check(dy.ndim == x.ndim, lambda: "gated_activation_bwd: dy must be [..., D]")
    return x.new_empty(x.shape)


define(
    "gated_activation_fwd",
    "(Tensor x, int activation, bool gate_first) -> Tensor",
    _fwd_fake,
    triton="vidkernels.triton.gated_activation:gated_activation_fwd",
)
define(
    "gated_activation_bwd",
    "(Tensor dy, Tensor x, int activation, bool gate_first) -> Tensor",
    _bwd_fake,
    triton="vidkernels.triton.gated_activation:gated_activation_bwd",
)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: int, gate_first: bool, backend: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.options = (activation, gate_first)
        ctx.backend = backend
        return dispatch.op("gated_activation_fwd", backend)(x, activation, gate_first)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return dispatch.op("gated_activation_bwd", ctx.backend)(dy, x, *ctx.options), None, None, None


def _facts(
    x: Tensor, activation: str = "gelu", *, gate_first: bool = False, backend: str = "auto"
) -> tuple[Tensor, int]:
    check_floating("x", x)
    check_option("activation", activation, ACTIVATIONS)
    check_flag("gate_first", gate_first)
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ShapeError("x", "an even number of channels at the last axis", tuple(x.shape), "Both halves are equal.")
    return x, x.ndim


BACKENDS = dispatch.Dispatcher(
    "gated_activation",
    facts=_facts,
    backends={
        "cpp": dispatch.cpp(),
        "triton": dispatch.triton(),
        "torch": dispatch.always,
        "reference": dispatch.always,
    },
)


def _torch_gated_activation(x: Tensor, activation: str, gate_first: bool) -> Tensor:
    """Two of PyTorch's operations in x's own dtype, as models write it: two roundings, and the activation in memory."""
    hidden, gate = x.chunk(2, dim=-1)
    if gate_first:
        hidden, gate = gate, hidden
    if activation == "silu":
        return hidden * F.silu(gate)
    return hidden * F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _rows(x: Tensor) -> Tensor:
    """x as kernels take it: contiguous, or [rows, 2 D] of one distance from row to row; a copy where neither is possible."""
    if x.is_contiguous():
        return x
    if x.ndim == 2:
        return x if x.stride(1) == 1 else x.contiguous()
    merges = all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.ndim - 2))
    return x.flatten(0, -2) if merges and x.stride(-1) == 1 else x.contiguous()


def gated_activation(x: Tensor, activation: str = "gelu", *, gate_first: bool = False, backend: str = "auto") -> Tensor:
    """`hidden * act(gate)`: (hidden, gate) are the halves of the last axis of x, or (gate, hidden) with `gate_first`.

    Args:
        x: [..., 2 D], as one projection makes it; float32, float64, bfloat16 or float16.
        activation: `gelu` (GEGLU), `gelu_tanh` (its approximation by tanh) or `silu` (SwiGLU).
        gate_first: the first half is the gate, as where `w1` and `w3` of a SwiGLU were packed in this order; diffusers'
            GEGLU and SwiGLU have it last.
        backend: `auto`, `cpp`, `triton`, `torch` (PyTorch's operations in x's own dtype) or `reference`.

    Returns:
        [..., D], contiguous, rounded once from float32. Differentiable once in x; both halves' gradients are written
        into one tensor.

    Raises:
        ShapeError, DTypeError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: arXiv 2002.05202 (GLU variants); arXiv 1606.08415 (GELU and its approximation).
    """
    facts = _facts(x, activation, gate_first=gate_first)
    chosen = BACKENDS.select(backend, *facts)
    if chosen == "reference" or x.numel() == 0:
        return reference.gated_activation(x, activation, gate_first=gate_first)
    if chosen == "torch":
        return _torch_gated_activation(x, activation, gate_first)
    rows, options = _rows(x), (ACTIVATIONS.index(activation), gate_first)
    if needs_grad(rows):
        y = _GatedActivation.apply(rows, *options, chosen)
    else:
        y = dispatch.op("gated_activation_fwd", chosen)(rows, *options)
    return y if rows.ndim == x.ndim else y.view(*x.shape[:-1], y.shape[-1])
