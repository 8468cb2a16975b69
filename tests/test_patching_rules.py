# SPDX-License-Identifier: Apache-2.0
"""Which rule fits which module, the reports, and `verify`. No kernel is needed."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import patching_toys as toys
import pytest
import torch
from torch import nn

import vidkernels
from vidkernels.errors import OptionError, PatchError
from vidkernels.patching import Rule, _rule, _verify


@pytest.fixture(autouse=True)
def toy_rules() -> Iterator[None]:
    """The toy rules are known during the test only."""
    before = list(_rule._USER)
    vidkernels.register_rule(toys.gate_rule())
    toys.CALLS.clear()
    yield
    _rule._USER[:] = before


def vendored(tmp_path: Path, change: tuple[str, str] | None = None) -> ModuleType:
    """The upstream file copied into another project, perhaps edited."""
    source = Path(toys.__file__).read_text()
    if change is not None:
        assert change[0] in source
        source = source.replace(*change)
    path = tmp_path / "vendored_toys.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("vendored_toys", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["vendored_toys"] = module
    spec.loader.exec_module(module)
    return module


def test_subclass_without_own_forward_is_matched() -> None:
    child = type("Child", (toys.Gate,), {})(6)
    assert vidkernels.patch(child).patched[0].cls == "Child"


def test_user_override_of_forward_is_refused() -> None:
    class Mine(toys.Gate):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    report = vidkernels.patch(Mine(6), strict=False)
    assert not report and "overrides Gate.forward" in report.skipped[0].reason
    with pytest.raises(PatchError, match=r"overrides Gate\.forward"):
        vidkernels.patch(Mine(6))


def test_vendored_copy_with_equal_code_is_matched(tmp_path: Path) -> None:
    module = vendored(tmp_path, ("alpha = torch.sigmoid(self.mix)", "alpha = torch.sigmoid(self.mix)  # a comment\n"))
    gate, x = module.Gate(6), torch.randn(2, 6)
    expected = gate(x)
    vidkernels.patch(gate)
    torch.testing.assert_close(gate(x), expected)


def test_edited_copy_is_a_near_miss_then_registered(tmp_path: Path) -> None:
    module = vendored(
        tmp_path, ("alpha = torch.sigmoid(self.mix)\n        h", "alpha = torch.tanh(self.mix)\n        h")
    )
    gate, x = module.Gate(6), torch.randn(2, 6)
    report = vidkernels.explain(gate)
    assert not report and report.near_misses[0].state == "near_miss"
    assert "vendored_toys.Gate.forward has digest" in report.near_misses[0].reason
    assert "toys 1.0" in report.near_misses[0].reason and "register_rule" in report.near_misses[0].reason
    with pytest.raises(PatchError, match="near_miss"):
        vidkernels.patch(gate)
    mine = toys.gate_rule(name="mine", targets=("vendored_toys:Gate",), digests={}, mixin=TanhGate)
    vidkernels.register_rule(mine)
    expected = gate(x)
    vidkernels.patch(gate)
    torch.testing.assert_close(gate(x), expected)


class TanhGate(nn.Module):
    """The mixin that a user writes for an edited copy."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.lerp(self.lin(x), x, torch.tanh(self.mix))


def test_upgraded_library_is_a_near_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self, x, mask=None):
        return x

    monkeypatch.setattr(toys.Gate, "forward", forward)
    report = vidkernels.patch(toys.Model(), strict=False)
    assert not report and {entry.state for entry in report.entries} == {"near_miss"}


def test_name_alone_never_matches() -> None:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    vidkernels.register_rule(toys.gate_rule(name="toys.nodigest", digests={}))
    assert vidkernels.explain(Gate()).near_misses


