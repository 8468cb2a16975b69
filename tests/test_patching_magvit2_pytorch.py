# SPDX-License-Identifier: Apache-2.0
"""Rules for magvit2-pytorch: on layers of our own with its attributes and results, and on the package where it is."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_promise
from patching_suite import no_fallback  # noqa: F401
from torch import Tensor, nn
from vae_cases import nudged

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import _rule as table
from vidkernels.patching import digest
from vidkernels.patching.rules import official_magvit2_pytorch as rules


class RMSNorm(nn.Module):
    def __init__(self, width: int, channel_first: bool = False, bias: bool = False) -> None:
        super().__init__()
        shape = (width, 1, 1, 1) if channel_first else (width,)
        self.channel_first, self.scale, self.gamma = channel_first, width**0.5, nn.Parameter(torch.rand(shape) + 0.5)
        self.bias = nn.Parameter(torch.rand(shape)) if bias else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1 if self.channel_first else -1) * self.scale * self.gamma + self.bias


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_k = nn.Conv2d(width, 1, 1)
        self.net = nn.Sequential(nn.Conv2d(width, 16, 1), nn.LeakyReLU(0.1), nn.Conv2d(16, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)
        share = self.to_k(frames).flatten(2).softmax(-1)
        gates = self.net((frames.flatten(2) @ share.mT)[..., None])
        return x * gates.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class CausalConv3d(nn.Module):
    def __init__(
        self, cin: int, cout: int, size: int, pad_mode: str = "constant", stride: int = 1, **options: Any
    ) -> None:
        super().__init__()
        self.pad_mode, self.time_pad = pad_mode, size - stride
        self.time_causal_padding = (*(size // 2,) * 4, self.time_pad, 0)
        self.conv = nn.Conv3d(cin, cout, size, (stride, 1, 1), **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(
            F.pad(x, self.time_causal_padding, self.pad_mode if self.time_pad < x.shape[2] else "constant")
        )


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x + self.fn(x, **kwargs)


def unit(width: int, pad_mode: str = "constant") -> nn.Module:
    conv, mixing = CausalConv3d(width, width, 3, pad_mode), nn.Conv3d(width, width, 1)
    return Residual(nn.Sequential(conv, nn.ELU(), mixing, nn.ELU(), SqueezeExcite(width)))


def frames(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def pixels(module: nn.Module, x: Tensor) -> Tensor:
    rows = x.permute(0, 3, 4, 1, 2)
    return module(rows.flatten(0, 2)).unflatten(0, rows.shape[:3]).permute(0, 3, 4, 1, 2)


def as_given(x: Tensor, **kwargs: Any) -> Tensor:
    return x


class SpatialDownsample2x(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.maybe_blur, self.conv = as_given, nn.Conv2d(cin, cout, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return frames(self.conv, self.maybe_blur(x, space_only=True))


class TimeDownsample2x(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.maybe_blur, self.conv, self.time_causal_padding = as_given, nn.Conv1d(cin, cout, 3, 2), (2, 0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maybe_blur(x, time_only=True)
        return pixels(self.conv, torch.cat([torch.zeros_like(x[:, :, :1]).expand(-1, -1, 2, -1, -1), x], 2))


class SpatialUpsample2x(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(cin, 4 * cout, 1), nn.SiLU(), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return frames(self.net, x)


class Interleave(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2)


class TimeUpsample2x(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(cin, 2 * cout, 1), nn.SiLU(), Interleave())

    def forward(self, x: Tensor) -> Tensor:
        return pixels(self.net, x)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.net = RMSNorm(width, channel_first=True), nn.Conv3d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x))


class Quantizer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sign()


class VideoTokenizer(nn.Module):
    """Frames in front, layers there and back, frames away; as upstream's, `parameters()` is a list."""

    def __init__(self, width: int = 16, pad_mode: str = "constant") -> None:
        super().__init__()
        self.channels, self.image_size, self.has_cond, self.time_padding = 3, 8, False, 1
        self.conv_in, self.conv_out = CausalConv3d(3, width, 5, pad_mode), CausalConv3d(width, 3, 3, pad_mode)
        self.encoder_layers = nn.ModuleList(
            [unit(width), SpatialDownsample2x(width, 24), nn.Sequential(unit(24), unit(24)), TimeDownsample2x(24, 32),
             Residual(FeedForward(32))]
        )  # fmt: skip
        self.decoder_layers = nn.ModuleList(
            [Residual(FeedForward(32)), TimeUpsample2x(32, 24), unit(24), SpatialUpsample2x(24, width), unit(width)]
        )
        self.quantizers = Quantizer()

    def parameters(self, recurse: bool = True) -> Any:
        return list(super().parameters(recurse))

    def encode(self, video: Tensor, quantize: bool = False) -> Tensor:
        x = self.conv_in(F.pad(video, (0, 0, 0, 0, self.time_padding, 0)))
        for layer in self.encoder_layers:
            x = layer(x)
        return self.quantizers(x) if quantize else x

    def decode(self, quantized: Tensor) -> Tensor:
        for layer in self.decoder_layers:
            quantized = layer(quantized)
        return self.conv_out(quantized)[:, :, self.time_padding :]

    def forward(self, video: Tensor) -> Tensor:
        return self.decode(self.encode(video, quantize=True))


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """The rules, told the digests of the classes above."""
    before = list(table._USER)
    for rule in reversed(rules.RULES):
        digests = {key: (digest(_method(key)),) for key in rule.digests}
        vidkernels.register_rule(dataclasses.replace(rule, name=f"test.{rule.name}", digests=digests))
    yield
    table._USER[:] = before


