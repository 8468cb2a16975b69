# SPDX-License-Identifier: Apache-2.0
"""What all blocks together add to the tokens, in as few tensors as the model has token layouts.

Blocks whose output object is the next block's input form a run; its sum is one subtraction, last output minus first input.
Where a model rearranges tokens between blocks (space-time transposes), or sets some aside (images beside a video), runs of one
list of blocks and one shape are added up, and the sum is given back by the last such block: Latte needs 2 tensors instead
of one per sub-layer, 112.
"""

from __future__ import annotations

import math

from torch import Tensor

from vidkernels.caching._requests import Members, join, split

Tokens = tuple[Tensor, ...]
Place = tuple[str, int]
# List of blocks, and the tokens' shape without their batch.
Layout = tuple[str, tuple[int, ...]]


def _layout(place: Place, tokens: Tokens) -> Layout:
    return place[0], tuple(tokens[0].shape[1:])


class DeltaStore:
    """Sums of one guidance branch: layout -> (position of its last block, one tensor per token stream)."""

    def __init__(self) -> None:
        self.deltas: dict[Layout, tuple[int, Tokens]] = {}
        self._fresh: dict[Layout, tuple[int, Tokens]] = {}
        self._start: Tokens = ()
        self._end: Tokens = ()
        self._end_at: Place | None = None

    def begin(self) -> None:
        """A computed forward starts."""
        self._fresh, self._start, self._end, self._end_at = {}, (), (), None

    def add(self, place: Place, before: Tokens, after: Tokens) -> None:
        """The block at `place` has turned `before` into `after`."""
        if len(before) != len(self._end) or any(a is not b for a, b in zip(before, self._end, strict=True)):
            self._flush()
            self._start = before
        self._end, self._end_at = after, place

    def finish(self, step: int) -> None:
        """The computed forward of `step` is over: its sums replace the old ones."""
        self._flush()
        self._replace(step, self._fresh)
        self._fresh, self._start, self._end = {}, (), ()

    def _replace(self, step: int, fresh: dict[Layout, tuple[int, Tokens]]) -> None:
        self.deltas = fresh

    def _flush(self) -> None:
        if self._end_at is None:
            return
        group, position = _layout(self._end_at, self._end), self._end_at[1]
        # Constants for autograd: a later step's backward must not run into this one's freed graph.
        pairs = zip(self._end, self._start, strict=True)
        sums = tuple(after.detach() - before.detach() for after, before in pairs)
        if group in self._fresh:
            sums = tuple(total.add_(extra) for total, extra in zip(self._fresh[group][1], sums, strict=True))
        self._fresh[group] = (position, sums)
        self._end_at = None

    def apply(self, place: Place, tokens: Tokens, step: int) -> Tokens:
        """Tokens behind a skipped block: unchanged, except behind the last block of each layout."""
        group = _layout(place, tokens)
        last, sums = self._sums(group)
        if place[1] != last:
            return tokens
        return tuple(token + total for token, total in zip(tokens, self._forecast(group, sums, step), strict=True))

    def _sums(self, group: Layout) -> tuple[int, Tokens]:
        return self.deltas.get(group, (-1, ()))

    def _forecast(self, group: Layout, sums: Tokens, step: int) -> Tokens:
        return sums


class RequestStore(DeltaStore):
    """One set of sums per request; `members` names the requests of the forward that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.members = Members((0,))
        self._requests: dict[int, dict[Layout, tuple[int, Tokens]]] = {}

    def _replace(self, step: int, fresh: dict[Layout, tuple[int, Tokens]]) -> None:
        parts: dict[int, dict[Layout, tuple[int, Tokens]]] = {request: {} for request in self.members.requests}
        for group, (position, sums) in fresh.items():
            streams = zip(*(split(total, self.members) for total in sums), strict=True)
            for request, mine in zip(self.members.requests, streams, strict=True):
                parts[request][group] = position, mine
        self._requests.update(parts)

    def _sums(self, group: Layout) -> tuple[int, Tokens]:
        found = [self._requests[request].get(group, (-1, ())) for request in self.members.requests]
        streams = zip(*(sums for _, sums in found), strict=True)
        return found[0][0], tuple(join(parts, self.members) for parts in streams)


class TaylorStore(DeltaStore):
    """Forecasts the sums between computed steps: delta(s) = sum_k (s - s0)^k / k! D^k, D^k the k-th divided difference.

    Args:
        order: highest difference; each costs one more set of tensors.
    """

    def __init__(self, order: int) -> None:
        super().__init__()
        self.order = order
        self._step = 0
        self._differences: dict[Layout, list[Tokens]] = {}

    def _replace(self, step: int, fresh: dict[Layout, tuple[int, Tokens]]) -> None:
        gap = step - self._step
        for group, (_, sums) in fresh.items():
            levels = [sums]
            for older in self._differences.get(group, [])[: self.order]:
                levels.append(tuple((new - old) / gap for new, old in zip(levels[-1], older, strict=True)))
            self._differences[group] = levels
        self.deltas, self._step = fresh, step

    def _forecast(self, group: Layout, sums: Tokens, step: int) -> Tokens:
        ahead = step - self._step
        result = sums
        for k, level in enumerate(self._differences[group][1:], start=1):
            weight = ahead**k / math.factorial(k)
            result = tuple(total + weight * difference for total, difference in zip(result, level, strict=True))
        return result
