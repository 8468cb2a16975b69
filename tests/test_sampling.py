# SPDX-License-Identifier: Apache-2.0
"""Samplers against the official Latte sampler's golden outputs and against exact solutions."""

from __future__ import annotations

import sys

import pytest
import torch
from golden_rules import draw, latte_golden

from vidkernels.errors import OptionError
from vidkernels.sampling import GaussianDiffusion, RectifiedFlow, guided, respaced_steps, shift_time


def toy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The analytic model of RULE.md: noise and variance on axis 2."""
    t = t.reshape(-1, 1, 1, 1, 1)
    return torch.cat([0.3 * x + 0.2 * torch.sin(0.01 * t + x), 0.5 * torch.cos(0.02 * t) + 0.1 * x], dim=2)


def assert_relative(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    error = (actual.double() - expected.double()).abs().max().item() / expected.double().abs().max().item()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("spec", ["250", "ddim50", "10", "ddim250"])
def test_respacing_equals_official(spec: str) -> None:
    stored = latte_golden("latte_sampler_toy.npz")
    assert respaced_steps(spec) == stored[f"map_{spec}"].tolist()
    assert_relative(GaussianDiffusion(spec).betas, stored[f"betas_{spec}"], 1e-12)


@pytest.mark.parametrize("spec", ["250", "ddim50"])
def test_ddim_equals_official(spec: str) -> None:
    sample = GaussianDiffusion(spec).sample(toy, draw("sampler/z", 1, 2, 4, 3, 3), method="ddim")
    assert_relative(sample, latte_golden("latte_sampler_toy.npz")[f"ddim_{spec}"])


@pytest.mark.parametrize("spec", ["250", "10"])
def test_ddpm_equals_official(spec: str) -> None:
    sample = GaussianDiffusion(spec).sample(
        toy, draw("sampler/z", 1, 2, 4, 3, 3), step_noise=lambda index: draw(f"sampler/noise/{index}", 1, 2, 4, 3, 3)
    )
    assert_relative(sample, latte_golden("latte_sampler_toy.npz")[f"ddpm_{spec}"])


def test_respacing_by_sections() -> None:
    """So many steps in each of equal sections, the first sections longer where they do not divide the process."""
    thirds = respaced_steps("10,15,20")
    assert (
        thirds[:3] == [0, 37, 74] and thirds[9:11] == [333, 334] and thirds[24:26] == [666, 667] and thirds[-1] == 999
    )
    assert [sum(low <= step < low + 333.4 for step in thirds) for low in (0, 333.5, 666.5)] == [10, 15, 20]
    assert respaced_steps((1, 3), 7) == [0, 4, 5, 6] and respaced_steps([4], 10) == respaced_steps("4", 10) == [
        0,
        3,
        6,
        9,
    ]
    assert respaced_steps("ddim25") == list(range(0, 1000, 40)) and respaced_steps(7, 20) == [0, 3, 6, 10, 13, 16, 19]


def plain_sample(
    steps: list[int],
    z: torch.Tensor,
    noise: dict[int, torch.Tensor],
    *,
    ddim: bool,
    eta: float,
    clip: bool,
    variance: str,
) -> torch.Tensor:
    """The reverse process by the papers' formulas, one number at a time, float64."""
    every = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
    x = z.double()
    for i in reversed(range(len(steps))):
        a = every[steps[i]].item()
        before = every[steps[i - 1]].item() if i else 1.0
        beta = 1 - a / before
        eps, v = toy(x, torch.tensor([float(steps[i])])).chunk(2, 2)
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x0 = x0.clamp(-1, 1) if clip else x0
        if ddim:
            eps = (x - a**0.5 * x0) / (1 - a) ** 0.5
            sigma = eta * ((1 - before) / (1 - a) * (1 - a / before)) ** 0.5
            x = before**0.5 * x0 + (1 - before - sigma**2) ** 0.5 * eps + (sigma * noise[i].double() if i else 0)
            continue
        x = (before**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - before) * x) / (1 - a)
        if i:
            small, share = beta * (1 - before) / (1 - a), (v + 1) / 2
            spread = {"small": small, "large": beta, "learned": beta**share * small ** (1 - share)}[variance]
            x = x + spread**0.5 * noise[i].double()
    return x


