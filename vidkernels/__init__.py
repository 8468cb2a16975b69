# SPDX-License-Identifier: Apache-2.0
"""vidkernels: fast kernels for video tokenizers and video diffusion transformers in PyTorch.

`vidkernels.patch(model)` speeds up a model in place; `vidkernels.ops` and `vidkernels.nn` are the kernels themselves.
Importing the package prints nothing, compiles nothing and touches no GPU: parts are imported at first use.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

from vidkernels import _env

if TYPE_CHECKING:
    from vidkernels import caching as caching
    from vidkernels import distributed as distributed
    from vidkernels import errors as errors
    from vidkernels import models as models
    from vidkernels import nn as nn
    from vidkernels import ops as ops
    from vidkernels import packing as packing
    from vidkernels import patching as patching
    from vidkernels import sampling as sampling
    from vidkernels import training as training
    from vidkernels._explain import explain as explain
    from vidkernels.caching import adacache as adacache
    from vidkernels.patching import patch as patch
    from vidkernels.patching import patched as patched
    from vidkernels.patching import register_rule as register_rule
    from vidkernels.patching import status as status
    from vidkernels.patching import unpatch as unpatch
    from vidkernels.patching import unpatched as unpatched
    from vidkernels.patching._rule import rules as rules

__version__ = "0.1.0"

_SUBPACKAGES = (
    "caching",
    "distributed",
    "errors",
    "models",
    "nn",
    "ops",
    "packing",
    "patching",
    "sampling",
    "training",
)
_EXPORTS = {
    "patch": "vidkernels.patching",
    "unpatch": "vidkernels.patching",
    "patched": "vidkernels.patching",
    "unpatched": "vidkernels.patching",
    "status": "vidkernels.patching",
    "rules": "vidkernels.patching",
    "register_rule": "vidkernels.patching",
    "explain": "vidkernels._explain",
    "adacache": "vidkernels.caching",
}
__all__ = sorted([*_SUBPACKAGES, *_EXPORTS, "__version__"])

_env.set_up_log(logging.getLogger("vidkernels"))


if not TYPE_CHECKING:  # type checkers know the names above, and no others

    def __getattr__(name: str) -> Any:
        if name in _SUBPACKAGES:
            return importlib.import_module(f"vidkernels.{name}")
        if name in _EXPORTS:
            return getattr(importlib.import_module(_EXPORTS[name]), name)
        raise AttributeError(f"module 'vidkernels' has no attribute {name!r}", name=name, obj=sys.modules[__name__])

    def __dir__() -> list[str]:
        return __all__
