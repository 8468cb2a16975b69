# SPDX-License-Identifier: Apache-2.0
"""Query/key RMSNorm and 3D rotary embedding in one pass over q and k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidkernels import _signature, dispatch
from vidkernels._reference import qk_norm_rope as reference
from vidkernels.errors import OptionError
from vidkernels.ops._autograd import distinct, first_order, needs_grad
from vidkernels.ops._checks import check_eps, check_flag, may_overlap, starts_alike
from vidkernels.ops._qk_norm_rope_checks import LAYOUTS, NORMS, check_arguments, check_rotation
from vidkernels.ops._register import define

_ROTATION = "Tensor? positions, Tensor? frequencies, int[] axes, float[] theta, float[] position_scale"
_TAIL = f"Tensor? q_weight, Tensor? k_weight, {_ROTATION}, int norm, float eps, int layout"


def _check_sides(q: Tensor, k: Tensor) -> None:
    torch._check(q.ndim in (3, 4) and k.ndim == q.ndim, lambda: "q and k: expected [tokens, H, D] or [B, T, H, D]")
    torch._check(q.shape[:-2] == k.shape[:-2], lambda: "k: expected the tokens of q")
    torch._check(q.shape[-1] == k.shape[-1], lambda: "k: expected the head dimension of q")


def _fwd_fake(q: Tensor, k: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    _check_sides(q, k)
    return torch.empty_like(q), torch.empty_like(k)


def _inplace_fake(q: Tensor, k: Tensor, *options: Any) -> None:
    _check_sides(q, k)


def _bwd_fake(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_sides(q, k)
    torch._check(dq.shape == q.shape and dk.shape == k.shape, lambda: "dq, dk: expected the shapes of q and k")
    wanted = options[-1]
    dq_weight = torch.empty_like(q_weight) if wanted and q_weight is not None else q.new_empty(0)
    dk_weight = torch.empty_like(k_weight) if wanted and k_weight is not None else k.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), dq_weight, dk_weight


_LAUNCHERS = "vidkernels.triton.qk_norm_rope"
define(
    "qk_norm_rope_fwd",
    f"(Tensor q, Tensor k, {_TAIL}) -> (Tensor, Tensor)",
    _fwd_fake,
    triton=f"{_LAUNCHERS}:qk_norm_rope_fwd",
)
define(
    "qk_norm_rope_", f"(Tensor(a!) q, Tensor(b!) k, {_TAIL}) -> ()", _inplace_fake, triton=f"{_LAUNCHERS}:qk_norm_rope_"
)
define(
    "qk_norm_rope_bwd",
    f"(Tensor dq, Tensor dk, Tensor q, Tensor k, {_TAIL}, bool weight_grads) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    triton=f"{_LAUNCHERS}_bwd:qk_norm_rope_bwd",
)


class _Options(NamedTuple):
    """Options in the form and order of the bare ops' schema, after `frequencies`."""

    axes: list[int]  # rotated dimensions per axis; all of them in one entry with a frequency table
    theta: list[float]
    position_scale: list[float]
    norm: int
    eps: float
    layout: int


