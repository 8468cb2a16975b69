# SPDX-License-Identifier: Apache-2.0
"""diffusers' LTX-2: a stream of video and one of audio that attend to each other, two kinds of rotation, perturbed attention."""

from __future__ import annotations

import random
from typing import Any

import patching_checks as checks
import pytest
import torch
from patching_suite import ModelSuite, no_fallback  # noqa: F401

import vidkernels

diffusers = pytest.importorskip("diffusers", minversion="0.42")
from diffusers.models.transformers import transformer_ltx2  # noqa: E402

BLOCK = "transformer_blocks.0"


class TestLTX2(ModelSuite):
    compiles_quickly = False
    rules = {"diffusers.ltx2_block": 2, "diffusers.ltx2_attention": 12}
    leaves = ("hidden_states", "audio_hidden_states", "encoder_hidden_states")
    lora = ("attn1.to_q", "to_v", "to_out.0", "net.2", "net.0.proj")
    hooked = (
        "transformer_blocks.1", f"{BLOCK}.attn1", f"{BLOCK}.audio_to_video_attn", f"{BLOCK}.video_to_audio_attn.norm_q",
        f"{BLOCK}.attn2.norm_k", f"{BLOCK}.audio_attn1.to_k", f"{BLOCK}.norm1", f"{BLOCK}.audio_norm2",
        f"{BLOCK}.audio_to_video_norm", f"{BLOCK}.audio_norm3", "transformer_blocks.1.ff", "transformer_blocks.1.audio_ff",
    )  # fmt: skip
    bypassed = tuple(path for path in hooked if "norm" in path)

    def build(self, **changes: Any) -> Any:
        options = {
            "in_channels": 6, "out_channels": 6, "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24,
            "audio_in_channels": 5, "audio_out_channels": 5, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16, "num_layers": 2, "caption_channels": 10,
        }  # fmt: skip
        return diffusers.LTX2VideoTransformer3DModel(**{**options, **changes})

    def expected(self, model: Any) -> dict[str, int]:
        layers = len(model.transformer_blocks)
        return {"diffusers.ltx2_block": layers, "diffusers.ltx2_attention": 6 * layers}

    def inputs(
        self, batch: int = 2, frames: int = 2, height: int = 3, words: int = 5, sounds: int = 4, per_token: bool = False,
        **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        torch.manual_seed(1)
        tokens = frames * height * 2
        timesteps = torch.arange(batch) * 137 + 11
        if per_token:
            timesteps = timesteps[:, None] * (torch.arange(tokens) % 2)
        mask = torch.ones(batch, words)
        mask[-1, (words + 1) // 2 :] = 0
        return {
            "hidden_states": torch.randn(batch, tokens, 6),
            "audio_hidden_states": torch.randn(batch, sounds, 5),
            "encoder_hidden_states": torch.randn(batch, words, 10),
            "audio_encoder_hidden_states": torch.randn(batch, words, 10),
            "timestep": timesteps,
            "audio_timestep": torch.arange(batch) * 137 + 11,
            "sigma": torch.arange(batch) * 137 + 11,
            "encoder_attention_mask": mask,
            "audio_encoder_attention_mask": mask,
            "num_frames": frames,
            "height": height,
            "width": 2,
            "audio_num_frames": sounds,
            **more,
        }

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        heads, width, audio_width = draw.randint(1, 3), draw.choice([12, 16, 24]), draw.choice([4, 8])
        changes = {
            "num_attention_heads": heads,
            "attention_head_dim": width,
            "cross_attention_dim": heads * width,
            "audio_num_attention_heads": heads,
            "audio_attention_head_dim": audio_width,
            "audio_cross_attention_dim": heads * audio_width,
            "norm_elementwise_affine": draw.random() < 0.5,
            "norm_eps": draw.choice([1e-6, 1e-5]),
            "rope_type": draw.choice(["interleaved", "split"]),
            "gated_attn": draw.random() < 0.5,
            "audio_gated_attn": draw.random() < 0.5,
            "cross_attn_mod": draw.random() < 0.5,
            "audio_cross_attn_mod": draw.random() < 0.5,
            "perturbed_attn": draw.random() < 0.5,
        }
        sizes = {"batch": draw.randint(1, 3), "frames": draw.randint(1, 3), "height": draw.randint(1, 4)}
        return changes, {
            **sizes,
            "words": draw.randint(1, 6),
            "sounds": draw.randint(1, 5),
            "per_token": draw.random() < 0.5,
        }

    def test_published_form(self) -> None:
        """Rotation of halves, gated attention, modulated captions: the configurations of LTX-2 and its successors."""
        published = {"rope_type": "split", "gated_attn": True, "audio_gated_attn": True}
        for more in ({}, {"cross_attn_mod": True, "audio_cross_attn_mod": True, "use_prompt_adaln_single": False}):
            model = self.ready(**published, **more)
            self.compare(model.bfloat16() if more else model, self.cast_like(self.inputs(), bool(more)))

    @staticmethod
    def cast_like(arguments: dict[str, Any], half: bool) -> dict[str, Any]:
        if not half:
            return arguments
        wide = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        return {**arguments, **{k: v.bfloat16() for k, v in wide.items()}}

    def test_gradients_of_halves(self) -> None:
        whole = self.build
        try:
            self.build = lambda **changes: whole(rope_type="split", gated_attn=True, **changes)  # type: ignore[method-assign]
            self.test_gradients()
        finally:
            del self.build

    @pytest.mark.parametrize("mask", [0.0, 1.0, None])
    def test_perturbed_attention(self, mask: float | None) -> None:
        """Blocks whose attention over themselves is left out, for all samples or by a mask."""
        model = self.ready(perturbed_attn=True)
        weight = torch.tensor([0.0, 1.0]).view(2, 1, 1) if mask is None else torch.full((2, 1, 1), mask)
        arguments = self.inputs(spatio_temporal_guidance_blocks=[1], perturbation_mask=weight)
        self.compare(model, arguments)

    def test_streams_by_themselves(self) -> None:
        self.compare(self.ready(), self.inputs(isolate_modalities=True))

    def test_one_direction(self) -> None:
        """A block may be asked for one of its two attentions between the streams."""
        model = self.ready()
        block, caught = model.transformer_blocks[0], []
        handle = block.register_forward_pre_hook(lambda module, args, kwargs: caught.append(kwargs), with_kwargs=True)
        model(**self.inputs())
        handle.remove()
        calls = [{**caught[0], "use_a2v_cross_attention": a, "use_v2a_cross_attention": not a} for a in (True, False)]
        with torch.no_grad():
            before = [torch.cat([part.flatten() for part in block(**call)]) for call in calls]
            self.patch(model)
            after = [torch.cat([part.flatten() for part in block(**call)]) for call in calls]
        for expected, actual in zip(before, after, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)

    def test_verify_in_bfloat16(self) -> None:
        """Outputs and gradients of every patched module, alone, on its rule's sample."""
        for more in (
            {},
            {"rope_type": "split", "cross_attn_mod": True, "audio_cross_attn_mod": True, "gated_attn": True},
        ):
            report = self.patch(self.ready(**more).bfloat16(), verify=True, mode="training")
            assert all(item.ok for item in report.numerics)

    def test_other_processors_are_honoured(self) -> None:
        model = self.ready()
        self.patch(model)
        attentions = [model.transformer_blocks[0].attn1]
        checks.honours_processor(model, self.inputs(), attentions, transformer_ltx2.LTX2AudioVideoAttnProcessor)

    def test_attention_backend_is_honoured(self) -> None:
        checks.honours_attention_backend(self)

    def test_regional_compilation(self) -> None:
        model = self.ready(num_layers=3)
        vidkernels.patch(model)
        assert checks.graphs_by_block(model, self.inputs(), model.transformer_blocks) == 1
