# SPDX-License-Identifier: Apache-2.0
"""Measuring residuals without stopping the device: sums are taken on it and read one step later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.caching._measure import adapter_for, motion_terms, relative_change
from vidkernels.caching.policies import Observation
from vidkernels.errors import OptionError

Place = tuple[str, int]
RESIDUALS = ("temporal-attention", "spatial-attention", "cross-and-mlp", "block")


class Meter:
    """Keeps the measured residuals of the last computed step, one set per guidance branch.

    Args:
        lists: block lists of the model.
        residual: one of `RESIDUALS`.
        locations: indices of the measured blocks in each list that has blocks of the wanted kind; None: the middle one.
        branches: forwards per denoising step; the sums of all branches make one distance.
    """

    def __init__(
        self, lists: dict[str, nn.ModuleList], residual: str, locations: Sequence[int] | None, branches: int
    ) -> None:
        self.residual = residual
        self.places = {place for name, blocks in lists.items() for place in self._choose(name, blocks, locations)}
        if not self.places:
            raise OptionError(
                "residual", f"one that {', '.join(lists)} have", repr(residual), "Use 'block' for any model."
            )
        self._kept: list[dict[Place, Tensor]] = [{} for _ in range(branches)]
        self._sums: dict[Place, tuple[bool, list[Tensor]]] = {}
        self._sent: list[tuple[int, bool, Tensor, Any]] = []
        self._attended: Tensor | None = None

    def _choose(self, name: str, blocks: nn.ModuleList, locations: Sequence[int] | None) -> list[Place]:
        adapter = adapter_for(blocks[0])
        wanted = {"temporal-attention": True, "spatial-attention": False}.get(self.residual)
        known = adapter.attention is not None
        kind = [
            i
            for i, block in enumerate(blocks)
            if not known or wanted is None or adapter_for(block).temporal(block) == wanted
        ]
        if not kind:
            return []
        places = [len(kind) // 2] if locations is None else list(locations)
        if any(not 0 <= place < len(kind) for place in places):
            raise OptionError("locations", f"indices below {len(kind)}", places)
        return [(name, kind[place]) for place in places]

    def attach(self, lists: dict[str, nn.ModuleList]) -> list[Any]:
        """Hooks on the attention of the measured blocks, where the family is known; the caller removes them."""
        hooks = []
        for name, position in self.places:
            block = lists[name][position]
            attention = adapter_for(block).attention
            if attention is not None and self.residual != "block":
                hooks.append(block.get_submodule(attention).register_forward_hook(self._keep_attended))
        return hooks

    def _keep_attended(self, module: nn.Module, args: Any, output: Any) -> None:
        self._attended = output[0] if isinstance(output, tuple) else output

    def measure(
        self, branch: int, place: Place, block: nn.Module, args: Any, kwargs: Any, before: Tensor, after: Tensor
    ) -> None:
        """Compare the residual of a measured block, just computed, with the one before it."""
        if place not in self.places:
            return
        residual = self._residual(block, args, kwargs, before, after)
        previous = self._kept[branch].get(place)
        change = relative_change(residual if previous is None else previous, residual)
        known, sums = self._sums.setdefault(place, (previous is not None, []))
        sums.append(torch.cat([change, motion_terms(residual)]))
        self._kept[branch][place] = residual

    def _residual(self, block: nn.Module, args: Any, kwargs: Any, before: Tensor, after: Tensor) -> Tensor:
        attended, self._attended = self._attended, None
        if attended is None or self.residual == "block":
            return after - before
        gated = adapter_for(block).gated(block, args, kwargs, attended, after)
        return after - before - gated.reshape(after.shape) if self.residual == "cross-and-mlp" else gated

    def send(self) -> None:
        """Start copying the sums of a computed step to the host."""
        for (_, position), (known, sums) in self._sums.items():
            total = torch.stack(sums).sum(0)
            if total.device.type != "cuda":
                self._sent.append((position, known, total, None))
                continue
            host = torch.empty(total.shape, dtype=total.dtype, pin_memory=True)
            host.copy_(total, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._sent.append((position, known, host, event))
        self._sums = {}

    def receive(self) -> list[Observation]:
        """The observations of the last computed step, in the order of execution.

        The middle blocks are measured, so the copy has arrived long before the device has finished the step: waiting for
        its event leaves the device no idle time.
        """
        observations = []
        for position, known, host, event in self._sent:
            if event is not None:
                event.synchronize()
            change, norm, motion, frames = host.tolist()
            distance = (change / norm if norm > 0 else 0.0) if known else None
            observations.append(Observation(position, distance, motion / frames if frames > 0 else 0.0))
        self._sent = []
        return observations
