# SPDX-License-Identifier: Apache-2.0
"""Attention along one axis of a video, and packed attention with query/key norm and rotation inside.

Both run in one kernel where segments are short (`triton`), and else as `qk_norm_rope` followed by `varlen_attention`
(`composed`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels import dispatch
from vidkernels._reference import axial_attention as reference
from vidkernels.errors import OptionError, ShapeError
from vidkernels.ops import _short_attention as short
from vidkernels.ops._autograd import needs_grad
from vidkernels.ops._checks import (
    check_eps,
    check_floating,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from vidkernels.ops._qk_norm_rope_checks import check_arguments, check_rotation
from vidkernels.ops.qk_norm_rope import kernel_frequencies, kernel_weight, qk_norm_rope
from vidkernels.ops.varlen_attention import check_length, check_offsets, check_scores, longest_segment, varlen_attention


class _Prologue(NamedTuple):
    """Options of norm and rotation as the caller gave them."""

    q_weight: Tensor | None
    k_weight: Tensor | None
    positions: Tensor | None
    frequencies: Tensor | None
    axes: Sequence[int] | None
    theta: float | Sequence[float]
    position_scale: float | Sequence[float]
    norm: str | None
    eps: float
    layout: str

    def named(self) -> dict[str, Any]:
        """Keyword arguments of `qk_norm_rope` and of the references."""
        return self._asdict()


def _check(q: Tensor, k: Tensor, v: Tensor, options: _Prologue) -> tuple[list[int], list[float], list[float]]:
    """Checks what both ops share; returns axes, theta and scale of the rotation, empty without one."""
    check_floating("q", q)
    for name, x in (("k", k), ("v", v)):
        check_floating(name, x)
        check_same_dtype(name, x, "q", q)
        check_same_device(name, x, "q", q)
    if q.shape[-1] < 1:
        raise ShapeError("q", "a head dimension of at least 1", tuple(q.shape), "The last axis is the head's.")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        expected = f"a number of heads that divides the {q.shape[-2]} of q"
        raise ShapeError("k", expected, k.shape[-2], "Query heads share key heads in equal groups.")
    if options.norm is not None and not (isinstance(options.norm, str) and options.norm == "head"):
        raise OptionError("norm", "None or 'head'", repr(options.norm), "Norm over all heads: call qk_norm_rope first.")
    check_eps(options.eps)
    no_q, no_k = (x.flatten(0, -3) for x in (q[..., :0, :, :], k[..., :0, :, :]))
    check_arguments(no_q, no_k, options.q_weight, options.k_weight, options.norm, options.layout)
    if options.positions is None:
        return [], [], []
    check_ndim("positions", options.positions, 2)
    count = options.positions.shape[0]  # the rotation depends on a place and a head alone
    one_q, one_k = (x.new_empty(1).expand(count, x.shape[-2], x.shape[-1]) for x in (q, k))
    rotation = (options.axes, options.theta, options.position_scale, options.frequencies, options.layout)
    return check_rotation(one_q, one_k, options.positions, *rotation)


def _short_facts(
    q: Tensor, k: Tensor, longest: int, packed: bool, options: _Prologue, backend: str = "auto"
) -> tuple[Any, ...]:
    plain = options.layout == "interleaved" or options.positions is None
    weights = (options.q_weight is None) == (options.k_weight is None)
    learned = needs_grad(options.positions, options.frequencies)
    shared = options.frequencies is None or options.frequencies.ndim == 2
    return q, k, longest, packed, plain, weights, learned, shared


def _fits_short(
    q: Tensor, k: Tensor, longest: int, packed: bool, plain: bool, weights: bool, learned: bool, shared: bool
) -> str | None:
    """Why one kernel cannot hold whole segments with norm and rotation, or None."""
    reason = short.refusal(q, longest, packed) or short.same_heads(q, k)
    if reason is None and not plain:
        reason = "layout is not 'interleaved'"
    if reason is None and not weights:
        reason = "one of the norm weights is missing"
    if reason is None and learned:
        reason = "positions or frequencies need a gradient"
    if reason is None and not shared:
        reason = "every head has frequencies of its own"
    return reason


_TABLE = {
    "triton": dispatch.triton(check=_fits_short),
    "composed": dispatch.always,
    "reference": dispatch.always,
}


def _axial_facts(q: Tensor, k: Tensor, v: Tensor, dim: int = 1, **options: Any) -> tuple[Any, ...]:
    prologue = _prologue(options, norm=None)
    _check_axial(q, k, v, dim, prologue)
    return _short_facts(q, k, q.shape[dim], False, prologue)


def _packed_facts(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None, **options: Any
) -> tuple[Any, ...]:
    prologue = _prologue(options, norm="head")
    _check_packed(q, k, v, max_seqlen, prologue)
    return _short_facts(q, k, q.shape[0] if max_seqlen is None else max_seqlen, True, prologue)


def _prologue(options: dict[str, Any], norm: str | None) -> _Prologue:
    unknown = options.keys() - {*_Prologue._fields, "causal", "scale", "backend"}
    if unknown:
        raise TypeError(f"got an unexpected keyword argument {min(unknown)!r}")
    defaults = _Prologue(None, None, None, None, None, 10000.0, 1.0, norm, 1e-6, "interleaved")
    return defaults._replace(**{key: value for key, value in options.items() if key in _Prologue._fields})


def _check_axial(q: Tensor, k: Tensor, v: Tensor, dim: int, options: _Prologue) -> tuple[Any, Any, Any]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
    if q.ndim < 3:
        raise ShapeError(
            "q", "[..., H, D] with at least one leading axis", tuple(q.shape), "Add the axis to attend over."
        )
    if not isinstance(dim, int) or isinstance(dim, bool) or not -q.ndim <= dim < q.ndim or dim % q.ndim >= q.ndim - 2:
        raise OptionError("dim", f"an axis of q before heads and channels, 0 to {q.ndim - 3}", repr(dim), "")
    leading = tuple(q.shape[:-2])
    for name, x in (("k", k), ("v", v)):
        heads = k.shape[-2] if x.ndim == q.ndim else -1
        check_shape(name, x, (*leading, heads, q.shape[-1]), "leading axes and head_dim of q")
    rotation = _check(q, k, v, options)
    if options.positions is not None and options.positions.shape[0] != q.shape[dim]:
        expected = f"{q.shape[dim]} rows, one per place along axis {dim}"
        raise ShapeError("positions", expected, tuple(options.positions.shape), "")
    return rotation


def _check_packed(q: Tensor, k: Tensor, v: Tensor, max_seqlen: int | None, options: _Prologue) -> tuple[Any, Any, Any]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_ndim(name, x, 3)
    for name, x in (("k", k), ("v", v)):
        check_shape(name, x, (q.shape[0], k.shape[1], q.shape[2]), "tokens and head_dim of q, heads of k")
    if max_seqlen is not None:
        check_length("max_seqlen", max_seqlen)
    rotation = _check(q, k, v, options)
    if options.positions is not None and options.positions.shape[0] != q.shape[0]:
        raise ShapeError("positions", f"{q.shape[0]} rows, one per token", tuple(options.positions.shape), "")
    return rotation


AXIAL = dispatch.Dispatcher("axial_attention", facts=_axial_facts, backends=_TABLE)
PACKED = dispatch.Dispatcher("norm_rope_attention", facts=_packed_facts, backends=_TABLE)


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dim: int = 1,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    positions: Tensor | None = None,
    axes: Sequence[int] | None = None,
    theta: float | Sequence[float] = 10000.0,
    position_scale: float | Sequence[float] = 1.0,
    frequencies: Tensor | None = None,
    norm: str | None = None,
    eps: float = 1e-6,
    layout: str = "interleaved",
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention along axis `dim`, with all other leading axes as batch: temporal attention without transposes.

    q and k first go through `ops.qk_norm_rope` if `norm` or `positions` are given.

    Args:
        q: `[..., H, D]`, for example `[B, T, S, H, D]` with dim=1 for attention over time; any strides; float32, float64,
            bfloat16 or float16.
        k, v: the same, in q's dtype, with Hk heads, Hk divides H.
        dim: the axis to attend over.
        q_weight, k_weight, axes, theta, position_scale, frequencies, eps, layout: of `ops.qk_norm_rope`.
        positions: `[L, A]`, one row per place along the axis.
        norm: "head" or None.
        causal, scale: of `ops.varlen_attention`.
        backend: "triton", "composed" or "reference".

    Returns:
        A contiguous tensor of q's shape.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve the call.

    Sources: Latte (arXiv 2401.03048), Open-Sora's STDiT3.
    """
    options = _Prologue(q_weight, k_weight, positions, frequencies, axes, theta, position_scale, norm, eps, layout)
    rotation = _check_axial(q, k, v, dim, options)
    check_scores(causal, scale)
    chosen = AXIAL.select(backend, *_short_facts(q, k, q.shape[dim], False, options))
    dim %= q.ndim
    if chosen == "reference":
        return reference.axial_attention(q, k, v, dim, **options.named(), causal=causal, scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if chosen == "triton":
        shape = q.shape
        q, k, v = (x.flatten(dim + 1, -3) if x.ndim > dim + 3 else x.unsqueeze(dim + 1) for x in (q, k, v))
        q, k, v = (x.flatten(0, dim - 1) if dim else x.unsqueeze(0) for x in (q, k, v))  # [outer, L, inner, H, D]
        out = short.attend(q, k, v, None, 0, _sides(options, q), rotation, norm is not None, eps, causal, scale)
        return out.view(shape)
    if q.numel() == 0:
        return q.contiguous() + (k.sum() + v.sum())  # no elements, but differentiable in all three
    compose = _compose_folded if q.device.type == "cpu" else _compose_moved
    return compose(q, k, v, dim, options, causal, scale)


def _compose_folded(
    q: Tensor, k: Tensor, v: Tensor, dim: int, options: _Prologue, causal: bool, scale: float
) -> Tensor:
    """Leading axes behind `dim` become heads, which the CPU kernel reads at any distance: nothing is transposed."""
    length, shape = q.shape[dim], q.shape
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 : -2])
    if options.norm is not None or options.positions is not None:
        positions = None if options.positions is None else options.positions.repeat_interleave(inner, 0)
        q, k = (x.reshape(outer, length * inner, *x.shape[-2:]) for x in (q, k))
        q, k = _turn(q, k, options._replace(positions=positions))
    # Under a causal mask a hidden NaN must stay hidden, which PyTorch's kernel does not promise.
    if q.dtype == torch.float32 and not causal and not all(x.is_contiguous() for x in (q, k, v)):
        return _attend_views(q.view(shape), k.view(v.shape), v, dim, scale)
    q, k, v = (x.reshape(outer * length, inner * x.shape[-2], x.shape[-1]) for x in (q, k, v))
    offsets = torch.arange(0, (outer + 1) * length, length, dtype=torch.int32, device=q.device)
    return varlen_attention(q, k, v, offsets, None, length, causal=causal, scale=scale).view(shape)


