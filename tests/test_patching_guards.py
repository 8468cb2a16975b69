# SPDX-License-Identifier: Apache-2.0
"""What is put on a model after or before patching is honoured or refused: hooks, LoRA, parametrizations, transforms."""

from __future__ import annotations

import patching_toys as toys
import pytest
import torch
from patching_toys import fused_calls, toy_rules  # noqa: F401
from torch import nn

import vidkernels
from vidkernels.errors import PatchError, VidkernelsFallbackWarning
from vidkernels.patching import Fused, _guard, digest


def test_hooks_on_the_module_itself_fire() -> None:
    model, seen = toys.Model(), []
    model.blocks[0].register_forward_hook(lambda m, i, o: seen.append("forward"))
    model.blocks[0].register_full_backward_hook(lambda m, i, o: seen.append("backward"))
    vidkernels.patch(model)
    model(torch.randn(2, 6, requires_grad=True)).sum().backward()
    assert seen == ["forward", "forward", "backward", "backward"] and fused_calls() == 3


def test_hook_on_a_bypassed_child_added_later_fires() -> None:
    model, seen = toys.Model(), []
    vidkernels.patch(model)
    handle = model.blocks[1].lin.register_forward_hook(lambda m, i, o: seen.append(m))
    with pytest.warns(VidkernelsFallbackWarning, match="has hooks"):
        model(torch.randn(2, 6))
    assert seen == [model.blocks[1].lin] and fused_calls() == 2
    assert vidkernels.status(model).fallbacks == {"a child Linear has hooks": 1}
    handle.remove()
    model(torch.randn(2, 6))
    assert fused_calls() == 5


def test_global_module_hook_fires_for_children() -> None:
    model, seen = toys.Model(), []
    vidkernels.patch(model)
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        with pytest.warns(VidkernelsFallbackWarning, match="global module hooks"):
            model(torch.randn(2, 6))
    finally:
        handle.remove()
    assert seen.count("Linear") == 3


def test_child_wrapped_after_patching_is_honoured() -> None:
    model, x = toys.Model(), torch.randn(2, 6)
    vidkernels.patch(model)
    wrapper = nn.Sequential(model.blocks[1].lin, nn.Dropout(0.0), nn.LayerNorm(6))
    model.blocks[1].lin = wrapper
    with pytest.warns(VidkernelsFallbackWarning, match=r"a child is a \S*Sequential"):
        actual = model(x)
    vidkernels.unpatch(model)
    torch.testing.assert_close(actual, model(x))


def test_lora_after_patching_is_honoured() -> None:
    peft = pytest.importorskip("peft")
    model, x = toys.Model(), torch.randn(4, 6)
    vidkernels.patch(model)
    before = model(x)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lin"], init_lora_weights=False))
    with pytest.warns(VidkernelsFallbackWarning, match=r"a child is a peft\.tuners\.lora\.layer\.Linear, not a Linear"):
        after = tuned(x)
    assert not torch.allclose(before, after), "the adapter has no effect"
    vidkernels.unpatch(tuned)
    torch.testing.assert_close(after, tuned(x))


def test_instance_forward_is_refused_then_repaired() -> None:
    model = toys.Model()
    gate = model.blocks[1]
    original = gate.forward
    gate.forward = lambda x: original(x) + 1
    with pytest.raises(PatchError, match=r"blocks\.1 \(Gate\) cannot be patched: its instance has its own `forward`"):
        vidkernels.patch(model)
    assert vidkernels.status(model).patched == "none"
    report = vidkernels.patch(model, strict=False)
    assert [e.name for e in report.patched] == ["blocks.0"] and [e.name for e in report.skipped] == ["blocks.1"]
    report.undo()
    del gate.forward
    assert len(vidkernels.patch(model).patched) == 2


def test_child_with_instance_forward_is_refused() -> None:
    gate = toys.Gate(6)
    gate.lin.forward = lambda x: x
    with pytest.raises(PatchError, match="its child lin has its own `forward`"):
        vidkernels.patch(gate)


def test_accelerate_hook_before_patching_is_refused_and_after_makes_it_irregular() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = toys.Model()
    hooks.add_hook_to_module(model.blocks[0], hooks.ModelHook())
    with pytest.raises(PatchError, match="own `forward`"):
        vidkernels.patch(model)
    hooks.remove_hook_from_module(model.blocks[0])
    assert "forward" in model.blocks[0].__dict__, "removal used to leave the class's forward bound on the instance"
    vidkernels.patch(model)
    model(torch.randn(2, 6))
    assert fused_calls() == 3
    hooks.add_hook_to_module(model.blocks[0], hooks.ModelHook())
    status = vidkernels.status(model)
    assert status.patched == "irregular" and "blocks.0" in status.remarks[0]


