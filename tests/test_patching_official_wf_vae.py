# SPDX-License-Identifier: Apache-2.0
"""Rules for WF-VAE, on a network of our own with the same structure and the same results; whole clips and chunks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import official_opensora_plan_toys as layers
import official_wf_vae_toys as toys
import pytest
import torch
from official_vae_suite import OfficialVaeSuite, busy, knowing
from patching_suite import no_fallback  # noqa: F401
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from vae_cases import check_call

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import digest
from vidkernels.patching.rules import _opensora_plan_units as plan_units
from vidkernels.patching.rules import _vae_memory, _wf_wavelets, official_opensora_plan_vae
from vidkernels.patching.rules import official_wf_vae as rules

_ENCODER_PARTS = {"wf_vae.wavelet": 2, "wf_vae.frame_wavelet": 1}
_DOWN = ("Spatial2xTime2x3DDownsample", "SpatialDownsample2x", "Spatial2x3DDownsample")
_DECODER_PARTS = {"wf_vae.inverse_wavelet": 2, "wf_vae.inverse_frame_wavelet": 1}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for home, table in ((layers, official_opensora_plan_vae._INNER), (toys, rules._INNER)):
        for name in table:
            inner = plan_units.inner_function(getattr(home, name))
            monkeypatch.setitem(table, name, (digest(inner),))
    frames = digest(toys.Conv2d.forward)
    monkeypatch.setattr(rules, "FRAMEWISE", (frames,))
    monkeypatch.setattr(rules, "_FRAME_CONV", {digest(plan_units.inner_function(toys.Conv2d))})
    monkeypatch.setattr(plan_units, "LAYER_NORMS", {digest(toys.LayerNorm.forward)})
    monkeypatch.setattr(_vae_memory, "_FRAMEWISE", {frames})
    monkeypatch.setattr(_vae_memory, "_LAYERS", {digest(toys.LayerNorm.forward)})
    own = [rule for rule in rules.RULES if rule not in rules.SECOND_VERSION]
    yield from iterate(knowing(official_opensora_plan_vae.RULES, layers), knowing(own, toys))


def iterate(outer: Iterator[None], inner: Iterator[None]) -> Iterator[None]:
    next(outer)
    yield from inner
    next(outer, None)


class TestLayerNorm(OfficialVaeSuite):
    norm = "layernorm"
    rules = {  # noqa: RUF012
        "wf_vae.encoder": 1,
        "wf_vae.decoder": 1,
        **_ENCODER_PARTS,
        **_DECODER_PARTS,
        "opensora_plan_vae.block": 13,
        "opensora_plan_vae.frame_block": 1,
        "opensora_plan_vae.attention": 2,
        "opensora_plan_vae.down": 1,
        "opensora_plan_vae.up": 1,
        "opensora_plan_vae.frame_up": 1,
        "opensora_plan_vae.frame_down": 1,
    }
    sizes = ((1, 5, 16, 24), (2, 9, 16, 16), (1, 1, 8, 16))
    wrapped = "decoder.up1.0.conv1.conv"
    hooked = (
        *(
            "encoder.down1",
            "encoder.down1.0",
            "encoder.connect_l2",
            "encoder.norm_out",
            "encoder.mid.0.norm1",
        ),
        *("encoder.wavelet_transform_in", "encoder.wavelet_transform_l2.h_conv", "encoder.down2.1.conv2"),
        *("decoder.up2.1", "decoder.up2.1.conv", "decoder.connect_l1.1", "decoder.conv_out", "decoder.mid.1.q"),
        *("decoder.inverse_wavelet_transform_l1", "decoder.layer.0.nin_shortcut"),
    )

    def build(self) -> Any:
        return toys.WFVAEModel(self.norm)

    def ready(self) -> Any:
        return super().ready().requires_grad_()  # wavelets, too, which upstream freezes

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encode(x)

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return model.decode(z)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_chunks(self, dtype: torch.dtype) -> None:
        """Served, with the queues of upstream: kept frames have their shapes and values."""
        model, x = self.ready().to(dtype), torch.randn(2, 3, 17, 16, 24).to(dtype)
        model.enable_tiling()
        models = copy.deepcopy(model), model, copy.deepcopy(model).double()
        vidkernels.patch(model)
        with torch.no_grad():
            z = self.latents(models[0], x)
            check_call(self.encode, models, x, "encode")
            check_call(self.decode, models, z, "decode")
        assert not vidkernels.status(model).fallbacks
        for name, original in models[0].named_modules():
            if hasattr(original, "causal_cached"):
                ours = model.get_submodule(name).causal_cached
                assert [t.shape for t in ours] == [t.shape for t in original.causal_cached], name
                if dtype == torch.float32:
                    torch.testing.assert_close(list(ours), list(original.causal_cached), atol=1e-4, rtol=1e-3)

    def test_chunks_equal_the_whole_and_take_turns_with_the_original(self) -> None:
        if self.norm == "groupnorm":
            return  # its statistics are of a chunk
        model, x = self.ready(), torch.randn(1, 3, 17, 16, 16)
        z = self.latents(model, x)
        vidkernels.patch(model)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", VidkernelsFallbackWarning)
            whole = self.encode(model, x), self.decode(model, z)
            model.enable_tiling()
            torch.testing.assert_close((self.encode(model, x), self.decode(model, z)), whole, atol=2e-5, rtol=1e-4)
            hooks = []

            def every_other(module: Any, given: Any) -> None:
                """Hooks on a norm send its block to the original forward for one chunk."""
                if hooks:
                    hooks.pop().remove()
                else:
                    hooks.append(model.decoder.mid[0].norm1.register_forward_hook(lambda *_: None))

            model.decoder.register_forward_pre_hook(every_other)
            torch.testing.assert_close(self.decode(model, z), whole[1], atol=2e-5, rtol=1e-4)
        assert vidkernels.status(model).fallbacks


class TestGroupNorm(TestLayerNorm):
    norm = "groupnorm"


def test_upsampler_of_the_latest_version_in_chunks() -> None:
    for depth, cuts in ((0, (1, 2, 3)), (1, (4, 3)), (0, (3, 2))):
        module = toys.up2x(8)
        module.depth, module.enable_cached, module.conv.enable_cached = depth, True, True
        busy(module)
        fused = copy.deepcopy(module)
        vidkernels.patch(fused)
        with torch.no_grad():
            for index, chunk in enumerate(torch.randn(1, 8, sum(cuts), 4, 6).split(cuts, 2)):
                for one in (module, fused):
                    one.conv.is_first_chunk = index == 0
                torch.testing.assert_close(fused(chunk), module(chunk), atol=1e-5, rtol=1e-4)
                assert [t.shape for t in fused.causal_cached] == [t.shape for t in module.causal_cached]
        assert not vidkernels.status(fused).fallbacks


def test_checkpointing_gives_the_same_gradients() -> None:
    model, x = busy(toys.WFVAEModel()), torch.randn(1, 3, 5, 16, 16, requires_grad=True)
    vidkernels.patch(model, mode="training")
    (plain,) = torch.autograd.grad(model.encode(x).square().sum(), x)
    again: Any = checkpoint(model.encode, x, use_reentrant=False)
    (checked,) = torch.autograd.grad(again.square().sum(), x)
    assert torch.equal(checked, plain)


def test_wavelets_of_odd_sizes_and_non_finite_numbers() -> None:
    for name, channels in (("HaarWaveletTransform3D", 3), ("HaarWaveletTransform2D", 3)):
        module = getattr(toys, name)()
        fused = copy.deepcopy(module)
        vidkernels.patch(fused)
        x = torch.randn(2, channels, 4, 7, 9)
        torch.testing.assert_close(fused(x), module(x))
        x[0, 0, 2, 3, 4] = float("inf")
        assert torch.equal(fused(x).isfinite(), module(x).isfinite())
        assert torch.equal(fused(x[:0]), module(x[:0]))


def test_what_is_left_to_the_original() -> None:
    wavelet = toys.HaarWaveletTransform3D()
    wavelet.g_conv.conv.stride = (2, 2, 1)
    assert "its convolution g has other sizes" in vidkernels.explain(wavelet).details()
    encoder = toys.Encoder(8, 8, "layernorm")
    encoder.norm_out = torch.nn.InstanceNorm3d(32)
    assert "its norm is a InstanceNorm3d" in vidkernels.explain(encoder).details()
    model, x = busy(toys.WFVAEModel()), torch.randn(1, 3, 5, 16, 16)
    with torch.no_grad():
        expected = model.encode(x)
        vidkernels.patch(model)
        model.encoder.wavelet_transform_in.h_conv.is_first_chunk = False
        assert "kept no frames" in str(model.encoder.wavelet_transform_in._reason(x))
        model.encoder.down1[0].padding_mode = "reflect"
        with pytest.warns(VidkernelsFallbackWarning, match="padding reflect"):
            torch.testing.assert_close(model.encode(x), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("sampler", ["HaarWaveletTransform3D", "by channel", *_DOWN])
def test_original_and_fused_take_turns_within_a_clip(sampler: str, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept frames, empty ones of the wavelets, too, have the shapes that the original's layers ask for."""
    wavelet = None if sampler in _DOWN else toys.HaarWaveletTransform3D
    if sampler == "by channel":
        monkeypatch.setattr(toys, "BY_CHANNEL", True)
        monkeypatch.setattr(_wf_wavelets, "_BY_CHANNEL", {digest(toys.HaarWaveletTransform3D.forward)})
    _wf_wavelets._calls_by_channel.cache_clear()
    module, x = busy(getattr(layers, sampler)(3) if wavelet is None else wavelet()), torch.randn(2, 3, 17, 8, 12)
    fused, conv = copy.deepcopy(module), "conv" if wavelet is None else "h_conv"
    vidkernels.patch(fused)
    results = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", VidkernelsFallbackWarning)
        for one in (module, fused):
            toys.WFVAEModel.tell(one, one, enable_cached=True)
            parts = []
            for index, chunk in enumerate(x.split((1, 8, 8), 2)):
                hook = one.get_submodule(conv).register_forward_hook(lambda *_: None) if index % 2 == first else None
                parts.append(one(chunk))
                toys.WFVAEModel.tell(one, one, is_first_chunk=False)
                if hook is not None:
                    hook.remove()
            results.append((torch.cat(parts, 2), [t.shape for t in one.get_submodule(conv).causal_cached]))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-4)
    assert results[1][1] == results[0][1] and len(vidkernels.status(fused).fallbacks) == 1
    _wf_wavelets._calls_by_channel.cache_clear()
