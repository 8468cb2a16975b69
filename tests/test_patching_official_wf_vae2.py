# SPDX-License-Identifier: Apache-2.0
"""Rules for WF-VAE 2, on a network of our own with the same structure and the same results."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import official_wf_vae2_toys as toys
import pytest
import torch
from official_vae_suite import OfficialVaeSuite, busy, knowing
from patching_suite import no_fallback  # noqa: F401
from test_patching_official_wf_vae import iterate, known  # noqa: F401
from torch import Tensor
from vae_cases import check_call

import vidkernels
from vidkernels.patching.rules import official_wf_vae as rules


@pytest.fixture(autouse=True)
def known2(known: None) -> Iterator[None]:  # noqa: F811
    """The rules of WF-VAE know its toys by the other file's fixture; those of its second version these."""
    del known
    yield from knowing(rules.SECOND_VERSION, toys)


class TestNetworks(OfficialVaeSuite):
    kinds: tuple[str, ...] = ("hw", "thw")
    norm = "layernorm"
    rules = {  # noqa: RUF012
        "wf_vae.encoder2": 1,
        "wf_vae.decoder2": 1,
        "wf_vae.down_block": 2,
        "wf_vae.up_block": 2,
        "wf_vae.wavelet": 2,
        "wf_vae.frame_wavelet": 1,
        "wf_vae.inverse_wavelet": 2,
        "wf_vae.inverse_frame_wavelet": 1,
        "opensora_plan_vae.block": 10,
        "opensora_plan_vae.frame_block": 6,
        "opensora_plan_vae.attention": 2,
        "opensora_plan_vae.down": 1,
        "opensora_plan_vae.up": 1,
        "opensora_plan_vae.frame_up": 1,
        "opensora_plan_vae.frame_down": 1,
    }
    sizes = ((1, 5, 16, 24), (2, 9, 16, 16), (1, 1, 8, 16))
    wrapped = "decoder.up_blocks.0.out_res_block.conv1.conv"
    hooked = (
        *("encoder.down_blocks.0", "encoder.down_blocks.1.res_block", "encoder.down_blocks.1.in_flow_conv"),
        *("encoder.conv_in", "encoder.norm_out", "encoder.wavelet_transform_in", "encoder.mid.0.norm1"),
        *("decoder.up_blocks.0", "decoder.up_blocks.0.out_flow_conv", "decoder.up_blocks.1.out_flow_conv.1"),
        *("decoder.up_blocks.0.up", "decoder.conv_out", "decoder.norm_out", "decoder.inverse_wavelet_transform_out"),
    )

    def build(self) -> Any:
        return toys.WFVAE2Model(self.kinds, norm=self.norm)

    def ready(self) -> Any:
        return super().ready().requires_grad_()  # wavelets, too, which upstream freezes

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encode(x)

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return model.decode(z)

    def test_coefficients_of_all_levels(self) -> None:
        model, x = self.ready(), self.clip()
        with torch.no_grad():
            z = self.latents(model, x)
            before = model.encoder(x)[1], model.decoder(z)[1]
            vidkernels.patch(model)
            after = model.encoder(x)[1], model.decoder(z)[1]
        for actual, expected in zip(after, before, strict=True):
            assert len(actual) == len(expected) == len(self.kinds)
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)

    def test_encoder_in_chunks_equals_the_whole(self) -> None:
        if self.norm == "groupnorm":
            return  # its statistics are of a chunk
        model, x = self.ready(), torch.randn(1, 3, 17, 16, 16)
        original = copy.deepcopy(model)
        vidkernels.patch(model)
        with torch.no_grad():
            whole = model.encode(x)
            for one in (original, model):
                one.enable_tiling()
                torch.testing.assert_close(one.encode(x), whole, atol=2e-5, rtol=1e-4)
        for name, module in original.named_modules():
            if hasattr(module, "causal_cached"):
                ours = model.get_submodule(name).causal_cached
                assert [t.shape for t in ours] == [t.shape for t in module.causal_cached], name
        assert not vidkernels.status(model).fallbacks


class TestTimeInBothLevels(TestNetworks):
    """As in Open-Sora-Plan 1.5, whose latents stand for eight frames."""

    kinds = ("thw", "thw")
    norm = "groupnorm"
    rules = {  # noqa: RUF012
        "wf_vae.encoder2": 1,
        "wf_vae.decoder2": 1,
        "wf_vae.down_block": 2,
        "wf_vae.up_block": 2,
        "wf_vae.wavelet": 3,
        "wf_vae.inverse_wavelet": 3,
        "opensora_plan_vae.block": 16,
    }


@pytest.mark.parametrize("kind", ["hw", "thw"])
def test_levels_by_themselves_keep_the_format_that_they_get(kind: str) -> None:
    x, w = torch.randn(1, 8, 5, 8, 12), torch.randn(1, 12, 5, 8, 12)
    level = busy(toys.WFDownBlock(kind, (8, 12), 4, "layernorm")), (x, w)
    for module, given in (level, (busy(toys.WFUpBlock(kind, (8, 12), 4, "layernorm")), (x,))):
        with torch.no_grad():
            expected = module(*given)
            vidkernels.patch(module)
            actual = module(*given)
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
            assert actual[0].is_contiguous()
            last = module(given[0].to(memory_format=torch.channels_last_3d), *given[1:])[0]
            assert last.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["layernorm", "groupnorm"])
def test_networks_for_images(norm: str, dtype: torch.dtype) -> None:
    """They take images [N, C, H, W] as well as clips, whose frames share the statistics of the last norm."""
    torch.manual_seed(0)
    for size in ((3, 3, 16, 24), (2, 3, 5, 16, 16)):
        model, x = busy(toys.WFVAE2Model(("hw", "hw"), norm=norm, image=True)).to(dtype), torch.randn(size).to(dtype)
        models = copy.deepcopy(model), model, copy.deepcopy(model).double()
        assert not vidkernels.patch(model).near_misses
        with torch.no_grad():
            z = models[0].encode(x).chunk(2, 1)[0].contiguous()
            for call, given in (("encode", x), ("decode", z)):
                check_call(lambda one, t, call=call: getattr(one, call)(t).contiguous(), models, given, call)
        assert not vidkernels.status(model).fallbacks


def test_a_decoder_with_an_activation_behind_its_last_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules.Decoder2Forward, "_vidkernels_activation", "silu")
    decoder, z = busy(toys.Decoder(("hw",), (8, 12), 8, "layernorm", image=True)), torch.randn(2, 8, 4, 6)
    with torch.no_grad():
        before = decoder.norm_out.register_forward_hook(lambda module, given, y: torch.nn.functional.silu(y))
        expected = decoder(z)[0]
        before.remove()
        vidkernels.patch(decoder)
        torch.testing.assert_close(decoder(z)[0], expected, atol=2e-5, rtol=1e-4)
    assert rules.ActivatedDecoder2Forward._vidkernels_activation == "silu"
