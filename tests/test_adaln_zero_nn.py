# SPDX-License-Identifier: Apache-2.0
"""The adaLN-Zero modules: the block's frame, the final layer, and projections of many blocks in one product."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vidkernels.errors import OptionError, ShapeError
from vidkernels.nn import AdaLNFinal, AdaLNZero, BatchedProjection


def randomize(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def plain_block(
    module: AdaLNZero, x: torch.Tensor, condition: torch.Tensor, attention: nn.Module, mlp: nn.Module
) -> torch.Tensor:
    """DiT's block in torch's own words."""
    shift, scale, gate, shift_m, scale_m, gate_m = module.linear(nn.functional.silu(condition)).chunk(6, dim=1)

    def norm(value: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        if module.norm == "rms":
            return nn.functional.rms_norm(value, value.shape[-1:], weight, module.eps)
        return nn.functional.layer_norm(value, value.shape[-1:], weight, bias, module.eps)

    y = norm(x, module.weight_attention, module.bias_attention) * (1 + scale[:, None]) + shift[:, None]
    x = x + gate[:, None] * attention(y)
    y = norm(x, module.weight_mlp, module.bias_mlp) * (1 + scale_m[:, None]) + shift_m[:, None]
    return x + gate_m[:, None] * mlp(y)


@pytest.mark.parametrize(("norm", "affine"), [("layer", False), ("layer", True), ("rms", True)])
def test_block_equals_dit_forward_and_backward(norm: str, affine: bool) -> None:
    module = randomize(AdaLNZero(16, 12, norm=norm, affine=affine)).double()
    attention, mlp = nn.Linear(16, 16).double(), nn.Linear(16, 16).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    condition = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    actual, expected = module(x, condition, attention, mlp), plain_block(module, x, condition, attention, mlp)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    inputs = (x, condition, *module.parameters(), *attention.parameters(), *mlp.parameters())
    cotangent = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(o, inputs, cotangent) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_new_block_is_the_identity_and_a_new_final_layer_gives_zero() -> None:
    x, condition = torch.randn(2, 5, 16), torch.randn(2, 16)
    assert torch.equal(AdaLNZero(16)(x, condition, nn.Linear(16, 16), nn.Linear(16, 16)), x)
    assert torch.equal(AdaLNFinal(16, 8)(x, condition), torch.zeros(2, 5, 8))


def test_packed_block_equals_its_samples() -> None:
    module, lengths = randomize(AdaLNZero(16)), (3, 1, 6)
    attention, mlp = nn.Linear(16, 16), nn.Linear(16, 16)
    x, condition = torch.randn(10, 16), torch.randn(3, 16)
    ends = torch.tensor([0, 3, 4, 10])
    packed = module(x, condition, attention, mlp, cu_seqlens=ends)
    for i, sample in enumerate(x.split(lengths)):
        alone = module(sample[None], condition[i : i + 1], attention, mlp)[0]
        torch.testing.assert_close(packed[ends[i] : ends[i + 1]], alone)


def test_final_layer() -> None:
    module = randomize(AdaLNFinal(16, 8))
    x, condition = torch.randn(2, 5, 16), torch.randn(2, 16)
    shift, scale = module.modulation(nn.functional.silu(condition)).chunk(2, dim=1)
    expected = module.linear(nn.functional.layer_norm(x, (16,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None])
    torch.testing.assert_close(module(x, condition), expected)


@pytest.mark.parametrize("kind", [lambda: AdaLNZero(8, norm="batch"), lambda: AdaLNFinal(8, 8, norm="none")])
def test_unknown_norm(kind: object) -> None:
    with pytest.raises(OptionError, match="norm: expected"):
        kind()


@pytest.fixture
def layers() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(6, 4 * (i + 1)) for i in range(3))


def test_batched_projection_equals_each_layer(layers: nn.ModuleList) -> None:
    twin = copy.deepcopy(layers)
    batched = BatchedProjection(layers)
    assert batched.packed
    outputs = []
    for run, model in ((batched, layers), (lambda c: tuple(f(nn.functional.silu(c)) for f in twin), twin)):
        condition = torch.linspace(-2, 2, 18).reshape(3, 6).requires_grad_()
        y = run(condition)
        sum((i + 1) * part.square().sum() for i, part in enumerate(y)).backward()
        outputs.append([*y, condition.grad, *(parameter.grad for parameter in model.parameters())])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)


def test_batched_projection_keeps_parameters_and_checkpoints(layers: nn.ModuleList) -> None:
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    identities = [id(parameter) for parameter in layers.parameters()]
    batched = BatchedProjection(layers)
    assert [id(parameter) for parameter in layers.parameters()] == identities
    assert list(layers.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    layers.load_state_dict({name: value + 1 for name, value in before.items()})
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.5)
    sum(part.sum() for part in batched(torch.ones(1, 6))).backward()
    optimizer.step()
    assert batched.packed
    for part, layer in zip(batched(torch.ones(1, 6)), layers, strict=True):
        torch.testing.assert_close(part, layer(nn.functional.silu(torch.ones(1, 6))))


def test_batched_projection_notices_weights_that_moved(layers: nn.ModuleList) -> None:
    """The common storage is stale in each case: the layers' own weights must be what counts."""
    batched, x = BatchedProjection(layers), torch.randn(2, 6)

    def agrees() -> bool:
        expected = [layer(nn.functional.silu(x)) for layer in layers]
        return all(torch.allclose(a, b) for a, b in zip(batched(x), expected, strict=True))

    with torch.no_grad():
        layers[1].weight.data = layers[1].weight.data.clone().mul_(3)
    assert not batched.packed and agrees()
    batched.pack()
    assert batched.packed and agrees()
    layers.load_state_dict({k: v * 2 for k, v in layers.state_dict().items()}, assign=True)
    assert not batched.packed and agrees()


def test_batched_projection_runs_hooks_of_its_layers(layers: nn.ModuleList) -> None:
    batched, seen = BatchedProjection(layers), []
    handle = layers[2].register_forward_hook(lambda *_: seen.append(1))
    batched(torch.ones(1, 6))
    handle.remove()
    batched(torch.ones(1, 6))
    assert seen == [1]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(2))
    try:
        batched(torch.ones(1, 6))
    finally:
        handle.remove()
    assert seen == [1, *[2] * len(layers)]
    layers[0].forward = lambda x: seen.append(3) or nn.Linear.forward(layers[0], x)
    batched(torch.ones(1, 6))
    assert seen[-1] == 3


def test_batched_projection_notices_weights_changed_before_the_backward(layers: nn.ModuleList) -> None:
    y = BatchedProjection(layers)(torch.ones(1, 6, requires_grad=True))
    with torch.no_grad():
        layers[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        sum(part.sum() for part in y).backward()


def test_batched_projection_refuses_layers_of_two_kinds() -> None:
    with pytest.raises(ShapeError, match=r"linears\[1\]"):
        BatchedProjection([nn.Linear(6, 4), nn.Linear(5, 4)])
    with pytest.raises(ShapeError, match="bias=False"):
        BatchedProjection([nn.Linear(6, 4, bias=False)])
