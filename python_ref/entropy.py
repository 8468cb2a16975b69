# SPDX-License-Identifier: Apache-2.0
"""Entropy of the soft code assignment p(c|x) proportional to exp(2 tau <x, c>), written out over every code.

This is the definition, with its N x K table; it is what `vidkernels.ops` computes without that table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import fsq, lfq
from .varlen_attention import full_precision

ESTIMATORS = ("exact", "groups", "bits")


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks of a group; the gradients are summed over the ranks as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def entropy_of(p: Tensor, log_floor: float, mode: str) -> Tensor:
    """-sum p log p over the last axis; the logarithm sees max(p, floor) or p + floor where a floor is given."""
    if log_floor == 0.0:
        # The floor of the dtype's own numbers: 0 log 0 = 0, with a gradient that a zero dp turns to zero, not to NaN.
        log_floor, mode = torch.finfo(p.dtype).tiny, "clamp"
    return -(p * (p.clamp(min=log_floor) if mode == "clamp" else p + log_floor).log()).sum(-1)


def _codes(grids: Sequence[Tensor]) -> Tensor:
    return torch.cartesian_prod(*grids) if len(grids) > 1 else grids[0].unsqueeze(-1)


def assignment_entropy(
    x: Tensor,
    grids: Sequence[Tensor],
    *,
    inv_temperature: float,
    group_size: int,
    log_floor: float = 0.0,
    log_floor_mode: str = "clamp",
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-sample and batch entropy of x over the product of ``grids``, averaged over the codebooks.

    Args:
        x: [N, codebooks, d], the tokens that count.
        grids: the d channels' values, each [L_i].
        group_size: channels whose joint distribution is kept in the batch term; d for the exact one.
        process_group: ranks over which tokens are counted together.
    """

    def log_assignment(first: int, last: int) -> Tensor:
        codes = _codes(grids[first:last]).to(x)  # [K, last - first]
        with full_precision(x):
            return (2 * inv_temperature * (x[..., first:last] @ codes.T)).log_softmax(-1)

    groups = [log_assignment(first, first + group_size) for first in range(0, len(grids), group_size)]
    sums = torch.cat([log_p.exp().sum(0) for log_p in groups], dim=-1)  # [codebooks, all groups' codes]
    if log_floor > 0.0 and log_floor_mode == "clamp":
        total = entropy_of(log_assignment(0, len(grids)).exp(), log_floor, log_floor_mode).sum()
    else:  # mode "add" is the loss of Open-MAGVIT2, which floors only the batch term
        total = x.new_zeros(())
        for log_p in groups:
            total = total - (log_p.exp() * log_p).sum()
    tokens = x.new_tensor(float(len(x)))
    if process_group is not None:
        flat = _SumOverRanks.apply(torch.cat([tokens.view(1), total.view(1), sums.flatten()]), process_group)
        tokens, total, sums = flat[0], flat[1], flat[2:].view_as(sums)
    tokens = tokens.detach().clamp(min=1.0)
    parts = (sums / tokens).split([log_p.shape[-1] for log_p in groups], dim=-1)
    batch = torch.stack([entropy_of(p, log_floor, log_floor_mode).mean() for p in parts]).sum()
    return total / (tokens * x.shape[1]), batch


def group_size_of(estimator: str, group_size: int, channels: int) -> int:
    """Channels per group of an estimator."""
    return {"exact": channels, "groups": min(group_size, channels), "bits": 1}[estimator]


def counted_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """[N, codebooks, d] from [tokens..., codebooks, d]: those where a mask over the leading token axes is true."""
    kept = x if mask is None else x[mask.bool()]
    return kept.flatten(0, -3) if kept.ndim > 2 else kept[None]  # one token has no axis of its own


def lfq_entropy(
    x: Tensor,
    *,
    inv_temperature: float = 100.0,
    scale: float = 1.0,
    spherical: bool = False,
    dim: int = -1,
    num_codebooks: int = 1,
    estimator: str = "exact",
    group_size: int = 9,
    mask: Tensor | None = None,
    log_floor: float = 0.0,
    log_floor_mode: str = "clamp",
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean entropy of one token's soft assignment, and entropy of the mean assignment, in nats.

    p(c|x) is proportional to exp(2 tau <x, c>) over all sign vectors c. See `vidkernels.ops.lfq_entropy`.
    """
    wide = lfq.split_codebooks(x, dim, num_codebooks)
    wide = counted_tokens(wide, mask)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    magnitude = scale
    if spherical:
        wide, magnitude = lfq.sphere(wide, scale), scale / math.sqrt(wide.shape[-1])
    grid = wide.new_tensor([-magnitude, magnitude])
    return assignment_entropy(
        wide,
        [grid] * wide.shape[-1],
        inv_temperature=inv_temperature,
        group_size=group_size_of(estimator, group_size, wide.shape[-1]),
        log_floor=log_floor,
        log_floor_mode=log_floor_mode,
        process_group=process_group,
    )


def fsq_entropy(
    z: Tensor,
    levels: Sequence[int],
    *,
    bound: str = "atanh",
    inv_temperature: float = 100.0,
    dim: int = -1,
    num_codebooks: int = 1,
    estimator: str = "exact",
    group_size: int = 3,
    mask: Tensor | None = None,
    log_floor: float = 0.0,
    log_floor_mode: str = "clamp",
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean entropy of one token's soft assignment, and entropy of the mean assignment, in nats.

    p(c|z) is proportional to exp(2 tau <z, c>) over the whole grid, z being the unbounded input, as VidTok trains it.
    See `vidkernels.ops.fsq_entropy`.
    """
    wide = fsq.split_codebooks(z, dim, num_codebooks, len(levels))
    wide = counted_tokens(wide, mask)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    return assignment_entropy(
        wide,
        [fsq.level_grid(count, bound=bound).to(wide) for count in levels],
        inv_temperature=inv_temperature,
        group_size=group_size_of(estimator, group_size, len(levels)),
        log_floor=log_floor,
        log_floor_mode=log_floor_mode,
        process_group=process_group,
    )