def _method(key: str) -> Any:
    name, _, method = key.partition(".")
    return getattr(globals()[name], method)


def check(module: Any, x: Tensor, call: Any = lambda module, x: module(x)) -> None:
    """Equal to the original to rounding, without writing to the input. The original runs twice, the second time on inputs
    one rounding away, and its larger error counts."""
    original, double, kept = copy.deepcopy(module), copy.deepcopy(module).double(), x.clone()
    vidkernels.patch(module)
    with torch.no_grad():
        truth, actual = call(double, x.double()), call(module, x)
        runs = [call(original, x), call(original, nudged(x))]
        assert_within_promise(actual, max(runs, key=lambda y: float((y.double() - truth).abs().max())), truth)
    assert torch.equal(x, kept) and not vidkernels.status(module).fallbacks


LAYERS = {
    "unit": lambda: unit(16),
    "replicated unit": lambda: unit(16, "replicate"),
    "strided": lambda: CausalConv3d(16, 24, 3, stride=2, bias=False),
    "space down": lambda: SpatialDownsample2x(16, 24),
    "time down": lambda: TimeDownsample2x(16, 24),
    "space up": lambda: SpatialUpsample2x(16, 8),
    "time up": lambda: TimeUpsample2x(16, 8),
    "norm": lambda: RMSNorm(16, channel_first=True, bias=True),
}


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "channels-last"]
)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, layout: torch.memory_format) -> None:
    for size in ((2, 16, 5, 7, 9), (1, 16, 2, 4, 4)):
        module, x = LAYERS[name](), torch.randn(size).contiguous(memory_format=layout)
        check(module, x)
        with torch.no_grad():
            assert module(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("pad_mode", ["constant", "replicate"])
def test_tokenizer(pad_mode: str) -> None:
    model = VideoTokenizer(pad_mode=pad_mode)
    check(model, torch.randn(2, 3, 5, 16, 24), lambda m, x: m.encode(x))
    check(VideoTokenizer(), torch.randn(1, 32, 3, 4, 6), lambda m, x: m.decode(x))
    assert vidkernels.status(model).patched == "all"


def test_report_and_what_is_left_alone() -> None:
    model = VideoTokenizer()
    model.attention = Residual(nn.Sequential(RMSNorm(8), nn.Linear(8, 8)))
    report = vidkernels.explain(model)
    found = {rule: sum(entry.rule == f"test.magvit2_pytorch.{rule}" for entry in report.patched) for rule in (
        "tokenizer", "residual_unit", "causal_conv", "spatial_down", "time_down", "spatial_up", "time_up", "rms_norm")}  # fmt: skip
    assert found == {
        "tokenizer": 1, "residual_unit": 5, "causal_conv": 7, "spatial_down": 1, "time_down": 1, "spatial_up": 1,
        "time_up": 1, "rms_norm": 2,
    }  # fmt: skip
    assert "differentiates twice" in report.details() and "attention [Residual]" not in report.details()


def gradients(module: Any, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = module.decode(module.encode(x))
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    wanted = {"x": x, **dict(module.named_parameters())}
    return dict(zip(wanted, torch.autograd.grad((y * weight).sum(), list(wanted.values())), strict=True))


def test_gradients() -> None:
    """L2 error of every gradient, at most twice the original's or a few roundings of the largest gradient of its layer: a
    softmax does not see its bias, and to_k's other gradients cancel nearly as well."""
    model, x = VideoTokenizer(), torch.randn(1, 3, 5, 8, 12)
    truth = gradients(copy.deepcopy(model).double(), x.double())
    before = gradients(model, x)
    vidkernels.patch(model, mode="training")
    after = gradients(model, x)
    for key, exact in truth.items():
        layer = key.partition(".to_k")[0]
        scale = max(float(g.norm()) for name, g in truth.items() if name.startswith(layer))
        errors = [float((g[key].double() - exact).norm()) for g in (before, after)]
        assert errors[1] <= 2 * errors[0] + 2e-6 * scale, f"{key}: {errors}"


def test_half_precision() -> None:
    model, x = VideoTokenizer(), torch.randn(1, 3, 5, 8, 12)
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        truth = double.encode(x.double())
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore", VidkernelsFallbackWarning)
            expected = model.encode(x)
            vidkernels.patch(model)
            assert_within_promise(model.encode(x), expected, truth)
        assert list(vidkernels.status(model).fallbacks) == ["under autocast upstream's result is float32"]
        vidkernels.unpatch(model)
        model, x = model.bfloat16(), x.bfloat16()
        expected, truth = model.encode(x), copy.deepcopy(model).double().encode(x.double())
        vidkernels.patch(model)
        assert_within_promise(model.encode(x), expected, truth)


def test_state_verify_pickle_compile_and_undo() -> None:
    model, x = VideoTokenizer().eval(), torch.randn(1, 3, 3, 8, 8)
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    with torch.no_grad():
        before = model(x)
        report = vidkernels.patch(model, verify=True)
        assert {item.cls for item in report.numerics} >= {"Residual", "CausalConv3d", "TimeUpsample2x", "RMSNorm"}
        assert list(model.state_dict()) == keys
        z = model.encode(x)
        assert torch.equal(pickle.loads(pickle.dumps(model)).encode(x), z)
        compiled = torch.compile(model.encode, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), z, atol=1e-5, rtol=1e-4)
        torch._dynamo.reset()
        report.undo()
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(model(x), before)
        assert vidkernels.patch(model, verify=x).numerics


def test_hook_inside_a_unit_fires_and_its_convolution_stays_fused() -> None:
    module, x, seen = unit(16), torch.randn(1, 16, 3, 4, 4), []
    with torch.no_grad():
        expected = module(x)
        vidkernels.patch(module)
        module.fn[4].register_forward_hook(lambda m, i, o: seen.append(o))
        with pytest.warns(VidkernelsFallbackWarning, match="SqueezeExcite has hooks"):
            torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)
    assert len(seen) == 1 and sum(vidkernels.status(module).fallbacks.values()) == 1


