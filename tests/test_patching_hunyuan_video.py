# SPDX-License-Identifier: Apache-2.0
"""diffusers' HunyuanVideo: blocks of two streams and of one, text masks, and a first frame with its own condition."""

from __future__ import annotations

import random
from typing import Any

import patching_checks as checks
import pytest
import torch
from helpers import assert_within_promise
from patching_suite import ModelSuite, cast, no_fallback  # noqa: F401

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning

diffusers = pytest.importorskip("diffusers", minversion="0.42")
from diffusers.models.transformers import transformer_hunyuan_video as home  # noqa: E402


class TestHunyuanVideo(ModelSuite):
    rules = {
        "diffusers.hunyuan_video_block": 1, "diffusers.hunyuan_video_single_block": 1,
        "diffusers.hunyuan_video_positions": 1, "diffusers.adaln_continuous": 1,
    }  # fmt: skip
    leaves = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    lora = ("to_q", "to_v", "add_k_proj", "to_add_out", "net.2", "net.0.proj", "linear", "proj_mlp", "proj_out")
    hooked = (
        "transformer_blocks.0", "single_transformer_blocks.0", "transformer_blocks.0.attn",
        "single_transformer_blocks.0.attn", "transformer_blocks.0.attn.norm_added_k", "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.norm1", "transformer_blocks.0.norm2_context", "single_transformer_blocks.0.norm",
        "single_transformer_blocks.0.attn.norm_q", "single_transformer_blocks.0.act_mlp",
        "single_transformer_blocks.0.proj_mlp", "rope",
    )  # fmt: skip
    bypassed = tuple(path for path in hooked if "norm" in path or path.endswith(".attn"))
    zero_gradients = ("to_k.bias", "add_k_proj.bias")
    changes: dict[str, Any] = {}

    def build(self, **changes: Any) -> Any:
        options = {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2, "text_embed_dim": 10,
            "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4), "guidance_embeds": False,
        }  # fmt: skip
        return diffusers.HunyuanVideoTransformer3DModel(**{**options, **self.changes, **changes})

    def inputs(
        self, batch: int = 2, frames: int = 3, height: int = 4, words: int = 5, guidance: bool = False
    ) -> dict[str, Any]:
        torch.manual_seed(1)
        mask = torch.ones(batch, words, dtype=torch.long)
        mask[-1, (words + 1) // 2 :] = 0
        arguments = {
            "hidden_states": torch.randn(batch, 4, frames, height, 6),
            "timestep": torch.arange(batch) * 137 + 11,
            "encoder_hidden_states": torch.randn(batch, words, 10),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(batch, 8),
        }
        if guidance:
            arguments["guidance"] = torch.full((batch,), 6000.0)
        return arguments

    def test_verify_in_bfloat16(self) -> None:
        """Outputs and gradients of every patched module, alone, on its rule's sample."""
        report = self.patch(self.ready().bfloat16(), verify=True, mode="training")
        assert all(item.ok for item in report.numerics)

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        axes = draw.choice([(4, 4, 4), (2, 4, 6), (8, 12, 12), (4, 2, 2)])
        guidance = draw.random() < 0.5
        changes = {
            "num_attention_heads": draw.randint(1, 3),
            "attention_head_dim": sum(axes),
            "rope_axes_dim": axes,
            "guidance_embeds": guidance,
            "rope_theta": draw.choice([256.0, 10000.0]),
        }
        sizes = {"batch": draw.randint(1, 3), "frames": draw.randint(1, 4), "height": 2 * draw.randint(1, 3)}
        return changes, {**sizes, "words": draw.randint(1, 6), "guidance": guidance}

    def test_rotation_in_half_precision_runs_inside_the_op(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """float32 takes the model's tables, whose float32 angles it can tell from exact ones."""
        from vidkernels.patching.rules import _dit_units

        calls: list[int] = []
        turn = _dit_units.Turn.__call__
        monkeypatch.setattr(_dit_units.Turn, "__call__", lambda *a, **k: calls.append(1) or turn(*a, **k))
        for dtype, expected in ((torch.float32, 4), (torch.bfloat16, 0)):
            model = self.ready().to(dtype)
            self.patch(model)
            calls.clear()
            with torch.no_grad():
                model(**cast(self.inputs(), dtype))
            assert len(calls) == expected

    def test_bfloat16_by_the_tables(self) -> None:
        model, arguments = self.ready().bfloat16(), cast(self.inputs(), torch.bfloat16)
        with torch.no_grad():
            expected = model(**arguments).sample
            truth = self.ready().bfloat16().double()(**cast(arguments, torch.float64)).sample
            vidkernels.patch(model, exclude="rope")
            assert_within_promise(model(**arguments).sample, expected, truth)

    def test_modulation_of_all_blocks_in_one_product(self) -> None:
        checks.batches_modulation(self, 3)

    def test_another_processor_is_honoured(self) -> None:
        model = self.ready()
        self.patch(model)
        attentions = [block.attn for block in [*model.transformer_blocks, *model.single_transformer_blocks]]
        checks.honours_processor(model, self.inputs(), attentions, home.HunyuanVideoAttnProcessor2_0)

    @pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
    def test_hook_in_front_of_an_attention_sees_keywords(self, kind: str) -> None:
        model, arguments, seen = self.ready(), self.inputs(), []
        self.patch(model)
        attention = model.get_submodule(f"{kind}.0.attn")
        attention.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, set(kwargs))), with_kwargs=True)
        with torch.no_grad(), pytest.warns(VidkernelsFallbackWarning, match="has hooks"):
            model(**arguments)
        names = {"hidden_states", "encoder_hidden_states", "attention_mask", "image_rotary_emb"}
        assert seen == [((), names)]

    def test_tables_for_other_tokens_are_refused_as_upstream_does(self) -> None:
        """They were filled up, and the last tokens not rotated."""
        model, arguments = self.ready(), self.inputs()
        self.patch(model)
        model.rope.patch_size += 1
        with torch.no_grad(), pytest.warns(VidkernelsFallbackWarning, match="tables are for"):
            with pytest.raises(RuntimeError, match="must match the size"):
                model(**arguments)

    def test_attention_backend_is_honoured(self) -> None:
        checks.honours_attention_backend(self)

    def test_regional_compilation(self) -> None:
        """Two graphs for any number of blocks: the first one's input is contiguous, the others' are views."""
        model = self.ready(num_single_layers=3)
        vidkernels.patch(model)
        assert checks.graphs_by_block(model, self.inputs(), model.single_transformer_blocks) == 2


