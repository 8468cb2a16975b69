# SPDX-License-Identifier: Apache-2.0
"""`torch.func` inside and around `torch.compile`: gradients and tangents came out as zeros, for a graph holds a bare op and its
autograd function as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_op_contracts import SAMPLES, gradients, scalar
from torch import Tensor

from vidkernels import nn, ops
from vidkernels._commands.samples import Sample

# One op of each kind: an autograd function, one whose reference has one itself, one whose reference cannot be traced.
pytestmark = pytest.mark.filterwarnings("ignore::vidkernels.errors.VidkernelsFallbackWarning")
QUICK = ("channel_norm", "lfq_quantize", "varlen_attention")
some_ops = pytest.mark.parametrize(
    "sample",
    [pytest.param(s, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, s in SAMPLES.items()],
)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager")


@some_ops
def test_gradients_in_a_graph(sample: Sample) -> None:
    call, inputs = scalar(sample)
    right, places = gradients(call, inputs), tuple(range(len(inputs)))
    inside = compiled(lambda *values: torch.func.grad(call, argnums=places)(*values))
    around = torch.func.grad(compiled(call), argnums=places)
    for function in (inside, around):
        for found, expected in zip(function(*inputs), right, strict=True):
            torch.testing.assert_close(found, expected)


@some_ops
def test_tangents_in_a_graph(sample: Sample) -> None:
    call, inputs = scalar(sample)
    ones = tuple(torch.ones_like(x) for x in inputs)
    _, tangent = compiled(lambda *values: torch.func.jvp(call, values, ones))(*inputs)
    torch.testing.assert_close(tangent, torch.stack([g.sum() for g in gradients(call, inputs)]).sum())


@some_ops
def test_batches_in_a_graph(sample: Sample) -> None:
    call, inputs = scalar(sample)
    batches = [torch.stack([x, 1.1 * x]) for x in inputs]
    found = compiled(torch.func.vmap(call))(*batches)
    right = [call(*(batch[index] for batch in batches)) for index in range(2)]
    torch.testing.assert_close(found, torch.stack(right))


def test_one_graph_with_and_without_a_transform() -> None:
    """The choice that a graph holds is of its transforms."""
    x = torch.randn(3, 8)
    function = compiled(lambda z: ops.channel_norm(z).square().sum())
    right = torch.func.grad(lambda z: ops.channel_norm(z).square().sum())(x)
    for _ in range(2):
        torch.testing.assert_close(function(x), ops.channel_norm(x).square().sum())
        torch.testing.assert_close(torch.func.grad(function)(x), right)


@pytest.mark.parametrize("around", [compiled, lambda function: function], ids=["a graph", "eager"])
def test_stacked_projections(around: Callable[..., Any]) -> None:
    layers, x = [torch.nn.Linear(4, 3) for _ in range(2)], torch.randn(2, 4)
    project = nn.BatchedProjection(layers)

    def call(value: Tensor, product: Callable[[Tensor], Any]) -> Tensor:
        return torch.cat(product(value), -1).square().sum()

    def each(value: Tensor) -> list[Tensor]:
        return [layer(torch.nn.functional.silu(value)) for layer in layers]

    found = around(torch.func.grad(lambda value: call(value, project)))(x)
    torch.testing.assert_close(found, torch.func.grad(lambda value: call(value, each))(x))
    _, tangent = around(lambda value: torch.func.jvp(lambda v: call(v, project), (value,), (value,)))(x)
    torch.testing.assert_close(tangent, torch.func.jvp(lambda v: call(v, each), (x,), (x,))[1])
