# SPDX-License-Identifier: Apache-2.0
"""Rules for the official VAEs of Wan 2.1 and 2.2, on networks of our own with the same structure and the same results."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import official_wan_vae_toys as plain
import official_wan_vae_toys_2_2 as residual
import official_wan_vae_toys_fork as fork
import pytest
import torch
from official_vae_suite import OfficialVaeSuite, knowing
from patching_suite import no_fallback  # noqa: F401
from torch import Tensor, nn

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import Rule, digest
from vidkernels.patching import _rule as table
from vidkernels.patching.rules import _vae_memory, _vae_units
from vidkernels.patching.rules import official_wan_vae as rules

SCALE = torch.tensor([0.1, -0.2, 0.3, 0.05]), torch.tensor([0.5, 0.8, 1.1, 0.9])
# Rules of one version only, and those whose code is in the first file of networks.
NEW = ("autoencoder_2_2", "decoder_2_2", "down_block", "up_block")
SHARED = ("resnet", "attention", "conv", "norm")


def named(*parts: str) -> list[Rule]:
    return [rule for rule in rules.RULES if rule.name.removeprefix("wan_vae.") in parts]


class OwnConv2d(nn.Conv2d):
    """What a LoRA wrapper is for the guards."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.25


@pytest.fixture(autouse=True)
def known_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    layers = plain.Upsample, residual.AvgDown3D, residual.DupUp3D
    monkeypatch.setattr(_vae_memory, "_LAYERS", {digest(layer.forward) for layer in layers})
    _vae_memory._class_forgets.cache_clear()
    yield
    _vae_memory._class_forgets.cache_clear()


def scale_like(x: Tensor) -> list[Tensor]:
    return [part.to(x) for part in SCALE]


class WanVaeSuite(OfficialVaeSuite):
    """What all versions have in common."""

    home: ClassVar[Any]
    known_rules: ClassVar[Any]
    sizes = ((1, 5, 32, 32), (2, 5, 32, 48), (1, 1, 32, 32), (1, 15, 48, 32))
    wrapped = "decoder.upsamples.2.resample.1"

    @pytest.fixture(autouse=True)
    def known(self) -> Iterator[None]:
        yield from knowing(self.known_rules, self.home)

    def build(self) -> Any:
        return self.home.WanVAE_()

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encode(x, scale_like(x))

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return model.decode(z, scale_like(z))

    def latents(self, model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.encode(model, x)[:, :4].contiguous()

    def test_hooks_fire_and_read_what_the_original_gave(self) -> None:
        """Once a chunk."""
        for path in self.hooked:
            model, x = self.ready(), self.clip()
            seen = list[tuple[Tensor, Tensor]]()
            z = self.latents(model, x)
            with torch.no_grad():
                expected = self.encode(model, x), self.decode(model, z)
                vidkernels.patch(model)
                model.get_submodule(path).register_forward_hook(
                    lambda module, given, y, seen=seen: seen.extend((t, t.clone()) for t in (given[0], y))
                )
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", VidkernelsFallbackWarning)
                    actual = self.encode(model, x), self.decode(model, z)
            assert seen and all(torch.equal(*pair) for pair in seen), path
            torch.testing.assert_close(actual, expected, atol=5e-5, rtol=1e-4)

    def test_a_wrapped_convolution_is_called(self) -> None:
        model = self.ready()
        vidkernels.patch(model)
        z = torch.randn(1, 4, 2, 4, 4)
        model.get_submodule(self.wrapped).__class__ = OwnConv2d
        with torch.no_grad():
            with pytest.warns(VidkernelsFallbackWarning, match="OwnConv2d"):
                actual = self.decode(model, z)
            vidkernels.unpatch(model)
            torch.testing.assert_close(actual, self.decode(model, z), atol=5e-5, rtol=1e-4)

    def streams(self, model: Any) -> list[tuple[str, tuple[Tensor, ...]]]:
        z, x = torch.randn(1, 4, 4, 4, 4), torch.randn(1, model.encoder.conv1.in_channels, 13, 16, 16)
        return [("decoder", z.split([1, 1, 2], 2)), ("encoder", x.split([1, 4, 4, 4], 2))]

    def test_original_and_fused_forward_take_turns(self) -> None:
        """Caches keep upstream's contents, entry by entry."""
        model = self.ready()
        original = copy.deepcopy(model)
        vidkernels.patch(model)
        for part, chunks in self.streams(model):
            expected, caches = self.stream([original], part, chunks)
            for turns in ([model], [original, model], [model, original], [model, model, original]):
                found, kept = self.stream(turns, part, chunks)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
                for entry, wanted in zip(kept, caches, strict=True):
                    torch.testing.assert_close(entry, wanted, atol=1e-5, rtol=1e-4)

    def stream(self, turns: list[Any], part: str, chunks: tuple[Tensor, ...]) -> tuple[Tensor, list[Any]]:
        caches: list[Any] = [None] * plain.slots(getattr(turns[0], part))
        found = []
        for i, chunk in enumerate(chunks):
            first = {"first_chunk": i == 0} if part == "decoder" and self.home is residual else {}
            with torch.no_grad():
                network = getattr(turns[i % len(turns)], part)
                found.append(network(chunk, feat_cache=caches, feat_idx=[0], **first))
        return torch.cat(found, 2), [entry for entry in caches if isinstance(entry, Tensor)]

    def test_chunks_together_give_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x = self.ready(), self.clip((1, 17, 32, 32))
        vidkernels.patch(model)
        results = []
        with torch.no_grad():
            for budget in (0, 1 << 20, 1 << 40):
                monkeypatch.setitem(_vae_units._BUDGET, "cpu", budget)
                z = self.latents(model, x)
                results.append((z, self.decode(model, z)))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], atol=2e-5, rtol=1e-4)

    def test_blocks_write_over_their_inputs_where_nobody_reads_them(self) -> None:
        model = self.ready()
        vidkernels.patch(model)
        z = torch.randn(1, 4, 2, 4, 4)
        with torch.no_grad():
            assert _vae_memory._is_unseen(model.decoder, z) and _vae_memory._is_unseen(model.encoder, z)
        assert not _vae_memory._is_unseen(model.decoder, z)


