# SPDX-License-Identifier: Apache-2.0
"""Rules for Open-Sora 2.0's transformer, on a model of our own with the same structure and the same results."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from typing import Any

import official_opensora2_toys as toys
import pytest
import torch
from helpers import assert_within_promise
from official_vae_suite import knowing
from patching_suite import ModelSuite, cast, no_fallback  # noqa: F401
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import digest
from vidkernels.patching.rules import _opensora2_units as units
from vidkernels.patching.rules import official_opensora2 as rules

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(units, "ATTENTION", {digest(toys.attention)})
    monkeypatch.setattr(units, "TURN", {digest(toys.apply_rope)})
    monkeypatch.setattr(units, "ANGLES", {digest(toys.rope), digest(toys.liger_rope)})
    units._is_known.cache_clear()
    yield from knowing(rules.RULES, toys)
    units._is_known.cache_clear()


class TestFused(ModelSuite):
    rules = {  # noqa: RUF012
        "test.opensora2.double_block": 1,
        "test.opensora2.single_block": 2,
        "test.opensora2.last": 1,
        "test.opensora2.positions": 1,
    }
    leaves = ("img", "txt", "y_vec")
    lora = ("qkv", "proj", "linear1", "linear2", "lin", "img_mlp.0", "txt_mlp.2", "linear")
    norms = ("double_blocks.0.img_norm1", "double_blocks.0.txt_attn.norm", "single_blocks.0.norm.key_norm")
    layers = (
        *("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.1", "double_blocks.0.img_mlp.0", "pe_embedder"),
        *("single_blocks.0.linear1", "single_blocks.1.linear2", "single_blocks.1.mlp_act", "single_blocks.1"),
        *("single_blocks.0.modulation.lin", "final_layer.linear"),
    )
    bypassed = (*norms, "single_blocks.1.modulation", "double_blocks.0.txt_mod", "final_layer.norm_final")
    hooked = (*layers, *bypassed)
    zero_gradients = ("k_proj.bias",)
    compiles_quickly = False
    options = {"fused": True, "liger": False}  # noqa: RUF012

    def build(self, **changes: Any) -> Any:
        return toys.MMDiTModel(**{**self.options, **changes})

    def inputs(self, batch: int = 2, rows: int = 3, words: int = 5, shared: bool = False) -> dict[str, Any]:
        torch.manual_seed(1)
        ranges = [torch.arange(size * 1.0) for size in (2, rows, 2)]
        places = torch.stack(torch.meshgrid(*ranges, indexing="ij"), -1).flatten(0, 2)
        ids = places[None].repeat(1 if shared else batch, 1, 1)
        if not shared:
            ids[-1, :, 0] += 7
        return {
            "img": torch.randn(batch, places.shape[0], 6),
            "img_ids": ids,
            "txt": torch.randn(batch, words, 10),
            "txt_ids": torch.zeros(ids.shape[0], words, 3),
            "timesteps": torch.linspace(0.2, 0.9, batch),
            "y_vec": torch.randn(batch, 12),
        }

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        heads, axes = draw.randint(1, 3), draw.choice([(4, 6, 6), (2, 4, 2), (8, 12, 12)])
        changes = {"dim": heads * sum(axes), "heads": heads, "axes": axes, "theta": draw.choice((1e4, 256.0))}
        sizes = {"batch": draw.randint(1, 3), "rows": draw.randint(1, 3), "words": draw.randint(1, 6)}
        return changes, {**sizes, "shared": draw.random() < 0.5}

    def test_rotation_runs_inside_the_op(self) -> None:
        """In half precision for every table; in float32 not for Liger's, whose angles are float32; not without positions."""
        for dtype, inside in ((torch.bfloat16, True), (torch.float32, not self.options["liger"])):
            model, arguments = self.ready().to(dtype), cast(self.inputs(), dtype)
            self.patch(model)
            assert placed(model, arguments) == [inside] * 4
            vidkernels.unpatch(model.pe_embedder)
            assert placed(model, arguments) == [False] * 4

    def test_tables_that_were_written_to_or_copied_are_used_as_they_are(self) -> None:
        changes = (
            lambda table: table.mul_(0.5),
            lambda table: table.clone(),
            lambda table: table.bfloat16().float(),
        )
        for change in changes:
            model, arguments = self.ready(), self.inputs()
            model.pe_embedder.register_forward_hook(
                lambda module, given, tables, change=change: torch.utils._pytree.tree_map(change, tables)
            )
            self.compare(model, arguments)

    def test_a_table_keeps_its_positions_when_the_ids_are_written_to(self) -> None:
        model, dtype = self.ready().bfloat16(), torch.bfloat16
        patched = copy.deepcopy(model)
        self.patch(patched)
        x, vec = torch.randn(2, 12, 32, dtype=dtype), torch.randn(2, 32, dtype=dtype)
        results = []
        with torch.no_grad():
            for one in (model, patched, copy.deepcopy(model).double()):
                ids = self.inputs()["img_ids"].clone()
                tables = one.pe_embedder(ids)
                ids.zero_()
                kind = torch.float64 if one is not model and one is not patched else dtype
                results.append(one.single_blocks[0](x.to(kind), vec.to(kind), tables))
        assert_within_promise(results[1], results[0], results[2])

    def test_what_hooks_keep_is_not_overwritten(self) -> None:
        for path in self.layers:
            model, kept = self.ready(), list[tuple[Tensor, Tensor]]()
            self.patch(model)
            model.get_submodule(path).register_forward_hook(
                lambda module, given, y, kept=kept: kept.extend(
                    (t, t.clone()) for t in (y, *given) if isinstance(t, Tensor)
                )
            )
            with torch.no_grad():
                model(**self.inputs())
            assert all(torch.equal(*pair) for pair in kept), path

    def test_recomputed_blocks_give_the_same_gradients(self) -> None:
        """Reentrant checkpoints hand detached tables to a block's second run."""
        model, arguments = self.ready(), self.inputs()
        self.patch(model)
        found = []
        for recomputed in (False, True):
            model.through = (lambda block, *call: checkpoint(block, *call, use_reentrant=True)) if recomputed else apply
            given = {**arguments, "img": arguments["img"].clone().requires_grad_()}
            model(**given).square().sum().backward()
            found.append(given["img"].grad)
        assert torch.equal(*found)


