# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels info`: what is installed and what can run. Standard library only, every probe guarded, so that
it also answers when torch or the build is broken; runnable by path: `python vidkernels/_commands/info.py`."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "triton", "vidkernels", "diffusers", "flash-attn", "nvidia-cudnn-frontend", "vector-quantize-pytorch",
    "liger-kernel", "av", "numpy",
)  # fmt: skip
_HERE = Path(__file__).resolve().parent.parent


def _probe(function: Callable[[], Any]) -> Any:
    """Result of a probe, or its error as text: one broken part must not hide the others."""
    try:
        return function()
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_facts() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "cuda_build": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    facts["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        facts["devices"] = [
            f"{torch.cuda.get_device_name(i)} sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
            for i in range(torch.cuda.device_count())
        ]
    return facts


def _build_facts() -> dict[str, Any]:
    """What the module of this Python says; else the file beside the libraries, which serve every Python."""
    try:
        build = importlib.import_module("vidkernels._C")
    except ModuleNotFoundError as error:
        if error.name != "vidkernels._C":
            raise
        file = _HERE / "_build_info.json"
        if not file.exists():
            return {"compiled": "nothing: a pure-Python install"}
        return {
            "module": "_C is not there for this Python; the libraries do not need it",
            **json.loads(file.read_text()),
        }
    return dict(build.build_info())


def _libraries() -> dict[str, str]:
    library = importlib.import_module("vidkernels._library")
    named = {"C++": library.cpu_missing, "CUDA": library.cuda_missing, "Triton": library.triton_missing()}
    return {name: "ok" if reason is None else reason for name, reason in named.items()}


def _backends() -> dict[str, dict[str, str]]:
    samples = importlib.import_module("vidkernels._commands.samples")
    explain = importlib.import_module("vidkernels._explain").explain
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = {}
    for sample in samples.samples(device):
        choices = explain(sample.op, *sample.args, **sample.kwargs).choices
        table[sample.op] = {choice.backend: choice.reason or "ok" for choice in choices}
    return table


def _first_line(command: list[str]) -> str | None:
    path = shutil.which(command[0])
    if path is None:
        return None
    run = subprocess.run([path, *command[1:]], capture_output=True, text=True, timeout=20, check=False)
    lines = [line for line in run.stdout.splitlines() if "release" in line or command[0] != "nvcc"]
    return f"{path}: {lines[0].strip()}" if lines else path


def collect() -> dict[str, Any]:
    """All facts as one dictionary, ready for JSON."""
    return {
        "python": f"{platform.python_version()} at {sys.executable}",
        "platform": platform.platform(),
        "package": str(_HERE),
        "versions": {package: _version(package) for package in PACKAGES},
        "compilers": {name: _probe(partial(_first_line, [name, "--version"])) for name in ("nvcc", "c++", "ninja")},
        "torch": _probe(_torch_facts),
        "build": _probe(_build_facts),
        "libraries": _probe(_libraries),
        "backends": _probe(_backends),
    }


def render(facts: dict[str, Any]) -> str:
    """The facts as indented text."""
    lines: list[str] = []

    def walk(value: Any, indent: int) -> None:
        width = max((len(str(key)) for key in value), default=0)
        for key, item in value.items():
            if isinstance(item, dict):
                lines.append(f"{'  ' * indent}{key}")
                walk(item, indent + 1)
            else:
                shown = "not installed" if item is None else item
                lines.append(f"{'  ' * indent}{key:<{width}}  {shown}")

    walk(facts, 0)
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Print the report; returns the exit code 0."""
    parser = argparse.ArgumentParser(
        prog="vidkernels info", description="Versions, build, and the backends of every op."
    )
    parser.add_argument("--json", action="store_true", help="machine-readable, for bug reports")
    arguments = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=1) if arguments.json else render(facts))
    return 0


if __name__ == "__main__":
    # Run by path, Python puts the package's own folder first, where `triton/` would hide the real Triton.
    own = Path(__file__).resolve().parent
    sys.path[:] = [
        str(_HERE.parent),
        *(entry for entry in sys.path if Path(entry or ".").resolve() not in (_HERE, own)),
    ]
    raise SystemExit(main(sys.argv[1:]))
