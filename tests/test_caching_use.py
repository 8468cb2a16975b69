# SPDX-License-Identifier: Apache-2.0
"""A step cache in the hands of a user: installed twice, left half-way, differentiated, run by itself, given few steps."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable

import pytest
import torch
from caching_toys import FAMILIES, diffusers_model, latte, run_steps
from helpers import run_python
from torch import Tensor, nn

import vidkernels
from vidkernels.caching import CacheHandle, adacache
from vidkernels.caching._clock import Clock, _Ready
from vidkernels.caching.policies import FirstBlockPolicy, TaylorPolicy
from vidkernels.errors import PatchError
from vidkernels.models.transformers import Latte

EVERY_OTHER = ((1e9, 2),)
OPTIONS = {"codebook": EVERY_OTHER, "motion": False}


def count(model: nn.Module) -> list[int]:
    """Runs of the second block."""
    runs = [0]
    model.blocks[1].register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    return runs


class Slow(_Ready):
    """A timestep on its way from a device."""

    def get(self) -> float | None:
        self.asked = getattr(self, "asked", 0) + 1
        return self.value if self.asked > 1 else None


def step(model: nn.Module, index: int, rows: int = 2) -> Tensor:
    x = torch.randn(rows, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return model(x, torch.full((rows,), 999.0 - 10 * index))


def test_a_refused_cache_leaves_the_first_one_working() -> None:
    model = latte()
    with adacache(model, 8, **OPTIONS) as handle:
        runs = count(model)
        with pytest.raises(PatchError, match="already has a step cache"):
            adacache(model, 8)
        run_steps(model, 8)
        assert handle.report().computed_steps == (1, 2, 4, 6, 7, 8) and runs == [6]


def test_removing_twice_or_late_touches_nobody_elses_cache() -> None:
    model = latte()
    before = run_steps(model, 2)
    first = adacache(model, 8, **OPTIONS)
    first.remove()
    first.remove()
    second, runs = adacache(model, 8, **OPTIONS), count(model)
    first.remove()
    run_steps(model, 8)
    assert runs == [6] and second.report().total_steps == 8
    second.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, run_steps(model, 2), strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_all_computed(steps: int) -> None:
    """Shorter than any warm-up: the first, the last and the last but one are always computed."""
    model = latte()
    expected = run_steps(model, steps)
    for policy in (None, FirstBlockPolicy(steps, 0.0), TaylorPolicy(steps)):
        handle = adacache(model, steps, codebook=((1e9, 6),)) if policy is None else CacheHandle(model, policy)
        for _ in range(2):  # and again in the next sample
            outputs = run_steps(model, steps)
            assert handle.report().computed_steps == tuple(range(1, steps + 1))
            for a, b in zip(outputs, expected, strict=True):
                torch.testing.assert_close(a, b)
        handle.remove()


def test_two_models_have_two_schedules() -> None:
    models = latte(), latte()
    handles = [adacache(m, n, codebook=((1e9, rate),), motion=False) for m, n, rate in zip(models, (8, 6), (2, 3))]  # noqa: B905
    with torch.no_grad():
        for index in range(8):
            step(models[0], index)
            if index < 6:
                step(models[1], index)
    assert [h.report().computed_steps for h in handles] == [(1, 2, 4, 6, 7, 8), (1, 2, 5, 6)]


def test_copies_are_refused_and_leave_the_model_usable() -> None:
    model = latte()
    with adacache(model, 6, **OPTIONS) as handle:
        with pytest.raises(PatchError, match=r"call handle.remove\(\) first"):
            copy.deepcopy(model)
        run_steps(model, 6)
        assert handle.report().computed_steps == (1, 2, 4, 5, 6)
    torch.testing.assert_close(step(copy.deepcopy(model), 0), step(model, 0))


@pytest.mark.parametrize("requests", [1, 2])
def test_other_latents_start_a_new_sample(requests: int) -> None:
    """A sample was left after 3 of 6 steps; the next has another size."""
    model = latte()
    fresh = [step(model, index, rows=4) for index in range(2)]
    with torch.no_grad(), adacache(model, 6, requests=requests, **OPTIONS) as handle:
        for index in range(3):
            step(model, index)
        outputs = [step(model, index, rows=4) for index in range(6)]
        assert handle.report().computed_steps == (1, 2, 4, 5, 6)
        for a, b in zip(outputs, fresh, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        step(model, 0)  # and another size once more, behind a sample that is complete
        assert handle.report().computed_steps == (1,) and handle.samples == 1


def test_reset_forgets_a_sample_that_was_left() -> None:
    model = latte()
    with adacache(model, 8, **OPTIONS) as handle:
        expected = run_steps(model, 8)
        run_steps(model, 3)
        handle.reset()
        assert handle.report().total_steps == 0
        again = run_steps(model, 8)
        assert handle.report().computed_steps == (1, 2, 4, 6, 7, 8)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@pytest.mark.parametrize("interrupted", [None, 3, 7], ids=["short", "inside", "in the last step"])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("falling", [True, False])
def test_a_pipeline_that_is_run_again_starts_anew(falling: bool, calls: int, interrupted: int | None) -> None:
    """After fewer steps than the cache was told, or an interrupt inside a step: timesteps are back at the first."""
    model = latte()
    x = torch.randn(2, 4, 4, 8, 8)
    times = [torch.full((2,), 900.0 - 40 * index if falling else 10.0 + 40 * index) for index in range(8)]

    def run(steps: int, stop: int | None = None) -> list[Tensor]:
        outputs = []
        with torch.no_grad():
            for index in range(steps):
                for call in range(calls):
                    if index == stop and call == calls - 1:
                        hook = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
                        try:
                            model(x, times[index])
                        finally:
                            hook.remove()
                    outputs.append(model(x, times[index]))
        return outputs

    with adacache(model, 8, calls_per_step=calls, **OPTIONS) as handle:
        expected = run(8)
        assert handle.report().computed_steps == (1, 2, 4, 6, 7, 8)
        if interrupted is not None:
            with pytest.raises(ZeroDivisionError):
                run(8, stop=interrupted)
        else:
            run(5)
        again = run(8)
        assert handle.report().computed_steps == (1, 2, 4, 6, 7, 8) and handle.report().total_steps == 8
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_diffusers_run_again_start_anew(family: str) -> None:
    """Their timestep is found by its name, patched or not."""
    model, run = diffusers_model(family, pytest.importorskip("diffusers"))
    with contextlib.suppress(PatchError):  # LTX-2 has no rule
        vidkernels.patch(model)
    with adacache(model, 8, **OPTIONS) as handle:
        for steps in (3, 8):
            for index in range(steps):
                run(index)
        assert handle.report().computed_steps == (1, 2, 4, 6, 7, 8)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "from a device"])
@pytest.mark.parametrize(("installed", "calls", "made"), [(6, 1, 11), (7, 1, 13), (8, 1, 16), (8, 2, 24)])
def test_a_sampler_that_goes_on_behind_the_last_step_is_told(
    installed: int, calls: int, made: int, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heun's second calls, guidance in two calls that was not said, or more steps: once, and not where a sample follows."""
    if late:
        monkeypatch.setattr("vidkernels.caching._clock._Ready", Slow)
    model, x = latte(), torch.randn(2, 4, 4, 8, 8)
    times = [torch.full((2,), 990.0 - 30 * (index // 2)) for index in range(made)]
    with torch.no_grad(), adacache(model, installed, calls_per_step=calls, **OPTIONS):
        with pytest.warns(UserWarning, match=f"installed for {installed} steps of {calls} call.*goes on") as told:
            for t in times:
                model(x, t)
        assert len(told) == 1
    right = made // calls
    with torch.no_grad(), adacache(model, right, calls_per_step=calls, **OPTIONS), warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in times * 2:
            model(x, t)


def noted(clock: Clock, values: list[float]) -> list[bool]:
    return [clock.note((None, torch.tensor([value])), {}) for value in values]


def test_the_clock_knows_the_first_timestep_from_a_detour() -> None:
    clock = Clock(latte())
    # PNDM goes back a little, Heun asks twice; 900 is the first again.
    assert noted(clock, [900, 850, 875, 850, 850, 700, 725, 900]) == [False] * 7 + [True]
    assert noted(clock, [850, 800, 950]) == [False, False, True]  # beyond the first: more noise than it began with
    clock.clear()
    assert noted(clock, [5, 5, 5, 5]) == [False] * 4
    clock.clear()
    assert [clock.note((), {"t": value}) for value in (3, 2.5, 3)] == [False, False, True]  # plain numbers
    assert not clock.note((torch.zeros(2, 2),), {})


def test_timesteps_on_their_way_from_a_device_are_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: nothing waits for them. The cache says that a step went wrong, and the sample goes on right."""
    model = latte()
    times = [torch.full((2,), 900.0 - 40 * index) for index in range(8)]
    x = torch.randn(2, 4, 4, 8, 8)
    monkeypatch.setattr("vidkernels.caching._clock._Ready", Slow)
    with torch.no_grad(), adacache(model, 8, **OPTIONS) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for t in times:
                model(x, t)
        assert handle.report().computed_steps == (1, 2, 4, 6, 7, 8) and handle.samples == 1
        for t in times[:5]:
            model(x, t)
        model(x, times[0])
        with pytest.warns(UserWarning, match=r"a new sample begin at step 6 of another.*handle.reset\(\)"):
            model(x, times[1])
        assert handle.report().computed_steps == (1,)
        for t in times[2:]:
            model(x, t)
        assert handle.report().computed_steps == (1, 2, 4, 6, 7)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_reused_residuals_are_constants_for_autograd(checkpointing: bool) -> None:
    """Every step has its own backward; a step that was skipped gives the blocks no gradient, and no graph is kept."""
    model = latte().train()
    model.gradient_checkpointing = checkpointing
    expected = []
    for index in range(2):
        model.zero_grad()
        step(model, index).square().mean().backward()
        expected.append(model.blocks[1].attn.qkv.weight.grad.clone())
    with adacache(model, 6, **OPTIONS) as handle:
        for index in range(6):
            model.zero_grad()
            step(model, index).square().mean().backward()
            gradient = model.blocks[1].attn.qkv.weight.grad
            if index < 2:
                torch.testing.assert_close(gradient, expected[index])
            assert (gradient is None) == (index == 2)
            assert model.final_layer.linear.weight.grad is not None
        assert handle.report().computed_steps == (1, 2, 4, 5, 6)
        kept = [x for _, tensors in handle._stores[0].deltas.values() for x in tensors]
        assert kept and not any(x.requires_grad for x in kept)


def test_recomputation_runs_the_blocks_of_its_own_step() -> None:
    """The backward pass of a computed step comes after a step that was skipped."""
    model = latte().train()
    model.gradient_checkpointing = True
    with adacache(model, 6, **OPTIONS):
        outputs = [step(model, index) for index in range(3)]
        outputs[1].square().mean().backward()
        found = model.blocks[1].attn.qkv.weight.grad.clone()
        model.zero_grad()
        reports = [step(model, index) for index in range(3, 6)]
    assert len(reports) == 3
    step(model, 1).square().mean().backward()
    torch.testing.assert_close(found, model.blocks[1].attn.qkv.weight.grad)


@pytest.mark.parametrize("where", ["blocks.0", "blocks.2", "final_layer"])
@pytest.mark.parametrize("kind", ["adacache", "first block", "taylor", "requests"])
def test_a_failed_step_is_repeated_whatever_the_policy(kind: str, where: str) -> None:
    """Also a step that reuses, and where the exception comes from inside a block."""
    model, found = latte(), []
    policies = {"first block": FirstBlockPolicy(6, 0.05), "taylor": TaylorPolicy(6, 2, 1)}
    for fails in (False, True):
        if kind in policies:
            handle = CacheHandle(model, policies[kind], residual="block")
        else:
            handle = adacache(model, 6, requests=2 if kind == "requests" else 1, **OPTIONS)
        outputs = []
        with torch.no_grad():
            for index in range(6):
                output = None
                if fails and index in (2, 3):
                    hook = model.get_submodule(where).register_forward_hook(lambda *_: 1 / 0)
                    with contextlib.suppress(ZeroDivisionError):
                        output = step(model, index)  # succeeds where the block is skipped
                    hook.remove()
                outputs.append(step(model, index) if output is None else output)
        found.append((handle.report(), outputs))
        handle.remove()
        for policy in policies.values():
            policy.reset()
    assert 2 < len(found[0][0].computed_steps) < 6
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_autocast_and_half_precision() -> None:
    model = latte()
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        with adacache(model, 6, **OPTIONS) as handle, torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                x = torch.randn(2, 4, 4, 8, 8).to(dtype)
                outputs = [model(x, torch.full((2,), 900.0 - 20 * index)) for index in range(6)]
            assert handle.report().computed_steps == (1, 2, 4, 5, 6)
            assert all(torch.isfinite(output).all() for output in outputs)
            assert all(0 < distance < 2 for distance in handle.report().distances)


def test_a_cache_does_without_dynamo() -> None:
    """Importing Dynamo takes longer than a sample of a small model; whoever compiles imports it."""
    code = (
        "import sys, torch, vidkernels\n"
        "from vidkernels.models.transformers import Latte\n"
        "model = Latte.from_config('Latte-S/8', depth=2, input_size=8, num_frames=2, num_classes=3).eval()\n"
        "with torch.no_grad(), vidkernels.adacache(model, 4, codebook=((1e9, 4),)) as handle:\n"
        "    for t in (900.0, 600.0, 300.0, 0.0):\n"
        "        model(torch.ones(1, 2, 4, 8, 8), torch.tensor([t]), torch.tensor([1]))\n"
        "print(handle.report().total_steps, 'torch._dynamo' in sys.modules)"
    )
    assert run_python(code).split() == ["4", "False"]


def small_latte() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Latte-S/2 at 64x64 pixels, both branches of guidance."""
    model = Latte.from_config("Latte-S/2", input_size=8, num_classes=5).eval()
    x, y = torch.randn(2, 16, 4, 8, 8), torch.tensor([3, 5])
    return model, lambda step: model(x, torch.full((2,), 999.0 - 33 * step), y)


def small_cogvideox() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Twelve of CogVideoX's blocks, 384 wide."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=6, attention_head_dim=64, time_embed_dim=128, text_embed_dim=512, num_layers=12, sample_width=12,
        sample_height=16, sample_frames=13, max_text_seq_length=32,
    ).eval()  # fmt: skip
    x, text = torch.randn(2, 4, 16, 16, 12), torch.randn(2, 32, 512)
    return model, lambda step: model(x, text, torch.full((2,), 999 - 33 * step), return_dict=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("build", [small_latte, small_cogvideox])
def test_what_a_cache_costs(build: Callable[[], tuple[nn.Module, Callable[[int], Tensor]]]) -> None:
    """A sample takes little more than its computed steps alone: 98 % of N / computed was measured, 95 % are asserted.

    Processor time of one thread, fastest of several: other programs do not count.
    """
    torch.manual_seed(0)
    model, run = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    threads, steps = torch.get_num_threads(), 30
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            plain, cached = [], []
            for _ in range(3):
                plain.append([seconds(run, index) for index in range(5)])
                with adacache(model, steps, codebook=((1e9, 4),)) as handle:
                    cached.append([seconds(run, index) for index in range(steps)])
                computed = handle.report().computed_steps
    finally:
        torch.set_num_threads(threads)
    assert len(computed) == 10
    alone, fastest = ([min(times) for times in zip(*runs, strict=True)] for runs in (plain, cached))
    share = len(computed) * (sum(alone) / len(alone)) / sum(fastest)
    print(f"{build.__name__}: {share:.1%} of {steps / len(computed):g} times")
    assert share > 0.95


def seconds(run: Callable[[int], Tensor], index: int) -> float:
    begin = time.process_time()
    run(index)
    return time.process_time() - begin