def test_what_goes_to_the_original() -> None:
    for module, match in (
        (CausalConv3d(4, 4, 3, pad_mode="reflect"), "pads by 'reflect'"),
        (CausalConv3d(4, 4, 3, groups=2), "2 groups"),
    ):
        x = torch.randn(1, 4, 3, 4, 4)
        with torch.no_grad():
            expected = module(x)
            vidkernels.patch(module)
            with pytest.warns(VidkernelsFallbackWarning, match=match):
                assert torch.equal(module(x), expected)


def test_the_package() -> None:
    upstream = pytest.importorskip("magvit2_pytorch.magvit2_pytorch", reason="magvit2-pytorch is not installed")
    table._USER.clear()
    layers = ("residual", "compress_space", ("consecutive_residual", 2), "compress_time", "attend_space", "attend_time")
    options = {"image_size": 16, "init_dim": 16, "codebook_size": 64, "perceptual_loss_weight": 0.0, "use_gan": False}
    model = upstream.VideoTokenizer(layers=layers, **options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("net.2.bias") and ".fn.4." in key:  # gates that start shut
                parameter.uniform_(-1, 1)
            elif ".fn.4.net.2" in key:
                parameter.normal_(std=0.3)
    assert not vidkernels.explain(model).near_misses
    check(copy.deepcopy(model), torch.randn(2, 3, 5, 16, 16), lambda m, x: m.encode(x))
    check(model, torch.randn(2, 64, 3, 8, 8), lambda m, x: m.decode(x))
