# SPDX-License-Identifier: Apache-2.0
"""Where the references live: `vidkernels._python_ref` in an installed package, `python_ref` in a bare checkout.

Started in the checkout's root, Python imports the source `vidkernels/`, which has no `_python_ref` inside.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_CHECKOUT = Path(__file__).resolve().parent.parent / "python_ref"


def _package() -> ModuleType:
    if importlib.util.find_spec("vidkernels._python_ref") is not None:
        return importlib.import_module("vidkernels._python_ref")
    name = "vidkernels._python_ref"
    spec = importlib.util.spec_from_file_location(
        name, _CHECKOUT / "__init__.py", submodule_search_locations=[str(_CHECKOUT)]
    )
    if spec is None or spec.loader is None or not (_CHECKOUT / "__init__.py").exists():
        raise ImportError(f"the reference implementations are missing: neither {name} nor {_CHECKOUT} exists")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_PACKAGE = _package()


def __getattr__(stem: str) -> ModuleType:
    if stem.startswith("__"):
        raise AttributeError(stem)
    return importlib.import_module(f"{_PACKAGE.__name__}.{stem}")
