# SPDX-License-Identifier: Apache-2.0
"""Rules for the official VidTok networks, on networks of our own with the same structure and the same results, and on
the official files where they are on the path (`vidtok`, which no package holds)."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle
from collections.abc import Iterator
from typing import Any

import official_vidtok_toys as toys
import pytest
import torch
from helpers import assert_within_promise
from patching_suite import no_fallback  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from vae_cases import assert_vidtok_gradients, nudged

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.nn import _residual
from vidkernels.patching import _rule as table
from vidkernels.patching import digest
from vidkernels.patching.rules import official_vidtok as rules

WIDTHS = (16, 16, 32)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The rules, told the digests of the networks in `official_vidtok_toys`."""
    before = list(table._USER)
    monkeypatch.setattr(rules, "_LAYER_NORM", digest(toys.LayerNorm.forward))
    for rule in reversed(rules.RULES):
        name = rule.targets[0].partition(":")[2]
        digests = {f"{name}.forward": (digest(getattr(toys, name).forward),)}
        vidkernels.register_rule(dataclasses.replace(rule, name=f"test.{rule.name}", digests=digests))
    yield
    table._USER[:] = before


def busy(network: Any) -> Any:
    """In eval mode, with biases and norms away from their trivial start."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1 and parameter.numel() > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def encoder(version: str, widths: tuple[int, ...] = WIDTHS, **options: Any) -> Any:
    cls = toys.Encoder3D if version == "noncausal" else toys.EncoderCausal3DPadding
    return busy(cls(version, widths, 6, **options))


def decoder(version: str, widths: tuple[int, ...] = WIDTHS, **options: Any) -> Any:
    cls = toys.Decoder3D if version == "noncausal" else toys.DecoderCausal3DPadding
    return busy(cls(version, widths, 3, **options))


def check(network: Any, x: torch.Tensor) -> None:
    """Equal to the original to rounding, without writing to the input, in the original's format. The original runs twice,
    the second time on inputs one rounding away, and its larger error counts: one small run may be a lucky one."""
    double, original, kept = copy.deepcopy(network).double(), copy.deepcopy(network), x.clone()
    report = vidkernels.patch(network)
    assert len(report.patched) == 1 and vidkernels.status(network).patched == "all"
    with torch.no_grad():
        truth, actual, runs = double(x.double()), network(x), [original(x), original(nudged(x))]
        expected = max(runs, key=lambda y: float((y.double() - truth).abs().max()))
        assert_within_promise(actual, expected, truth)
    assert actual.stride() == expected.contiguous().stride() or hasattr(network, "time_padding")
    assert torch.equal(x, kept) and not vidkernels.status(network).fallbacks


@pytest.mark.parametrize("version", toys.VERSIONS)
@pytest.mark.parametrize("widths", [WIDTHS, (16, 32, 32, 16)], ids=["three levels", "four levels"])
def test_encoder(version: str, widths: tuple[int, ...]) -> None:
    side = 2 ** (len(widths) - 1)
    odd = 0 if version == "noncausal" else 1
    for frames in (8, 8 + odd, 8 + 2 * odd) if widths is WIDTHS else (16 + odd,):
        check(encoder(version, widths), torch.randn(2, 3, frames, 3 * side, 2 * side))


@pytest.mark.parametrize("version", toys.VERSIONS)
@pytest.mark.parametrize("widths", [WIDTHS, (16, 32, 32, 16)], ids=["three levels", "four levels"])
def test_decoder(version: str, widths: tuple[int, ...]) -> None:
    for frames, height, width in ((5, 3, 5), (1, 2, 2)) if widths is WIDTHS else ((3, 3, 2),):
        check(decoder(version, widths), torch.randn(2, 3, frames, height, width))


@pytest.mark.parametrize("version", toys.VERSIONS)
def test_pieces_of_the_residual_stream(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_residual, "PIECE_CPU", 500)
    check(encoder(version), torch.randn(2, 3, 8, 12, 8))
    check(decoder(version), torch.randn(1, 3, 3, 4, 2))


def test_ends_of_the_decoder() -> None:
    for options in ({"give_pre_end": True}, {"tanh_out": True}, {"mode": "nearest"}, {"times": 1}):
        check(decoder("1.1", **options), torch.randn(1, 3, 3, 2, 4))
    check(decoder("1.0", give_pre_end=True), torch.randn(1, 3, 3, 2, 4))


def gradients(network: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = network(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    wanted = {"x": x, **dict(network.named_parameters())}
    return dict(zip(wanted, torch.autograd.grad((y * weight).sum(), list(wanted.values())), strict=True))


@pytest.mark.parametrize("version", toys.VERSIONS)
@pytest.mark.parametrize("build", [encoder, decoder])
def test_gradients(build: Any, version: str) -> None:
    network = build(version)
    x = torch.randn(1, 3, 8, 8, 8) if build is encoder else torch.randn(1, 3, 3, 4, 4)
    truth = gradients(copy.deepcopy(network).double(), x.double())
    before = gradients(network, x)
    vidkernels.patch(network, mode="training")
    assert_vidtok_gradients(truth, before, gradients(network, x))


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    network, x = encoder("1.1", use_checkpoint=True), torch.randn(1, 3, 8, 8, 8)
    vidkernels.patch(network)
    again = gradients(network, x)
    for module in network.modules():
        if isinstance(module, toys.Block):
            module.use_checkpoint = False
    plain = gradients(network, x)
    assert all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize("version", toys.VERSIONS)
def test_half_precision(version: str) -> None:
    network, x = decoder(version), torch.randn(1, 3, 3, 4, 4)
    double = copy.deepcopy(network).double()
    with torch.no_grad():
        truth = double(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            expected = network(x)
            vidkernels.patch(network)
            assert_within_promise(network(x), expected, truth)
        vidkernels.unpatch(network)
        network.bfloat16()
        expected, wide = network(x.bfloat16()), copy.deepcopy(network).double()
        vidkernels.patch(network)
        assert_within_promise(network(x.bfloat16()), expected, wide(x.bfloat16().double()))


def engine(**options: Any) -> Any:
    return toys.AutoencodingEngine(encoder("1.1"), busy(toys.DecoderCausal3DPadding("1.1", WIDTHS, 6, **options)))


def cached(network: Any) -> dict[str, int]:
    """Frames kept for a next chunk, by module."""
    found = {name: getattr(module, "causal_cache", None) for name, module in network.named_modules()}
    return {name: cache.shape[2] for name, cache in found.items() if cache is not None}


@pytest.mark.parametrize("overlap", [False, True], ids=["apart", "overlapping"])
@pytest.mark.parametrize("mode", ["nearest", "trilinear"])
def test_chunks(mode: str, overlap: bool) -> None:
    model = engine(mode=mode).eval()
    model.use_tiling, model.use_overlap = True, overlap
    original, double = copy.deepcopy(model), copy.deepcopy(model).double()
    x = torch.randn(1, 3, 25, 8, 12)
    assert len(vidkernels.patch(model).patched) == 3
    with torch.no_grad():
        z, expected, truth = model.encode(x), original.encode(x), double.encode(x.double())
        assert_within_promise(z, expected, truth, "encoded")
        assert_within_promise(model.decode(z), original.decode(z), double.decode(z.double()), "decoded")
    kept = cached(model.encoder)
    for name, frames in kept.items():
        module = model.encoder.get_submodule(name)
        assert frames == getattr(module, "time_pad", 1)
    whole = cached(original.encoder)
    assert kept.keys() == whole.keys() and sum(kept.values()) < sum(whole.values()) / 3
    assert not vidkernels.status(model).fallbacks


def test_nothing_is_kept_without_chunks() -> None:
    model, x = engine().eval(), torch.randn(1, 3, 9, 8, 8)
    original = copy.deepcopy(model)
    vidkernels.patch(model, verify=x)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[:2], original(x)[:2], atol=1e-5, rtol=1e-4)
    assert not cached(model) and cached(original)
    assert not any("vidkernels_keep" in key for module in model.modules() for key in module.__dict__)


def test_fused_and_original_take_turns_within_a_clip() -> None:
    model, x = engine().eval().encoder, torch.randn(1, 3, 24, 8, 8)
    original = copy.deepcopy(model)
    with torch.no_grad():
        for i in range(3):
            (vidkernels.unpatch if i % 2 else vidkernels.patch)(model)
            for network in (model, original):
                for module in network.modules():
                    if hasattr(module, "is_first_chunk"):
                        module.is_first_chunk = i == 0
            chunk = x[:, :, 8 * i : 8 * i + 8]
            torch.testing.assert_close(model(chunk), original(chunk), atol=1e-5, rtol=1e-4)


class Made(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("version", toys.VERSIONS)
def test_nothing_is_padded_concatenated_or_upsampled(version: str) -> None:
    copies = {"constant_pad_nd", "cat", "upsample_trilinear3d", "avg_pool3d", "expand"}
    for network, x in ((encoder(version), torch.randn(1, 3, 8, 8, 8)), (decoder(version), torch.randn(1, 3, 3, 4, 4))):
        network._vidkernels_keep = False  # as the rule of the engine says in calls that are not chunks
        with torch.no_grad(), Made() as before:
            network(x)
        vidkernels.patch(network)
        with torch.no_grad(), Made() as after:
            network(x)
        assert before.names & copies and not after.names & copies


@pytest.mark.parametrize("version", toys.VERSIONS)
def test_state_verify_pickle_and_undo(version: str) -> None:
    for network, x in ((encoder(version), torch.randn(1, 3, 8, 8, 8)), (decoder(version), torch.randn(1, 3, 3, 4, 4))):
        classes = [type(module) for module in network.modules()]
        state = {key: (value.data_ptr(), value.clone()) for key, value in network.state_dict().items()}
        plan = vidkernels.explain(network)
        assert [entry.name for entry in plan.patched] == [""] and "causal_conv3d" in str(plan)
        with torch.no_grad():
            before = network(x)
            report = vidkernels.patch(network, verify=True)
            assert report.numerics and all(item.ok for item in report.numerics)
            after = network.state_dict()
            assert list(after) == list(state)
            assert all(after[k].data_ptr() == p and torch.equal(after[k], v) for k, (p, v) in state.items())
            assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))
            report.undo()
            assert [type(module) for module in network.modules()] == classes
            assert torch.equal(network(x), before)


@pytest.mark.parametrize(
    "version", [pytest.param(v, marks=[] if v == "1.1" else pytest.mark.slow) for v in toys.VERSIONS]
)
def test_compiles_without_graph_break(version: str) -> None:
    """Two levels, for tracing takes its time; 1.1 with the caches that a chunk leaves."""
    network, x = encoder(version, (8, 16), times=1), torch.randn(1, 3, 4, 4, 4)
    vidkernels.patch(network)
    with torch.no_grad():
        expected = network(x)
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "path",
    ["conv_in.conv", "up.1.block.0", "up_temporal.1.block.0.norm2.norm", "mid.attn_1.q", "mid.block_2.conv1",
     "norm_out", "up.1.upsample.conv", "up_temporal.1.upsample", "conv_out"],
)  # fmt: skip
def test_hooks_inside_fire(path: str) -> None:
    network, z, seen = decoder("1.1"), torch.randn(1, 3, 3, 4, 4), []
    with torch.no_grad():
        expected = network(z)
        vidkernels.patch(network)
        network.get_submodule(path).register_forward_hook(lambda m, i, o: seen.append(o))
        with pytest.warns(VidkernelsFallbackWarning, match="has hooks"):
            actual = network(z)
    assert len(seen) >= 1 and sum(vidkernels.status(network).fallbacks.values()) == 1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_keywords_go_to_the_original() -> None:
    network = decoder("1.1")
    vidkernels.patch(network)
    with pytest.warns(VidkernelsFallbackWarning, match="called with temb"), pytest.raises(TypeError, match="temb"):
        network(torch.randn(1, 3, 1, 2, 2), temb=None)


def test_what_is_refused() -> None:
    network = encoder("1.0")
    network.norm_out = torch.nn.GroupNorm(2, 32)
    assert "norms are over groups" in vidkernels.explain(network).details()
    network = decoder("1.0")
    network.conv_in.pad_mode = "replicate"
    vidkernels.patch(network)
    with pytest.warns(VidkernelsFallbackWarning, match="pads by 'replicate'"), torch.no_grad():
        network(torch.randn(1, 3, 3, 2, 2))


def test_other_code_is_a_near_miss() -> None:
    """The package's own rules, without this file's digests: these networks have the names alone."""
    table._USER.clear()
    for network in (encoder("1.0"), encoder("1.1"), decoder("noncausal")):
        report = vidkernels.explain(network)
        assert not report.patched and "official_vidtok_toys" in report.details()


OFFICIAL = {
    "1.0": ("model_3dcausal", "EncoderCausal3DPadding", "DecoderCausal3DPadding"),
    "1.1": ("model_3dcausal_v1_1", "EncoderCausal3DPadding", "DecoderCausal3DPadding"),
    "noncausal": ("model_3dnoncausal", "Encoder3D", "Decoder3D"),
}


@pytest.mark.parametrize("version", toys.VERSIONS)
def test_official_files(version: str) -> None:
    pytest.importorskip("vidtok", reason="the official code of VidTok is not on the path")
    table._USER.clear()
    rules._LAYER_NORM = "f33756831e9d70eb"
    name, *classes = OFFICIAL[version]
    home = importlib.import_module(f"vidtok.modules.{name}")
    options = {"ch": 32, "out_ch": 3, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "in_channels": 3, "z_channels": 4}
    options |= {"norm_type": "layernorm", "interpolation_mode": "trilinear"}
    frames = 16 if version == "noncausal" else 17
    for cls, x in zip(classes, (torch.randn(1, 3, frames, 12, 20), torch.randn(1, 4, 5, 3, 5)), strict=True):
        network = busy(getattr(home, cls)(**options))
        for key, parameter in network.named_parameters():
            if "temporal" in key and ".conv2." in key:  # which start as zeros
                torch.nn.init.normal_(parameter, std=0.05)
        check(network, x)
