# SPDX-License-Identifier: Apache-2.0
"""diffusers' PixArtTransformer2DModel (alpha and sigma), whose blocks the rule `diffusers.adaln_single_block` serves."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from patching_suite import ModelSuite, no_fallback  # noqa: F401

diffusers = pytest.importorskip("diffusers", minversion="0.42")


class TestPixArt(ModelSuite):
    compiles_quickly = False
    rules = {"diffusers.adaln_single_block": 2}
    leaves = ("hidden_states", "encoder_hidden_states")
    lora = ("to_q", "to_k", "to_v", "to_out.0", "net.2", "net.0.proj")
    hooked = ("transformer_blocks.1", "transformer_blocks.0.attn1", "transformer_blocks.0.attn2",
              "transformer_blocks.1.norm1", "transformer_blocks.0.norm2")  # fmt: skip
    bypassed = ("transformer_blocks.1.norm1", "transformer_blocks.0.norm2")

    def build(self, **changes: Any) -> Any:
        options = {
            "num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
            "sample_size": 8, "cross_attention_dim": 24, "caption_channels": 10, "use_additional_conditions": False,
        }  # fmt: skip
        return diffusers.PixArtTransformer2DModel(**{**options, **changes})

    def inputs(self, batch: int = 2, masked: bool = True) -> dict[str, Any]:
        torch.manual_seed(1)
        arguments = {
            "hidden_states": torch.randn(batch, 4, 8, 8),
            "timestep": torch.arange(batch) * 137 + 11,
            "encoder_hidden_states": torch.randn(batch, 5, 10),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
        if masked:
            arguments["encoder_attention_mask"] = (torch.arange(5) < 3).long().expand(batch, -1)
        return arguments

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        heads, width = draw.randint(1, 4), draw.choice([8, 12, 16])
        changes = {
            "num_attention_heads": heads,
            "attention_head_dim": width,
            "cross_attention_dim": heads * width,
            "norm_elementwise_affine": draw.random() < 0.5,
            "attention_bias": draw.random() < 0.5,
        }
        return changes, {"batch": draw.randint(1, 3), "masked": draw.random() < 0.5}
