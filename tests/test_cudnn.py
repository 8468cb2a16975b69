# SPDX-License-Identifier: Apache-2.0
"""Backend "cudnn" of causal_conv3d without a device: reasons, order, launchers on an emulated cuDNN, and real plans for
an H100 from its properties alone (skipped where cuDNN is not installed)."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

import vidkernels
from vidkernels import cudnn
from vidkernels._conv import aten, upsample
from vidkernels._conv import cudnn_graphs as graphs
from vidkernels._conv.geometry import NONE, SILU
from vidkernels._reference import upsample_conv3d as upsample_reference
from vidkernels.ops._causal_conv3d_backends import heuristic

BF16 = torch.bfloat16


def reasons(
    channels: int,
    filters: int,
    dtype: torch.dtype = BF16,
    kernel: tuple[int, ...] = (3, 3, 3),
    past: int = 0,
    **options: Any,
) -> dict[str, str | None]:
    """What each backend says about a call on a CUDA device that need not be there, in order of preference."""
    size = options.pop("size", (5, 16, 16))
    with FakeTensorMode():
        x = torch.empty(1, channels, *size, dtype=dtype, device="cuda")
        weight = torch.empty(filters, channels, *kernel, dtype=dtype, device="cuda")
        if past:
            options["history"] = torch.empty(1, channels, past, *size[1:], dtype=dtype, device="cuda")
        return {c.backend: c.reason for c in vidkernels.explain("causal_conv3d", x, weight, **options).choices}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "missing", lambda: None)


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "missing", lambda: "the package nvidia-cudnn-frontend is not installed")
    assert reasons(128, 128)["cudnn"] == "the package nvidia-cudnn-frontend is not installed"
    assert reasons(128, 128)["torch"] is None


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"past": 2}, "history"),
        ({"time_padding": "replicate"}, "repeats frames"),
        ({"spatial_padding_mode": "replicate"}, "repeats pixels"),
        ({"filters": 3}, "multiples of 8"),
        ({"size": (64, 512, 512)}, "2^31"),
    ],
    ids=["float64", "history", "replicate", "replicate-space", "few-filters", "huge"],
)
def test_reasons(options: dict[str, Any], word: str, installed: None) -> None:
    said = reasons(**{"channels": 128, "filters": 128, **options})["cudnn"]
    assert said is not None and word in said


def test_serves_what_it_can(installed: None) -> None:
    """Replication of nothing is no obstacle; float32 depends on torch's switch for TF32."""
    assert reasons(128, 128, kernel=(1, 3, 3), time_padding="replicate")["cudnn"] is None
    assert reasons(128, 128, kernel=(1, 1, 1), spatial_padding_mode="replicate")["cudnn"] is None
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    try:
        for precision, allowed in (("ieee", False), ("tf32", True)):
            switch.fp32_precision = precision
            found = reasons(256, 256, torch.float32)
            assert (found["cudnn"] is None) == allowed
            assert next(iter(found)) == ("cudnn" if allowed else "torch")
    finally:
        switch.fp32_precision = before


@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "first"),
    [
        (128, 128, (3, 3, 3), "triton"),
        (256, 256, (3, 3, 3), "cudnn"),
        (256, 128, (1, 3, 3), "cudnn"),
        (96, 96, (3, 3, 3), "triton"),
        (128, 128, (3, 1, 1), "triton"),
        (384, 384, (3, 1, 1), "cudnn"),
        (160, 160, (3, 3, 3), "triton"),
        (192, 192, (3, 3, 3), "cudnn"),
        (256, 128, (1, 1, 1), "triton"),
        (3, 128, (3, 3, 3), "triton"),
    ],
)
def test_order(channels: int, filters: int, kernel: tuple[int, ...], first: str, installed: None) -> None:
    found = reasons(channels, filters, kernel=kernel)
    assert next(iter(found)) == first
    assert next(name for name, reason in found.items() if reason is None) == first
    assert list(reasons(channels, filters, kernel=kernel, past=1)) == list(found)


