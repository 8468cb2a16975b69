# SPDX-License-Identifier: Apache-2.0
"""One product for the modulation of all blocks: the option `batch_modulation` of `patch`.

Every block of an adaLN model projects the same condition through SiLU and a layer of its own: for Flux 76 small products
a step. `nn.BatchedProjection` stacks the layers' weights in one storage; the first block of a step asks for the rows of
all blocks, the others find theirs. `state_dict`, names, values and parameter objects stay.

Only without gradients, autocast and tracing: there each block projects for itself, as it does where the weights were
moved, wrapped or hooked.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidkernels.nn.adaln_zero import BatchedProjection
from vidkernels.patching._guard import child_reason, is_autocast
from vidkernels.patching._values import is_captured

_PLACE = "_vidkernels_modulation"
# A model that copies its condition between blocks would compute all rows for each block: behind two such rows it is off, until
# most layers ask with one condition again.
_WASTE = 2


class _Rows(NamedTuple):
    """The rows of all layers for one condition, and what they were computed from."""

    condition: weakref.ref[Tensor]
    version: int
    weights: tuple[tuple[int, int, int], ...]
    captured: bool
    rows: tuple[Tensor, ...]


class Bank:
    """The layers of one model that project one condition. A copy or pickle of a layer leaves its bank behind."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        self._product = BatchedProjection(layers)
        self._last: _Rows | None = None
        self._used = self._wasted = 0
        self._asked: tuple[weakref.ref[Tensor], int, set[int]] | None = None

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return (_nothing, ())

    def take(self, index: int, condition: Tensor) -> Tensor | None:
        """The rows of layer `index`, or None if it has to project for itself."""
        last = self._last
        fresh = (
            last is not None
            and last.condition() is condition
            and last.version == condition._version
            # What a warm-up computed would be a constant in a CUDA graph; what a graph computes is not there before a replay.
            and last.captured == is_captured(condition)
            and last.weights[index] == _stamp(self.layers[index])
        )
        if not fresh:
            last = self._compute(index, condition)
        if last is None:
            return None
        self._used += 1
        if self._used == 2:
            self._wasted = 0
        return last.rows[index]

    def _compute(self, index: int, condition: Tensor) -> _Rows | None:
        if self._last is not None and self._used < 2:
            self._wasted += 1
        self._last = None
        if self._is_off() and not self._is_shared(index, condition):
            return None
        if not self._product.packed:
            return None
        if any(child_reason(layer, nn.Linear) is not None for layer in self.layers):
            return None
        stamps = tuple(_stamp(layer) for layer in self.layers)
        captured = is_captured(condition)
        self._last = _Rows(weakref.ref(condition), condition._version, stamps, captured, self._product(condition))
        self._used = 0
        return self._last

    def _is_off(self) -> bool:
        return self._wasted >= _WASTE

    def _is_shared(self, index: int, condition: Tensor) -> bool:
        """While it is off: whether most layers have asked with this condition, which turns it on."""
        asked = self._asked
        if asked is None or asked[0]() is not condition or asked[1] != condition._version:
            asked = self._asked = (weakref.ref(condition), condition._version, set())
        asked[2].add(index)
        if 2 * len(asked[2]) <= len(self.layers):
            return False
        self._wasted, self._asked = 0, None
        return True

    def remark(self) -> str | None:
        """Why each layer projects for itself at present, for `status`."""
        if not self._product.packed:
            return "their weights were moved or cast since; call patch again"
        if self._is_off():
            return "their last conditions were used by one layer each"
        return None

    def give_up_if_moved(self) -> None:
        """Dissolve the stack unless the weights still lie in it."""
        if not self._product.packed:
            self.dissolve()

    def dissolve(self) -> None:
        """Give every layer that still lies in the common storage one of its own."""
        self._last = None
        for layer in self.layers:
            if layer.__dict__.pop(_PLACE, None) is not None:
                for parameter in (layer.weight, layer.bias):
                    parameter.data = parameter.data.clone()


def _nothing() -> None:
    return None


def _stamp(layer: nn.Linear) -> tuple[int, int, int]:
    """Changes with every write to the layer's weights."""
    return layer.weight.data_ptr(), layer.weight._version, layer.bias._version


def project(layer: Any, activation: Any, condition: Tensor) -> Tensor:
    """`layer(activation(condition))`, from the rows of all blocks where `patch(batch_modulation=True)` arranged for it.

    The activation is a SiLU that nobody hooks.
    """
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        place = layer.__dict__.get(_PLACE)
        if place is not None and place[0] is not None and _can_remember(condition):
            bank, index = place
            if bank.layers[index] is layer and child_reason(activation, nn.SiLU) is None:
                rows = bank.take(index, condition)
                if rows is not None:
                    return rows
    projected: Tensor = layer(activation(condition))
    return projected


def _can_remember(condition: Tensor) -> bool:
    """Whether a later write to the condition would be seen, and no cast happens in between."""
    return not condition.is_inference() and not is_autocast(condition)


def batch(layers: Iterable[Any]) -> int:
    """Stack the layers that can be, by input width, dtype and device. Returns how many are new in a stack of at least two.

    A stack whose weights were moved or cast since is given up first.
    """
    unique = list(dict.fromkeys(layers))
    for layer in unique:
        if is_batched(layer):
            layer.__dict__[_PLACE][0].give_up_if_moved()
    groups: dict[Any, list[nn.Linear]] = {}
    for layer in unique:
        if is_batched(layer):
            continue
        if child_reason(layer, nn.Linear) is None and layer.bias is not None and not layer.weight.is_inference():
            key = (layer.in_features, layer.weight.dtype, layer.bias.dtype, layer.weight.device)
            groups.setdefault(key, []).append(layer)
    found = 0
    for group in groups.values():
        if len(group) > 1:
            bank = Bank(group)
            for index, layer in enumerate(group):
                layer.__dict__[_PLACE] = (bank, index)
            found += len(group)
    return found


def is_batched(layer: nn.Module) -> bool:
    """Whether `batch` stacked this layer with others."""
    place = layer.__dict__.get(_PLACE)
    return place is not None and place[0] is not None


def remarks(modules: Iterable[nn.Module]) -> list[str]:
    """A line for every stack below these modules whose layers project for themselves at present."""
    places = [layer.__dict__.get(_PLACE) for module in modules for layer in module.modules()]
    banks = dict.fromkeys(place[0] for place in places if place is not None and place[0] is not None)
    reasons = [(len(bank.layers), reason) for bank in banks if (reason := bank.remark()) is not None]
    return [f"batch_modulation: {layers} layers project one by one: {reason}" for layers, reason in reasons]


def dissolve(modules: Iterable[nn.Module]) -> None:
    """Undo `batch` for every bank that a descendant of these modules belongs to."""
    for module in modules:
        for layer in module.modules():
            place = layer.__dict__.get(_PLACE)
            if place is not None:
                if place[0] is not None:
                    place[0].dissolve()
                layer.__dict__.pop(_PLACE, None)


def set_aside(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, Any]]:
    """Take from every layer below these modules what says that it is in a stack: a pickle of the layer must not name this
    package. `put_back` gives it back; the weights stay where they lie."""
    layers = dict.fromkeys(layer for module in modules for layer in module.modules() if _PLACE in layer.__dict__)
    return [(layer, layer.__dict__.pop(_PLACE)) for layer in layers]


def put_back(places: Iterable[tuple[nn.Module, Any]]) -> None:
    """The inverse of `set_aside`."""
    for layer, place in places:
        layer.__dict__[_PLACE] = place
