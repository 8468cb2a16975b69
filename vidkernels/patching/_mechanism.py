# SPDX-License-Identifier: Apache-2.0
"""How a module is patched: its class becomes a cached dynamic subclass `(PatchTag, Mixin, Base)`.

Nothing else changes: no parameter, buffer, submodule or closure is added, so `state_dict`, parameter identity, hooks,
`deepcopy`, pickle, `isinstance`, FSDP wrap policies and LoRA target names go on working, and undo is one assignment.
The backend choice lives on the instance as one plain string per op, which Dynamo guards without a graph per instance.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import nn

from vidkernels.errors import PatchError

# Patching is rare and cheap; one lock keeps two threads from re-classing one tree at once. A forward that runs at the
# same time in another thread is not protected.
LOCK = threading.RLock()
BACKEND_PREFIX = "_vidkernels_backend_"
_CLASSES: weakref.WeakValueDictionary[tuple[Any, ...], type] = weakref.WeakValueDictionary()


class Fused(nn.Module):
    """Base of the rules' mixins, for their authors' type checkers: an unknown attribute is the upstream module's."""

    if TYPE_CHECKING:
        _vidkernels_home: ClassVar[Any]

        def __getattr__(self, name: str) -> Any: ...


class PatchTag(nn.Module):
    """First base of every patched class: the tag in `repr`, pickling, and the backend of each op."""

    _vidkernels_base: ClassVar[type]
    _vidkernels_mixin: ClassVar[type]
    _vidkernels_rule: ClassVar[str]
    _vidkernels_ops: ClassVar[tuple[str, ...]]
    _vidkernels_anchor: ClassVar[type]
    _vidkernels_home: ClassVar[types.ModuleType]

    def _get_name(self) -> str:
        name: str = super()._get_name()
        return f"{name}[vk:{'+'.join(self._vidkernels_ops)}]"

    def _vidkernels_backend(self, op: str) -> str:
        backend: str = getattr(self, BACKEND_PREFIX + op, "auto")
        return backend

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The dynamic class has no importable name, so an object is pickled as its base plus the recipe of the class.
        reduced = super().__reduce_ex__(protocol)
        owner = type(self)
        if not is_patched_class(owner) or isinstance(reduced, str):
            return reduced
        base = owner._vidkernels_base
        function = base if reduced[0] is owner else reduced[0]
        arguments = tuple(base if argument is owner else argument for argument in reduced[1])
        recipe = (owner._vidkernels_mixin, owner._vidkernels_rule, owner._vidkernels_ops, owner._vidkernels_anchor)
        return (_rebuild, (base, recipe, backends(self), function, arguments), *reduced[2:])


def _rebuild(base: type, recipe: tuple[Any, ...], backends: dict[str, str], function: Any, arguments: Any) -> Any:
    """Unpickle a patched module: build an object of the base class, then re-class it; pickle sets the state later."""
    module = function(*arguments)
    apply(module, patched_class(base, *recipe), backends)
    return module


def is_patched_class(cls: type) -> bool:
    """Whether `cls` is exactly one of the dynamic classes, not a subclass of one."""
    return "_vidkernels_base" in cls.__dict__


def is_patched(module: nn.Module) -> bool:
    """Whether the module's class is exactly one of ours."""
    return is_patched_class(type(module))


def patched_class(base: type, mixin: type, rule: str, ops: tuple[str, ...], anchor: type) -> type:
    """The dynamic class of a base and a rule: one object per combination as long as an instance is alive."""
    key = (base, mixin, rule, ops, anchor)  # a rule of one name may be registered again with other ops
    with LOCK:
        cls = _CLASSES.get(key)
        if cls is None:
            namespace = {
                "__module__": base.__module__,
                "__qualname__": base.__qualname__,
                "__doc__": base.__doc__,
                "_vidkernels_base": base,
                "_vidkernels_mixin": mixin,
                "_vidkernels_rule": rule,
                "_vidkernels_ops": ops,
                "_vidkernels_anchor": anchor,
                "_vidkernels_home": sys.modules[anchor.__module__],
            }
            forward = getattr(mixin, "forward", nn.Module.forward)
            if forward is not nn.Module.forward:
                namespace["forward"] = _while_patched(forward)
            cls = types.new_class(base.__name__, (PatchTag, mixin, base), exec_body=lambda ns: ns.update(namespace))
            _CLASSES[key] = cls
    return cls


