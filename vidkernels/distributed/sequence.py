# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism for packed attention: every rank holds a slice of the tokens, attention sees all of them.

DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509): one all-to-all turns slices of tokens into slices of heads, the
packed attention runs on the whole sequence, a second all-to-all turns them back. Nothing but the tail of the sequence is
padded, and the padding is a segment of its own.

    local = distributed.shard_sequence(packed.tokens, group)                  # [n, C], n = ceil(N / ranks)
    out = distributed.ulysses_attention(q, k, v, packed.cu_seqlens, packed.max_seqlen, group=group)   # [n, H, D]
    spans = distributed.local_offsets(packed.cu_seqlens, n, group), distributed.local_text_offsets(text.cu_seqlens)
    cross = ops.varlen_attention(q, text_k, text_v, *spans, n, text.max_seqlen)
    tokens = distributed.gather_sequence(out, total, group)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vidkernels import ops
from vidkernels.distributed._group import Group, resolve
from vidkernels.errors import OptionError, ShapeError
from vidkernels.ops._autograd import first_order
from vidkernels.ops._checks import check_integer, check_ndim, check_same_dtype, check_sizes, is_unread, whole_number

_MAX_NDIM = 8


class _AllToAll(torch.autograd.Function):
    """Part i of axis 0 goes to rank i. The exchange is its own transpose, so the backward is the same exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, grad.contiguous(), group=ctx.group)
        return out, None


def _check_count(name: str, tokens: object) -> None:
    if whole_number(tokens, 0) is None:
        raise OptionError(name, "a number of tokens, at least 0", repr(tokens))


def _check_offsets(cu_seqlens: Tensor) -> None:
    check_integer("cu_seqlens", cu_seqlens)
    check_ndim("cu_seqlens", cu_seqlens, 1)


def _all_gather(x: Tensor, group: Any, ranks: int) -> Tensor:
    out = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


class _Shard(torch.autograd.Function):
    """Slice of a sequence that all ranks hold; backward: every rank gets the gradient of the whole sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, ranks: int, rank: int) -> Tensor:
        ctx.group, ctx.ranks, ctx.total = group, ranks, x.shape[0]
        count = -(-x.shape[0] // ranks)
        part = x[rank * count : (rank + 1) * count]
        padding = [0, 0] * (x.ndim - 1) + [0, count - part.shape[0]]
        return F.pad(part, padding) if part.shape[0] < count else part.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_gather(grad, ctx.group, ctx.ranks)[: ctx.total], None, None, None


class _Gather(torch.autograd.Function):
    """The whole sequence on every rank; backward: each rank takes its slice of the gradient, which all ranks share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, total: int, group: Any, ranks: int, rank: int) -> Tensor:
        ctx.rank, ctx.count = rank, x.shape[0]
        return _all_gather(x, group, ranks)[:total]

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        part = grad[ctx.rank * ctx.count : (ctx.rank + 1) * ctx.count]
        padding = [0, 0] * (grad.ndim - 1) + [0, ctx.count - part.shape[0]]
        return F.pad(part, padding), None, None, None, None


def shard_sequence(x: Tensor, group: Group = None) -> Tensor:
    """This rank's slice of a sequence that every rank holds: `[N, ...]` -> `[ceil(N / ranks), ...]`, zeros at the tail.

    The gradient of `x` is that of the whole sequence on every rank, as if there were one process.
    """
    check_ndim("x", x, 1, _MAX_NDIM)
    group, ranks, rank = resolve(group)
    return x if ranks == 1 else _Shard.apply(x, group, ranks, rank)


def gather_sequence(x: Tensor, total: int, group: Group = None) -> Tensor:
    """The inverse of `shard_sequence`: `[n, ...]` on each rank -> `[total, ...]` on every rank, the tail cut off.

    What follows must be the same computation on every rank, such as one loss over the whole sequence: each rank takes its
    slice of that one gradient, and nothing is summed.
    """
    check_ndim("x", x, 1, _MAX_NDIM)
    _check_count("total", total)
    group, ranks, rank = resolve(group)
    if -(-total // ranks) != x.shape[0]:
        raise ShapeError("total", f"a length whose slices have {x.shape[0]} tokens on {ranks} ranks", total, "")
    return x if ranks == 1 else _Gather.apply(x, total, group, ranks, rank)


def local_offsets(cu_seqlens: Tensor, tokens: int, group: Group = None) -> Tensor:
    """Offsets of the parts of the samples that lie in this rank's slice of `tokens` tokens, int32 `[B + 2]`.

    With them cross-attention needs no communication: each token attends to the whole text of its sample. Samples outside
    the slice are empty segments; the last segment is the padded tail. Append an empty segment to the text's offsets too:
    `local_text_offsets(text.cu_seqlens)`.
    """
    _check_offsets(cu_seqlens)
    _check_count("tokens", tokens)
    _, _, rank = resolve(group)
    inside = (cu_seqlens.long() - rank * tokens).clamp(0, tokens)
    return F.pad(inside.int(), (0, 1), value=tokens)


def local_text_offsets(cu_seqlens: Tensor) -> Tensor:
    """Offsets of the text with an empty segment for the padded tail, the partner of `local_offsets`: int32 `[B + 2]`."""
    _check_offsets(cu_seqlens)
    return torch.cat((cu_seqlens, cu_seqlens[-1:])).int()


def allowed_degrees(heads_q: int, heads_k: int) -> tuple[int, ...]:
    """Numbers of ranks over which these heads can be spread: the divisors of both counts."""
    check_sizes(heads_q=heads_q, heads_k=heads_k)
    common = math.gcd(heads_q, heads_k)
    return tuple(d for d in range(1, common + 1) if common % d == 0)


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    *,
    group: Group = None,
    causal: bool = False,
    scale: float | None = None,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Self-attention of a packed sequence whose tokens are spread over ranks: `ops.varlen_attention` of the whole.

    Args:
        q: `[n, Hq, D]`, this rank's tokens (`shard_sequence`), the same n on every rank.
        k, v: `[n, Hk, D]`. The number of ranks divides Hq and Hk.
        cu_seqlens: int32 `[B + 1]`, offsets of the whole sequence, without padding, the same on every rank.
        max_seqlen: longest sample.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for the default group. One process alone needs none.
        causal, scale, deterministic, backend: of `ops.varlen_attention`.

    Returns:
        `[n, Hq, D]`: this rank's tokens. Padded tokens attend to each other only.

    Raises:
        OptionError: the number of ranks does not divide the heads; the text names those that do.
        ShapeError, DTypeError: the slices or offsets do not fit each other.
    """
    group, ranks, _ = resolve(group)
    options: dict[str, Any] = {"causal": causal, "scale": scale, "deterministic": deterministic, "backend": backend}
    if ranks == 1:
        return ops.varlen_attention(q, k, v, cu_seqlens, None, max_seqlen, **options)
    _check_offsets(cu_seqlens)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_ndim(name, x, 3)
        if x.shape[0] != q.shape[0] or x.shape[2] != q.shape[2] or x.shape[1] != (q if x is q else k).shape[1]:
            raise ShapeError(name, "[tokens, heads, head_dim] with the tokens of q", tuple(x.shape), "Shard all alike.")
        check_same_dtype(name, x, "q", q)  # one exchange would quietly widen all three
    heads_q, heads_k = q.shape[1], k.shape[1]
    if heads_q % ranks or heads_k % ranks:
        degrees = ", ".join(map(str, allowed_degrees(heads_q, heads_k)))
        expected = f"a number of ranks that divides {heads_q} query heads and {heads_k} key heads: {degrees}"
        raise OptionError("group", expected, ranks, "Use such a group, or split the batch over the other ranks.")
    n, dim = q.shape[0], q.shape[2]
    if cu_seqlens.numel() and not is_unread(cu_seqlens) and -(-int(cu_seqlens[-1]) // ranks) != n:
        expected = f"offsets of a sequence whose slices have {n} tokens on {ranks} ranks"
        raise ShapeError("cu_seqlens", expected, int(cu_seqlens[-1]), "They are those of the whole sequence.")
    # One exchange for all three: [ranks, n, heads of one rank, D], of q, then k, then v.
    parts = [x.unflatten(1, (ranks, -1)) for x in (q, k, v)]
    heads = _AllToAll.apply(torch.cat(parts, dim=2).transpose(0, 1).contiguous(), group).flatten(0, 1)
    whole_q, whole_k, whole_v = heads.split((heads_q // ranks, heads_k // ranks, heads_k // ranks), dim=1)
    # The tail is a segment of its own, of at most ranks - 1 tokens; empty where nothing was padded.
    padded = F.pad(cu_seqlens, (0, 1), value=ranks * n)
    longest = None if max_seqlen is None else max(max_seqlen, ranks - 1)
    out = ops.varlen_attention(whole_q, whole_k, whole_v, padded, None, longest, **options)
    back = _AllToAll.apply(out.view(ranks, n, heads_q // ranks, dim), group)
    return back.transpose(0, 1).reshape(n, heads_q, dim)
