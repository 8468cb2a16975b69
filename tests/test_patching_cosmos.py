# SPDX-License-Identifier: Apache-2.0
"""diffusers' CosmosTransformer3DModel: one timestep per clip or per frame, text alone or with images, control networks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from patching_suite import ModelSuite, no_fallback  # noqa: F401

import vidkernels

diffusers = pytest.importorskip("diffusers", minversion="0.42")


class TestCosmos(ModelSuite):
    compiles_quickly = False
    rules = {"diffusers.cosmos_block": 2, "diffusers.cosmos_final_norm": 1, "diffusers.cosmos_positions": 1}
    leaves = ("hidden_states", "encoder_hidden_states")
    lora = ("to_q", "to_v", "to_out.0", "net.2", "net.0.proj", "linear_1", "linear_2")
    hooked = (
        "transformer_blocks.1", "transformer_blocks.0.attn1", "transformer_blocks.0.attn2", "rope",
        "transformer_blocks.0.attn1.norm_q", "transformer_blocks.0.attn1.to_k", "transformer_blocks.0.norm1",
        "transformer_blocks.1.norm3.norm", "transformer_blocks.1.norm2.linear_1", "norm_out.norm",
    )  # fmt: skip
    bypassed = tuple(path for path in hooked if path.endswith(("attn1", "attn2", "norm_q", "norm1", "norm")))
    zero_gradients = ()

    def build(self, **changes: Any) -> Any:
        options = {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
            "text_embed_dim": 10, "adaln_lora_dim": 4, "max_size": (4, 16, 16), "concat_padding_mask": False,
            "extra_pos_embed_type": None,
        }  # fmt: skip
        return diffusers.CosmosTransformer3DModel(**{**options, **changes})

    def inputs(self, batch: int = 2, frames: int = 2, by_frame: bool = False, masked: bool = True) -> dict[str, Any]:
        torch.manual_seed(1)
        arguments = {
            "hidden_states": torch.randn(batch, 4, frames, 8, 6),
            "timestep": torch.rand(batch),
            "encoder_hidden_states": torch.randn(batch, 5, 10),
            "fps": 30,
        }
        if by_frame:
            arguments["timestep"] = torch.rand(batch, 1, frames, 1, 1)
        if masked:
            arguments["attention_mask"] = (torch.arange(5) < 3).expand(batch, -1)
        return arguments

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        changes = {
            "num_attention_heads": draw.randint(1, 3),
            "attention_head_dim": draw.choice([16, 24, 32]),
            "rope_scale": draw.choice([(2.0, 1.0, 1.0), (1.0, 3.0, 3.0)]),
        }
        sizes = {"batch": draw.randint(1, 2), "frames": draw.randint(1, 3), "by_frame": draw.random() < 0.5}
        return changes, {**sizes, "masked": draw.random() < 0.5}

    def test_rotation_runs_inside_the_op_in_half_precision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers.models import embeddings

        model, arguments, calls = self.ready(), self.inputs(), []
        rotate = embeddings.apply_rotary_emb
        monkeypatch.setattr(embeddings, "apply_rotary_emb", lambda *a, **k: calls.append(1) or rotate(*a, **k))
        self.patch(model)
        with torch.no_grad():
            model(**arguments)
            assert len(calls) == 4
            model.bfloat16()
            half = {k: v.bfloat16() if k in self.leaves else v for k, v in arguments.items()}
            model(**half)
            assert len(calls) == 4

    def test_timesteps_of_frames(self) -> None:
        self.compare(self.ready(), self.inputs(by_frame=True))


@pytest.mark.parametrize("changes", [{"img_context": True}, {"before_proj": True, "after_proj": True}])
def test_blocks_with_images_and_of_control_networks(changes: dict[str, bool]) -> None:
    from diffusers.models.transformers.transformer_cosmos import CosmosTransformerBlock

    torch.manual_seed(0)
    block = CosmosTransformerBlock(2, 16, 10, adaln_lora_dim=4, **changes).eval()
    report = vidkernels.patch(block, verify=True, mode="training")
    assert report.numerics and not vidkernels.status(block).fallbacks


def test_learned_positions_and_the_residual_of_a_control_network() -> None:
    from diffusers.models.transformers.transformer_cosmos import CosmosTransformerBlock

    torch.manual_seed(0)
    block = CosmosTransformerBlock(2, 16, 10, adaln_lora_dim=4).eval()
    arguments = (torch.randn(2, 9, 32), torch.randn(2, 5, 10), torch.randn(2, 32), torch.randn(2, 96))
    extra = {"controlnet_residual": torch.randn(2, 9, 32), "extra_pos_emb": torch.randn(2, 9, 32)}
    with torch.no_grad():
        expected = block(*arguments, **extra)
        vidkernels.patch(block)
        torch.testing.assert_close(block(*arguments, **extra), expected, atol=1e-5, rtol=1e-4)
