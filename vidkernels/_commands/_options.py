# SPDX-License-Identifier: Apache-2.0
"""What the commands share: options that are refused in one line, and errors of the machine told without a traceback.
torch is imported where it is needed: `info` answers without it."""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vidkernels.errors import OptionError, VidkernelsError

if TYPE_CHECKING:
    import torch


def run(name: str, command: Callable[[], int]) -> int:
    """Exit code of a command: its own (1 is a check that failed), 2 where an argument is refused, a file cannot be read or
    written or a package is missing, 130 after Ctrl-C, 143 after SIGTERM. These end in one line on stderr; every other exception
    is a fault of ours and keeps its traceback."""
    try:
        with _terminable():
            code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print(f"{name}: terminated", file=sys.stderr)
        return 143
    except BrokenPipeError:  # the reader of our output has gone
        _close_output()
        return 141
    except VidkernelsError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None:
            raise
        if error.filename is None:  # files are named, so it is our output
            _close_output()
        print(f"{name}: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in {"", "vidkernels", "benchmarks"}:
            raise
        print(f"{name}: the Python package {package} is missing: pip install {package}", file=sys.stderr)
        return 2


class _Terminated(SystemExit):
    """SIGTERM came; of SystemExit's kind, so that a forked child ends without a traceback."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds the command as Ctrl-C does, so that half-written files are removed; without this Python just ends."""
    default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not default or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise _Terminated(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _close_output() -> None:
    """Python's own flush at exit must not complain, too, and change the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def about(option: str, *arguments: str) -> Iterator[None]:
    """What a function refuses of these arguments of its own is said of the option that they come from."""
    try:
        yield
    except OptionError as error:
        if error.argument not in arguments:
            raise
        raise OptionError(option, error.expected, error.got, error.remedy) from error


def device(text: str) -> torch.device:
    """Type of `--device`: a device that this machine has."""
    import torch

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
    import torch

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


def positive(text: str) -> float:
    """Type of a number of seconds and the like."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def seed(text: str) -> int:
    """Type of a seed: 64 bits."""
    try:
        value = int(text)
    except ValueError:
        value = 2**63
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number of 64 bits, got {text!r}")
    return value


def output_folder(text: str) -> Path:
    """Type of a folder to write to, made when something is written."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text!r}")
    return path


def pattern(text: str) -> str:
    """Type of a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from None
    return text


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
