# SPDX-License-Identifier: Apache-2.0
"""The re-classing itself: state, copies, pickles, undo, context managers, wrong arguments. No kernel is needed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import types
import weakref

import patching_toys as toys
import pytest
import torch
from helpers import ROOT, run_python
from patching_toys import fused_calls, toy_rules  # noqa: F401
from torch import nn

import vidkernels
from vidkernels.errors import OptionError, PatchError
from vidkernels.patching import _mechanism


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


def test_a_module_shared_by_two_components_is_undone_once() -> None:
    model = toys.Model()
    pipeline = types.SimpleNamespace(components={"one": model, "other": nn.Sequential(model.blocks[0])})
    report = vidkernels.patch(pipeline)
    assert type(model.blocks[0]) is type(model.blocks[1])
    with vidkernels.patching.unpatched(pipeline):
        assert type(model.blocks[0]) is toys.Gate
    assert report.undo() == 2 and type(model.blocks[0]) is toys.Gate
    vidkernels.patch(pipeline)
    assert vidkernels.unpatch(pipeline) == 2 and vidkernels.status(pipeline).patched == "none"


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


def test_a_rule_registered_again_with_other_ops_has_a_class_of_its_own() -> None:
    """Modules patched before keep their class and ops, and the report says those."""
    model, later = toys.Model(), toys.Model()
    vidkernels.patch(model)
    vidkernels.register_rule(toys.gate_rule(ops=("toy_gate", "channel_norm")))
    report = vidkernels.patch(later, backend={"channel_norm": "reference"})
    for entry in report.patched:
        gate = later.get_submodule(entry.name)
        assert entry.op == "toy_gate+channel_norm" == "+".join(gate._vidkernels_ops)
        assert gate._vidkernels_backend("channel_norm") == "reference"
    assert vidkernels.status(later).ops == {"toy_gate": 2, "channel_norm": 2}
    assert {entry.op for entry in vidkernels.patch(model).patched} == {"toy_gate"}
    assert vidkernels.status(model).ops == {"toy_gate": 2}
    assert type(copy.deepcopy(later.blocks[0])) is type(later.blocks[0]) is not type(model.blocks[0])


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
        ({"mode": "train"}, OptionError, "'auto', 'inference', 'training'"),
        ({"tolerance": 0.1}, OptionError, "'default', 'exact'"),
        ({"exclude": 5}, OptionError, "exclude: expected patterns of module names"),
        ({"ops": 5}, OptionError, "ops: expected 'auto' or names"),
        ({"backend": 5}, OptionError, "backend: expected a name, or a mapping"),
        ({"strict": "no"}, OptionError, "strict: expected"),
        ({"exclude": "*"}, PatchError, "excluded by the caller"),
    ],
    ids=[
        "op",
        "op-far",
        "backend",
        "backend-op",
        "mode",
        "tolerance",
        "exclude-5",
        "op-5",
        "backend-5",
        "flag",
        "all-excluded",
    ],
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
