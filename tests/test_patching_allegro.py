# SPDX-License-Identifier: Apache-2.0
"""diffusers' AllegroTransformer3DModel, with masks and the rotation that its pipeline computes."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from helpers import assert_gradients_within_promise, assert_within_promise
from patching_suite import ModelSuite, cast, no_fallback  # noqa: F401
from torch import Tensor

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching.rules import diffusers_allegro

diffusers = pytest.importorskip("diffusers", minversion="0.42")


def rotation(width: int, frames: int, height: int, w: int, scales: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Any:
    """What `AllegroPipeline` passes: tables of cos and sin per axis, and the place of each token."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    found = get_3d_rotary_pos_embed_allegro(
        embed_dim=width,
        crops_coords=((0, 0), (height, w)),
        grid_size=(height, w),
        temporal_size=frames,
        interpolation_scale=scales,
    )
    places = torch.cartesian_prod(*(axis.long() for axis in found[3:]))
    return found[:3], tuple(places.T[:, None].contiguous())


class TestAllegro(ModelSuite):
    compiles_quickly = False
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

    def test_verify_in_bfloat16(self) -> None:
        """Outputs and gradients of every patched module, alone, on its rule's sample."""
        report = self.patch(self.ready().bfloat16(), verify=True, mode="training")
        assert all(item.ok for item in report.numerics)

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

    def half(self, model: Any, rotary: Any, masked: bool = True) -> dict[str, Any]:
        return {**cast(self.inputs(masked=masked, rotated=False), model.dtype), "image_rotary_emb": rotary}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("masked", [False, True])
    def test_rotation_in_one_launch(self, masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """In half precision, with the pipeline's float32 tables and scales, outputs and gradients keep the promise."""
        seen = spy(monkeypatch)
        model = self.ready().to(dtype)
        arguments = self.half(model, rotation(12, 2, 4, 4, (2.2, 2.0, 2.0)), masked)
        plain, double = copy.deepcopy(model), copy.deepcopy(model).double()
        self.patch(model)
        with torch.no_grad():
            truth = double(**cast(arguments, torch.float64)).sample
            assert_within_promise(model(**arguments).sample, plain(**arguments).sample, truth)
        assert len(seen) == 2

        def run(chosen: Any) -> Any:
            def call(*x: Tensor) -> Tensor:
                return chosen(**cast(arguments, x[0].dtype) | dict(zip(self.leaves, x, strict=True))).sample

            return call

        def reference(*x: Tensor) -> Tensor:
            return run(double if x[0].dtype == torch.float64 else plain)(*x)

        def patched(*x: Tensor) -> Tensor:
            return model(**arguments | dict(zip(self.leaves, x, strict=True))).sample

        leaves = [arguments[key] for key in self.leaves]
        assert_gradients_within_promise(patched, reference, leaves, names=self.leaves)
        assert len(seen) == 4 and not vidkernels.status(model).fallbacks

    def test_other_tables_are_used_as_they_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another base, a crop that does not begin at 0, tables in bfloat16; and float32, where the angles' error shows."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro as make

        seen, sizes = spy(monkeypatch), {"embed_dim": 12, "grid_size": (4, 4), "temporal_size": 2}
        tables, places = rotation(12, 2, 4, 4)
        narrow = [tuple(part.bfloat16() for part in pair) for pair in tables]
        crops = make(crops_coords=((1, 0), (5, 4)), **sizes)[:3]
        based = make(crops_coords=((0, 0), (4, 4)), theta=100, **sizes)[:3]
        for other, dtype in (
            (narrow, torch.bfloat16),
            (crops, torch.bfloat16),
            (based, torch.bfloat16),
            (tables, torch.float32),
        ):
            model = self.ready().to(dtype)
            self.compare(model, self.half(model, (other, places)))
        assert not seen

    def test_under_autocast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen, model = spy(monkeypatch), self.ready()
        arguments = self.half(model, rotation(12, 2, 4, 4, (2.2, 2.0, 2.0)))
        with torch.no_grad():
            truth = copy.deepcopy(model).double()(**cast(arguments, torch.float64)).sample
            with torch.autocast("cpu", torch.bfloat16):
                expected = model(**arguments).sample
                self.patch(model)
                assert_within_promise(model(**arguments).sample, expected, truth)
        assert len(seen) == 2

    def test_another_processor_is_honoured(self) -> None:
        from diffusers.models.attention_processor import AllegroAttnProcessor2_0

        class Doubled(AllegroAttnProcessor2_0):
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return 2 * super().__call__(*args, **kwargs)

        model = self.ready().bfloat16()
        arguments = self.half(model, rotation(12, 2, 4, 4))
        with torch.no_grad():
            self.patch(model)
            model.transformer_blocks[0].attn1.set_processor(Doubled())
            with pytest.warns(VidkernelsFallbackWarning, match="an attention uses Doubled"):
                actual = model(**arguments).sample
            vidkernels.unpatch(model)
            torch.testing.assert_close(actual, model(**arguments).sample, atol=0.05, rtol=0.05)


def spy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each attention whose rotation runs inside the op."""
    seen: list[int] = []
    run = diffusers_allegro._rotated_attention
    monkeypatch.setattr(diffusers_allegro, "_rotated_attention", lambda *a: seen.append(1) or run(*a))
    return seen
