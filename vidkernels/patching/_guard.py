# SPDX-License-Identifier: Apache-2.0
"""Per-call guards of fused forwards, and the record of the calls that went back to the original forward.

A fused forward reads its children's weights without calling them. Whatever was put on a child after patching (a LoRA
wrapper, a hook, an FSDP2 shard, a quantized weight) must send the call to the original forward. Every condition here is
something Dynamo can guard: types, dtypes, ints, empty dicts.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from vidkernels import _env
from vidkernels._hooks import is_globally_unhooked, is_unhooked
from vidkernels._tracing import active_transform
from vidkernels.errors import BackendUnavailable, VidkernelsFallbackWarning
from vidkernels.ops._checks import is_proxied
from vidkernels.patching._mechanism import Fused, own_forward

P = ParamSpec("P")
T = TypeVar("T")
_FALLBACKS: weakref.WeakKeyDictionary[nn.Module, Counter[str]] = weakref.WeakKeyDictionary()
_WARNED: set[tuple[str, str]] = set()
# FakeTensor appears in torch.export; the ops have fakes. Other subclasses (DTensor, quantized) do not reach kernels.
_PLAIN = ("Tensor", "Parameter", "FakeTensor", "FunctionalTensor")
_USUAL = (nn.Parameter, torch.Tensor)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether kernels can take the tensor: no subclass with a layout or meaning of its own."""
    cls = type(tensor)
    return cls in _USUAL or cls.__name__ in _PLAIN  # the name of a class with a metaclass takes 0.5 us


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values to look at: those of `torch.export` and of fake modes, and on the meta device, have none."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type != "meta"


def is_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for a tensor's device; torch raises where it is asked about the meta device."""
    if not torch._C._is_any_autocast_enabled():  # 0.5 us less than the device's name
        return False
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def call_reason(*tensors: torch.Tensor | None) -> str | None:
    """Why a call cannot use kernels whatever the module: a transform is active, or an input is not a plain tensor."""
    transform = active_transform()
    if transform is not None:
        return transform
    if not torch.compiler.is_compiling():
        # torch.onnx.export runs a model under one of these two or under torch.export.
        if torch._C._get_tracing_state() is not None or is_proxied():
            return "the model is being traced for export"
        if not is_globally_unhooked():
            return "global module hooks are registered"
    for tensor in tensors:
        if tensor is not None and not is_plain(tensor):
            return f"an input is a {type(tensor).__name__}"
    return None


def parameter_of(module: nn.Module, name: str) -> Any:
    """A parameter by its name, 0.5 us sooner than `getattr`; FSDP 1 and `nn.DataParallel` keep theirs as plain attributes."""
    known = module._parameters
    return known[name] if name in known else getattr(module, name)


def child_reason(child: nn.Module | None, *classes: type) -> str | None:
    """Why the weights of a child must not be read behind its back, or None.

    Args:
        child: the submodule that a fused forward does not call.
        *classes: the classes that it may have, exactly: LoRA wrappers (one is called `Linear` too), FSDP2 and
            parametrizations change the class. A child patched by another rule counts as its original.
    """
    cls = type(child)
    if child is None or (cls not in classes and getattr(cls, "_vidkernels_base", None) not in classes):
        return f"a child is a {cls.__module__}.{cls.__name__}, not a {' or '.join(c.__name__ for c in classes)}"
    if not is_unhooked(child):
        return f"a child {cls.__name__} has hooks"
    state = child.__dict__
    if "forward" in state and own_forward(child):
        return f"a child {cls.__name__} has its own `forward`"
    if child._compiled_call_impl is not None:
        return f"a child {cls.__name__} is compiled on its own"
    for parameter in state["_parameters"].values():
        if parameter is not None and type(parameter) not in _USUAL and not is_plain(parameter):
            return f"a child {cls.__name__} holds a {type(parameter).__name__}"
    return None


def note_fallback(module: nn.Module, reason: str) -> None:
    """Count a call that goes to the original forward and warn once per (rule, reason).

    An error under `VIDKERNELS_STRICT=1`. Inside traced code nothing is recorded.
    """
    if torch.compiler.is_compiling():
        return
    rule = getattr(type(module), "_vidkernels_rule", type(module).__name__)
    text = f"patched {type(module).__name__} ({rule}) runs its original forward: {reason}"
    if _env.STRICT:
        raise BackendUnavailable(text)
    _FALLBACKS.setdefault(module, Counter())[reason] += 1
    if (rule, reason) not in _WARNED:
        _WARNED.add((rule, reason))
        warnings.warn(text, VidkernelsFallbackWarning, stacklevel=4)


def guarded(forward: Callable[P, T]) -> Callable[P, T]:
    """A fused forward behind its guard: `self._reason` finds nothing, or the call goes to the original forward, noted.

    `_reason` gets the call's arguments by name, with defaults filled in: it names those that it looks at and takes the
    others as `**rest`. The original gets the call as it was made.
    """
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    @functools.wraps(forward)
    def guarded_forward(self: Any, *arguments: Any, **options: Any) -> Any:
        call = {**defaults, **dict(zip(names, arguments, strict=False)), **options}
        reason = self._reason(**call)
        if reason is None:
            return forward(self, *arguments, **options)  # type: ignore[call-arg, arg-type]
        note_fallback(self, reason)
        return super(Fused, self).forward(*arguments, **options)

    return guarded_forward  # type: ignore[return-value]


def fallbacks(module: nn.Module) -> Counter[str]:
    """How often a module went to its original forward, by reason, since it was patched."""
    return Counter(_FALLBACKS.get(module, Counter()))


def forget_fallbacks(module: nn.Module) -> None:
    """Start the count again; called when a module is patched."""
    _FALLBACKS.pop(module, None)
