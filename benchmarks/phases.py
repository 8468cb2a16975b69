# SPDX-License-Identifier: Apache-2.0
"""Where a case's seconds went: building, first calls (compilers included), comparing, timing. An inner phase is not counted twice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

_open: list[float] = []  # seconds that inner phases of each open phase have taken
_seconds: dict[str, float] = {}


@contextlib.contextmanager
def phase(name: str, device: torch.device | None = None) -> Iterator[None]:
    """Count the block under `name`; with a CUDA device, what the block queued there too."""
    start = time.perf_counter()
    _open.append(0.0)
    try:
        yield
        if device is not None and device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.synchronize(device)
    finally:
        spent = time.perf_counter() - start
        _seconds[name] = _seconds.get(name, 0.0) + spent - _open.pop()
        if _open:
            _open[-1] += spent


def collect() -> dict[str, float]:
    """Seconds by phase since the last call, in the order in which they began to count."""
    found = {name: round(seconds, 2) for name, seconds in _seconds.items()}
    _seconds.clear()
    return found


def line(found: dict[str, float]) -> str:
    """The phases that took a tenth of a second, in one line."""
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.items() if seconds >= 0.1)
