# SPDX-License-Identifier: Apache-2.0
"""The comparison table and the search for a codebook, on a model whose sampling loop really depends on it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from caching_toys import latte

from vidkernels.__main__ import main
from vidkernels._pipeline import PipelineConfig, build
from vidkernels.caching import adacache, calibrate, compare, default_policies
from vidkernels.caching._calibrate import ladder
from vidkernels.caching._compare import fidelity
from vidkernels.caching.policies import AdaCachePolicy, FirstBlockPolicy, TaylorPolicy
from vidkernels.errors import OptionError, VidkernelsError
from vidkernels.models.transformers import Latte
from vidkernels.models.transformers.goku import GokuConfig
from vidkernels.sampling import RectifiedFlow

STEPS = 20


@pytest.fixture(scope="module")
def model() -> Latte:
    return latte()


def sampler(model: Latte, calls: int = 1):
    """A rectified flow over `STEPS` steps, whose velocity is large enough to matter."""
    flow = RectifiedFlow("sigma")

    def run(seed: int) -> torch.Tensor:
        noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(seed))

        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return 4 * torch.cat([model(a, b)[:, :, :4] for a, b in zip(x.chunk(calls), t.chunk(calls), strict=True)])

        return flow.sample(predict, noise, STEPS)

    return run


def test_fidelity_is_its_formula() -> None:
    truth = torch.tensor([0.0, 1.0, 2.0, 4.0])
    error, psnr = fidelity(truth + torch.tensor([0.1, -0.1, 0.1, -0.1]), truth)
    assert error == pytest.approx(0.2 / math.sqrt(21))
    assert psnr == pytest.approx(10 * math.log10(16 / 0.01), rel=1e-5)
    assert fidelity(truth, truth) == (0.0, math.inf)


def test_every_kind_in_one_table(model: Latte, capsys: pytest.CaptureFixture) -> None:
    run = sampler(model)
    before = run(0)
    policies = {
        "always": AdaCachePolicy(STEPS, ((1.0, 1),)),
        "ada": AdaCachePolicy(STEPS, ((1e9, 3),), motion=False),
        "first block": FirstBlockPolicy(STEPS, 1e9),
        "taylor": TaylorPolicy(STEPS, 3, 1),
    }
    table = compare(model, run, STEPS, policies=policies, seeds=(0, 1))
    printed = capsys.readouterr().out
    assert printed == f"{table}\n" and printed.count("\n") == 7
    plain, always, ada, first, taylor = table.rows
    assert (plain.speedup, plain.relative_error) == (1.0, 0.0)
    assert (always.computed, always.relative_error) == (STEPS, 0.0)  # bit for bit
    assert (ada.computed, first.computed, taylor.computed) == (9, 2, 8)
    # The worst of the seeds against the uncached run, computed here once more.
    errors = []
    for seed in (0, 1):
        with adacache(model, STEPS, codebook=((1e9, 3),), motion=False):
            cached = run(seed)
        errors.append(fidelity(cached, run(seed))[0])
    assert ada.relative_error == max(errors) > 0
    assert first.relative_error > ada.relative_error
    assert torch.equal(run(0), before)
    assert {type(policy) for policy in default_policies(STEPS).values()} == {
        AdaCachePolicy,
        FirstBlockPolicy,
        TaylorPolicy,
    }


@pytest.mark.parametrize("limits", [{"relative_error": 0.05}, {"psnr": 30.0}], ids=["error", "psnr"])
def test_the_codebook_keeps_the_fidelity(model: Latte, limits: dict) -> None:
    run = sampler(model)
    found = calibrate(model, run, STEPS, **limits, runs=8)
    assert len(found.trials.rows) == 9
    assert found.row.computed < STEPS
    for seed in (0, 1):
        with adacache(model, STEPS, codebook=found.codebook, motion=found.motion) as handle:
            cached = run(seed)
            assert len(handle.report().computed_steps) <= 2 * found.row.computed
        error, psnr = fidelity(cached, run(seed))
        assert error <= limits.get("relative_error", math.inf) and psnr >= limits.get("psnr", 0.0)
    # The fewest computed steps of all that kept it.
    kept = [
        row.computed for row in found.trials.rows
        if row.relative_error <= limits.get("relative_error", math.inf) and row.psnr >= limits.get("psnr", 0.0)
    ]  # fmt: skip
    assert found.row.computed == min(kept)


def test_a_looser_limit_computes_no_more(model: Latte) -> None:
    run = sampler(model)
    computed = [
        calibrate(model, run, STEPS, relative_error=limit, seeds=(0,), runs=8).row.computed
        for limit in (1e-9, 0.002, 0.5)
    ]
    assert computed[0] == STEPS and computed[0] >= computed[1] > computed[2]


def test_ladder_is_ordered() -> None:
    book = ladder(0.4, 6)
    assert [rate for _, rate in book] == [6, 5, 4, 3, 2, 1]
    assert [round(threshold, 3) for threshold, _ in book[:5]] == [0.08, 0.16, 0.24, 0.32, 0.4]
    assert ladder(0.1, 2)[0] == (0.1, 2)


def test_wrong_arguments(model: Latte) -> None:
    run = sampler(model)
    with pytest.raises(OptionError, match="relative_error, psnr: expected one of the two"):
        calibrate(model, run, STEPS)
    with pytest.raises(OptionError, match="short: expected a policy of 20 steps, got 5"):
        compare(model, run, STEPS, policies={"short": AdaCachePolicy(5)})
    with pytest.raises(OptionError, match="sampler: expected a sampler of 20 steps with 1 calls each"):
        compare(model, sampler(model, 2), STEPS, policies={"one": TaylorPolicy(STEPS)}, show=False)
    with pytest.raises(OptionError, match="seeds: expected a sequence of at least one"):
        compare(model, run, STEPS, seeds=())


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Calibrate, then generate with what it wrote; and the table."""
    pytest.importorskip("safetensors")
    config = asdict(GokuConfig(depth=2, hidden_size=32, num_heads=2, in_channels=4, text_channels=None, num_classes=2))
    build(PipelineConfig("goku", config, size=(2, 4, 4)), None, 0, "cpu", torch.float32).save(tmp_path / "model")
    base = ["--model", str(tmp_path / "model"), "--label", "1", "--steps", "8"]
    book = tmp_path / "book.json"
    limits = ["--relative-error", "0.3", "--samples", "1", "--runs", "3", "--out", str(book)]
    assert main(["calibrate", *base, *limits]) == 0
    assert "of 8 steps, relative error" in capsys.readouterr().out
    assert json.loads(book.read_text())["steps"] == 8
    assert main(["generate", *base, "--adacache", str(book), "--out", str(tmp_path / "x.safetensors")]) == 0
    assert "of 8 steps" in capsys.readouterr().out
    assert main(["calibrate", *base, "--compare", "--samples", "1"]) == 0
    assert "| Taylor every 3, order 2" in capsys.readouterr().out
    for more, message in [
        ([], "--relative-error, --psnr, --compare: expected one of them"),
        (["--psnr", "30"], "--out: expected a JSON file"),
        (["--psnr", "nan", "--out", str(book)], "--psnr: expected a number of at least 0, got nan"),
        (["--relative-error", "-1", "--out", str(book)], "--relative-error: expected a number of at least 0"),
        (["--compare", "--adacache", "100"], "--adacache: expected none: caches are installed by this command"),
    ]:
        assert main(["calibrate", *base, *more]) == 2
        assert message in capsys.readouterr().err
    assert (
        main(["generate", *base, "--adacache", str(tmp_path / "none.json"), "--out", str(tmp_path / "y.safetensors")])
        == 2
    )
    assert "--adacache: expected a codebook's name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sampler", "seeds"), [(None, (0,)), (lambda seed: None, (0,)), (lambda seed: torch.ones(2), 5)]
)
def test_a_sampler_is_a_function_that_returns_latents(sampler: object, seeds: object) -> None:
    for call in (compare, lambda *a, **k: calibrate(*a, **k, psnr=30.0)):
        with pytest.raises(VidkernelsError, match="^(sampler|seeds): expected"):
            call(latte(), sampler, 4, seeds=seeds)