@pytest.mark.parametrize("spec", ["25", "ddim25", "10,15,20", [3, 1, 2], 2, "1"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("method", "eta", "variance"),
    [("ddim", 0.0, "learned"), ("ddim", 0.35, "small"), ("ddim", 1.0, "learned"), ("ddpm", 0.0, "learned"),
     ("ddpm", 0.0, "small"), ("ddpm", 0.0, "large")],
)  # fmt: skip
def test_samples_equal_the_formulas(spec, clip: bool, method: str, eta: float, variance: str) -> None:
    learned = variance == "learned"
    options = {} if learned else {"fixed_variance": variance}
    diffusion = GaussianDiffusion(spec, learned_range=learned, **options)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(1, 2, 4, 3, 3, generator=generator)
    noise = {i: torch.randn(z.shape, generator=generator) for i in range(len(diffusion))}
    sampled = diffusion.sample(
        lambda x, t: toy(x, t) if learned else toy(x, t).chunk(2, 2)[0], z, method=method, eta=eta, clip_denoised=clip,
        step_noise=noise.__getitem__,
    )  # fmt: skip
    expected = plain_sample(diffusion.steps, z, noise, ddim=method == "ddim", eta=eta, clip=clip, variance=variance)
    assert_relative(sampled, expected)


def test_without_a_learned_variance_the_official_one_is_beta() -> None:
    """DiT's and Latte's `create_diffusion(learn_sigma=False)` sample with beta unless told `sigma_small`. A learned variance of
    the fraction 1 is beta too: a golden-tested path gives the same sample."""
    z = draw("sampler/z", 1, 2, 4, 3, 3)
    noise = {"step_noise": lambda index: draw(f"sampler/noise/{index}", 1, 2, 4, 3, 3)}
    fixed = GaussianDiffusion("10", learned_range=False).sample(lambda x, t: toy(x, t).chunk(2, 2)[0], z, **noise)
    largest = GaussianDiffusion("10").sample(
        lambda x, t: torch.cat([toy(x, t).chunk(2, 2)[0], torch.ones_like(x)], 2), z, **noise
    )
    assert_relative(fixed, largest)
    smallest = GaussianDiffusion("10", learned_range=False, fixed_variance="small").sample(
        lambda x, t: toy(x, t).chunk(2, 2)[0], z, **noise
    )
    assert (smallest - fixed).abs().max() > 1e-2


def test_training_losses_equal_official() -> None:
    stored, diffusion = latte_golden("latte_sampler_toy.npz"), GaussianDiffusion()
    x0, noise = draw("sampler/x0", 3, 2, 4, 3, 3), draw("sampler/trnoise", 3, 2, 4, 3, 3)
    t = torch.tensor([0, 500, 999])
    assert_relative(diffusion.add_noise(x0, t, noise), stored["q_sample"])
    losses = diffusion.training_losses(toy, x0, t, noise)
    for name in ("mse", "vb", "loss"):
        assert_relative(losses[name], stored[f"loss_{name}"], 1e-4)


def test_one_step_of_two_recovers_a_known_sample() -> None:
    x0, noise = torch.randn(1, 2, 4, 3, 3), torch.randn(1, 2, 4, 3, 3)
    diffusion = GaussianDiffusion("250", learned_range=False)
    x = diffusion.add_noise(x0, torch.tensor([249]), noise)

    def exact(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = GaussianDiffusion().cumulative[t.long()].float().reshape(-1, 1, 1, 1, 1)
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    assert_relative(diffusion.sample(exact, x, method="ddim"), x0, 1e-4)


@pytest.mark.parametrize("method", ["euler", "heun", "unipc"])
@pytest.mark.parametrize("orientation", ["sigma", "t"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_straight_paths_are_integrated_exactly(method: str, orientation: str, shift: float) -> None:
    if method == "unipc":
        pytest.importorskip("diffusers")
    data, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    flow = RectifiedFlow(orientation, shift=shift)
    _, target = flow.interpolate(data, noise, torch.tensor([0.3, 0.9], dtype=torch.float64))
    # diffusers' levels are float32 and begin at 1 - 1e-6.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if method == "unipc" else {}
    torch.testing.assert_close(flow.sample(lambda x, t: target, noise, 7, method=method), data, **tolerance)


def test_heun_is_second_order() -> None:
    noise = torch.ones(1, 1, dtype=torch.float64)
    errors = []
    for steps in (20, 40):
        # dx/dsigma = x from sigma = 1 to 0 multiplies by e^-1
        sample = RectifiedFlow().sample(lambda x, t: x, noise, steps, method="heun")
        errors.append(abs(sample.item() - 2.718281828459045**-1))
    assert errors[0] / errors[1] > 3.2


MEAN, STD = 0.7, 0.4


def gaussian_velocity(flow: RectifiedFlow):
    """The exact field of normally distributed data: noise z flows to MEAN + STD z."""

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = t.double().reshape(-1, *[1] * (x.ndim - 1)) / flow.time_scale
        sigma = level if flow.orientation == "sigma" else 1 - level
        variance = ((1 - sigma) * STD) ** 2 + sigma**2
        to_noise = (sigma - (1 - sigma) * STD**2) / variance * (x - (1 - sigma) * MEAN) - MEAN
        return to_noise if flow.predicts == "noise" else -to_noise

    return velocity


def gaussian_error(flow: RectifiedFlow, steps: int, method: str) -> float:
    noise = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sample = flow.sample(gaussian_velocity(flow), noise, steps, method=method)
    return (sample - (MEAN + STD * noise)).abs().max().item()


@pytest.mark.parametrize("orientation", ["sigma", "t"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_unipc_is_second_order_at_one_call_a_step(orientation: str, shift: float) -> None:
    pytest.importorskip("diffusers")
    flow = RectifiedFlow(orientation, shift=shift)
    errors = [gaussian_error(flow, steps, "unipc") for steps in (20, 160, 320)]
    assert errors[1] / errors[2] > 3.2
    for steps, error in zip((20, 160), errors, strict=False):
        assert error < 0.4 * gaussian_error(flow, steps, "euler")


@pytest.mark.parametrize(("shift", "steps"), [(1.0, 6), (3.0, 20), (7.0, 200)])
def test_unipc_is_diffusers_scheduler(shift: float, steps: int) -> None:
    """Called by hand in diffusers' own way: shift inside the scheduler, noise-pointing velocity. In the last case truncated
    timesteps repeat, which makes the scheduler skip a level unless it is told where to begin."""
    diffusers = pytest.importorskip("diffusers")
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    flow, calls = RectifiedFlow("t", shift=shift), [0]

    def counted(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return gaussian_velocity(flow)(x, t).float()

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(sigmas=(1 - torch.arange(steps) / steps).double().numpy())
    scheduler.set_begin_index(0)
    x, mirrored = noise, RectifiedFlow("sigma", shift=shift)
    for level, t in zip(mirrored.levels(steps), scheduler.timesteps, strict=False):
        velocity = gaussian_velocity(mirrored)(x, mirrored.model_time(level).float().expand(2)).float()
        x = scheduler.step(velocity, t, x).prev_sample
    sample = flow.sample(counted, noise, steps, method="unipc")
    assert calls[0] == steps
    torch.testing.assert_close(sample, x, rtol=1e-4, atol=1e-5)
    assert torch.equal(sample, flow.sample(counted, noise, steps, method="unipc"))


def test_unipc_in_half_precision_and_callbacks() -> None:
    pytest.importorskip("diffusers")
    flow, seen = RectifiedFlow(), []
    noise = torch.randn(2, 3, 4, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(3))
    model = gaussian_velocity(flow)
    sample = flow.sample(
        lambda x, t: model(x, t).bfloat16(), noise, 8, method="unipc", callback=lambda step, x: seen.append((step, x))
    )
    assert [step for step, _ in seen] == list(range(1, 9)) and seen[-1][1] is sample
    assert sample.dtype == torch.bfloat16
    exact = flow.sample(lambda x, t: model(x, t).float(), noise.float(), 8, method="unipc")
    assert (sample - exact).abs().max() < 0.05  # 8 steps of bfloat16 on values up to 3


def test_unipc_without_diffusers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(OptionError, match="method: expected 'euler' or 'heun' where diffusers is not installed"):
        RectifiedFlow().sample(lambda x, t: x, torch.zeros(1, 2), 4, method="unipc")


def test_levels_times_and_densities() -> None:
    flow = RectifiedFlow(shift=3.0)
    levels = flow.levels(4)
    assert levels[0] == 1 and levels[-1] == 0
    assert torch.allclose(levels, shift_time(torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64), 3.0))
    assert RectifiedFlow("t", time_scale=1.0).model_time(torch.tensor(0.25)).item() == 0.75
    drawn = flow.sample_levels(20000, generator=torch.Generator().manual_seed(0))
    assert abs(drawn.median().item() - 0.75) < 0.01  # the median 1/2 of the logit-normal, shifted by 3
    assert 0 < flow.sample_levels(100, density="uniform").min()


def test_guidance_mixes_both_halves() -> None:
    model = guided(lambda x, t: torch.cat([x[: len(x) // 2] * 3, x[len(x) // 2 :]]), 2.0)
    assert torch.equal(model(torch.ones(1, 2), torch.zeros(1)), torch.full((1, 2), 5.0))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: respaced_steps("1001"), "spec: expected 1 to 1000 steps"),
        (lambda: respaced_steps("ddim999"), "spec: expected a count"),
        (lambda: respaced_steps("10,400,20"), "spec: expected 1 to 333 steps of each section's 333"),
        (lambda: respaced_steps("ten"), "spec: expected a number of steps"),
        (lambda: respaced_steps("ddim"), "spec: expected a number of steps"),
        (lambda: respaced_steps([]), "spec: expected a number of steps"),
        (lambda: GaussianDiffusion(fixed_variance="medium"), "fixed_variance: expected one of"),
        (lambda: RectifiedFlow("forwards"), "orientation: expected one of"),
        (lambda: RectifiedFlow(shift=0.0), "shift: expected a positive number"),
        (
            lambda: GaussianDiffusion("10").sample(toy, torch.zeros(1, 2, 4, 1, 1), method="pndm"),
            "method: expected one of",
        ),
        (
            lambda: RectifiedFlow().sample(toy, torch.zeros(1, 2), 4, method="dpm"),
            "method: expected one of",
        ),
    ],
)
def test_wrong_options(call, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        call()
