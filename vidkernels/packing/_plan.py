# SPDX-License-Identifier: Apache-2.0
"""Which samples share a pack, and which packs go to which rank. Plain Python on the host."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from vidkernels.errors import OptionError
from vidkernels.ops._checks import check_number, check_option, check_sizes, is_finite, is_whole, whole_numbers

METHODS = ("greedy", "balanced")
MAX_RANKS = 2**20  # each gets a list of its own


def attention_costs(lengths: Sequence[int], linear: float = 1.0, quadratic: float = 0.0) -> list[float]:
    """`linear * L + quadratic * L^2` of every sample: (1, 0) counts tokens."""
    _check_lengths("lengths", lengths)
    check_number("linear", linear)
    check_number("quadratic", quadratic)
    return [linear * length + quadratic * length * length for length in lengths]


def transformer_costs(
    lengths: Sequence[int],
    width: int,
    *,
    mlp_ratio: float = 4.0,
    text_lengths: Sequence[int] | None = None,
) -> list[float]:
    """FLOPs of one transformer block's forward pass for every sample, a multiply-add counting as two.

    Linear layers: 4 projections and the MLP, `2 (4 + 2 mlp_ratio) width^2` per token; self-attention `4 width L^2`. With
    text: two more projections on the tokens' side and `4 width L Ltext`.
    """
    check_sizes(width=width)
    check_number("mlp_ratio", mlp_ratio, 0)
    linear = 2 * (4 + 2 * mlp_ratio) * width * width
    costs = attention_costs(lengths, linear, 4 * width)
    if text_lengths is None:
        return costs
    _check_lengths("text_lengths", text_lengths)
    if len(text_lengths) != len(lengths):
        raise OptionError("text_lengths", f"{len(lengths)} ints, one per sample", len(text_lengths), "")
    pairs = zip(costs, lengths, text_lengths, strict=True)
    return [c + 4 * width * width * length + 4 * width * length * text for c, length, text in pairs]


def pack_plan(costs: Sequence[float], budget: float, *, method: str = "greedy", ranks: int = 1) -> list[list[int]]:
    """Group samples into packs of at most `budget`.

    Args:
        costs: of every sample: tokens, or FLOPs from `attention_costs` or `transformer_costs`.
        budget: largest cost of a pack, in the same unit.
        method: "greedy" puts each sample, in the given order, into the first pack with room, so that samples of a
            stream stay near each other. "balanced" takes the large samples first (first fit decreasing: at most 11/9 of
            the fewest packs) and then evens the packs out, so that ranks which run one each wait little.
        ranks: the number of packs becomes a multiple of it; with fewer samples than packs some stay empty.

    Returns:
        Sample indices of every pack, ascending inside a pack.

    Raises:
        OptionError: a sample alone exceeds the budget.
    """
    check_option("method", method, METHODS)
    _check_ranks(ranks)
    _check_costs(costs)
    check_number("budget", budget)
    for i, cost in enumerate(costs):
        if not 0 <= cost <= budget:
            raise OptionError(
                "costs", f"numbers from 0 to the budget {budget}", f"costs[{i}] = {cost}", "Raise the budget."
            )
    order = range(len(costs)) if method == "greedy" else _descending(costs)
    packs = _first_fit(costs, order, budget)
    packs += [[] for _ in range(-len(packs) % ranks)]
    if method == "balanced" and packs:
        even = balance(costs, len(packs))
        # Longest-first spreading ignores the budget; it is taken only where it keeps it.
        if all(sum(costs[i] for i in pack) <= budget for pack in even):
            packs = even
    return [sorted(pack) for pack in packs]


def balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Spread samples (or packs) over `ranks` bins: the costliest first, each to the bin with the least so far.

    The costliest bin holds at most 4/3 of the best possible (Graham's bound for longest processing time first).
    """
    _check_ranks(ranks)
    _check_costs(costs)
    bins: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0.0, i) for i in range(ranks)]
    for sample in _descending(costs):
        total, i = heap[0]
        bins[i].append(sample)
        heapq.heapreplace(heap, (total + costs[sample], i))
    return [sorted(b) for b in bins]


def _check_ranks(ranks: object) -> None:
    if not is_whole(ranks) or ranks > MAX_RANKS:  # type: ignore[operator]
        raise OptionError("ranks", f"a positive int, at most {MAX_RANKS}", repr(ranks))


def _check_costs(costs: object) -> None:
    if isinstance(costs, str) or not isinstance(costs, (tuple, list, Sequence)) or not all(map(is_finite, costs)):
        raise OptionError("costs", "a sequence of finite numbers", repr(costs), "One per sample.")


def _check_lengths(name: str, lengths: object) -> None:
    if whole_numbers(lengths, 0) is None:
        raise OptionError(name, "a sequence of ints of at least 0", repr(lengths), "One per sample.")


def _descending(costs: Sequence[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda i: (-costs[i], i))


class _FirstFit:
    """Room left in every pack, in a tree of maxima: the first pack with enough room is found in O(log packs)."""

    def __init__(self, packs: int, budget: float) -> None:
        self.leaves = 1 << max(packs - 1, 0).bit_length()
        self.room = [budget] * (2 * self.leaves)

    def place(self, cost: float) -> int:
        node = 1
        while node < self.leaves:
            node = 2 * node if self.room[2 * node] >= cost else 2 * node + 1
        self.room[node] -= cost
        index = node - self.leaves
        while node > 1:
            node //= 2
            self.room[node] = max(self.room[2 * node], self.room[2 * node + 1])
        return index


def _first_fit(costs: Sequence[float], order: Sequence[int], budget: float) -> list[list[int]]:
    if not costs:
        return []
    fit = _FirstFit(len(costs), budget)
    packs: list[list[int]] = [[] for _ in costs]
    for sample in order:
        packs[fit.place(costs[sample])].append(sample)
    return [pack for pack in packs if pack]
