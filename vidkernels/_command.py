# SPDX-License-Identifier: Apache-2.0
"""What the commands share: options that are refused in one line, and errors of the machine told without a traceback."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from vidkernels.errors import OptionError


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


def check_output(argument: str, path: Path | None, suffixes: Collection[str] = ()) -> Path:
    """Refuse a file that could not be written in the end, before the work begins; makes its folder.

    Raises:
        OptionError: no path, or one that ends in something else.
        OSError: the folder cannot be made or written to.
    """
    if path is None or (suffixes and path.suffix.lower() not in suffixes):
        wanted = f"a file ending in {' or '.join(sorted(suffixes))}" if suffixes else "a file"
        raise OptionError(argument, wanted, None if path is None else str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path if path.exists() else path.parent
    if path.is_dir():
        raise OptionError(argument, "a file", f"the folder {path}")
    if not os.access(place, os.W_OK):
        raise PermissionError(13, "Permission denied", str(path))
    return path
