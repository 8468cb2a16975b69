# SPDX-License-Identifier: Apache-2.0
"""diffusers' CogVideoX: rotated and learned positions, image conditioning by an offset embedding, ConsisID's copy."""

from __future__ import annotations

import random
from typing import Any

import patching_checks as checks
import pytest
import torch
from patching_suite import ModelSuite, cast, no_fallback  # noqa: F401

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning

diffusers = pytest.importorskip("diffusers", minversion="0.42")
from diffusers.models.embeddings import get_3d_rotary_pos_embed  # noqa: E402


class TestCogVideoX(ModelSuite):
    rules = {"diffusers.cogvideox_block": 2}
    leaves = ("hidden_states", "encoder_hidden_states")
    lora = ("to_q", "to_v", "to_out.0", "net.2", "net.0.proj", "linear")
    hooked = (
        "transformer_blocks.1", "transformer_blocks.0.attn1", "transformer_blocks.0.attn1.norm_q",
        "transformer_blocks.0.attn1.to_k", "transformer_blocks.0.norm1", "transformer_blocks.0.norm2", "transformer_blocks.1.ff",
    )  # fmt: skip
    bypassed = ("transformer_blocks.0.attn1", "transformer_blocks.0.norm1", "transformer_blocks.0.norm2")

    def build(self, **changes: Any) -> Any:
        options = {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
            "time_embed_dim": 12, "text_embed_dim": 10, "num_layers": 2, "sample_width": 6, "sample_height": 4,
            "sample_frames": 9, "max_text_seq_length": 5, "use_rotary_positional_embeddings": True,
        }  # fmt: skip
        return diffusers.CogVideoXTransformer3DModel(**{**options, **changes})

    def inputs(self, batch: int = 2, words: int = 5, width: int = 16, ofs: bool = False) -> dict[str, Any]:
        """`width`: of a head, or 0 without rotation."""
        torch.manual_seed(1)
        arguments = {
            "hidden_states": torch.randn(batch, 3, 4, 4, 6),
            "encoder_hidden_states": torch.randn(batch, words, 10),
            "timestep": torch.arange(batch) * 137 + 11,
        }
        if width:
            arguments["image_rotary_emb"] = get_3d_rotary_pos_embed(width, ((0, 0), (2, 3)), (2, 3), 3)
        if ofs:
            arguments["ofs"] = torch.full((1,), 2.0)
        return arguments

    def test_verify_in_bfloat16(self) -> None:
        """Outputs and gradients of every patched module, alone, on its rule's sample."""
        report = self.patch(self.ready().bfloat16(), verify=True, mode="training")
        assert all(item.ok for item in report.numerics)

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        width, rotary, ofs = draw.choice([16, 32]), draw.random() < 0.6, draw.random() < 0.5
        words = draw.randint(1, 6) if rotary else 5
        changes = {
            "num_attention_heads": draw.randint(1, 3),
            "attention_head_dim": width,
            "use_rotary_positional_embeddings": rotary,
            "norm_elementwise_affine": draw.random() < 0.5,
            "max_text_seq_length": words,
            "ofs_embed_dim": 12 if ofs else None,
        }
        return changes, {"batch": draw.randint(1, 3), "words": words, "width": width * rotary, "ofs": ofs}

    def test_modulation_of_all_blocks_in_one_product(self) -> None:
        checks.batches_modulation(self, 4)

    def test_attention_arguments_and_other_processors_are_honoured(self) -> None:
        model, arguments = self.ready(), self.inputs()
        mask = torch.zeros(2, 23)
        mask[:, 2:4] = -10000.0
        with torch.no_grad():
            plain = model(**arguments).sample
            masked = model(**arguments, attention_kwargs={"attention_mask": mask}).sample
            assert not torch.allclose(plain, masked, atol=1e-4)
            self.patch(model)
            with pytest.warns(VidkernelsFallbackWarning, match="attention_kwargs are given"):
                actual = model(**arguments, attention_kwargs={"attention_mask": mask}).sample
            torch.testing.assert_close(actual, masked, atol=1e-5, rtol=1e-4)
            model.fuse_qkv_projections()
            with pytest.warns(VidkernelsFallbackWarning, match="uses FusedCogVideoXAttnProcessor2_0"):
                torch.testing.assert_close(model(**arguments).sample, plain, atol=1e-5, rtol=1e-4)

    def test_regional_compilation(self) -> None:
        """As many graphs as in the original: the first block's input is the embedding's, the others' a block's."""
        counts = []
        for patched in (False, True):
            model = self.ready(num_layers=3)
            if patched:
                vidkernels.patch(model)
            counts.append(checks.graphs_by_block(model, self.inputs(), model.transformer_blocks))
        assert counts[1] <= counts[0]

    def test_outputs_that_a_hook_keeps_are_not_overwritten(self) -> None:
        model = self.ready()
        self.patch(model)
        checks.leaves_kept_outputs(model, self.inputs(), model.transformer_blocks[0].attn1.norm_q)


def test_consisid_block() -> None:
    """A copy of CogVideoX's block without `attention_kwargs`; with a hook inside it runs its original forward."""
    from diffusers.models.transformers.consisid_transformer_3d import ConsisIDBlock

    torch.manual_seed(0)
    block = ConsisIDBlock(32, 2, 16, 12).eval()
    report = vidkernels.patch(block, verify=True, mode="training")
    assert report.patched[0].rule == "diffusers.consisid_block" and len(report.numerics) > 10
    block.norm1.norm.register_forward_hook(lambda *a: None)
    with torch.no_grad(), pytest.warns(VidkernelsFallbackWarning, match="a child LayerNorm has hooks"):
        block(torch.randn(1, 4, 32), torch.randn(1, 2, 32), torch.randn(1, 12))


def test_attention_without_norms() -> None:
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    torch.manual_seed(0)
    block = CogVideoXBlock(32, 2, 16, 12, qk_norm=False).eval()
    assert vidkernels.patch(block, verify=True, mode="inference").numerics
