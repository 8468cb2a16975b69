# SPDX-License-Identifier: Apache-2.0
"""Convolutions as graphs of cuDNN: padding may differ in front and behind, which torch's interface to cuDNN cannot say.

Facts from plans built for an H100 with cuDNN 9.24 (no device needed, see tests/test_cudnn.py), bfloat16:
* padding (2, 1, 1) / (0, 1, 1) gets the same engines, with a workspace of 131 bytes, as symmetric padding;
* a result or input with gaps between its rows is copied into the workspace first, and the first engines for 3x1x1 kernels
  want four copies of the input there: hence `WORKSPACE`;
* the weight gradient comes in the dtype of its inputs only;
* beyond 2^31 elements one slow engine (eng0) remains;
* filters [K, C, kt, kh, kw] as models hold them get the same engines (bfloat16, float16, float32; forward and data gradient),
  which lay them out in a workspace of that size: one pass as ours would be, without an op of its own before it;
* a bias is served by the same precompiled engines (30 to 35 of them a shape); SiLU, a residual, or both behind it by none:
  the only candidates are compiled at run time, want a driver even to be planned, and are left out.
"""

from __future__ import annotations

import inspect
import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FPROP, DGRAD, WGRAD = "fprop", "dgrad", "wgrad"
IMAGE, FILTER, RESULT, BIAS = 1, 2, 3, 4  # names of the tensors in a graph, and their order in a launch
_RAW_ARGUMENTS = "user_ptrs_array: int, n_user: int, workspace: int, handle: int, plan_index: int"
WORKSPACE = 4 << 20  # bytes that any plan may use besides room for the weights in float32: never an activation's copy


def planar_strides(size: Sequence[int]) -> list[int]:
    """Strides of contiguous [K, C, kt, kh, kw]."""
    strides = [1]
    for count in reversed(size[1:]):
        strides.insert(0, strides[0] * count)
    return strides


def packed_strides(size: Sequence[int]) -> list[int]:
    """Strides of a channels-last [N, C, T, H, W]. Those of torch may lie about axes of length 1."""
    channels, frames, height, width = size[1:]
    return [channels * frames * height * width, 1, height * width * channels, width * channels, channels]


class Convolution(NamedTuple):
    """One convolution or gradient; all tensors are packed channels-last, but for planar filters.

    Args:
        kind: FPROP (image, filter -> result), DGRAD (result, filter -> image) or WGRAD (result, image -> filter).
        image, filters, result: sizes [N, C, T, H, W], [K, C, kt, kh, kw], [N, K, To, Ho, Wo].
        padding: (front, back, top, bottom, left, right), zeros.
        bias: whether FPROP adds a bias [K].
        planar: the filters of FPROP or DGRAD are contiguous instead.
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
    planar: bool = False

    @property
    def workspace_limit(self) -> int:
        """Bytes: split sums of a weight gradient need room for the weights in float32."""
        return WORKSPACE + 4 * math.prod(self.filters)


# (image, filters, result[, bias]), workspace or None, handle of the frontend
Launch = Callable[[Sequence[Tensor], "Tensor | None", Any], None]


class Plan(NamedTuple):
    """How a built graph is launched, its bytes of workspace, and size and strides of the tensor that it writes."""

    launch: Launch
    workspace: int
    size: tuple[int, ...]
    strides: tuple[int, ...]


def plan_of(convolution: Convolution, launch: Launch, workspace: int) -> Plan:
    """A plan of a convolution that is launched so."""
    written = {FPROP: convolution.result, DGRAD: convolution.image, WGRAD: convolution.filters}[convolution.kind]
    return Plan(launch, workspace, written, tuple(packed_strides(written)))


def launcher(graph: Any, uids: tuple[int, ...]) -> Launch:
    """The cheapest way into a built graph that this frontend has. Host time of version 1.32 up to where cuDNN refuses a null
    handle: 13 us by addresses, 26 by tensors beside their uids, 28 by a mapping."""
    launch = _by_address(graph, uids)
    if launch is not None:
        return launch

    def as_operands(tensors: Sequence[Tensor], workspace: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        bias = tuple(t.view(1, -1, 1, 1, 1) for t in tensors[RESULT:])
        # Older versions want a tensor even where nothing is needed.
        return (*tensors[:RESULT], *bias), tensors[0] if workspace is None else workspace

    def with_uids(tensors: Sequence[Tensor], workspace: Tensor | None, handle: Any) -> None:
        operands, space = as_operands(tensors, workspace)
        graph.execute(operands, space, handle=handle, tensor_uids=uids)

    def by_mapping(tensors: Sequence[Tensor], workspace: Tensor | None, handle: Any) -> None:
        operands, space = as_operands(tensors, workspace)
        graph.execute(dict(zip(uids, operands, strict=True)), space, handle=handle)

    try:
        ordered = "tensor_uids" in inspect.signature(graph.execute).parameters
    except ValueError:  # compiled, in older versions: no signature
        ordered = False
    return with_uids if ordered else by_mapping


def _by_address(graph: Any, uids: tuple[int, ...]) -> Launch | None:
    """Through the entry that `execute` itself ends in: addresses in the order of their uids, of a plan chosen now.

    It is no public one: None where it, or what the frontend asks before it, is not what it is in version 1.32.
    """
    lowered: Any = getattr(graph, "_lowered_graph", None)
    execute = getattr(lowered, "_execute_with_raw_ptrs", None)
    if execute is None or _RAW_ARGUMENTS not in (execute.__doc__ or ""):
        return None
    if getattr(graph, "selected_engine", execute) is not None:  # an engine written in Python, which has no such entry
        return None
    choose = getattr(graph, "_materialize_backend_plan", None)
    if choose is None or not graph.plans or list(lowered._get_variant_pack_uids_sorted()) != list(uids):
        return None
    plan, count = choose(graph._plan_index).cpp_index, len(uids)

    def launch(tensors: Sequence[Tensor], workspace: Tensor | None, handle: Any) -> None:
        addresses = array("Q", [t.data_ptr() for t in tensors])
        space = 0 if workspace is None else workspace.data_ptr()
        execute(addresses.buffer_info()[0], count, space, handle.backend_handle, plan)

    return launch


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
        strides = planar_strides(size) if uid == FILTER and convolution.planar else packed_strides(size)
        made = graph.tensor(name=name, dim=list(size), stride=strides, data_type=dtype)
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
    uids = (IMAGE, FILTER, RESULT, BIAS)[: 4 if convolution.bias else 3]
    return plan_of(convolution, launcher(graph, uids), graph.get_workspace_size())
