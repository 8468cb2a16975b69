# SPDX-License-Identifier: Apache-2.0
"""Rules for HunyuanVideo's own transformers, on a model of our own with the same structure and the same results."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from typing import Any

import official_hunyuan_toys as toys
import pytest
import torch
from helpers import assert_within_promise
from official_vae_suite import knowing
from patching_suite import ModelSuite, cast, no_fallback  # noqa: F401
from torch import Tensor, nn

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import digest
from vidkernels.patching.rules import _hunyuan_exact as exact
from vidkernels.patching.rules import _hunyuan_units as units
from vidkernels.patching.rules import official_hunyuan as rules

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
_FUNCTIONS = ("apply_rotary_emb", "modulate", "apply_gate", "reshape_for_broadcast", "rotate_half")


@pytest.fixture(autouse=True)
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The rules for videos, or those for images where the test's class or name says so."""
    functions = [getattr(toys, name) for name in _FUNCTIONS] + [toys.RMSNorm.forward, toys.RMSNorm._norm]
    monkeypatch.setattr(units, "FUNCTIONS", {digest(function) for function in functions})
    units._are_known.cache_clear()
    image = getattr(request.cls, "image", "image" in request.function.__name__)
    chosen = [rule for rule in rules.RULES if ("image" in rule.name) == image or "final" in rule.name]
    yield from knowing(chosen, toys)
    units._are_known.cache_clear()


