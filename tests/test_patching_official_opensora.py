# SPDX-License-Identifier: Apache-2.0
"""Rules for the blocks of Open-Sora 1.0 and 1.1, of PixArt and of Open-Sora-Plan's LatteT2V, on blocks of our own with the same
structure and the same results, and AdaCache around them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import official_opensora_block_toys as toys
import pytest
import torch
from helpers import assert_within_promise
from official_opensora_block_toys import (
    FRAMES,
    POSITIONS,
    WIDTH,
    BasicTransformerBlock,
    BasicTransformerBlock_,
    PixArtBlock,
    PixArtMSBlock,
    STDiT2Block,
    STDiTBlock,
)
from official_vae_suite import GRADIENT_FLOOR, knowing
from patching_suite import cast, no_fallback  # noqa: F401
from torch import Tensor, nn
from vae_cases import nudged

import vidkernels
from vidkernels.caching import adacache
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching.rules import official_opensora as rules


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    yield from knowing(rules.RULES, toys)


KINDS: dict[str, Any] = {
    "stdit": STDiTBlock,
    "stdit2": STDiT2Block,
    "stdit2 by arguments": lambda: STDiT2Block(sized=False),
    "pixart": PixArtBlock,
    "pixart of any size": PixArtMSBlock,
    "plan": BasicTransformerBlock,
    "plan without captions": lambda: BasicTransformerBlock(cross=False),
    "plan over time": BasicTransformerBlock_,
}


def inputs(kind: str, masked: bool = False) -> dict[str, Any]:
    batch = 2
    x, six = torch.randn(batch, FRAMES * POSITIONS, WIDTH), torch.randn(batch, 6 * WIDTH)
    if kind.startswith("plan"):
        extra = {"encoder_hidden_states": torch.randn(batch, 7, WIDTH), "hw": (3, 5)} if kind == "plan" else {}
        return {"hidden_states": x, "timestep": six, **extra}
    found = {"x": x, "y": torch.randn(1, 9, WIDTH), "t": six, "mask": [4, 5]}
    if kind.startswith("pixart"):
        return found | ({"HW": (3, 5)} if kind != "pixart" else {})
    if kind == "stdit":
        found["tpe"] = torch.randn(1, FRAMES, WIDTH)
    else:
        found["t_tmp"] = torch.randn(batch, 3 * WIDTH)
    if kind == "stdit2 by arguments":
        found |= {"T": FRAMES, "S": POSITIONS}
    if masked:
        found |= {
            "x_mask": torch.tensor([[True, False, True], [False, True, True]]),
            "t0": torch.randn(batch, 6 * WIDTH),
        }
        if kind != "stdit":
            found["t0_tmp"] = torch.randn(batch, 3 * WIDTH)
    return found


CASES = [(kind, masked) for kind in KINDS for masked in (False, True) if not (masked and kind.startswith("p"))]


def ready(kind: str) -> Any:
    torch.manual_seed(0)
    return KINDS[kind]().eval()


def patched(block: Any) -> Any:
    report = vidkernels.patch(block)
    assert [entry.rule.startswith("test.official.") for entry in report.patched] == [True], report.details()
    assert not report.near_misses
    return block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "masked"), CASES)
def test_equal_to_the_original(kind: str, masked: bool, dtype: torch.dtype) -> None:
    block, given = ready(kind).to(dtype), cast(inputs(kind, masked), dtype)
    original, double = copy.deepcopy(block), copy.deepcopy(block).double()
    patched(block)
    first = next(iter(given))
    with torch.no_grad():
        truth = double(**cast(given, torch.float64))
        runs = [original(**given), original(**{**given, first: nudged(given[first])})]
        assert_within_promise(block(**given), max(runs, key=lambda y: float((y.double() - truth).abs().max())), truth)
    assert not vidkernels.status(block).fallbacks


def test_autocast() -> None:
    for kind in KINDS:
        block, given = ready(kind), inputs(kind)
        original, double = copy.deepcopy(block), copy.deepcopy(block).double()
        patched(block)
        with torch.no_grad():
            truth = double(**cast(given, torch.float64))
            with torch.autocast("cpu", torch.bfloat16):
                assert_within_promise(block(**given), original(**given), truth, kind)


def gradients(block: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    first = next(iter(given))
    given = {**given, first: given[first].detach().requires_grad_()}
    y = block(**given)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    wanted = {first: given[first], **dict(block.named_parameters())}
    return dict(zip(wanted, torch.autograd.grad((y * weight).sum(), list(wanted.values())), strict=True))


@pytest.mark.parametrize(("kind", "masked"), CASES)
def test_gradients(kind: str, masked: bool) -> None:
    block, given = ready(kind), inputs(kind, masked)
    truth = gradients(copy.deepcopy(block).double(), cast(given, torch.float64))
    before, after = gradients(block, given), gradients(patched(block), given)
    for key, exact in truth.items():
        scale = max(float(truth[name].norm()) for name in truth if name.rpartition(".")[0] == key.rpartition(".")[0])
        errors = [float((found[key].double() - exact).norm()) for found in (before, after)]
        assert errors[1] <= 2 * errors[0] + GRADIENT_FLOOR * scale, f"{key}: {errors}"


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_verifies_copies_and_leaves(kind: str) -> None:
    block, given = ready(kind), inputs(kind)
    with torch.no_grad():
        before = block(**given)
        report = vidkernels.patch(block, verify=True)
        assert report.numerics and all(item.ok for item in report.numerics)
        fused = block(**given)
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**given), fused, atol=1e-5, rtol=1e-4)
        torch._dynamo.reset()
        for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert torch.equal(other(**given), fused)
        report.undo()
        assert torch.equal(block(**given), before)


def test_hooks_fire_and_those_on_a_norm_send_the_call_to_the_original() -> None:
    for kind in KINDS:
        norm_name = {"plan over time": "norm3"}.get(kind, "norm2")
        attention = "attn1" if kind.startswith("plan") else "attn"
        block, given, seen = patched(ready(kind)), inputs(kind), list[str]()
        with torch.no_grad():
            expected = block(**given)
            block.get_submodule(attention).register_forward_hook(lambda m, i, o, seen=seen: seen.append("attention"))
            torch.testing.assert_close(block(**given), expected)
            block.get_submodule(norm_name).register_forward_hook(lambda m, i, o, seen=seen: seen.append("norm"))
            with pytest.warns(VidkernelsFallbackWarning, match="LayerNorm has hooks"):
                torch.testing.assert_close(block(**given), expected, atol=1e-5, rtol=1e-4)
            vidkernels.patching._guard._WARNED.clear()
        assert seen.count("attention") == 2 and "norm" in seen, kind


def test_what_is_left_to_the_original() -> None:
    block = ready("plan")
    block._chunk_size = 2
    assert "feed-forward is chunked" in vidkernels.explain(block).details()
    block = patched(ready("plan"))
    given = {**inputs("plan"), "cross_attention_kwargs": {"scale": 1.0}}
    with torch.no_grad(), pytest.warns(VidkernelsFallbackWarning, match="cross_attention_kwargs"):
        block(**given)
    block = patched(ready("stdit2"))
    given = {**inputs("stdit2"), "x_mask": torch.ones(2, FRAMES, dtype=torch.bool), "t0": torch.randn(2, 6 * WIDTH)}
    with torch.no_grad(), pytest.warns(VidkernelsFallbackWarning, match="unusual input"):
        block(**given, t0_tmp=None)


class PlanModel(nn.Module):
    """Spatial and temporal blocks in turn, in lists of upstream's names."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock() for _ in range(3))
        self.temporal_transformer_blocks = nn.ModuleList(BasicTransformerBlock_() for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor, caption: Tensor) -> Tensor:
        for space, time in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            rows, text = timestep.repeat_interleave(FRAMES, 0), caption.repeat_interleave(FRAMES, 0)
            x = space(x.unflatten(1, (FRAMES, -1)).flatten(0, 1), None, text, None, rows, None, None)
            columns = x.unflatten(0, (-1, FRAMES)).transpose(1, 2).flatten(0, 1)
            rows = timestep.repeat_interleave(POSITIONS, 0)
            x = (
                time(columns, None, None, None, rows, None, None)
                .unflatten(0, (-1, POSITIONS))
                .transpose(1, 2)
                .flatten(1, 2)
            )
        return x


class STDiTModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(STDiT2Block() for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor, caption: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, caption[:1], timestep, timestep[:, : 3 * WIDTH], [4, 3])
        return x


@pytest.mark.parametrize("build", [PlanModel, STDiTModel])
def test_a_step_cache_knows_the_blocks(build: Any) -> None:
    """Patched or not, the same steps are computed, from the same distances."""
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(2, FRAMES * POSITIONS, WIDTH)
    caption, steps = torch.randn(2, 7, WIDTH), torch.randn(8, 2, 6 * WIDTH) * torch.linspace(1, 0.1, 8)[:, None, None]
    found = []
    with torch.no_grad():
        for fuse in (False, True):
            if fuse:
                assert vidkernels.patch(model).patched and vidkernels.status(model).patched == "all"
            with adacache(model, 8, motion=False) as handle:
                outputs = torch.stack([model(x, step, caption) for step in steps])
                found.append((outputs, handle.report()))
    assert found[0][1].computed_steps == found[1][1].computed_steps
    assert found[0][1].residual == found[1][1].residual
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-3)
    assert not vidkernels.status(model).fallbacks
