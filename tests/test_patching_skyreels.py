# SPDX-License-Identifier: Apache-2.0
"""diffusers' SkyReelsV2Transformer3DModel: Wan's blocks with timesteps per frame and a mask of the frames to come."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from patching_suite import ModelSuite, no_fallback  # noqa: F401

diffusers = pytest.importorskip("diffusers", minversion="0.42")


class TestSkyReels(ModelSuite):
    compiles_quickly = False
    rules = {"diffusers.skyreels_block": 2, "diffusers.skyreels_attention": 4, "diffusers.skyreels_positions": 1}
    leaves = ("hidden_states", "encoder_hidden_states")
    lora = ("to_q", "to_v", "to_out.0", "net.2", "net.0.proj")
    hooked = ("blocks.1", "blocks.0.attn1", "blocks.0.norm1", "blocks.0.attn1.to_q", "blocks.1.ffn.net.0.proj")
    bypassed = ("blocks.0.norm1",)
    zero_gradients = ("to_k.bias", "add_k_proj.bias")

    def build(self, **changes: Any) -> Any:
        options = {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 10,
            "freq_dim": 16, "ffn_dim": 20, "num_layers": 2, "rope_max_seq_len": 32,
        }  # fmt: skip
        return diffusers.SkyReelsV2Transformer3DModel(**{**options, **changes})

    def inputs(self, batch: int = 2, frames: int = 2, words: int = 5, forcing: bool = True) -> dict[str, Any]:
        torch.manual_seed(1)
        return {
            "hidden_states": torch.randn(batch, 4, frames, 4, 6),
            "timestep": torch.randint(0, 1000, (batch, frames) if forcing else (batch,)),
            "encoder_hidden_states": torch.randn(batch, words, 10),
            "enable_diffusion_forcing": forcing,
        }

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        masked = draw.random() < 0.5
        changes = {
            "num_attention_heads": draw.randint(1, 3),
            "cross_attn_norm": draw.random() < 0.5,
            "num_frame_per_block": 2 if masked else 1,
        }
        frames = 4 if masked else draw.randint(1, 3)
        return changes, {"batch": draw.randint(1, 2), "frames": frames, "forcing": draw.random() < 0.5}
