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

_NAME = "vidkernels._python_ref"
_CHECKOUT = Path(__file__).resolve().parent.parent / "python_ref"


def _package() -> ModuleType:
    # The checkout's own come first: under that name an editable install of another checkout would give its references.
    if (_CHECKOUT / "__init__.py").exists():
        spec = importlib.util.spec_from_file_location(
            _NAME, _CHECKOUT / "__init__.py", submodule_search_locations=[str(_CHECKOUT)]
        )
        assert spec is not None and spec.loader is not None
        module = sys.modules[_NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(_NAME)
    except ModuleNotFoundError as error:
        raise ImportError(f"the references are missing: neither {_NAME} nor {_CHECKOUT} exists") from error


_PACKAGE = _package()


def __getattr__(stem: str) -> ModuleType:
    if stem.startswith("__"):
        raise AttributeError(stem)
    return importlib.import_module(f"{_PACKAGE.__name__}.{stem}")
