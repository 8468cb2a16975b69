# SPDX-License-Identifier: Apache-2.0
"""The seam between two sub-blocks of an adaLN-Zero block in one pass: gate, residual, norm, modulate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vidkernels import _signature, dispatch
from vidkernels._reference import adaln_zero as reference
from vidkernels.ops import _adaln_layout as layout
from vidkernels.ops._adaln_fakes import fake_full, fake_statistics, fake_table, fake_vector
from vidkernels.ops._autograd import distinct, first_order, needs_grad
from vidkernels.ops._register import Launcher, define
from vidkernels.ops.gate_residual import gate_residual_backward


def _fwd_fake(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    norm: int,
    eps: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch._check(
        branch.shape == residual.shape, lambda: f"branch: expected {tuple(residual.shape)}, got {tuple(branch.shape)}"
    )
    hidden, y = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    return (hidden, y, *fake_statistics(residual, norm, save))


def _bwd_fake(
    dhidden: torch.Tensor | None,
    dy: torch.Tensor,
    hidden: torch.Tensor,
    branch: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    order: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    count: int,
    norm: int,
    needs: int,
) -> tuple[torch.Tensor, ...]:
    torch._check(dy.shape == hidden.shape, lambda: f"dy: expected {tuple(hidden.shape)}, got {tuple(dy.shape)}")
    typed = gate if scale is None else scale
    return (
        fake_full(dy, needs & layout.NEED_X),
        fake_full(dy, needs & layout.NEED_BRANCH),
        fake_table(dy, typed, count, needs & layout.NEED_GATE),
        fake_table(dy, typed, count, needs & layout.NEED_SHIFT),
        fake_table(dy, typed, count, needs & layout.NEED_SCALE),
        fake_vector(dy, weight, needs & layout.NEED_WEIGHT),
        fake_vector(dy, bias, needs & layout.NEED_BIAS),
    )


define(
    "adaln_zero_fwd",
    "(Tensor residual, Tensor branch, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, "
    "Tensor? rows, Tensor? cu_seqlens, int norm, float eps, bool save) "
    "-> (Tensor hidden, Tensor y, Tensor mean, Tensor rstd)",
    _fwd_fake,
    triton="vidkernels.triton.adaln_zero:adaln_zero_fwd",
)
define(
    "adaln_zero_bwd",
    "(Tensor? dhidden, Tensor dy, Tensor hidden, Tensor? branch, Tensor mean, Tensor rstd, Tensor? gate, "
    "Tensor? scale, Tensor? weight, Tensor? bias, Tensor? order, Tensor? cu_seqlens, SymInt count, int norm, "
    "int needs) "
    "-> (Tensor dresidual, Tensor dbranch, Tensor dgate, Tensor dshift, Tensor dscale, Tensor dweight, Tensor dbias)",
    _bwd_fake,
    triton="vidkernels.triton.adaln_zero_bwd:adaln_zero_bwd",
)


class _AdaLNZero(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        branch: torch.Tensor,
        gate: torch.Tensor | None,
        shift: torch.Tensor | None,
        scale: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        rows: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        norm: int,
        eps: float,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        forward = dispatch.op("adaln_zero_fwd", backend)
        hidden, y, mean, rstd = forward(
            residual, branch, gate, shift, scale, weight, bias, rows, cu_seqlens, norm, eps, True
        )
        kept = branch if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(hidden, kept, mean, rstd, gate, scale, weight, bias, rows, cu_seqlens)
        ctx.shift = None if shift is None else (shift.shape, shift.dtype)
        ctx.norm, ctx.backend = norm, backend
        if not any(ctx.needs_input_grad[:3]):  # learned modulation of frozen activations
            ctx.mark_non_differentiable(hidden)
        return hidden, y

    @staticmethod
    @first_order
    def backward(ctx: Any, dhidden: torch.Tensor | None, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, branch, mean, rstd, gate, scale, weight, bias, rows, cu_seqlens = ctx.saved_tensors
        need_x, need_branch, need_gate, need_shift, need_scale, need_weight, need_bias = ctx.needs_input_grad[:7]
        if dy is None:
            if dhidden is None:
                return (None,) * 12
            grads = gate_residual_backward(dhidden, branch, gate, rows, cu_seqlens, need_branch, need_gate, ctx.backend)
            return (dhidden if need_x else None, *grads, *(None,) * 9)
        # Without a gate the branch's gradient is the residual's: one tensor serves both.
        shared = gate is None and need_branch
        shapes = [t[0] if t else None for t in (ctx.shift,)] + [None if t is None else t.shape for t in (scale, gate)]
        count = next((shape[:-1].numel() for shape in shapes if shape is not None), 1)
        needs = layout.wanted(
            (need_x or shared, layout.NEED_X),
            (need_branch and not shared, layout.NEED_BRANCH),
            (need_gate, layout.NEED_GATE),
            (need_shift, layout.NEED_SHIFT),
            (need_scale, layout.NEED_SCALE),
            (need_weight, layout.NEED_WEIGHT),
            (need_bias, layout.NEED_BIAS),
        )
        order, ends = layout.sort_rows(rows, cu_seqlens, count)
        backward = dispatch.op("adaln_zero_bwd", ctx.backend)
        dx, dbranch, dgate, dshift, dscale, dweight, dbias = backward(
            dhidden, dy, hidden, branch, mean, rstd, gate, scale, weight, bias, order, ends, count, ctx.norm, needs
        )
        return (
            dx if need_x else None,
            (dx if shared else dbranch) if need_branch else None,
            layout.grad_or_none(dgate, gate.shape, gate.dtype) if need_gate else None,
            layout.grad_or_none(dshift, *ctx.shift) if need_shift else None,
            layout.grad_or_none(dscale, scale.shape, scale.dtype) if need_scale else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            *(None,) * 5,
        )


def _facts(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    cu_seqlens: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> layout.Facts:
    layout.check_branch(residual, branch)
    layout.check_norm(residual, norm, weight, bias, eps)
    tables = {"gate": gate, "shift": shift, "scale": scale}
    return (residual, *layout.check_rows(residual, tables, cu_seqlens, rows))


BACKENDS = dispatch.Dispatcher("adaln_zero", facts=_facts, backends=layout.BACKENDS)
_DECISIONS = _signature.Memo()


def adaln_zero(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    cu_seqlens: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Close one sub-block and open the next: `h = residual + gate * branch; norm(h) * (1 + scale) + shift`.

    Source: the adaLN-Zero block of DiT (Peebles and Xie, arXiv:2212.09748). Two reads and two writes instead of eleven
    passes over the activations; the backward reads four tensors and writes two, once. Equal, bit for bit on one
    backend, to `gate_residual` followed by `adaln_modulate`.

    Args:
        residual, branch: `[B, ..., C]`, or packed `[total, C]`; one dtype: float32, bfloat16, float16 or float64.
        gate, shift, scale: rows of modulation as in `adaln_modulate`, all of one dtype; a missing gate counts as 1,
            a missing shift or scale as 0.
        norm, weight, bias, eps, cu_seqlens, rows, backend: as in `adaln_modulate`.

    Returns:
        `(h, modulated)`, both of residual's shape and dtype, contiguous.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.
    """
    options: dict[str, Any] = {
        "norm": norm,
        "weight": weight,
        "bias": bias,
        "eps": eps,
        "cu_seqlens": cu_seqlens,
        "rows": rows,
    }
    key = layout.signature((norm, eps, backend), cu_seqlens, rows, residual, branch, gate, shift, scale, weight, bias)
    known = None if key is None else _DECISIONS.get(key)
    tables: Sequence[torch.Tensor | None] = (gate, shift, scale)
    if known is not None:
        index, ends, (chosen, launch) = None, None, known
    else:
        facts = _facts(residual, branch, gate, shift, scale, **options)
        chosen = BACKENDS.select(backend, *facts)
        if chosen == "reference":
            return reference.adaln_zero(residual, branch, gate, shift, scale, **options)
        _, tables, index, ends = facts
        launch = dispatch.op("adaln_zero_fwd", chosen)
        if key is not None and layout.are_as_given(tables, gate, shift, scale):
            _DECISIONS.keep(key, (norm, eps, backend), (chosen, Launcher(launch, residual)))
    inputs = (residual, branch, *tables, weight, bias)
    if needs_grad(*inputs):
        return _AdaLNZero.apply(*distinct(*inputs), index, ends, layout.NORMS[norm], eps, chosen)
    return launch(*inputs, index, ends, layout.NORMS[norm], eps, False)[:2]
