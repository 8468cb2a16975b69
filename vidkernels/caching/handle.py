# SPDX-License-Identifier: Apache-2.0
"""`vidkernels.adacache(model, ...)`: reuse whole denoising steps of a video transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vidkernels.caching import _blocks
from vidkernels.caching._measure import relative_change
from vidkernels.caching._meter import RESIDUALS, Meter
from vidkernels.caching._store import DeltaStore, Place, TaylorStore, Tokens
from vidkernels.caching.policies import CODEBOOKS, AdaCachePolicy, Codebook, Decision, FirstBlockPolicy, TaylorPolicy
from vidkernels.errors import OptionError
from vidkernels.ops._checks import check_option


@dataclass(frozen=True)
class CacheReport:
    """What happened in the current sample, or in the last one if that is complete.

    Attributes:
        computed_steps: steps that ran the blocks, counted from 1.
        total_steps: steps seen.
        decisions: distance, scaled distance and new rate of each measurement.
    """

    computed_steps: tuple[int, ...]
    total_steps: int
    decisions: tuple[Decision, ...]

    @property
    def distances(self) -> tuple[float, ...]:
        """The distance of each measurement, before motion regularisation."""
        return tuple(decision.distance for decision in self.decisions)

    def __str__(self) -> str:
        share = len(self.computed_steps) / max(self.total_steps, 1)
        return f"computed {len(self.computed_steps)} of {self.total_steps} steps ({share:.0%}): {list(self.computed_steps)}"


class CacheHandle:
    """A step cache installed on one model. It counts denoising steps by the model's own forward calls.

    Args:
        model: the transformer.
        policy: an `AdaCachePolicy`, `FirstBlockPolicy` or `TaylorPolicy`.
        blocks: attribute names of the block lists; None finds them.
        residual: which residual is measured, see `adacache`.
        locations: indices of the measured blocks.
        calls_per_step: forwards per denoising step: 2 where guidance runs its branches one after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: AdaCachePolicy | FirstBlockPolicy | TaylorPolicy,
        blocks: Sequence[str] | None = None,
        residual: str = "temporal-attention",
        locations: Sequence[int] | None = None,
        calls_per_step: int = 1,
    ) -> None:
        check_option("residual", residual, RESIDUALS)
        if calls_per_step < 1:
            raise OptionError("calls_per_step", "at least 1", calls_per_step)
        self.policy, self.calls_per_step = policy, calls_per_step
        self._lists = {name: getattr(model, name) for name in blocks} if blocks else _blocks.find_lists(model)
        self._new_meter = lambda: Meter(self._lists, residual, locations, calls_per_step)
        self._hooks: list[Any] = []
        self.reset()
        self._install(model)

    def report(self) -> CacheReport:
        """Steps computed so far."""
        if self._call == 0:
            self._settle()
        return CacheReport(tuple(self.policy.computed), self.step, tuple(self.policy.decisions))

    def reset(self) -> None:
        """Start a new sample: forget steps, residuals and sums."""
        self.policy.reset()
        order = self.policy.order if isinstance(self.policy, TaylorPolicy) else None
        self._stores = [DeltaStore() if order is None else TaylorStore(order) for _ in range(self.calls_per_step)]
        for hook in self._hooks[2:]:
            hook.remove()
        del self._hooks[2:]
        self._meter = self._new_meter()
        if self._hooks:
            self._hooks += self._meter.attach(self._lists)
        self._first: Tensor | None = None
        self._open = False
        self._results: dict[Place, tuple[int, bool]] = {}
        self.step, self._call, self._computing = 0, 0, True

    def remove(self) -> None:
        """Take the cache off the model and free what it holds."""
        for blocks in self._lists.values():
            for block in blocks:
                _blocks.restore(block)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._stores = []

    def __enter__(self) -> CacheHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _install(self, model: nn.Module) -> None:
        try:
            for name, blocks in self._lists.items():
                for position, block in enumerate(blocks):
                    _blocks.wrap(block, self, name, position)
        except BaseException:
            self.remove()
            raise
        self._hooks = [model.register_forward_pre_hook(self._before), model.register_forward_hook(self._after)]
        self._hooks += self._meter.attach(self._lists)

    def _before(self, module: nn.Module, args: Any) -> None:
        """A forward of the model begins."""
        if self._call == 0:
            self._settle()
            if self.step >= self.policy.steps:
                self.reset()
            self.step += 1
            # A first-block policy decides behind the first block.
            self._computing = True if isinstance(self.policy, FirstBlockPolicy) else self.policy.computes(self.step)
        if self._computing:
            self._stores[self._call].begin()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward of the model ends."""
        if self._computing:
            self._stores[self._call].finish(self.step)
        self._call = (self._call + 1) % self.calls_per_step
        if self._call == 0 and self._computing:
            self._meter.send()
            self._open = True

    def _settle(self) -> None:
        """Give the policy what the last computed step measured."""
        if self._open and not isinstance(self.policy, FirstBlockPolicy):
            self.policy.observe(self.step, self._meter.receive())
        self._open = False

    def skips(self, place: Place) -> bool:
        """Whether a block is skipped in this forward."""
        return not self._computing

    def reuse(self, place: Place, tokens: Tokens) -> Any:
        """What a skipped block returns."""
        count, is_tuple = self._results[place]
        result = self._stores[self._call].apply(place, tokens[:count], self.step)
        return result if is_tuple else result[0]

    def computed(self, block: nn.Module, place: Place, args: Any, kwargs: Any, before: Tokens, after: Tokens) -> None:
        """A block has run; how many token streams it returns is remembered for the steps that skip it."""
        self._results[place] = (len(after), len(after) > 1)
        if isinstance(self.policy, FirstBlockPolicy):
            if place == (next(iter(self._lists)), 0):
                self._decide_by_first(after[0] - before[0])
                return
        elif isinstance(self.policy, AdaCachePolicy):
            self._meter.measure(self._call, place, block, args, kwargs, before[0], after[0])
        self._stores[self._call].add(place, before, after)

    def _decide_by_first(self, residual: Tensor) -> None:
        """The first block runs at every step; what it adds decides about the others."""
        if self._call:
            self._computing = self._first_decision
            return
        change, norm = (0.0, 0.0) if self._first is None else relative_change(self._first, residual).tolist()
        distance = None if self._first is None else (change / norm if norm > 0 else 0.0)
        self._first = residual
        self._computing = self._first_decision = self.policy.computes(self.step, distance)  # type: ignore[call-arg]


def adacache(
    model: nn.Module,
    steps: int,
    *,
    codebook: str | Codebook | None = None,
    motion: bool = True,
    motion_window: tuple[int, int] | None = None,
    motion_scale: float = 0.385,
    residual: str = "temporal-attention",
    locations: Sequence[int] | None = None,
    calls_per_step: int = 1,
    blocks: Sequence[str] | None = None,
) -> CacheHandle:
    """Install AdaCache (arXiv 2411.02397) on a video diffusion transformer, in place, until `handle.remove()`.

    Args:
        model: one of `vidkernels.models.transformers`, diffusers' Latte, Open-Sora's STDiT3, or any transformer with a list
            of blocks (CogVideoX, Wan, HunyuanVideo, LTX, Mochi, Allegro).
        steps: denoising steps of a sample; after them the cache starts anew.
        codebook: "100", "30-fast", "30-slow", or (threshold, rate) pairs. Default: "30-fast" up to 60 steps, else "100".
        motion: motion regularisation; needs a model whose frame layout is known, otherwise it has no effect.
        motion_window: steps in which it acts, both ends included.
        motion_scale: relative frame change at which motion neither lengthens nor shortens a rate.
        residual: "temporal-attention" (the paper's), "spatial-attention", "cross-and-mlp" or "block".
        locations: indices of the measured blocks among those of their kind; default: the middle one.
        calls_per_step: 2 where guidance calls the model once per branch.
        blocks: names of the model's block lists, where they have unusual names.

    Returns:
        The handle: `report()`, `reset()`, `remove()`; also a context manager.
    """
    if codebook is None:
        codebook = "30-fast" if steps <= 60 else "100"
    if isinstance(codebook, str):
        check_option("codebook", codebook, CODEBOOKS)
        codebook = CODEBOOKS[codebook]
    policy = AdaCachePolicy(steps, tuple(codebook), motion, motion_window, motion_scale)
    return CacheHandle(model, policy, blocks, residual, locations, calls_per_step)
