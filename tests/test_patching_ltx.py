# SPDX-License-Identifier: Apache-2.0
"""diffusers' LTX-Video: RMSNorms, masked captions, one timestep a sample or a token."""

from __future__ import annotations

import random
from typing import Any

import patching_checks as checks
import pytest
import torch
from patching_suite import ModelSuite, no_fallback  # noqa: F401

import vidkernels

diffusers = pytest.importorskip("diffusers", minversion="0.42")
from diffusers.models.transformers import transformer_ltx  # noqa: E402


class TestLTX(ModelSuite):
    compiles_quickly = False
    rules = {"diffusers.ltx_block": 2, "diffusers.ltx_attention": 4}
    leaves = ("hidden_states", "encoder_hidden_states")
    lora = ("to_q", "to_v", "to_out.0", "net.2", "net.0.proj")
    hooked = (
        "transformer_blocks.1", "transformer_blocks.0.attn1", "transformer_blocks.0.attn2",
        "transformer_blocks.0.attn1.norm_q", "transformer_blocks.0.attn2.norm_k", "transformer_blocks.0.attn1.to_k",
        "transformer_blocks.0.norm1", "transformer_blocks.1.norm2", "transformer_blocks.1.ff",
    )  # fmt: skip
    bypassed = tuple(path for path in hooked if "norm" in path)

    def build(self, **changes: Any) -> Any:
        options = {
            "in_channels": 6, "out_channels": 6, "num_attention_heads": 2, "attention_head_dim": 10,
            "cross_attention_dim": 20, "num_layers": 2, "caption_channels": 10,
        }  # fmt: skip
        return diffusers.LTXVideoTransformer3DModel(**{**options, **changes})

    def inputs(
        self, batch: int = 2, frames: int = 2, height: int = 3, words: int = 5, per_token: bool = False
    ) -> dict[str, Any]:
        torch.manual_seed(1)
        tokens = frames * height * 2
        timesteps = torch.arange(batch)[:, None] * 137 + 11
        if per_token:
            timesteps = timesteps * (torch.arange(tokens) % 2)
        mask = torch.ones(batch, words)
        mask[-1, (words + 1) // 2 :] = 0
        return {
            "hidden_states": torch.randn(batch, tokens, 6),
            "encoder_hidden_states": torch.randn(batch, words, 10),
            "timestep": timesteps,
            "encoder_attention_mask": mask,
            "num_frames": frames,
            "height": height,
            "width": 2,
            "rope_interpolation_scale": (1 / 3, 32, 32),
        }

    def test_verify_in_bfloat16(self) -> None:
        """Outputs and gradients of every patched module, alone, on its rule's sample."""
        report = self.patch(self.ready().bfloat16(), verify=True, mode="training")
        assert all(item.ok for item in report.numerics)

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        heads, width = draw.randint(1, 3), draw.choice([10, 12, 16])
        changes = {
            "num_attention_heads": heads,
            "attention_head_dim": width,
            "cross_attention_dim": heads * width,
            "norm_elementwise_affine": draw.random() < 0.5,
            "norm_eps": draw.choice([1e-6, 1e-5]),
        }
        sizes = {"batch": draw.randint(1, 3), "frames": draw.randint(1, 3), "height": draw.randint(1, 4)}
        return changes, {**sizes, "words": draw.randint(1, 6), "per_token": draw.random() < 0.5}

    def test_one_timestep_a_token(self) -> None:
        self.compare(self.ready(), self.inputs(per_token=True))

    def test_other_processors_are_honoured(self) -> None:
        model = self.ready()
        self.patch(model)
        attentions = [model.transformer_blocks[0].attn1]
        checks.honours_processor(model, self.inputs(), attentions, transformer_ltx.LTXVideoAttnProcessor)

    def test_attention_backend_is_honoured(self) -> None:
        checks.honours_attention_backend(self)

    def test_regional_compilation(self) -> None:
        model = self.ready(num_layers=3)
        vidkernels.patch(model)
        assert checks.graphs_by_block(model, self.inputs(), model.transformer_blocks) == 1
