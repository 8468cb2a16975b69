# SPDX-License-Identifier: Apache-2.0
"""What the commands share: options that are refused in one line, and errors of the machine told without a traceback."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch


def device(text: str) -> torch.device:
    """Type of `--device`: a device that this machine has."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}") from None
    try:
        torch.empty(1, device=found).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise argparse.ArgumentTypeError(f"expected a device of this machine, got {text!r}: {reason}") from None
    return found


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, by default CUDA where there is a GPU."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=device, default=default, help="cpu, cuda or cuda:N; default: cuda if there is one"
    )


def at_least(minimum: int) -> Callable[[str], int]:
    """Type of a number of things."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number from {minimum} on, got {text!r}")
        return value

    return number