class Hooked:
    """How accelerate and diffusers put a hook on a module and take it away again."""

    def __init__(self, library: str) -> None:
        self.hooks = pytest.importorskip("accelerate.hooks" if library == "accelerate" else "diffusers.hooks")

    def add(self, module: nn.Module) -> None:
        if hasattr(self.hooks, "HookRegistry"):
            self.hooks.HookRegistry.check_if_exists_or_initialize(module).register_hook(self.hooks.ModelHook(), "mine")
        else:
            self.hooks.add_hook_to_module(module, self.hooks.ModelHook())

    def remove(self, module: nn.Module) -> None:
        if hasattr(self.hooks, "HookRegistry"):
            self.hooks.HookRegistry.check_if_exists_or_initialize(module).remove_hook("mine")
        else:
            self.hooks.remove_hook_from_module(module)


@pytest.mark.parametrize("library", ["accelerate", "diffusers"])
@pytest.mark.parametrize("order", ["unpatch first", "remove first"])
def test_hook_on_a_patched_module_outlives_the_patch(library: str, order: str) -> None:
    """Such a hook binds the fused `forward` and leaves it on the instance: it used to run, or crash, after `unpatch`."""
    hooked, model, x = Hooked(library), toys.Model(), torch.randn(2, 6)
    expected, count = model(x), len(vidkernels.patch(model).patched)
    hooked.add(model.blocks[0])
    torch.testing.assert_close(model(x), expected)
    before = fused_calls()
    steps = [lambda: vidkernels.unpatch(model), lambda: hooked.remove(model.blocks[0])]
    for step in steps if order == "unpatch first" else reversed(steps):
        step()
        torch.testing.assert_close(model(x), expected)
    assert fused_calls() == before + (3 if order == "remove first" else 0)
    assert len(vidkernels.patch(model).patched) == count
    model(x)
    assert fused_calls() == before + (6 if order == "remove first" else 3)


def test_parametrized_module_is_not_unpatched_behind_its_back() -> None:
    gate = toys.Gate(6)
    vidkernels.patch(gate)
    nn.utils.parametrize.register_parametrization(gate, "mix", nn.Identity())
    assert vidkernels.status(gate).patched == "irregular"
    with pytest.raises(PatchError, match="re-classed after patching"):
        vidkernels.unpatch(gate)
    nn.utils.parametrize.remove_parametrizations(gate, "mix")
    assert vidkernels.unpatch(gate) == 1 and type(gate) is toys.Gate


def test_parametrized_base_is_matched_by_isinstance_and_child_falls_back() -> None:
    gate, x = toys.Gate(6), torch.randn(2, 6)
    nn.utils.parametrize.register_parametrization(gate, "mix", nn.Identity())
    vidkernels.patch(gate)
    gate(x)
    assert fused_calls() == 1
    nn.utils.parametrize.register_parametrization(gate.lin, "weight", Doubled())
    with pytest.warns(VidkernelsFallbackWarning, match="ParametrizedLinear"):
        actual = gate(x)
    vidkernels.unpatch(gate)
    torch.testing.assert_close(actual, gate(x))


class Doubled(nn.Module):
    """A parametrization with an effect."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_functional_call_and_func_transforms() -> None:
    gate, x = toys.Gate(6), torch.randn(4, 6)
    vidkernels.patch(gate)
    state = {name: torch.zeros_like(value) for name, value in gate.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(gate, state, (x,)), 0.5 * x)
    assert fused_calls() == 1
    stateless = FreeGate(6)
    vidkernels.register_rule(
        toys.gate_rule(name="toys.free", targets=("test_patching_guards:FreeGate",), digests={}, mixin=FastFree)
    )
    vidkernels.patch(stateless)
    with pytest.warns(VidkernelsFallbackWarning, match=r"torch\.func transform"):
        actual = torch.func.vmap(stateless)(x)
    torch.testing.assert_close(actual, stateless(x))


def test_make_fx_records_the_original() -> None:
    """It records torch's ops: a fused forward that looks at values stopped it."""
    gate, x = toys.Gate(6), torch.randn(4, 6)
    vidkernels.patch(gate)
    with torch.no_grad(), pytest.warns(VidkernelsFallbackWarning, match="traced for export"):
        graph = torch.fx.experimental.proxy_tensor.make_fx(gate)(x)
        torch.testing.assert_close(graph(x), gate(x))
    assert fused_calls() == 1 and not any("lerp" in str(node.target) for node in graph.graph.nodes)