def apply(block: Any, *call: Any) -> Any:
    return block(*call)


def placed(model: Any, arguments: dict[str, Any]) -> list[bool]:
    """Of each launch for norms of queries and keys: whether it turns them, too."""
    calls: list[bool] = []
    op = units.ops.qk_norm_rope
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(units.ops, "qk_norm_rope", lambda *a, **k: calls.append("positions" in k) or op(*a, **k))
        model(**arguments)
    return calls


class TestSeparate(TestFused):
    """Queries, keys and values by layers of their own."""

    options = {"fused": False, "liger": False}  # noqa: RUF012
    lora = ("q_proj", "v_proj", "v_mlp", "linear2", "lin")
    layers = ("double_blocks.0.img_attn.q_proj", "single_blocks.0.v_mlp", "single_blocks.1.k_proj")
    hooked = layers


class TestLiger(TestFused):
    """The pair of tables, turned by halves."""

    # Nothing here depends on the tables.
    test_lora_is_honoured = test_what_hooks_keep_is_not_overwritten = None  # type: ignore[assignment]
    test_shapes_without_values = test_state_verify_and_undo = None  # type: ignore[assignment]

    options = {"fused": True, "liger": True}  # noqa: RUF012
    hooked = ("pe_embedder", "single_blocks.1")
    rules = {  # noqa: RUF012
        **{key: count for key, count in TestFused.rules.items() if key != "test.opensora2.positions"},
        "test.opensora2.liger_positions": 1,
    }


def small(**changes: Any) -> tuple[Any, Any, dict[str, Any]]:
    """An unpatched model, a patched copy, and inputs."""
    suite = TestFused()
    model = suite.ready(**changes)
    patched = copy.deepcopy(model)
    vidkernels.patch(patched)
    return model, patched, suite.inputs()