def _while_patched(forward: Any) -> Any:
    """A mixin's forward. Offloading and caching hooks bind it and keep it: called on a module that was unpatched since, it
    runs the module's own."""

    @functools.wraps(forward)
    def fused_forward(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        found = forward if isinstance(self, PatchTag) else type(self).forward
        return found(self, *arguments, **options)

    fused_forward._vidkernels_fused = True  # type: ignore[attr-defined]
    return fused_forward


def announce(cls: Any) -> None:
    """Tell diffusers' caching hooks (first block, MagCache, layer skipping) about the class of a patched block, once a module
    of the model has it.

    They look up by exact class which arguments and outputs of a block are tokens, and refuse classes they do not know.
    """
    anchor: type = cls._vidkernels_anchor
    registry: Any = getattr(sys.modules.get("diffusers.hooks._helpers"), "TransformerBlockRegistry", None)
    is_block = anchor.__module__.startswith(("diffusers.models.transformers.", "diffusers.models.attention"))
    if not is_block or not hasattr(registry, "_registry") or cls in registry._registry:
        return
    try:
        metadata = registry.get(anchor)
    except ValueError:  # the hooks know no such block, patched or not
        return
    registry._registry[cls] = metadata


def apply(module: nn.Module, cls: type, backends: Mapping[str, str]) -> None:
    """Re-class a module, tell diffusers about its class and store the backends. The caller holds `LOCK` and undoes on error."""
    announce(cls)
    reclass(module, cls, backends)


def reclass(module: nn.Module, cls: type, backends: Mapping[str, str]) -> None:
    """`apply` on a module that goes away again: nobody is told."""
    _drop_bound_forward(module)
    module.__class__ = cls
    set_backends(module, backends)


def own_forward(module: nn.Module) -> bool:
    """Whether the instance overrides its class's forward.

    Removing an accelerate hook leaves the method bound on the instance that its class had when the hook came: its own, or
    that of a patch. That is no override, but it would hide the class, so `apply` and `undo` drop it.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    function = getattr(forward, "__func__", None)
    known = function is type(module).forward or hasattr(function, "_vidkernels_fused")
    return not known or forward.__self__ is not module


def _drop_bound_forward(module: nn.Module) -> None:
    if "forward" in module.__dict__ and not own_forward(module):
        del module.__dict__["forward"]


def set_backends(module: nn.Module, backends: Mapping[str, str]) -> None:
    """Store the backend of each op; plain instance attributes, invisible to `state_dict`."""
    for op, backend in backends.items():
        module.__dict__[BACKEND_PREFIX + op] = backend


def undo(module: nn.Module) -> None:
    """Give a module its class back and drop the backend strings.

    Raises:
        PatchError: the module was re-classed after patching (FSDP, parametrizations), so its class is not ours to set.
    """
    cls = type(module)
    if not is_patched_class(cls):
        raise PatchError(
            f"{cls.__name__} was re-classed after patching; undo that first (unpatch before fully_shard or before "
            f"registering a parametrization)."
        )
    module.__class__ = cast(type[PatchTag], cls)._vidkernels_base
    _drop_bound_forward(module)
    for name in [name for name in module.__dict__ if name.startswith(BACKEND_PREFIX)]:
        del module.__dict__[name]


def backends(module: nn.Module) -> dict[str, str]:
    """Backend per op as stored on a patched module."""
    cls = cast(type[PatchTag], type(module))
    return {op: module.__dict__.get(BACKEND_PREFIX + op, "auto") for op in cls._vidkernels_ops}


def unique_modules(root: nn.Module, prefix: str = "") -> dict[nn.Module, list[str]]:
    """Every module below `root` in pre-order with all its names: tied modules appear once, under several names."""
    found: dict[nn.Module, list[str]] = {}

    def visit(module: nn.Module, name: str, above: frozenset[int]) -> None:
        found.setdefault(module, []).append(clean_name(name))
        if id(module) in above:
            return
        for child_name, child in module._modules.items():
            if child is not None:
                visit(child, f"{name}.{child_name}" if name else child_name, above | {id(module)})

    visit(root, prefix, frozenset())
    return found


_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def clean_name(name: str) -> str:
    """A module's name without the path elements that `torch.compile`, FSDP and checkpoint wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether the module is the wrapper that `torch.compile(module)` returns; Dynamo is not imported to find out."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    return eval_frame is not None and isinstance(module, eval_frame.OptimizedModule)
