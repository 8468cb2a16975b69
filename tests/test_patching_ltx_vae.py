# SPDX-License-Identifier: Apache-2.0
"""What only diffusers' LTX VAE has: injected noise, per-sample timesteps, decoders that are not causal."""

from __future__ import annotations

import copy

import pytest
import torch
import vae_cases as cases

import vidkernels

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


@pytest.mark.slow
def test_default_configuration() -> None:
    import diffusers

    torch.manual_seed(0)
    cases.check(diffusers.AutoencoderKLLTXVideo().eval(), torch.rand(1, 3, 9, 64, 64) * 2 - 1)
