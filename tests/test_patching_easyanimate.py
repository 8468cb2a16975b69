# SPDX-License-Identifier: Apache-2.0
"""diffusers' EasyAnimate transformer: two streams with shared norms, blocks with and without an MLP for the text."""

from __future__ import annotations

import random
from typing import Any

import patching_checks as checks
import pytest
import torch
from patching_suite import ModelSuite, no_fallback  # noqa: F401

import vidkernels

diffusers = pytest.importorskip("diffusers", minversion="0.42")


class TestEasyAnimate(ModelSuite):
    compiles_quickly = False
    rules = {"diffusers.easyanimate_block": 2}
    leaves = ("hidden_states", "encoder_hidden_states")
    lora = ("attn1.to_q", "to_v", "to_out.0", "net.2", "net.0.proj")
    hooked = (
        "transformer_blocks.1", "transformer_blocks.0.attn1", "transformer_blocks.0.ff", "transformer_blocks.0.txt_ff",
        "transformer_blocks.0.norm1", "transformer_blocks.1.norm2", "transformer_blocks.1.norm1.linear",
    )  # fmt: skip
    bypassed = ("transformer_blocks.0.norm1", "transformer_blocks.1.norm2")

    def build(self, **changes: Any) -> Any:
        options = {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2,
            "num_layers": 2, "mmdit_layers": 1, "time_embed_dim": 12, "text_embed_dim": 10,
        }  # fmt: skip
        return diffusers.EasyAnimateTransformer3DModel(**{**options, **changes})

    def inputs(self, batch: int = 2, frames: int = 2, height: int = 4, words: int = 5) -> dict[str, Any]:
        torch.manual_seed(1)
        return {
            "hidden_states": torch.randn(batch, 4, frames, height, 6),
            "timestep": torch.arange(batch) * 137 + 11,
            "encoder_hidden_states": torch.randn(batch, words, 10),
        }

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        changes = {
            "num_attention_heads": draw.randint(1, 3),
            "norm_elementwise_affine": draw.random() < 0.7,
            "norm_eps": draw.choice([1e-6, 1e-5]),
            "after_norm": draw.random() < 0.5,
            "mmdit_layers": draw.randint(0, 2),
        }
        sizes = {"batch": draw.randint(1, 3), "frames": draw.randint(1, 3), "height": 2 * draw.randint(1, 3)}
        return changes, {**sizes, "words": draw.randint(1, 6)}

    def test_verify_in_bfloat16(self) -> None:
        """Outputs and gradients of every patched module, alone, on its rule's sample."""
        report = self.patch(self.ready(after_norm=True).bfloat16(), verify=True, mode="training")
        assert all(item.ok for item in report.numerics)

    def test_modulation_of_all_blocks_in_one_product(self) -> None:
        checks.batches_modulation(self, 4)

    @pytest.mark.slow
    def test_regional_compilation(self) -> None:
        model = self.ready(num_layers=3, mmdit_layers=3)
        vidkernels.patch(model)
        # the first block's tokens are a transposed view, those of the others lie one after the other
        assert checks.graphs_by_block(model, self.inputs(), model.transformer_blocks) == 2
