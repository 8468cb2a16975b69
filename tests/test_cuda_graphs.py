# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ kernels on a stream of the caller's and inside a CUDA graph, forward and backward: no launch strays to the
default stream, nothing waits for the host, and scratch memory belongs to the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vidkernels import explain, ops
from vidkernels._commands.samples import Sample, samples

NAMES = sorted({sample.op for sample in samples(torch.device("cpu"))})


def prepared(sample: Sample, backend: str) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """Floating inputs of a sample as leaves, and a call that returns its outputs and all gradients."""
    leaves = []

    def leaf(value: object) -> object:
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            value = value.detach().clone().requires_grad_()
            leaves.append(value)
        return value

    args = [leaf(value) for value in sample.args]
    kwargs = {key: leaf(value) for key, value in sample.kwargs.items()}

    def run() -> list[Tensor]:
        result = getattr(ops, sample.op)(*args, **kwargs, backend=backend)
        outputs = [result] if isinstance(result, Tensor) else [part for part in result if part is not None]
        smooth = [output for output in outputs if output.requires_grad]
        cotangents = [torch.ones_like(output) for output in smooth]
        gradients = torch.autograd.grad(smooth, leaves, cotangents, allow_unused=True) if smooth else ()
        return [tensor.detach() for tensor in (*outputs, *gradients) if tensor is not None]

    return leaves, run


def change(leaves: list[Tensor]) -> None:
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(-0.5)


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", NAMES)
def test_side_stream_and_graph(op: str, dtype: torch.dtype) -> None:
    sample = next(s for s in samples(torch.device("cuda"), dtype) if s.op == op)
    reasons = {c.backend: c.reason for c in explain(op, *sample.args, **sample.kwargs).choices}
    reason = reasons.get("cuda", "the op has no CUDA C++ kernels")
    if reason is not None:
        pytest.skip(reason)
    leaves, run = prepared(sample, "cuda")
    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = run()
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal(on_stream, expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    change(leaves)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(captured, run())


@pytest.mark.parametrize("op", NAMES)
def test_the_call_that_is_captured(op: str) -> None:
    """The same call without a GPU: the same bits twice, other bits for other inputs."""
    sample = next(s for s in samples(torch.device("cpu")) if s.op == op)
    leaves, run = prepared(sample, "reference")
    first = run()
    assert_equal(run(), first)
    change(leaves)
    assert not leaves or any(not torch.equal(a, b) for a, b in zip(first, run(), strict=True))