class _QkNormRope(torch.autograd.Function):
    """Saves q and k themselves and repeats the norm's reduction in the backward: no statistics, no rotated copies."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        positions: Tensor | None,
        frequencies: Tensor | None,
        options: tuple[Any, ...],
        chosen: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, q_weight, k_weight, positions, frequencies)
        ctx.options, ctx.chosen = options, chosen
        outputs = dispatch.op("qk_norm_rope_fwd", chosen)(q, k, q_weight, k_weight, positions, frequencies, *options)
        learned = ctx.needs_input_grad[0] or ctx.needs_input_grad[2], ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        # or attention would compute the gradient of a frozen side for nothing
        ctx.mark_non_differentiable(*(y for y, needed in zip(outputs, learned, strict=True) if not needed))
        return outputs

    @staticmethod
    @first_order
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        q, k, q_weight, k_weight, positions, frequencies = ctx.saved_tensors
        need_q, need_k, need_q_weight, need_k_weight = ctx.needs_input_grad[:4]
        # A side whose gradients nobody wants is passed with no heads: the kernel then does no work for it.
        if not (need_q or need_q_weight):
            q, dq, q_weight = q[..., :0, :], dq[..., :0, :], None
        if not (need_k or need_k_weight):
            k, dk, k_weight = k[..., :0, :], dk[..., :0, :], None
        weight_grads = need_q_weight or need_k_weight
        sides = _unit_stride(dq), _unit_stride(dk), q, k
        bwd = dispatch.op("qk_norm_rope_bwd", ctx.chosen)
        gradients = bwd(*sides, q_weight, k_weight, positions, frequencies, *ctx.options, weight_grads)
        needed = (need_q, need_k, need_q_weight, need_k_weight)
        return (*(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)), None, None, None, None)


def _unit_stride(x: Tensor) -> Tensor:
    """x with neighbouring channels in neighbouring memory, and so that a tensor like it has them there, too: of windows over
    one memory (`unfold`), where another axis has stride 1 as well, it would have not."""
    steps = x.stride()
    return x if steps[-1] == 1 and 1 not in steps[:-1] else x.contiguous()


def _written(original: Tensor, written: Tensor) -> None:
    """Bring home what a kernel wrote in place."""
    if written is not original:  # kernels need neighbouring channels in neighbouring memory; this side was a copy
        original.copy_(written)
    elif not torch.compiler.is_compiling() and not original.is_inference():
        torch.autograd.graph.increment_version(original)  # or autograd would read what was saved before as unchanged


def _check_inplace(q: Tensor, k: Tensor | None, recorded: bool) -> None:
    """q and k can be overwritten."""
    if recorded:
        raise OptionError(
            "inplace", "False while gradients are recorded", True, "The backward needs q and k: use torch.no_grad()."
        )
    for name, x in (("q", q), ("k", k)):
        if x is not None and may_overlap(x):
            raise OptionError("inplace", f"False for an expanded {name}", f"strides {x.stride()}", f"Clone {name}.")
    if k is not None and q.numel() and starts_alike(q, k):
        raise OptionError("inplace", "False for q and k in the same memory", True, "Clone one of them.")


def _facts(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    axes: Sequence[int] | None = None,
    theta: float | Sequence[float] = 10000.0,
    position_scale: float | Sequence[float] = 1.0,
    frequencies: Tensor | None = None,
    norm: str | None = "head",
    eps: float = 1e-6,
    layout: str = "interleaved",
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Any, ...]:
    check_arguments(q, k, q_weight, k_weight, norm, layout)
    check_eps(eps)
    check_rotation(q, k, positions, axes, theta, position_scale, frequencies, layout)
    return _call_facts(q, k, positions, frequencies)


def _call_facts(q: Tensor, k: Tensor | None, positions: Tensor | None, frequencies: Tensor | None) -> tuple[Any, ...]:
    widest = q.shape[-1] * max(q.shape[-2], 0 if k is None else k.shape[-2])
    return q, widest, needs_grad(positions, frequencies)


def _no_angle_gradient(q: Tensor, widest: int, learned_angles: bool) -> str | None:
    return "gradients of positions and frequencies are computed by the reference only" if learned_angles else None


# One block holds one side of a token: 512 threads of 16 channels.
_SIDE_CHANNELS = 512 * 16


def _block_limits(q: Tensor, widest: int, learned_angles: bool) -> str | None:
    if q.shape[-1] % 2 or q.shape[-1] > 256:
        return f"it needs an even head dimension of at most 256, got {q.shape[-1]}"
    if widest > _SIDE_CHANNELS:
        return f"it holds one side of a token in a block, at most {_SIDE_CHANNELS} channels, got {widest}"
    return _no_angle_gradient(q, widest, learned_angles)


def _even_head(q: Tensor, widest: int, learned_angles: bool) -> str | None:
    if q.shape[-1] % 2:
        return f"it needs an even head dimension, got {q.shape[-1]}"
    return _no_angle_gradient(q, widest, learned_angles)


BACKENDS = dispatch.Dispatcher(
    "qk_norm_rope",
    facts=_facts,
    backends={
        "cpp": dispatch.cpp(check=_no_angle_gradient),
        "cuda": dispatch.cuda(check=_block_limits),
        "triton": dispatch.triton(check=_even_head),
        "reference": dispatch.always,
    },
)
_DECISIONS = _signature.Memo()


def kernel_weight(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """Kernels read contiguous weights in the dtype of x or in float32."""
    if weight is None:
        return None
    if weight.dtype not in (x.dtype, torch.float32):
        weight = weight.to(x.dtype if x.dtype == torch.float64 else torch.float32)
    return weight.contiguous()


def kernel_frequencies(positions: Tensor | None, frequencies: Tensor | None) -> Tensor | None:
    """Kernels read a contiguous table in float32 or float64."""
    if positions is None or frequencies is None:
        return None
    wide = frequencies.detach()
    return (wide if wide.dtype in (torch.float32, torch.float64) else wide.float()).contiguous()


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    axes: Sequence[int] | None = None,
    theta: float | Sequence[float] = 10000.0,
    position_scale: float | Sequence[float] = 1.0,
    frequencies: Tensor | None = None,
    norm: str | None = "head",
    eps: float = 1e-6,
    layout: str = "interleaved",
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`y = R(angle) (weight * x / sqrt(mean(x**2) + eps))` for x = q and x = k, in one launch.

    Pair p of a head's channels turns by the angle `position[a] * position_scale[a] * theta[a]**(-2i/d_a)`, where a is the pair's axis,
    d_a the axis's rotated dimensions and i the pair's index within the axis. Norm and rotation run in float32 (float64 for
    float64), angles are exact to float32's rounding at any position below 2**24, and the result is rounded once.

    Args:
        q: `[tokens, H, D]` (packed) or `[B, T, H, D]`, any strides.
        k: the same with its own number of heads, or None.
        q_weight, k_weight: norm weights, `[D]` for norm="head", `[H * D]` for norm="full"; None for no weight.
        positions: `[tokens, A]`, `[T, A]` (shared by the batch) or `[B, T, A]`, A = 1 to 3 axes, e.g. (t, h, w); int32, int64,
            float32 or float64. None: no rotation. A token at position 0 is not rotated (text tokens).
        axes: rotated dimensions per axis, even, together at most D; the rest of the head is not rotated. None: `D - 2(A-1)c` and
            `2c` for the other axes, `c = D // (2 A)` (Wan's split).
        theta: base of the frequencies, one or one per axis.
        position_scale: factor on the positions, one or one per axis (e.g. Cosmos: `base_fps / fps` in time).
        frequencies: instead of axes, theta and position_scale, radians per unit of position, `[A, P]` or one table per head `[A, H, P]`;
            pair p turns by the sum over axes of position times frequency (LTX, Mochi, tables kept in a checkpoint).
        norm: "head" (mean over D), "full" (mean over H * D) or None.
        eps: added to the mean square.
        layout: pairs are "interleaved" (2p, 2p+1), "half" (p, p+P over all axes) or "axis_half" (halves inside each axis).
        inplace: overwrite q and k and return them; only without gradients.
        backend: "auto", "cpp", "cuda", "triton" or "reference".

    Returns:
        New q and k in the memory format of the inputs; None for k if it was None.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit; nothing was written.
        BackendUnavailable: the named backend cannot serve the call.

    Sources: RoFormer (arXiv 2104.09864); query/key RMSNorm and 3D rotation as in Wan, HunyuanVideo, Goku, Cosmos.
    """
    given = (axes, theta, position_scale, norm, eps, layout, backend)
    key = known = None
    if not torch.compiler.is_compiling():  # before anything that graphs would be guarded by
        key = _signature.signature(given, q, k, q_weight, k_weight, positions, frequencies)
        if key is not None:
            key = key, needs_grad(positions, frequencies)
            known = _DECISIONS.get(key)
    rotation: tuple[list[int], list[float], list[float]]
    if known is not None:
        rotation, chosen = known
    else:
        check_arguments(q, k, q_weight, k_weight, norm, layout)
        check_eps(eps)
        rotation = check_rotation(q, k, positions, axes, theta, position_scale, frequencies, layout)
    recorded = needs_grad(q, k, q_weight, k_weight, positions, frequencies)
    check_flag("inplace", inplace)
    if inplace:
        _check_inplace(q, k, recorded)
    if known is None:
        chosen = BACKENDS.select(backend, *_call_facts(q, k, positions, frequencies))
        if key is not None and chosen != "reference":
            _DECISIONS.keep(key, given, (rotation, chosen))
    if chosen == "reference":
        return reference.qk_norm_rope(
            q, k, q_weight, k_weight, positions, axes=axes, theta=theta, position_scale=position_scale, frequencies=frequencies,
            norm=norm, eps=eps, layout=layout, inplace=inplace,
        )  # fmt: skip
    options = _Options(*rotation, NORMS.index(norm), eps, LAYOUTS.index(layout))
    keys = q[..., :0, :] if k is None else k
    sides = _unit_stride(q), _unit_stride(keys)
    weights = kernel_weight(q_weight, q), kernel_weight(k_weight, keys)
    if positions is not None and positions.requires_grad:
        positions = positions.detach()
    rest = (*weights, positions, kernel_frequencies(positions, frequencies))
    if inplace:
        dispatch.op("qk_norm_rope_", chosen)(*sides, *rest, *options)
        for original, written in zip((q, keys), sides, strict=True):
            _written(original, written)
        return q, k
    if recorded:
        q_out, k_out = _QkNormRope.apply(*distinct(*sides, *rest), tuple(options), chosen)
    else:
        q_out, k_out = dispatch.op("qk_norm_rope_fwd", chosen)(*sides, *rest, *options)
    return q_out, None if k is None else k_out