def test_a_rule_of_the_whole_subsumes_the_rules_of_its_parts() -> None:
    vidkernels.register_rule(toys.pair_rule())
    model = nn.Sequential(toys.Pair(6), toys.Gate(6))
    report = vidkernels.patch(model)
    assert {(e.name, e.state) for e in report.entries} == {
        ("0", "patched"),
        ("0.first", "skipped"),
        ("0.second", "skipped"),
        ("1", "patched"),
    }
    assert "subsumed by 0 (toys.pair)" in report.skipped[0].reason
    assert vidkernels.status(model).patched == "all" and vidkernels.status(model).ops == {"toy_pair": 1, "toy_gate": 1}
    report.undo()
    parts = vidkernels.patch(model, ops="toy_gate")
    assert [e.name for e in parts.patched] == ["0.first", "0.second", "1"]
    assert vidkernels.status(model).patched == "some"


def test_excluding_the_whole_lets_its_parts_be_patched() -> None:
    vidkernels.register_rule(toys.pair_rule())
    report = vidkernels.patch(nn.Sequential(toys.Pair(6)), exclude=lambda name, module: isinstance(module, toys.Pair))
    assert [e.name for e in report.patched] == ["0.first", "0.second"]


def test_tied_modules_are_patched_once_under_all_names() -> None:
    report = vidkernels.patch(toys.Model())
    assert report.entries[0].aliases == ("again",)
    assert "blocks.0, again" in report.details()


def test_named_op_without_a_match_raises() -> None:
    vidkernels.register_rule(toys.pair_rule())
    with pytest.raises(PatchError, match="'toy_pair' matched nothing"):
        vidkernels.patch(toys.Model(), ops=("toy_gate", "toy_pair"))
    assert vidkernels.patch(toys.Model(), ops=("toy_gate", "toy_pair"), strict=False)


def test_rule_without_backward_and_modes() -> None:
    vidkernels.register_rule(toys.gate_rule(backward=False))
    report = vidkernels.patch(toys.Model(), mode="training", strict=False)
    assert not report and "no backward" in report.skipped[0].reason
    assert vidkernels.patch(toys.Model(), mode="inference")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda m: m.to("meta"), "meta device"),
        (lambda m: m.half().requires_grad_(False), None),
    ],
    ids=["meta", "half"],
)
def test_parameter_refusals(prepare, reason: str | None) -> None:
    report = vidkernels.patch(prepare(toys.Gate(6)), strict=False)
    if reason is None:
        assert report
    else:
        assert not report and reason in report.skipped[0].reason


def test_model_without_weights_is_refused_until_they_are_loaded() -> None:
    """A patch that left such modules out without a word would stay partial when the weights come."""
    model = toys.Model().to("meta")
    with pytest.raises(PatchError, match="on the meta device; patch after loading"):
        vidkernels.patch(model)
    model.load_state_dict(toys.Model().state_dict(), assign=True)
    assert len(vidkernels.patch(model).patched) == 2


def test_check_that_meets_other_layers_than_upstreams_refuses() -> None:
    """LoRA's convolutions have no `padding`: reading it ended `patch` with an AttributeError."""
    vidkernels.register_rule(toys.gate_rule(check=lambda m: None if m.lin.in_features == 6 else "width is not 6"))
    model = toys.Model()
    model.blocks[1].lin = nn.Sequential(nn.Linear(6, 6))
    report = vidkernels.patch(model)
    assert [entry.name for entry in report.patched] == ["blocks.0"]
    assert (
        "not as upstream builds them ('Sequential' object has no attribute 'in_features')" in report.skipped[0].reason
    )


def test_quantized_weight_is_refused_before_and_falls_back_after() -> None:
    class Int8Weight(torch.Tensor):
        """Stands for a quantized tensor subclass."""

    gate = toys.Gate(6)
    plain = gate.lin.weight
    gate.lin.weight = nn.Parameter(plain.detach().as_subclass(Int8Weight))
    report = vidkernels.patch(gate, strict=False)
    assert "lin.weight is a Int8Weight" in report.skipped[0].reason
    gate.lin.weight = plain
    vidkernels.patch(gate)
    gate.lin.weight = nn.Parameter(plain.detach().as_subclass(Int8Weight))
    with pytest.warns(vidkernels.errors.VidkernelsFallbackWarning, match="holds a Int8Weight"):
        gate(torch.randn(2, 6))


