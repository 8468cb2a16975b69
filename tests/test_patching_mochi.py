# SPDX-License-Identifier: Apache-2.0
"""diffusers' MochiTransformer3DModel."""

from __future__ import annotations

import copy
import random
from typing import Any

import patching_checks as checks
import pytest
import torch
from helpers import assert_gradients_within_promise, assert_within_promise
from patching_suite import ModelSuite, cast, no_fallback  # noqa: F401
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching.rules import _dit_units

diffusers = pytest.importorskip("diffusers", minversion="0.42")
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0  # noqa: E402
from diffusers.models.transformers.transformer_mochi import MochiRoPE  # noqa: E402

# Valid tokens first, with holes, none, all.
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()


class TestMochi(ModelSuite):
    compiles_quickly = False
    rules = {
        "diffusers.mochi_block": 2, "diffusers.mochi_attention": 2, "diffusers.mochi_positions": 1,
        "diffusers.mochi_head_norm": 8, "diffusers.adaln_continuous": 1,
    }  # fmt: skip
    leaves = ("hidden_states", "encoder_hidden_states")
    lora = ("to_q", "to_v", "add_k_proj", "to_out.0", "to_add_out", "net.2", "net.0.proj", "linear")
    hooked = (
        "transformer_blocks.1", "transformer_blocks.0.attn1", "transformer_blocks.0.attn1.norm_q",
        "transformer_blocks.0.norm1", "transformer_blocks.0.norm1_context", "transformer_blocks.1.norm1_context",
        "transformer_blocks.1.norm2", "transformer_blocks.0.norm4_context", "transformer_blocks.0.ff_context",
        "transformer_blocks.0.norm1.linear",
    )  # fmt: skip
    bypassed = tuple(path for path in hooked if ".norm" in path)

    test_shapes_without_values = None  # upstream enters autocast for its tensors' device, and selects tokens by a mask

    def build(self, **changes: Any) -> Any:
        options = {
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16,
            "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 6,
        }  # fmt: skip
        return diffusers.MochiTransformer3DModel(**{**options, **changes})

    def inputs(self, batch: int = 2, frames: int = 2, words: int = 6) -> dict[str, Any]:
        torch.manual_seed(1)
        return {
            "hidden_states": torch.randn(batch, 4, frames, 4, 6),
            "encoder_hidden_states": torch.randn(batch, words, 16),
            "timestep": torch.arange(batch) * 137 + 11,
            "encoder_attention_mask": torch.arange(words)[None] < words - torch.arange(batch)[:, None],
        }

    def test_verify_in_bfloat16(self) -> None:
        """Outputs and gradients of every patched module, alone, on its rule's sample."""
        report = self.patch(self.ready().bfloat16(), verify=True, mode="training")
        assert all(item.ok for item in report.numerics)

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        changes = {
            "num_attention_heads": draw.randint(1, 3),
            "attention_head_dim": draw.choice([8, 16]),
            "pooled_projection_dim": draw.choice([16, 24]),
        }
        return changes, {"batch": draw.randint(1, 3), "frames": draw.randint(1, 3), "words": draw.randint(4, 6)}

    def test_rotation_runs_inside_the_op_in_half_precision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And by the model's tables in float32, which shows that their angles are, and where frequencies are learned."""
        calls: list[int] = []
        turn = _dit_units.Turn.__call__
        monkeypatch.setattr(_dit_units.Turn, "__call__", lambda *a, **k: calls.append(1) or turn(*a, **k))
        for dtype, learned, expected in (
            (torch.bfloat16, False, 0), (torch.float16, False, 0), (torch.float32, False, 4), (torch.bfloat16, True, 4),
        ):  # fmt: skip
            model, arguments = self.ready().to(dtype), cast(self.inputs(), dtype)
            self.patch(model)
            calls.clear()
            with torch.set_grad_enabled(learned):
                model(**arguments)
            assert len(calls) == expected, (dtype, learned)

    def test_frozen_frequencies_in_bfloat16(self) -> None:
        """Training of adapters: the rotation inside the op has a backward, gradients of all but the frequencies."""
        model, arguments = self.ready().bfloat16(), cast(self.inputs(), torch.bfloat16)
        model.pos_frequencies.requires_grad_(False)
        leaves = [arguments[key] for key in self.leaves]
        double, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
        self.patch(model)

        def run(chosen: Any) -> Any:
            return lambda *x: chosen(**cast(arguments, x[0].dtype) | dict(zip(self.leaves, x, strict=True))).sample

        def reference(*x: Tensor) -> Tensor:
            return run(double if x[0].dtype == torch.float64 else plain)(*x)

        assert_gradients_within_promise(run(model), reference, leaves, names=self.leaves)
        assert not vidkernels.status(model).fallbacks

    def test_other_masks_take_no_other_graph(self) -> None:
        """No length is read from the device: the mask is data."""
        model = self.ready()
        vidkernels.patch(model)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        arguments = self.inputs()
        with torch.no_grad():
            for valid in (6, 1, 0, 4):
                arguments["encoder_attention_mask"] = torch.arange(6).expand(2, -1) < valid
                torch.testing.assert_close(
                    compiled(**arguments).sample, model(**arguments).sample, atol=1e-5, rtol=1e-4, equal_nan=True
                )
        assert counter.frame_count == 1
        torch._dynamo.reset()

    def test_blocks_sharded_on_their_own_still_run_fused(self) -> None:
        model = self.ready()
        checks.runs_fused_when_sharded(model, self.inputs(), model.transformer_blocks)

    def test_another_processor_is_honoured(self) -> None:
        model = self.ready()
        self.patch(model)
        attentions = [model.transformer_blocks[0].attn1]
        checks.honours_processor(model, self.inputs(), attentions, MochiAttnProcessor2_0)


