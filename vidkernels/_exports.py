# SPDX-License-Identifier: Apache-2.0
"""Lazy re-exports: a package's public names, each from the module that defines it, imported at first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


class _ExportingModule(ModuleType):
    """A package in which an op keeps its name when the submodule of the same name is imported: Python binds the submodule
    in its package after loading it, which would hide `ops.causal_conv3d` behind `ops/causal_conv3d.py`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and self.__dict__.get("_EXPORTS", {}).get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


def lazy(package: str, exports: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Module-level `__getattr__` and `__dir__` of a package whose `_EXPORTS` map a public name to its module."""
    sys.modules[package].__class__ = _ExportingModule

    def getattr_(name: str) -> Any:
        if name not in exports:
            # With name and obj Python's traceback says "Did you mean: ...?".
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        return getattr(importlib.import_module(exports[name]), name)

    def dir_() -> list[str]:
        return sorted(exports)

    return getattr_, dir_
