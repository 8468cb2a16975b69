# SPDX-License-Identifier: Apache-2.0
"""`norm(x) * (1 + scale) + shift` in one pass."""

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


def _fwd_fake(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    norm: int,
    eps: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch._check(x.ndim >= 2, lambda: f"x: expected [..., C] with at least two axes, got {tuple(x.shape)}")
    for table in (shift, scale, weight, bias):
        torch._check(table is None or table.shape[-1] == x.shape[-1], lambda: "tables: expected rows of x's last axis")
    return (x.new_empty(x.shape), *fake_statistics(x, norm, save))


def _bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    order: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    count: int,
    norm: int,
    needs: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch._check(dy.shape == x.shape, lambda: f"dy: expected {tuple(x.shape)}, got {tuple(dy.shape)}")
    return (
        fake_full(dy, needs & layout.NEED_X),
        fake_table(dy, scale, count, needs & layout.NEED_SHIFT),
        fake_table(dy, scale, count, needs & layout.NEED_SCALE),
        fake_vector(dy, weight, needs & layout.NEED_WEIGHT),
        fake_vector(dy, bias, needs & layout.NEED_BIAS),
    )


define(
    "adaln_modulate_fwd",
    "(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, Tensor? rows, Tensor? cu_seqlens, "
    "int norm, float eps, bool save) -> (Tensor y, Tensor mean, Tensor rstd)",
    _fwd_fake,
    triton="vidkernels.triton.adaln_zero:adaln_modulate_fwd",
)
define(
    "adaln_modulate_bwd",
    "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? scale, Tensor? weight, Tensor? bias, Tensor? order, "
    "Tensor? cu_seqlens, SymInt count, int norm, int needs) "
    "-> (Tensor dx, Tensor dshift, Tensor dscale, Tensor dweight, Tensor dbias)",
    _bwd_fake,
    triton="vidkernels.triton.adaln_zero_bwd:adaln_modulate_bwd",
)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        shift: torch.Tensor | None,
        scale: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        rows: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        norm: int,
        eps: float,
        backend: str,
    ) -> torch.Tensor:
        forward = dispatch.op("adaln_modulate_fwd", backend)
        y, mean, rstd = forward(x, shift, scale, weight, bias, rows, cu_seqlens, norm, eps, True)
        ctx.save_for_backward(x, mean, rstd, scale, weight, bias, rows, cu_seqlens)
        ctx.shift = None if shift is None else (shift.shape, shift.dtype)
        ctx.norm, ctx.backend = norm, backend
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mean, rstd, scale, weight, bias, rows, cu_seqlens = ctx.saved_tensors
        need_x, need_shift, need_scale, need_weight, need_bias = ctx.needs_input_grad[:5]
        shape = ctx.shift[0] if ctx.shift is not None else None if scale is None else scale.shape
        count = 1 if shape is None else shape[:-1].numel()
        needs = layout.wanted(
            (need_x, layout.NEED_X),
            (need_shift, layout.NEED_SHIFT),
            (need_scale, layout.NEED_SCALE),
            (need_weight, layout.NEED_WEIGHT),
            (need_bias, layout.NEED_BIAS),
        )
        order, ends = layout.sort_rows(rows, cu_seqlens, count)
        backward = dispatch.op("adaln_modulate_bwd", ctx.backend)
        dx, dshift, dscale, dweight, dbias = backward(
            dy, x, mean, rstd, scale, weight, bias, order, ends, count, ctx.norm, needs
        )
        return (
            dx if need_x else None,
            layout.grad_or_none(dshift, *ctx.shift) if need_shift else None,
            layout.grad_or_none(dscale, scale.shape, scale.dtype) if need_scale else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            *(None,) * 5,
        )


def _facts(
    x: torch.Tensor,
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
    layout.check_activations("x", x)
    layout.check_norm(x, norm, weight, bias, eps)
    return (x, *layout.check_rows(x, {"shift": shift, "scale": scale}, cu_seqlens, rows))


BACKENDS = dispatch.Dispatcher("adaln_modulate", facts=_facts, backends=layout.BACKENDS)
_DECISIONS = _signature.Memo()


def adaln_modulate(
    x: torch.Tensor,
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
) -> torch.Tensor:
    """Normalise each token and modulate it: `norm(x) * (1 + scale) + shift`.

    Source: adaptive layer norm of DiT (Peebles and Xie, arXiv:2212.09748). One read of x, one write of the result; rows
    of modulation are indexed in the kernel and never expanded to tokens.

    Args:
        x: `[B, ..., C]`, or packed `[total, C]`; float32, bfloat16, float16 or float64.
        shift, scale: rows of modulation, None counts as 0. `[C]` or `[1, C]`: one row for all tokens; `[B, C]`: one per
            sample; `[B or 1, G, C]`: the tokens of a sample form G equal groups with a row each (G = 1, frames or
            tokens); `[S, C]` with `cu_seqlens`; `[R, C]` with `rows`. Same dtype: x's or float32.
        norm: "layer" (mean and biased variance over C), "rms" (root of the mean square), "none".
        weight, bias: `[C]`, applied to the norm before the modulation.
        eps: added to the variance or mean square.
        cu_seqlens: int `[S + 1]`, ends of the packed segments of x, from 0 to the number of tokens.
        rows: int `[B, G]` (`[G]` for x `[total, C]`): the row of each of G equal groups of a sample's tokens.
        backend: "auto", or one of "cpp", "cuda", "triton", "reference".

    Returns:
        Tensor of x's shape and dtype, contiguous. Statistics and products are float32 (float64 for float64).

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
    key = layout.signature((norm, eps, backend), cu_seqlens, rows, x, shift, scale, weight, bias)
    known = None if key is None else _DECISIONS.get(key)
    tables: Sequence[torch.Tensor | None] = (shift, scale)
    if known is not None:
        index, ends, (chosen, launch) = None, None, known
    else:
        facts = _facts(x, shift, scale, **options)
        chosen = BACKENDS.select(backend, *facts)
        if chosen == "reference":
            return reference.adaln_modulate(x, shift, scale, **options)
        _, tables, index, ends = facts
        launch = dispatch.op("adaln_modulate_fwd", chosen)
        if key is not None and layout.are_as_given(tables, shift, scale):
            _DECISIONS.keep(key, (norm, eps, backend), (chosen, Launcher(launch, x)))
    inputs = (x, *tables, weight, bias)
    if needs_grad(*inputs):
        return _Modulate.apply(*distinct(*inputs), index, ends, layout.NORMS[norm], eps, chosen)
    return launch(*inputs, index, ends, layout.NORMS[norm], eps, False)[0]