def attention(last: bool = False) -> tuple[Any, dict[str, Any]]:
    """An attention (`last`: of the last block, which drops its text) and its inputs, with the tables of a model."""
    torch.manual_seed(0)
    sizes = {"query_dim": 24, "added_kv_proj_dim": 10, "heads": 3, "dim_head": 8, "out_dim": 24, "out_context_dim": 10}
    module = MochiAttention(**sizes, added_proj_bias=False, context_pre_only=last, processor=MochiAttnProcessor2_0())
    for norm in (module.norm_q, module.norm_k, module.norm_added_q, module.norm_added_k):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    tables = MochiRoPE()(torch.randn(3, 3, 4) / 8, 2, 2, 3, dtype=torch.float32)
    arguments = {"hidden_states": torch.randn(4, 12, 24), "encoder_hidden_states": torch.randn(4, 5, 10)}
    return module, {**arguments, "attention_mask": MASK, "image_rotary_emb": tables}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_attention_with_masks(last: bool, dtype: torch.dtype) -> None:
    """Outputs and gradients of inputs, projections and norms, for texts of any length, in the original's order."""
    module, arguments = attention(last)
    names = ["hidden_states", "encoder_hidden_states"]
    parameters = [name for name, _ in module.named_parameters()]
    leaves = [arguments[name].to(dtype) for name in names]
    leaves += [module.get_parameter(name).detach().to(dtype) for name in parameters]
    module, original = module.to(dtype), copy.deepcopy(module).to(dtype)
    assert len(vidkernels.patch(module, ops="diffusers.mochi_attention").patched) == 1

    def run(chosen: Any) -> Any:
        def call(x: Tensor, text: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            inputs = {**arguments, "hidden_states": x, "encoder_hidden_states": text}
            return functional_call(chosen, dict(zip(parameters, weights, strict=True)), (), inputs)

        return call

    assert_gradients_within_promise(run(module), run(original), leaves, names=[*names, *parameters])
    assert not vidkernels.status(module).fallbacks


def test_texts_keep_their_places() -> None:
    """Valid tokens come first, and what is left over is the bias of the projection, as in the original."""
    module, arguments = attention()
    with torch.no_grad():
        expected = module(**arguments)
        truth = copy.deepcopy(module).double()(**cast(arguments, torch.float64))
        vidkernels.patch(module)
        actual = module(**arguments)
        for triple in zip(actual, expected, truth, strict=True):
            assert_within_promise(*triple)
        assert torch.equal(actual[1][2], module.to_add_out.bias.expand(5, -1))
        arguments["encoder_hidden_states"][~MASK] = 1e4  # padding is not read
        for again, before in zip(module(**arguments), actual, strict=True):
            assert torch.equal(again, before)
        with pytest.warns(VidkernelsFallbackWarning, match="an unusual mask is given"), pytest.raises(TypeError):
            module(arguments["hidden_states"], arguments["encoder_hidden_states"])