def _attend_views(q: Tensor, k: Tensor, v: Tensor, dim: int, scale: float) -> Tensor:
    """Slices of one projection in float32: folding would copy them, which takes longer than PyTorch's kernel as a whole
    (16 frames, 64 positions, 16 heads of 72: 50 ms against 13)."""
    # Ints, since PyTorch's kernel takes no comparison of symbolic sizes.
    grouped = index(q.shape[-2]) != index(k.shape[-2])
    q, k, v = (x.movedim(dim, -2) for x in (q, k, v))  # [..., H, L, D]
    shape = q.shape
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    with torch.autocast("cpu", enabled=False):  # which layout leads here must not decide the dtype
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    return out.reshape(shape).movedim(-2, dim).contiguous()


def _compose_moved(q: Tensor, k: Tensor, v: Tensor, dim: int, options: _Prologue, causal: bool, scale: float) -> Tensor:
    """The axis moved next to heads and channels: engines of GPUs take at most 65535 heads."""
    q, k, v = (x.movedim(dim, -3) for x in (q, k, v))
    shape = q.shape
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))  # [N, L, H, D]
    q, k = _turn(q, k, options)
    count, length = q.shape[:2]
    offsets = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=q.device)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = varlen_attention(q, k, v, offsets, None, length, causal=causal, scale=scale)
    return out.view(shape).movedim(-3, dim).contiguous()


