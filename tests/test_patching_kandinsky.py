# SPDX-License-Identifier: Apache-2.0
"""diffusers' Kandinsky 5: blocks of text and of video, condition in float32 beside weights in half precision."""

from __future__ import annotations

import copy
import random
from typing import Any

import patching_checks as checks
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_promise
from patching_suite import ModelSuite, cast, no_fallback  # noqa: F401

import vidkernels

diffusers = pytest.importorskip("diffusers", minversion="0.42")
from diffusers.models.transformers import transformer_kandinsky as home  # noqa: E402


class Rotated(home.Kandinsky5AttnProcessor):
    """The attention without its rounding to bfloat16, of which 1e-3 of the values would be on the other side by luck."""

    def __call__(
        self,
        attn: Any,
        x: torch.Tensor,
        encoder_hidden_states: Any = None,
        rotary_emb: Any = None,
        sparse_params: Any = None,
    ) -> torch.Tensor:
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(y).unflatten(-1, (attn.num_heads, -1))
            for layer, y in ((attn.to_query, x), (attn.to_key, context), (attn.to_value, context))
        )
        q, k = attn.query_norm(q), attn.key_norm(k)
        if rotary_emb is not None:
            pairs = (y.unflatten(-1, (-1, 1, 2)) for y in (q, k))
            q, k = ((rotary_emb.to(q.dtype) * y).sum(-1).flatten(-2) for y in pairs)
        mixed = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
        return attn.out_layer(mixed.transpose(1, 2).flatten(2))


class TestKandinsky5(ModelSuite):
    compiles_quickly = False
    rules = {"diffusers.kandinsky5_text_block": 1, "diffusers.kandinsky5_block": 2}
    leaves = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    lora = ("to_query", "to_value", "in_layer")
    hooked = (
        "visual_transformer_blocks.1", "visual_transformer_blocks.0.self_attention", "text_transformer_blocks.0",
        "visual_transformer_blocks.0.feed_forward", "visual_transformer_blocks.0.cross_attention_norm",
        "visual_transformer_blocks.1.visual_modulation", "text_transformer_blocks.0.text_modulation.activation",
        "text_transformer_blocks.0.feed_forward_norm", "visual_transformer_blocks.1.visual_modulation.out_layer",
    )  # fmt: skip
    bypassed = (
        *(path for path in hooked if path.endswith(("norm", "modulation"))),
        "text_transformer_blocks.0.text_modulation.activation",
    )
    zero_gradients = ("to_key.bias",)
    processor = Rotated

    def build(self, **changes: Any) -> Any:
        options = {
            "in_visual_dim": 3, "in_text_dim": 10, "in_text_dim2": 7, "time_dim": 12, "out_visual_dim": 4,
            "model_dim": 24, "ff_dim": 20, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 4),
        }  # fmt: skip
        model = diffusers.Kandinsky5Transformer3DModel(**{**options, **changes})
        for module in model.modules():
            if isinstance(module, home.Kandinsky5Attention):
                module.set_processor(self.processor())
        return model

    def inputs(self, batch: int = 2, frames: int = 3, height: int = 4, words: int = 5) -> dict[str, Any]:
        torch.manual_seed(1)
        places = tuple(torch.arange(size) for size in (frames, height // 2, 3))
        return {
            "hidden_states": torch.randn(batch, frames, height, 6, 3),
            "encoder_hidden_states": torch.randn(batch, words, 10),
            "timestep": torch.arange(batch) * 137 + 11,
            "pooled_projections": torch.randn(batch, 7),
            "visual_rope_pos": places,
            "text_rope_pos": torch.arange(words),
        }

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        axes = draw.choice([(4, 4, 4), (2, 4, 6), (4, 2, 2)])
        changes = {"axes_dims": axes, "model_dim": sum(axes) * draw.randint(1, 3), "time_dim": draw.choice([8, 20])}
        sizes = {"batch": draw.randint(1, 3), "frames": draw.randint(1, 4), "height": 2 * draw.randint(1, 3)}
        return changes, {**sizes, "words": draw.randint(1, 6)}

    def ready(self, **changes: Any) -> Any:
        return casts_sines(super().ready(**changes))

    def test_verify_in_bfloat16(self) -> None:
        """Outputs and gradients of every patched module, alone, on its rule's sample."""
        report = self.patch(self.ready().bfloat16(), verify=True, mode="training")
        assert all(item.ok for item in report.numerics)

    def test_one_condition_for_all(self) -> None:
        model, arguments = self.ready(), self.inputs(batch=3)
        arguments |= {name: arguments[name][:1] for name in ("timestep", "pooled_projections")}
        self.compare(model, arguments)

    def test_modulation_of_all_blocks_in_one_product(self) -> None:
        checks.batches_modulation(self, 3)


def casts_sines(model: Any) -> Any:
    """Upstream's sines are float32: the layer behind them takes them in its own dtype, so that casts of the model work."""
    layer = model.time_embeddings.in_layer
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
    return model


@pytest.mark.parametrize("processor", [Rotated, home.Kandinsky5AttnProcessor])
def test_condition_in_float32_beside_bfloat16(processor: type) -> None:
    """As `from_pretrained(torch_dtype=torch.bfloat16)` loads it."""

    class Suite(TestKandinsky5):
        pass

    Suite.processor = processor
    suite = Suite()
    model, arguments = suite.ready(), cast(suite.inputs(), torch.bfloat16)
    for name, parameter in model.named_parameters():
        if not any(part in name.split(".") for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = model(**arguments).sample
        suite.patch(model)
        assert_within_promise(model(**arguments).sample, expected, double(**cast(arguments, torch.float64)).sample)
    assert not vidkernels.status(model).fallbacks
