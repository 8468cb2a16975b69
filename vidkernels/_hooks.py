# SPDX-License-Identifier: Apache-2.0
"""Whether a module's call is its class's forward and nothing else. A hook, an adapter or a wrapper may keep what a layer got or
returned, so that it must not be overwritten, and has to be called, so that the layer's weights must not be read behind it."""

from __future__ import annotations

import torch
from torch import nn

_GLOBAL = torch.nn.modules.module


def is_globally_unhooked() -> bool:
    """Whether no hook sees the forward of every module of the process."""
    return not (_GLOBAL._global_forward_hooks or _GLOBAL._global_forward_pre_hooks)


def is_unhooked(module: nn.Module) -> bool:
    """Whether a module has no hook of its own."""
    # Attributes, which Dynamo guards where it is told to guard hooks; what it finds in `__dict__` it takes as it is.
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is an `nn.Linear` (no subclass, no adapter) without hooks and without a `forward` of its own. Global
    hooks are the caller's to ask for: once for many layers."""
    return type(layer) is nn.Linear and is_unhooked(layer) and "forward" not in layer.__dict__


def is_unseen(layer: nn.Module) -> bool:
    """Whether nobody but the caller has seen what `layer` returned."""
    return is_plain_linear(layer) and is_globally_unhooked()
