# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ kernels on a stream of the caller's and inside a CUDA graph, forward and backward: no launch strays to the
default stream, nothing waits for the host, and scratch memory belongs to the graph. Whole tokenizers inside a graph."""

from __future__ import annotations

from collections.abc import Callable

import device_models
import launches
import pytest
import torch
from test_host_copies import copies
from torch import Tensor

import vidkernels
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


def tokenizer(name: str, task: str, device: str, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Encoding or decoding by a small patched model, and an input."""
    case = device_models.Vae(name, torch.device("cpu"), torch.float32)
    call, x = case.calls[("encode", "decode").index(task)]
    vidkernels.patch(case.model)
    model = case.model.to(device, dtype)
    return lambda x: call(model, x), x.to(device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("task", ["encode", "decode"])
@pytest.mark.parametrize("name", ["vidtok-kl", "wan2.1"])
def test_a_tokenizer_in_a_graph(name: str, task: str, dtype: torch.dtype) -> None:
    """Captured as docs/capturing.md says, replayed on other inputs: the same bits as a call."""
    run, x = tokenizer(name, task, "cuda", dtype)
    with torch.no_grad():
        static = x.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(static)
        for given in (x.mul(-0.5), x):
            static.copy_(given)
            graph.replay()
            assert torch.equal(captured, run(given))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["encode", "decode"])
@pytest.mark.parametrize("name", ["vidtok-kl", "wan2.1"])
def test_a_tokenizer_neither_copies_to_the_gpu_nor_waits_for_it(name: str, task: str) -> None:
    """On meta tensors, where a value cannot be read at all: what a graph would refuse. Slow: each kernel is compiled."""
    run, x = tokenizer(name, task, "meta", torch.bfloat16)
    with torch.no_grad(), launches.record("sm_90") as launched:
        run(x)
        first = len(launched)
        with copies() as found:
            run(x)
    assert not found and len(launched) > first > 0
