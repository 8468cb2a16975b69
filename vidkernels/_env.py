# SPDX-License-Identifier: Apache-2.0
"""The environment variables of vidkernels: the one table that code, ENV.md and tests read.

Run-time variables are read once, when this module is imported, never inside traced code.
Build variables are read by `setup.py`, which loads this file by path; hence only the standard library is used.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, default, where it is read (`run` or `build`) and its effect."""

    name: str
    default: str
    read_at: str
    effect: str


VARIABLES: tuple[Variable, ...] = (
    Variable("VIDKERNELS_STRICT", "0", "run", "1 turns every fallback warning into the error `BackendUnavailable`."),
    Variable(
        "VIDKERNELS_LIBRARY_DIR",
        "",
        "run",
        "Load the compiled libraries from this folder instead of the package's own.",
    ),
    Variable("VIDKERNELS_SKIP_LIBRARY", "0", "run", "1 ignores the compiled libraries, as if nothing had been built."),
    Variable(
        "VIDKERNELS_LOG",
        "",
        "run",
        "Print messages of the `vidkernels` logger to stderr from this level on: debug, info, warning or error.",
    ),
    Variable(
        "VIDKERNELS_CACHE_DIR",
        "~/.cache/vidkernels",
        "run",
        "Where `tune` writes the orders of backends that it measured, and where they are read.",
    ),
    Variable(
        "VIDKERNELS_TRITON_LAUNCH",
        "0",
        "run",
        "1 lets Triton itself launch its kernels, without our short cut: several times the host time per launch.",
    ),
    Variable(
        "VIDKERNELS_COMMIT",
        "",
        "run",
        "Commit to record in benchmark results, for a checkout that was copied without `.git`; default: git's.",
    ),
    Variable("VIDKERNELS_FORCE_BUILD", "0", "build", "1 makes a missing compiler an error instead of a smaller build."),
    Variable("VIDKERNELS_SKIP_CUDA_BUILD", "0", "build", "1 builds no CUDA code even where nvcc is found."),
    Variable("VIDKERNELS_SKIP_CPU_BUILD", "0", "build", "1 builds no C++ code at all: a pure-Python install."),
    Variable(
        "VIDKERNELS_OPS", "", "build", "Comma-separated stems to compile, e.g. `fsq,adaln_zero`; empty means all."
    ),
    Variable(
        "TORCH_CUDA_ARCH_LIST",
        "8.0+PTX;9.0a;10.0a",
        "build",
        "CUDA architectures to compile, as PyTorch's own builds read it; +PTX serves GPUs that are not listed.",
    ),
    Variable("MAX_JOBS", "", "build", "Parallel compiler processes; default: by cores and by the memory limit."),
    Variable("CUDA_HOME", "", "build", "CUDA toolkit folder; default: the folder above `nvcc` on PATH."),
    Variable(
        "CXX",
        "",
        "build",
        "C++ compiler, with wrappers and flags if wanted, as in `ccache g++ -m64`; default: c++, g++ or clang++ on PATH.",
    ),
    Variable(
        "CXXFLAGS", "", "build", "Flags for C++ files, after the build's own; nvcc itself reads `NVCC_APPEND_FLAGS`."
    ),
    Variable("LDFLAGS", "", "build", "Flags for linking, after the build's own."),
)
_DEFAULTS = {variable.name: variable.default for variable in VARIABLES}


def text(name: str) -> str:
    """Value of a declared variable, or its default."""
    return os.environ.get(name, "").strip() or _DEFAULTS[name]


def flag(name: str) -> bool:
    """Whether a declared variable is set to 1, true, yes or on (any case)."""
    return text(name).lower() in {"1", "true", "yes", "on"}


STRICT = flag("VIDKERNELS_STRICT")
LIBRARY_DIR = text("VIDKERNELS_LIBRARY_DIR")
SKIP_LIBRARY = flag("VIDKERNELS_SKIP_LIBRARY")
TRITON_LAUNCH = flag("VIDKERNELS_TRITON_LAUNCH")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_LEVEL = text("VIDKERNELS_LOG")
# Triton's own variable, read here because it decides whether CPU tensors may go to Triton kernels (tests only).
TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
# oneDNN's own variable (two spellings), read here because no call of torch's tells which instructions it leaves.
ONEDNN_MAX_CPU_ISA = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).strip().upper()


def set_up_log(logger: logging.Logger) -> None:
    """Silence, as a library keeps it; lines on stderr where VIDKERNELS_LOG names a level."""
    logger.addHandler(logging.NullHandler())
    if not LOG_LEVEL:
        return
    if LOG_LEVEL.lower() not in LOG_LEVELS:
        from vidkernels.errors import OptionError  # here: setup.py loads this file without the package

        raise OptionError("VIDKERNELS_LOG", f"one of {', '.join(LOG_LEVELS)}", repr(LOG_LEVEL))
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(LOG_LEVEL.upper())


def markdown() -> str:
    """ENV.md, generated from `VARIABLES`."""
    rows = [f"| `{v.name}` | `{v.default or 'unset'}` | {v.read_at} | {v.effect} |" for v in VARIABLES]
    head = [
        "# Environment variables",
        "",
        "`run`: read once, when vidkernels is imported; set it before Python starts. `build`: read by `pip install`. Flags are on",
        "with 1, true, yes or on. `python -m vidkernels env` prints the values in force.",
        "",
        "Generated by `python -m vidkernels env --markdown`; a test keeps it up to date.",
        "",
    ]
    return "\n".join([*head, "| name | default | read at | effect |", "|---|---|---|---|", *rows]) + "\n"


def main(argv: Sequence[str]) -> int:
    """`python -m vidkernels env`: the table, with the values in force."""
    parser = argparse.ArgumentParser(prog="vidkernels env", description="Environment variables of vidkernels.")
    parser.add_argument("--markdown", action="store_true", help="print ENV.md")
    if parser.parse_args(argv).markdown:
        print(markdown(), end="")
        return 0
    for variable in VARIABLES:
        print(f"{variable.name}={text(variable.name)}  ({variable.read_at}) {variable.effect}")
    return 0
