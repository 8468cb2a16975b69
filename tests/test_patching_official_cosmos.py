# SPDX-License-Identifier: Apache-2.0
"""Rules for NVIDIA's own code of the Cosmos tokenizers, on networks of our own with the same structure and the same results."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import official_cosmos_networks as toys
import pytest
import torch
from official_image_suite import OfficialImageSuite
from official_vae_suite import OfficialVaeSuite, busy, knowing
from patching_suite import no_fallback  # noqa: F401
from torch import Tensor, nn
from vae_cases import assert_gradients_agree, check_call, nudged

import vidkernels
from vidkernels.errors import PatchError, VidkernelsFallbackWarning
from vidkernels.patching import digest
from vidkernels.patching.rules import _vae_memory, official_cosmos, official_cosmos_image


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    layers = toys.CausalNormalize, toys.Patcher, toys.UnPatcher, toys.Upsample, toys.Downsample
    monkeypatch.setattr(_vae_memory, "_LAYERS", {digest(layer.forward) for layer in layers})
    yield from knowing((*official_cosmos.RULES, *official_cosmos_image.RULES), toys)


class _Networks:
    """An encoder and a decoder."""

    kind: ClassVar[str]

    def build(self) -> Any:
        return toys.Tokenizer(self.kind)

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encoder(x)

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return model.decoder(z)


class TestFactorized(_Networks, OfficialVaeSuite):
    kind = "Factorized"
    rules = {  # noqa: RUF012
        "cosmos_tokenizer.encoder": 1,
        "cosmos_tokenizer.decoder": 1,
        "cosmos_tokenizer.patcher": 1,
        "cosmos_tokenizer.unpatcher": 1,
        "cosmos_tokenizer.block": 10,
        "cosmos_tokenizer.attention": 4,
        "cosmos_tokenizer.temporal_attention": 4,
        "cosmos_tokenizer.hybrid_down": 2,
        "cosmos_tokenizer.hybrid_up": 2,
        "cosmos_tokenizer.conv": 8 + 40 + 2 + 32 + 6 + 5,
    }
    sizes = ((1, 9, 32, 48), (2, 13, 32, 32), (1, 1, 32, 48))
    wrapped = "decoder.up.1.block.0.conv1.0.conv3d"
    hooked = (
        *("encoder.patcher3d", "encoder.conv_in.1", "encoder.down.0.downsample", "encoder.down.1.downsample.conv1"),
        *("encoder.down.1.attn.0.1", "encoder.mid.attn_1.0.q", "encoder.mid.block_1.norm2", "encoder.norm_out"),
        *("encoder.down.1.block.0.nin_shortcut", "decoder.mid.block_2.conv2", "decoder.up.1.upsample.conv1"),
        *("decoder.up.2.upsample", "decoder.mid.attn_1.1", "decoder.up.0.block.0.dropout", "decoder.unpatcher3d"),
    )

    def test_gradients(self) -> None:
        """Those of queries and keys nearly cancel here, and are held to the noise of the others."""
        model, x = self.ready(), self.clip()
        z = self.latents(model, x)
        truth = self.gradients(copy.deepcopy(model).double(), x.double(), z.double())
        given = [(x, z), (nudged(x), nudged(z)), (nudged(x), nudged(z))]
        before = [self.gradients(model, *pair) for pair in given]
        vidkernels.patch(model, mode="training")
        assert_gradients_agree(before, [self.gradients(model, *pair) for pair in given], truth)
        assert not vidkernels.status(model).fallbacks


class TestBase(_Networks, OfficialVaeSuite):
    """Whole kernels, and norms over a clip."""

    kind = "Base"
    rules = {  # noqa: RUF012
        "cosmos_tokenizer.base_encoder": 1,
        "cosmos_tokenizer.base_decoder": 1,
        "cosmos_tokenizer.image_patcher": 1,
        "cosmos_tokenizer.image_unpatcher": 1,
        "cosmos_tokenizer.base_block": 10,
        "cosmos_tokenizer.attention": 4,
        "cosmos_tokenizer.down": 2,
        "cosmos_tokenizer.up": 2,
        "cosmos_tokenizer.conv": 4 + 20 + 2 + 16 + 4,
    }
    sizes = ((1, 9, 32, 32), (2, 17, 32, 48), (1, 1, 32, 48))
    wrapped = "decoder.up.0.block.0.conv2.conv3d"
    hooked = (
        *("encoder.patcher", "encoder.conv_in", "encoder.down.0.downsample", "encoder.down.1.downsample.conv"),
        *("encoder.mid.attn_1.q", "encoder.mid.block_1.norm2", "decoder.up.2.upsample.conv", "decoder.up.1.upsample"),
        *("decoder.norm_out.norm", "decoder.unpatcher"),
    )


class TestImages(_Networks, OfficialImageSuite):
    kind = ""
    rules = {  # noqa: RUF012
        "cosmos_tokenizer.image_encoder": 1,
        "cosmos_tokenizer.image_decoder": 1,
        "cosmos_tokenizer.image_patcher": 1,
        "cosmos_tokenizer.image_unpatcher": 1,
        "cosmos_tokenizer.image_block": 10,
        "cosmos_tokenizer.image_attention": 4,
    }
    sizes = ((1, 32, 48), (3, 32, 64), (2, 32, 32))
    wrapped = "decoder.up.0.block.0.conv2"
    hooked = (
        *("encoder", "encoder.patcher", "encoder.conv_in", "encoder.down.1.downsample", "encoder.norm_out"),
        *("encoder.mid.block_1.conv1", "encoder.mid.attn_1", "encoder.down.1.block.0.nin_shortcut"),
        *("decoder.up.1.upsample", "decoder.up.2.upsample.conv", "decoder.mid.attn_1.k", "decoder.unpatcher"),
    )


def same(module: Any, x: Tensor) -> Any:
    """A patched module against the original and float64."""
    module = busy(module)
    models = copy.deepcopy(module), module, copy.deepcopy(module).double()
    vidkernels.patch(module)
    with torch.no_grad():
        check_call(lambda m, x: m(x), models, x, type(module).__name__)
    assert not vidkernels.status(module).fallbacks
    return module


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7, 8])
def test_samplers_of_any_number_of_frames(frames: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, frames, 4, 6)
    for space, time in ((True, True), (True, False), (False, True)):
        same(toys.CausalHybridDownsample3d(6, space, time), x)
        same(toys.CausalHybridUpsample3d(6, space, time), x)
    same(toys.CausalDownsample3d(6), x)
    same(toys.CausalUpsample3d(6), x)


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_wavelets_of_other_patches(patch: int) -> None:
    """Bands, in upstream's order, and back: the original's own inverse undoes them."""
    torch.manual_seed(0)
    x, images = torch.randn(2, 3, 1 + 2 * patch, patch, 3 * patch), torch.randn(2, 3, patch, 2 * patch)
    for apart, together, given in (
        (toys.Patcher3D(patch), toys.UnPatcher3D(patch), x),
        (toys.Patcher(patch), toys.UnPatcher(patch), images),
    ):
        bands = apart(given)
        torch.testing.assert_close(same(apart, given)(given), bands, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(same(together, bands)(bands), given, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 8, 8), (7, 6, 10), (8, 7, 5)])
def test_wavelets_of_clips_that_boxes_do_not_fill(size: tuple[int, ...]) -> None:
    """Numbers are reflected at the ends, level by level."""
    torch.manual_seed(0)
    same(toys.Patcher3D(4), torch.randn(2, 3, *size))
    same(toys.Patcher(4), torch.randn(2, 3, *size[1:]))


def test_frames_of_odd_size_run_the_original() -> None:
    """Which fails there."""
    module = toys.CausalHybridDownsample3d(4)
    vidkernels.patch(module)
    with pytest.warns(VidkernelsFallbackWarning, match="5 x 4 pixels"), pytest.raises(RuntimeError, match="size"):
        module(torch.randn(1, 4, 3, 5, 4))


def test_gradients_of_attention_along_time_between_frames_nearly_alike() -> None:
    """As precise as upstream's, whose scores are written out; torch's fused backward is 2 to 4 times as far off."""
    torch.manual_seed(0)
    module = busy(toys.CausalTemporalAttnBlock(256))
    x = torch.randn(2, 256, 1, 4, 4) + 0.1 * torch.randn(2, 256, 2, 4, 4)
    patched, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    vidkernels.patch(patched, mode="training")
    errors, weight = [], torch.randn(2, 256, 2, 4, 4)
    for name in ("q", "k"):
        found = []
        for model in (exact, module, patched):
            parameter = model.get_submodule(f"{name}.conv3d").weight
            y = model(x.to(parameter))
            found.append(torch.autograd.grad((y * weight.to(y)).sum(), parameter)[0].double())
        errors += [float((g - found[0]).norm() / found[0].norm()) for g in found[1:]]
    assert errors[1] <= 2 * errors[0] + 1e-6 and errors[3] <= 2 * errors[2] + 1e-6, errors


def test_repeated_borders_and_dropout() -> None:
    torch.manual_seed(0)
    same(toys.CausalConv3d(4, 6, padding=1, pad_mode="replicate"), torch.randn(1, 4, 3, 5, 4))
    block, x = toys.CausalResnetBlockFactorized3d(8, 8, dropout=0.5).train(), torch.randn(1, 8, 3, 4, 4)
    vidkernels.patch(block, mode="training")
    assert not torch.equal(block(x), block(x))


def test_what_is_left_to_the_original() -> None:
    for module, reason in (
        (toys.CausalConv3d(4, 4, padding=1, pad_mode="reflect"), "pads by mode reflect"),
        (toys.CausalHybridUpsample3d(4, False, False), "it samples nothing"),
        (toys.Patcher(4, "rearrange"), "by 'rearrange', which is one copy"),
        (toys.UnPatcher3D(1), "it has patches of 1"),
    ):
        report = vidkernels.explain(module)
        assert not any(entry.cls == type(module).__name__ for entry in report.patched)
        assert reason in report.details()


@pytest.mark.parametrize(
    ("path", "attribute", "value"),
    [
        ("mid.block_1.conv1.0", "pad_mode", "replicate"),
        ("mid.block_1.conv1.0", "spatial_pad", (2, 0, 1, 1)),
        ("mid.block_1.norm1", "num_groups", 2),
        ("mid.block_2", "dropout", nn.Hardtanh(0, 0.1)),
        ("up.2.upsample", "spatial_up", False),
        ("up.1.upsample.conv2", "pad_mode", "reflect"),
        ("up.1.upsample.conv3", "spatial_pad", (1, 1, 0, 0)),
        ("unpatcher3d", "wavelets", torch.tensor([0.6, 0.8])),
    ],
)
def test_changes_on_a_patched_model(path: str, attribute: str, value: Any) -> None:
    torch.manual_seed(0)
    decoder, z = busy(toys.Tokenizer(widths=(8, 8, 8))).decoder, torch.randn(1, 4, 3, 4, 4)
    patched = copy.deepcopy(decoder)
    vidkernels.patch(patched)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", VidkernelsFallbackWarning)
        before = patched(z)
        for model in (decoder, patched):
            setattr(model.get_submodule(path), attribute, value)
        torch.testing.assert_close(patched(z), decoder(z), atol=2e-5, rtol=1e-4)
        after = decoder(z)
        assert after.shape != before.shape or not torch.allclose(after, before, atol=1e-4)


@pytest.mark.parametrize("method", ["haar", "rearrange"])
def test_both_ways_to_take_patches(method: str) -> None:
    """Beside wavelets, a model may rearrange its patches."""
    torch.manual_seed(0)
    model = busy(toys.Tokenizer(patch=2, method="haar"))
    if method == "rearrange":
        for module in (model.encoder.patcher3d, model.decoder.unpatcher3d):
            module.__class__ = Rearranged if module is model.encoder.patcher3d else Rejoined
    patched, z = copy.deepcopy(model), torch.randn(1, 4, 2, 4, 4)
    vidkernels.patch(patched)
    with torch.no_grad():
        x = model.decoder(z)
        torch.testing.assert_close(patched.decoder(z), x, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(patched.encoder(x), model.encoder(x), atol=2e-5, rtol=1e-4)
    assert not vidkernels.status(patched).fallbacks


class Rearranged(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        whole = torch.cat([x[:, :, :1], x], 2).unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        return whole.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4).contiguous()


class Rejoined(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        whole = x.unflatten(1, (-1, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return whole.flatten(6).flatten(4, 5).flatten(2, 3)[:, :, 1:]


def test_checkpoints_of_torchscript_are_told_apart() -> None:
    """NVIDIA ships them. Their modules have no code that a rule could know; their weights fit the model's own."""
    torch.manual_seed(0)
    model, x = busy(toys.Tokenizer()).encoder, torch.randn(1, 3, 5, 32, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(nn.Sequential(model), x, check_trace=False)
        with pytest.raises(
            PatchError, match=r"nothing in this model was patched\. 0: .* ScriptModule; load its weights"
        ):
            vidkernels.patch(scripted)
        assert [entry.cls for entry in vidkernels.explain(scripted).skipped] == ["EncoderFactorized"]
        fresh = toys.Tokenizer().encoder.eval()
        fresh.load_state_dict(next(scripted.children()).state_dict(), strict=False)
        vidkernels.patch(fresh)
        torch.testing.assert_close(fresh(x), scripted(x), atol=2e-5, rtol=1e-4)
        assert torch.equal(torch.jit.trace(fresh, x, check_trace=False)(x), model(x))  # a trace is the original