def agree(model: Any, patched: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", VidkernelsFallbackWarning)
        expected = model(**arguments)
        torch.testing.assert_close(patched(**arguments), expected, **CLOSE)
    return expected


def test_another_processor_is_honoured() -> None:
    model, patched, arguments = small()
    before = agree(model, patched, arguments)

    class Louder(toys.SingleStreamBlockProcessor):
        def __call__(self, *call: Any, **options: Any) -> Tensor:
            return 2 * super().__call__(*call, **options)

    for one in (model, patched):
        one.single_blocks[0].processor = Louder()
    assert not torch.allclose(agree(model, patched, arguments), before, atol=1e-3)
    assert "it uses Louder" in str(vidkernels.status(patched).fallbacks)


def test_functions_of_the_file_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands under `flash_attn_func` is called; another `attention` or `apply_rope` sends blocks to their original."""
    model, patched, arguments = small()
    before, flash, whole = agree(model, patched, arguments), toys.flash_attn_func, toys.attention
    monkeypatch.setattr(toys, "flash_attn_func", lambda q, k, v: 2 * flash(q, k, v))
    assert not torch.allclose(agree(model, patched, arguments), before, atol=1e-3)
    assert not vidkernels.status(patched).fallbacks
    monkeypatch.setattr(toys, "attention", lambda q, k, v, pe: -whole(q, k, v, pe))
    agree(model, patched, arguments)
    assert "another one than upstream's" in str(vidkernels.status(patched).fallbacks)
    assert "another one than upstream's" in vidkernels.explain(model.double_blocks).details()


@pytest.mark.parametrize(
    ("path", "attribute", "value"),
    [
        ("single_blocks.0", "mlp_act", nn.ReLU()),
        ("single_blocks.0.mlp_act", "approximate", "none"),
        ("single_blocks.0", "pre_norm", nn.LayerNorm(32)),
        ("double_blocks.0.img_norm2", "eps", 0.1),
        ("double_blocks.0", "txt_mlp", nn.Identity()),
        ("double_blocks.0.img_mlp.1", "approximate", "none"),
        ("double_blocks.0.txt_attn", "norm", toys.QKNorm(16)),
        ("pe_embedder", "theta", 100.0),
    ],
)
def test_changes_on_a_patched_model(path: str, attribute: str, value: Any) -> None:
    model, patched, arguments = small()
    before = agree(model, patched, arguments)
    for one in (model, patched):
        setattr(one.get_submodule(path), attribute, value)
    assert not torch.equal(agree(model, patched, arguments), before) or isinstance(value, toys.QKNorm)


def test_float64_keeps_the_tables_of_the_model() -> None:
    model = TestFused().ready().double()
    patched = copy.deepcopy(model)
    vidkernels.patch(patched)
    arguments = cast(TestFused().inputs(), torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(patched(**arguments), model(**arguments), atol=1e-12, rtol=1e-12)


def test_modulation_of_all_blocks_in_one_product() -> None:
    model, _, arguments = small()
    with torch.no_grad():
        expected = model(**arguments)
        truth = copy.deepcopy(model).double()(**cast(arguments, torch.float64))
        assert vidkernels.patch(model, batch_modulation=True).batched == 5
        for _ in range(2):
            assert_within_promise(model(**arguments), expected, truth)
        vidkernels.unpatch(model)
        assert torch.equal(model(**arguments), expected)


def test_step_cache() -> None:
    """Both lists of blocks are found, and timesteps in a forward that is an attribute of the instance."""
    model, patched, arguments = small(singles=3)
    runs: list[int] = []
    for one in (model, patched):
        one.single_blocks[2].register_forward_hook(lambda *_: runs.append(1))
        with torch.no_grad(), vidkernels.adacache(one, 6, codebook=((1e9, 2),), motion=False) as handle:
            for count in (3, 6):  # the first sample is left half-way
                outputs = [
                    one(**{**arguments, "timesteps": torch.full((2,), 0.9 - 0.1 * step)}) for step in range(count)
                ]
            assert handle.report().computed_steps == (1, 2, 4, 5, 6)
            assert len(runs) == 2 + 5
        torch.testing.assert_close(outputs[0], one(**{**arguments, "timesteps": torch.full((2,), 0.9)}), **CLOSE)
        runs.clear()
