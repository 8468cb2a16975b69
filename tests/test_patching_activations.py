# SPDX-License-Identifier: Apache-2.0
"""diffusers' GEGLU and SwiGLU, alone and in Latte and Mochi, patched against unpatched and against float64."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import test_patching_latte as latte
import test_patching_mochi as mochi
import torch
from helpers import assert_within_promise
from patching_suite import cast
from torch import nn

import vidkernels
from benchmarks.memory import peak_bytes
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.ops.gated_activation import BACKENDS

activations = pytest.importorskip("diffusers.models.activations")
CLASSES = {"diffusers.geglu": activations.GEGLU, "diffusers.swiglu": activations.SwiGLU}
every_class = pytest.mark.parametrize("rule", CLASSES)
CPP_MISSING = BACKENDS.backends["cpp"](torch.zeros(1, 2), 2)


def build(rule: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return CLASSES[rule](12, 20, **options).eval()


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_verify(rule: str, dtype: torch.dtype, mode: str) -> None:
    report = vidkernels.patch(build(rule, bias=False).to(dtype), verify=True, mode=mode)
    assert [entry.rule for entry in report.patched] == [rule] and all(item.ok for item in report.numerics)


@every_class
def test_projection_is_called_as_it_is(rule: str) -> None:
    """Hooks see what they saw, adapters add what they add, a wrapper's own tensors are computed by torch."""
    module, x, seen = build(rule), torch.randn(2, 5, 12), []
    vidkernels.patch(module)

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.down = base, nn.Linear(12, 40)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.down(x)

    module.proj = Adapted(module.proj)
    module.proj.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = module(x)
    assert seen == [(2, 5, 40)]
    vidkernels.unpatch(module)
    torch.testing.assert_close(actual, module(x))


class Marked(torch.Tensor):
    """A tensor of somebody's own class."""


@every_class
def test_what_kernels_cannot_take_is_computed_by_torch(rule: str) -> None:
    module, x = build(rule), torch.randn(3, 12)
    expected = module(x)
    vidkernels.patch(module)
    module.proj.register_forward_hook(lambda m, i, o: o.as_subclass(Marked))
    assert type(module(x)) is Marked
    torch.testing.assert_close(module(x).as_subclass(torch.Tensor), expected)


def test_original_where_more_is_asked_for() -> None:
    geglu, swiglu, x = build("diffusers.geglu"), build("diffusers.swiglu"), torch.randn(3, 12)
    vidkernels.patch(geglu)
    with (
        pytest.warns(VidkernelsFallbackWarning, match="deprecated `scale`"),
        pytest.warns(FutureWarning, match="scale"),
    ):
        geglu(x, scale=0.5)
    with pytest.warns(FutureWarning, match="scale"):
        geglu(x, 0.5)
    torch.testing.assert_close(geglu(x, other=1), geglu(x))
    vidkernels.patch(swiglu)
    swiglu.activation = nn.Tanh()
    with pytest.warns(VidkernelsFallbackWarning, match=r"a child is a .*Tanh"):
        actual = swiglu(x)
    hidden, gate = swiglu.proj(x).chunk(2, -1)
    torch.testing.assert_close(actual, hidden * gate.tanh())


@every_class
def test_autocast_and_compile(rule: str) -> None:
    module, x = build(rule), torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = module(x)
        vidkernels.patch(module)
        actual = module(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    vidkernels.unpatch(module)
    report = vidkernels.explain(module, for_compile=True, mode="inference")
    assert not report.patched and "left to Inductor" in report.details()


def test_latte() -> None:
    """Every feed-forward of both kinds of block, with and without gradients."""
    model, arguments = latte.build(activation_fn="geglu"), latte.inputs()
    double = copy.deepcopy(model).double()
    truth = double(**latte.wide(arguments, torch.float64)).sample
    exact = latte.gradients(double, latte.wide(arguments, torch.float64))
    expected, before = model(**arguments).sample, latte.gradients(model, arguments)
    report = vidkernels.patch(model, ops="diffusers.geglu", mode="training")
    assert len(report.patched) == 4
    assert_within_promise(model(**arguments).sample, expected, truth)
    after = latte.gradients(model, arguments)
    for key, right in exact.items():
        if not key.endswith("to_k.bias"):
            errors = [float((g[key].double() - right).norm() / right.norm()) for g in (before, after)]
            assert errors[1] <= 2 * errors[0] + 5e-7, f"{key}: {errors}"
    assert not vidkernels.status(model).fallbacks


@pytest.mark.skipif(CPP_MISSING is not None, reason=str(CPP_MISSING))
def test_memory_of_a_feed_forward() -> None:
    """The activation is in no tensor of its own: 3 halves at the peak instead of 4, and 2 kept for the backward instead of 3."""
    torch.manual_seed(0)
    module, x = activations.GEGLU(32, 1024).eval(), torch.randn(512, 32)
    half = 512 * 1024 * 4

    def infer() -> torch.Tensor:
        with torch.no_grad():
            return module(x)

    def kept() -> int:
        found: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(x)
        return sum(found.values())

    original = peak_bytes(infer, x.device), kept()
    vidkernels.patch(module)
    patched = peak_bytes(infer, x.device), kept()
    assert original[0] >= 4 * half > 3.5 * half > patched[0]
    assert original[1] >= 3 * half > 2.5 * half > patched[1]


def test_mochi() -> None:
    suite = mochi.TestMochi()
    model, arguments = suite.ready().bfloat16(), cast(suite.inputs(), torch.bfloat16)
    truth = copy.deepcopy(model).double()(**cast(arguments, torch.float64), return_dict=False)[0]
    with torch.no_grad():
        expected = model(**arguments, return_dict=False)[0]
        report = vidkernels.patch(model, ops="diffusers.swiglu")
        assert len(report.patched) == 3
        assert_within_promise(model(**arguments, return_dict=False)[0], expected, truth)
    assert not vidkernels.status(model).fallbacks
