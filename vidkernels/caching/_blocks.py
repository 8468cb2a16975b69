# SPDX-License-Identifier: Apache-2.0
"""Finding a model's block lists, and re-classing blocks so that a controller can skip them. No module, parameter or key is
added; `restore` gives a block its class back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidkernels.errors import PatchError

LIST_NAMES = (
    "transformer_blocks", "temporal_transformer_blocks", "single_transformer_blocks", "blocks", "spatial_blocks", "temporal_blocks",
)  # fmt: skip
# Names under which video transformers hand token streams to their blocks, in the order of a tuple result.
STREAMS = ("hidden_states", "encoder_hidden_states")
_ATTRIBUTE = "_vidkernels_cache"
_CLASSES: dict[type, type] = {}


class CachedBlock:
    """Mixed in front of a block's class: asks the controller before running the block."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        controller, group, position = getattr(self, _ATTRIBUTE)
        tokens = _streams(args, kwargs)
        if controller.skips((group, position)):
            return controller.reuse((group, position), tokens)
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        after = output if isinstance(output, tuple) else (output,)
        controller.computed(self, (group, position), args, kwargs, tokens[: len(after)], after)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PatchError("a model with a step cache cannot be copied or pickled: call handle.remove() first")


def _streams(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Token tensors that a block was given, `hidden_states` first."""
    found = []
    for index, name in enumerate(STREAMS):
        value = kwargs[name] if name in kwargs else (args[index] if len(args) > index else None)
        if isinstance(value, Tensor):
            found.append(value)
    return tuple(found)


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


def wrap(block: nn.Module, controller: object, group: str, position: int) -> None:
    """Put a block under a controller."""
    if "forward" in vars(block):
        raise PatchError(f"{group}.{position} has its own forward (an offload hook?); install the cache before it")
    if isinstance(block, CachedBlock):
        raise PatchError(f"{group}.{position} already has a step cache; call handle.remove() first")
    base = type(block)
    if base not in _CLASSES:
        _CLASSES[base] = type(
            base.__name__, (CachedBlock, base), {"__module__": base.__module__, "__qualname__": base.__qualname__}
        )
    block.__dict__[_ATTRIBUTE] = (controller, group, position)
    block.__class__ = _CLASSES[base]


def restore(block: nn.Module) -> None:
    """Take a block out of its controller; nothing happens if it is in none."""
    cached = next((base for base, made in _CLASSES.items() if type(block) is made), None)
    if cached is not None:
        block.__class__ = cached
        block.__dict__.pop(_ATTRIBUTE, None)
    elif isinstance(block, CachedBlock):
        raise PatchError(
            f"{type(block).__name__} was re-classed after the cache was installed; undo that first (e.g. before fully_shard)"
        )
