# SPDX-License-Identifier: Apache-2.0
"""Speed against fidelity of step caches on the user's own model, in one table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vidkernels.caching.handle import CacheHandle, Policy
from vidkernels.caching.policies import CODEBOOKS, AdaCachePolicy, FirstBlockPolicy, TaylorPolicy
from vidkernels.errors import OptionError, ShapeError
from vidkernels.ops._checks import check_callable, check_tensor

Sampler = Callable[[int], Tensor]


@dataclass(frozen=True)
class Row:
    """One policy, over all seeds.

    Attributes:
        name: of the policy. computed: computed steps, mean over the seeds. steps: of one sample.
        seconds: of one sample, the fastest of the seeds' runs. speedup: against the uncached run's.
        relative_error: ||x - x0|| / ||x0|| of the final latents against the uncached run, the worst of the seeds.
        psnr: 10 log10(range(x0)^2 / mean squared difference), the worst of the seeds, in dB.
    """

    name: str
    computed: float
    steps: int
    seconds: float
    speedup: float
    relative_error: float
    psnr: float


@dataclass(frozen=True)
class Comparison:
    """The table that `compare` makes: rows in the order of the policies, first the uncached run. `str` is a Markdown table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ("policy", "steps computed", "seconds", "speed-up", "relative error", "PSNR, dB")
        lines = [head, ("---", *["---:"] * 5)]
        for row in self.rows:
            psnr = "exact" if math.isinf(row.psnr) else f"{row.psnr:.1f}"
            share = f"{row.computed:g} of {row.steps}"
            lines.append(
                (row.name, share, f"{row.seconds:.3g}", f"{row.speedup:.2f}", f"{row.relative_error:.4f}", psnr)
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines
        )


def fidelity(latents: Tensor, truth: Tensor) -> tuple[float, float]:
    """(relative error, PSNR in dB over the truth's own range); (0, inf) where they are equal."""
    if latents.shape != truth.shape:
        raise ShapeError("latents", f"the uncached run's shape {tuple(truth.shape)}", tuple(latents.shape))
    difference, truth = (latents.double() - truth.double()), truth.double()
    mean = difference.square().mean().item()
    if mean == 0:
        return 0.0, math.inf
    spread = (truth.max() - truth.min()).item()
    error = difference.norm().item() / max(truth.norm().item(), 1e-300)
    return error, 10 * math.log10(max(spread, 1e-300) ** 2 / mean)


def default_policies(steps: int) -> dict[str, Policy]:
    """The policies of `compare`: AdaCache's codebooks, first-block drift at three thresholds, Taylor series of two orders."""
    found: dict[str, Policy] = {
        f"AdaCache {name}": AdaCachePolicy(steps, codebook) for name, codebook in CODEBOOKS.items()
    }
    found |= {f"first block {threshold}": FirstBlockPolicy(steps, threshold) for threshold in (0.05, 0.1, 0.2)}
    pairs = ((2, 1), (3, 1), (3, 2), (5, 2))
    found |= {f"Taylor every {n}, order {order}": TaylorPolicy(steps, n, order) for n, order in pairs}
    return found


@contextmanager
def installed(model: nn.Module, policy: Policy, calls_per_step: int, residual: str) -> Iterator[CacheHandle]:
    """A cache for the time of the block."""
    handle = CacheHandle(model, policy, residual=residual, calls_per_step=calls_per_step)
    try:
        yield handle
    finally:
        handle.remove()


def timed(sampler: Sampler, seed: int) -> tuple[Tensor, float]:
    """Final latents and seconds of one run."""
    begin = time.perf_counter()
    with torch.no_grad():
        latents = sampler(seed)
    check_tensor("sampler", latents)  # what it returned: a pipeline's output object, for one
    if latents.device.type == "cuda":
        torch.cuda.synchronize(latents.device)
    return latents.detach(), time.perf_counter() - begin


def compare(
    model: nn.Module,
    sampler: Sampler,
    steps: int,
    *,
    policies: Mapping[str, Policy] | None = None,
    seeds: Sequence[int] = (0,),
    calls_per_step: int = 1,
    residual: str = "temporal-attention",
    show: bool = True,
) -> Comparison:
    """Run every policy against the uncached model, and print the table.

    Args:
        model: the transformer, without a cache.
        sampler: runs the whole denoising loop on the model: seed -> final latents, the same for the same seed.
        steps: denoising steps of the sampler.
        policies: by the name in the table; default: `default_policies(steps)`.
        seeds: one run each.
        calls_per_step, residual: see `adacache`.
        show: print the table.

    Raises:
        OptionError: a policy has another number of steps, or the sampler does not call the model `steps` times.
    """
    policies = default_policies(steps) if policies is None else policies
    for name, policy in policies.items():
        if policy.steps != steps:
            raise OptionError(name, f"a policy of {steps} steps", policy.steps)
    truths, plain = reference(sampler, seeds)
    rows = [Row("uncached", steps, steps, plain, 1.0, 0.0, math.inf)]
    for name, policy in policies.items():
        rows.append(measure(model, sampler, name, policy, truths, plain, calls_per_step, residual))
    table = Comparison(tuple(rows))
    if show:
        print(table)
    return table


def reference(sampler: Sampler, seeds: Sequence[int]) -> tuple[dict[int, Tensor], float]:
    """Uncached latents by seed, and the fastest run's seconds; the first run is repeated, it also warms up."""
    check_callable("sampler", sampler, "a function: seed -> final latents")
    if not isinstance(seeds, Sequence) or not seeds:
        raise OptionError("seeds", "a sequence of at least one", seeds)
    timed(sampler, seeds[0])
    runs = {seed: timed(sampler, seed) for seed in seeds}
    return {seed: latents for seed, (latents, _) in runs.items()}, min(seconds for _, seconds in runs.values())


def measure(
    model: nn.Module,
    sampler: Sampler,
    name: str,
    policy: Policy,
    truths: Mapping[int, Tensor],
    plain: float,
    calls_per_step: int = 1,
    residual: str = "temporal-attention",
) -> Row:
    """One policy's row."""
    times, errors, ratios, computed = [], [], [], []
    with installed(model, policy, calls_per_step, residual) as handle:
        for seed, truth in truths.items():
            handle.reset()
            latents, seconds = timed(sampler, seed)
            report = handle.report()
            if report.total_steps != policy.steps or handle.samples:
                expected = f"a sampler of {policy.steps} steps with {calls_per_step} calls each"
                raise OptionError(
                    "sampler",
                    expected,
                    f"{handle.samples * policy.steps + report.total_steps} steps",
                    "Check steps and calls_per_step.",
                )
            error, ratio = fidelity(latents, truth)
            times.append(seconds)
            errors.append(error)
            ratios.append(ratio)
            computed.append(len(report.computed_steps))
    mean = sum(computed) / len(computed)
    return Row(name, mean, policy.steps, min(times), plain / min(times), max(errors), min(ratios))
