# SPDX-License-Identifier: Apache-2.0
"""The tests that every patched video VAE of an official repository has to pass, on networks of our own in its place.

A test file subclasses `OfficialVaeSuite` once per model; what is special about a model stands in its own tests.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from test_patching_vae_memory import as_on_a_gpu, peak
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from vae_cases import check_call

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import Rule, digest
from vidkernels.patching import _rule as table

# Two orders of summation and a norm's rounding, relative to the gradient; float32's unit roundoff is 6e-8.
GRADIENT_FLOOR = 1e-6


def knowing(rules: Sequence[Rule], home: Any) -> Iterator[None]:
    """The rules, told the digests of the code in `home`, for as long as a fixture waits."""
    before = list(table._USER)
    for rule in reversed(rules):
        digests = {key: (digest(_code(home, key)),) for key in rule.digests}
        vidkernels.register_rule(dataclasses.replace(rule, name=f"test.{rule.name}", digests=digests))
    yield
    table._USER[:] = before


def _code(home: Any, key: str) -> Any:
    owner, _, method = key.partition(".")
    return getattr(getattr(home, owner), method) if method else getattr(home, owner)


def busy(model: Any) -> Any:
    """In eval mode, with biases and norms away from their trivial start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _first(returned: Any) -> Tensor:
    return returned[0] if isinstance(returned, tuple) else returned


