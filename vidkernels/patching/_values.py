# SPDX-License-Identifier: Apache-2.0
"""What the values of a tensor say, read once: reading them waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class ReadOnce(Generic[T]):
    """Answers of `read(tensor, *arguments)`, kept while the tensor lives and asked again with other arguments or after a
    write to a tensor among them.

    A write to an inference tensor is not seen: torch counts none.
    """

    def __init__(self, read: Callable[..., T]) -> None:
        self._read = read
        self._known = WeakTensorKeyDictionary()

    def __call__(self, tensor: Tensor, *arguments: Any) -> T:
        asked = [state(x) if isinstance(x, Tensor) else x for x in (tensor, *arguments)]
        known: tuple[list[Any], T] | None = self._known.get(tensor)
        if known is None or known[0] != asked:
            known = self._known[tensor] = (asked, self._read(tensor, *arguments))
        return known[1]


def state(x: Tensor) -> tuple[int, int]:
    """Changes where a tensor is moved or written to."""
    return x.data_ptr(), 0 if x.is_inference() else x._version


def is_captured(x: Tensor) -> bool:
    """Whether the current stream is recorded into a CUDA graph: values cannot be read then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
