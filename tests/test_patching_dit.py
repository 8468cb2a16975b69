# SPDX-License-Identifier: Apache-2.0
"""diffusers' DiTTransformer2DModel, and its block with cross-attention."""

from __future__ import annotations

import random
from typing import Any

import patching_checks as checks
import pytest
import torch
from patching_suite import ModelSuite, no_fallback  # noqa: F401

import vidkernels

diffusers = pytest.importorskip("diffusers", minversion="0.42")


class TestDiT(ModelSuite):
    compiles_quickly = False
    rules = {"diffusers.dit_block": 2}
    lora = ("to_q", "to_v", "to_out.0", "net.2", "net.0.proj", "linear")
    hooked = ("transformer_blocks.1", "transformer_blocks.0.attn1", "transformer_blocks.0.norm1",
              "transformer_blocks.1.norm1.norm", "transformer_blocks.1.norm3", "transformer_blocks.0.norm1.linear")  # fmt: skip
    bypassed = ("transformer_blocks.0.norm1", "transformer_blocks.1.norm1.norm", "transformer_blocks.1.norm3")

    def build(self, **changes: Any) -> Any:
        options = {
            "num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
            "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 11,
        }  # fmt: skip
        return diffusers.DiTTransformer2DModel(**{**options, **changes})

    def inputs(self, batch: int = 2, side: int = 8) -> dict[str, Any]:
        torch.manual_seed(1)
        return {
            "hidden_states": torch.randn(batch, 4, side, side),
            "timestep": torch.arange(batch) * 137 + 11,
            "class_labels": torch.arange(batch) + 3,
        }

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        changes = {
            "num_attention_heads": draw.randint(1, 4),
            "attention_head_dim": draw.choice([8, 12, 16]),
            "attention_bias": draw.random() < 0.5,
            "activation_fn": draw.choice(["gelu-approximate", "geglu", "gelu"]),
        }
        return changes, {"batch": draw.randint(1, 3)}

    def test_chunked_feed_forward_goes_to_the_original(self) -> None:
        model = self.ready()
        self.patch(model)
        checks.chunks_feed_forward(model, self.inputs(), 2, 1)

    def test_outputs_that_a_hook_keeps_are_not_overwritten(self) -> None:
        """The GELU used to write into what a hook on the layer before it had kept."""
        model = self.ready()
        self.patch(model)
        checks.leaves_kept_outputs(model, self.inputs(), model.transformer_blocks[0].ff.net[0].proj)


@pytest.mark.parametrize("affine", [False, True])
def test_block_with_cross_attention(affine: bool) -> None:
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(0)
    block = BasicTransformerBlock(
        24,
        3,
        8,
        cross_attention_dim=10,
        num_embeds_ada_norm=7,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=affine,
    ).eval()
    report = vidkernels.patch(block, verify=True, mode="training")
    assert report.patched[0].rule == "diffusers.dit_block" and len(report.numerics) > 20
