# SPDX-License-Identifier: Apache-2.0
"""diffusers' SD3Transformer2DModel: SD3, SD3.5 with norms of queries and keys, and SD3.5 medium's second attention."""

from __future__ import annotations

import random
from typing import Any

import patching_checks as checks
import pytest
import torch
from patching_suite import ModelSuite, no_fallback  # noqa: F401

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning

diffusers = pytest.importorskip("diffusers", minversion="0.42")


class TestSD35(ModelSuite):
    rules = {"diffusers.sd3_block": 2, "diffusers.adaln_continuous": 2}
    leaves = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    lora = ("to_q", "to_v", "add_k_proj", "to_out.0", "to_add_out", "net.2", "net.0.proj", "linear")
    hooked = (
        "transformer_blocks.1", "transformer_blocks.0.attn", "transformer_blocks.0.attn2",
        "transformer_blocks.0.attn.norm_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.norm1",
        "transformer_blocks.0.norm1_context", "transformer_blocks.1.norm1_context", "transformer_blocks.1.norm2",
        "norm_out.norm",
    )  # fmt: skip
    bypassed = tuple(path for path in hooked if "norm" in path or path.endswith(("attn", "attn2")))
    zero_gradients = ("to_k.bias", "add_k_proj.bias")

    def build(self, **changes: Any) -> Any:
        options = {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "attention_head_dim": 8, "num_attention_heads": 3, "caption_projection_dim": 24, "joint_attention_dim": 10,
            "pooled_projection_dim": 12, "pos_embed_max_size": 8, "qk_norm": "rms_norm", "dual_attention_layers": (0,),
        }  # fmt: skip
        return diffusers.SD3Transformer2DModel(**{**options, **changes})

    def inputs(self, batch: int = 2, tokens: int = 5) -> dict[str, Any]:
        torch.manual_seed(1)
        return {
            "hidden_states": torch.randn(batch, 4, 8, 6),
            "encoder_hidden_states": torch.randn(batch, tokens, 10),
            "pooled_projections": torch.randn(batch, 12),
            "timestep": torch.arange(batch) * 137 + 11,
        }

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        heads, width = draw.randint(1, 4), draw.choice([8, 12, 16])
        changes = {
            "num_attention_heads": heads,
            "attention_head_dim": width,
            "caption_projection_dim": heads * width,
            "qk_norm": draw.choice([None, "rms_norm"]),
            "dual_attention_layers": draw.choice([(), (0,), (0, 1)]),
        }
        return changes, {"batch": draw.randint(1, 3), "tokens": draw.randint(1, 7)}

    def test_another_attention_processor_is_honoured(self) -> None:
        from diffusers.models.attention_processor import JointAttnProcessor2_0

        model = self.ready(dual_attention_layers=())
        self.patch(model)
        attentions = [block.attn for block in model.transformer_blocks]
        checks.honours_processor(model, self.inputs(), attentions, JointAttnProcessor2_0)

    def test_chunked_feed_forward_goes_to_the_original(self) -> None:
        model = self.ready()
        self.patch(model)
        checks.chunks_feed_forward(model, self.inputs(), 1, 1)


def test_single_stream_block() -> None:
    from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock

    torch.manual_seed(0)
    report = vidkernels.patch(SD3SingleTransformerBlock(24, 3, 8).eval(), verify=True, mode="training")
    assert report.patched[0].rule == "diffusers.sd3_single_block" and len(report.numerics) > 10


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continuous_norm(norm: str, affine: bool, dtype: torch.dtype) -> None:
    from diffusers.models.normalization import AdaLayerNormContinuous

    torch.manual_seed(0)
    module = AdaLayerNormContinuous(24, 16, elementwise_affine=affine, norm_type=norm).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    vidkernels.patch(module, verify=True, mode="training")
    with torch.autocast("cpu", torch.bfloat16, enabled=norm == "layer_norm"):
        vidkernels.unpatch(module)
        vidkernels.patch(module, verify=True, mode="inference")


def test_continuous_norm_that_was_taken_out() -> None:
    model = TestSD35().ready()
    arguments = TestSD35().inputs()
    vidkernels.patch(model)
    model.norm_out.norm = torch.nn.Identity()
    with torch.no_grad(), pytest.warns(VidkernelsFallbackWarning, match="a child is a .*Identity"):
        actual = model(**arguments).sample
        vidkernels.unpatch(model)
        torch.testing.assert_close(actual, model(**arguments).sample, **checks.CLOSE)


def test_blocks_with_layer_norms_of_queries_are_left_out() -> None:
    suite = TestSD35()
    report = vidkernels.patch(suite.ready(qk_norm="layer_norm"))
    blocks = [entry for entry in report.entries if entry.cls == "JointTransformerBlock"]
    assert len(blocks) == 2 and all("norm_q is a LayerNorm" in entry.reason for entry in blocks)
