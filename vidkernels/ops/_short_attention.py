# SPDX-License-Identifier: Apache-2.0
"""Bare ops of the short-segment kernels and their autograd: used by `axial_attention`, `norm_rope_attention` and
`varlen_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidkernels import dispatch
from vidkernels.ops._autograd import distinct, first_order, needs_grad
from vidkernels.ops._register import define
from vidkernels.triton._device import family

_CALL = (
    "Tensor? cu_seqlens, SymInt longest, Tensor? q_weight, Tensor? k_weight, Tensor? positions, Tensor? frequencies,"
    " int[] axes, float[] theta, float[] position_scale, bool norm, float eps, bool causal, float scale"
)


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> Tensor:
    torch._check(q.shape == k.shape and k.shape == v.shape, lambda: "q, k, v: expected one shape")
    return q.new_empty(q.shape)


def _bwd_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    longest: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *call: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch._check(grad_out.shape == q.shape, lambda: "grad_out: expected the shape of q")
    dq_weight, dk_weight = (q.new_empty(0) if w is None else w.new_empty(w.shape) for w in (q_weight, k_weight))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dq_weight, dk_weight


define(
    "short_attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_CALL}) -> Tensor",
    _fwd_fake,
    triton="vidkernels.triton.short_attention:short_attention_fwd",
)
define(
    "short_attention_bwd",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    triton="vidkernels.triton.short_attention_bwd:short_attention_bwd",
)


def unit_stride(x: Tensor) -> Tensor:
    """x with neighbouring channels in neighbouring memory, as kernels of attention read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def longest_segment(head_dim: int, device_family: str) -> int:
    """Rows of a tile of the backward, whole segments at a time; equal to the launcher's (a test compares them)."""
    if head_dim > 128:
        return 0
    wide = head_dim > 64 and not (head_dim <= 80 and device_family == "sm_90")
    return 32 if wide or device_family == "amd" else 64


def refusal(q: Tensor, longest: int, packed: bool) -> str | None:
    """Why the kernels cannot hold these segments whole, or None."""
    if q.dtype == torch.float32 and q.device.type == "cuda":
        return "float32 products run on the plain units, where two passes are as fast"
    limit = longest_segment(q.shape[-1], family(q.device))
    if limit == 0:
        return f"head_dim {q.shape[-1]} exceeds 128"
    if packed and longest > limit // 2:  # tiles begin every limit - longest + 1 tokens: beyond half most are empty
        return f"segments of {longest} tokens exceed {limit // 2}, half of a tile"
    if longest > limit:
        return f"segments of {longest} tokens exceed the {limit} rows of a tile"
    if packed and torch.version.hip is not None:
        return "the search for packed rows spills on AMD"
    return None


def same_heads(q: Tensor, k: Tensor) -> str | None:
    """Why the kernels, which turn a head of q with its own head of k, cannot serve grouped heads, or None."""
    return None if q.shape[-2] == k.shape[-2] else f"q has {q.shape[-2]} heads and k {k.shape[-2]}"


Rotation = tuple[list[int], list[float], list[float]]
# sides, rotation, norm and eps of `attend` for plain attention
NO_PROLOGUE: tuple[tuple[None, None, None, None], Rotation, bool, float] = (
    (None, None, None, None),
    ([], [], []),
    False,
    0.0,
)


class _ShortAttention(torch.autograd.Function):
    """Saves the inputs alone: a tile holds whole segments, so the backward repeats the softmax from them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        cu_seqlens, longest, q_weight, k_weight, positions, frequencies, *options = rest
        ctx.save_for_backward(q, k, v, cu_seqlens, q_weight, k_weight, positions, frequencies)
        ctx.longest, ctx.options = longest, options
        fwd = dispatch.op("short_attention_fwd", "triton")
        return fwd(q, k, v, *rest)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens, *sides = ctx.saved_tensors
        bwd = dispatch.op("short_attention_bwd", "triton")
        grads = bwd(unit_stride(grad_out), q, k, v, cu_seqlens, ctx.longest, *sides, *ctx.options)
        needed = ctx.needs_input_grad
        first = [grad if needed[i] else None for i, grad in enumerate(grads[:3])]
        weights = [grad if needed[5 + i] else None for i, grad in enumerate(grads[3:])]
        return (*first, None, None, *weights, *([None] * (2 + len(ctx.options))))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    longest: int,
    sides: Sequence[Tensor | None],
    rotation: Rotation,
    norm: bool,
    eps: float,
    causal: bool,
    scale: float,
) -> Tensor:
    """Call the kernels on `[outer, L, inner, H, D]`, or packed `[tokens, H, D]`.

    `sides`: the two weights, positions and frequencies.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    call: tuple[Any, ...] = (longest, *sides, *rotation, norm, eps, causal, scale)
    if not needs_grad(q, k, v, *sides[:2]):
        return dispatch.op("short_attention_fwd", "triton")(q, k, v, cu_seqlens, *call)
    longest, q_weight, k_weight, *others = call
    q, k, v, q_weight, k_weight = distinct(q, k, v, q_weight, k_weight)
    return _ShortAttention.apply(q, k, v, cu_seqlens, longest, q_weight, k_weight, *others)
