# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels <command>`. Each command lives in its own module, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence

from vidkernels._commands._options import run

# command -> (module whose main(argv) runs it, one line of help)
COMMANDS = {
    "info": (
        "vidkernels._commands.info",
        "what is installed and which backend serves each op (works when torch is broken)",
    ),
    "doctor": ("vidkernels._commands.doctor", "run every op on every backend and compare with the reference"),
    "bench": ("benchmarks.__main__", "microbenchmarks (needs the checkout)"),
    "tune": ("vidkernels._commands.tune", "time the backends of this machine and remember the fastest for each shape"),
    "demo": ("vidkernels._commands.demo", "a real clip through a video tokenizer, unpatched and patched"),
    "env": ("vidkernels._env", "the environment variables"),
    "tokenize": ("vidkernels._commands.tokenize", "a video file to tokens or latents"),
    "detokenize": ("vidkernels._commands.tokenize", "tokens or latents to a video file"),
    "calibrate": ("vidkernels._commands.calibrate", "a codebook of AdaCache, or a table of step caches, for a model"),
    "generate": ("vidkernels._commands.generate", "a video from noise, a class or text states"),
    "train": ("vidkernels._commands.train", "train a tokenizer or a transformer, resumable at any point"),
}


def _parser() -> argparse.ArgumentParser:
    package = importlib.import_module("vidkernels")
    parser = argparse.ArgumentParser(prog="vidkernels", description=(package.__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"vidkernels {package.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, help_text) in COMMANDS.items():
        commands.add_parser(name, help=help_text, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a command; returns its exit code, see `_command.run`."""
    arguments, rest = _parser().parse_known_args(sys.argv[1:] if argv is None else list(argv))
    command, name = arguments.command, f"vidkernels {arguments.command}"
    if command == "bench" and importlib.util.find_spec("benchmarks") is None:
        where = "is part of the checkout; run `python -m vidkernels bench` in it."
        print(f"{name}: the folder `benchmarks` {where}", file=sys.stderr)
        return 2
    if command in {"tokenize", "detokenize"}:
        rest = [command, *rest]
    return run(name, lambda: int(importlib.import_module(COMMANDS[command][0]).main(rest) or 0))


if __name__ == "__main__":
    raise SystemExit(main())
