# SPDX-License-Identifier: Apache-2.0
"""Sums over tokens of the soft code assignment, exact and without the table of tokens x codes.

A softmax over a product of grids is a product of softmaxes, one per channel. Split the channels into two halves, let
U [n, K1] and V [n, K2] hold each token's distributions over the halves' codes: the sum over tokens of its distribution
over all K1 K2 codes is the matrix product U^T V. Its backward is two more products, dU = V G^T and dV = U G with G the
gradient of the sums. Tokens come in chunks, so memory grows neither with their number nor with tokens x codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Elements of the largest buffer of a chunk: 16 MiB in float32, below the size from which glibc maps (and the kernel
# clears) fresh pages for every allocation, and enough for a matrix product to run at full rate.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Group:
    """Channels [first, last) whose joint distribution is summed, split before ``middle``."""

    first: int
    middle: int
    last: int


@dataclass(frozen=True)
class Plan:
    """A product of grids: ``counts`` values per channel, listed one channel after the other in ``values``."""

    counts: tuple[int, ...]
    values: tuple[float, ...]
    group_size: int
    inv_temperature: float
    log_floor: float

    def codes(self, first: int, last: int) -> int:
        """Size of the joint codebook of channels [first, last)."""
        return math.prod(self.counts[first:last])

    def group(self, first: int, last: int) -> Group:
        """Channels [first, last), cut where the two halves' sizes are closest."""
        middle = min(range(first + 1, last + 1), key=lambda m: self.codes(first, m) + self.codes(m, last))
        return Group(first, middle, last)

    @property
    def groups(self) -> list[Group]:
        """Consecutive groups of ``group_size`` channels, the last one possibly smaller."""
        starts = range(0, len(self.counts), self.group_size)
        return [self.group(first, min(first + self.group_size, len(self.counts))) for first in starts]

    def grid(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(values, true where there is one), both [channels, largest count]; not to be written to."""
        return _grid(self.counts, self.values, like.dtype, like.device)

    def chunks(self, tokens: int, width: int) -> Iterator[slice]:
        """Slices of the tokens whose buffers of ``width`` elements a token stay within `CHUNK_ELEMENTS`."""
        size = max(1, CHUNK_ELEMENTS // width)
        return (slice(first, min(first + size, tokens)) for first in range(0, tokens, size))


@lru_cache(maxsize=64)
def _grid(
    counts: tuple[int, ...], values: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Kept: to copy it to a GPU means to wait for it, in each call."""
    widest, start = max(counts), 0
    rows, real = [], []
    for count in counts:
        rows.append([*values[start : start + count], *[0.0] * (widest - count)])
        real.append([k < count for k in range(widest)])
        start += count
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=dtype, device=device), torch.tensor(real, device=device)


def _channel_distributions(plan: Plan, x: Tensor, grid: Tensor, real: Tensor) -> Tensor:
    """log p of every value of every channel, [n, channels, largest count]; -inf where a channel has no such value."""
    logits = (2 * plan.inv_temperature) * (x.unsqueeze(-1) * grid)
    if not all(count == plan.counts[0] for count in plan.counts):
        logits = logits.masked_fill(~real, -math.inf)
    return logits.log_softmax(-1)


def _joint(p: Tensor, counts: Sequence[int], first: int, last: int) -> Tensor:
    """Distribution over the codes of channels [first, last), [n, K]; the first channel varies slowest."""
    joint = p.new_ones(len(p), 1) if first == last else p[:, first, : counts[first]]
    for channel in range(first + 1, last):
        joint = (joint.unsqueeze(-1) * p[:, channel, : counts[channel]].unsqueeze(1)).flatten(1)
    return joint


def _membership(counts: Sequence[int], first: int, last: int, widest: int, like: Tensor) -> Tensor:
    """[K, channels * widest]: one where a code of channels [first, last) has this value in this channel."""
    sizes = list(counts[first:last])
    codes = torch.arange(math.prod(sizes), device=like.device)
    columns = []
    for position in range(len(sizes)):
        value = codes // math.prod(sizes[position + 1 :]) % sizes[position]
        columns.append(value.unsqueeze(-1) == torch.arange(widest, device=like.device))
    if not columns:
        return like.new_zeros(1, 0)
    return torch.cat(columns, dim=-1).to(like.dtype)


