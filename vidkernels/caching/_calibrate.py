# SPDX-License-Identifier: Apache-2.0
"""A codebook for a model that has none, for a fidelity that the user states."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vidkernels import _files
from vidkernels.caching._compare import Comparison, Row, Sampler, installed, measure, reference, timed
from vidkernels.caching.policies import AdaCachePolicy, Codebook
from vidkernels.errors import OptionError
from vidkernels.ops._checks import check_number, check_whole

ALWAYS: Codebook = ((1.0, 1),)


@dataclass(frozen=True)
class Calibration:
    """The codebook that `calibrate` found, and its measurements.

    Attributes:
        codebook: for `adacache(model, steps, codebook=..., motion=...)`.
        steps, motion: what it was found for.
        row: its measurement.
        trials: every codebook that was tried.
    """

    codebook: Codebook
    steps: int
    motion: bool
    row: Row
    trials: Comparison

    def save(self, path: str | Path) -> None:
        """Write JSON that `python -m vidkernels generate --adacache FILE` reads."""
        facts = {"codebook": self.codebook, "steps": self.steps, "motion": self.motion, "computed": self.row.computed}
        facts |= {"relative_error": self.row.relative_error, "speedup": round(self.row.speedup, 3)}
        _files.write_text(Path(path), json.dumps(facts, indent=1) + "\n")


def ladder(top: float, rate: int) -> Codebook:
    """Rates `rate`, ..., 2 at evenly spaced thresholds up to `top`, and 1 beyond: the shape of the published 30-step codebook."""
    count = rate - 1
    return (*((top * (i + 1) / count, rate - i) for i in range(count)), (2 * top + 1.0, 1))


def calibrate(
    model: nn.Module,
    sampler: Sampler,
    steps: int,
    *,
    relative_error: float | None = None,
    psnr: float | None = None,
    motion: bool = False,
    seeds: Sequence[int] = (0, 1),
    runs: int = 16,
    calls_per_step: int = 1,
    residual: str = "temporal-attention",
) -> Calibration:
    """Find the codebook that computes the fewest steps while every seed keeps the fidelity.

    For each highest rate the top threshold of a `ladder` is bisected between the smallest and the largest distance that the
    uncached model shows. Every candidate is run and measured; nothing is extrapolated. If none keeps the fidelity, the
    answer computes every step.

    Args:
        model, sampler, steps, calls_per_step, residual: see `compare`.
        relative_error: largest ||x - x0|| / ||x0|| of the final latents; or psnr: smallest PSNR in dB. One of the two.
        motion: calibrate with motion regularisation.
        seeds: samples that must keep the fidelity; all of them are run for each candidate.
        runs: candidates to try at most.
    """
    if (relative_error is None) == (psnr is None):
        raise OptionError("relative_error, psnr", "one of the two", (relative_error, psnr))
    limits = {"relative_error": relative_error, "psnr": psnr}
    for name, limit in ((name, limit) for name, limit in limits.items() if limit is not None):
        check_number(name, limit, 0.0)
    check_whole("runs", runs, 1)
    truths, plain = reference(sampler, seeds)
    low, high = _distances(model, sampler, steps, seeds, calls_per_step, residual)
    rows: list[Row] = []
    found: list[tuple[Codebook, Row]] = []

    def kept(codebook: Codebook, name: str) -> bool:
        policy = AdaCachePolicy(steps, codebook, motion)
        row = measure(model, sampler, name, policy, truths, plain, calls_per_step, residual)
        rows.append(row)
        fine = row.relative_error <= relative_error if relative_error is not None else row.psnr >= (psnr or 0.0)
        if fine:
            found.append((codebook, row))
        return fine

    always = Row("every step", steps, steps, plain, 1.0, 0.0, float("inf"))
    for rate in _rates(steps, runs):
        below, above = low, 2 * high  # at twice the largest distance the highest rate serves every step but the first
        for _ in range(_bisections(runs, steps)):
            if len(rows) == runs:
                break
            top = (below * above) ** 0.5
            if kept(ladder(top, rate), f"rates to {rate}, thresholds to {top:.4g}"):
                below = top
            else:
                above = top
    codebook, row = min(found, key=lambda pair: (pair[1].computed, pair[1].relative_error), default=(ALWAYS, always))
    if row.computed >= steps:
        codebook, row = ALWAYS, always
    return Calibration(codebook, steps, motion, row, Comparison((always, *rows)))


def _rates(steps: int, runs: int) -> list[int]:
    """Highest rates to try, the most cautious first."""
    rates = [rate for rate in (2, 3, 4, 6, 8, 12) if rate <= max(steps // 4, 2)]
    return rates[: max(runs // 2, 1)]


def _bisections(runs: int, steps: int) -> int:
    return -(-runs // len(_rates(steps, runs)))


def _distances(
    model: nn.Module, sampler: Sampler, steps: int, seeds: Sequence[int], calls_per_step: int, residual: str
) -> tuple[float, float]:
    """Smallest and largest distance between neighbouring steps of the uncached model."""
    found: list[float] = []
    with installed(model, AdaCachePolicy(steps, ALWAYS, False), calls_per_step, residual) as handle:
        for seed in seeds:
            handle.reset()
            timed(sampler, seed)
            found += handle.report().distances
    found = [value for value in found if value > 0]
    if not found:
        raise OptionError("sampler", "residuals that change from step to step", "none do", "Is the model untrained?")
    return min(found), max(found)