class TestFused(ModelSuite):
    image = False
    rules = {  # noqa: RUF012
        "test.hunyuan.double_block": 1,
        "test.hunyuan.single_block": 2,
        "test.hunyuan.final": 1,
    }
    leaves = ("img", "txt", "vec")
    lora = ("img_attn_qkv", "txt_attn_proj", "linear1", "linear2", "fc1", "fc2", "linear")
    layers = (
        *("double_blocks.0.img_attn_qkv", "double_blocks.0.txt_mlp.act", "double_blocks.0.img_mlp.fc1"),
        *("single_blocks.0.linear1", "single_blocks.1.linear2", "single_blocks.1.mlp_act", "single_blocks.1"),
        *("single_blocks.0.modulation.linear", "final_layer.linear", "double_blocks.0.txt_mlp"),
    )
    bypassed = (
        *("double_blocks.0.img_norm1", "double_blocks.0.txt_attn_k_norm", "single_blocks.0.q_norm"),
        *("single_blocks.1.modulation", "double_blocks.0.txt_mod.act", "final_layer.norm_final"),
    )
    hooked = (*layers, *bypassed)
    compiles_quickly = False

    def build(self, **changes: Any) -> Any:
        return toys.HYVideoDiffusionTransformer(**changes)

    def inputs(self, batch: int = 2, rows: int = 3, words: int = 5) -> dict[str, Any]:
        torch.manual_seed(1)
        mask = torch.ones(batch, words, dtype=torch.int64)
        mask[-1, words // 2 + 1 :] = 0
        return {
            "img": torch.randn(batch, 4 * rows, 6),
            "txt": torch.randn(batch, words, 10),
            "mask": mask,
            "vec": torch.randn(batch, 12),
            "grid": (2, rows, 2),
        }

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        axes = draw.choice([(4, 14, 14), (4, 6, 6), (8, 28, 28)])
        sizes = {"batch": draw.randint(1, 3), "rows": draw.randint(1, 3), "words": draw.randint(1, 6)}
        return {"heads": draw.randint(1, 3), "axes": axes, "theta": draw.choice((1e4, 256.0))}, sizes

    def test_rotation_runs_inside_the_op(self) -> None:
        """In half precision, for tables of HunyuanVideo's angles; text is normalised apart in blocks with two streams."""
        for dtype, changes, inside in (
            (torch.bfloat16, {}, True),
            (torch.float32, {}, False),
            (torch.bfloat16, {"theta": 1e4}, False),
            (torch.bfloat16, {"axes": (4, 6, 6)}, False),
        ):
            model, arguments = self.ready(**changes).to(dtype), cast(self.inputs(), dtype)
            self.patch(model)
            assert placed(model, arguments) == [inside, False, inside, inside]

    def test_other_tables_are_used_as_they_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        upstream = toys.HYVideoDiffusionTransformer.tables
        for change in (lambda t: t * 0.5, lambda t: t.bfloat16().float(), lambda t: t.flip(0), lambda t: None):
            for dtype in (torch.float32, torch.bfloat16):
                monkeypatch.setattr(
                    toys.HYVideoDiffusionTransformer,
                    "tables",
                    lambda self, grid, change=change: changed(upstream(self, grid), change),
                )
                self.compare(self.ready().to(dtype), cast(self.inputs(), dtype))

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

    def test_float64_copies_for_verify(self) -> None:
        """They compute what upstream's do."""
        model, arguments = self.ready().double(), cast(self.inputs(), torch.float64)
        with torch.no_grad():
            expected = model(**arguments)
            for block in [*model.double_blocks, *model.single_blocks]:
                exact.widen(block)
            torch.testing.assert_close(model(**arguments), expected, atol=1e-12, rtol=1e-12)


class TestImage(TestFused):
    """The first frame has a condition of its own."""

    image = True
    rules = {  # noqa: RUF012
        "test.hunyuan.image_double_block": 1,
        "test.hunyuan.image_single_block": 2,
        "test.hunyuan.final": 1,
    }
    # One layer projects both conditions.
    hooked = tuple(path for path in TestFused.hooked if not path.endswith("modulation.linear"))

    def build(self, **changes: Any) -> Any:
        model = super().build(**changes)
        model.condition = "token_replace"
        return model


def changed(tables: Any, change: Any) -> Any:
    found = tuple(change(table) for table in tables)
    return None if found[0] is None else found


def placed(model: Any, arguments: dict[str, Any]) -> list[bool]:
    """Of each launch for norms of queries and keys: whether it turns them, too."""
    calls: list[bool] = []
    op = units.ops.qk_norm_rope
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(units.ops, "qk_norm_rope", lambda *a, **k: calls.append("positions" in k) or op(*a, **k))
        model(**arguments)
    return calls


def small(image: bool = False) -> tuple[Any, Any, dict[str, Any]]:
    """An unpatched model, a patched copy, and inputs."""
    suite = TestImage() if image else TestFused()
    model = suite.ready()
    patched = copy.deepcopy(model)
    vidkernels.patch(patched)
    return model, patched, suite.inputs()


def agree(model: Any, patched: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", VidkernelsFallbackWarning)
        expected = model(**arguments)
        torch.testing.assert_close(patched(**arguments), expected, **CLOSE)
    return expected


def test_other_conditions_of_images() -> None:
    """Without one, and with one that is no frame's."""
    model, patched, arguments = small(image=True)
    before = agree(model, patched, arguments)
    for condition in (None, "latent_concat"):
        for one in (model, patched):
            one.condition = condition
        assert not torch.allclose(agree(model, patched, arguments), before, atol=1e-3)
    assert not vidkernels.status(patched).fallbacks


def test_functions_of_the_file_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands under `attention` is called; another rotation sends blocks to their original."""
    model, patched, arguments = small()
    before, upstream, turn = agree(model, patched, arguments), toys.attention, toys.apply_rotary_emb
    monkeypatch.setattr(toys, "attention", lambda *a, **k: 2 * upstream(*a, **k))
    assert not torch.allclose(agree(model, patched, arguments), before, atol=1e-3)
    assert not vidkernels.status(patched).fallbacks
    monkeypatch.setattr(toys, "apply_rotary_emb", lambda q, k, tables: turn(k, q, tables))
    agree(model, patched, arguments)
    assert "rotates or modulates by other functions" in str(vidkernels.status(patched).fallbacks)
    assert "rotates or modulates by other functions" in vidkernels.explain(model.double_blocks).details()


def test_attention_over_several_devices_is_called() -> None:
    model, patched, arguments = small()
    before = agree(model, patched, arguments)
    for one in (model, patched):
        for block in (*one.double_blocks, *one.single_blocks):
            block.hybrid_seq_parallel_attn = lambda mixed, image: mixed * (image / 10)
    assert not torch.allclose(agree(model, patched, arguments), before, atol=1e-3)
    assert not vidkernels.status(patched).fallbacks


@pytest.mark.parametrize(
    ("path", "attribute", "value"),
    [
        ("single_blocks.0", "mlp_act", nn.ReLU()),
        ("single_blocks.0", "q_norm", nn.LayerNorm(32)),
        ("single_blocks.0.k_norm", "eps", 0.1),
        ("double_blocks.0.img_norm2", "eps", 0.1),
        ("double_blocks.0", "txt_mlp", nn.Identity()),
        ("double_blocks.0.img_mlp", "act", nn.ReLU()),
        ("double_blocks.0.img_mlp", "norm", nn.LayerNorm(128)),
        ("double_blocks.0.txt_mod", "act", nn.ReLU()),
    ],
)
def test_changes_on_a_patched_model(path: str, attribute: str, value: Any) -> None:
    model, patched, arguments = small()
    before = agree(model, patched, arguments)
    for one in (model, patched):
        setattr(one.get_submodule(path), attribute, value)
    assert not torch.equal(agree(model, patched, arguments), before)


def test_what_is_left_to_the_original() -> None:
    for norm in (nn.Identity, nn.LayerNorm):
        for block in (toys.MMDoubleStreamBlock(32, 2, norm), toys.MMSingleStreamBlock(32, 2, norm)):
            assert f"a query or key norm is a {norm.__name__}" in vidkernels.explain(block).details()
    _, patched, _ = small()
    block, vec = patched.single_blocks[0], torch.randn(1, 64)
    x, starts = torch.randn(1, 6, 64), torch.tensor([0, 6, 6], dtype=torch.int32)
    for words, places, reason in ((0, starts, "0 of 6 tokens"), (2, starts[:2], "starts of the samples")):
        with torch.no_grad(), pytest.warns(VidkernelsFallbackWarning, match=reason):
            block(x, vec, words, places, places, 6, 6)


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


def test_no_rows_are_stacked_for_images() -> None:
    assert vidkernels.patch(small(image=True)[0], batch_modulation=True, strict=False).batched == 0


def test_step_cache() -> None:
    """Both lists of blocks are found, and timesteps under their name."""
    model, patched, arguments = small()
    runs: list[int] = []
    for one in (model, patched):
        one.single_blocks[1].register_forward_hook(lambda *_: runs.append(1))
        with torch.no_grad(), vidkernels.adacache(one, 6, codebook=((1e9, 2),), motion=False) as handle:
            for count in (3, 6):  # the first sample is left half-way
                outputs = [one(**arguments, t=torch.full((2,), 0.9 - 0.1 * step)) for step in range(count)]
            assert handle.report().computed_steps == (1, 2, 4, 5, 6)
            assert len(runs) == 2 + 5
        torch.testing.assert_close(outputs[0], one(**arguments, t=torch.full((2,), 0.9)), **CLOSE)
        runs.clear()
