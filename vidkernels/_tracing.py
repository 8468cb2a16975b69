# SPDX-License-Identifier: Apache-2.0
"""For code that Dynamo traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])


def constant_while_tracing(function: F) -> F:
    """Run ``function`` while a graph is traced and put its result into the graph as a constant.

    What `torch.compiler.assume_constant_result` does, without importing Dynamo, and Triton with it, at import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_while_tracing
def active_transform() -> str | None:
    """Why no kernel can serve a call, whatever its arguments, or None: somebody looks into the ops.

    A bare op knows neither `torch.func`'s rules nor forward-mode derivatives: autograd functions fail under the first and
    tangents vanish without a word under the second. References are made of torch's own ops. In a graph gradients vanish as
    well; there the answer is that of the trace, for Dynamo guards by itself that the same transforms surround each call.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


def untraced(function: F) -> F:
    """Keep ``function`` and all that it calls out of graphs: where a graph is traced, it ends here.

    What `torch.compiler.disable` does, without importing Dynamo (1.2 s) or wrapping each call.
    """
    return _skip(function, recursive=True)


def untraced_frame(function: F) -> F:
    """Keep ``function`` out of graphs, but not what it calls: `torch.compiler.disable(recursive=False)`."""
    return _skip(function, recursive=False)


def _skip(function: F, recursive: bool) -> F:
    try:
        frames: Any = torch._C._dynamo.eval_frame
        skip, default = frames._FrameAction.SKIP, frames._FrameAction.DEFAULT
        strategy = frames._FrameExecStrategy(skip, skip if recursive else default)
        frames.set_code_exec_strategy(function.__code__, strategy)
    except AttributeError:  # private names, there in torch 2.13
        return torch.compiler.disable(function, recursive=recursive)  # type: ignore[no-any-return]
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function
