# SPDX-License-Identifier: Apache-2.0
"""`vidkernels.adacache(model, ...)`: reuse whole denoising steps of a video transformer."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels._tracing import untraced
from vidkernels.caching import _blocks
from vidkernels.caching._clock import Clock
from vidkernels.caching._measure import sums, token_frames, unwrapped
from vidkernels.caching._meter import RESIDUALS, Meter
from vidkernels.caching._requests import CachedModel, Members
from vidkernels.caching._results import Result
from vidkernels.caching._store import DeltaStore, Place, RequestStore, TaylorStore
from vidkernels.caching.policies import CODEBOOKS, AdaCachePolicy, Codebook, Decision, FirstBlockPolicy, TaylorPolicy
from vidkernels.errors import OptionError
from vidkernels.ops._checks import check_option, check_whole

LATE = (
    "the step cache saw a new sample begin at step {} of another: its first step may have reused the other's residuals. "
    "Call handle.reset() after a sample that was interrupted, and install the cache for the steps that are run."
)
MORE = (
    "the step cache was installed for {} steps of {} call(s) of the model, and the sampler goes on: its next step counts as the "
    "first of a new sample. Count the calls of the model in a sample (Heun and PNDM make more than they have steps), and give "
    "calls_per_step=2 where guidance calls it once per branch."
)


@dataclass(frozen=True)
class CacheReport:
    """What happened in the current sample, or in the last one if that is complete.

    Attributes:
        computed_steps: steps that ran the blocks, counted from 1.
        total_steps: steps seen.
        decisions: distance, scaled distance and new rate of each measurement.
        residual: what was measured; "block" where a model's attention is not known.
    """

    computed_steps: tuple[int, ...]
    total_steps: int
    decisions: tuple[Decision, ...]
    residual: str = "block"

    @property
    def distances(self) -> tuple[float, ...]:
        """The distance of each measurement, before motion regularisation."""
        return tuple(decision.distance for decision in self.decisions)

    def __str__(self) -> str:
        share = len(self.computed_steps) / max(self.total_steps, 1)
        return f"computed {len(self.computed_steps)} of {self.total_steps} steps ({share:.0%}): {list(self.computed_steps)}"


Policy = AdaCachePolicy | FirstBlockPolicy | TaylorPolicy


class CacheHandle:
    """A step cache installed on one model. It counts denoising steps by the model's own forward calls.

    Args:
        model: the transformer, compiled or not.
        policy: an `AdaCachePolicy`, `FirstBlockPolicy` or `TaylorPolicy`.
        blocks: attribute names of the block lists; None finds them.
        residual: which residual is measured, see `adacache`.
        locations: indices of the measured blocks.
        calls_per_step: forwards per denoising step: 2 where guidance runs its branches one after the other.
        requests: requests of the batch that follow schedules of their own; 1: the batch follows one schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        blocks: Sequence[str] | None = None,
        residual: str = "temporal-attention",
        locations: Sequence[int] | None = None,
        calls_per_step: int = 1,
        requests: int = 1,
    ) -> None:
        check_option("residual", residual, RESIDUALS)
        if not isinstance(policy, Policy):
            raise OptionError("policy", "an AdaCachePolicy, FirstBlockPolicy or TaylorPolicy", repr(policy))
        check_whole("calls_per_step", calls_per_step, 1)
        check_whole("requests", requests, 1)
        if requests > 1 and not isinstance(policy, AdaCachePolicy):
            raise OptionError("requests", "1, or more with an AdaCachePolicy", requests)
        self.policy, self.calls_per_step, self.requests = policy, calls_per_step, requests
        self._policies = [policy, *(dataclasses.replace(policy) for _ in range(requests - 1))]
        inner = unwrapped(model)
        if requests > 1 and "cu_seqlens" in inspect.signature(type(inner).forward).parameters:
            raise OptionError("requests", "1 for a model over packs", requests, "A pack has no rows per request.")
        self._lists = _blocks.named_lists(inner, blocks) if blocks else _blocks.find_lists(inner)
        self._new_meter = lambda: Meter(self._lists, residual, locations, calls_per_step)
        self._clock = Clock(inner)
        self._hooks: list[Any] = []
        self._model = model
        self.samples = 0  # begun because the one before was complete, not by `reset`
        self._told = False
        self.reset()
        self._install(inner)

    def report(self, request: int = 0) -> CacheReport:
        """Steps computed so far, of one request where they have schedules of their own."""
        if request not in range(self.requests):
            raise OptionError("request", f"one of the {self.requests} from 0 on", request)
        if self._call == 0:
            self._settle()
        policy = self._policies[request]
        return CacheReport(tuple(policy.computed), self.step, tuple(policy.decisions), self._meter.measured)

    def reset(self) -> None:
        """Start a new sample: forget steps, residuals and sums."""
        self._clock.clear()
        self._start_over()

    def _start_over(self) -> None:
        for policy in self._policies:
            policy.reset()
        self._stores = [self._new_store() for _ in range(self.calls_per_step)]
        for hook in self._hooks[2:]:
            hook.remove()
        del self._hooks[2:]
        self._meter = self._new_meter()
        if self._hooks:
            self._hooks += self._meter.attach(self._lists)
        self._first: Tensor | None = None
        self._first_decision = True
        self._results: dict[Place, Result] = {}
        self._members, self._last_group = Members((0,)), True
        self._open: set[int] = set()
        self._due: set[int] = set()
        self._running, self._computing = False, True
        self._decided = 0  # step of the last decision behind a first block
        self._shapes: dict[int, tuple[torch.Size, ...]] = {}
        self.step, self._call = 0, 0

    def _new_store(self) -> DeltaStore:
        if isinstance(self.policy, TaylorPolicy):
            return TaylorStore(self.policy.order)
        return DeltaStore() if self.requests == 1 else RequestStore()

    def remove(self) -> None:
        """Take the cache off the model and free what it holds; a `vidkernels.patch` that came after it stays.

        Raises:
            PatchError: a block was re-classed after the cache was installed (FSDP2); nothing is removed then.
        """
        modules = [block for blocks in self._lists.values() for block in blocks]
        found = [(module, _blocks.original(module, self)) for module in modules]
        found.append((self._model, _blocks.original(self._model, self, CachedModel)))
        for module, before in found:
            if before is not None:
                _blocks.restore(module, before)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._stores = []

    def __enter__(self) -> CacheHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _install(self, inner: nn.Module) -> None:
        try:
            for name, blocks in self._lists.items():
                for position, block in enumerate(blocks):
                    _blocks.wrap(block, self, name, position)
            if self.requests > 1:
                self._model.__dict__["_vidkernels_cache"] = (self, None)
                _blocks.reclass(self._model, CachedModel)
        except BaseException:
            self.remove()
            raise
        self._hooks = [
            inner.register_forward_pre_hook(self._before, with_kwargs=True),
            inner.register_forward_hook(self._after, with_kwargs=True),
        ]
        self._hooks += self._meter.attach(self._lists)

    @untraced
    def groups(self, branches: int, args: Any, kwargs: Any) -> list[Members]:
        """A call of the model begins: the requests that compute in this step, then the others."""
        self._begin_step(args, kwargs)
        kinds = (self._due, set(range(self.requests)) - self._due)
        return [Members(tuple(sorted(kind)), branches, self.requests) for kind in kinds if kind]

    @untraced
    def start_group(self, members: Members, last: bool) -> None:
        """A forward of some requests comes next."""
        self._members, self._last_group = members, last

    def _begin_step(self, args: Any, kwargs: Any) -> None:
        shapes = tuple(x.shape for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1)
        began = self._clock.note(args, kwargs)
        self._tell_if_it_went_on()
        unfinished = self._call or self._running or self.step < self.policy.steps
        if unfinished and (began or self._shapes.get(self._call, shapes) != shapes):
            if began and self._clock.late:
                warnings.warn(LATE.format(self.step), stacklevel=4)
            self._start_over()  # what is stored belongs to a sample that was left
            self._clock.begin()
        if self._running:  # the forward before this one was left by an exception: this is its repetition
            self._running = False
            self.step -= self._call == 0
        if self._call == 0:
            self._settle()
            if self.step >= self.policy.steps:
                self._start_over()
                self._clock.begin(ended=True)
                self.samples += 1
            self.step += 1
            # A first-block policy decides behind the first block.
            self._due = {
                i
                for i, policy in enumerate(self._policies)
                if isinstance(policy, FirstBlockPolicy) or policy.computes(self.step)
            }
            self._tell_if_it_went_on()
        self._shapes[self._call] = shapes

    def _tell_if_it_went_on(self) -> None:
        """Once a handle: its count of steps is not the sampler's."""
        if self._clock.went_on and not self._told:
            warnings.warn(MORE.format(self.policy.steps, self.calls_per_step), stacklevel=5)
            self._told = True

    @untraced
    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward of the model begins."""
        if self.requests == 1:
            self._begin_step(args, kwargs)
        self._running = True
        self._meter.frames = token_frames(module, args, kwargs)
        self._computing = self._members.requests[0] in self._due
        store = self._stores[self._call]
        if isinstance(store, RequestStore):
            store.members = self._members
        if self._computing:
            store.begin()

    @untraced
    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A forward of the model ends."""
        if self._computing:
            self._stores[self._call].finish(self.step)
        if not self._last_group:
            return
        self._running = False
        self._call = (self._call + 1) % self.calls_per_step
        if self._call == 0:
            self._open = set(self._due) if self._computing or self.requests > 1 else set()
            if self._open:
                self._meter.send()

    def _settle(self) -> None:
        """Give the policies what the last computed step measured."""
        if self._open and not isinstance(self.policy, FirstBlockPolicy):
            observations = self._meter.receive()
            for request in sorted(self._open):
                policy = self._policies[request]
                assert not isinstance(policy, FirstBlockPolicy)  # all are of one kind
                policy.observe(self.step, observations.get(request, []))
        self._open = set()

    @untraced
    def skips(self) -> bool:
        """Whether blocks are skipped in this forward. Blocks that run outside of one, recomputed in a backward pass, are not."""
        return self._running and not self._computing

    @untraced
    def watches(self, block: nn.Module, place: Place, args: Any, kwargs: Any) -> bool:
        """Whether a block's attention is looked at while it runs, which comes next."""
        return (
            self._running and isinstance(self.policy, AdaCachePolicy) and self._meter.watch(block, place, args, kwargs)
        )

    @untraced
    def reuse(self, block: nn.Module, place: Place, args: Any, kwargs: Any) -> Any:
        """What a skipped block returns."""
        result, tokens = self._results[place], _blocks.streams(block, args, kwargs)
        return result.filled(self._stores[self._call].apply(place, result.given(tokens), self.step))

    @untraced
    def computed(self, block: nn.Module, place: Place, args: Any, kwargs: Any, output: Any) -> None:
        """A block has run; the form of its result is remembered for the steps that skip it."""
        if not self._running:
            return
        before = _blocks.streams(block, args, kwargs)
        result = self._results[place] = Result.of(place, before, output)
        given, after = result.given(before), result.tokens(output)
        if isinstance(self.policy, FirstBlockPolicy):
            if place == (next(iter(self._lists)), 0):
                self._decide_by_first((after[0] - given[0]).detach())
                return
        elif isinstance(self.policy, AdaCachePolicy):
            self._meter.measure(self._call, place, self._members, given[0], after[0])
        self._stores[self._call].add(place, given, after)

    def _decide_by_first(self, residual: Tensor) -> None:
        """The first block runs at every step; what it adds decides about the others. A repeated step is not decided again."""
        if self._call or self._decided == self.step:
            self._computing = self._first_decision
            return
        change, norm = (0.0, 0.0) if self._first is None else sums(self._first, residual)[:2].tolist()
        distance = None if self._first is None else (change / norm if norm > 0 else 0.0)
        self._first, self._decided = residual, self.step
        assert isinstance(self.policy, FirstBlockPolicy)
        self._computing = self._first_decision = self.policy.computes(self.step, distance)


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
    requests: int = 1,
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
        requests: R: each of the R requests in the batch gets its own distances and schedule; rows of the model's arguments are
            cat[prompts of all requests, nulls of all requests]. `handle.report(i)` tells about one of them.
        blocks: names of the model's block lists, where they have unusual names.

    Returns:
        The handle: `report()`, `reset()`, `remove()`; also a context manager.
    """
    check_whole("steps", steps, 1)
    if codebook is None:
        codebook = "30-fast" if steps <= 60 else "100"
    if isinstance(codebook, str):
        check_option("codebook", codebook, CODEBOOKS)
        codebook = CODEBOOKS[codebook]
    policy = AdaCachePolicy(steps, codebook, motion, motion_window, motion_scale)
    return CacheHandle(model, policy, blocks, residual, locations, calls_per_step, requests)
