# SPDX-License-Identifier: Apache-2.0
"""Convolutions as graphs of cuDNN: padding may differ in front and behind, which torch's interface to cuDNN cannot say.

Facts from plans built for an H100 with cuDNN 9.24 (no device needed, see tests/test_cudnn.py), bfloat16:
* padding (2, 1, 1) / (0, 1, 1) gets the same engines, with a workspace of 131 bytes, as symmetric padding;
* a result or input with gaps between its rows is copied into the workspace first, and the first engines for 3x1x1 kernels
  want four copies of the input there: hence `WORKSPACE`;
* the weight gradient comes in the dtype of its inputs only;
* beyond 2^31 elements one slow engine (eng0) remains;
* a bias is served by the same precompiled engines (30 to 35 of them a shape); SiLU, a residual, or both behind it by none:
  the only candidates are compiled at run time, want a driver even to be planned, and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

FPROP, DGRAD, WGRAD = "fprop", "dgrad", "wgrad"
IMAGE, FILTER, RESULT, BIAS = 1, 2, 3, 4  # names of the tensors in a graph
WORKSPACE = 4 << 20  # bytes that any plan may use besides room for the weights in float32: never an activation's copy


def packed_strides(size: Sequence[int]) -> list[int]:
    """Strides of a channels-last [N, C, T, H, W]. Those of torch may lie about axes of length 1."""
    channels, frames, height, width = size[1:]
    return [channels * frames * height * width, 1, height * width * channels, width * channels, channels]


class Convolution(NamedTuple):
    """One convolution or gradient; all tensors are packed channels-last. A tuple, since it is made and hashed in each call
    (1.1 us with the look-up, a frozen dataclass 2.4).

    Args:
        kind: FPROP (image, filter -> result), DGRAD (result, filter -> image) or WGRAD (result, image -> filter).
        image, filters, result: sizes [N, C, T, H, W], [K, C, kt, kh, kw], [N, K, To, Ho, Wo].
        padding: (front, back, top, bottom, left, right), zeros.
        bias: whether FPROP adds a bias [K].
    """

    kind: str
    dtype: torch.dtype
    image: tuple[int, ...]
    filters: tuple[int, ...]
    result: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    bias: bool = False

    @property
    def workspace_limit(self) -> int:
        """Bytes: split sums of a weight gradient need room for the weights in float32."""
        return WORKSPACE + 4 * math.prod(self.filters)


@dataclass(frozen=True)
class Plan:
    """A built graph and the bytes of workspace that it needs."""

    graph: Any
    workspace: int


def _data_type(cudnn: Any, dtype: torch.dtype) -> Any:
    kinds = cudnn.data_type
    return {torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF, torch.float32: kinds.FLOAT}[dtype]


def build(convolution: Convolution, **target: Any) -> Plan:
    """Build the fastest plan, by cuDNN's own heuristics, that is deterministic, sums in float32 and keeps to the
    workspace limit.

    Args:
        target: `handle=` of a device, or `device_property=` of one that need not be there.

    Raises:
        cudnn.cudnnGraphNotSupportedError: no engine serves it.
    """
    import cudnn

    dtype = _data_type(cudnn, convolution.dtype)
    wide = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=dtype, intermediate_data_type=wide, compute_data_type=wide, **target)

    def tensor(name: str, uid: int, size: Sequence[int]) -> Any:
        made = graph.tensor(name=name, dim=list(size), stride=packed_strides(size), data_type=dtype)
        return made.set_uid(uid)

    front, back, top, bottom, left, right = convolution.padding
    geometry = {
        "pre_padding": [front, top, left], "post_padding": [back, bottom, right],
        "stride": list(convolution.stride), "dilation": list(convolution.dilation),
    }  # fmt: skip
    if convolution.kind == FPROP:
        image, filters = tensor("x", IMAGE, convolution.image), tensor("weight", FILTER, convolution.filters)
        out, size, uid = graph.conv_fprop(image=image, weight=filters, **geometry), convolution.result, RESULT
        if convolution.bias:
            out = graph.add(out, tensor("bias", BIAS, (1, convolution.filters[0], 1, 1, 1)))
    elif convolution.kind == DGRAD:
        loss, filters = tensor("grad", RESULT, convolution.result), tensor("weight", FILTER, convolution.filters)
        out, size, uid = graph.conv_dgrad(loss=loss, filter=filters, **geometry), convolution.image, IMAGE
    else:
        loss, image = tensor("grad", RESULT, convolution.result), tensor("x", IMAGE, convolution.image)
        out, size, uid = graph.conv_wgrad(image=image, loss=loss, **geometry), convolution.filters, FILTER
    out.set_output(True).set_data_type(dtype).set_dim(list(size)).set_stride(packed_strides(size)).set_uid(uid)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    notes = cudnn.numerical_note
    graph.deselect_numeric_notes([notes.NONDETERMINISTIC, notes.REDUCED_PRECISION_REDUCTION])
    graph.deselect_workspace_greater_than(convolution.workspace_limit)
    graph.build_plans()
    return Plan(graph, graph.get_workspace_size())
