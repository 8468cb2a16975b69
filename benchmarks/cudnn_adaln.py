# SPDX-License-Identifier: Apache-2.0
"""cuDNN's adaptive layer norm as a contestant: a graph of one node for the forward and one for the backward.

The node computes `scale * normalised + bias` with float32 rows `[B, 1, C]`, so each call makes `1 + scale` in float32 first,
as a model would have to. Whatever cuDNN refuses is raised, and becomes the row's text.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks import peers
from benchmarks.registry import Function, Inputs

X, SCALE, BIAS, Y, MEAN, RSTD, DY, DX, DSCALE, DBIAS = range(1, 11)  # names of the tensors in a graph
EPSILON = 11
EPS = 1e-6
_DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", torch.float32: "FLOAT"}
Shape = tuple[int, int, int]


def _graph(cudnn: Any, shape: Shape, dtype: torch.dtype, target: dict[str, Any]) -> tuple[Any, Any]:
    """An empty graph, and a maker of its tensors `[B, rows, columns]` from a uid."""
    kinds = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=getattr(kinds, _DTYPES[dtype]),
        intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
        **target,
    )
    batch, tokens, channels = shape
    sizes = {
        SCALE: (batch, 1, channels),
        BIAS: (batch, 1, channels),
        MEAN: (batch, tokens, 1),
        RSTD: (batch, tokens, 1),
    }

    def tensor(uid: int) -> Any:
        size = sizes.get(uid, shape)
        kind = kinds.FLOAT if uid in sizes else getattr(kinds, _DTYPES[dtype])
        made = graph.tensor(name=f"t{uid}", dim=list(size), stride=[size[1] * size[2], size[2], 1], data_type=kind)
        return made.set_uid(uid)

    return graph, tensor


def _planned(cudnn: Any, graph: Any, outputs: dict[int, Any], wide: tuple[int, ...]) -> Any:
    for uid, output in outputs.items():
        output.set_output(True).set_uid(uid)
        if uid in wide:
            output.set_data_type(cudnn.data_type.FLOAT)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph


def forward_graph(shape: Shape, dtype: torch.dtype, training: bool, **target: Any) -> Any:
    """The forward, with mean and inverse deviation as outputs if training. `target`: `handle=` or `device_property=`."""
    import cudnn

    graph, tensor = _graph(cudnn, shape, dtype, target)
    phase = cudnn.norm_forward_phase
    epsilon = graph.tensor(
        name="epsilon", dim=[1, 1, 1], stride=[1, 1, 1], data_type=cudnn.data_type.FLOAT, is_pass_by_value=True
    ).set_uid(EPSILON)
    y, mean, rstd = graph.adalayernorm(
        name="adaln", norm_forward_phase=phase.TRAINING if training else phase.INFERENCE,
        input=tensor(X), scale=tensor(SCALE), bias=tensor(BIAS), epsilon=epsilon,
    )  # fmt: skip
    outputs = {Y: y, MEAN: mean, RSTD: rstd} if training else {Y: y}
    return _planned(cudnn, graph, outputs, (MEAN, RSTD))


def backward_graph(shape: Shape, dtype: torch.dtype, **target: Any) -> Any:
    """The backward: gradients of x, of the scale's rows and of the bias's rows."""
    import cudnn

    graph, tensor = _graph(cudnn, shape, dtype, target)
    dx, dscale, dbias = graph.adalayernorm_backward(
        name="adaln_backward", grad=tensor(DY), input=tensor(X), scale=tensor(SCALE), mean=tensor(MEAN),
        inv_variance=tensor(RSTD),
    )  # fmt: skip
    return _planned(cudnn, graph, {DX: dx, DSCALE: dscale, DBIAS: dbias}, (DSCALE, DBIAS))


@functools.lru_cache(maxsize=1)
def _epsilon() -> torch.Tensor:
    return torch.full((1, 1, 1), EPS)  # passed by value, so it stays on the host


@functools.lru_cache(maxsize=64)
def _ready(kind: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, torch.Tensor]:
    """A graph that has been planned on the device, and its workspace. Backward passes run in a thread of their own."""
    handle = _handle(device)
    if kind == "backward":
        graph = backward_graph(shape, dtype, handle=handle)
    else:
        graph = forward_graph(shape, dtype, kind == "training", handle=handle)
    return graph, torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device=device)


@functools.lru_cache(maxsize=8)
def _handle(device: torch.device) -> Any:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


def _run(kind: str, x: torch.Tensor, tensors: dict[int, torch.Tensor]) -> None:
    import cudnn

    batch, tokens, channels = x.shape
    graph, workspace = _ready(kind, (batch, tokens, channels), x.dtype, x.device)
    handle = _handle(x.device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(x.device).cuda_stream)
    graph.execute(tensors, workspace, handle=handle)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        training = any(ctx.needs_input_grad)
        wide = (1 + scale.float())[:, None]
        y = torch.empty_like(x)
        tensors = {X: x, SCALE: wide, BIAS: shift.float()[:, None], Y: y, EPSILON: _epsilon()}
        if training:
            mean, rstd = x.new_empty((2, *x.shape[:2], 1), dtype=torch.float32)
            tensors |= {MEAN: mean, RSTD: rstd}
            ctx.save_for_backward(x, wide, mean, rstd)
            ctx.rows = shift.dtype
        _run("training" if training else "inference", x, tensors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, wide, mean, rstd = ctx.saved_tensors
        dx, (dscale, dshift) = torch.empty_like(x), wide.new_empty((2, *wide.shape))
        tensors = {
            DY: dy.contiguous(),
            X: x,
            SCALE: wide,
            MEAN: mean,
            RSTD: rstd,
            DX: dx,
            DSCALE: dscale,
            DBIAS: dshift,
        }
        _run("backward", x, tensors)
        return dx, dshift[:, 0].to(ctx.rows), dscale[:, 0].to(ctx.rows)


def modulate(i: Inputs) -> torch.Tensor:
    """`layer_norm(x) * (1 + scale) + shift`, for x `[B, N, C]` and rows `[B, C]`."""
    result: torch.Tensor = _Modulate.apply(i["x"], i["shift"], i["scale"])
    return result


def peer() -> Function | None:
    """The contestant where nvidia-cudnn-frontend can be imported and offers the node."""
    cudnn = peers.find("cudnn")
    return modulate if cudnn is not None and hasattr(cudnn.pygraph, "adalayernorm_backward") else None
