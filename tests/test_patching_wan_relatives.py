# SPDX-License-Identifier: Apache-2.0
"""diffusers' models made from Wan's: AnyFlow and Helios, whose history of earlier frames does not see the caption."""

from __future__ import annotations

import random
from typing import Any

import patching_checks as checks
import pytest
import torch
from patching_suite import ModelSuite, no_fallback  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode

import vidkernels

diffusers = pytest.importorskip("diffusers", minversion="0.42")
from diffusers.models.transformers import transformer_anyflow_far  # noqa: E402


class _Suite(ModelSuite):
    compiles_quickly = False
    graphs = 1
    lora = ("attn1.to_q", "to_v", "to_out.0", "net.2", "net.0.proj")
    hooked = (
        "blocks.1", "blocks.0.attn1", "blocks.0.attn2", "blocks.0.attn1.norm_q", "blocks.0.attn2.to_k", "blocks.0.norm1",
        "blocks.0.norm2", "blocks.1.norm3", "blocks.1.ffn",
    )  # fmt: skip
    bypassed = ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm3")

    def test_verify_in_bfloat16(self) -> None:
        """Outputs and gradients of every patched module, alone, on its rule's sample."""
        report = self.patch(self.ready().bfloat16(), verify=True, mode="training")
        assert all(item.ok for item in report.numerics)

    @pytest.mark.slow
    def test_regional_compilation(self) -> None:
        model = self.ready(num_layers=3)
        vidkernels.patch(model)
        assert checks.graphs_by_block(model, self.inputs(), model.blocks) == self.graphs


class TestAnyFlow(_Suite):
    rules = {"diffusers.anyflow_block": 2}
    graphs = 2  # the first block's tokens are a transposed view, those of the others lie one after the other
    leaves = ("hidden_states", "encoder_hidden_states")

    def build(self, **changes: Any) -> Any:
        options = {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 10,
            "freq_dim": 16, "ffn_dim": 20, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32,
        }  # fmt: skip
        return diffusers.AnyFlowTransformer3DModel(**{**options, **changes})

    def inputs(self, batch: int = 2, frames: int = 2, height: int = 4, words: int = 5) -> dict[str, Any]:
        torch.manual_seed(1)
        return {
            "hidden_states": torch.randn(batch, frames, 4, height, 6),
            "timestep": (torch.arange(batch * frames) * 37 + 11).view(batch, frames),
            "r_timestep": (torch.arange(batch * frames) * 17 + 3).view(batch, frames),
            "encoder_hidden_states": torch.randn(batch, words, 10),
        }

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        changes = {
            "num_attention_heads": draw.randint(1, 3),
            "attention_head_dim": draw.choice([12, 16, 24]),
            "cross_attn_norm": draw.random() < 0.5,
            "eps": draw.choice([1e-6, 1e-5]),
        }
        sizes = {"batch": draw.randint(1, 3), "frames": draw.randint(1, 3), "height": 2 * draw.randint(1, 3)}
        return changes, {**sizes, "words": draw.randint(1, 6)}


def test_blocks_of_the_causal_anyflow() -> None:
    """The same block in the file of the causal model; a cache of keys is handed on to its attention."""
    torch.manual_seed(0)
    block = transformer_anyflow_far.AnyFlowTransformerBlock(24, 20, 2, cross_attn_norm=True).eval()
    inputs = torch.randn(2, 6, 24), torch.randn(2, 5, 24), torch.randn(2, 6, 6, 24), None, None
    seen: list[dict[str, Any]] = []

    def attend(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        seen.append(dict(kwargs))
        return args, {key: value for key, value in kwargs.items() if not key.startswith("kv_cache")}

    block.attn1.register_forward_pre_hook(attend, with_kwargs=True)
    with torch.no_grad():
        expected = block(*inputs, kv_cache=[1], kv_cache_flag="read")
        report = vidkernels.patch(block, ops="diffusers.anyflow_far_block", verify=True)
        assert len(report.patched) == 1
        seen.clear()
        torch.testing.assert_close(block(*inputs, kv_cache=[1], kv_cache_flag="read"), expected, atol=1e-5, rtol=1e-4)
        block(*inputs)
    assert seen[0]["kv_cache"] == [1] and seen[0]["kv_cache_flag"] == "read" and "kv_cache" not in seen[1]


class TestHelios(_Suite):
    rules = {"diffusers.helios_block": 2}
    leaves = ("hidden_states", "encoder_hidden_states")

    def build(self, **changes: Any) -> Any:
        options = {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 10,
            "freq_dim": 16, "ffn_dim": 20, "num_layers": 2, "rope_dim": (4, 4, 4),
        }  # fmt: skip
        return diffusers.HeliosTransformer3DModel(**{**options, **changes})

    def inputs(self, batch: int = 2, frames: int = 2, height: int = 4, words: int = 5, past: int = 2) -> dict[str, Any]:
        torch.manual_seed(1)
        found = {
            "hidden_states": torch.randn(batch, 4, frames, height, 6),
            "timestep": torch.arange(batch) * 137 + 11,
            "encoder_hidden_states": torch.randn(batch, words, 10),
            "indices_hidden_states": torch.arange(past, past + frames).expand(batch, -1),
        }
        if past:
            found["indices_latents_history_short"] = torch.arange(past).expand(batch, -1)
            found["latents_history_short"] = torch.randn(batch, 4, past, height, 6)
        return found

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        changes = {
            "num_attention_heads": draw.randint(1, 3),
            "cross_attn_norm": draw.random() < 0.5,
            "guidance_cross_attn": draw.random() < 0.5,
            "is_amplify_history": draw.random() < 0.5,
            "eps": draw.choice([1e-6, 1e-5]),
        }
        sizes = {"batch": draw.randint(1, 3), "frames": draw.randint(1, 3), "height": 2 * draw.randint(1, 3)}
        return changes, {**sizes, "words": draw.randint(1, 6), "past": draw.randint(0, 2)}

    def test_shapes_without_values(self) -> None:
        """Upstream's positions ask about autocast on the meta device, where torch raises: fake tensors only."""
        model, arguments = self.ready(), self.inputs()
        self.patch(model)
        with torch.no_grad():
            expected = model(**arguments).sample
            with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
                given = {k: fakes.from_tensor(v) for k, v in arguments.items()}
                found = model(**given).sample
        assert found.shape == expected.shape and found.dtype == expected.dtype

    def test_one_modulation_a_sample(self) -> None:
        """The older form of the condition, and a call without a length, on a block."""
        for guided in (False, True):
            block = self.ready(guidance_cross_attn=guided).blocks[0]
            x, context, temb = torch.randn(2, 6, 24), torch.randn(2, 5, 24), torch.randn(2, 6, 24)
            lengths = (4, 6) if guided else (4, None)
            with torch.no_grad():
                expected = [block(x, context, temb, None, length) for length in lengths]
                vidkernels.patch(block, ops="diffusers.helios_block")
                for length, y in zip(lengths, expected, strict=True):
                    torch.testing.assert_close(block(x, context, temb, None, length), y, atol=1e-5, rtol=1e-4)
