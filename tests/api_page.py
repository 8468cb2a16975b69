# SPDX-License-Identifier: Apache-2.0
"""docs/api.md: every public name with the first sentence of its docstring. `python tests/api_page.py` writes it."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

PACKAGES = (
    "vidkernels",
    "vidkernels.ops",
    "vidkernels.nn",
    "vidkernels.packing",
    "vidkernels.models.tokenizers",
    "vidkernels.models.transformers",
    "vidkernels.sampling",
    "vidkernels.caching",
    "vidkernels.patching",
    "vidkernels.training",
    "vidkernels.distributed",
    "vidkernels.errors",
)
HEAD = """# Interface

Written by `python tests/api_page.py` from the docstrings, which hold shapes, dtypes, errors and sources; a test keeps it equal.
Names with a leading underscore are nobody's business but the package's.
"""


def public(name: str) -> dict[str, Any]:
    """Public names of a package, sorted; subpackages and constants of the top level left out."""
    module = importlib.import_module(name)
    found = {item: getattr(module, item) for item in sorted(module.__all__, key=lambda item: (item.lower(), item))}
    return {item: value for item, value in found.items() if not inspect.ismodule(value) and item != "__version__"}


def summary(value: Any) -> str:
    """First sentence of a docstring; a constant's is its type."""
    own = value.__doc__ if isinstance(value, type) or callable(value) else None
    if own is None:
        return "" if callable(value) else f"`{type(value).__name__}`"
    paragraph = " ".join(inspect.cleandoc(own).partition("\n\n")[0].split())
    sentence = re.split(r"(?<=[.])\s+(?=[A-Z`])", paragraph)[0]
    return sentence.replace("|", "\\|")


def markdown() -> str:
    """The whole page."""
    parts = [HEAD]
    for name in PACKAGES:
        rows = [f"| `{item}` | {summary(value)} |" for item, value in public(name).items()]
        parts.append("\n".join([f"## `{name}`", "", "| name | |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).resolve().parent.parent / "docs" / "api.md").write_text(markdown())
