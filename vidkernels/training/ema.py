# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of weights, whole or sharded: each process averages its own shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class EMA:
    """Moving averages of weights: m <- d m + (1 - d) w with d = min(decay, (1 + n) / (10 + n)) after n updates.

    The smaller d of the first updates lets the initial weights be forgotten.

    Args:
        parameters: the trained parameters by name; the averages are float32 (float64 for float64) tensors like them.
        decay: limit of d.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.averages = {
            name: p.detach().clone().to(torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """One average; `updates` counts those before it."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averages = [_local(self.averages[name]) for name in self.parameters]
        weights = [_local(p.detach()).to(a.dtype) for a, p in zip(averages, self.parameters.values(), strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The module computes with the averages inside the block."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])
