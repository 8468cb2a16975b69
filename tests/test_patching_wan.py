# SPDX-License-Identifier: Apache-2.0
"""diffusers' Wan transformers: text and image to video, one timestep a sample or a token, and their relatives."""

from __future__ import annotations

import copy
import random
from typing import Any

import patching_checks as checks
import pytest
import torch
from helpers import assert_within_promise
from patching_suite import ModelSuite, cast, no_fallback  # noqa: F401

import vidkernels
from vidkernels.caching import adacache
from vidkernels.errors import PatchError
from vidkernels.patching import _mechanism, _verify

diffusers = pytest.importorskip("diffusers", minversion="0.42")
from diffusers.models.transformers import transformer_wan  # noqa: E402

IMAGE = 3  # tokens of the image in front of the text's 512


class TestWan(ModelSuite):
    rules = {"diffusers.wan_block": 2, "diffusers.wan_attention": 4, "diffusers.wan_positions": 1}
    leaves = ("hidden_states", "encoder_hidden_states")
    lora = ("to_q", "to_v", "to_out.0", "net.2", "net.0.proj")
    hooked = (
        "blocks.1", "blocks.0.attn1", "blocks.0.attn2", "blocks.0.attn1.norm_q", "blocks.0.attn2.norm_k",
        "blocks.0.attn1.to_k", "blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm3", "blocks.1.ffn", "rope",
    )  # fmt: skip
    bypassed = tuple(path for path in hooked if "norm" in path)

    def build(self, **changes: Any) -> Any:
        options = {
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
            "out_channels": 4, "text_dim": 10, "freq_dim": 16, "ffn_dim": 20, "num_layers": 2, "rope_max_seq_len": 32,
        }  # fmt: skip
        return diffusers.WanTransformer3DModel(**{**options, **changes})

    def inputs(
        self, batch: int = 2, frames: int = 3, height: int = 4, words: int = 5, image: int = 0, per_token: bool = False
    ) -> dict[str, Any]:
        torch.manual_seed(1)
        tokens = frames * (height // 2) * 3
        timesteps = torch.arange(batch) * 137 + 11
        if per_token:
            timesteps = timesteps[:, None] * (torch.arange(tokens) % 2)
        arguments = {
            "hidden_states": torch.randn(batch, 4, frames, height, 6),
            "timestep": timesteps,
            "encoder_hidden_states": torch.randn(batch, words, 10),
        }
        if image:
            arguments["encoder_hidden_states_image"] = torch.randn(batch, image, 7)
        return arguments

    def test_verify_in_bfloat16(self) -> None:
        """Outputs and gradients of every patched module, alone, on its rule's sample."""
        report = self.patch(self.ready().bfloat16(), verify=True, mode="training")
        assert all(item.ok for item in report.numerics)

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        image = draw.random() < 0.5
        changes = {
            "num_attention_heads": draw.randint(1, 3),
            "attention_head_dim": draw.choice([12, 16, 32]),
            "cross_attn_norm": draw.random() < 0.5,
            "eps": draw.choice([1e-6, 1e-5]),
        }
        if image:
            changes |= {
                "image_dim": 7,
                "added_kv_proj_dim": changes["num_attention_heads"] * changes["attention_head_dim"],
            }
        sizes = {"batch": draw.randint(1, 2), "frames": draw.randint(1, 4), "height": 2 * draw.randint(1, 3)}
        words = 512 if image else draw.randint(1, 6)
        return changes, {**sizes, "words": words, "image": IMAGE * image, "per_token": draw.random() < 0.5}

    def test_float64_is_the_same_function(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With its casts to float32 lifted, the model in float64 is the truth; the patched model in float64 equals it."""
        plain = torch.Tensor.float
        model, arguments = self.ready().double(), cast(self.inputs(per_token=True), torch.float64)
        monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else plain(x))
        with torch.no_grad():
            expected = model(**arguments).sample
            self.patch(model)
            torch.testing.assert_close(model(**arguments).sample, expected, atol=1e-13, rtol=1e-12)

    def test_rotation_runs_inside_the_op_or_by_the_tables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vidkernels.patching.rules import _dit_units

        model, arguments, calls = self.ready(), self.inputs(), []
        turn = _dit_units.Turn.__call__
        monkeypatch.setattr(_dit_units.Turn, "__call__", lambda *a, **k: calls.append(1) or turn(*a, **k))
        with torch.no_grad():
            expected = model(**arguments).sample
            truth = copy.deepcopy(model).double()(**cast(arguments, torch.float64)).sample
            vidkernels.patch(model, exclude="rope")
            assert_within_promise(model(**arguments).sample, expected, truth)
            assert len(calls) == 4
            vidkernels.patch(model)
            assert_within_promise(model(**arguments).sample, expected, truth)
            assert len(calls) == 4

    def test_tables_of_another_base_or_precision_are_used_as_they_are(self) -> None:
        arguments = self.inputs()
        for change in (lambda rope: rope.bfloat16(), lambda rope: rope.__init__(12, (1, 2, 2), 32, theta=256.0)):
            model = self.ready()
            change(model.rope)
            self.compare(model, arguments)

    def test_gradients_with_tables(self) -> None:
        """Rotation by the model's tables, with gradients, is the one of the op to float32's rounding."""
        model, arguments = self.ready(), self.inputs(per_token=True)
        self.patch(model, mode="training")
        inside = self.gradients(model, arguments)
        vidkernels.unpatch(model)
        vidkernels.patch(model, exclude="rope")
        for key, gradient in self.gradients(model, arguments).items():
            if not key.endswith("to_k.bias"):
                torch.testing.assert_close(gradient, inside[key], atol=2e-6, rtol=1e-4)

    def test_mask_processor_and_fused_projections_are_honoured(self) -> None:
        model, arguments = self.ready(), self.inputs()
        attention = model.blocks[0].attn2
        x, context = torch.randn(2, 4, 24), torch.randn(2, 5, 24)
        mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
        mask[..., 3:] = False
        with torch.no_grad():
            plain = model(**arguments).sample
            masked = attention(x, context, mask)
            self.patch(model)
            torch.testing.assert_close(attention(x, context, mask), masked, atol=1e-6, rtol=1e-5)
            for block in model.blocks:
                block.attn1.fuse_projections()
                block.attn2.fuse_projections()
            torch.testing.assert_close(model(**arguments).sample, plain, atol=1e-5, rtol=1e-4)
        checks.honours_processor(model, arguments, [model.blocks[0].attn1], transformer_wan.WanAttnProcessor)

    def test_attention_backend_is_honoured(self) -> None:
        checks.honours_attention_backend(self)

    def test_exported_without_reading_tables(self) -> None:
        """`torch.export` has tables without values: positions are left to the model's own tables."""
        model, arguments = self.ready(), self.inputs()
        self.patch(model)
        with torch.no_grad():
            program = torch.export.export(model, (), arguments, strict=False)
            torch.testing.assert_close(program.module()(**arguments).sample, model(**arguments).sample, **checks.CLOSE)

    def test_caching_hooks_of_diffusers_know_patched_blocks(self) -> None:
        """First-block cache: enabled after patching, it skips the same steps and gives the same outputs."""
        steps = [self.inputs() | {"timestep": torch.full((2,), time)} for time in (900, 895, 300)]
        outputs = []
        for patched in (False, True):
            model = self.ready(num_layers=3)
            if patched:
                vidkernels.patch(model)
            model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.05))
            with torch.no_grad(), model.cache_context("cond"):
                outputs.append([model(**arguments).sample for arguments in steps])
        for actual, expected in zip(outputs[1], outputs[0], strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)

    def test_only_a_patch_enters_classes_in_the_table_of_diffusers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`explain`, `dry_run`, `status` and a `verify` that fails change nothing outside of the model either."""
        registry = pytest.importorskip("diffusers.hooks._helpers").TransformerBlockRegistry
        model = self.ready()
        known = registry.get(type(model.blocks[0]))

        def fail(*arguments: Any) -> None:
            raise PatchError("errors that break the promise")

        made = set(_mechanism._CLASSES)
        monkeypatch.setattr(registry, "_registry", table := {type(model.blocks[0]): known})
        vidkernels.explain(model)
        vidkernels.patch(model, dry_run=True)
        vidkernels.status(model)
        assert set(_mechanism._CLASSES) <= made
        with monkeypatch.context() as patch:
            patch.setattr(_verify, "_judge_all", fail)
            with pytest.raises(PatchError, match="break the promise"):
                vidkernels.patch(model, verify=True)
        assert len(table) == 1
        vidkernels.patch(model)
        assert registry.get(type(model.blocks[0])) is known
        vidkernels.unpatch(model)
        with adacache(model, 4):
            vidkernels.patch(model)
            for cls in list(table)[1:]:
                del table[cls]
        assert registry.get(type(model.blocks[0])) is known and "vk:" in repr(model.blocks[0])

    def test_blocks_sharded_on_their_own_still_run_fused(self) -> None:
        model = self.ready()
        checks.runs_fused_when_sharded(model, self.inputs(), model.blocks)

    def test_outputs_that_a_hook_keeps_are_not_overwritten(self) -> None:
        model = self.ready()
        self.patch(model)
        checks.leaves_kept_outputs(model, self.inputs(), model.blocks[0].attn1.to_q)

    def test_regional_compilation(self) -> None:
        model = self.ready(num_layers=3)
        vidkernels.patch(model)
        assert checks.graphs_by_block(model, self.inputs(), model.blocks) == 1

    def test_compiled_with_tables(self) -> None:
        model, arguments = self.ready(num_layers=1), self.inputs(per_token=True)
        vidkernels.patch(model, exclude="rope")
        with torch.no_grad():
            expected = model(**arguments).sample
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(**arguments).sample, expected, atol=1e-5, rtol=1e-4)
        torch._dynamo.reset()


@pytest.mark.parametrize("per_token", [False, True])
def test_block_in_bfloat16_with_float32_rows(per_token: bool) -> None:
    """As diffusers loads it: norms, table and modulation in float32, everything else in bfloat16."""
    torch.manual_seed(0)
    block = transformer_wan.WanTransformerBlock(24, 40, 2, cross_attn_norm=True).eval().bfloat16()
    for part in (block.norm2,):
        part.float()
    block.scale_shift_table.data = block.scale_shift_table.data.float()
    x, context = torch.randn(2, 12, 24).bfloat16(), torch.randn(2, 5, 24).bfloat16()
    temb = torch.randn(2, *([12] if per_token else []), 6, 24)
    rope = transformer_wan.WanRotaryPosEmbed(12, (1, 1, 1), 16)
    tables = rope(torch.zeros(1, 1, 3, 2, 2))
    with torch.no_grad():
        expected = block(x, context, temb, tables)
        double = copy.deepcopy(block).double()
        truth = double(x.double(), context.double(), temb.double(), [table.double() for table in tables])
        vidkernels.patch(block)
        actual = block(x, context, temb, tables)
    assert_within_promise(actual, expected, truth)
    assert not vidkernels.status(block).fallbacks


def test_vace_and_copies_of_the_file() -> None:
    """VACE uses Wan's blocks; Animate and ChronoEdit carry copies, which match by their digests."""
    from diffusers.models.transformers import transformer_chronoedit, transformer_wan_animate

    torch.manual_seed(0)
    options = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 10,
        "freq_dim": 16, "ffn_dim": 20, "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    model = diffusers.WanVACETransformer3DModel(**options, vace_layers=[0], vace_in_channels=6).eval()
    arguments = {
        "hidden_states": torch.randn(1, 4, 2, 4, 6),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 10),
        "control_hidden_states": torch.randn(1, 6, 2, 4, 6),
    }
    with torch.no_grad():
        expected = model(**arguments).sample
        truth = copy.deepcopy(model).double()(**cast(arguments, torch.float64)).sample
        report = vidkernels.patch(model, verify=True, mode="training")
        assert_within_promise(model(**arguments).sample, expected, truth)
    assert not vidkernels.status(model).fallbacks
    rules = [entry.rule.removeprefix("diffusers.wan_") for entry in report.patched]
    assert {name: rules.count(name) for name in rules} == {"positions": 1, "attention": 6, "block": 2, "vace_block": 1}
    for home in (transformer_chronoedit, transformer_wan_animate):
        block = home.WanTransformerBlock(24, 40, 2, cross_attn_norm=True).eval()
        assert len(vidkernels.patch(block, verify=True, mode="inference").patched) == 3
