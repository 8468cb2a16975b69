# SPDX-License-Identifier: Apache-2.0
"""diffusers' models that share a class with those the rules were written for: control networks, image models, a U-ViT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_within_promise
from patching_suite import cast, no_fallback  # noqa: F401
from torch import Tensor
from vae_cases import nudged, randomized

import vidkernels

diffusers = pytest.importorskip("diffusers", minversion="0.42")
WORDS, ROWS, COLUMNS = 5, 3, 4
TOKENS = ROWS * COLUMNS
SMALL = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
         "joint_attention_dim": 10, "in_channels": 6}  # fmt: skip
AXES = [4, 6, 6]
Case = tuple[str, dict[str, Any], dict[str, Any], set[str]]


def places(axes: int) -> Tensor:
    found = torch.zeros(TOKENS, axes)
    found[:, -2:] = torch.cartesian_prod(torch.arange(ROWS * 1.0), torch.arange(COLUMNS * 1.0))
    return found


def joint(axes: int = 3, **more: Any) -> dict[str, Any]:
    """Inputs of a model of Flux's kind."""
    return {
        "hidden_states": torch.randn(2, TOKENS, 6), "encoder_hidden_states": torch.randn(2, WORDS, 10),
        "timestep": torch.tensor([0.3, 0.8]), "img_ids": places(axes), "txt_ids": torch.zeros(WORDS, axes), **more,
    }  # fmt: skip


def control(**more: Any) -> dict[str, Any]:
    return joint(controlnet_cond=torch.randn(2, TOKENS, 6), pooled_projections=torch.randn(2, 12), **more)


def image_cases() -> list[Case]:
    chroma = {"approximator_num_channels": 16, "approximator_hidden_dim": 8, "approximator_layers": 1}
    qwen = {"in_channels": 8, "out_channels": 2, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 10, "axes_dims_rope": (4, 6, 6)}  # fmt: skip
    qwen_inputs = {"hidden_states": torch.randn(2, TOKENS, 8), "encoder_hidden_states": torch.randn(2, WORDS, 10),
                   "encoder_hidden_states_mask": torch.ones(2, WORDS).long(), "timestep": torch.tensor([0.3, 0.8]),
                   "img_shapes": [(1, ROWS, COLUMNS)] * 2}  # fmt: skip
    uvit = {"hidden_size": 16, "cond_embed_dim": 8, "micro_cond_encode_dim": 2, "micro_cond_embed_dim": 10,
            "encoder_hidden_size": 6, "vocab_size": 32, "codebook_size": 24, "in_channels": 8, "block_out_channels": 8,
            "num_res_blocks": 1, "block_num_heads": 1, "num_hidden_layers": 1, "num_attention_heads": 1,
            "intermediate_size": 16, "sample_size": 8, "downsample": True, "upsample": True}  # fmt: skip
    uvit_inputs = {"input_ids": torch.randint(0, 24, (2, 8, 8)), "encoder_hidden_states": torch.randn(2, WORDS, 6),
                   "pooled_text_emb": torch.randn(2, 8), "micro_conds": torch.randn(2, 5)}  # fmt: skip
    norm = {"adaln_continuous"}
    return [
        ("ChromaTransformer2DModel", SMALL | chroma | {"axes_dims_rope": (4, 6, 6)}, joint(), {"flux_positions"}),
        ("Flux2Transformer2DModel", SMALL | {"axes_dims_rope": (4,) * 4, "timestep_guidance_channels": 16},
         joint(4, guidance=torch.ones(2)), norm),
        ("BriaTransformer2DModel", SMALL | {"axes_dims_rope": AXES}, joint(), norm),
        ("OvisImageTransformer2DModel", SMALL | {"out_channels": 6, "axes_dims_rope": (4, 6, 6)}, joint(), norm | {"swiglu"}),
        ("LongCatImageTransformer2DModel", SMALL | {"axes_dims_rope": AXES}, joint(), norm),
        ("QwenImageTransformer2DModel", qwen, qwen_inputs, norm),
        ("UVit2DModel", uvit, uvit_inputs, norm | {"geglu"}),
    ]  # fmt: skip


