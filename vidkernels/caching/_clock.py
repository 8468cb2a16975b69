# SPDX-License-Identifier: Apache-2.0
"""Noticing, by the timesteps that a model is told, that a sample begins although the last one was not complete: a pipeline that
was interrupted, or run with fewer steps than the cache was told."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from vidkernels.caching._to_host import ToHost

NAMES = ("timestep", "t", "timesteps", "time")


class _Ready:
    """A number that is already known."""

    def __init__(self, value: float) -> None:
        self.value = value

    def get(self) -> float | None:
        return self.value


class _Sent:
    """A number on its way from a GPU; nobody waits for it."""

    def __init__(self, value: Tensor) -> None:
        self._sent = ToHost(value)

    def get(self) -> float | None:
        return float(self._sent.wait()) if self._sent.arrived() else None


def _parameters(model: nn.Module) -> list[str]:
    """Names of the arguments of a model's forward. Open-Sora 2.0's class has none: the instance takes one of two methods."""
    if type(model).forward is nn.Module.forward:
        return list(inspect.signature(model.forward).parameters)
    return list(inspect.signature(type(model).forward).parameters)[1:]


class Clock:
    """Follows the timesteps of one sample.

    A sample has begun anew when a timestep is back at the first one, or beyond it, after others in between. Solvers that go
    back a little (PNDM, restarts) do not get there; timesteps that never change say nothing.

    Attributes:
        late: see `note`.
        went_on: the sample that began last did so where the one before would have gone on: it was not complete.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = _parameters(model)
        self._name = next((name for name in NAMES if name in parameters), None)
        self._index = parameters.index(self._name) if self._name else 0
        self._pending: list[Any] = []
        self._first: float | None = None
        self._last: float | None = None
        self._before: float | None = None  # the last but one
        self._ended: tuple[float | None, float | None] = (None, None)
        self.late = False
        self.went_on = False

    def clear(self) -> None:
        """Forget the sample."""
        self._pending, self._first, self._last, self._before = [], None, None, None
        self._ended, self.went_on = (None, None), False

    def begin(self, ended: bool = False) -> None:
        """The timestep noted last is the first one of a sample. `ended`: the one before is complete, by its count of steps."""
        self._pending = self._pending[-1:]
        if self._pending:
            self._ended = (self._first, self._last) if ended else (None, None)
            self._first = self._last = None
            return
        self.went_on = ended and _further(self._first, self._before, self._last)
        self._first = self._last

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """A forward begins. Whether a new sample has begun with it, or (`late`) with one before it."""
        sent = self._send(args, kwargs)
        self._pending += [] if sent is None else [sent]
        returned = self.late = False
        while self._pending and (value := self._pending[0].get()) is not None:
            self._pending.pop(0)
            if self._advance(value):
                returned, self.late = True, bool(self._pending)
        return returned

    def _send(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._name is None:
            return None
        value = kwargs[self._name] if self._name in kwargs else args[self._index] if self._index < len(args) else None
        if isinstance(value, (int, float)):
            return _Ready(float(value))
        if not isinstance(value, Tensor) or not value.numel():
            return None
        # Tokens of clean frames are told another time: the largest is the sample's, or constant.
        largest = value.detach().max()
        return _Sent(largest) if largest.device.type == "cuda" else _Ready(float(largest))

    def _advance(self, value: float) -> bool:
        first, last, self._last = self._first, self._last, value
        self._before = last
        if first is None or last is None:
            self._first = value
            self.went_on = _further(*self._ended, value)
            self._ended = None, None
            return False
        returned = value >= first if last < first else value <= first if last > first else False
        if returned:
            self._first = value
        return returned


def _further(first: float | None, last: float | None, value: float | None) -> bool:
    """Whether a timestep continues the way from `first` to `last`, or stays there (Heun asks twice)."""
    if first is None or last is None or value is None:
        return False
    return value <= last < first or value >= last > first
