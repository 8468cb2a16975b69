# SPDX-License-Identifier: Apache-2.0
"""`residual + gate * branch` in one pass."""

from __future__ import annotations

from typing import Any

import torch

from vidkernels import _signature, dispatch
from vidkernels._reference import adaln_zero as reference
from vidkernels.ops import _adaln_layout as layout
from vidkernels.ops._adaln_fakes import fake_full, fake_table
from vidkernels.ops._autograd import distinct, first_order, needs_grad
from vidkernels.ops._register import Launcher, define


def _fwd_fake(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    rows: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    torch._check(
        branch.shape == residual.shape, lambda: f"branch: expected {tuple(residual.shape)}, got {tuple(branch.shape)}"
    )
    return residual.new_empty(residual.shape)


def _bwd_fake(
    dout: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    order: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    count: int,
    needs: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return fake_full(dout, needs & layout.NEED_BRANCH), fake_table(dout, gate, count, needs & layout.NEED_GATE)


define(
    "gate_residual_fwd",
    "(Tensor residual, Tensor branch, Tensor? gate, Tensor? rows, Tensor? cu_seqlens) -> Tensor",
    _fwd_fake,
    triton="vidkernels.triton.adaln_zero:gate_residual_fwd",
)
define(
    "gate_residual_bwd",
    "(Tensor dout, Tensor? branch, Tensor? gate, Tensor? order, Tensor? cu_seqlens, SymInt count, int needs) "
    "-> (Tensor dbranch, Tensor dgate)",
    _bwd_fake,
    triton="vidkernels.triton.adaln_zero_bwd:gate_residual_bwd",
)


def gate_residual_backward(
    dout: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    rows: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    need_branch: bool,
    need_gate: bool,
    backend: str,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of branch and gate; that of residual is dout itself."""
    if gate is None:
        return dout if need_branch else None, None
    if not (need_branch or need_gate):
        return None, None
    count = layout.table_rows(gate)
    needs = layout.wanted((need_branch, layout.NEED_BRANCH), (need_gate, layout.NEED_GATE))
    order, ends = layout.sort_rows(rows, cu_seqlens, count)
    backward = dispatch.op("gate_residual_bwd", backend)
    dbranch, dgate = backward(dout, branch if need_gate else None, gate, order, ends, count, needs)
    return dbranch if need_branch else None, layout.grad_or_none(dgate, gate.shape, gate.dtype) if need_gate else None


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        branch: torch.Tensor,
        gate: torch.Tensor | None,
        rows: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        backend: str,
    ) -> torch.Tensor:
        out = dispatch.op("gate_residual_fwd", backend)(residual, branch, gate, rows, cu_seqlens)
        ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate, rows, cu_seqlens)
        ctx.backend = backend
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        branch, gate, rows, cu_seqlens = ctx.saved_tensors
        need_residual, need_branch, need_gate = ctx.needs_input_grad[:3]
        grads = gate_residual_backward(dout, branch, gate, rows, cu_seqlens, need_branch, need_gate, ctx.backend)
        return (dout if need_residual else None, *grads, None, None, None)


def _facts(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> layout.Facts:
    layout.check_branch(residual, branch)
    return (residual, *layout.check_rows(residual, {"gate": gate}, cu_seqlens, rows))


BACKENDS = dispatch.Dispatcher("gate_residual", facts=_facts, backends=layout.BACKENDS)
_DECISIONS = _signature.Memo()


def gate_residual(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Add a gated branch to the residual stream: `residual + gate * branch`.

    Source: the adaLN-Zero block of DiT (Peebles and Xie, arXiv:2212.09748). Two reads and one write.

    Args:
        residual, branch: `[B, ..., C]`, or packed `[total, C]`; one dtype: float32, bfloat16, float16 or float64.
        gate: rows of modulation as in `adaln_modulate`; None counts as 1.
        cu_seqlens, rows: which row a token takes, as in `adaln_modulate`.
        backend: "auto", or one of "cpp", "cuda", "triton", "reference".

    Returns:
        Tensor of residual's shape and dtype, contiguous, rounded once from float32 (float64).

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.
    """
    key = layout.signature((backend,), cu_seqlens, rows, residual, branch, gate)
    known = None if key is None else _DECISIONS.get(key)
    if known is not None:
        table, index, ends, (chosen, launch) = gate, None, None, known
    else:
        facts = _facts(residual, branch, gate, cu_seqlens=cu_seqlens, rows=rows)
        chosen = BACKENDS.select(backend, *facts)
        if chosen == "reference":
            return reference.gate_residual(residual, branch, gate, cu_seqlens=cu_seqlens, rows=rows)
        _, (table,), index, ends = facts
        launch = dispatch.op("gate_residual_fwd", chosen)
        if key is not None and table is gate:
            _DECISIONS.keep(key, (backend,), (chosen, Launcher(launch, residual)))
    if needs_grad(residual, branch, table):
        return _GateResidual.apply(*distinct(residual, branch, table), index, ends, chosen)
    return launch(residual, branch, table, index, ends)
