# SPDX-License-Identifier: Apache-2.0
"""Finding a model's block lists, and re-classing blocks so that a controller can skip them. No module, parameter or key is
added; `restore` gives a block its class back.

The call, not `forward`, is replaced: a skipped block runs neither its hooks nor its compiled code, whether it was compiled
before or after the cache came (`block.compile()`, `torch.compile(block)`, diffusers' `compile_repeated_blocks`)."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vidkernels._tracing import untraced, untraced_frame
from vidkernels.errors import OptionError, PatchError

LIST_NAMES = (
    "transformer_blocks", "temporal_transformer_blocks", "single_transformer_blocks", "blocks", "spatial_blocks", "temporal_blocks",
    "double_blocks", "single_blocks",
)  # fmt: skip
# Names under which video transformers hand token streams to their blocks, in the order of a tuple result.
STREAMS = ("hidden_states", "audio_hidden_states", "encoder_hidden_states")
_ATTRIBUTE = "_vidkernels_cache"
_BELOW = "_vidkernels_base"  # of a class that `vidkernels.patch` made: the class that `unpatch` sets
_CLASSES: dict[tuple[type, type], type] = {}


class CachedBlock:
    """Mixed in front of a block's class: asks the controller before running the block."""

    # A patched parent rebuilds patched blocks from their parts; a block that may be skipped has to be called.
    _vidkernels_base: type | None = None

    @untraced_frame
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        controller, place = getattr(self, _ATTRIBUTE)
        if controller.skips():
            return controller.reuse(self, place, args, kwargs)
        if controller.watches(self, place, args, kwargs):
            output = _eager(self, args, kwargs)
        else:
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        controller.computed(self, place, args, kwargs, output)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PatchError("a model with a step cache cannot be copied or pickled: call handle.remove() first")


@untraced
def _eager(block: Any, args: Any, kwargs: Any) -> Any:
    """A block whose attention carries a hook: Dynamo does not see hooks that come after it has compiled a module, so the few
    measured blocks are not run compiled."""
    inner = getattr(block, "_orig_mod", block)
    return nn.Module._call_impl(inner, *args, **kwargs)


@functools.cache
def _parameters(base: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(base.forward).parameters)[1:]


def streams(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Token tensors that a block was given: those with one of the names in `STREAMS`, else its first arguments."""
    kind: Any = type(getattr(block, "_orig_mod", block))
    names = _parameters(kind)
    if STREAMS[0] in names:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        found = [given[name] for name in STREAMS if name in names and name in given]
    else:
        found = list(args[:2]) or [kwargs["x"]]
    return tuple(value for value in found if isinstance(value, Tensor))


def find_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The model's lists of transformer blocks, by attribute name."""
    found = {name: getattr(model, name) for name in LIST_NAMES if isinstance(getattr(model, name, None), nn.ModuleList)}
    found = {name: blocks for name, blocks in found.items() if len(blocks)}
    if not found:
        raise PatchError(
            f"{type(model).__name__} has no list of transformer blocks among {', '.join(LIST_NAMES)}; pass the transformer itself, "
            "not its pipeline, or name the lists with blocks=('layers',)"
        )
    return found


def named_lists(model: nn.Module, names: Sequence[str]) -> dict[str, nn.ModuleList]:
    """The lists of blocks that the user names."""
    found = {name: getattr(model, name, None) for name in ([names] if isinstance(names, str) else names)}
    lists = {name: blocks for name, blocks in found.items() if isinstance(blocks, nn.ModuleList) and len(blocks)}
    if len(lists) != len(found):
        known = [name for name, child in model.named_children() if isinstance(child, nn.ModuleList)]
        raise OptionError("blocks", f"names of lists of {type(model).__name__}: {', '.join(known)}", list(found))
    return lists


def reclass(module: nn.Module, mixin: type) -> None:
    """Put `mixin` in front of a module's class; the made classes are kept, one per class and mixin."""
    module.__class__ = _made(type(module), mixin)


def _made(base: type, mixin: type) -> type:
    if (base, mixin) not in _CLASSES:
        names: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        below = base.__dict__.get(_BELOW)
        if below is not None:  # of a patched class: `unpatch` takes the patch away and leaves the cache
            names[_BELOW] = _made(below, mixin)
        _CLASSES[base, mixin] = type(base.__name__, (mixin, base), names)
    return _CLASSES[base, mixin]


def wrap(block: nn.Module, controller: object, group: str, position: int) -> None:
    """Put a block under a controller."""
    if isinstance(block, CachedBlock):
        raise PatchError(f"{group}.{position} already has a step cache; call handle.remove() first")
    block.__dict__[_ATTRIBUTE] = (controller, (group, position))
    reclass(block, CachedBlock)


def original(module: nn.Module, controller: object, mixin: type = CachedBlock) -> type | None:
    """The class that a module gets back when the controller leaves; None if it has no cache, or another controller's.

    Raises:
        PatchError: the module was re-classed after the cache was installed, by something other than `vidkernels.patch`.
    """
    if module.__dict__.get(_ATTRIBUTE, (None,))[0] is not controller:
        return None
    made: Any = type(module)
    plain = {wrapped: base for (base, _), wrapped in _CLASSES.items()}
    if made in plain:
        return plain[made]
    patched = made.__dict__.get(_BELOW)
    if patched in plain:  # patched after the cache came: the same patch of the class below the cache
        engine: Any = sys.modules[made.__bases__[0].__module__]
        recipe = (made._vidkernels_mixin, made._vidkernels_rule, made._vidkernels_ops, made._vidkernels_anchor)
        return engine.patched_class(plain[patched], *recipe)
    if isinstance(module, mixin):
        raise PatchError(
            f"{made.__name__} was re-classed after the cache was installed; undo that first (e.g. before fully_shard)"
        )
    return None


def restore(module: nn.Module, found: type) -> None:
    """Give a module the class that `original` found."""
    module.__class__ = found
    module.__dict__.pop(_ATTRIBUTE, None)
    engine = sys.modules.get("vidkernels.patching._mechanism")  # loaded if it made the class; it lies above
    if engine is not None and engine.is_patched_class(found):
        engine.announce(found)
