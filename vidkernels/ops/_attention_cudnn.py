# SPDX-License-Identifier: Apache-2.0
"""cuDNN's attention on ragged tensors, through the Python graphs of nvidia-cudnn-frontend.

A graph is built for a number of segments, lengths rounded up to `ROUND` and the strides of its tensors, and kept. Offsets
are data: new lengths of the same rounded maxima run on the same graph.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch

from vidkernels import cudnn
from vidkernels.ops._autograd import first_order, needs_grad
from vidkernels.ops._short_attention import unit_stride

ROUND = 256
(
    Q, K, V, OUT, STATS, GRAD_OUT, GRAD_Q, GRAD_K, GRAD_V, LENGTH_Q, LENGTH_K, AT_Q, AT_K, AT_V, AT_OUT, AT_GRAD_OUT,
    AT_GRAD_K,
) = range(1, 18)  # fmt: skip


class Side(NamedTuple):
    """One ragged tensor of a graph: `heads` of `rows` rows a segment, and its strides."""

    heads: int
    rows: int
    token_stride: int
    head_stride: int

    @classmethod
    def of(cls, x: torch.Tensor, rows: int) -> Side:
        return cls(x.shape[1], rows, x.stride(0), x.stride(1))


class Problem(NamedTuple):
    """What a graph depends on."""

    device: torch.device
    dtype: torch.dtype
    segments: int
    head_dim: int
    q: Side
    k: Side
    v: Side
    grad_out: Side | None  # None: a forward graph
    wide_offsets: bool
    causal: bool
    own: bool  # q and k have the same segments
    scale: float
    training: bool
    deterministic: bool

    def out(self) -> Side:
        """Outputs and the gradient of q are contiguous."""
        return Side(self.q.heads, self.q.rows, self.q.heads * self.head_dim, self.head_dim)

    def grad_k(self) -> Side:
        return Side(self.k.heads, self.k.rows, self.k.heads * self.head_dim, self.head_dim)


class _Plan(NamedTuple):
    graph: Any
    workspace: int


class _Builder:
    """A graph under construction: its tensors by number, each ragged offset declared once."""

    def __init__(self, problem: Problem, handle: Any) -> None:
        self.cudnn = importlib.import_module("cudnn")
        self.problem, types = problem, self.cudnn.data_type
        self.type = types.BFLOAT16 if problem.dtype == torch.bfloat16 else types.HALF
        self.graph = self.cudnn.pygraph(
            io_data_type=self.type, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT, handle=handle
        )

    def shape(self, side: Side) -> tuple[list[int], list[int]]:
        dims = [self.problem.segments, side.heads, side.rows, self.problem.head_dim]
        return dims, [side.rows * side.token_stride, side.head_stride, side.token_stride, 1]

    def numbers(self, uid: int, count: int, wide: bool) -> Any:
        kind = self.cudnn.data_type.INT64 if wide else self.cudnn.data_type.INT32
        return self.graph.tensor(dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind, uid=uid)

    def offset(self, uid: int) -> Any:
        return self.numbers(uid, self.problem.segments + 1, self.problem.wide_offsets)

    def operand(self, uid: int, side: Side, offset: Any) -> Any:
        dims, strides = self.shape(side)
        found = self.graph.tensor(dim=dims, stride=strides, data_type=self.type, uid=uid)
        found.set_ragged_offset(offset)
        return found

    def result(self, found: Any, uid: int, side: Side, offset: Any) -> None:
        dims, strides = self.shape(side)
        found.set_output(True).set_uid(uid).set_dim(dims).set_stride(strides).set_data_type(self.type)
        found.set_ragged_offset(offset)

    def options(self) -> dict[str, Any]:
        """Arguments that forward and backward share."""
        align, segments = self.cudnn.diagonal_alignment, self.problem.segments
        found = {
            "attn_scale": self.problem.scale,
            "use_padding_mask": True,
            "seq_len_q": self.numbers(LENGTH_Q, segments, False),
            "seq_len_kv": self.numbers(LENGTH_K, segments, False),
        }
        if self.problem.causal:
            found["diagonal_alignment"] = align.TOP_LEFT if self.problem.own else align.BOTTOM_RIGHT
            found["diagonal_band_right_bound"] = 0
        return found

    def stats(self) -> tuple[list[int], list[int]]:
        heads, rows = self.problem.q.heads, self.problem.q.rows
        return [self.problem.segments, heads, rows, 1], [heads * rows, rows, 1, 1]


@functools.lru_cache(maxsize=64)
def _plan(problem: Problem) -> _Plan:
    """The built graph of a problem: forward, or backward if it has a gradient."""
    build = _Builder(problem, cudnn.thread_handle(problem.device.index))
    at_out = build.offset(AT_OUT)
    q = build.operand(Q, problem.q, build.offset(AT_Q))
    k = build.operand(K, problem.k, build.offset(AT_K))
    v = build.operand(V, problem.v, build.offset(AT_V))
    dims, strides = build.stats()
    single = build.cudnn.data_type.FLOAT
    if problem.grad_out is None:
        out, stats = build.graph.sdpa(q=q, k=k, v=v, generate_stats=problem.training, **build.options())
        build.result(out, OUT, problem.out(), at_out)
        if problem.training:
            stats.set_output(True).set_uid(STATS).set_dim(dims).set_stride(strides).set_data_type(single)
    else:
        at_grad_k = build.offset(AT_GRAD_K)
        grads = build.graph.sdpa_backward(
            q=q,
            k=k,
            v=v,
            o=build.operand(OUT, problem.out(), at_out),
            dO=build.operand(GRAD_OUT, problem.grad_out, build.offset(AT_GRAD_OUT)),
            stats=build.graph.tensor(dim=dims, stride=strides, data_type=single, uid=STATS),
            use_deterministic_algorithm=problem.deterministic,
            **build.options(),
        )
        build.result(grads[0], GRAD_Q, problem.out(), at_out)
        build.result(grads[1], GRAD_K, problem.grad_k(), at_grad_k)
        build.result(grads[2], GRAD_V, problem.grad_k(), at_grad_k)
    build.graph.build([build.cudnn.heur_mode.A, build.cudnn.heur_mode.FALLBACK])
    return _Plan(build.graph, build.graph.get_workspace_size())


def _run(
    problem: Problem, tensors: dict[int, torch.Tensor], cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> None:
    """Execute the plan on the current stream; offsets in elements and lengths are made on the device, without a wait."""
    kind = torch.int64 if problem.wide_offsets else torch.int32
    starts = {AT_Q: problem.q, AT_OUT: problem.out()}, {AT_K: problem.k, AT_V: problem.v}
    if problem.grad_out is not None:
        starts[0][AT_GRAD_OUT], starts[1][AT_GRAD_K] = problem.grad_out, problem.grad_k()
    for offsets, sides in zip((cu_seqlens_q, cu_seqlens_k), starts, strict=True):
        tensors |= {uid: offsets.to(kind) * side.token_stride for uid, side in sides.items()}
    tensors |= {LENGTH_Q: cu_seqlens_q.diff(), LENGTH_K: cu_seqlens_k.diff()}
    with torch.cuda.device_of(cu_seqlens_q):  # a handle belongs to the device that is current when it is made
        plan = _plan(problem)
        workspace = torch.empty(max(plan.workspace, 1), dtype=torch.uint8, device=problem.device)
        plan.graph.execute(tensors, workspace, handle=cudnn.thread_handle(problem.device.index))


def _rounded(length: int) -> int:
    return -(-max(length, 1) // ROUND) * ROUND


class CudnnAttention(torch.autograd.Function):
    """Saves inputs, output and one statistic per query, head and rounded length."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        max_q, max_k, causal, deterministic, own, cu_seqlens_q, cu_seqlens_k, scale, training = rest
        rows_q, rows_k = _rounded(max_q), _rounded(max_k)
        wide = max(x.shape[0] * x.stride(0) for x in (q, k, v)) >= 2**31
        problem = Problem(
            q.device, q.dtype, cu_seqlens_q.shape[0] - 1, q.shape[2], Side.of(q, rows_q), Side.of(k, rows_k),
            Side.of(v, rows_k), None, wide, causal, own, scale, training, deterministic,
        )  # fmt: skip
        # Zeros: rows of segments without keys are not written.
        out = q.new_zeros(q.shape)
        tensors = {Q: q, K: k, V: v, OUT: out}
        if training:
            tensors[STATS] = q.new_empty((problem.segments, q.shape[1], rows_q, 1), dtype=torch.float32)
        _run(problem, dict(tensors), cu_seqlens_q, cu_seqlens_k)
        if training:
            ctx.save_for_backward(q, k, v, out, tensors[STATS], cu_seqlens_q, cu_seqlens_k)
            ctx.problem = problem
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, stats, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        problem = ctx.problem._replace(grad_out=Side.of(grad_out, ctx.problem.q.rows))
        grads = [x.new_zeros(x.shape) for x in (q, k, v)]
        tensors = {Q: q, K: k, V: v, OUT: out, STATS: stats, GRAD_OUT: grad_out}
        tensors |= {GRAD_Q: grads[0], GRAD_K: grads[1], GRAD_V: grads[2]}
        _run(problem, tensors, cu_seqlens_q, cu_seqlens_k)
        return (*grads, *([None] * 9))


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    deterministic: bool,
    own: bool,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`varlen_attention` by cuDNN: arguments of `_attention_engines.CALLS`."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    training = needs_grad(q, k, v)
    call = (max_q, max_k, causal, deterministic, own, cu_seqlens_q, cu_seqlens_k, scale, training)
    return CudnnAttention.apply(q, k, v, *call)
