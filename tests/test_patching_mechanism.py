# SPDX-License-Identifier: Apache-2.0
"""The re-classing itself: state, copies, pickles, undo, hooks, order with other tools. No kernel is needed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator

import patching_toys as toys
import pytest
import torch
from helpers import ROOT, run_python
from torch import nn

import vidkernels
from vidkernels.errors import OptionError, PatchError, VidkernelsFallbackWarning
from vidkernels.patching import _guard, _mechanism, _rule


@pytest.fixture(autouse=True)
def toy_rules() -> Iterator[None]:
    """The toy rules are known during the test only, and every test sees the first fallback warning."""
    before = list(_rule._USER)
    vidkernels.register_rule(toys.gate_rule())
    toys.CALLS.clear()
    _guard._WARNED.clear()
    yield
    _rule._USER[:] = before


def fused_calls() -> int:
    return sum(toys.CALLS.values())


def test_outputs_and_state_stay() -> None:
    model, x = toys.Model(), torch.randn(5, 6)
    expected = model(x)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    buffers, modules = list(model.buffers()), list(model.modules())
    report = vidkernels.patch(model)
    torch.testing.assert_close(model(x), expected)
    assert fused_calls() == 3
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [entry.name for entry in report.patched] == ["blocks.0", "blocks.1"]


def test_class_is_still_the_upstream_class() -> None:
    model = toys.Model()
    vidkernels.patch(model)
    gate = model.blocks[0]
    assert isinstance(gate, toys.Gate)
    assert type(gate).__name__ == "Gate" and type(gate).__qualname__ == "Gate"
    assert type(gate) is type(model.blocks[1])
    assert "Gate[vk:toy_gate](" in repr(model)
    assert "Tanh()" in repr(model)


def test_undo_is_exact() -> None:
    model = toys.Model()
    attributes = [set(m.__dict__) for m in model.modules()]
    classes = [type(m) for m in model.modules()]
    assert vidkernels.patch(model).undo() == 2
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
    vidkernels.patch(model)
    assert vidkernels.unpatch(model) == 2
    assert vidkernels.unpatch(model) == 0
    assert [set(m.__dict__) for m in model.modules()] == attributes


def test_second_patch_reports_already_and_honours_new_arguments() -> None:
    model, x = toys.Model(), torch.randn(2, 6)
    first = vidkernels.patch(model, backend="reference")
    second = vidkernels.patch(model, backend="reference")
    assert {entry.state for entry in second.entries} == {"already"} and bool(second)
    third = vidkernels.patch(model, backend={"toy_gate": "triton"})
    assert "from reference to triton" in third.entries[0].reason
    model(x)
    assert set(toys.CALLS) == {"triton"}
    assert second.undo() == 0 and vidkernels.status(model).patched == "all"
    assert first.undo() == 2


def test_deepcopy_runs_its_own_weights() -> None:
    model, x = toys.Model(), torch.randn(4, 6)
    vidkernels.patch(model)
    twin = copy.deepcopy(model)
    assert type(twin.blocks[0]) is type(model.blocks[0])
    assert twin.again is twin.blocks[0]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    halved = torch.tanh(torch.tanh(x / 2) / 2) / 2
    torch.testing.assert_close(twin(x), halved)
    assert not torch.allclose(model(x), halved)
    vidkernels.unpatch(twin)
    assert vidkernels.status(model).patched == "all"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_comes_back_patched(protocol: int) -> None:
    model, x = toys.Model(), torch.randn(4, 6)
    vidkernels.patch(model, backend="reference")
    loaded = pickle.loads(pickle.dumps(model, protocol))
    assert type(loaded.blocks[0]) is type(model.blocks[0])
    assert torch.equal(loaded(x), model(x))
    assert _mechanism.backends(loaded.blocks[1]) == {"toy_gate": "reference"}
    assert vidkernels.unpatch(loaded) == 2


def test_torch_save_and_load() -> None:
    model, x = toys.Model(), torch.randn(4, 6)
    vidkernels.patch(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(x), model(x)) and vidkernels.status(loaded).patched == "all"


def test_pickle_of_a_base_with_its_own_reduce() -> None:
    gate = ReducedGate(6)
    vidkernels.patch(gate)
    loaded = pickle.loads(pickle.dumps(gate))
    assert type(loaded) is type(gate) and loaded.width == 6
    x = torch.randn(2, 6)
    assert loaded(x).shape == x.shape and fused_calls() == 1


class ReducedGate(toys.Gate):
    """An upstream class that pickles itself by its constructor's arguments."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.width = width

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.width,)


def test_spawned_workers_come_up_patched(tmp_path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch, patching_toys as toys, vidkernels

def work(rank, model, queue):
    y = model(torch.ones(1, 6))  # the worker registered no rule: the pickled module brings its class along
    queue.put((sum(toys.CALLS.values()), repr(model).count("[vk:"), y.detach().numpy().tolist()))

if __name__ == "__main__":
    vidkernels.register_rule(toys.gate_rule())
    model = toys.Model()
    vidkernels.patch(model)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=work, args=(0, model, queue))
    process.start(); process.join(60)
    calls, tags, y = queue.get()
    torch.testing.assert_close(torch.tensor(y), model(torch.ones(1, 6)))
    print(calls, tags)
