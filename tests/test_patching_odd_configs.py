# SPDX-License-Identifier: Apache-2.0
"""Video VAEs of diffusers in configurations that nobody published, drawn at random: odd widths and group counts, other
strides in time, optional convolutions and attention, tiles and slices, clips of any length that the original takes."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import vae_cases as cases
from patching_suite import no_fallback  # noqa: F401

import vidkernels

diffusers = pytest.importorskip("diffusers", minversion="0.42")
pytestmark = pytest.mark.slow
GROUPED = (
    (16, 24, 16, 36),
    (12, 16, 32, 20),
    (28, 16, 16, 24),
)  # multiples of four: four groups of four channels or more
# What a drawn configuration changes of the one in `vae_cases`, and its clip lengths.
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "wan2.1": {
        "base_dim": (8, 12, 20), "z_dim": (3, 6), "dim_mult": ([1, 2, 3, 1], [2, 1, 1, 2], [1, 1, 2, 3]),
        "num_res_blocks": (1, 2), "temperal_downsample": ([True, True, False], [False, False, True], [False] * 3),
    },
    "wan2.2": {
        "base_dim": (8, 16), "decoder_base_dim": (None, 8, 24), "temperal_downsample": ([True, False, True], [False, True, True]),
        "num_res_blocks": (1, 2), "patch_size": (2,),
    },
    "qwenimage": {
        "base_dim": (8, 12, 20), "z_dim": (3, 6), "dim_mult": ([1, 2, 3, 1], [2, 1, 1, 2]), "num_res_blocks": (1, 2),
        "temperal_downsample": ([True, True, False], [False, False, True]),
    },
    "hunyuan": {
        "block_out_channels": GROUPED, "layers_per_block": (1, 2), "norm_num_groups": (1, 2, 4),
        "mid_block_add_attention": (True, False), "spatial_compression_ratio": (4, 8),
    },
    "hunyuan1.5": {
        "block_out_channels": ((8, 16, 16, 32), (16, 16, 32, 64)), "layers_per_block": (1, 2),
        "downsample_match_channel": (True, False), "upsample_match_channel": (True, False),
    },
    "cogvideox": {
        "latent_channels": (3,), "block_out_channels": GROUPED, "layers_per_block": (1, 2), "norm_num_groups": (1, 2, 4),
        "norm_eps": (1e-6, 1e-4), "use_quant_conv": (True, False), "use_post_quant_conv": (True, False),
        "temporal_compression_ratio": (2, 4, 8),
    },
    "ltx": {
        "block_out_channels": ((8, 16, 24), (24, 16, 8)), "layers_per_block": ((1, 2, 1, 1), (2, 1, 1, 2)),
        "decoder_block_out_channels": ((8, 16, 16), (32, 8, 16)), "patch_size": (2, 4), "resnet_norm_eps": (1e-6, 1e-5),
        "encoder_causal": (True, False), "decoder_causal": (True, False), "upsample_residual": ((False,) * 3,),
    },
    "cosmos": {
        "encoder_block_out_channels": ((8, 24, 16, 16), (16, 8, 24, 24)), "num_layers": (1, 2), "patch_size": (2, 4),
        "decode_block_out_channels": ((8, 24, 16, 16), (16, 8, 24, 24)), "patch_type": ("haar", "rearrange"),
        "attention_resolutions": ((8,), (4, 8)), "temporal_compression_ratio": (4, 8),
    },
    "magvit": {
        "block_out_channels": GROUPED, "layers_per_block": (1, 2), "norm_num_groups": (1, 2, 4),
        "spatial_group_norm": (True, False),
    },
    "mochi": {
        "encoder_block_out_channels": ((32, 64, 32, 64), (64, 32, 32, 32)), "temporal_expansions": ((1, 2, 3), (2, 2, 1)),
        "decoder_block_out_channels": ((32, 64, 32, 64), (64, 32, 32, 32)), "layers_per_block": ((1, 2, 1, 1, 1), (1,) * 5),
        "add_attention_block": ((True, False, True, False, False), (False,) * 5),
    },
}  # fmt: skip
FRAMES: dict[str, tuple[int, ...]] = {"wan2.1": (1, 2, 6, 13), "cogvideox": (1, 8, 9, 16), "mochi": (1, 6, 13)}


def drawn(name: str, draw: random.Random) -> tuple[Any, torch.Tensor]:
    """A model and a clip."""
    case = cases.VAES[name]
    changes = {key: draw.choice(values) for key, values in CHOICES[name].items()}
    model = cases.build(name, **changes)
    batch = draw.randint(1, case.batch)
    if case.slicing and draw.random() < 0.4:
        model.enable_slicing()
    tiled = draw.random() < 0.4
    if tiled:
        cases.enable_tiling(name, model)
    x = cases.clip(name, draw.choice(FRAMES.get(name, case.frames)), batch, wider=int(tiled or draw.random() < 0.5))
    layout = draw.choice(["contiguous", "channels last", "transposed"])
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    return model, x.transpose(3, 4) if layout == "transposed" else x


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CHOICES)
def test_drawn(name: str, seed: int) -> None:
    """Whatever the original takes is right, fused, the same in copies, and undone; what it refuses is refused."""
    draw = random.Random(f"{name} {seed}")
    model, x = drawn(name, draw)
    models = copy.deepcopy(model), model, cases.in_double(model)
    vidkernels.patch(model)
    with torch.no_grad():
        try:
            expected = cases.encode(models[0], x)
        except (RuntimeError, NotImplementedError) as error:
            with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
                cases.encode(model, x)
            pytest.skip(f"the original: {error}")
        cases.check_call(cases.encode, models, x, "encoded")
        z = cases.latents(models[0], x)
        cases.check_call(cases.decode, models, z, "decoded")
        assert not vidkernels.status(model).fallbacks
        fused = cases.encode(model, x)
        assert torch.equal(cases.encode(copy.deepcopy(model), x), fused)
        fresh = type(model).from_config(model.config).eval()
        fresh.load_state_dict(model.state_dict())
        if not (model.use_slicing or model.use_tiling):
            assert torch.equal(cases.encode(fresh, x), expected)
        vidkernels.unpatch(model)
        assert torch.equal(cases.encode(model, x), expected)