def entropy_sums(
    x: Tensor,
    weight: Tensor | None,
    counts: Sequence[int],
    values: Sequence[float],
    group_size: int,
    inv_temperature: float,
    log_floor: float,
) -> tuple[Tensor, Tensor]:
    """Bare op `entropy_sums`.

    Args:
        x: [N, codebooks, d] float32 or float64.
        weight: [N] of zeros and ones, or None.
        log_floor: floor of p inside the logarithm of the per-token entropy; 0 for the exact one.

    Returns:
        sums: [codebooks, sum over groups of their codes], the assignment summed over tokens.
        total: [] entropies of the tokens' assignments, summed over tokens and codebooks.
    """
    plan = Plan(tuple(counts), tuple(values), group_size, inv_temperature, log_floor)
    groups = plan.groups
    sums = x.new_zeros(x.shape[1], sum(plan.codes(g.first, g.last) for g in groups))
    total = x.new_zeros(())
    if x.numel() == 0:
        return sums, total
    grid, real = plan.grid(x)
    width = max(plan.codes(g.first, g.middle) + plan.codes(g.middle, g.last) for g in groups)
    for book in range(x.shape[1]):
        tables = sums[book].split([plan.codes(g.first, g.last) for g in groups])
        for chunk in plan.chunks(len(x), max(width, grid.numel())):
            log_p = _channel_distributions(plan, x[chunk, book], grid, real)
            p = log_p.exp()
            w = None if weight is None else weight[chunk].unsqueeze(-1)
            _add_sums(plan, groups, tables, p, w)
            if log_floor == 0.0:
                bits = -(p * log_p.clamp(min=torch.finfo(x.dtype).min)).sum((1, 2))
                total += bits.sum() if w is None else (bits * w.squeeze(-1)).sum()
        if log_floor > 0.0:
            total += _floored_total(plan, x[:, book], weight, grid, real)
    return sums, total


def _add_sums(plan: Plan, groups: Sequence[Group], tables: Sequence[Tensor], p: Tensor, weight: Tensor | None) -> None:
    if plan.group_size == 1:  # the marginals themselves: one reduction for all channels
        weighted = p.sum(0) if weight is None else (p * weight.unsqueeze(-1)).sum(0)
        for channel, table in enumerate(tables):
            table += weighted[channel, : plan.counts[channel]]
        return
    for group, table in zip(groups, tables, strict=True):
        u = _joint(p, plan.counts, group.first, group.middle)
        v = _joint(p, plan.counts, group.middle, group.last)
        u = u if weight is None else u * weight
        table.view(u.shape[1], v.shape[1]).addmm_(u.T, v)