class FreeGate(nn.Module):
    """Upstream module without state, so that `vmap` can run it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x).relu()


class FastFree(nn.Module):
    """Rule's mixin for `FreeGate`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        reason = _guard.call_reason(x)
        if reason is not None:
            _guard.note_fallback(self, reason)
            return super().forward(x)
        return torch.nn.functional.linear(x, self.lin.weight, self.lin.bias).clamp(min=0)


class Scaled(nn.Module):
    """Upstream module with an option, which knows nothing of `offset`."""

    def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return factor * x


class FastScaled(Fused):
    """Rule's mixin for `Scaled` and a copy with another option."""

    @_guard.guarded
    def forward(self, x: torch.Tensor, factor: float = 1.0, *, offset: float = 0.0) -> torch.Tensor:
        return x.clone()

    def _reason(self, factor: float, **rest: object) -> str | None:
        assert rest.keys() == {"x", "offset"} and rest["offset"] == 0.0
        return None if factor == 1.0 else f"the factor is {factor}"


def test_guarded_forward_hands_the_call_on_as_it_was_made() -> None:
    """`_reason` sees every argument by name, with defaults; the original gets only what the caller gave."""
    vidkernels.register_rule(
        toys.gate_rule(name="toys.scaled", targets=("test_patching_guards:Scaled",), digests={}, mixin=FastScaled)
    )
    module, x = Scaled(), torch.randn(3)
    vidkernels.patch(module)
    for served in ((x,), (x, 1.0)):
        assert torch.equal(module(*served), x)
    assert torch.equal(module(x=x, factor=1.0), x) and not vidkernels.status(module).fallbacks
    with pytest.warns(VidkernelsFallbackWarning, match="the factor is 2.0"):
        assert torch.equal(module(x, 2.0), 2 * x)
    assert torch.equal(module(x, factor=2.0), 2 * x)
    assert vidkernels.status(module).fallbacks == {"the factor is 2.0": 2}


def test_kwarg_that_the_fused_forward_cannot_honour() -> None:
    gate, x, mask = toys.Gate(6), torch.randn(2, 6), torch.tensor([0.0, 1, 0, 1, 0, 1])
    expected = gate(x, mask=mask)
    vidkernels.patch(gate)
    with pytest.warns(VidkernelsFallbackWarning, match="a mask is given"):
        torch.testing.assert_close(gate(x, mask=mask), expected)


def test_warning_once_and_strict_environment(monkeypatch: pytest.MonkeyPatch, recwarn) -> None:
    gate, x, mask = toys.Gate(6), torch.randn(2, 6), torch.ones(6)
    vidkernels.patch(gate)
    for _ in range(3):
        gate(x, mask)
    assert len([w for w in recwarn if issubclass(w.category, VidkernelsFallbackWarning)]) == 1
    assert vidkernels.status(gate).fallbacks == {"a mask is given": 3}
    monkeypatch.setattr("vidkernels._env.STRICT", True)
    with pytest.raises(vidkernels.errors.BackendUnavailable, match="a mask is given"):
        gate(x, mask)


class Helped(nn.Module):
    """Upstream module whose forward calls a helper."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.helper(x) + 1

    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class FastHelped(nn.Module):
    """Rule's mixin for `Helped`, which stands in for the helper, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.add(torch.ones_like(x), x, alpha=2)


class MyHelped(Helped):
    """A user's subclass with another helper."""

    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * x


def test_user_override_of_a_helper_is_refused() -> None:
    """Only `forward` was looked at: the patch ran the helper of the base class."""
    known = {f"Helped.{name}": (digest(getattr(Helped, name)),) for name in ("forward", "helper")}
    fields = {"name": "toys.helped", "targets": ("test_patching_guards:Helped",), "mixin": FastHelped}
    vidkernels.register_rule(toys.gate_rule(**fields, digests=known, reads=()))
    assert vidkernels.patch(Helped())
    with pytest.raises(PatchError, match=r"MyHelped overrides Helped\.helper, which the patch would bypass"):
        vidkernels.patch(MyHelped())
    instance = Helped()
    instance.helper = lambda x: x
    with pytest.raises(PatchError, match="its instance has its own `helper`"):
        vidkernels.patch(instance)
