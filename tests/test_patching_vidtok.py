# SPDX-License-Identifier: Apache-2.0
"""diffusers' AutoencoderVidTok, patched against unpatched and against float64, on small configurations."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from helpers import assert_within_promise
from patching_suite import no_fallback  # noqa: F401
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vae_cases import assert_vidtok_gradients, nudged

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning

diffusers = pytest.importorskip("diffusers", minversion="0.42")
CONFIGS = {
    "kl": {},
    "fsq": {"regularizer": "fsq", "z_channels": 3, "double_z": False, "codebook_size": 512},
    "noncausal": {"is_causal": False},
    "288": {"tempo_ds": [1], "tempo_us": [2]},
}


def build(name: str = "kl", **changes: Any) -> Any:
    """A small model whose parameters are all at work: biases and norms are not left at their trivial start."""
    small = {"ch": 16, "ch_mult": [1, 1, 2], "num_res_blocks": 1}
    model = diffusers.AutoencoderVidTok(**{**small, **CONFIGS[name], **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.numel() > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def moments(model: Any, x: torch.Tensor) -> torch.Tensor:
    encoded = model.encode(x)
    return encoded[0] if model.regularizer == "fsq" else encoded.latent_dist.parameters


def latents(model: Any, encoded: torch.Tensor) -> torch.Tensor:
    return encoded if model.regularizer == "fsq" else encoded.chunk(2, 1)[0]


def worse(first: torch.Tensor, second: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Of two runs of the original, the second on inputs one rounding away, the one with the larger error."""
    return max(first, second, key=lambda y: float((y.double() - truth).abs().max()))


def check(model: Any, x: torch.Tensor) -> None:
    """Encode and decode keep the promise against the same weights in float64.

    A non-causal original returns one or the other memory format, as oneDNN likes the size. Its error is taken from two
    runs: without compiled kernels both sides run oneDNN's convolutions, and then one run against another is luck.
    """
    original, double = copy.deepcopy(model), copy.deepcopy(model).double()
    vidkernels.patch(model)
    with torch.no_grad():
        encoded = moments(original, x)
        actual = moments(model, x)
        assert not model.is_causal or actual.stride() == encoded.stride()
        truth = moments(double, x.double())
        reference = encoded if model.regularizer == "fsq" else worse(encoded, moments(original, nudged(x)), truth)
        assert_within_promise(actual, reference, truth, "encoded")
        z = latents(original, encoded)
        decoded = original.decode(z)
        actual = model.decode(z)
        assert not model.is_causal or actual.stride() == decoded.stride()
        truth = double.decode(z.double())
        assert_within_promise(actual, worse(decoded, original.decode(nudged(z)), truth), truth, "decoded")


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_model(name: str) -> None:
    model = build(name)
    check(model, torch.randn(2, 3, 16 if name == "noncausal" else 20, 16, 24))
    assert vidkernels.status(model).patched == "all"


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(4, 8, 8), (8, 12, 20), (21, 4, 4)], ids=["shortest", "odd-latents", "tiny"]
)
def test_sizes(frames: int, height: int, width: int) -> None:
    check(build(), torch.randn(1, 3, frames, height, width))


@pytest.mark.parametrize("name", ["kl", "noncausal", "288"])
def test_tiled(name: str) -> None:
    model = build(name)
    model.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16, tile_overlap_factor_width=0.25)
    check(model, torch.randn(1, 3, 32 if name == "noncausal" else 36, 16, 24))