@pytest.mark.parametrize(
    ("channels", "kernel", "first"),
    [(128, (3, 3, 3), "triton"), (512, (3, 3, 3), "triton"), (512, (3, 1, 1), "triton")],
)
def test_order_where_frames_are_kept(channels: int, kernel: tuple[int, ...], first: str, installed: None) -> None:
    """History rules cuDNN out."""
    found = reasons(channels, channels, kernel=kernel, past=1)
    assert next(name for name, reason in found.items() if reason is None) == first


@pytest.mark.parametrize(
    ("channels", "kernel", "epilogue", "first"),
    [
        (128, (1, 3, 3), (NONE, False), "cudnn"), (128, (1, 3, 3), (NONE, True), "triton"), (128, (1, 3, 3), (SILU, False), "triton"),
        (512, (1, 3, 3), (NONE, True), "cudnn"), (512, (1, 3, 3), (SILU, True), "triton"), (384, (3, 3, 3), (SILU, True), "cudnn"),
    ],
)  # fmt: skip
def test_passes_behind_cudnn_count(
    channels: int, kernel: tuple[int, ...], epilogue: tuple[int, bool], first: str
) -> None:
    """An activation and a residual are read and written once more there."""
    assert heuristic(channels, channels, kernel, False, *epilogue)[0] == first


