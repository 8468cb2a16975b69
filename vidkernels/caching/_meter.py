# SPDX-License-Identifier: Apache-2.0
"""Measuring residuals without stopping the device: sums are taken on it and read one step later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.caching._measure import Adapter, adapter_for, by_frames, sums, unwrapped
from vidkernels.caching._requests import Members, split
from vidkernels.caching._to_host import ToHost
from vidkernels.caching.policies import Observation
from vidkernels.errors import OptionError

Place = tuple[str, int]
RESIDUALS = ("temporal-attention", "spatial-attention", "cross-and-mlp", "block")


class Meter:
    """Keeps the measured residuals of the last computed step, one set per guidance branch and request.

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
        self._adapters = {
            (name, i): adapter_for(block, tuple(lists))
            for name, blocks in lists.items()
            for i, block in enumerate(blocks)
        }
        self.places = {place for name, blocks in lists.items() for place in self._choose(name, blocks, locations)}
        if not self.places:
            raise OptionError(
                "residual", f"one that {', '.join(lists)} have", repr(residual), "Use 'block' for any model."
            )
        self.hooked = {place for place in self.places if self._adapter(place).attention and residual != "block"}
        self.measured = residual if self.hooked else "block"
        self.frames: int | None = None
        self._kept: list[dict[tuple[Place, int], Tensor]] = [{} for _ in range(branches)]
        # Of the running step, by branch: a forward that is repeated after an exception writes its entries again.
        self._fresh: list[dict[tuple[Place, int], Tensor]] = [{} for _ in range(branches)]
        self._sums: dict[tuple[Place, int], tuple[bool, dict[int, Tensor]]] = {}
        self._sent: list[tuple[int, Place, bool, Tensor | ToHost]] = []
        self._watched: Callable[[Tensor], Tensor] | None = None
        self._gated: Tensor | None = None

    def _adapter(self, place: Place) -> Adapter:
        return self._adapters[place]

    def _choose(self, name: str, blocks: nn.ModuleList, locations: Sequence[int] | None) -> list[Place]:
        wanted = {"temporal-attention": True, "spatial-attention": False}.get(self.residual)
        kind = []
        for i, block in enumerate(blocks):
            adapter = self._adapter((name, i))
            known = adapter.attention is not None and wanted is not None
            if not known or adapter.temporal(unwrapped(block), name, i) == wanted:
                kind.append(i)
        if not kind:
            return []
        places = [len(kind) // 2] if locations is None else locations
        if not isinstance(places, (list, tuple)) or any(place not in range(len(kind)) for place in places):
            raise OptionError("locations", f"indices below {len(kind)}", places)
        return [(name, kind[place]) for place in places]

    def attach(self, lists: dict[str, nn.ModuleList]) -> list[Any]:
        """Hooks on the attention of the measured blocks, where the family is known; the caller removes them."""
        hooks = []
        for place in self.hooked:
            attention = unwrapped(lists[place[0]][place[1]]).get_submodule(self._adapter(place).attention or "")
            hooks.append(attention.register_forward_hook(self._keep_gated))
        return hooks

    def watch(self, block: nn.Module, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """A block is about to run: True if its attention has a hook."""
        self._gated = None
        gated = self._adapter(place).gated
        if gated is None or place not in self.hooked:
            return False
        self._watched = partial(gated, unwrapped(block), args, kwargs)
        return True

    @torch.no_grad()
    def _keep_gated(self, module: nn.Module, args: Any, output: Any) -> None:
        """Inside the block's forward, where FSDP2 has its parameters whole: the gate is read here."""
        if self._watched is not None:
            self._gated = self._watched(output[0] if isinstance(output, tuple) else output)
        self._watched = None

    @torch.no_grad()
    def measure(self, branch: int, place: Place, members: Members, before: Tensor, after: Tensor) -> None:
        """Compare the residual of a measured block, just computed, with the one before it."""
        if place not in self.places:
            return
        residual = by_frames(self._residual(place, before, after), self.frames)
        for request, part in zip(members.requests, split(residual, members), strict=True):
            previous = self._kept[branch].get((place, request))
            _, values = self._sums.setdefault((place, request), (previous is not None, {}))
            values[branch] = sums(part if previous is None else previous, part)
            self._fresh[branch][place, request] = part

    def _residual(self, place: Place, before: Tensor, after: Tensor) -> Tensor:
        gated, self._gated = self._gated, None
        if place not in self.hooked:
            return after - before
        if gated is None:  # the attention was fused away by a patch: what the block adds stands for it
            self.measured = "block"
            return after - before
        return after - before - gated.reshape(after.shape) if self.residual == "cross-and-mlp" else gated

    def send(self) -> None:
        """A computed step is complete: start copying its sums to the host."""
        for kept, fresh in zip(self._kept, self._fresh, strict=True):
            kept.update(fresh)
            fresh.clear()
        for (place, request), (known, values) in self._sums.items():
            total = torch.stack(list(values.values())).sum(0)
            self._sent.append((request, place, known, ToHost(total) if total.is_cuda else total))
        self._sums = {}

    def receive(self) -> dict[int, list[Observation]]:
        """Observations of the last computed step by request, in the order of execution.

        The middle blocks are measured, so the copy has arrived long before the device has finished the step: waiting for
        its event leaves the device no idle time.
        """
        observations: dict[int, list[Observation]] = {}
        for request, (group, position), known, sent in self._sent:
            change, norm, motion, frames = (sent.wait() if isinstance(sent, ToHost) else sent).tolist()
            distance = (change / norm if norm > 0 else 0.0) if known else None
            observation = Observation(position, distance, motion / frames if frames > 0 else None, group)
            observations.setdefault(request, []).append(observation)
        self._sent = []
        return observations