class OwnConv3d(nn.Conv3d):
    """What a LoRA wrapper is for the guards: a convolution of another class, with more weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.25


class OfficialVaeSuite:
    """Subclasses say how to build a small model, and what it takes.

    Attributes:
        rules: rule -> number of modules that it patches in `build()`.
        sizes: clips [B, T, H, W] that the encoder takes.
        hooked: submodules whose forward hook must fire, of every kind that is fused.
        wrapped: a convolution of torch's inside a block.
    """

    rules: ClassVar[dict[str, int]]
    sizes: ClassVar[tuple[tuple[int, ...], ...]]
    hooked: ClassVar[tuple[str, ...]]
    wrapped: ClassVar[str]
    channels: ClassVar[int] = 3

    def build(self) -> Any:
        raise NotImplementedError

    def encode(self, model: Any, x: Tensor) -> Tensor:
        """Moments."""
        raise NotImplementedError

    def decode(self, model: Any, z: Tensor) -> Tensor:
        raise NotImplementedError

    def ready(self) -> Any:
        torch.manual_seed(0)
        return busy(self.build())

    def smallest(self) -> Any:
        """A model with one of each kind of layer: tracing it takes a second a layer."""
        return self.ready()

    def clip(self, size: tuple[int, ...] | None = None) -> Tensor:
        batch, *rest = size or self.sizes[0]
        return torch.randn(batch, self.channels, *rest)

    def latents(self, model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.encode(model, x).chunk(2, 1)[0].contiguous()

    def compare(self, model: Any, x: Tensor) -> None:
        """Equal to the original to rounding, in its format, without writing to the input."""
        models = copy.deepcopy(model), model, copy.deepcopy(model).double()
        vidkernels.patch(model)
        z = self.latents(models[0], x)
        with torch.no_grad():
            for call, given in ((self.encode, x), (self.decode, z)):
                kept = given.clone()
                check_call(call, models, given, call.__name__)
                assert torch.equal(given, kept)
        assert not vidkernels.status(model).fallbacks

    def test_all_is_patched(self) -> None:
        report = vidkernels.patch(self.ready())
        counts = {rule: sum(entry.rule == f"test.{rule}" for entry in report.patched) for rule in self.rules}
        assert counts == self.rules, report.details()
        assert not report.near_misses, report.details()

    def test_sizes(self) -> None:
        for size in self.sizes:
            self.compare(self.ready(), self.clip(size))

    def test_bfloat16(self) -> None:
        self.compare(self.ready().bfloat16(), self.clip().bfloat16())

    def test_channels_last_input(self) -> None:
        model, x = self.ready(), self.clip(self.sizes[-1])
        with torch.no_grad():
            expected = self.encode(model, x)
            vidkernels.patch(model)
            actual = self.encode(model, x.to(memory_format=torch.channels_last_3d))
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)

    def test_autocast(self) -> None:
        model, x = self.ready(), self.clip()
        models = copy.deepcopy(model), model, copy.deepcopy(model).double()
        vidkernels.patch(model)
        z = self.latents(models[0], x)

        def under(call: Any) -> Any:
            def run(module: Any, given: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=given.dtype == torch.float32):
                    return call(module, given)

            return run

        with torch.no_grad():
            check_call(under(self.encode), models, x, "encode")
            check_call(under(self.decode), models, z, "decode")
        assert not vidkernels.status(model).fallbacks

    def gradients(self, model: Any, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        x, z = x.detach().requires_grad_(), z.detach().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for y in (self.encode(model, x), self.decode(model, z)):
            weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
            total = total + (y * weight).sum()
        wanted = {"x": x, "z": z, **dict(model.named_parameters())}
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        return {key: g for key, g in zip(wanted, found, strict=True) if g is not None}

    def test_gradients(self) -> None:
        """L2 error of every gradient against float64: at most twice the original's, or a few roundings of the largest
        gradient of its layer."""
        model, x = self.ready(), self.clip()
        z = self.latents(model, x)
        truth = self.gradients(copy.deepcopy(model).double(), x.double(), z.double())
        before = self.gradients(model, x, z)
        vidkernels.patch(model, mode="training")
        after = self.gradients(model, x, z)
        assert after.keys() == before.keys() == truth.keys()
        for key, exact in truth.items():
            layer = key.rpartition(".")[0]
            scale = max(float(g.norm()) for name, g in truth.items() if name.rpartition(".")[0] == layer)
            errors = [float((g[key].double() - exact).norm()) for g in (before, after)]
            assert errors[1] <= 2 * errors[0] + GRADIENT_FLOOR * scale, f"{key}: {errors}, {scale}"
        assert not vidkernels.status(model).fallbacks

    def test_hooks_fire_and_read_what_the_original_gave(self) -> None:
        x = self.clip()
        for path in self.hooked:
            model, seen = self.ready(), list[tuple[Tensor, Tensor]]()
            z = self.latents(model, x)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", VidkernelsFallbackWarning)
                expected = self.encode(model, x), self.decode(model, z)
                vidkernels.patch(model)
                model.get_submodule(path).register_forward_hook(
                    lambda module, given, y, seen=seen: seen.extend((t, t.clone()) for t in (given[0], _first(y)))
                )
                actual = self.encode(model, x), self.decode(model, z)
            assert len(seen) == 2, path
            assert all(torch.equal(*pair) for pair in seen), path
            torch.testing.assert_close(actual, expected, atol=5e-5, rtol=1e-4)

    def test_a_wrapped_convolution_is_called(self) -> None:
        model, x = self.ready(), self.clip()
        vidkernels.patch(model)
        model.get_submodule(self.wrapped).__class__ = OwnConv3d
        z = self.latents(copy.deepcopy(model), x) if "decoder" in self.wrapped else x
        call = self.decode if "decoder" in self.wrapped else self.encode
        with torch.no_grad():
            with pytest.warns(VidkernelsFallbackWarning, match="OwnConv3d"):
                actual = call(model, z)
            vidkernels.unpatch(model)
            torch.testing.assert_close(actual, call(model, z), atol=5e-5, rtol=1e-4)

    @pytest.mark.slow
    def test_compiles_without_graph_break(self) -> None:
        model, x = self.smallest(), self.clip()
        vidkernels.patch(model)
        z = self.latents(model, x)
        with torch.no_grad():
            for call, given in ((self.encode, x), (self.decode, z)):
                expected = call(model, given)
                compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
                torch.testing.assert_close(compiled(model, given), expected, atol=2e-5, rtol=1e-4)
                torch._dynamo.reset()

    def test_state_verify_copies_and_undo(self) -> None:
        model, x = self.ready(), self.clip()
        classes, state = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
        with torch.no_grad():
            before = self.encode(model, x)
            report = vidkernels.patch(model, verify=True)
            assert report.numerics and all(item.ok for item in report.numerics)
            found = model.state_dict()
            assert list(found) == list(state) and all(torch.equal(found[key], state[key]) for key in state)
            patched = self.encode(model, x)
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(self.encode(other, x), patched)
            report.undo()
            assert [type(module) for module in model.modules()] == classes
            assert torch.equal(self.encode(model, x), before)

    @pytest.mark.parametrize("device", ["cpu", "gpu"])
    def test_no_peak_is_above_the_originals(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if device == "gpu":
            as_on_a_gpu(monkeypatch)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model, x = self.build().eval(), torch.empty(1, self.channels, *self.sizes[0][1:])
            z = self.latents(model, x)
            calls = ((self.encode, x), (self.decode, z))
            before = [peak(model, *call) for call in calls]
            assert vidkernels.patch(model)
            after = [peak(model, *call) for call in calls]
        assert all(ours <= theirs + 1024 for ours, theirs in zip(after, before, strict=True)), (after, before)