def _emulate(convolution: graphs.Convolution, given: Sequence[torch.Tensor]) -> None:
    """What a plan computes, on tensors laid out as its descriptors say."""
    tensors = dict(enumerate(given, graphs.IMAGE))
    if convolution.bias:
        tensors[graphs.BIAS] = tensors[graphs.BIAS].view(1, -1, 1, 1, 1)
    sizes = {graphs.IMAGE: convolution.image, graphs.FILTER: convolution.filters, graphs.RESULT: convolution.result}
    sizes |= {graphs.BIAS: (1, convolution.filters[0], 1, 1, 1)} if convolution.bias else {}
    assert set(tensors) == set(sizes)
    assert all(t.data_ptr() % 16 == 0 for t in given)
    for uid, x in tensors.items():
        assert tuple(x.shape) == sizes[uid] and x.dtype == convolution.dtype
        planar = uid == graphs.FILTER and convolution.planar
        packed = graphs.planar_strides(x.shape) if planar else graphs.packed_strides(x.shape)
        assert all(n == 1 or s == p for n, s, p in zip(x.shape, x.stride(), packed, strict=True))
    front, back, top, bottom, left, right = convolution.padding
    image = tensors[graphs.IMAGE] if convolution.kind != graphs.DGRAD else torch.zeros_like(tensors[graphs.IMAGE])
    filters = tensors[graphs.FILTER] if convolution.kind != graphs.WGRAD else torch.zeros_like(tensors[graphs.FILTER])
    image, filters = image.detach().requires_grad_(), filters.detach().requires_grad_()
    y = F.conv3d(
        F.pad(image, (left, right, top, bottom, front, back)),
        filters,
        None,
        convolution.stride,
        0,
        convolution.dilation,
    )
    if convolution.kind == graphs.FPROP:
        y = y + tensors[graphs.BIAS] if convolution.bias else y
        tensors[graphs.RESULT].copy_(y.detach())
    else:
        gradients = torch.autograd.grad(y, (image, filters), tensors[graphs.RESULT])
        uid = graphs.IMAGE if convolution.kind == graphs.DGRAD else graphs.FILTER
        tensors[uid].copy_(gradients[uid == graphs.FILTER])


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each plan, whether its filters are planar."""
    found: list[bool] = []

    def build(convolution: graphs.Convolution, **target: Any) -> graphs.Plan:
        found.append(convolution.planar)
        return graphs.plan_of(convolution, lambda tensors, *rest: _emulate(convolution, tensors), 0)

    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(cudnnGraphNotSupportedError=RuntimeError))
    monkeypatch.setattr(cudnn, "thread_handle", lambda device: None)
    monkeypatch.setattr(graphs, "build", build)
    cudnn._plan.cache_clear()
    yield found
    cudnn._plan.cache_clear()


GEOMETRIES: dict[str, tuple[tuple[int, ...], list[int], list[int], list[int]]] = {
    "causal": ((3, 3, 3), [1, 1, 1], [1, 1, 1], [2, 0, 1, 1, 1, 1]),
    "down": ((1, 3, 3), [1, 2, 2], [1, 1, 1], [0, 0, 0, 1, 0, 1]),
    "dilated": ((3, 3, 1), [2, 1, 1], [2, 1, 1], [4, 0, 1, 1, 0, 0]),
    "valid": ((2, 2, 2), [1, 1, 1], [1, 1, 1], [0, 0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("layout", ["channels-last", "contiguous", "window"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_launchers(name: str, layout: str, emulated: list[bool]) -> None:
    """Layouts, sizes and order of arguments; a result into a strided view; bias, SiLU and residual."""
    kernel, *geometry = GEOMETRIES[name]
    args = (*geometry, 0, 0)
    x = torch.randn(2, 8, 6, 7, 9, dtype=torch.float64)
    if layout != "contiguous":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    x = x[:, :, :, 1:, :-2] if layout == "window" else x
    weight, bias = torch.randn(16, 8, *kernel, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    if layout != "contiguous":
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    weight = torch.cat([weight, weight])[8:24] if layout == "window" else weight
    expected = aten.causal_conv3d_fwd(x, weight, bias, None, None, *args, 0)
    y = cudnn.causal_conv3d_fwd(x, weight, bias, None, None, *args, 0)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.contiguous_format if layout == "contiguous" else torch.channels_last_3d)
    residual = torch.randn_like(expected)
    whole = torch.full([n * s for n, s in zip(y.shape, (1, 1, 2, 1, 2), strict=True)], 7.0, dtype=torch.float64)
    view = whole[:, :, 1::2, :, ::2]
    cudnn.causal_conv3d_fwd(x, weight, None, None, residual, *args, 1, out=view)
    total = F.silu(aten.causal_conv3d_fwd(x, weight, None, None, None, *args, 0)) + residual
    torch.testing.assert_close(view, total, rtol=1e-12, atol=1e-12)
    assert (whole[:, :, ::2] == 7).all()
    clips = torch.full([2 * y.shape[0], *y.shape[1:]], 7.0, dtype=torch.float64).to(
        memory_format=torch.channels_last_3d
    )
    for out, added in ((clips[2:], None), (clips[2:], residual), (view, view), (clips[2:], clips[2:])):
        wanted = expected if added is None else expected + added
        assert cudnn.causal_conv3d_fwd(x, weight, bias, None, added, *args, 0, out=out) is out
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    assert (clips[:2] == 7).all()
    grad = torch.randn_like(expected)
    dx, dhistory = cudnn.causal_conv3d_dgrad(grad, weight, list(x.shape), 0, *args)
    torch.testing.assert_close(dx, aten.causal_conv3d_dgrad(grad, weight, list(x.shape), 0, *args)[0])
    assert dhistory is None
    dweight = cudnn.causal_conv3d_wgrad(grad, x, None, list(kernel), *args)
    expected = aten.causal_conv3d_wgrad(grad, x, None, list(kernel), *args)
    torch.testing.assert_close(dweight, expected)
    needs = [True, False, True, True]
    found = cudnn.causal_conv3d_bwd(grad, x, weight, None, [*sum(geometry, []), 0, 0], needs)
    for actual, wanted in zip(found, (dx, dweight, grad.sum((0, 2, 3, 4))), strict=True):
        assert torch.equal(actual, wanted)
    assert found[1].stride() == weight.stride()
    assert any(emulated) == (layout == "contiguous")


@pytest.mark.parametrize("scale", [(2, 1, 1), (1, 2, 2), (2, 2, 2)], ids=["t", "hw", "thw"])
def test_upsampling_phases(scale: tuple[int, int, int], emulated: None) -> None:
    x = torch.randn(1, 8, 3, 4, 5, dtype=torch.float64)
    weight = torch.randn(8, 8, 3, 3, 3, dtype=torch.float64)
    rule = [list(scale), False, 0, 0, 0, 0, True, [2, 0, 1, 1, 1, 1], 0, 0]
    y = upsample.fwd_cudnn(x, weight, None, None, None, *rule)
    torch.testing.assert_close(y, upsample_reference.upsample_conv3d(x, weight, scale=scale))


class _Frontend:
    """A graph of some version of the frontend; `calls`: what was executed."""

    def __init__(self, arguments: str | None = graphs._RAW_ARGUMENTS, engine: object = None) -> None:
        self.calls: list[Any] = []
        self.selected_engine, self.plans, self._plan_index = engine, ["plan"], 0
        if arguments is not None:
            self._lowered_graph = SimpleNamespace(
                _execute_with_raw_ptrs=self._raw(arguments), _get_variant_pack_uids_sorted=lambda: [1, 2, 3, 4]
            )

    def _raw(self, arguments: str) -> Any:
        def execute(pointers: int, count: int, *rest: int) -> None:
            found = (ctypes.c_uint64 * count).from_address(pointers)
            self.calls.append((list(found), *rest))

        execute.__doc__ = f"_execute_with_raw_ptrs(self, {arguments} = -1) -> None"
        return execute

    def _materialize_backend_plan(self, index: int) -> Any:
        return SimpleNamespace(cpp_index=index + 5)

    def execute(self, operands: Any, workspace: Any, handle: Any = None, tensor_uids: Any = None) -> None:
        self.calls.append((operands, workspace, handle, tensor_uids))


def test_a_graph_is_launched_by_address_where_the_frontend_can() -> None:
    x, weight, y, bias = tensors = tuple(torch.empty(1, 8, 1, 1, 1) for _ in range(3)) + (torch.empty(8),)
    workspace, handle, uids = torch.empty(64), SimpleNamespace(backend_handle=99), (1, 2, 3, 4)
    known = _Frontend()
    graphs.launcher(known, uids)(tensors, workspace, handle)
    graphs.launcher(known, uids)(tensors, None, handle)
    addresses = [t.data_ptr() for t in tensors]
    assert known.calls == [(addresses, workspace.data_ptr(), 99, 5), (addresses, 0, 99, 5)]
    for other in (_Frontend(None), _Frontend("pointers: int, handle: int"), _Frontend(engine="python")):
        graphs.launcher(other, uids)(tensors, None, handle)
        ((operands, space, used, named),) = other.calls
        assert operands[:3] == (x, weight, y) and operands[3].data_ptr() == bias.data_ptr() and operands[3].ndim == 5
        assert space is x and used is handle and named == uids
    unlike = _Frontend()
    unlike._lowered_graph._get_variant_pack_uids_sorted = lambda: [1, 2, 3]
    graphs.launcher(unlike, uids)(tensors, workspace, handle)
    assert unlike.calls[0][3] == uids

    class Mapping(_Frontend):
        def execute(self, operands: Any, workspace: Any, handle: Any = None) -> None:
            self.calls.append((operands, workspace, handle))

    oldest = Mapping(None)
    graphs.launcher(oldest, uids)(tensors, workspace, handle)
    assert list(oldest.calls[0][0]) == [1, 2, 3, 4] and oldest.calls[0][1] is workspace


def _folders() -> tuple[list[str], list[str]]:
    """Where Python packages, and libraries in NVIDIA's packages, lie."""
    libraries = [str(p) for entry in sys.path for p in Path(entry or ".").glob("nvidia/*/lib")]
    return [entry for entry in sys.path if entry], libraries


