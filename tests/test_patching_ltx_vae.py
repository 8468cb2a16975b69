# SPDX-License-Identifier: Apache-2.0
"""What only diffusers' LTX and LTX-2 VAEs have: injected noise, per-sample timesteps, decoders that are not causal or whose
borders are reflected."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import vae_cases as cases

import vidkernels
from vidkernels.patching.rules.diffusers_ltx_vae import reflected

pytest.importorskip("diffusers", minversion="0.42")


def test_noise_is_drawn_as_upstream_draws_it() -> None:
    torch.manual_seed(0)
    model = cases.build("ltx0.9.5")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "per_channel_scale" in name:
                parameter.normal_()
        original = copy.deepcopy(model)
        vidkernels.patch(model)
        z = torch.randn(2, 8, 2, 2, 2)
        timesteps = torch.tensor([0.05, 0.4])
        results = []
        for network in (original, model):
            torch.manual_seed(3)
            results.append(network.decode(z, timesteps).sample)
        torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)
        torch.manual_seed(4)
        assert not torch.allclose(model.decode(z, timesteps).sample, results[1], atol=1e-2)


def test_one_row_of_modulation_serves_all_samples() -> None:
    from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoResnetBlock3d

    torch.manual_seed(0)
    block = cases.randomized(LTXVideoResnetBlock3d(8, 8, timestep_conditioning=True).eval())
    x, row = torch.randn(2, 8, 3, 4, 4), torch.randn(1, 32, 1, 1, 1)
    with torch.no_grad():
        expected = block(x, row)
        vidkernels.patch(block)
        torch.testing.assert_close(block(x, row), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_causal_and_other_decoders(causal: bool) -> None:
    torch.manual_seed(0)
    model = cases.build("ltx", decoder_causal=causal, encoder_causal=not causal)
    assert model.decoder.conv_in.is_causal is causal
    cases.check(model, cases.clip("ltx", 9))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("causal", [False, True])
def test_ltx2_borders_and_causality(causal: bool, mode: str) -> None:
    torch.manual_seed(0)
    options = {"encoder_spatial_padding_mode": mode, "decoder_spatial_padding_mode": mode}
    model = cases.build("ltx2", decoder_causal=causal, encoder_causal=not causal, **options)
    cases.check(model, cases.clip("ltx2", 9))


def test_ltx2_causality_of_a_call() -> None:
    """A call may ask a network to be causal, not to be otherwise; every module takes the flag by itself."""
    torch.manual_seed(0)
    model = cases.build("ltx2", decoder_causal=False, encoder_causal=False)
    original = copy.deepcopy(model)
    vidkernels.patch(model)
    with torch.no_grad():
        for causal in (None, False, True):
            x = cases.clip("ltx2", 9)
            z = original.encode(x, causal=causal).latent_dist.mode()
            torch.testing.assert_close(model.encode(x, causal=causal).latent_dist.mode(), z, atol=1e-4, rtol=1e-4)
            expected = original.decode(z, causal=causal).sample
            torch.testing.assert_close(model.decode(z, causal=causal).sample, expected, atol=1e-4, rtol=1e-4)
        for name in ("decoder.conv_in", "decoder.mid_block.resnets.0", "encoder.down_blocks.1.downsamplers.0",
                     "decoder.up_blocks.0.upsamplers.0"):  # fmt: skip
            theirs, ours = original.get_submodule(name), model.get_submodule(name)
            channels = next(p for p in ours.parameters() if p.ndim == 5).shape[1]
            x = torch.randn(2, channels, 3, 4, 6)
            for flag in ({}, {"causal": False}, {"causal": True}):
                torch.testing.assert_close(ours(x, **flag), theirs(x, **flag), atol=1e-5, rtol=1e-4)


def test_ltx2_what_is_not_served() -> None:
    """Circular borders are left to upstream; frames too small to be reflected fail as upstream's do."""
    model = cases.build("ltx2", decoder_spatial_padding_mode="circular")
    report = vidkernels.patch(model)
    assert not any(entry.name.startswith("decoder") for entry in report.patched), report.details()
    assert any(entry.name.startswith("encoder") for entry in report.patched)
    model = cases.build("ltx2")
    z, errors = torch.randn(1, 8, 2, 1, 1), []
    for _ in range(2):
        with torch.no_grad(), pytest.raises(RuntimeError) as caught:
            model.decode(z)
        errors.append(str(caught.value).partition(":")[0])
        vidkernels.patch(model)
    assert errors[0] == errors[1]


@pytest.mark.parametrize("pads", [(1, 1), (2, 0), (0, 2), (3, 2)])
def test_reflected_borders(pads: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d)
    expected = F.pad(x, (pads[1], pads[1], pads[0], pads[0], 0, 0), mode="reflect")
    with torch.no_grad():
        assert torch.equal(reflected(x, *pads), expected)
    assert torch.equal(reflected(x, *pads), expected)


@pytest.mark.slow
def test_ltx2_default_configuration() -> None:
    import diffusers

    torch.manual_seed(0)
    widths = {"block_out_channels": (64, 128, 256, 512), "decoder_block_out_channels": (64, 128, 256)}
    cases.check(diffusers.AutoencoderKLLTX2Video(**widths).eval(), torch.rand(1, 3, 9, 64, 64) * 2 - 1)


@pytest.mark.slow
def test_default_configuration() -> None:
    import diffusers

    torch.manual_seed(0)
    cases.check(diffusers.AutoencoderKLLTXVideo().eval(), torch.rand(1, 3, 9, 64, 64) * 2 - 1)