def test_dtype_and_structural_refusals() -> None:
    vidkernels.register_rule(toys.gate_rule(dtypes=(torch.float32,)))
    assert "dtype float64" in vidkernels.explain(toys.Gate(6).double()).skipped[0].reason
    vidkernels.register_rule(toys.gate_rule(check=lambda m: None if m.lin.in_features == 6 else "width is not 6"))
    assert vidkernels.explain(toys.Gate(6)) and not vidkernels.explain(toys.Gate(5))


def test_pipeline_components_and_prefixes() -> None:
    pipeline = SimpleNamespace(components={"vae": toys.Model(), "scheduler": object(), "text": nn.Linear(2, 2)})
    report = vidkernels.patch(pipeline, exclude="vae.blocks.1")
    assert [e.name for e in report.patched] == ["vae.blocks.0"]
    assert vidkernels.status(pipeline).patched == "some"
    assert vidkernels.unpatch(pipeline) == 1


def test_explain_changes_nothing() -> None:
    model = toys.Model()
    report = vidkernels.explain(model, backend="triton")
    assert report.dry_run and report.entries[0].backend == "triton"
    assert vidkernels.status(model).patched == "none"
    assert "would be patched" in str(report)


def test_report_texts_and_dict() -> None:
    model = toys.Model(depth=40)
    report = vidkernels.patch(model, backend="reference")
    assert str(report) == "patched      40 × Gate → toy_gate (reference)"
    assert len(report.details().splitlines()) == 40
    assert json.loads(json.dumps(report.to_dict()))["entries"][0]["state"] == "patched"
    many = vidkernels.patch(nn.Sequential(*(type(f"G{i}", (toys.Gate,), {})(4) for i in range(30))))
    assert len(str(many).splitlines()) <= 20 and "more groups" in str(many)
    assert "nothing to patch" in str(vidkernels.explain(nn.Linear(2, 2)))
    assert "patched: all" in str(vidkernels.status(model))


def test_rule_table_and_registration() -> None:
    table = vidkernels.rules()
    assert "toys.gate" in str(table) and table[0].name == "toys.gate"
    with pytest.raises(OptionError, match=r"vidkernels\.patching\.Rule"):
        vidkernels.register_rule("gate")
    with pytest.raises(OptionError, match="package.module:Class"):
        Rule(name="x", ops=("fsq",), targets=("torch.nn.Linear",), mixin=toys.FastGate)
    with pytest.raises(OptionError, match="at least one op"):
        Rule(name="x", ops=(), targets=("torch.nn:Linear",), mixin=toys.FastGate)


def test_backends_per_op() -> None:
    """One name goes to the ops that have such a backend, and the report says which those are."""
    from vidkernels.patching._rule import backend_of, check_backend

    rule = next(rule for rule in vidkernels.rules() if rule.name == "diffusers.vidtok.encoder")
    chosen = backend_of("cuda", rule)
    assert chosen == {"causal_conv3d": "auto", "channel_norm": "cuda", "alpha_blend": "cuda"}
    assert set(backend_of("reference", rule).values()) == {"reference"}
    assert backend_of({"channel_norm": "triton"}, rule)["channel_norm"] == "triton"
    with pytest.raises(OptionError, match="for channel_norm"):
        check_backend({"channel_norm": "cudnn"})
    with pytest.raises(OptionError, match="Did you mean 'reference'"):
        check_backend("referense")


def test_builtin_rules_import_no_model_library() -> None:
    from helpers import run_python

    code = (
        "import sys, vidkernels; vidkernels.rules(); print([m for m in sys.modules if m.split('.')[0] in "
        "('diffusers', 'transformers', 'triton', 'vector_quantize_pytorch', 'einops')])"
    )
    assert run_python(code).strip() == "[]"


def test_verify_passes_and_touches_nothing() -> None:
    model, x = toys.Model(), torch.randn(3, 6)
    model(x)
    calls, cache = model.blocks[0].calls.clone(), model.blocks[0].cache
    state = torch.get_rng_state()
    for sample in (True, x, (x,), {"x": x}, ((x,), {})):
        report = vidkernels.patch(model, verify=sample)
        assert report.numerics and all(item.ok for item in report.numerics)
        report.undo()
    assert torch.equal(model.blocks[0].calls, calls) and model.blocks[0].cache is cache
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_verify_costs_one_pass_per_class_and_shape() -> None:
    report = vidkernels.patch(toys.Model(depth=8), verify=True, mode="inference")
    assert [(item.name, item.what) for item in report.numerics] == [("blocks.0", "output 0")]


