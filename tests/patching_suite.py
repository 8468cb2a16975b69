# SPDX-License-Identifier: Apache-2.0
"""The tests that every patched transformer has to pass, patched against unpatched and against float64.

A test file subclasses `ModelSuite` once per model; what is special about a model stands in its own tests.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from helpers import assert_within_promise
from torch._subclasses.fake_tensor import FakeTensorMode

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import _guard

# Two orders of summation and a norm's rounding, relative to the gradient; float32's unit roundoff is 6e-8.
GRADIENT_FLOOR = 5e-7


def cast(tree: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating tensors of the arguments in another dtype."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def output_of(result: Any) -> torch.Tensor:
    """The tensor that a model or block returns; the concatenation of several."""
    if hasattr(result, "audio_sample"):
        result = result.to_tuple()
    if hasattr(result, "sample"):
        return result.sample
    if isinstance(result, tuple):
        return torch.cat([part.flatten() for part in result if part is not None])
    return result


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """A call that leaves the fused path by surprise is an error. Import it into the test file."""
    _guard._WARNED.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "patched ", VidkernelsFallbackWarning)
        yield


class ModelSuite:
    """Subclasses say how to build a small model with every parameter at work, and its inputs.

    Attributes:
        rules: rule -> number of modules that it patches in `build()`.
        leaves: floating inputs that need gradients.
        lora: names of linear layers that LoRA wraps.
        hooked: submodules whose forward hook must fire.
        bypassed: those among them whose hook sends a block to its original forward.
        compiles_quickly: whether the whole model is compiled in the quick tests, too: one of each kind of block is enough.
        zero_gradients: endings of parameters whose true gradient is zero (a key's bias before softmax).
    """

    rules: ClassVar[dict[str, int]]
    leaves: ClassVar[tuple[str, ...]] = ("hidden_states",)
    lora: ClassVar[tuple[str, ...]] = ()
    hooked: ClassVar[tuple[str, ...]] = ()
    bypassed: ClassVar[tuple[str, ...]] = ()
    zero_gradients: ClassVar[tuple[str, ...]] = ("to_k.bias",)
    compiles_quickly: ClassVar[bool] = True

    def build(self, **changes: Any) -> Any:
        raise NotImplementedError

    def inputs(self, **changes: Any) -> dict[str, Any]:
        raise NotImplementedError

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        """Random configuration and inputs."""
        raise NotImplementedError

    def ready(self, **changes: Any) -> Any:
        """A model in eval mode whose zero-initialised parameters are at work."""
        torch.manual_seed(0)
        model = self.build(**changes).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any() or (parameter == 1).all():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def patch(self, model: Any, **options: Any) -> Any:
        """Patch with the rules under test alone, and check that they matched."""
        report = vidkernels.patch(model, ops=tuple(self.rules), **options)
        counts = {rule: sum(entry.rule == rule for entry in report.patched) for rule in self.rules}
        assert counts == self.expected(model), report.details()
        return report

    def expected(self, model: Any) -> dict[str, int]:
        return dict(self.rules)

    def compare(self, model: Any, arguments: dict[str, Any]) -> None:
        double = copy.deepcopy(model).double()
        with torch.no_grad():
            expected = output_of(model(**arguments))
            self.patch(model)
            actual = output_of(model(**arguments))
            assert_within_promise(actual, expected, output_of(double(**cast(arguments, torch.float64))))
        assert not vidkernels.status(model).fallbacks

    @pytest.mark.parametrize("seed", range(3))
    def test_random_configurations(self, seed: int) -> None:
        changes, arguments = self.random_changes(random.Random(seed))
        model = self.ready(**changes)
        self.compare(model, self.inputs(**arguments))

    def test_bfloat16(self) -> None:
        self.compare(self.ready().bfloat16(), cast(self.inputs(), torch.bfloat16))

    def test_autocast(self) -> None:
        model, arguments = self.ready(), self.inputs()
        with torch.no_grad():
            truth = output_of(copy.deepcopy(model).double()(**cast(arguments, torch.float64)))
            with torch.autocast("cpu", torch.bfloat16):
                expected = output_of(model(**arguments))
                self.patch(model)
                actual = output_of(model(**arguments))
            assert_within_promise(actual, expected, truth)
        assert not vidkernels.status(model).fallbacks

    def gradients(self, model: Any, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
        arguments = {k: v.detach().requires_grad_() if k in self.leaves else v for k, v in arguments.items()}
        y = output_of(model(**arguments))
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y)
        wanted = {**{k: arguments[k] for k in self.leaves}, **dict(model.named_parameters())}
        found = torch.autograd.grad((y * weight).sum(), list(wanted.values()), allow_unused=True)
        return {key: g for key, g in zip(wanted, found, strict=True) if g is not None}

    def test_gradients(self) -> None:
        """L2 error of every gradient against float64: at most twice the original's, or a few roundings."""
        model, arguments = self.ready(), self.inputs()
        truth = self.gradients(copy.deepcopy(model).double(), cast(arguments, torch.float64))
        before = self.gradients(model, arguments)
        self.patch(model, mode="training")
        after = self.gradients(model, arguments)
        assert after.keys() == before.keys() == truth.keys()
        for key, exact in truth.items():
            if not exact.any():  # a text stream whose output the last block drops
                assert not after[key].any(), key
            elif not key.endswith(self.zero_gradients):
                errors = [float((g[key].double() - exact).norm() / exact.norm()) for g in (before, after)]
                assert errors[1] <= 2 * errors[0] + GRADIENT_FLOOR, f"{key}: {errors}"
        assert not vidkernels.status(model).fallbacks

    def test_gradient_checkpointing(self) -> None:
        model, arguments = self.ready(), self.inputs()
        self.patch(model)
        plain = self.gradients(model, arguments)
        model.enable_gradient_checkpointing()
        again = self.gradients(model, arguments)
        assert all(torch.equal(plain[key], again[key]) for key in plain)

    def test_lora_is_honoured(self) -> None:
        peft = pytest.importorskip("peft")
        model, arguments = self.ready(), self.inputs()
        self.patch(model)
        with torch.no_grad():
            before = output_of(model(**arguments))
            config = peft.LoraConfig(target_modules=list(self.lora), init_lora_weights=False)
            peft.inject_adapter_in_model(config, model)
            after = output_of(model(**arguments))
            assert not torch.allclose(before, after, atol=1e-3)
            vidkernels.unpatch(model)
            torch.testing.assert_close(after, output_of(model(**arguments)), atol=2e-5, rtol=1e-4)

    def test_hooks_inside_fire(self) -> None:
        arguments = self.inputs()
        for path in self.hooked:
            model, seen = self.ready(), []
            with torch.no_grad(), warnings.catch_warnings():
                expected = output_of(model(**arguments))
                self.patch(model)
                model.get_submodule(path).register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
                if path in self.bypassed:
                    warnings.simplefilter("ignore", VidkernelsFallbackWarning)
                actual = output_of(model(**arguments))
            assert len(seen) == 1, path
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)

    def test_compiles_without_graph_break(self, request: pytest.FixtureRequest) -> None:
        if not self.compiles_quickly and not request.config.getoption("--slow"):
            pytest.skip("slow: run with --slow")
        model, arguments = self.ready(), self.inputs()
        self.patch(model)
        with torch.no_grad():
            expected = output_of(model(**arguments))
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(output_of(compiled(**arguments)), expected, atol=1e-5, rtol=1e-4)
        torch._dynamo.reset()

    def test_shapes_without_values(self) -> None:
        """On the meta device and under a fake mode: rules that look at tables must not."""
        model, arguments = self.ready(), self.inputs()
        with torch.no_grad():
            expected = output_of(model(**arguments))
            self.patch(model)
            fakes = FakeTensorMode(allow_non_fake_inputs=True)
            moves = {"fake": fakes.from_tensor, "meta": lambda tensor: tensor.to("meta")}
            for kind, move in moves.items():
                inputs = torch.utils._pytree.tree_map_only(torch.Tensor, move, arguments)
                with fakes if kind == "fake" else contextlib.nullcontext():
                    found = output_of((model.to("meta") if kind == "meta" else model)(**inputs))
                assert found.shape == expected.shape and found.dtype == expected.dtype, kind

    def test_state_verify_and_undo(self) -> None:
        model, arguments = self.ready(), self.inputs()
        classes = [type(module) for module in model.modules()]
        state = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
        with torch.no_grad():
            before = output_of(model(**arguments))
            report = self.patch(model, verify=True, mode="training")
            assert all(item.ok for item in report.numerics) and report.numerics
            after = model.state_dict()
            assert list(after) == list(state)
            assert all(after[key].data_ptr() == value[0] for key, value in state.items())
            assert all(torch.equal(after[key], value[1]) for key, value in state.items())
            report.undo()
            assert [type(module) for module in model.modules()] == classes
            assert torch.equal(output_of(model(**arguments)), before)
            assert self.patch(model, verify=((), arguments), mode="inference").numerics
