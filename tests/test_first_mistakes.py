# SPDX-License-Identifier: Apache-2.0
"""What a new user types wrong first, and what the answer tells to do next."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import patching_toys as toys
import pytest
import torch
from helpers import ROOT
from patching_toys import toy_rules  # noqa: F401 (a fixture)

import vidkernels
from vidkernels import __main__ as cli
from vidkernels import ops
from vidkernels.errors import OptionError, PatchError, ShapeError
from vidkernels.patching import _api


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("vidkernels.pach", "patch"),
        ("vidkernels.ops.causal_conv3", "causal_conv3d"),
        ("vidkernels.nn.Causalconv3d", "CausalConv3d"),
        ("vidkernels.models.tokenizer", "tokenizers"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_right_one(line: str, meant: str) -> None:
    code = f"import vidkernels.ops, vidkernels.nn, vidkernels.models; {line}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and f"Did you mean: '{meant}'?" in done.stderr


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fsq", "Did you mean 'fsq_codes_to_indices' or 'fsq_entropy' or"),
        ("rope", "Did you mean 'norm_rope_attention' or 'qk_norm_rope'?"),
        ("channelnorm", "Did you mean 'channel_norm'?"),
        ("", "See dir\\(vidkernels.ops\\)."),
    ],
)
def test_explain_knows_ops_by_a_part_of_their_name(name: str, hint: str) -> None:
    with pytest.raises(OptionError, match=hint):
        vidkernels.explain(name)


def test_a_channel_axis_elsewhere_is_pointed_to() -> None:
    with pytest.raises(ShapeError, match=r"expected 4 channels at axis 3, got 9 \(.*\). Axis 1 has 4: pass dim=1\."):
        ops.fsq_quantize(torch.zeros(2, 4, 5, 9), [8, 8, 8, 5])
    with pytest.raises(ShapeError, match=r"at axis 2, .*Give the channel axis as dim=\."):
        ops.fsq_quantize(torch.zeros(4, 4, 5), [8, 8, 8, 5])
    with pytest.raises(ShapeError, match=r"8 channels at axis 1 \(2 codebooks of 4\)"):
        ops.fsq_quantize(torch.zeros(2, 4), [8, 8, 8, 5], num_codebooks=2)


def test_frames_in_another_order_are_told_apart() -> None:
    model = vidkernels.models.tokenizers.MAGVIT2(vidkernels.models.tokenizers.MAGVIT2Config(channels=16))
    with pytest.raises(ShapeError, match=r"expected size 3 at axis 1, got 5 .*Axis 4 has 3: video\.movedim\(4, 1\)\."):
        model.encode(torch.zeros(1, 5, 16, 16, 3))


@pytest.mark.parametrize("sample", ["yes", 3, (), [1, 2]])
def test_verify_without_a_tensor_is_refused_before_the_model_runs(sample: Any) -> None:
    model = toys.Model()
    with pytest.raises(OptionError, match="verify: expected True, or inputs of the model"):
        vidkernels.patch(model, verify=sample)
    assert vidkernels.status(model).patched == "none"
    assert not vidkernels.patch(model, verify=False).numerics


def test_report_names_the_module_nearest_to_its_limit_and_the_whole_model_apart() -> None:
    """The whole model has no float64 truth: its difference was printed as an error that meets its limit exactly."""
    report = vidkernels.patch(toys.Model().eval(), verify=torch.randn(3, 6))
    verified, whole = str(report).splitlines()[-2:]
    assert verified.startswith("verified") and "comparisons with float64; closest to its limit: blocks." in verified
    assert whole.startswith("whole model: (model) [Model] output 0 on [3, 6] float32: ") and "original's" in whole


def test_a_model_that_no_rule_knows() -> None:
    with pytest.raises(
        PatchError, match=r"print\(vidkernels\.rules\(\)\) lists what is known; strict=False accepts that"
    ):
        vidkernels.patch(torch.nn.Linear(2, 2))
    assert not vidkernels.patch(torch.nn.Linear(2, 2), strict=False)
    header, *lines = str(vidkernels.rules()).splitlines()
    assert header.split() == ["rule", "ops", "class", "tested", "with"] and len(lines) == len(vidkernels.rules())
    assert any(line.split()[-4:] == ["alpha_blend", "VidTokEncoder3D", "diffusers", "0.42.1"] for line in lines)


@pytest.mark.parametrize(
    "command",
    ["doctor", "tune", "demo", "tokenize", "detokenize", "generate", "calibrate", "train tokenizer", "train dit"],
)
def test_help_says_what_a_command_and_each_of_its_options_does(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    usage, description, *rest = capsys.readouterr().out.split("\n\n")
    assert usage.startswith("usage: ") and description[0].isupper(), description
    shown = [line for part in rest for line in part.splitlines() if line.startswith("  ")]
    # An option without a text is followed by the next one.
    bare = [line for line, after in zip(shown, [*shown[1:], "  -"], strict=True) if _is_bare(line, after)]
    assert not bare


def _is_bare(line: str, after: str) -> bool:
    return line.startswith("  -") and "  " not in line.strip() and not after.startswith("   ")


def test_calibrate_offers_no_cache_that_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for command, shown in (("generate", True), ("calibrate", False)):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert ("--adacache" in capsys.readouterr().out) is shown


@pytest.mark.parametrize("sample", [True, torch.ones(2, 6)], ids=["synthetic", "given"])
def test_a_model_that_is_patched_already_is_verified(sample: Any) -> None:
    """Its modules were passed over: whoever verified because results looked wrong was told that all is well."""
    model = toys.Model().eval()
    vidkernels.patch(model)
    report = vidkernels.patch(model, verify=sample)
    assert {entry.state for entry in report.entries} == {"already"}
    assert [item.name for item in report.numerics if item.rule != "whole model"] == ["blocks.0"]
    vidkernels.unpatch(model)
    vidkernels.register_rule(toys.gate_rule(mixin=toys.WrongGate))
    vidkernels.patch(model)
    classes = [type(block) for block in model.blocks]
    with pytest.raises(PatchError, match=r"blocks\.0 \[Gate\] output 0 on .*The model is as it was"):
        vidkernels.patch(model, verify=sample)
    assert [type(block) for block in model.blocks] == classes and vidkernels.status(model).patched == "all"


def test_backends_of_an_earlier_patch_stay_where_a_second_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.Model().eval()
    vidkernels.patch(model)

    def fail(*_: Any) -> None:
        raise PatchError("the whole model differs")

    monkeypatch.setattr(_api, "_verify_whole", fail)
    with pytest.raises(PatchError, match="the whole model differs"):
        vidkernels.patch(model, backend="reference", verify=torch.ones(2, 6))
    assert vidkernels.status(model).backends == {"auto": 2}


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("bloks.0", r"Did you mean 'blocks\.0'\?"), (("blocks.1", "decodr*"), r"exclude: 'decodr\*' matches no module")],
)
def test_an_excluded_name_that_matches_nothing_is_an_error(pattern: Any, hint: str) -> None:
    """What was to be left out was patched without a word."""
    model = toys.Model()
    with pytest.raises(PatchError, match=hint):
        vidkernels.patch(model, exclude=pattern)
    assert vidkernels.status(model).patched == "none"
    assert vidkernels.patch(model, exclude=pattern, strict=False)


def test_named_ops_that_fit_nothing_are_not_blamed_on_the_model() -> None:
    with pytest.raises(
        PatchError, match=r"No rule for ops='group_norm' knows any of its modules; ops='auto' tries all"
    ):
        vidkernels.patch(toys.Model(), ops="group_norm")


def test_modules_point_to_the_channels() -> None:
    fsq = vidkernels.nn.FSQ([8, 5, 5])
    with pytest.raises(ShapeError, match=r"3 channels at axis 2, got 16 .*channel_first=True"):
        fsq(torch.zeros(2, 3, 16))
    with pytest.raises(ShapeError, match=r"3 channels at axis 1, got 5 .*z\.movedim\(-1, 1\)"):
        fsq(torch.zeros(2, 5, 4, 4, 3))
    with pytest.raises(
        ShapeError, match=r"weight: expected size 16 at axis 1, the channels of x \(1, 16, 5, 8, 8\), got 8"
    ):
        vidkernels.nn.CausalConv3d(8, 8, 3)(torch.zeros(1, 16, 5, 8, 8))


def test_status_of_a_sharded_module_says_that_it_runs_its_fused_forward() -> None:
    """FSDP2 and parametrizations make a subclass, after which `irregular` alone sounded like a failed patch."""
    model = toys.Model()
    vidkernels.patch(model)
    block = model.blocks[0]
    block.__class__ = type("FSDPGate", (type(block),), {})
    expected = (
        "blocks.0 was re-classed after patching (FSDPGate): it runs its fused forward, and cannot be unpatched now"
    )
    assert f"irregular: {expected}" in str(vidkernels.status(model))
    block.__class__ = type("Other", (type(block),), {"forward": lambda self, x: x})
    assert "(Other): it has another forward" in str(vidkernels.status(model))
