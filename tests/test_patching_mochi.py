# SPDX-License-Identifier: Apache-2.0
"""diffusers' MochiTransformer3DModel."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from patching_suite import ModelSuite, no_fallback  # noqa: F401

diffusers = pytest.importorskip("diffusers", minversion="0.42")


class TestMochi(ModelSuite):
    rules = {"diffusers.mochi_block": 2, "diffusers.mochi_head_norm": 8, "diffusers.adaln_continuous": 1}
    leaves = ("hidden_states", "encoder_hidden_states")
    lora = ("to_q", "to_v", "add_k_proj", "to_out.0", "to_add_out", "net.2", "net.0.proj", "linear")
    hooked = (
        "transformer_blocks.1", "transformer_blocks.0.attn1", "transformer_blocks.0.attn1.norm_q",
        "transformer_blocks.0.norm1", "transformer_blocks.0.norm1_context", "transformer_blocks.1.norm1_context",
        "transformer_blocks.1.norm2", "transformer_blocks.0.norm4_context", "transformer_blocks.0.ff_context",
        "transformer_blocks.0.norm1.linear",
    )  # fmt: skip
    bypassed = tuple(path for path in hooked if ".norm" in path and "attn1" not in path)

    def build(self, **changes: Any) -> Any:
        options = {
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16,
            "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 6,
        }  # fmt: skip
        return diffusers.MochiTransformer3DModel(**{**options, **changes})

    def inputs(self, batch: int = 2, frames: int = 2, words: int = 6) -> dict[str, Any]:
        torch.manual_seed(1)
        return {
            "hidden_states": torch.randn(batch, 4, frames, 4, 6),
            "encoder_hidden_states": torch.randn(batch, words, 16),
            "timestep": torch.arange(batch) * 137 + 11,
            "encoder_attention_mask": torch.arange(words)[None] < words - torch.arange(batch)[:, None],
        }

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        changes = {
            "num_attention_heads": draw.randint(1, 3),
            "attention_head_dim": draw.choice([8, 16]),
            "pooled_projection_dim": draw.choice([16, 24]),
        }
        return changes, {"batch": draw.randint(1, 3), "frames": draw.randint(1, 3), "words": draw.randint(4, 6)}
