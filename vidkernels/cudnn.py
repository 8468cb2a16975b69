# SPDX-License-Identifier: Apache-2.0
"""Backend "cudnn" of causal_conv3d: cuDNN's graph API through the package nvidia-cudnn-frontend (module `cudnn`).

One plan per shape and device, kept for the process: the first call with a shape takes about 10 ms, so it belongs before
the capture of a CUDA graph. Workspace comes from torch's allocator; everything runs on torch's current stream.
"""

from __future__ import annotations

import importlib.util
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
from vidkernels._conv.results import empty_strided
from vidkernels._tracing import constant_while_tracing
from vidkernels.errors import BackendUnavailable

_OLDEST = 91500  # before 9.15 cuDNN gives wrong results for large bfloat16 convolutions (pytorch issue 166643)
_PLANS = 512


class _Local(threading.local):
    """This thread's handle for each device, by its index, and the stream that it is set to."""

    def __init__(self) -> None:
        self.handles: dict[int, tuple[Any, int]] = {}


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


def thread_handle(device: int) -> Any:
    """This thread's handle for a device, on torch's current stream; backward passes come from threads of their own."""
    stream = torch._C._cuda_getCurrentRawStream(device)
    handle, current = _local.handles.get(device, (None, None))
    if current != stream:
        import cudnn

        handle = cudnn.create_handle() if handle is None else handle
        cudnn.set_stream(handle=handle, stream=stream)
        _local.handles[device] = handle, stream
    return handle


@lru_cache(maxsize=_PLANS)
def _plan(
    kind: str,
    dtype: torch.dtype,
    device: int,
    image: Sequence[int],
    filters: Sequence[int],
    result: Sequence[int] | None,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: tuple[int, ...],
    bias: bool,
    planar: bool,
) -> graphs.Plan:
    """All that a repeated call needs, found by what it has at hand: 0.9 us. `result` None: what follows from the rest."""
    import cudnn

    if result is None:
        result = image[0], filters[0], *output_size(image[2:], filters[2:], stride, dilation, padding)
    sizes = tuple(image), tuple(filters), tuple(result)
    convolution = graphs.Convolution(kind, dtype, *sizes, stride, dilation, padding, bias, planar)
    try:
        return graphs.build(convolution, handle=thread_handle(device))
    except cudnn.cudnnGraphNotSupportedError as error:
        raise BackendUnavailable(
            f"causal_conv3d: backend 'cudnn' has no plan for {convolution}; pass backend='triton' or 'torch'. {error}"
        ) from error


def _run(plan: graphs.Plan, *tensors: Tensor) -> None:
    """Run on the current device, which is that of the tensors: the bare ops have made it so (`ops._register`)."""
    image = tensors[0]
    workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=image.device) if plan.workspace else None
    plan.launch(tensors, workspace, thread_handle(image.get_device()))


def _is_packed(x: Tensor) -> bool:
    """Whether cuDNN can take x as it is: channels-last without gaps, and aligned."""
    return x.is_contiguous(memory_format=torch.channels_last_3d) and x.data_ptr() % 16 == 0


def _packed(x: Tensor) -> Tensor:
    """x itself where cuDNN can take it, else such a copy (a layout change, no padding)."""
    return x if _is_packed(x) else x.clone(memory_format=torch.channels_last_3d)


def _filters(weight: Tensor) -> tuple[Tensor, bool]:
    """Filters that cuDNN can take, and whether they are planar."""
    if weight.data_ptr() % 16 == 0:
        if weight.is_contiguous(memory_format=torch.channels_last_3d):
            return weight, False
        if weight.is_contiguous():
            return weight, True
    return weight.clone(memory_format=torch.channels_last_3d), False


def _packed_bias(bias: Tensor) -> Tensor:
    ready = bias.is_contiguous() and bias.data_ptr() % 16 == 0
    return bias if ready else bias.clone(memory_format=torch.contiguous_format)


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
    engine that is compiled at run time.

    cuDNN writes into `out` itself where that is packed and not the residual, which is read behind the convolution.
    """
    filters, planar = _filters(weight)
    plan = _plan(
        graphs.FPROP, x.dtype, x.get_device(), x.shape, weight.shape, None, tuple(stride), tuple(dilation), tuple(padding),
        bias is not None, planar,
    )  # fmt: skip
    direct = out is not None and _is_packed(out) and (residual is None or residual.data_ptr() != out.data_ptr())
    y = out if out is not None and direct else empty_strided(x, plan.size, plan.strides)
    if bias is None:
        _run(plan, _packed(x), filters, y)
    else:
        _run(plan, _packed(x), filters, y, _packed_bias(bias))
    if activation == SILU:
        F.silu(y, inplace=True)
    if out is not None:
        if residual is not None:
            return torch.add(y, residual, out=out)
        return out if direct else out.copy_(y)
    if residual is not None:
        y.add_(residual)
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
    filters, planar = _filters(weight)
    plan = _plan(
        graphs.DGRAD, grad.dtype, grad.get_device(), tuple(input_size), weight.shape, grad.shape, tuple(stride),
        tuple(dilation), tuple(padding), False, planar,
    )  # fmt: skip
    dx = empty_strided(grad, plan.size, plan.strides)
    _run(plan, dx, filters, _packed(grad))
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
    plan = _plan(
        graphs.WGRAD, x.dtype, x.get_device(), x.shape, filters, grad.shape, tuple(stride), tuple(dilation),
        tuple(padding), False, False,
    )  # fmt: skip
    dweight = empty_strided(x, plan.size, plan.strides)
    _run(plan, _packed(x), dweight, _packed(grad))
    return dweight


causal_conv3d_bwd = backward_by(causal_conv3d_dgrad, causal_conv3d_wgrad)
