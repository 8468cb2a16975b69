# SPDX-License-Identifier: Apache-2.0
"""`vidkernels.explain`: of an op with arguments, or of a model."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from vidkernels import dispatch
from vidkernels.errors import OptionError

# Ops without backends of their own.
_RUNS_ON = {"downsample_conv3d": "causal_conv3d", "lfq_codes_to_indices": "lfq_quantize"}


def explain(target: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Say which backend serves a call and why the others do not, or what `patch` would do to a model.

    Args:
        target: name of a public op (`"fsq_quantize"`), the op itself (`ops.fsq_quantize`), or a model or pipeline.
        *args, **kwargs: the op's own arguments; for a model, the arguments of `vidkernels.patch`.

    Returns:
        `dispatch.Explanation` for an op, a dry-run `PatchReport` for a model. Both print as a table.
    """
    if isinstance(target, str):
        return _dispatcher(target).explain(*args, **kwargs)
    name = getattr(target, "__name__", "")
    if callable(target) and getattr(target, "__module__", "").startswith("vidkernels.ops"):
        return _dispatcher(name).explain(*args, **kwargs)
    patching = importlib.import_module("vidkernels.patching")
    return patching.explain(target, *args, **kwargs)


def _dispatcher(name: str) -> dispatch.Dispatcher:
    ops = importlib.import_module("vidkernels.ops")
    if name in ops.__all__:
        getattr(ops, name)
    known = dispatch.dispatchers()
    if name not in known:
        others = [other for other in ops.__all__ if other != name]
        close = [other for other in others if name and name in other] or difflib.get_close_matches(name, others, 1)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "See dir(vidkernels.ops)."
        if name in _RUNS_ON:
            hint = f"It runs on the backends of {_RUNS_ON[name]!r}."
        raise OptionError("target", "the name of a public op with backends", repr(name), hint)
    return known[name]
