# SPDX-License-Identifier: Apache-2.0
"""diffusers' Allegro VAE, whose public calls work on fixed tiles only: its networks, and one round trip over tiles."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import vae_cases as cases
from patching_suite import no_fallback  # noqa: F401

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning

diffusers = pytest.importorskip("diffusers", minversion="0.42")
CONFIG = {
    "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 32,
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def build() -> Any:
    return cases.randomized(diffusers.AutoencoderKLAllegro(**CONFIG).eval())


def encoder(model: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model.encoder(x)
    return found


def decoder(model: Any, z: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model.decoder(z)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "frames"), [(1, 4), (2, 8)])
def test_networks(batch: int, frames: int, dtype: torch.dtype) -> None:
    model = build().to(dtype)
    models = copy.deepcopy(model), model, cases.in_double(model)
    vidkernels.patch(model)
    with torch.no_grad():
        cases.check_call(encoder, models, torch.randn(batch, 3, frames, 16, 24).to(dtype), "encoded")
        cases.check_call(decoder, models, torch.randn(batch, 4, frames // 4, 2, 3).to(dtype), "decoded")
    assert vidkernels.status(model).patched == "all"


def test_gradients() -> None:
    model = build()
    original, double = copy.deepcopy(model), cases.in_double(model)
    vidkernels.patch(model, mode="training")
    x = torch.randn(1, 3, 4, 16, 16)
    inputs = x, cases.nudged(x), cases.nudged(x)

    def gradients(network: Any, clip: torch.Tensor) -> dict[str, torch.Tensor]:
        given = clip.detach().requires_grad_()
        y = network.decoder(network.encoder(given)[:, :4])
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
        named = {"x": given, **dict(network.named_parameters())}
        found = torch.autograd.grad((y * weight).sum(), list(named.values()), allow_unused=True)
        return {key: g for key, g in zip(named, found, strict=True) if g is not None}

    runs = [[gradients(network, clip) for clip in inputs] for network in (original, model)]
    cases.assert_gradients_agree(*runs, gradients(double, x.double()))


def test_tiles_verify_and_undo() -> None:
    model = build()
    model.enable_tiling()
    model.kernel, model.stride = (8, 32, 32), (4, 16, 16)
    model.tile_overlap_t, model.tile_overlap_h, model.tile_overlap_w = 4, 16, 16
    original = copy.deepcopy(model)
    report = vidkernels.patch(model, verify=True)
    assert all(item.ok for item in report.numerics)
    x = torch.randn(1, 3, 12, 32, 48)
    with torch.no_grad():
        for call, given in ((cases.encode, x), (cases.decode, cases.latents(original, x))):
            expected, actual = call(original, given), call(model, given)
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
            assert actual.stride() == expected.stride()
        report.undo()
        assert torch.equal(cases.encode(model, x), cases.encode(original, x))


@pytest.mark.parametrize(
    "part",
    ["decoder.up_blocks.0.resnets.0", "decoder.up_blocks.0.upsamplers.0", "encoder.down_blocks.0.downsamplers.0.conv",
     "decoder.up_blocks.1.temp_convs.0.conv2", "decoder.mid_block.attentions.0", "encoder.conv_norm_out"],
)  # fmt: skip
def test_hooks_inside_fire(part: str) -> None:
    model, seen = build(), []
    x = torch.randn(1, 3, 4, 16, 16)
    with torch.no_grad():
        expected = model.decoder(model.encoder(x)[:, :4])
        vidkernels.patch(model)
        model.get_submodule(part).register_forward_hook(lambda module, inputs, output: seen.append(output))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VidkernelsFallbackWarning)
            actual = model.decoder(model.encoder(x)[:, :4])
    assert len(seen) == 1
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_blocks_with_another_activation_are_left_out() -> None:
    model = diffusers.AutoencoderKLAllegro(**CONFIG, act_fn="relu").eval()
    report = vidkernels.patch(model)
    refused = {entry.cls for entry in report.entries if entry.reason == "its activation is ReLU, not SiLU"}
    assert refused == {"AllegroDownBlock3D", "AllegroUpBlock3D", "AllegroMidBlock3DConv"}
    with torch.no_grad():
        encoder(model, torch.randn(1, 3, 4, 16, 16))
    assert not vidkernels.status(model).fallbacks
