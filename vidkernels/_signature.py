# SPDX-License-Identifier: Apache-2.0
"""What calls that look alike share: the decisions that a public op has taken about one of them.

Checks and the choice of a backend take 10 to 35 us of Python, the look-up 2 to 4. A signature holds all that they read: of
each tensor shape, dtype, device and layout, and every option with its type, since True is no size although it equals 1. A call has
no signature, and is decided anew, while a graph is traced, under transforms of `torch.func` or forward-mode derivatives, and
where a tensor is of a subclass: fakes, distributed tensors and wrappers of adapters decide by more than this.

Values, strides, gradients and autocast are not part of it: who reads those reads them in every call.
"""

from __future__ import annotations

import marshal
from collections.abc import Hashable
from typing import Any

import torch

from vidkernels._tracing import active_transform

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_EXACT = frozenset({int, bool, float, str, type(None)})
_STRIDED = torch.strided
# A model has a few hundred signatures a size of its clips. Past this an op forgets all of them at once.
_MOST = 4096
# Without references to objects seen before, so that equal options are equal bytes.
_MARSHAL_VERSION = 2

_MEMOS: list[Memo] = []
_epoch = 0


def _is_exact(option: object) -> bool:
    if type(option) in (tuple, list):
        return all(type(part) in _EXACT for part in option)  # type: ignore[attr-defined]
    return type(option) in _EXACT


class Memo(dict[Hashable, Any]):
    """Decisions by signature. Only what was decided without an error or a warning belongs here."""

    def __init__(self) -> None:
        super().__init__()
        _MEMOS.append(self)

    def keep(self, key: Hashable, options: tuple[object, ...], decision: Any) -> None:
        """Remember a decision; none for calls without a signature, and none for options beyond plain numbers and texts, whose
        bytes others may share."""
        if key is None or not all(map(_is_exact, options)):
            return
        if len(self) >= _MOST:
            self.clear()
        self[key] = decision


def signature(options: tuple[object, ...], *tensors: torch.Tensor | None) -> Hashable:
    """The key of a call, or None where it has none. Tensors may still be anything: nothing is checked, but that the first,
    which says what the others must be, is one."""
    if tensors[0] is None:
        return None
    if torch.compiler.is_compiling() or active_transform() is not None:
        return None
    try:
        key: list[object] = [_epoch, marshal.dumps(options, _MARSHAL_VERSION)]  # type: ignore[arg-type]
        for x in tensors:
            if x is None:
                key.append(None)
            elif type(x) in _PLAIN and x.layout is _STRIDED:
                key += (x.shape, x.dtype, x.device)
            else:
                return None
    except (ValueError, RuntimeError):  # an option of another type; a nested tensor, which has no shape
        return None
    return tuple(key)


def forget() -> None:
    """Decide anew: measurements have changed, or, in tests, what a machine can do."""
    global _epoch
    _epoch += 1  # of calls that are being decided right now as well
    for memo in _MEMOS:
        memo.clear()