def _floored_chunks(
    plan: Plan, x: Tensor, grid: Tensor, real: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """(chunk, log p of each channel, p(c), log max(p(c), floor), which p(c) reach the floor): every code of every
    token, [n, K1, K2] at a time. The floor has no product form."""
    whole = plan.group(0, len(plan.counts))
    floor = math.log(plan.log_floor)
    for chunk in plan.chunks(len(x), plan.codes(0, len(plan.counts))):
        log_p = _channel_distributions(plan, x[chunk], grid, real)
        lower = log_p.clamp(min=torch.finfo(x.dtype).min / len(plan.counts))
        halves = [
            _log_joint(lower, plan.counts, first, last)
            for first, last in ((whole.first, whole.middle), (whole.middle, whole.last))
        ]
        log_codes = halves[0].unsqueeze(-1) + halves[1].unsqueeze(1)
        yield chunk, log_p, log_codes.exp(), log_codes.clamp(min=floor), log_codes >= floor


def _log_joint(log_p: Tensor, counts: Sequence[int], first: int, last: int) -> Tensor:
    joint = log_p.new_zeros(len(log_p), 1)
    for channel in range(first, last):
        joint = (joint.unsqueeze(-1) + log_p[:, channel, : counts[channel]].unsqueeze(1)).flatten(1)
    return joint


def _floored_total(plan: Plan, x: Tensor, weight: Tensor | None, grid: Tensor, real: Tensor) -> Tensor:
    total = x.new_zeros(())
    for chunk, _, p, log_floored, _ in _floored_chunks(plan, x, grid, real):
        entropies = -(p * log_floored).sum((1, 2))
        total += entropies.sum() if weight is None else (entropies * weight[chunk]).sum()
    return total


def entropy_sums_bwd(
    dsums: Tensor,
    dtotal: Tensor,
    sums: Tensor,
    x: Tensor,
    weight: Tensor | None,
    counts: Sequence[int],
    values: Sequence[float],
    group_size: int,
    inv_temperature: float,
    log_floor: float,
) -> Tensor:
    """Bare op `entropy_sums_bwd`: gradient of x, [N, codebooks, d]."""
    plan = Plan(tuple(counts), tuple(values), group_size, inv_temperature, log_floor)
    with torch.autocast(x.device.type, enabled=False):  # a backward pass inside it would multiply in half precision
        return _gradient(plan, dsums, dtotal, sums, x, weight)


def _gradient(plan: Plan, dsums: Tensor, dtotal: Tensor, sums: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    dx = torch.zeros_like(x)
    if x.numel() == 0:
        return dx
    groups = plan.groups
    sizes = [plan.codes(g.first, g.last) for g in groups]
    grid, real = plan.grid(x)
    width = max(plan.codes(g.first, g.middle) + plan.codes(g.middle, g.last) for g in groups)
    for book in range(x.shape[1]):
        # A constant added to the gradient of a distribution changes nothing; without its mean less cancels below.
        slopes = [
            slope - (slope * table).sum() / table.sum().clamp(min=torch.finfo(x.dtype).tiny)
            for slope, table in zip(dsums[book].split(sizes), sums[book].split(sizes), strict=True)
        ]
        for chunk in plan.chunks(len(x), max(width, grid.numel())):
            p = _channel_distributions(plan, x[chunk, book], grid, real).exp()
            centered = grid - (p * grid).sum(-1, keepdim=True)  # [n, channels, widest]: value minus its mean
            gradient = (_shares(plan, groups, slopes, p) * centered).sum(-1)
            if plan.log_floor == 0.0:  # d entropy / dx = -2 tau x var(value), per channel
                variance = (p * centered * centered).sum(-1)
                gradient -= dtotal * (2 * plan.inv_temperature) * x[chunk, book] * variance
            dx[chunk, book] = (2 * plan.inv_temperature) * gradient
        if plan.log_floor > 0.0:
            _add_floored_gradient(plan, x[:, book], dtotal, grid, real, dx[:, book])
    return dx if weight is None else dx * weight.view(-1, 1, 1)


def _shares(plan: Plan, groups: Sequence[Group], slopes: Sequence[Tensor], p: Tensor) -> Tensor:
    """sum over the codes with value l in channel i of p(c) dL/dp(c), [n, channels, widest]."""
    if plan.group_size == 1:
        padded = [torch.nn.functional.pad(slope, (0, p.shape[-1] - len(slope))) for slope in slopes]
        return p * torch.stack(padded)
    parts = []
    for group, slope in zip(groups, slopes, strict=True):
        u = _joint(p, plan.counts, group.first, group.middle)
        v = _joint(p, plan.counts, group.middle, group.last)
        table = slope.view(u.shape[1], v.shape[1])
        for own, product, first, last in (
            (u, v @ table.T, group.first, group.middle),
            (v, u @ table, group.middle, group.last),
        ):
            if first < last:
                members = _membership(plan.counts, first, last, p.shape[-1], p)
                parts.append((product.mul_(own) @ members).view(len(p), last - first, p.shape[-1]))
    return torch.cat(parts, dim=1)


def _add_floored_gradient(plan: Plan, x: Tensor, dtotal: Tensor, grid: Tensor, real: Tensor, dx: Tensor) -> None:
    whole = plan.group(0, len(plan.counts))
    widest = grid.shape[-1]
    for chunk, log_p, p, log_floored, reached in _floored_chunks(plan, x, grid, real):
        slope = -(log_floored + reached.to(p.dtype))  # dH/dp(c); less its mean, as above
        slope = p * (slope - (p * slope).sum((1, 2), keepdim=True))
        parts = []
        for sums, first, last in ((slope.sum(2), whole.first, whole.middle), (slope.sum(1), whole.middle, whole.last)):
            members = _membership(plan.counts, first, last, widest, p)
            parts.append((sums @ members).view(len(p), last - first, widest))
        distributions = log_p.exp()
        centered = grid - (distributions * grid).sum(-1, keepdim=True)
        dx[chunk] += dtotal * (2 * plan.inv_temperature) * (torch.cat(parts, dim=1) * centered).sum(-1)
