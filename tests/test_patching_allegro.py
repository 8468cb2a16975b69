# SPDX-License-Identifier: Apache-2.0
"""diffusers' AllegroTransformer3DModel, with masks and the rotation that its pipeline computes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from patching_suite import ModelSuite, no_fallback  # noqa: F401

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning

diffusers = pytest.importorskip("diffusers", minversion="0.42")


def rotation(width: int, frames: int, height: int, w: int) -> Any:
    """What `AllegroPipeline` passes: tables of cos and sin per axis, and the place of each token."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    found = get_3d_rotary_pos_embed_allegro(
        embed_dim=width, crops_coords=((0, 0), (height, w)), grid_size=(height, w), temporal_size=frames
    )
    places = torch.cartesian_prod(*(axis.long() for axis in found[3:]))
    return found[:3], tuple(places.T[:, None].contiguous())


class TestAllegro(ModelSuite):
    rules = {"diffusers.allegro_block": 2}
    leaves = ("hidden_states", "encoder_hidden_states")
    lora = ("to_q", "to_k", "to_v", "to_out.0", "net.2", "net.0.proj")
    hooked = ("transformer_blocks.1", "transformer_blocks.0.attn1", "transformer_blocks.0.attn2",
              "transformer_blocks.1.norm1", "transformer_blocks.0.norm2")  # fmt: skip
    bypassed = ("transformer_blocks.1.norm1", "transformer_blocks.0.norm2")

    def build(self, **changes: Any) -> Any:
        options = {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "cross_attention_dim": 24, "sample_width": 8, "sample_height": 8, "sample_frames": 4, "caption_channels": 10,
        }  # fmt: skip
        return diffusers.AllegroTransformer3DModel(**{**options, **changes})

    def inputs(self, batch: int = 2, masked: bool = True, rotated: bool = True, width: int = 12) -> dict[str, Any]:
        torch.manual_seed(1)
        arguments = {
            "hidden_states": torch.randn(batch, 4, 2, 8, 8),
            "timestep": torch.arange(batch) * 137 + 11,
            "encoder_hidden_states": torch.randn(batch, 5, 10),
        }
        if masked:
            arguments["encoder_attention_mask"] = (torch.arange(5) < 3).long().expand(batch, -1)
            arguments["attention_mask"] = torch.ones(batch, 2, 8, 8)
            arguments["attention_mask"][:, 1, :, 4:] = 0
        if rotated:
            arguments["image_rotary_emb"] = rotation(width, 2, 4, 4)
        return arguments

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        heads, width = draw.randint(1, 4), draw.choice([12, 18, 24])
        changes = {
            "num_attention_heads": heads,
            "attention_head_dim": width,
            "cross_attention_dim": heads * width,
            "norm_elementwise_affine": draw.random() < 0.5,
        }
        sizes = {"batch": draw.randint(1, 3), "masked": draw.random() < 0.5, "rotated": draw.random() < 0.7}
        return changes, {**sizes, "width": width}

    def test_one_token_goes_to_the_original(self) -> None:
        """Its `squeeze(1)` drops the axis of tokens then, and its attention fails."""
        block = self.ready().transformer_blocks[0]
        vidkernels.patch(block)
        x, context, temb = torch.randn(1, 1, 24), torch.randn(1, 5, 24), torch.randn(1, 144)
        with pytest.warns(VidkernelsFallbackWarning, match="an unusual input"), pytest.raises(ValueError):
            block(x, context, temb)