"""
    path = tmp_path / "spawned_worker.py"
    path.write_text(code)
    assert run_python(f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')").strip() == "3 2"


def test_load_state_dict_between_patched_and_unpatched() -> None:
    patched, plain, x = toys.Model(), toys.Model(), torch.randn(3, 6)
    vidkernels.patch(patched)
    plain.load_state_dict(patched.state_dict(), strict=True)
    torch.testing.assert_close(plain(x), patched(x))
    patched.load_state_dict(toys.Model().state_dict(), strict=True)


def test_dtype_and_device_moves_after_patching() -> None:
    model, x = toys.Model(), torch.randn(3, 6)
    vidkernels.patch(model)
    narrow = model(x)
    wide = model.double()(x.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), narrow)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_two_models_of_one_class_do_not_share_anything() -> None:
    one, other, x = toys.Model(), toys.Model(), torch.randn(2, 6)
    vidkernels.patch(one, backend="reference")
    assert vidkernels.status(other).patched == "none"
    other(x)
    assert fused_calls() == 0
    vidkernels.patch(other, backend="triton")
    one(x)
    assert set(toys.CALLS) == {"reference"}
    vidkernels.unpatch(other)
    assert vidkernels.status(one).patched == "all"
    assert toys.Gate.forward.__qualname__ == "Gate.forward"


def test_training_gradients_and_checkpointing() -> None:
    model, x = toys.Model(), torch.randn(5, 6, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    vidkernels.patch(model, mode="training")
    actual = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    h = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    again = torch.autograd.grad(h.square().sum(), [x, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


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
        toys.gate_rule(name="toys.free", targets=("test_patching_mechanism:FreeGate",), digests={}, mixin=FastFree)
    )
    vidkernels.patch(stateless)
    with pytest.warns(VidkernelsFallbackWarning, match=r"torch\.func transform"):
        actual = torch.func.vmap(stateless)(x)
    torch.testing.assert_close(actual, stateless(x))


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


def test_context_managers() -> None:
    model = toys.Model()
    with vidkernels.patch(model) as report:
        assert report and vidkernels.status(model).patched == "all"
        with vidkernels.unpatched(model):
            assert vidkernels.status(model).patched == "none"
            assert "vidkernels" not in str(pickle.dumps(model))
        assert vidkernels.status(model).patched == "all"
    assert vidkernels.status(model).patched == "none"
    with pytest.raises(ZeroDivisionError), vidkernels.patched(model, backend="reference"):
        raise ZeroDivisionError
    assert vidkernels.status(model).patched == "none"


def test_report_keeps_no_weights_alive() -> None:
    model = toys.Model()
    report = vidkernels.patch(model)
    gone = weakref.ref(model.blocks[0])
    del model
    gc.collect()
    assert gone() is None and len(report.patched) == 2 and report.undo() == 0


def test_dynamic_classes_do_not_pile_up() -> None:
    before = len(_mechanism._CLASSES)
    for _ in range(5):
        local = type("Gate", (toys.Gate,), {})
        gate = local(4)
        vidkernels.patch(gate)
        del gate, local
    gc.collect()
    assert len(_mechanism._CLASSES) <= before + 1


def test_ema_copy_made_before_is_reported_unpatched() -> None:
    model = toys.Model()
    ema = torch.optim.swa_utils.AveragedModel(model)
    vidkernels.patch(model)
    assert vidkernels.status(model).patched == "all" and vidkernels.status(ema).patched == "none"
    later = torch.optim.swa_utils.AveragedModel(model)
    assert vidkernels.status(later).patched == "all"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"ops": "toy_gat"}, OptionError, "Did you mean 'toy_gate'"),
        ({"ops": ("toy_gate", "nothing_like_it")}, OptionError, "nothing_like_it"),
        ({"backend": "tritn"}, OptionError, "Did you mean 'triton'"),
        ({"backend": {"toy_gat": "triton"}}, OptionError, "Did you mean 'toy_gate'"),
        ({"mode": "train"}, OptionError, "auto, inference, training"),
        ({"tolerance": 0.1}, OptionError, "default, exact"),
        ({"exclude": "*"}, PatchError, "excluded by the caller"),
    ],
    ids=["op", "op-far", "backend", "backend-op", "mode", "tolerance", "all-excluded"],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], text: str) -> None:
    model = toys.Model()
    with pytest.raises(error, match=text):
        vidkernels.patch(model, **arguments)
    assert vidkernels.status(model).patched == "none"


def test_wrong_model() -> None:
    with pytest.raises(OptionError, match=r"torch\.nn\.Module or a pipeline"):
        vidkernels.patch(42)
    with pytest.raises(PatchError, match="No rule knows any of its modules"):
        vidkernels.patch(nn.Linear(2, 2))
    assert not vidkernels.patch(nn.Linear(2, 2), strict=False)


def test_failure_half_way_restores_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.Model(depth=4)
    original, count = _mechanism.set_backends, []

    def fail_third(module: nn.Module, backends: dict[str, str]) -> None:
        count.append(module)
        if len(count) == 3:
            raise MemoryError
        original(module, backends)

    monkeypatch.setattr(_mechanism, "set_backends", fail_third)
    with pytest.raises(MemoryError):
        vidkernels.patch(model)
    assert all(type(block) is toys.Gate for block in model.blocks)
    assert all(not any("vidkernels" in key for key in block.__dict__) for block in model.blocks)
