# SPDX-License-Identifier: Apache-2.0
"""AdaCache: the official code's 13 traces (steps, distances, latents), other models, undo, and its two siblings."""

from __future__ import annotations

import math

import pytest
import torch
from caching_toys import TRACES, install, latte, open_sora_sample, run_steps, traced_model
from golden_rules import latte_golden
from torch import nn

import vidkernels
from vidkernels.caching import CacheHandle, adacache
from vidkernels.caching.policies import AdaCachePolicy, FirstBlockPolicy, Observation, TaylorPolicy
from vidkernels.errors import OptionError, PatchError


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if i > 3 else []) for i, n in enumerate(TRACES)]
)
def test_traces_equal_official(name: str) -> None:
    run = TRACES[name]
    model = traced_model()
    with install(model, run["config"]) as handle:
        latents = open_sora_sample(model, run["config"])
        report = handle.report()
    assert list(report.computed_steps) == run["computed_steps"]
    expected = [decision for step in run["trace"] for decision in step.get("decisions", [])]
    assert [decision.rate for decision in report.decisions] == [decision["new_rate"] for decision in expected]
    torch.testing.assert_close(
        torch.tensor(report.distances),
        torch.tensor([decision["avg_distance"] for decision in expected]),
        rtol=1e-3,
        atol=1e-5,
    )
    torch.testing.assert_close(latents, latte_golden("adacache_final_latents.npz")[name], rtol=0, atol=1e-4)


def test_reused_steps_skip_every_block_and_undo_is_exact() -> None:
    model = latte()
    keys, before = list(model.state_dict()), run_steps(model, 12)
    calls = [0]
    model.blocks[1].attn.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    handle = vidkernels.adacache(model, 12, codebook=((10.0, 3), (11.0, 3)), motion=False)
    run_steps(model, 12)
    assert handle.report().computed_steps == (1, 2, 5, 8, 11, 12)
    assert calls[0] == 6
    assert list(model.state_dict()) == keys
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, run_steps(model, 12), strict=True))


def test_one_delta_replaces_all_residuals() -> None:
    model = latte()
    with vidkernels.adacache(model, 6, codebook=((10.0, 2), (11.0, 2)), motion=False) as handle:
        run_steps(model, 6)
        stored = [tensor for store in handle._stores for _, tensors in store.deltas.values() for tensor in tensors]
    assert len(stored) == 1 and stored[0].shape == (2, 4, 16, 32)


def test_guidance_in_two_calls_decides_as_in_one() -> None:
    reports = []
    for calls in (1, 2):
        model = latte()
        with vidkernels.adacache(
            model, 12, codebook=((0.02, 4), (0.2, 3), (9.0, 2)), motion=True, calls_per_step=calls
        ) as handle:
            run_steps(model, 12, calls)
            reports.append(handle.report())
    assert reports[0].computed_steps == reports[1].computed_steps
    torch.testing.assert_close(
        torch.tensor(reports[0].distances), torch.tensor(reports[1].distances), rtol=1e-4, atol=1e-6
    )


def test_a_second_sample_starts_anew() -> None:
    model = latte()
    with vidkernels.adacache(model, 8, codebook=((10.0, 4), (11.0, 4)), motion=False) as handle:
        first = run_steps(model, 8)
        second = run_steps(model, 8)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert handle.report().computed_steps == (1, 2, 6, 7, 8)


def test_taylor_forecasts_a_linear_drift_exactly() -> None:
    class Drift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = 0.0

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states + self.time

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Drift(), Drift()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model = Toy()
    handle = CacheHandle(model, TaylorPolicy(10, interval=3, order=1), residual="block")
    for step in range(10):
        for block in model.blocks:
            block.time = float(step)
        torch.testing.assert_close(model(torch.zeros(1, 2, 3)), torch.full((1, 2, 3), 2.0 * step))
    assert handle.report().computed_steps == (1, 2, 5, 8, 10)
    handle.remove()


def test_first_block_policy_follows_the_drift() -> None:
    model = latte()
    plain = run_steps(model, 8)
    for threshold, expected in ((0.0, 8), (1e9, 2)):
        handle = CacheHandle(model, FirstBlockPolicy(8, threshold), residual="block")
        outputs = run_steps(model, 8)
        assert len(handle.report().computed_steps) == expected
        handle.remove()
        if threshold == 0.0:
            assert all(torch.allclose(a, b) for a, b in zip(plain, outputs, strict=True))


