# SPDX-License-Identifier: Apache-2.0
"""Rules for the official transformers of Wan 2.1 and 2.2, on models of our own with the same structure and results."""

from __future__ import annotations

import copy
import importlib
import random
from collections.abc import Iterator
from typing import Any, ClassVar

import official_wan_toys as plain
import official_wan_toys_2_2 as per_token
import pytest
import torch
from helpers import assert_within_promise
from official_vae_suite import knowing
from patching_suite import (
    ModelSuite,
    cast,
    no_fallback,  # noqa: F401
)
from torch import Tensor

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import _rule as table
from vidkernels.patching.rules import _official_wan_attention as attention
from vidkernels.patching.rules import official_wan as rules

SHARED = ("attention", "rms_norm")
GRIDS = torch.tensor([[2, 2, 3], [1, 3, 3]])


def named(*parts: str) -> list[Any]:
    return [rule for rule in rules.RULES if rule.name.removeprefix("wan.") in parts]


class WanSuite(ModelSuite):
    home: ClassVar[Any]
    cross: ClassVar[str]
    known_rules: ClassVar[Any]
    leaves = ("hidden_states", "rows", "embedding", "context")
    lora = ("q", "v", "o", "ffn.0")
    hooked = ("blocks.0.self_attn.q", "blocks.1.cross_attn", "blocks.0.norm1", "blocks.0.self_attn.norm_q", "head.head")
    bypassed = ("blocks.0.norm1", "blocks.0.self_attn.norm_q")
    zero_gradients = (".k.bias", ".k_img.bias")
    # The official code reads the sizes of clips from a tensor, so it has no shapes without values.
    test_shapes_without_values = None  # type: ignore[assignment]

    @pytest.fixture(autouse=True)
    def known(self) -> Iterator[None]:
        before = list(table._USER)
        for found in (knowing(named(*SHARED), plain), knowing(self.known_rules, self.home)):
            next(found)
        yield
        table._USER[:] = before

    def build(self, **changes: Any) -> Any:
        return plain.Toy(self.home, cross=self.cross, **changes)

    def inputs(self, grids: Tensor = GRIDS, tokens: int = 13, dim: int = 48) -> dict[str, Any]:
        batch = grids.shape[0]
        per = (tokens,) if self.home is per_token else ()
        return {
            "hidden_states": torch.randn(batch, tokens, dim),
            "rows": 0.5 * torch.randn(batch, *per, 6, dim),
            "embedding": torch.randn(batch, *per, dim),
            "context": torch.randn(batch, 9, dim),
            "sizes": grids,
        }

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        heads = draw.choice((1, 2, 3))
        dim = heads * draw.choice((16, 24, 40))
        grids = torch.tensor([[draw.randint(1, 3) for _ in range(3)]] * draw.choice((1, 2)))
        tokens = int(grids.prod(1).max()) + draw.choice((0, 5))
        config = {"dim": dim, "num_heads": heads, "normed": draw.random() < 0.5}
        return config, {"grids": grids, "tokens": tokens, "dim": dim}

    def test_bfloat16(self) -> None:
        """Weights of the projections in bfloat16, with which the official code needs autocast."""
        model, arguments = self.ready(), self.inputs()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | plain.WanRMSNorm):
                module.bfloat16()
        arguments["hidden_states"] = arguments["hidden_states"].bfloat16()
        double = copy.deepcopy(model).double()
        with torch.no_grad():
            truth = double(**cast(arguments, torch.float64))
            with torch.autocast("cpu", torch.bfloat16):
                expected = model(**arguments)
                self.patch(model)
                actual = model(**arguments)
        assert_within_promise(actual, expected, truth)
        assert not vidkernels.status(model).fallbacks

    def test_angles_of_another_base_are_used_as_they_are(self) -> None:
        model, arguments = self.ready(), self.inputs()
        model.freqs = model.freqs**0.5
        self.compare(model, arguments)

    def test_modulation_that_the_original_refuses(self) -> None:
        head, arguments = self.home.Head(48, 12).double(), cast(self.inputs(), torch.float64)
        call = arguments["hidden_states"], arguments["embedding"]
        with torch.no_grad():
            expected = head(*call)
            vidkernels.patch(head)
            with pytest.warns(VidkernelsFallbackWarning, match="modulation is torch.float64"):
                assert torch.equal(head(*call), expected)


class TestTextToVideo(WanSuite):
    home, cross = plain, "WanT2VCrossAttention"
    known_rules = named("block", "head", "text_attention", "image_attention")
    rules = {
        "test.wan.block": 2,
        "test.wan.attention": 2,
        "test.wan.text_attention": 2,
        "test.wan.head": 1,
        "test.wan.rms_norm": 8,
    }

    def test_positions_in_a_graph_are_those_outside(self) -> None:
        grids = tuple(tuple(sizes) for sizes in GRIDS.tolist())
        expected = attention.clip_positions(grids, 13, torch.device("cpu"))
        assert torch.equal(attention._traced_positions(GRIDS, 13), expected)

    def test_positions_are_made_once_and_serve_gradients(self) -> None:
        model, arguments = self.ready(), self.inputs()
        self.patch(model)
        with torch.inference_mode():
            model(**arguments)
        assert self.gradients(model, arguments)

    def test_without_norms_of_queries(self) -> None:
        alone = plain.WanSelfAttention(48, 2, qk_norm=False)
        assert "it has no norms of queries and keys" in vidkernels.explain(alone).details()

    def test_norm_of_any_shape(self) -> None:
        for shape in ((48,), (3, 48), (2, 3, 4, 48)):
            for dtype in (torch.float32, torch.bfloat16):
                norm, x = plain.WanRMSNorm(48), torch.randn(shape).to(dtype)
                with torch.no_grad():
                    truth, expected = copy.deepcopy(norm).double()(x.double()), norm(x)
                    vidkernels.patch(norm)
                    assert_within_promise(norm(x), expected, truth)


class TestImageToVideo(TestTextToVideo):
    cross = "WanI2VCrossAttention"
    rules = {
        "test.wan.block": 2,
        "test.wan.attention": 2,
        "test.wan.image_attention": 2,
        "test.wan.head": 1,
        "test.wan.rms_norm": 10,
    }


class TestPerToken(WanSuite):
    home, cross = per_token, "WanCrossAttention"
    known_rules = named("block", "head", "context_attention")
    rules = {
        "test.wan.block": 2,
        "test.wan.attention": 2,
        "test.wan.context_attention": 2,
        "test.wan.head": 1,
        "test.wan.rms_norm": 8,
    }


def test_the_official_file() -> None:
    """Where a checkout of Wan 2.1 or 2.2 is on the path, which no package holds."""
    pytest.importorskip("wan.modules.model", reason="Wan is not on the path")
    upstream = importlib.import_module("wan.modules.model")
    model = upstream.WanModel(dim=48, ffn_dim=96, num_heads=2, num_layers=2)
    report = vidkernels.explain(model)
    assert not report.near_misses and len(report.patched) == 15
