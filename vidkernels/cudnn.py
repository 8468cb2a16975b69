# SPDX-License-Identifier: Apache-2.0
"""Backend "cudnn" of causal_conv3d: cuDNN's graph API through the package nvidia-cudnn-frontend (module `cudnn`).

One plan per shape and device, kept for the process: the first call with a shape takes about 10 ms, so it belongs before
the capture of a CUDA graph. Workspace comes from torch's allocator; everything runs on torch's current stream.
"""

from __future__ import annotations

import importlib.util
import inspect
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels._conv import cudnn_graphs as graphs
from vidkernels._conv.geometry import SILU, is_channels_last, output_size
from vidkernels._conv.gradients import backward_by
from vidkernels._tracing import constant_while_tracing
from vidkernels.errors import BackendUnavailable

_OLDEST = 91500  # before 9.15 cuDNN gives wrong results for large bfloat16 convolutions (pytorch issue 166643)
_PLANS = 512


class _Local(threading.local):
    """This thread's handle for each device, and the stream that it is set to."""

    def __init__(self) -> None:
        self.handles: dict[torch.device, tuple[Any, int]] = {}


_local = _Local()


@constant_while_tracing
@lru_cache(maxsize=1)
def missing() -> str | None:
    """None where graphs of cuDNN can be built and run, otherwise the reason."""
    if torch.version.hip is not None:
        return "cuDNN is not part of ROCm"
    if importlib.util.find_spec("cudnn") is None:
        return "the package nvidia-cudnn-frontend is not installed"
    try:
        import cudnn

        version = cudnn.backend_version()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # another module may have the name
        return f"nvidia-cudnn-frontend cannot load cuDNN: {' '.join(str(error).split())}"
    if version < _OLDEST:
        return f"cuDNN {version} is older than {_OLDEST}, the first without wrong results for large convolutions"
    return None


def _handle(device: torch.device) -> Any:
    """This thread's handle for a device, on torch's current stream; backward passes come from threads of their own."""
    import cudnn

    stream = torch._C._cuda_getCurrentRawStream(device.index)
    handle, current = _local.handles.get(device, (None, None))
    if current != stream:
        handle = cudnn.create_handle() if handle is None else handle
        cudnn.set_stream(handle=handle, stream=stream)
        _local.handles[device] = handle, stream
    return handle


@lru_cache(maxsize=_PLANS)
def _plan(convolution: graphs.Convolution, device: torch.device) -> graphs.Plan:
    import cudnn

    try:
        return graphs.build(convolution, handle=_handle(device))
    except cudnn.cudnnGraphNotSupportedError as error:
        raise BackendUnavailable(
            f"causal_conv3d: backend 'cudnn' has no plan for {convolution}; pass backend='triton' or 'torch'. {error}"
        ) from error


@lru_cache(maxsize=1)
def _takes_uids() -> bool:
    """Whether `execute` takes tensors in order beside their uids, which costs half of a mapping (14 against 28 us)."""
    import cudnn

    try:
        return "tensor_uids" in inspect.signature(cudnn.pygraph.execute).parameters
    except ValueError:  # compiled, in older versions: no signature
        return False


def _execute(convolution: graphs.Convolution, tensors: dict[int, Tensor]) -> None:
    """Run on the current device, which is that of the tensors: the bare ops have made it so (`ops._register`)."""
    device = tensors[graphs.RESULT].device
    handle = _handle(device)
    plan = _plan(convolution, device)
    workspace = torch.empty(max(plan.workspace, 1), dtype=torch.uint8, device=device)
    if _takes_uids():
        plan.graph.execute(tuple(tensors.values()), workspace, handle=handle, tensor_uids=tuple(tensors))
    else:
        plan.graph.execute(tensors, workspace, handle=handle)


def _packed(x: Tensor) -> Tensor:
    """x itself where it is channels-last without gaps and aligned, else such a copy (a layout change, no padding)."""
    if not x.is_contiguous(memory_format=torch.channels_last_3d):
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.channels_last_3d)


def _empty(size: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(list(size), dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


def causal_conv3d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
    activation: int,
    out: Tensor | None = None,
) -> Tensor:
    """See `ops.causal_conv3d`. Activation and residual are passes of their own: in the graph they would move it to an
    engine that is compiled at run time."""
    size = [x.shape[0], weight.shape[0], *output_size(x.shape[2:], weight.shape[2:], stride, dilation, padding)]
    y = _empty(size, x)
    convolution = graphs.Convolution(
        graphs.FPROP, x.dtype, tuple(x.shape), tuple(weight.shape), tuple(size), tuple(stride), tuple(dilation),
        tuple(padding), bias is not None,
    )  # fmt: skip
    tensors = {graphs.IMAGE: _packed(x), graphs.FILTER: _packed(weight), graphs.RESULT: y}
    if bias is not None:
        tensors[graphs.BIAS] = _packed(bias[None, :, None, None, None])
    _execute(convolution, tensors)
    if activation == SILU:
        F.silu(y, inplace=True)
    if residual is not None:
        y += residual
    if out is not None:
        return out.copy_(y)
    return y if is_channels_last(x) else y.contiguous()


def causal_conv3d_dgrad(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    history_frames: int,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
) -> tuple[Tensor, Tensor | None]:
    """See `_conv.gradients`; there are no frames of history here."""
    dx = _empty(input_size, grad)
    convolution = graphs.Convolution(
        graphs.DGRAD, grad.dtype, tuple(input_size), tuple(weight.shape), tuple(grad.shape), tuple(stride),
        tuple(dilation), tuple(padding),
    )  # fmt: skip
    _execute(convolution, {graphs.RESULT: _packed(grad), graphs.FILTER: _packed(weight), graphs.IMAGE: dx})
    return dx if is_channels_last(grad) else dx.contiguous(), None


def causal_conv3d_wgrad(
    grad: Tensor,
    x: Tensor,
    history: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
) -> Tensor:
    """See `_conv.gradients`; summed in float32, rounded once to the dtype of x by cuDNN, channels last."""
    filters = grad.shape[1], x.shape[1], *kernel
    dweight = _empty(filters, x)
    convolution = graphs.Convolution(
        graphs.WGRAD,
        x.dtype,
        tuple(x.shape),
        filters,
        tuple(grad.shape),
        tuple(stride),
        tuple(dilation),
        tuple(padding),
    )
    _execute(convolution, {graphs.RESULT: _packed(grad), graphs.IMAGE: _packed(x), graphs.FILTER: dweight})
    return dweight


causal_conv3d_bwd = backward_by(causal_conv3d_dgrad, causal_conv3d_wgrad)
