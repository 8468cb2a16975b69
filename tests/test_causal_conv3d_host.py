# SPDX-License-Identifier: Apache-2.0
"""What a convolution costs the host: torch ops and kernel launches of a call, counted per backend with kernels taken out.

Small clips wait for the host: an H100 machine took 290 us for a backward through cuDNN, 600 through Triton, 460 through
torch, whose kernels take 50. An op costs 2 to 5 us, a launch 20, a call of a bare op 5 to 13.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Ops
from torch._subclasses.fake_tensor import FakeTensorMode

from vidkernels import cudnn, ops
from vidkernels._conv import aten, pieces
from vidkernels._conv import cudnn_graphs as graphs
from vidkernels.ops import _checks

LAST = torch.channels_last_3d
CAUSAL = [1, 1, 1, 1, 1, 1, 2, 0, 1, 1, 1, 1, 0, 0]  # 3x3x3, zeros
ALL = [True, False, True, True]


def counted(call: Callable[[], Any]) -> list[str]:
    """Ops of the second call: the first makes plans."""
    call()
    with Ops() as found:
        call()
    return found.names


def inputs(channels: int = 16, kernel: tuple[int, ...] = (3, 3, 3)) -> tuple[torch.Tensor, ...]:
    """grad, x, weight in bfloat16; weights as models hold them, contiguous."""
    x = torch.randn(1, channels, 2, 8, 8).bfloat16().contiguous(memory_format=LAST)
    return torch.randn_like(x), x, torch.randn(channels, channels, *kernel).bfloat16()


@pytest.fixture
def executions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """cuDNN without cuDNN: kinds of the executed graphs, and "stream" where the handle is given one."""
    found: list[str] = []

    def build(convolution: graphs.Convolution, **target: Any) -> graphs.Plan:
        found.append("plan")
        return graphs.plan_of(convolution, lambda *args: found.append(convolution.kind), 131)

    frontend = SimpleNamespace(
        create_handle=lambda: found.append("handle") or object(),
        set_stream=lambda **options: found.append("stream"),
        cudnnGraphNotSupportedError=RuntimeError,
    )
    monkeypatch.setitem(sys.modules, "cudnn", frontend)
    monkeypatch.setattr(cudnn, "_local", cudnn._Local())
    monkeypatch.setattr(graphs, "build", build)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    cudnn._plan.cache_clear()
    yield found
    cudnn._plan.cache_clear()


def test_cudnn(executions: list[str]) -> None:
    grad, x, weight = inputs()
    geometry = list(CAUSAL[:3]), list(CAUSAL[3:6]), list(CAUSAL[6:12]), 0, 0
    names = counted(lambda: cudnn.causal_conv3d_fwd(x, weight, weight[:, 0, 0, 0, 0], None, None, *geometry, 0))
    # The result, the bias (a slice here), the workspace; the weight is taken as it is.
    assert names == ["empty_strided", "clone", "empty"]
    assert executions == ["handle", "stream", "plan", graphs.FPROP, graphs.FPROP]
    executions.clear()
    names = counted(lambda: cudnn.causal_conv3d_bwd(grad, x, weight, None, CAUSAL, ALL))
    # dx, workspace; dweight, workspace, laid out as the weight; dbias.
    assert names == ["empty_strided", "empty", "empty_strided", "empty", "_to_copy", "sum"]
    assert executions == ["plan", graphs.DGRAD, "plan", graphs.WGRAD, graphs.DGRAD, graphs.WGRAD]
    names = counted(lambda: cudnn.causal_conv3d_bwd(grad, x, weight.contiguous(memory_format=LAST), None, CAUSAL, ALL))
    assert names == ["clone", "empty_strided", "empty", "empty_strided", "empty", "sum"]
    names = counted(lambda: cudnn.causal_conv3d_bwd(grad, x, weight, None, CAUSAL, [False, False, True, False]))
    assert names == ["empty_strided", "empty", "_to_copy"]


def test_cudnn_writes_where_it_is_told(executions: list[str]) -> None:
    """No result of its own for a packed `out`, one pass for the residual, no copy of a bias as models hold it."""
    residual, x, weight = inputs()
    weight, bias = weight.contiguous(memory_format=LAST), torch.zeros(16).bfloat16()
    geometry = list(CAUSAL[:3]), list(CAUSAL[3:6]), list(CAUSAL[6:12]), 0, 0
    rows, frames = torch.zeros(1, 16, 2, 16, 8), torch.zeros(1, 16, 6, 8, 8)
    rows, frames = (t.bfloat16().contiguous(memory_format=LAST) for t in (rows, frames))
    for out, added, expected in (
        (torch.empty_like(x), None, ["empty"]),  # the workspace
        (frames[:, :, 2:4], None, ["empty"]),
        (torch.empty_like(x), residual, ["empty", "add"]),
        (residual, residual, ["empty_strided", "empty", "add"]),
        (rows[:, :, :, :8], None, ["empty_strided", "empty", "copy_"]),
        (rows[:, :, :, :8], residual, ["empty_strided", "empty", "add"]),
    ):
        names = counted(
            lambda out=out, added=added: cudnn.causal_conv3d_fwd(x, weight, bias, None, added, *geometry, 0, out=out)
        )
        assert names == expected


def test_cudnn_follows_the_stream(executions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One handle a thread, which is told its stream when that changes."""
    streams = iter([7, 7, 9, 9, 7])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: next(streams), raising=False)
    handles = {id(cudnn.thread_handle(0)) for _ in range(5)}
    assert len(handles) == 1 and executions == ["handle", "stream", "stream", "stream"]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the Triton kernels that would be launched on an H100."""
    pytest.importorskip("triton")
    from vidkernels.triton import _conv_configs, _conv_kernels, _conv_wgrad, _correlate, causal_conv3d

    found: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: found.append(self.name)

    for module, name in ((_conv_kernels, "_conv_box_kernel"), (_conv_wgrad, "_wgrad_box_kernel")):
        monkeypatch.setattr(module, name, Kernel(name))
    for module in (_conv_configs, _correlate, causal_conv3d):
        monkeypatch.setattr(module, "family", lambda device: "sm_90")
    return found


def test_triton(launches: list[str]) -> None:
    from vidkernels.triton import causal_conv3d as launchers

    grad, x, weight = inputs()
    geometry = list(CAUSAL[:3]), list(CAUSAL[3:6]), list(CAUSAL[6:12]), 0, 0
    names = counted(lambda: launchers.causal_conv3d_fwd(x, weight, None, None, None, *geometry, 0))
    assert names == ["empty", "clone"] and launches == ["_conv_box_kernel"] * 2
    launches.clear()
    names = counted(lambda: launchers.causal_conv3d_bwd(grad, x, weight, None, CAUSAL, ALL))
    # dx, the transposed weight; the parts of dweight (one here, not added up), laid out as the weight; dbias.
    assert names == ["empty", "clone", "empty", "_to_copy", "sum"]
    assert launches == ["_conv_box_kernel", "_wgrad_box_kernel"] * 2
    names = counted(lambda: launchers.causal_conv3d_bwd(grad, x, weight, None, CAUSAL, [False, False, True, False]))
    assert names == ["empty", "_to_copy"]


def test_torch_differentiates_one_convolution_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symmetric padding, as it is; a small clip on a GPU, padded in memory."""
    grad, x, weight = (t.float() for t in inputs())
    monkeypatch.setattr(aten, "_writes_out", lambda *args: True)
    symmetric = [*CAUSAL[:6], 1, 1, 1, 1, 1, 1, 0, 0]
    for geometry, padded in ((symmetric, 0), (CAUSAL, 1)):
        names = counted(lambda geometry=geometry: aten.causal_conv3d_bwd(grad, x, weight, None, geometry, ALL))
        # Besides the sum of the bias, dx and dweight may have to be laid out, by what the library returns.
        assert names.count("convolution_backward") == 1 and names.count("constant_pad_nd") == padded
        assert len(names) <= 4 + padded, names
    rule = list(CAUSAL[:3]), list(CAUSAL[3:6]), list(CAUSAL[6:12]), 0, 0
    assert len(counted(lambda: aten.causal_conv3d_fwd(x, weight, None, None, None, *rule, 0))) == 3


