# SPDX-License-Identifier: Apache-2.0
"""Arguments at the edge of what ops accept: strided biases, frozen sides, no tokens, one token, tensors that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vidkernels import errors, ops

pytestmark = pytest.mark.filterwarnings("ignore::vidkernels.errors.VidkernelsFallbackWarning")

BIASES: dict[str, Callable[[int], Tensor]] = {
    "every second": lambda n: torch.randn(2 * n)[::2],
    "one for all": lambda n: torch.randn(1).expand(n),
    "reversed columns": lambda n: torch.randn(n, 3)[:, 1],
}
CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {
    "causal_conv3d": ops.causal_conv3d,
    "upsample_conv3d": ops.upsample_conv3d,
    "upsample_conv3d, blended": lambda *args, **kwargs: ops.upsample_conv3d(*args, **kwargs, mix_factor=torch.ones(1)),
    "downsample_conv3d": lambda *args, **kwargs: ops.downsample_conv3d(*args, **kwargs, mix_factor=torch.ones(1)),
}


def check_bias(name: str, kind: str, backend: str, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
    function, x, weight = CONVOLUTIONS[name], torch.randn(1, 8, 2, 5, 5), torch.randn(8, 8, *kernel) / 10
    bias = BIASES[kind](8)
    right = function(x, weight, bias.contiguous(), backend=backend)
    for _ in range(2):  # a repeated call has another stride than the one that was decided
        assert torch.equal(function(x, weight, bias, backend=backend), right)
    leaf = bias.detach().requires_grad_()
    y = function(x, weight, leaf, backend=backend)
    assert torch.equal(y, right)
    y.sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_biases_whose_values_are_no_neighbours(name: str, kind: str, backend: str) -> None:
    """oneDNN and Triton read from the first value on, whatever the stride: a bias cut out of a larger tensor gave others."""
    check_bias(name, kind, backend)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_biases_whose_values_are_no_neighbours_in_triton(name: str) -> None:
    check_bias(name, "every second", "triton", (2, 1, 1))


def _normed(q: Tensor, k: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    return ops.qk_norm_rope(q, k, None, weight)


def test_what_depends_on_nothing_learned_asks_for_no_gradient() -> None:
    """Attention behind a frozen side computed its gradient for nothing; the reference never asked."""
    q, k, weight = torch.randn(6, 2, 8), torch.randn(6, 2, 8), torch.ones(8)
    for learned, wanted in ((0, (True, False)), (1, (False, True)), (2, (False, True))):
        inputs = [x.detach().requires_grad_(place == learned) for place, x in enumerate((q, k, weight))]
        outputs = _normed(*inputs)
        assert tuple(y.requires_grad for y in outputs if y is not None) == wanted
        (gradient,) = torch.autograd.grad(outputs[wanted.index(True)].square().sum(), inputs[learned])  # type: ignore[union-attr]
        assert gradient.isfinite().all()
    rows = torch.randn(2, 8, requires_grad=True)
    x = torch.randn(2, 5, 8)
    hidden, y = ops.adaln_zero(x, x, rows.detach(), rows, None)
    assert not hidden.requires_grad and y.requires_grad
    (gradient,) = torch.autograd.grad(y.sum(), rows)
    torch.testing.assert_close(gradient, torch.full((2, 8), 5.0))
    assert ops.adaln_zero(x, x, rows, None, None)[0].requires_grad


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (2, 3, 0, 8)], ids=str)
def test_rows_of_no_tokens(shape: tuple[int, ...], backend: str) -> None:
    """Groups of nothing: the backward counted a token each, and refused its own index."""
    x, table = torch.randn(shape, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    rows = torch.tensor([1, 2]) if len(shape) == 2 else torch.tensor([[1, 2], [0, 0]])
    y = ops.adaln_modulate(x, table, table, rows=rows, backend=backend)
    h = ops.gate_residual(x, x, table, rows=rows, backend=backend)
    assert y.shape == h.shape == shape
    (y.sum() + h.sum()).backward()
    assert x.grad is not None and table.grad is not None and not table.grad.any()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_rows_of_no_channels(backend: str) -> None:
    x, table = torch.randn(2, 3, 0), torch.randn(2, 0)
    assert ops.adaln_modulate(x, table, table, backend=backend).shape == x.shape
    assert ops.gate_residual(x, x, table, backend=backend).shape == x.shape


@pytest.mark.parametrize("backend", ["composed", "reference"])
def test_attention_over_an_axis_of_nothing_stays_in_the_graph(backend: str) -> None:
    q, k, v = (torch.randn(2, 0, 3, 4, 8, requires_grad=True) for _ in range(3))
    for dim in (0, 1, 2):
        y = ops.axial_attention(q, k, v, dim, backend=backend)
        assert y.shape == q.shape and y.requires_grad
        y.sum().backward()
    assert q.grad is not None


Refused = tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...], str]
MISFITS: dict[str, Refused] = {
    "a pack with fewer values": (ops.norm_rope_attention, (6, 4, 8), (5, 4, 8), "v"),
    "a pack with other heads of values": (ops.norm_rope_attention, (6, 4, 8), (6, 2, 8), "v"),
    "a pack with more keys": (ops.norm_rope_attention, (7, 4, 8), (7, 4, 8), "k"),
    "a pack without key heads": (ops.norm_rope_attention, (6, 0, 8), (6, 0, 8), "k"),
    "a pack with key heads that do not divide": (ops.norm_rope_attention, (6, 3, 8), (6, 3, 8), "k"),
    "an axis without key heads": (ops.axial_attention, (6, 0, 8), (6, 0, 8), "k"),
    "an axis with other heads of values": (ops.axial_attention, (6, 4, 8), (6, 2, 8), "v"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", MISFITS)
def test_attention_refuses_what_does_not_fit(case: str, backend: str) -> None:
    """By every backend: Triton's kernel takes the sizes of q for those of k and v, and would read beyond them."""
    function, keys, values, argument = MISFITS[case]
    q, k, v = torch.randn(6, 4, 8), torch.randn(keys), torch.randn(values)
    rest = (torch.tensor([0, 2, 6], dtype=torch.int32),) if function is ops.norm_rope_attention else (0,)
    with pytest.raises(errors.ShapeError, match=f"^{argument}: expected"):
        function(q, k, v, *rest, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_entropy_of_one_token(backend: str) -> None:
    """Without an axis of tokens, and with the mask of one."""
    x = torch.randn(3)
    options: dict[str, Any] = {"inv_temperature": 1.0, "backend": backend}
    right = ops.lfq_entropy(x[None], **options)
    for found in (ops.lfq_entropy(x, **options), ops.lfq_entropy(x, mask=torch.tensor(True), **options)):
        assert found[0].shape == () and all(map(torch.allclose, found, right))
    assert not any(ops.lfq_entropy(x, mask=torch.tensor(False), **options))
    right = ops.fsq_entropy(x[None], [3, 4, 5], **options)
    assert all(map(torch.allclose, ops.fsq_entropy(x, [3, 4, 5], mask=torch.tensor(1), **options), right))


@pytest.mark.parametrize("shape", [(1, 2, 0, 4, 4), (1, 2, 3, 4, 0), (0, 2, 3, 4, 4)], ids=str)
def test_upsampling_of_nothing_by_the_reference(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(2, 2, 3, 3, 3)
    found, past = ops.upsample_conv3d(x, weight, return_history=True, backend="reference")
    right, right_past = ops.upsample_conv3d(x, weight, return_history=True)
    assert found.shape == right.shape and past.shape == right_past.shape
