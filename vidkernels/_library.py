# SPDX-License-Identifier: Apache-2.0
"""Loading of the compiled libraries. Importing this module never fails: the reason is kept and shown at first use."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

from vidkernels import _env

_PACKAGE = Path(__file__).resolve().parent
_BUILD_COMMAND = "pip install -e . --no-build-isolation"


def folder() -> Path:
    """Where the compiled libraries lie."""
    return Path(_env.LIBRARY_DIR).expanduser() if _env.LIBRARY_DIR else _PACKAGE


def _installed_copy() -> Path | None:
    """Folder of another, built vidkernels on sys.path that this source tree shadows (Python started in the checkout)."""
    for entry in sys.path:
        candidate = Path(entry or ".").resolve() / "vidkernels"
        if candidate != _PACKAGE and any(candidate.glob("libvidkernels_*.so")):
            return candidate
    return None


def _missing(kind: str, path: Path) -> str:
    built = _installed_copy()
    if built is not None:
        return (
            f"the {kind} library is not in {path.parent}: you are importing the source tree at {_PACKAGE.parent}, "
            f"the built copy is at {built}; start Python in another folder or run `{_BUILD_COMMAND}`"
        )
    compiler = "nvcc" if kind == "CUDA" else "a C++ compiler"
    if _env.LIBRARY_DIR:
        return f"{path.name} is not in VIDKERNELS_LIBRARY_DIR={_env.LIBRARY_DIR}"
    return (
        f"the {kind} library was not built ({path.name} not found); run `{_BUILD_COMMAND}` where {compiler} is on PATH"
    )


def _load(kind: str, name: str) -> str | None:
    """Load one shared object into torch's dispatcher. Returns None, or why it is not there."""
    path = folder() / name
    if _env.SKIP_LIBRARY:
        return "VIDKERNELS_SKIP_LIBRARY=1 is set"
    if not path.exists():
        return _missing(kind, path)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = error.__cause__ or error  # torch names the file alone, its cause what the loader said
        return f"{path.name} cannot be loaded by torch {torch.__version__}: {reason}; run `{_BUILD_COMMAND}` again"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    return _load("CUDA", "libvidkernels_cuda.so")


cpu_missing: str | None = _load("CPU", "libvidkernels_cpu.so")
cuda_missing: str | None = _load_cuda()


def _built_architectures() -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST of the CUDA library's build; empty if it is not known."""
    try:
        facts = json.loads((folder() / "_build_info.json").read_text())
        return tuple(str(facts["arch_list"]).replace(",", " ").replace(";", " ").split())
    except (OSError, ValueError, KeyError, TypeError):
        return ()


CUDA_ARCHITECTURES = _built_architectures()


def cuda_serves(capability: tuple[int, int]) -> bool:
    """Whether the CUDA library has code for GPUs of this compute capability.

    Code for 8.0 runs on 8.6, too, that for 10.0f on 10.3, and that for 9.0a on 9.0 alone; +PTX is compiled for what is newer.
    """
    for entry in CUDA_ARCHITECTURES:
        name, _, ptx = entry.partition("+")
        number = name.rstrip("af").replace(".", "")
        built = int(number[:-1]), int(number[-1])
        if built == capability or name.endswith("a"):
            found = built == capability
        else:
            found = built < capability and (built[0] == capability[0] or bool(ptx and not name.endswith("f")))
        if found:
            return True
    return not CUDA_ARCHITECTURES


def triton_missing() -> str | None:
    """None where Triton can be imported, otherwise the reason."""
    return _TRITON


_TRITON = None if importlib.util.find_spec("triton") is not None else "the triton package is not installed"