def test_torch_takes_parts_of_weights_as_views() -> None:
    """The pieces of two frames, causal with zeros in front, read one and two of three taps: nothing is summed."""
    grad, x, weight = (t.float() for t in inputs())
    found = pieces.pieces_of(x.shape[2:], 0, (3, 3, 3), CAUSAL[:3], CAUSAL[3:6], CAUSAL[6:12], 0, 0, 1 << 30)
    assert all(rows is None for piece in found for rows in piece.summed)
    assert [piece.part(weight).shape[2] for piece in found] == [1, 2]
    names = counted(lambda: aten.causal_conv3d_bwd(grad, x, weight, None, CAUSAL, ALL))
    assert names.count("convolution_backward") == 4 and "select" not in names


def test_autograd_calls_one_bare_op_each_way() -> None:
    x = torch.randn(1, 8, 3, 6, 6).contiguous(memory_format=LAST).requires_grad_()
    weight, bias = torch.randn(8, 8, 3, 3, 3, requires_grad=True), torch.randn(8, requires_grad=True)
    with Ops() as found:
        y = ops.causal_conv3d(x, weight, bias, backend="torch")
        y.backward(torch.ones_like(y, memory_format=LAST))
    bare = [name for name in found.names if name.startswith("causal_conv3d")]
    assert bare == ["causal_conv3d_fwd_torch", "causal_conv3d_bwd_torch"]


def test_autocast_lays_weights_out_in_the_same_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: what autocast makes of float32 weights needs no other copy."""
    from vidkernels.ops._causal_conv3d_call import autocast

    monkeypatch.setattr(_checks, "autocast_dtype", lambda x: torch.bfloat16)
    with FakeTensorMode():
        x = torch.empty(1, 16, 3, 8, 8, device="cuda", memory_format=LAST)
        planar, weight = torch.empty(x.shape, device="cuda"), torch.empty(16, 16, 3, 3, 3, device="cuda")
        lowered = weight.to(torch.bfloat16)
        with Ops() as found:
            cast = autocast(x, weight)[1]
        assert found.names == ["_to_copy", "_to_copy"]  # x and weight
        assert cast.dtype == torch.bfloat16 and cast.is_contiguous(memory_format=LAST)
        assert autocast(planar, weight)[1].is_contiguous() and autocast(x, lowered)[1] is lowered
