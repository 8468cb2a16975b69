# SPDX-License-Identifier: Apache-2.0
"""Attention over packed segments (`cu_seqlens`): self and cross, causal or not, grouped query heads."""

from __future__ import annotations

import numbers
from typing import Any

import torch

from vidkernels import dispatch
from vidkernels._reference import varlen_attention as reference
from vidkernels._tracing import active_transform
from vidkernels.errors import DTypeError, OptionError, ShapeError
from vidkernels.ops import _attention_engines as engines
from vidkernels.ops import _short_attention as short
from vidkernels.ops._autograd import distinct, first_order, needs_grad
from vidkernels.ops._checks import (
    check_flag,
    check_floating,
    check_ndim,
    check_number,
    check_same_device,
    check_same_dtype,
    check_size,
    is_unread,
)
from vidkernels.ops._register import define, define_variant

_CALL = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float scale"
_FWD = f"(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)"
_BWD = (
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, {_CALL}, bool need_q, bool need_kv)"
    " -> (Tensor, Tensor, Tensor)"
)
MAX_TRITON_HEAD_DIM = 256


def _fwd_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    torch._check(q.ndim == 3 and k.ndim == 3, lambda: "q, k, v: expected [tokens, heads, head_dim]")
    torch._check(q.shape[2] == k.shape[2] and k.shape == v.shape, lambda: "k, v: expected one shape")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((2, q.shape[1], q.shape[0]), dtype=wide)


