# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels calibrate`: a codebook of AdaCache for one's own model, or every kind of step cache in one table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from vidkernels import _files
from vidkernels._commands import generate
from vidkernels._commands._options import about, at_least, check_output
from vidkernels._pipeline_sample import sample
from vidkernels.caching import calibrate, compare
from vidkernels.errors import OptionError


def _parser() -> argparse.ArgumentParser:
    parser = generate.parser("calibrate", "Speed against fidelity of step caches on a model, from a few sample runs.")
    parser.add_argument("--relative-error", type=float, help="find a codebook: largest error of the final latents")
    parser.add_argument("--psnr", type=float, help="find a codebook: smallest PSNR of the final latents, dB")
    parser.add_argument("--compare", action="store_true", help="table of AdaCache, first-block and Taylor caches")
    parser.add_argument(
        "--samples", type=at_least(1), default=2, help="seeds that are run for each candidate; default: 2"
    )
    parser.add_argument("--runs", type=at_least(1), default=16, help="candidates to try; default: 16")
    parser.add_argument("--motion", action="store_true", help="find a codebook for AdaCache with motion regularisation")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Calibrate or compare."""
    if arguments.compare == (arguments.relative_error is not None or arguments.psnr is not None):
        raise OptionError("--relative-error, --psnr, --compare", "one of them", "none or several")
    if arguments.adacache is not None:
        raise OptionError("--adacache", "none: caches are installed by this command", arguments.adacache)
    if not arguments.compare and arguments.out is None:
        raise OptionError("--out", "a JSON file for the codebook", "none")
    if arguments.out is not None:
        check_output("--out", arguments.out)
    pipeline, request = generate.prepared(arguments)
    steps, seeds = request.steps or 1, range(arguments.seed, arguments.seed + arguments.samples)

    def sampler(seed: int) -> Tensor:
        with about("--steps", "spec"):
            return sample(pipeline, replace(request, seed=seed))

    if request.method == "heun":
        raise OptionError("--method", "one with one call per step", "heun")
    if arguments.compare:
        table = compare(pipeline.model, sampler, steps, seeds=seeds, show=False)
        print(table)
        if arguments.out is not None:
            _files.write_text(arguments.out, f"{table}\n")
        return 0
    limits = {"relative_error": arguments.relative_error, "psnr": arguments.psnr}
    with about("--relative-error", "relative_error"), about("--psnr", "psnr"):
        found = calibrate(
            pipeline.model, sampler, steps, **limits, motion=arguments.motion, seeds=seeds, runs=arguments.runs
        )
    found.save(arguments.out)
    print(found.trials)
    row = found.row
    print(
        f"{arguments.out}: {row.computed:g} of {steps} steps, relative error {row.relative_error:.4f}: {found.codebook}"
    )
    return 0


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    return run(_parser().parse_args(argv))