def control_cases() -> list[Case]:
    flux = SMALL | {"pooled_projection_dim": 12, "axes_dims_rope": AXES}
    rules = {"flux_positions", "flux_block", "flux_single_block"}
    sd3 = {"sample_size": 8, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 3,
           "joint_attention_dim": 10, "caption_projection_dim": 24, "pooled_projection_dim": 12, "out_channels": 4,
           "pos_embed_max_size": 8}  # fmt: skip
    frames = {"hidden_states": torch.randn(2, 4, 8, 8), "controlnet_cond": torch.randn(2, 4, 8, 8),
              "pooled_projections": torch.randn(2, 12), "timestep": torch.tensor([3, 700]), "conditioning_scale": 0.5}  # fmt: skip
    text = {"encoder_hidden_states": torch.randn(2, WORDS, 10)}
    tokens = {"hidden_states": torch.randn(2, 16, 24), "encoder_hidden_states": None}
    return [
        ("FluxControlNetModel", flux, control(conditioning_scale=0.7), rules),
        ("FluxControlNetModel", flux | {"num_mode": 3, "guidance_embeds": True},
         control(controlnet_mode=torch.tensor([[1], [2]]), guidance=torch.ones(2)), rules),
        ("SD3ControlNetModel", sd3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}, frames | text, {"sd3_block"}),
        ("SD3ControlNetModel", sd3 | {"joint_attention_dim": None, "use_pos_embed": False}, frames | tokens,
         {"sd3_single_block"}),
    ]  # fmt: skip


def video_cases() -> list[Case]:
    wan = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "out_channels": 4,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    sana = wan | {"in_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12,
                  "cross_attention_dim": 24, "caption_channels": 8, "sample_size": 8}  # fmt: skip
    clip = {"hidden_states": torch.randn(2, 4, 2, 8, 8), "timestep": torch.tensor([3, 700])}
    animate = wan | {
        "in_channels": 12, "latent_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 20, "image_dim": 16,
        "motion_encoder_channel_sizes": {str(2**i): 4 for i in range(2, 8)}, "motion_encoder_size": 16,
        "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
    }  # fmt: skip
    pose = {
        "hidden_states": torch.randn(1, 12, 21, 4, 4), "timestep": torch.tensor([300]),
        "encoder_hidden_states": torch.randn(1, 512, 16), "encoder_hidden_states_image": torch.randn(1, 3, 16),
        "pose_hidden_states": torch.randn(1, 4, 20, 4, 4), "face_pixel_values": torch.randn(1, 3, 77, 16, 16),
    }  # fmt: skip
    consisid = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
                "time_embed_dim": 8, "text_embed_dim": 8, "num_layers": 2, "sample_width": 6, "sample_height": 4,
                "sample_frames": 9, "max_text_seq_length": WORDS}  # fmt: skip
    words = {"encoder_hidden_states": torch.randn(2, WORDS, 8)}
    small = {"hidden_states": torch.randn(2, 3, 4, 4, 6), "timestep": torch.tensor([3, 700])}
    blocks = {"wan_positions", "wan_block", "wan_attention"}
    return [
        ("SanaVideoTransformer3DModel", sana, clip | words, {"sana_video_block", "wan_positions"}),
        ("WanAnimateTransformer3DModel", animate, pose, blocks),
        ("ConsisIDTransformer3DModel", consisid, small | words, {"consisid_block"}),
    ]


def run(model: Any, arguments: dict[str, Any]) -> Tensor:
    results = [tensor for tensor in torch.utils._pytree.tree_leaves(model(**arguments)) if tensor is not None]
    return torch.cat([tensor.flatten() for tensor in results])


@pytest.mark.parametrize("kind", ["images", "control networks", "videos"])
def test_results_and_undo(kind: str) -> None:
    torch.manual_seed(0)
    makers = {"images": image_cases, "control networks": control_cases, "videos": video_cases}
    for name, config, arguments, rules in makers[kind]():
        model = randomized(getattr(diffusers, name)(**config).eval())
        double = copy.deepcopy(model).double()
        with torch.no_grad():
            expected, truth = run(model, arguments), run(double, cast(arguments, torch.float64))
            again = run(model, torch.utils._pytree.tree_map_only(Tensor, _nudged, arguments))
            report = vidkernels.patch(model)
            assert {entry.rule.removeprefix("diffusers.") for entry in report.patched} == rules, name
            worse = max(expected, again, key=lambda y: float((y.double() - truth).abs().max()))
            assert_within_promise(run(model, arguments), worse, truth, name)
            assert not vidkernels.status(model).fallbacks, name
            vidkernels.unpatch(model)
            assert torch.equal(run(model, arguments), expected), name


def _nudged(x: Tensor) -> Tensor:
    return nudged(x) if x.is_floating_point() else x