def test_schedule_arithmetic() -> None:
    policy = AdaCachePolicy(30, ((0.1, 5), (0.2, 2), (1.0, 1)), motion=False)
    computed = []
    for step in range(1, 31):
        if policy.computes(step):
            computed.append(step)
            policy.observe(step, [Observation(0, None if step == 1 else 0.05)])
    assert computed == [1, 2, 7, 12, 17, 22, 27, 29, 30]


def test_motion_is_remembered_by_block() -> None:
    """ "cross-and-mlp" measures the spatial and the temporal block of one index: what one saw is not the other's past."""
    policy = AdaCachePolicy(30, ((1e9, 1),), motion=True, motion_window=(1, 30))

    def factors(step: int, *motions: float) -> list[float]:
        groups = ("spatial_blocks", "temporal_blocks")
        policy.observe(step, [Observation(0, 1.0, m * 0.385, g) for m, g in zip(motions, groups, strict=True)])
        return [decision.scaled / decision.distance for decision in policy.decisions[-2:]]

    for step, previous in ((1, (1.0, 1.0)), (2, (0.9, 1.1))):
        motions = (0.9, 1.1) if step == 1 else (0.8, 1.05)
        expected = [m**8 + 10 * abs(m**8 - p**8) for m, p in zip(motions, previous, strict=True)]
        assert factors(step, *motions) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: adacache(latte(), 0), OptionError, "steps: expected a whole number of at least 1, got 0"),
        (lambda: adacache(latte(), 30, codebook="fast"), OptionError, "codebook: expected one of"),
        (lambda: adacache(latte(), 30, codebook=((0.5, 1), (0.1, 2))), OptionError, "codebook: expected"),
        (lambda: adacache(latte(), 30, codebook=((math.nan, 2), (0.5, 1))), OptionError, "codebook: expected"),
        (lambda: adacache(latte(), 30, codebook=((0.1, 2), (0.5,))), OptionError, "codebook: expected"),
        (lambda: adacache(latte(), 30, codebook=((0.1, 1.5), (0.5, 1))), OptionError, "codebook: expected"),
        (lambda: adacache(latte(), 30, codebook=5), OptionError, "codebook: expected"),
        (lambda: adacache(latte(), 30, locations=[9]), OptionError, "locations: expected indices below 2"),
        (lambda: adacache(latte(), 30, residual="mlp"), OptionError, "residual: expected one of"),
        (lambda: adacache(latte(), 30, locations=5), OptionError, "locations: expected indices below 2"),
        (lambda: adacache(latte(), "30"), OptionError, "steps: expected a whole number of at least 1, got '30'"),
        (lambda: adacache(latte(), 30, calls_per_step=1.5), OptionError, "calls_per_step: expected a whole number"),
        (
            lambda: adacache(latte(), 30, blocks=("layers",)),
            OptionError,
            "blocks: expected names of lists of Latte: blocks",
        ),
        (lambda: adacache(latte(), 30, motion_window=(5,)), OptionError, "motion_window: expected two steps"),
        (lambda: adacache(latte(), 30, motion_scale=0), OptionError, "motion_scale: expected a positive number"),
        (lambda: adacache(latte(), 30).report(1), OptionError, "request: expected one of the 1 from 0 on, got 1"),
        (lambda: CacheHandle(latte(), None), OptionError, "policy: expected an AdaCachePolicy"),
        (lambda: TaylorPolicy(8, interval=0), OptionError, "interval: expected a whole number of at least 1"),
        (lambda: TaylorPolicy(8, warmup=0), OptionError, "warmup: expected a whole number of at least 1"),
        (lambda: TaylorPolicy(8, order=1.5), OptionError, "order: expected a whole number of at least 0"),
        (lambda: FirstBlockPolicy(0), OptionError, "steps: expected a whole number"),
        (lambda: FirstBlockPolicy(8, math.nan), OptionError, "threshold: expected a number of at least 0, got nan"),
        (lambda: adacache(nn.Linear(2, 2), 30), PatchError, "Linear has no list of transformer blocks"),
    ],
)
def test_wrong_arguments(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()


def test_two_caches_on_one_model_are_refused_and_leave_the_first_alone() -> None:
    model = latte()
    handle = adacache(model, 8)
    with pytest.raises(PatchError, match="already has a step cache"):
        adacache(model, 8)
    run_steps(model, 8)
    assert handle.report().total_steps == 8
    handle.remove()
