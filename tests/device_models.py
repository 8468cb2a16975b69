# SPDX-License-Identifier: Apache-2.0
"""Small models on a device of the caller's, and the judge of two runs of them: the patched one's error against float64 is at
most twice that of the unpatched one on the same device and in the same dtype."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import vae_cases as cases
from helpers import assert_within_promise
from torch import Tensor

import vidkernels
from vidkernels.dispatch import Dispatcher

Run = Callable[[Any], Tensor]
Call = Callable[[Any, Tensor], Tensor]
# The test module of each patched transformer, and the suite in it that builds a small one.
TRANSFORMERS = {
    "allegro": ("test_patching_allegro", "TestAllegro"), "cogvideox": ("test_patching_cogvideox", "TestCogVideoX"),
    "cosmos": ("test_patching_cosmos", "TestCosmos"), "dit": ("test_patching_dit", "TestDiT"),
    "flux": ("test_patching_flux", "TestFlux"), "hunyuan": ("test_patching_hunyuan_video", "TestHunyuanVideo"),
    "hunyuan1.5": ("test_patching_hunyuan_video", "TestHunyuanVideo15"), "latte": ("test_patching_latte", ""),
    "ltx": ("test_patching_ltx", "TestLTX"), "ltx2": ("test_patching_ltx2", "TestLTX2"), "mochi": ("test_patching_mochi", "TestMochi"),
    "pixart": ("test_patching_pixart", "TestPixArt"), "sd3.5": ("test_patching_sd3", "TestSD35"),
    "skyreels": ("test_patching_skyreels", "TestSkyReels"), "wan": ("test_patching_wan", "TestWan"),
    "official-dit": ("test_patching_official", "TestDiT"), "official-stdit3": ("test_patching_official", "TestSTDiT3"),
}  # fmt: skip


def moved(tree: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The tensors of a tree on a device, floating ones in a dtype."""
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.to(device, dtype if t.is_floating_point() else None), tree
    )


