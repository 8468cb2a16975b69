# SPDX-License-Identifier: Apache-2.0
"""For code that Dynamo traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_while_tracing(function: F) -> F:
    """Run ``function`` while a graph is traced and put its result into the graph as a constant.

    What `torch.compiler.assume_constant_result` does, without importing Dynamo, and Triton with it, at import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