PLANS = """
import ctypes, glob, json, math, os, sys, types
import torch
found = [p for d in os.environ["LD_LIBRARY_PATH"].split(":") for p in glob.glob(d + "/libcublasLt.so.*")]
if not found:
    sys.exit("skip: libcublasLt, which cuDNN ends the process without, is not installed")
from vidkernels import cudnn as backend
from vidkernels._conv import cudnn_graphs as graphs
if backend.missing():
    sys.exit("skip: " + backend.missing())
import cudnn
try:
    device = cudnn.create_device_properties(json.dumps(json.load(sys.stdin)))
except RuntimeError as error:
    sys.exit(f"skip: this cuDNN wants a driver to plan for a device by its properties: {error}")
def size(image, kernel, stride, padding):
    return tuple((image[a] + padding[2 * a] + padding[2 * a + 1] - kernel[a]) // stride[a] + 1 for a in range(3))
K3, S3, T3 = ((3, 3, 3), (2, 0, 1, 1, 1, 1)), ((1, 3, 3), (0, 0, 1, 1, 1, 1)), ((3, 1, 1), (2, 0, 0, 0, 0, 0))
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for channels, filters, (kernel, padding), stride, image in (
        (128, 128, S3, (1, 1, 1), (20, 256, 256)), (256, 256, K3, (1, 1, 1), (20, 128, 128)),
        (128, 128, T3, (1, 1, 1), (20, 128, 128)), (512, 512, K3, (1, 1, 1), (5, 32, 32)),
        (96, 96, K3, (1, 1, 1), (21, 120, 208)), (160, 160, K3, (1, 1, 1), (16, 64, 64)), (8, 128, K3, (1, 1, 1), (5, 64, 64)),
        (128, 128, ((1, 3, 3), (0, 0, 0, 1, 0, 1)), (1, 2, 2), (20, 128, 128)), (256, 256, K3, (2, 1, 1), (20, 64, 64)),
    ):
        result = size(image, kernel, stride, padding)
        for kind in (graphs.FPROP, graphs.DGRAD, graphs.WGRAD):
            sizes = (1, channels, *image), (filters, channels, *kernel), (1, filters, *result)
            convolution = graphs.Convolution(kind, dtype, *sizes, stride, (1, 1, 1), padding, kind == graphs.FPROP)
            plan = graphs.build(convolution, device_property=device)
            if kind != graphs.WGRAD:  # filters as models hold them: room to lay them out, and no more
                planar = graphs.build(convolution._replace(planar=True), device_property=device)
                assert planar.workspace <= plan.workspace + dtype.itemsize * math.prod(sizes[1]) + 1024, convolution
            if kind == graphs.FPROP and "_by_address" in plan.launch.__qualname__:  # refused for its handle, and that alone
                x, w, y, b = (torch.empty(1, dtype=dtype) for _ in range(4))
                space = torch.empty(plan.workspace, dtype=torch.uint8) if plan.workspace else None
                try:
                    plan.launch((x, w, y, b), space, types.SimpleNamespace(backend_handle=0))
                except RuntimeError as error:
                    if "handle" not in str(error):
                        raise
            activation = dtype.itemsize * min(channels * math.prod(image), filters * math.prod(result))
            print(json.dumps([str(convolution), plan.workspace, convolution.workspace_limit, activation]))
"""
H100 = {
    "deviceName": "NVIDIA H100", "deviceVer": 900, "driverVer": 13000, "cudaDeviceId": 0, "pciDeviceId": 0, "isTccDriver": 0,
    "smCountOrigin": 0, "multiProcessorCount": 132, "warpSize": 32, "supportCoopLaunch": 1, "maxCtasPerSM": 32,
    "maxThreadsPerSM": 2048, "maxThreadsPerBlock": 1024, "maxRegistersPerSM": 65536, "regsPerBlock": 65536,
    "maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": 232448, "reservedSharedMemoryPerBlock": 1024,
    "oversizedSharedMemoryPerBlock": 0, "l2CacheSize": 52428800, "totalGlobalMem": 85000000000, "memClockRateKHz": 2619000,
    "memoryBusWidth": 5120, "smClockRateKHz": 1980000, "maxBlockSize": [1024, 1024, 64],
    "maxGridSize": [2147483647, 65535, 65535],
}  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("cudnn") is None, reason="nvidia-cudnn-frontend is not installed")
def test_plans_for_an_h100() -> None:
    """Forward and both gradients of the models' shapes get plans, causal padding inside, and none with room for a copy
    of an activation. Needs nvidia-cudnn-cu13 (9.24 plans without a driver) and nvidia-cublas, but no device."""
    packages, libraries = _folders()
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), *packages]), "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLANS], input=json.dumps(H100), env={**os.environ, **paths},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if found.stderr.startswith("skip: ") or "\nskip: " in found.stderr:
        pytest.skip(found.stderr.partition("skip: ")[2].strip())
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    plans = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(plans) == 81
    for (
        convolution,
        workspace,
        limit,
        activation,
    ) in plans:  # a tensor below 1 MiB is smaller than split sums of weights
        assert workspace <= limit and workspace < max(activation, 1 << 20), (convolution, workspace, activation)