def _bwd_fake(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, *call: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch._check(grad_out.shape == q.shape and out.shape == q.shape, lambda: "grad_out, out: expected the shape of q")
    need_q, need_kv = call[-2:]

    def like(x: torch.Tensor, needed: bool) -> torch.Tensor:
        return x.new_empty((x.shape[0] if needed else 0, x.shape[1], x.shape[2]))

    return like(q, need_q), like(k, need_kv), like(v, need_kv)


_LAUNCHERS = "vidkernels.triton.varlen_attention"
define("varlen_attention_fwd", _FWD, _fwd_fake, triton=f"{_LAUNCHERS}:varlen_attention_fwd")
define("varlen_attention_bwd", _BWD, _bwd_fake, triton=f"{_LAUNCHERS}_bwd:varlen_attention_bwd")
_TRACED = "vidkernels.ops._attention_reference"
# For graphs, and for meta tensors, whose offsets nobody can read.
define_variant("varlen_attention_fwd", "reference", _FWD, _fwd_fake, f"{_TRACED}:fwd", ("CPU", "CUDA"))
define_variant("varlen_attention_bwd", "reference", _BWD, _bwd_fake, f"{_TRACED}:bwd", ("CPU", "CUDA"))


def _bare(name: str, chosen: str) -> Any:
    if chosen == "reference":
        return getattr(torch.ops.vidkernels, f"{name}_reference").default
    return dispatch.op(name, chosen)


class _VarlenAttention(torch.autograd.Function):
    """Saves the inputs, the output and two numbers per query and head; scores are recomputed in the backward."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        cu_seqlens_q, cu_seqlens_k, *call, chosen = rest
        keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        out, stats = _bare("varlen_attention_fwd", chosen)(q, k, v, cu_seqlens_q, keys, *call)
        ctx.save_for_backward(q, k, v, out, stats, cu_seqlens_q, cu_seqlens_k)
        ctx.call, ctx.chosen = call, chosen
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        need_kv = need_k or need_v
        bwd = _bare("varlen_attention_bwd", ctx.chosen)
        *saved, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        grads = bwd(short.unit_stride(grad_out), *saved, cu_seqlens_q, keys, *ctx.call, need_q, need_kv)
        grad_q, grad_k, grad_v = grads
        gradients = (grad_q if need_q else None, grad_k if need_k else None, grad_v if need_v else None)
        return (*gradients, *([None] * (len(ctx.call) + 3)))


def check_offsets(name: str, cu_seqlens: torch.Tensor, tokens: torch.Tensor, tokens_name: str) -> None:
    """`cu_seqlens` is int32 `[B + 1]` on the tokens' device; on a CPU also: from 0 to their number, never decreasing."""
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype != torch.int32:
        got = cu_seqlens.dtype if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
        raise DTypeError(name, "an int32 tensor", got, f"Convert it: {name}.to(torch.int32).")
    check_ndim(name, cu_seqlens, 1)
    check_same_device(name, cu_seqlens, tokens_name, tokens)
    if cu_seqlens.shape[0] < 1:
        raise ShapeError(name, "at least the offset 0", "none", "B segments have B + 1 offsets.")
    # On a GPU this would wait for the device; there the offsets are the caller's promise.
    if is_unread(cu_seqlens):
        return
    first, last, total = int(cu_seqlens[0]), int(cu_seqlens[-1]), tokens.shape[0]
    if first != 0 or last != total:
        expected = f"offsets from 0 to the {total} tokens of {tokens_name}"
        raise ShapeError(name, expected, f"{first} to {last}", "Every token belongs to a segment.")
    if cu_seqlens.shape[0] > 1 and bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise ShapeError(
            name, "offsets that never decrease", cu_seqlens.tolist(), "Segments may be empty, not negative."
        )


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> None:
    check_floating("q", q)
    check_ndim("q", q, 3)
    for name, x in (("k", k), ("v", v)):
        check_floating(name, x)
        check_ndim(name, x, 3)
        check_same_dtype(name, x, "q", q)
        check_same_device(name, x, "q", q)
        check_size(name, x, 2, q.shape[2])
    check_size("v", v, 0, k.shape[0])
    check_size("v", v, 1, k.shape[1])
    if q.shape[2] < 1:
        raise ShapeError("q", "a head dimension of at least 1", tuple(q.shape), "The last axis is the head's.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        expected = f"a number of heads that divides the {q.shape[1]} of q"
        raise ShapeError("k", expected, k.shape[1], "Query heads share key heads in equal groups.")
    check_offsets("cu_seqlens_q", cu_seqlens_q, q, "q")
    check_offsets("cu_seqlens_k", cu_seqlens_k, k, "k")
    if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0]:
        expected = f"{cu_seqlens_q.shape[0]} offsets, as cu_seqlens_q"
        raise ShapeError("cu_seqlens_k", expected, cu_seqlens_k.shape[0], "Give every segment its keys, if only none.")


def check_length(name: str, length: int) -> None:
    """``length`` is an int >= 0, also of numpy or of a graph."""
    whole = isinstance(length, (int, torch.SymInt, numbers.Integral)) and not isinstance(length, bool)
    if not whole or not 0 <= length < 2**31:  # offsets are int32
        raise OptionError(name, "an int >= 0", repr(length), "Keep it as a Python int beside cu_seqlens.")


def check_scores(causal: object, scale: object) -> None:
    """What is done to the scores: a mask or none, times a finite number."""
    check_flag("causal", causal)
    if scale is not None:
        check_number("scale", scale)


def longest_segment(name: str, max_seqlen: int | None, cu_seqlens: torch.Tensor, total: int) -> int:
    """The stated length; else the true one on the CPU, and the number of tokens where reading offsets would wait."""
    if max_seqlen is not None:
        check_length(name, max_seqlen)
    if is_unread(cu_seqlens):
        return total if max_seqlen is None else max_seqlen
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if cu_seqlens.shape[0] > 1 else 0
    if max_seqlen is None:
        return longest
    if max_seqlen < longest:
        raise OptionError(
            name, f"at least {longest}, the longest segment", max_seqlen, "Leave it out, or pass a bound."
        )
    return max_seqlen


def _facts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> tuple[Any, ...]:
    own = cu_seqlens_k is None or cu_seqlens_k is cu_seqlens_q
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    max_q = longest_segment("max_seqlen_q", max_seqlen_q, cu_seqlens_q, q.shape[0])
    if own and max_seqlen_k is None:
        max_k = max_q
    else:
        max_k = longest_segment("max_seqlen_k", max_seqlen_k, cu_seqlens_k, k.shape[0])
    check_scores(causal, scale)
    if deterministic is not None:
        check_flag("deterministic", deterministic)
    deterministic = torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
    return q, k, v, max_q, max_k, causal, deterministic, own


def _fits_triton(q: torch.Tensor, *facts: Any) -> str | None:
    return None if q.shape[2] <= MAX_TRITON_HEAD_DIM else f"head_dim {q.shape[2]} exceeds {MAX_TRITON_HEAD_DIM}"


def _fits_short(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, max_q: int, max_k: int, causal: bool, deterministic: bool, own: bool
) -> str | None:  # fmt: skip
    if not own:
        return "q and k have offsets of their own"
    return short.refusal(q, max(max_q, max_k), True) or short.same_heads(q, k)


BACKENDS = dispatch.Dispatcher(
    "varlen_attention",
    facts=_facts,
    rank=engines.rank,
    backends={
        "cpp": dispatch.cpp(),
        **engines.PREDICATES,
        "triton-short": dispatch.triton(check=_fits_short),
        "triton": dispatch.triton(check=_fits_triton),
        "reference": dispatch.always,
    },
)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`softmax(scale * q k^T) v` within every segment of a packed batch; no token attends outside its own segment.

    Segment `i` is rows `cu_seqlens_q[i] : cu_seqlens_q[i + 1]` of q and rows `cu_seqlens_k[i] : cu_seqlens_k[i + 1]` of
    k and v (FlashAttention's varlen layout, Dao, arXiv 2307.08691; Patch n' Pack, Dehghani et al., arXiv 2307.06304).

    Args:
        q: `[total_q, Hq, D]`; any strides with a contiguous last axis cost no copy (slices of a fused qkv).
        k: `[total_k, Hk, D]`; Hk divides Hq, and query head `h` reads key head `h // (Hq / Hk)`.
        v: `[total_k, Hk, D]`.
        cu_seqlens_q: int32 `[B + 1]` on q's device, from 0 to total_q, never decreasing.
        cu_seqlens_k: the same for k and v; None for self-attention.
        max_seqlen_q: longest segment of q, or an upper bound. Without it the CPU reads it from the offsets, and a GPU takes
            total_q. It must not be less than the longest segment: the CPU raises an error, on a GPU rows would be left out.
        max_seqlen_k: longest segment of k, likewise.
        causal: query `i` sees keys `j <= i + Lk - Lq`: aligned at the end (bottom right), as in flash-attn.
        scale: factor on the scores; `D ** -0.5` by default.
        deterministic: gradients equal bit for bit in every run; None follows torch's global setting. It matters only
            to other libraries' backends: all of this package's own are deterministic.
        backend: `auto`, or one that `vidkernels.explain("varlen_attention", ...)` lists.

    Returns:
        `[total_q, Hq, D]`, contiguous, in q's dtype. Queries that see no key get zeros.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: an explicit `backend` cannot serve this call.
    """
    facts = _facts(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal, scale=scale,
        deterministic=deterministic,
    )  # fmt: skip
    chosen = BACKENDS.select(backend, *facts)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if chosen in engines.CALLS:
        return engines.CALLS[chosen](*facts, cu_seqlens_q, keys, scale)
    recorded = torch.compiler.is_compiling() and active_transform() is None
    if chosen == "reference" and not recorded and q.device.type != "meta":
        return reference.varlen_attention(q, k, v, cu_seqlens_q, keys, causal=causal, scale=scale)
    q, k, v = short.unit_stride(q), short.unit_stride(k), short.unit_stride(v)
    if chosen == "triton-short":
        longest = max(facts[3], facts[4])
        return short.attend(q, k, v, cu_seqlens_q.contiguous(), longest, *short.NO_PROLOGUE, causal, scale)
    call = (facts[3], facts[4], causal, scale)
    if not needs_grad(q, k, v):
        return _bare("varlen_attention_fwd", chosen)(q, k, v, cu_seqlens_q.contiguous(), keys.contiguous(), *call)[0]
    other = None if keys is cu_seqlens_q else keys.contiguous()
    return _VarlenAttention.apply(*distinct(q, k, v), cu_seqlens_q.contiguous(), other, *call, chosen)