class TestWan21(WanVaeSuite):
    home = plain
    known_rules = named("autoencoder", "encoder", "decoder", "resample", *SHARED)
    rules = {
        "wan_vae.autoencoder": 1,
        "wan_vae.encoder": 1,
        "wan_vae.decoder": 1,
        "wan_vae.resnet": 16,
        "wan_vae.attention": 2,
        "wan_vae.resample": 6,
    }
    hooked = (
        *("encoder", "encoder.downsamples.2", "encoder.downsamples.2.residual.0", "encoder.middle.1"),
        *("encoder.head.2", "conv1", "decoder.upsamples.5.resample.1"),
    )


class TestFork(WanVaeSuite):
    home = fork
    known_rules = named("autoencoder_moments")
    rules = {"wan_vae.autoencoder_moments": 1}
    hooked = ("conv1",)
    wrapped = "decoder.upsamples.2.resample.1"

    @pytest.fixture(autouse=True)
    def known(self) -> Iterator[None]:
        first = knowing(named("encoder", "decoder", "resample", *SHARED), plain)
        next(first)
        yield from knowing(self.known_rules, fork)
        next(first, None)

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return torch.cat(model.encode(x, scale_like(x)), 1)

    def test_without_a_scale(self) -> None:
        model, x = self.ready(), self.clip()
        original = copy.deepcopy(model)
        vidkernels.patch(model)
        with torch.no_grad():
            actual, expected = model.encode(x), original.encode(x)
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(model.decode(expected[0]), original.decode(expected[0]), atol=2e-5, rtol=1e-4)


class TestWan22(WanVaeSuite):
    home = residual
    known_rules = named(*NEW, "encoder", "resample")
    rules = {
        "wan_vae.autoencoder_2_2": 1,
        "wan_vae.encoder": 1,
        "wan_vae.decoder_2_2": 1,
        "wan_vae.down_block": 4,
        "wan_vae.up_block": 4,
        "wan_vae.resnet": 16,
        "wan_vae.resample": 6,
    }
    hooked = ("decoder.upsamples.1", "encoder.downsamples.0.avg_shortcut", "decoder.upsamples.0.upsamples.2")
    sizes = ((1, 5, 64, 64), (2, 5, 64, 96), (1, 1, 64, 64), (1, 15, 96, 64))
    wrapped = "decoder.upsamples.0.upsamples.2.resample.1"

    @pytest.fixture(autouse=True)
    def known(self) -> Iterator[None]:
        first = knowing(named(*SHARED), plain)
        next(first)
        yield from knowing(self.known_rules, residual)
        next(first, None)

    def test_without_a_cache_only_the_first_chunk_fits(self) -> None:
        block, x = residual.Up_ResidualBlock(32, 32, True, False).eval(), torch.randn(1, 32, 1, 4, 4)
        with torch.no_grad():
            expected, first = block(x), block(x, first_chunk=True)
            vidkernels.patch(block)
            torch.testing.assert_close(block(x, first_chunk=True), first, atol=1e-5, rtol=1e-4)
            with pytest.warns(VidkernelsFallbackWarning, match="only the shortcut repeats frames"):
                torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-4)


def test_what_is_left_to_the_original() -> None:
    for _ in (known := knowing(TestWan21.known_rules, plain)):
        assert "it resamples nothing" in vidkernels.explain(plain.Resample(4, "none")).details()
        block = plain.ResidualBlock(4, 4)
        block.residual.append(nn.Identity())
        assert "its residual branch has 8 layers" in vidkernels.explain(block).details()
    known.close()


def test_classes_of_the_same_name_are_no_near_misses() -> None:
    for name in ("Encoder3d", "Decoder3d", "ResidualBlock", "Resample", "AttentionBlock", "RMS_norm"):
        other = type(name, (nn.Module,), {"forward": lambda self, x: x})()
        assert not vidkernels.explain(other).near_misses


@pytest.mark.parametrize("name", ["vae", "vae2_1", "vae2_2"])
def test_the_official_files(name: str) -> None:
    """Where a checkout of Wan 2.1 or 2.2 is on the path, which no package holds."""
    pytest.importorskip(f"wan.modules.{name}", reason="Wan is not on the path")
    upstream = importlib.import_module(f"wan.modules.{name}")
    table._USER.clear()
    model = upstream.WanVAE_(dim=16, z_dim=4, num_res_blocks=1, temperal_downsample=[False, True, True]).eval()
    report = vidkernels.explain(model)
    assert not report.near_misses and len(report.patched) > 80