def test_verify_in_training_compares_gradients() -> None:
    report = vidkernels.patch(toys.Model(), verify=True, mode="training")
    assert {item.what for item in report.numerics} == {
        "output 0",
        "gradient of input 0",
        "gradient of lin.weight",
        "gradient of lin.bias",
        "gradient of mix",
    }


@pytest.mark.parametrize("sample", [True, torch.ones(2, 6)], ids=["synthetic", "given"])
def test_verify_refuses_wrong_numbers_and_rolls_back(sample) -> None:
    vidkernels.register_rule(toys.gate_rule(mixin=toys.WrongGate))
    model = toys.Model()
    with pytest.raises(PatchError, match=r"(?s)blocks\.0 \[Gate\] output 0 on .*float32.*exclude=\('blocks\.0',\)"):
        vidkernels.patch(model, verify=sample, mode="inference")
    assert vidkernels.status(model).patched == "none"
    assert all(type(block) is toys.Gate for block in model.blocks)


class WrongBackward(nn.Module):
    """A mixin whose forward is right and whose gradient of one parameter is off by one part in ten thousand."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x, mask)
        detour = 1e-4 * self.lin.bias
        return y + (detour - detour.detach())


def test_verify_refuses_wrong_gradients() -> None:
    vidkernels.register_rule(toys.gate_rule(mixin=WrongBackward))
    model = toys.Model()
    vidkernels.patch(model, verify=True, mode="inference").undo()
    with pytest.raises(PatchError, match=r"gradient of lin\.bias"):
        vidkernels.patch(model, verify=True, mode="training")


class Twice(nn.Module):
    """Exact in float32, whatever the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class OneRoundingOff(nn.Module):
    """A mixin with an error as large as a rounding of the input makes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + 2.0**-23)


def test_verify_runs_the_original_again_before_a_lucky_run_condemns(monkeypatch: pytest.MonkeyPatch) -> None:
    nudge, seeds = _verify._nudge, []
    monkeypatch.setattr(_verify, "_nudge", lambda x, seed: seeds.append(seed) or (nudge(x, seed) if seed else x))
    changes = {"targets": ("test_patching_rules:Twice",), "digests": {}, "reads": (), "mixin": OneRoundingOff}
    vidkernels.register_rule(toys.gate_rule(name="toys.twice", **changes))
    report = vidkernels.patch(Twice(), verify=torch.linspace(1, 1.9, 7), mode="inference")
    assert seeds == [0, 1, 2, 3, 4] and 0 < report.numerics[0].error_original < report.numerics[0].error_patched


def test_verify_exact_wants_equal_bits() -> None:
    with pytest.raises(PatchError, match="values differ"):
        vidkernels.patch(toys.Gate(64), verify=True, tolerance="exact", mode="inference")


def test_verify_true_without_synthetic_inputs() -> None:
    vidkernels.register_rule(toys.gate_rule(sample=None))
    with pytest.raises(PatchError, match="has no synthetic inputs"):
        vidkernels.patch(toys.Model(), verify=True)


def test_verify_catches_dtype_shape_nan_and_index_changes() -> None:
    for index, change in enumerate(
        (lambda y: y.double(), lambda y: y[:1], lambda y: y.clone().fill_(torch.nan), lambda y: (y * 0).long())
    ):
        mixin = type(f"Broken{index}", (toys.FastGate,), {"forward": lambda self, x, change=change: change(x)})
        vidkernels.register_rule(toys.gate_rule(mixin=mixin))
        with pytest.raises(PatchError, match="verify: "):
            vidkernels.patch(toys.Gate(6), verify=True, mode="inference")


def test_verify_sees_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        vidkernels.patch(toys.Gate(6), verify=True, mode="inference", strict=True)