def placed(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A float32 model on a device; what it keeps in float64 stays so unless it is cast as a whole."""
    return model.to(device) if dtype == torch.float32 else model.to(device).to(dtype)


def nudged(x: Tensor) -> Tensor:
    """Every value moved to a neighbouring one; drawn on the CPU, so that every device gets the same."""
    return cases.nudged(x.cpu()).to(x.device)


@contextlib.contextmanager
def reference_backend() -> Iterator[None]:
    """Whatever is asked for, ops run as their references."""
    with mock.patch.object(Dispatcher, "select", lambda self, backend, *facts: "reference"):
        yield


def under_autocast(run: Run, device: torch.device) -> Run:
    """The same under bfloat16 autocast."""

    def cast(given: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return run(given)

    return cast


def judge(runs: Sequence[Run], given: Any, what: str = "output", leaves: Sequence[str] = ()) -> None:
    """Original, patched and float64 run on a tensor or on a dict of arguments, of which `leaves` are nudged.

    The original runs twice, the second time on inputs one rounding away, and its larger error counts: one run of a small
    model may be a lucky one.
    """
    original, patched, double = runs
    near = {**given, **{key: nudged(given[key]) for key in leaves}} if leaves else nudged(given)
    with torch.no_grad():
        truth, actual = double(moved(given, _device(given), torch.float64)), patched(given)
        worse = max((original(given), original(near)), key=lambda y: float((y.double() - truth).abs().max()))
    assert actual.device == worse.device
    assert_within_promise(actual, worse, truth, what)


def _device(tree: Any) -> torch.device:
    return next(leaf.device for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


class Transformer:
    """A small transformer that rules know, its arguments, and how it is patched."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        path, suite = TRANSFORMERS[name]
        module = importlib.import_module(path)
        self.suite = getattr(module, suite)() if suite else None
        torch.manual_seed(0)
        model = self.suite.ready() if self.suite else module.build()
        arguments = self.suite.inputs() if self.suite else module.inputs()
        self.leaves = self.suite.leaves if self.suite else ("hidden_states", "encoder_hidden_states")
        self.model, self.arguments = placed(model, device, dtype), moved(arguments, device, dtype)

    def patch(self, model: Any, **options: Any) -> None:
        """Each of the rules under test finds its modules."""
        report = self.suite.patch(model, **options) if self.suite else vidkernels.patch(model, **options)
        assert report.patched, report.details()

    def run(self, model: Any) -> Run:
        """The model's output for a dict of arguments."""
        from patching_suite import output_of

        return lambda given: output_of(model(**given))


def _called(model: Any, x: Tensor) -> Tensor:
    found: Tensor = model(x)
    return found


def _allegro() -> tuple[Any, list[tuple[Call, Tensor]]]:
    module = importlib.import_module("test_patching_allegro_vae")
    return module.build(), [
        (module.encoder, torch.randn(1, 3, 4, 16, 24)),
        (module.decoder, torch.randn(1, 4, 1, 2, 3)),
    ]


def _diffusers_vidtok(name: str) -> tuple[Any, list[tuple[Call, Tensor]]]:
    module = importlib.import_module("test_patching_vidtok")
    model, x = module.build(name), torch.randn(1, 3, 16 if name == "noncausal" else 8, 16, 24)
    z = module.latents(model, module.moments(model, x))
    return model, [(module.moments, x), (lambda model, z: model.decode(z), torch.randn_like(z))]


def _magvit2_pytorch() -> tuple[Any, list[tuple[Call, Tensor]]]:
    model = importlib.import_module("test_patching_magvit2_pytorch").VideoTokenizer()
    calls: list[Call] = [lambda m, x: m.encode(x), lambda m, x: m.decode(x)]
    return model, [(calls[0], torch.randn(2, 3, 5, 16, 24)), (calls[1], torch.randn(1, 32, 3, 4, 6))]


def _image_vae(kind: str) -> tuple[Any, list[tuple[Call, Tensor]]]:
    module = importlib.import_module("test_patching_image_vae")
    model, x = module.build(kind), module.images()
    return model, [(cases.encode, x), (module.decode, torch.randn_like(cases.latents(model, x)))]


def _official_vidtok(part: str, version: str) -> tuple[Any, list[tuple[Call, Tensor]]]:
    module = importlib.import_module("test_patching_official_vidtok")
    x = torch.randn(1, 3, 8, 12, 8) if part == "encoder" else torch.randn(1, 3, 3, 3, 5)
    return getattr(module, part)(version), [(_called, x)]


def diffusers_vae(name: str) -> Any:
    """A small VAE of diffusers, where that is installed."""
    pytest.importorskip("diffusers", minversion="0.42")
    return cases.build(name)


def _vae(name: str) -> tuple[Any, list[tuple[Call, Tensor]]]:
    model, x = diffusers_vae(name), cases.clip(name, cases.VAES[name].frames[1])
    return model, [(cases.encode, x), (cases.decode, torch.randn_like(cases.latents(model, x)))]


VAES: dict[str, Callable[[], tuple[Any, list[tuple[Call, Tensor]]]]] = {
    **{name: (lambda name=name: _vae(name)) for name in cases.VAES},
    "allegro": _allegro,
    **{f"vidtok-{name}": (lambda name=name: _diffusers_vidtok(name)) for name in ("kl", "noncausal")},
    **{f"image-{kind}": (lambda kind=kind: _image_vae(kind)) for kind in ("kl", "temporal")},
    "magvit2-pytorch": _magvit2_pytorch,
    **{
        f"official-vidtok-{part}-{version}": (lambda part=part, version=version: _official_vidtok(part, version))
        for part in ("encoder", "decoder")
        for version in ("1.0", "1.1", "noncausal")
    },
}


class Vae:
    """A small VAE that rules know; the calls to compare, each with its input. Its weights are drawn on the CPU."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        with torch.no_grad():
            model, calls = VAES[name]()
        self.model = placed(model, device, dtype)
        detours = name in cases.VAES or name == "allegro" or name.startswith("image-")
        self.double = cases.in_double(self.model) if detours else copy.deepcopy(self.model).double()
        self.calls = [(call, x.to(device, dtype)) for call, x in calls]
        if device.type == "cpu" and dtype != torch.float32 and (name == "cosmos" or "vidtok-encoder" in name):
            del self.calls[0]  # upstream's average pooling has no bfloat16 on CPUs

    def compare(self, *, autocast: bool = False, last: bool = False) -> None:
        """Patch the model and judge every call. `last`: on channels-last inputs."""
        models = copy.deepcopy(self.model), self.model, self.double
        vidkernels.patch(self.model)
        for i, (call, x) in enumerate(self.calls):
            if last:
                x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
            runs: list[Run] = [lambda given, call=call, model=model: call(model, given) for model in models]
            if autocast:
                runs[:2] = [under_autocast(run, x.device) for run in runs[:2]]
            judge(runs, x, f"call {i}")
        assert not vidkernels.status(self.model).fallbacks
