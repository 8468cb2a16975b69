# SPDX-License-Identifier: Apache-2.0
"""diffusers' FluxTransformer2DModel: both kinds of blocks, with the rotation inside the norm of queries and keys."""

from __future__ import annotations

import random
from typing import Any

import patching_checks as checks
import pytest
import torch
from helpers import assert_within_promise
from patching_suite import ModelSuite, cast, no_fallback  # noqa: F401

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning

diffusers = pytest.importorskip("diffusers", minversion="0.42")


class TestFlux(ModelSuite):
    rules = {
        "diffusers.flux_block": 1, "diffusers.flux_single_block": 2, "diffusers.flux_positions": 1,
        "diffusers.adaln_continuous": 1,
    }  # fmt: skip
    leaves = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    lora = ("to_q", "to_v", "add_k_proj", "to_out.0", "net.2", "net.0.proj", "linear", "proj_mlp", "proj_out")
    hooked = (
        "transformer_blocks.0", "single_transformer_blocks.1", "transformer_blocks.0.attn",
        "single_transformer_blocks.0.attn", "transformer_blocks.0.attn.norm_added_k", "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.norm1", "transformer_blocks.0.norm2_context", "single_transformer_blocks.0.norm",
        "single_transformer_blocks.0.act_mlp", "single_transformer_blocks.0.proj_mlp", "pos_embed",
    )  # fmt: skip
    bypassed = tuple(path for path in hooked if "norm" in path or path.endswith(".attn"))
    zero_gradients = ("to_k.bias", "add_k_proj.bias")

    def build(self, **changes: Any) -> Any:
        options = {
            "in_channels": 6, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 10, "pooled_projection_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        }  # fmt: skip
        return diffusers.FluxTransformer2DModel(**{**options, **changes})

    def inputs(self, batch: int = 2, rows: int = 3, words: int = 5, guidance: bool = False) -> dict[str, Any]:
        torch.manual_seed(1)
        grid = torch.stack(
            torch.meshgrid(torch.tensor([0.0]), torch.arange(rows * 1.0), torch.arange(4.0), indexing="ij")
        )
        arguments = {
            "hidden_states": torch.randn(batch, rows * 4, 6),
            "encoder_hidden_states": torch.randn(batch, words, 10),
            "pooled_projections": torch.randn(batch, 12),
            "timestep": torch.linspace(0.2, 0.9, batch),
            "img_ids": grid.flatten(1).T.contiguous(),
            "txt_ids": torch.zeros(words, 3),
        }
        if guidance:
            arguments["guidance"] = torch.full((batch,), 3.5)
        return arguments

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        axes = draw.choice([(4, 6, 6), (2, 4, 2), (8, 12, 12)])
        guidance = draw.random() < 0.5
        changes = {
            "num_attention_heads": draw.randint(1, 3),
            "attention_head_dim": sum(axes),
            "axes_dims_rope": axes,
            "guidance_embeds": guidance,
        }
        sizes = {"batch": draw.randint(1, 3), "rows": draw.randint(1, 4), "words": draw.randint(1, 6)}
        return changes, {**sizes, "guidance": guidance}

    def test_rotation_runs_inside_the_op(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Blocks without the rule for positions rotate as diffusers does; with it they do not call diffusers' function."""
        from diffusers.models.transformers import transformer_flux

        model, arguments, calls = self.ready(), self.inputs(), []
        rotate = transformer_flux.apply_rotary_emb
        monkeypatch.setattr(transformer_flux, "apply_rotary_emb", lambda *a, **k: calls.append(1) or rotate(*a, **k))
        with torch.no_grad():
            expected = model(**arguments).sample
            vidkernels.patch(model, exclude="pos_embed")
            calls.clear()
            torch.testing.assert_close(model(**arguments).sample, expected, atol=1e-5, rtol=1e-4)
            assert len(calls) == 6
            vidkernels.patch(model)
            calls.clear()
            torch.testing.assert_close(model(**arguments).sample, expected, atol=1e-5, rtol=1e-4)
            assert not calls

    def test_tables_that_lost_their_positions_still_rotate(self) -> None:
        """Offloading hooks rebuild tuples of any class; the copy has tables but no positions."""
        model, arguments = self.ready(), self.inputs()
        with torch.no_grad():
            expected = model(**arguments).sample
            self.patch(model)
            for block in model.transformer_blocks:
                block.register_forward_pre_hook(_rebuild_tuples, with_kwargs=True)
            torch.testing.assert_close(model(**arguments).sample, expected, atol=1e-5, rtol=1e-4)

    def test_positions_that_were_cast_are_forgotten(self) -> None:
        """FSDP2's mixed precision casts all arguments of a block: in bfloat16 the positions 256 and 257 are one."""
        rope = self.ready(axes_dims_rope=(4, 6, 6)).pos_embed
        vidkernels.patch(rope)
        tables = rope(torch.tensor([[0.0, 256, 257]]))
        same, cast = (torch.utils._pytree.tree_map(f, tables) for f in (torch.clone, torch.Tensor.bfloat16))
        assert torch.equal(same.positions, tables.positions)
        assert getattr(cast, "positions", None) is None and cast[0].dtype == torch.bfloat16

    def test_positions_are_those_that_the_tables_were_made_from(self) -> None:
        rope, ids = self.ready().pos_embed, torch.ones(2, 3)
        vidkernels.patch(rope)
        tables = rope(ids)
        ids.zero_()
        assert tables.positions.all()

    def test_attention_kwargs_and_other_processors_are_honoured(self) -> None:
        from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

        model, arguments = self.ready(), self.inputs()
        mask = torch.zeros(2, 1, 17, 17)
        mask[..., 3:5] = -torch.inf
        with torch.no_grad():
            masked = model(**arguments, joint_attention_kwargs={"attention_mask": mask}).sample
            self.patch(model)
            with pytest.warns(VidkernelsFallbackWarning, match="joint_attention_kwargs are given"):
                actual = model(**arguments, joint_attention_kwargs={"attention_mask": mask}).sample
            torch.testing.assert_close(actual, masked, atol=1e-5, rtol=1e-4)
        attentions = [block.attn for block in [*model.transformer_blocks, *model.single_transformer_blocks]]
        checks.honours_processor(model, arguments, attentions, FluxAttnProcessor)

    def test_ip_adapter_is_honoured(self) -> None:
        """Its branch joins the image stream behind the MLP, without a gate."""
        from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

        model, arguments = self.ready(), self.inputs()
        for block in model.transformer_blocks:
            block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 20))
        arguments["joint_attention_kwargs"] = {"ip_hidden_states": [torch.randn(2, 4, 20)]}
        with torch.no_grad():
            expected = model(**arguments).sample
            other = {**arguments, "joint_attention_kwargs": {"ip_hidden_states": [torch.randn(2, 4, 20)]}}
            assert not torch.allclose(model(**other).sample, expected, atol=1e-3)
            self.patch(model)
            with pytest.warns(VidkernelsFallbackWarning, match="joint_attention_kwargs are given"):
                torch.testing.assert_close(model(**arguments).sample, expected, atol=1e-5, rtol=1e-4)

    def test_blocks_sharded_on_their_own_still_run_fused(self) -> None:
        model = self.ready()
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        checks.runs_fused_when_sharded(model, self.inputs(), blocks)

    def test_float64_keeps_the_tables_of_the_model(self) -> None:
        model, arguments = self.ready().double(), cast(self.inputs(), torch.float64)
        with torch.no_grad():
            expected = model(**arguments).sample
            self.patch(model)
            torch.testing.assert_close(model(**arguments).sample, expected, atol=1e-12, rtol=1e-12)

    def test_attention_backend_is_honoured(self) -> None:
        checks.honours_attention_backend(self)

    def test_fused_projections(self) -> None:
        model, arguments = self.ready(), self.inputs()
        self.patch(model)
        with torch.no_grad():
            expected = model(**arguments).sample
            model.fuse_qkv_projections()
            torch.testing.assert_close(model(**arguments).sample, expected, atol=1e-5, rtol=1e-4)

    def test_float16_is_clipped_like_the_original(self) -> None:
        """The text stream of a half-precision block stays finite where a sum leaves the range."""
        model = self.ready().half()
        block = model.transformer_blocks[0]
        x, text, temb = (torch.randn(1, n, 32).half() for n in (4, 3, 1))
        text[..., 0] = 65504
        with torch.no_grad():
            expected = block(x, text, temb[:, 0])
            truth = [part.double() for part in expected]
            vidkernels.patch(block)
            actual = block(x, text, temb[:, 0])
        assert actual[0].isfinite().all()
        assert_within_promise(actual[1], expected[1], truth[1])

    def test_regional_compilation(self) -> None:
        """As many graphs as the original: one for contiguous inputs, one for the slices that a block returns."""
        from torch._dynamo.testing import CompileCounterWithBackend

        arguments, counts = self.inputs(), []
        for patched in (False, True):
            model = self.ready(num_single_layers=4)
            counter = CompileCounterWithBackend("aot_eager")
            with torch.no_grad():
                expected = model(**arguments).sample
                if patched:
                    vidkernels.patch(model)
                for block in model.single_transformer_blocks:
                    block.compile(backend=counter, fullgraph=True)
                torch.testing.assert_close(model(**arguments).sample, expected, atol=1e-5, rtol=1e-4)
            counts.append(counter.frame_count)
            torch._dynamo.reset()
        assert counts == [2, 2]


def _rebuild_tuples(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    rebuilt = {key: type(v)(iter(v)) if isinstance(v, tuple) else v for key, v in kwargs.items()}
    return args, rebuilt
