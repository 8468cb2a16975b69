# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels train <what> ...`: each kind of training has its own module with a `main(argv)`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

# what -> (module whose main(argv) trains it, one line of help)
KINDS = {
    "tokenizer": ("vidkernels.training.tokenizer_run", "a video tokenizer on real clips"),
    "dit": ("vidkernels.training.dit", "a video diffusion transformer on a tokenizer's latents"),
}


def main(argv: Sequence[str]) -> int:
    """Dispatch to a kind of training; returns its exit code."""
    parser = argparse.ArgumentParser(prog="vidkernels train", description="Training, resumable at any point.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="what")
    for name, (_, text) in KINDS.items():
        kinds.add_parser(name, help=text, add_help=False)
    arguments, rest = parser.parse_known_args(list(argv))
    return int(importlib.import_module(KINDS[arguments.kind][0]).main(rest) or 0)