def _sides(options: _Prologue, q: Tensor) -> tuple[Tensor | None, ...]:
    """Weights, positions and frequencies of the prologue as the kernels read them."""
    positions = None if options.positions is None else options.positions.detach()
    weights = (kernel_weight(weight, q) for weight in (options.q_weight, options.k_weight))
    return *weights, positions, kernel_frequencies(positions, options.frequencies)


def _turn(q: Tensor, k: Tensor, options: _Prologue) -> tuple[Tensor, Tensor]:
    """Norm and rotation in a pass of their own."""
    if options.norm is None and options.positions is None:
        return q, k
    queries, keys = qk_norm_rope(q, k, **options.named())
    assert keys is not None
    return queries, keys


def norm_rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    positions: Tensor | None = None,
    axes: Sequence[int] | None = None,
    theta: float | Sequence[float] = 10000.0,
    position_scale: float | Sequence[float] = 1.0,
    frequencies: Tensor | None = None,
    norm: str | None = "head",
    eps: float = 1e-6,
    layout: str = "interleaved",
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Self-attention of a pack with query/key norm and rotation: `varlen_attention(*qk_norm_rope(q, k, ...), v, ...)`.

    Args:
        q, k, v: `[tokens, H, D]`, k and v with Hk heads; one dtype of float32, float64, bfloat16 or float16.
        cu_seqlens, max_seqlen: of `ops.varlen_attention`; max_seqlen must not be less than the longest segment.
        q_weight, k_weight, axes, theta, position_scale, frequencies, eps, layout: of `ops.qk_norm_rope`.
        positions: `[tokens, A]`, such as `packing.Packed.positions`.
        norm: "head" or None. A norm over all heads needs all of them at once: call `qk_norm_rope` for it.
        causal, scale: of `ops.varlen_attention`.
        backend: "triton" (short segments, one kernel), "composed" or "reference".

    Returns:
        `[tokens, H, D]`.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve the call.
    """
    options = _Prologue(q_weight, k_weight, positions, frequencies, axes, theta, position_scale, norm, eps, layout)
    rotation = _check_packed(q, k, v, max_seqlen, options)
    check_scores(causal, scale)
    longest = q.shape[0] if max_seqlen is None else max_seqlen
    chosen = PACKED.select(backend, *_short_facts(q, k, longest, True, options))
    if chosen != "composed":  # which asks `varlen_attention`
        check_offsets("cu_seqlens", cu_seqlens, q, "q")
        if max_seqlen is not None:
            longest_segment("max_seqlen", max_seqlen, cu_seqlens, q.shape[0])
    if chosen == "reference":
        return reference.norm_rope_attention(q, k, v, cu_seqlens, **options.named(), causal=causal, scale=scale)
    if chosen == "triton":
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        cu_seqlens, sides = cu_seqlens.contiguous(), _sides(options, q)
        return short.attend(q, k, v, cu_seqlens, longest, sides, rotation, norm is not None, eps, causal, scale)
    q, k = _turn(q, k, options)
    return varlen_attention(q, k, v, cu_seqlens, None, max_seqlen, causal=causal, scale=scale)