class TestTokenReplace(TestHunyuanVideo):
    """HunyuanVideo-I2V: the first frame is given, its tokens are modulated as at timestep 0."""

    compiles_quickly = False
    rules = {
        "diffusers.hunyuan_video_token_replace_block": 1, "diffusers.hunyuan_video_token_replace_single_block": 1,
        "diffusers.hunyuan_video_positions": 1, "diffusers.adaln_continuous": 1,
    }  # fmt: skip
    changes = {"image_condition_type": "token_replace"}
    test_regional_compilation = None
    test_modulation_of_all_blocks_in_one_product = None  # two conditions


class TestHunyuanVideo15(ModelSuite):
    """Version 1.5: two kinds of text and an image in the text stream, all blocks with two streams."""

    compiles_quickly = False
    rules = {
        "diffusers.hunyuan_video15_block": 2, "diffusers.hunyuan_video15_positions": 1, "diffusers.adaln_continuous": 1,
    }  # fmt: skip
    leaves = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_2")
    lora = ("to_q", "to_v", "add_k_proj", "to_add_out", "net.2", "net.0.proj", "linear")
    hooked = (
        "transformer_blocks.0", "transformer_blocks.0.attn", "transformer_blocks.1.attn.norm_added_k",
        "transformer_blocks.0.norm1", "transformer_blocks.0.norm2_context", "rope",
    )  # fmt: skip
    bypassed = tuple(path for path in hooked if "norm" in path or path.endswith(".attn"))
    zero_gradients = ("to_k.bias", "add_k_proj.bias")
    # The model itself looks whether image tokens are given: upstream's graph breaks there, patched or not.
    test_compiles_without_graph_break = None
    test_shapes_without_values = None  # for the same reason

    def build(self, **changes: Any) -> Any:
        options = {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
            "num_refiner_layers": 1, "text_embed_dim": 10, "text_embed_2_dim": 6, "image_embed_dim": 8,
            "rope_axes_dim": (4, 4, 4),
        }  # fmt: skip
        return diffusers.HunyuanVideo15Transformer3DModel(**{**options, **changes})

    def inputs(self, batch: int = 2, frames: int = 2, height: int = 3, words: int = 5) -> dict[str, Any]:
        torch.manual_seed(1)
        mask = torch.ones(batch, words, dtype=torch.long)
        mask[-1, (words + 1) // 2 :] = 0
        return {
            "hidden_states": torch.randn(batch, 4, frames, height, 2),
            "timestep": torch.arange(batch) * 137.0 + 11,
            "encoder_hidden_states": torch.randn(batch, words, 10),
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": torch.randn(batch, 3, 6),
            "encoder_attention_mask_2": torch.ones(batch, 3, dtype=torch.long),
            "image_embeds": torch.randn(batch, 2, 8),
        }

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        axes = draw.choice([(4, 4, 4), (2, 4, 6), (8, 12, 12)])
        changes = {"num_attention_heads": draw.randint(1, 3), "attention_head_dim": sum(axes), "rope_axes_dim": axes}
        sizes = {"batch": draw.randint(1, 3), "frames": draw.randint(1, 3), "height": draw.randint(1, 3)}
        return changes, {**sizes, "words": draw.randint(1, 6)}


def test_framepack_uses_the_same_blocks() -> None:
    from diffusers.models.transformers import transformer_hunyuan_video_framepack as framepack

    assert framepack.HunyuanVideoTransformerBlock is home.HunyuanVideoTransformerBlock


@pytest.mark.parametrize("norm", ["layer_norm", None])
@pytest.mark.parametrize("suite", [TestHunyuanVideo, TestTokenReplace, TestHunyuanVideo15])
def test_blocks_with_other_norms_of_queries_are_left_out_by_name(suite: Any, norm: str | None) -> None:
    report = vidkernels.patch(suite().ready(qk_norm=norm))
    blocks = [entry for entry in report.entries if entry.cls.endswith("TransformerBlock")]
    assert len(blocks) == 2 and {entry.state for entry in blocks} == {"skipped"}
    assert all(f"norm_q is {'missing' if norm is None else 'a LayerNorm'}" in entry.reason for entry in blocks)