def test_small_temporaries_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames and rows processed in pieces: the split changes no value beyond the promise."""
    from vidkernels.nn import _residual

    monkeypatch.setattr(_residual, "PIECE_CPU", 700)
    check(build(), torch.randn(2, 3, 8, 16, 24))
    check(build("noncausal"), torch.randn(1, 3, 16, 16, 8))


@pytest.mark.parametrize("layout", ["channels_last_3d", "strided"])
def test_layout_of_the_input(layout: str) -> None:
    model, x = build(), torch.randn(1, 3, 8, 16, 16)
    x = x.contiguous(memory_format=torch.channels_last_3d) if layout == "channels_last_3d" else x.transpose(3, 4)
    before = x.clone()
    check(model, x)
    assert torch.equal(x, before), "the input was written to"


def test_forward_with_padding_sampling_and_slicing() -> None:
    model, x = build(), torch.rand(2, 3, 7, 16, 16)
    model.enable_slicing()
    run = {"generator": torch.Generator().manual_seed(5), "return_dict": False}
    with torch.no_grad():
        expected = model(x, **run)[0]
        vidkernels.patch(model)
        run["generator"].manual_seed(5)
        actual = model(x, **run)[0]
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    assert actual.stride() == expected.stride()


def test_quantizer_is_bit_exact() -> None:
    model = build("fsq")
    z = 3 * torch.randn(2, 3, 5, 6, 7, requires_grad=True)
    codes, indices = model.regularization(z)
    weight = torch.randn_like(codes)
    (gradient,) = torch.autograd.grad((codes * weight).sum(), z)
    vidkernels.patch(model, ops="fsq")
    codes_patched, indices_patched = model.regularization(z)
    assert torch.equal(codes, codes_patched) and torch.equal(indices, indices_patched)
    assert codes.stride() == codes_patched.stride() and indices.dtype == indices_patched.dtype
    (gradient_patched,) = torch.autograd.grad((codes_patched * weight).sum(), z)
    torch.testing.assert_close(gradient_patched, gradient, atol=2e-6, rtol=1e-5)
    with torch.no_grad():
        decoded = model.decode(indices, decode_from_indices=True)
        vidkernels.unpatch(model)
        torch.testing.assert_close(model.decode(indices, decode_from_indices=True), decoded)


def gradients(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = model.decode(latents(model, moments(model, x)))
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad((y * weight).sum(), [x, *model.parameters()], allow_unused=True)
    return {name: g for name, g in zip(["x", *names], found, strict=True) if g is not None}


@pytest.mark.parametrize("name", ["kl", "noncausal"])
def test_gradients(name: str) -> None:
    model, x = build(name), torch.randn(1, 3, 16, 8, 8)
    truth = gradients(copy.deepcopy(model).double(), x.double())
    before = gradients(model, x)
    vidkernels.patch(model, mode="training")
    assert_vidtok_gradients(truth, before, gradients(model, x))


def test_gradient_checkpointing() -> None:
    model, x = build(), torch.randn(1, 3, 8, 8, 8)
    vidkernels.patch(model)
    plain = gradients(model, x)
    model.train()
    model.enable_gradient_checkpointing()
    again = gradients(model, x)
    assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_dropout_in_training() -> None:
    model, x = build(dropout=0.5), torch.randn(1, 3, 8, 8, 8)
    vidkernels.patch(model)
    with torch.no_grad():
        still = moments(model, x)
        model.train()
        assert not torch.allclose(moments(model, x), still)


@pytest.mark.parametrize("name", ["kl", "noncausal"])
def test_bfloat16(name: str) -> None:
    model = build(name).bfloat16()
    check(model, torch.randn(1, 3, 16, 8, 8).bfloat16())


@pytest.mark.parametrize("name", ["kl", "noncausal"])
def test_autocast(name: str) -> None:
    model, x = build(name), torch.randn(1, 3, 16, 8, 8)
    double = copy.deepcopy(model).double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        encoded = moments(model, x)
        z = latents(model, encoded).float()
        decoded = model.decode(z)
        vidkernels.patch(model)
        actual = moments(model, x), model.decode(z)
    with torch.no_grad():
        assert_within_promise(actual[0], encoded, moments(double, x.double()), "encoded")
        assert_within_promise(actual[1], decoded, double.decode(z.double()), "decoded")


def test_no_caches_are_kept_without_tiling() -> None:
    model = build()
    vidkernels.patch(model)
    with torch.no_grad():
        model.decode(latents(model, moments(model, torch.randn(1, 3, 8, 16, 16))))
    assert all(getattr(module, "causal_cache", None) is None for module in model.modules())
    assert not any("vidkernels_keep" in key for module in model.modules() for key in module.__dict__)


def test_tiled_caches_hold_what_the_next_chunk_needs_and_the_original_can_go_on() -> None:
    model, x = build(), torch.randn(1, 3, 20, 8, 8)
    original = copy.deepcopy(model)
    vidkernels.patch(model)
    with torch.no_grad():
        for network in (original, model):
            network._set_first_chunk(True)
            network.encoder(x[:, :, :4])
        held = {name: m.causal_cache for name, m in model.named_modules() if hasattr(m, "time_pad")}
        assert all(
            cache.shape[2] == model.get_submodule(name).time_pad for name, cache in held.items() if "encoder" in name
        )
        vidkernels.unpatch(model)
        for network in (original, model):
            network._set_first_chunk(False)
        expected, actual = original.encoder(x[:, :, 4:]), model.encoder(x[:, :, 4:])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive; `peak` is their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if size and key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def peak_bytes(model: Any, x: torch.Tensor) -> int:
    with torch.no_grad(), LiveBytes() as live:
        model.decode(latents(model, moments(model, x)))
    return live.peak


def test_peak_memory_is_less_than_half() -> None:
    model, x = build(), torch.randn(1, 3, 20, 32, 32)
    before = peak_bytes(model, x)
    vidkernels.patch(model)
    assert peak_bytes(model, x) < 0.5 * before


def test_lora_on_one_layer_is_honoured_and_the_rest_stays_fused() -> None:
    peft = pytest.importorskip("peft")
    model, z = build(), torch.randn(1, 4, 2, 4, 4)
    vidkernels.patch(model)
    with torch.no_grad():
        before = model.decode(z)
        config = peft.LoraConfig(target_modules=["up.0.block.0.conv1"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model.decoder)
        with pytest.warns(VidkernelsFallbackWarning, match=r"peft\S*Conv2d"):
            after = model.decode(z)
        assert not torch.allclose(before, after)
        assert sum(vidkernels.status(model).fallbacks.values()) == 1
        vidkernels.unpatch(model)
        torch.testing.assert_close(after, model.decode(z), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "path",
    ["decoder.up.1.block.0", "decoder.up_temporal.1.block.0.conv1.conv", "decoder.mid.attn_1", "decoder.norm_out",
     "decoder.up.1.upsample", "decoder.up_temporal.1.upsample", "decoder.conv_out", "encoder.down_temporal.0.downsample"],
)  # fmt: skip
def test_hooks_inside_fire(path: str) -> None:
    model, x, seen = build(), torch.randn(1, 3, 4, 8, 8), []
    with torch.no_grad():
        expected = model.decode(latents(model, moments(model, x)))
        vidkernels.patch(model)
        model.get_submodule(path).register_forward_hook(lambda m, i, o: seen.append(o))
        with pytest.warns(VidkernelsFallbackWarning, match="has hooks"):
            actual = model.decode(latents(model, moments(model, x)))
    assert len(seen) == 1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_layerwise_offload_hooks() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, z = build(), torch.randn(1, 4, 2, 4, 4)
    vidkernels.patch(model)
    with torch.no_grad():
        expected = model.decode(z)
        conv = model.decoder.up[0].block[0].conv2
        hooks.add_hook_to_module(conv, hooks.ModelHook())
        with pytest.warns(VidkernelsFallbackWarning, match="own `forward`"):
            torch.testing.assert_close(model.decode(z), expected, atol=1e-5, rtol=1e-4)


def test_verify_and_reports() -> None:
    model = build("fsq")
    report = vidkernels.patch(model, verify=True)
    assert {entry.name for entry in report.patched} == {"", "encoder", "decoder", "regularization"}
    assert all(item.ok for item in report.numerics)
    assert "VidTokDecoder3D[vk:causal_conv3d+channel_norm+alpha_blend]" in repr(model)
    report.undo()
    vidkernels.patch(model, ops=("fsq",))
    assert vidkernels.status(model).patched == "some"


def test_upstream_change_is_a_near_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.autoencoders import autoencoder_vidtok as upstream

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x

    monkeypatch.setattr(upstream.VidTokLayerNorm, "forward", forward)
    report = vidkernels.explain(build())
    assert {entry.name for entry in report.near_misses} == {"encoder", "decoder"}
    assert "VidTokLayerNorm.forward" in report.near_misses[0].reason and "0.42.1" in report.near_misses[0].reason


def test_compiles_without_graph_break_and_without_recompiling_for_modes() -> None:
    model, x = build(), torch.randn(1, 3, 8, 8, 8)
    vidkernels.patch(model)
    with torch.no_grad():
        expected = model.encoder(x)
        compiled = torch.compile(model.encoder, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_default_configuration() -> None:
    torch.manual_seed(0)
    model = diffusers.AutoencoderVidTok().eval()
    check(model, torch.rand(1, 3, 20, 32, 32) * 2 - 1)
