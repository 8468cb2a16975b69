# SPDX-License-Identifier: Apache-2.0
"""Decision thresholds of FSQ: the smallest input that reaches each level.

They are found on the formula itself, in the dtype and on the device where it would run, so that counting thresholds
gives the formula's own result for every representable input, rounding included. Each is searched among all floating
point numbers: 4 rounds of 256 probes in float32, 8 in float64, about a millisecond once per (levels, bound, device).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vidkernels._reference import fsq as reference
from vidkernels._tracing import constant_while_tracing

F = TypeVar("F", bound=Callable[..., Any])
_PROBES = 256
# Largest key of each dtype: the bits of +infinity. Keys order all numbers, key k being the k-th after zero.
_INFINITY_KEY = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _number(key: Tensor, dtype: torch.dtype) -> Tensor:
    """The floating point number with this key: its bits for key >= 0, those of the absolute value with a sign below."""
    lowest = torch.iinfo(_BITS[dtype]).min
    return torch.where(key >= 0, key, lowest - key).to(_BITS[dtype]).view(dtype)


def _search(level_count: int, bound: str, hard_clamp: bool, device: torch.device, dtype: torch.dtype) -> list[float]:
    """The level_count - 1 thresholds of one channel, ascending."""

    def level(key: Tensor) -> Tensor:
        number = _number(key, dtype)
        return reference.level_numbers(number.unsqueeze(-1), [level_count], bound=bound, hard_clamp=hard_clamp).squeeze(
            -1
        )

    wanted = torch.arange(1, level_count, device=device)
    low = torch.full_like(wanted, -_INFINITY_KEY[dtype])  # level 0
    high = torch.full_like(wanted, _INFINITY_KEY[dtype])  # the last level
    fractions = torch.arange(1, _PROBES, device=device)
    while bool((low + 1 < high).any()):
        # high - low exceeds 63 bits in float64, hence the divisions first; the products wrap around and back.
        step = torch.div(high, _PROBES, rounding_mode="floor") - torch.div(low, _PROBES, rounding_mode="floor")
        step = step.clamp(min=1).unsqueeze(-1)
        probes = torch.minimum(low.unsqueeze(-1) + step * fractions, high.unsqueeze(-1))  # [thresholds, probes]
        below = (level(probes.flatten()).view_as(probes) < wanted.unsqueeze(-1)).sum(-1, keepdim=True)
        edges = torch.cat([low.unsqueeze(-1), probes, high.unsqueeze(-1)], dim=-1)
        low, high = edges.gather(-1, below).squeeze(-1), edges.gather(-1, below + 1).squeeze(-1)
    return _number(high, dtype).tolist()


def _kept(function: F) -> F:
    """Keep what a function of options computes, for the next call in whatever mode: its tensors are real ones, on the device
    that it asks for, under export, fake tensors and a default device, too."""

    @lru_cache(maxsize=256)
    @wraps(function)
    def kept(*key: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction(), _disable_current_modes():
            return function(*key)

    return kept  # type: ignore[return-value]


@_kept
def _search_cached(*key: Any) -> tuple[float, ...]:
    return tuple(_search(*key))


@lru_cache(maxsize=256)
def _all_thresholds(
    levels: tuple[int, ...], bound: str, hard_clamp: bool, device: torch.device, double: bool
) -> tuple[float, ...]:
    dtype = torch.float64 if double else torch.float32
    parts = (_search_cached(count, bound, hard_clamp, device, dtype) for count in dict.fromkeys(levels))
    return tuple(threshold for part in parts for threshold in part)


@constant_while_tracing
def thresholds(
    levels: tuple[int, ...], bound: str, hard_clamp: bool, device: torch.device, double: bool
) -> tuple[float, ...]:
    """Thresholds of the distinct level counts, in order of first appearance: what the bare op `fsq_fwd` takes."""
    return _all_thresholds(levels, bound, hard_clamp, device, double)


@_kept
def _bound_slopes(levels: tuple[int, ...], bound: str, hard_clamp: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if bound == "symmetric":
        # One but for the float32 rounding of the grid's factor 2 / (L - 1).
        factor = (2.0 / (torch.tensor(levels, dtype=torch.float32) - 1)).tolist()
        return (0.0,) * len(levels), tuple(f * (count - 1) / 2 for f, count in zip(factor, levels, strict=True))
    half, _, shift = reference.bound_constants(levels, bound=bound, hard_clamp=hard_clamp)
    slope = [h / (count // 2) for h, count in zip(half.tolist(), levels, strict=True)]
    return tuple(shift.tolist()), tuple(slope)


@constant_while_tracing
def shifts(levels: tuple[int, ...], bound: str, hard_clamp: bool) -> tuple[float, ...]:
    """Shift of each channel before the squashing."""
    return _bound_slopes(levels, bound, hard_clamp)[0]


@constant_while_tracing
def slopes(levels: tuple[int, ...], bound: str, hard_clamp: bool) -> tuple[float, ...]:
    """Derivative of each channel's code by the squashed value."""
    return _bound_slopes(levels, bound, hard_clamp)[1]


@_kept
def level_values(count: int, bound: str) -> tuple[float, ...]:
    """The values that one channel may take, ascending."""
    return tuple(reference.level_grid(count, bound=bound).tolist())


@constant_while_tracing
def midpoints(levels: tuple[int, ...], bound: str) -> tuple[float, ...]:
    """Thresholds that send a code to the nearest level, laid out as those of `thresholds`."""
    result: list[float] = []
    for count in dict.fromkeys(levels):
        grid = level_values(count, bound)
        result += [(a + b) / 2 for a, b in zip(grid[:-1], grid[1:], strict=True)]
    return tuple(result)


def distinct_thresholds(levels: Sequence[int]) -> int:
    """How many numbers `thresholds` returns."""
    return sum(count - 1 for count in set(levels))
