# SPDX-License-Identifier: Apache-2.0
"""diffusers' SANA-Video transformer: adaLN-single around linear attention and a convolutional MLP."""

from __future__ import annotations

import random
from typing import Any

import patching_checks as checks
import pytest
import torch
from patching_suite import ModelSuite, no_fallback  # noqa: F401

import vidkernels

diffusers = pytest.importorskip("diffusers", minversion="0.42")


class TestSanaVideo(ModelSuite):
    compiles_quickly = False
    rules = {"diffusers.sana_video_block": 2}
    leaves = ("hidden_states", "encoder_hidden_states")
    lora = ("attn1.to_q", "attn2.to_v", "to_out.0")
    hooked = (
        "transformer_blocks.1", "transformer_blocks.0.attn1", "transformer_blocks.0.attn2", "transformer_blocks.0.ff",
        "transformer_blocks.0.norm1", "transformer_blocks.1.norm2",
    )  # fmt: skip
    bypassed = ("transformer_blocks.0.norm1", "transformer_blocks.1.norm2")

    def build(self, **changes: Any) -> Any:
        heads = changes.get("num_attention_heads", 2)
        options = {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 12 * heads,
            "caption_channels": 10, "rope_max_seq_len": 32,
        }  # fmt: skip
        return diffusers.SanaVideoTransformer3DModel(**{**options, **changes})

    def inputs(
        self, batch: int = 2, frames: int = 2, height: int = 4, words: int = 5, per_frame: bool = False
    ) -> dict[str, Any]:
        torch.manual_seed(1)
        mask = torch.ones(batch, words)
        mask[-1, (words + 1) // 2 :] = 0
        timestep = torch.arange(batch) * 137 + 11
        if per_frame:  # one a token: frames, 2 x 2 patches of a frame
            tokens = frames * (height // 2) * 3
            timestep = (timestep[:, None] + 5 * torch.arange(tokens)).flatten()
        return {
            "hidden_states": torch.randn(batch, 4, frames, height, 6),
            "encoder_hidden_states": torch.randn(batch, words, 10),
            "timestep": timestep,
            "encoder_attention_mask": mask,
        }

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        changes = {
            "num_attention_heads": draw.randint(1, 3),
            "norm_elementwise_affine": draw.random() < 0.5,
            "norm_eps": draw.choice([1e-6, 1e-5]),
            "qk_norm": draw.choice(["rms_norm_across_heads", None]),
        }
        sizes = {"batch": draw.randint(1, 3), "frames": draw.randint(1, 3), "height": 2 * draw.randint(1, 3)}
        return changes, {**sizes, "words": draw.randint(1, 6)}

    def test_verify_in_bfloat16(self) -> None:
        """Outputs and gradients of every patched module, alone, on its rule's sample."""
        report = self.patch(self.ready().bfloat16(), verify=True, mode="training")
        assert all(item.ok for item in report.numerics)

    def test_one_timestep_a_token(self) -> None:
        self.compare(self.ready(), self.inputs(per_frame=True))

    @pytest.mark.slow
    def test_regional_compilation(self) -> None:
        model = self.ready(num_layers=3)
        vidkernels.patch(model)
        # the first block's tokens are a transposed view, those of the others lie one after the other
        assert checks.graphs_by_block(model, self.inputs(), model.transformer_blocks) == 2
