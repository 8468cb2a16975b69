# SPDX-License-Identifier: Apache-2.0
"""The rule for the blocks of Open-Sora-Plan 1.3, on a block of our own with the same structure and the same results."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_promise
from official_vae_suite import GRADIENT_FLOOR, knowing
from patching_suite import no_fallback  # noqa: F401
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vae_cases import nudged

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching.rules import official_opensora_plan as rules

WIDTH, HEADS, CAPTION = 48, 4, 24


class Attention(nn.Module):
    """Over [N, B, D]; it sees the sizes of the grid."""

    def __init__(self, given: int) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.to_k, self.to_v = nn.Linear(given, WIDTH), nn.Linear(given, WIDTH)

    def forward(self, x: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, **sizes: int) -> Tensor:
        assert sizes["frame"] * sizes["height"] * sizes["width"] == x.shape[0]
        given = x if encoder_hidden_states is None else encoder_hidden_states
        parts = self.to_q(x), self.to_k(given), self.to_v(given)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).permute(1, 2, 0, 3) for t in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, attention_mask)
        return self.to_out(mixed.permute(2, 0, 1, 3).flatten(2))


class BasicTransformerBlock(nn.Module):
    def __init__(self, affine: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, 1e-6, affine) for _ in range(2))
        self.attn1, self.attn2 = Attention(WIDTH), Attention(CAPTION)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU("tanh"), nn.Linear(2 * WIDTH, WIDTH))
        self.scale_shift_table = nn.Parameter(torch.randn(6, WIDTH) / WIDTH**0.5)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        timestep: Any = None,
        frame: Any = None,
        height: Any = None,
        width: Any = None,
    ) -> Tensor:
        x, sizes = hidden_states, {"frame": frame, "height": height, "width": width}
        a = (self.scale_shift_table[:, None] + timestep.reshape(6, x.shape[1], -1)).unbind(0)
        x = x + a[2] * self.attn1(self.norm1(x) * (1 + a[1]) + a[0], None, attention_mask, **sizes)
        x = x + self.attn2(x, encoder_hidden_states, encoder_attention_mask, **sizes)
        return x + a[5] * self.ff(self.norm2(x) * (1 + a[4]) + a[3])


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    own = [rule for rule in rules.RULES if rule.name == "official.plan_sequence_block"]
    yield from knowing(own, sys.modules[__name__])


def inputs(batch: int, dtype: torch.dtype = torch.float32, masked: bool = False) -> dict[str, Any]:
    torch.manual_seed(batch)
    given: dict[str, Any] = {
        "hidden_states": torch.randn(24, batch, WIDTH),
        "timestep": torch.randn(6, batch, WIDTH),
        "encoder_hidden_states": torch.randn(5, batch, CAPTION),
    }
    if masked:
        given["attention_mask"] = torch.where(torch.rand(batch, 1, 24, 24) < 0.2, -1e4, 0.0)
        given["encoder_attention_mask"] = torch.where(torch.rand(batch, 1, 24, 5) < 0.2, -1e4, 0.0)
    return {**cast(given, dtype), "frame": 2, "height": 3, "width": 4}


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in given.items()}


def patched(block: nn.Module) -> nn.Module:
    report = vidkernels.patch(block)
    assert [entry.rule for entry in report.patched] == ["test.official.plan_sequence_block"]
    assert not report.near_misses
    return block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_results(batch: int, dtype: torch.dtype) -> None:
    for affine, masked in ((False, True), (True, False)):
        block = BasicTransformerBlock(affine).to(dtype)
        original, double = copy.deepcopy(block), copy.deepcopy(block).double()
        given = inputs(batch, dtype, masked)
        with torch.no_grad():
            truth = double(**cast(given, torch.float64))
            near = {**given, "hidden_states": nudged(given["hidden_states"])}
            runs = original(**given), original(**near)
            expected = max(runs, key=lambda y: float((y.double() - truth).abs().max()))
            kept = given["hidden_states"].clone()
            actual = patched(block)(**given)
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        assert_within_promise(actual, expected, truth)
        assert torch.equal(given["hidden_states"], kept)


def gradients(block: nn.Module, given: dict[str, Any], checked: bool = False) -> dict[str, Tensor]:
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    given = {**given, **{name: given[name].detach().requires_grad_() for name in names}}
    y: Any = checkpoint(lambda: block(**given), use_reentrant=False) if checked else block(**given)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    wanted = {**{name: given[name] for name in names}, **dict(block.named_parameters())}
    return dict(zip(wanted, torch.autograd.grad((y * weight).sum(), list(wanted.values())), strict=True))


@pytest.mark.parametrize("batch", [1, 3])
def test_gradients(batch: int) -> None:
    block = BasicTransformerBlock(affine=True)
    given = inputs(batch)
    truth = gradients(copy.deepcopy(block).double(), cast(given, torch.float64))
    before, after = gradients(block, given), gradients(patched(block), given)
    scale = max(float(g.norm()) for g in truth.values())
    for key, exact in truth.items():
        errors = [float((g[key].double() - exact).norm()) for g in (before, after)]
        assert errors[1] <= 2 * errors[0] + GRADIENT_FLOOR * scale, (key, errors)
    again = gradients(block, given, checked=True)
    assert all(torch.equal(again[key], after[key]) for key in after)


def test_autocast() -> None:
    block, given = BasicTransformerBlock(), inputs(2)
    double, original = copy.deepcopy(block).double(), copy.deepcopy(block)
    with torch.no_grad():
        truth = double(**cast(given, torch.float64))
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = original(**given), patched(block)(**given)
    assert actual.dtype == expected.dtype
    assert_within_promise(actual, expected, truth)


def test_state_verify_hooks_and_undo() -> None:
    block, given = BasicTransformerBlock(affine=True), inputs(2)
    state, expected = copy.deepcopy(block.state_dict()), block(**given)
    report = vidkernels.patch(block, verify=True)
    assert report.numerics and all(item.ok for item in report.numerics)
    assert all(torch.equal(block.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(copy.deepcopy(block)(**given), block(**given))
    seen: list[Tensor] = []
    handle = block.norm2.register_forward_hook(lambda module, args, y: seen.append(y))
    with pytest.warns(VidkernelsFallbackWarning, match="hooks"):
        assert torch.equal(block(**given), expected)
    assert len(seen) == 1
    handle.remove()
    report.undo()
    assert type(block) is BasicTransformerBlock and torch.equal(block(**given), expected)


@pytest.mark.slow
def test_compiles_without_graph_break() -> None:
    block, given = patched(BasicTransformerBlock()), inputs(2)
    with torch.no_grad():
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**given), block(**given), atol=2e-5, rtol=1e-4)
    torch._dynamo.reset()
