# SPDX-License-Identifier: Apache-2.0
"""Thin models over `vidkernels.nn` and `vidkernels.ops`: `tokenizers` and `transformers`."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vidkernels.models import tokenizers as tokenizers
    from vidkernels.models import transformers as transformers

__all__ = ["tokenizers", "transformers"]

if not TYPE_CHECKING:  # type checkers know the names above, and no others

    def __getattr__(name: str) -> ModuleType:
        if name in __all__:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])

    def __dir__() -> list[str]:
        return __all__
