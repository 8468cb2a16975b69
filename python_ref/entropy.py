# SPDX-License-Identifier: Apache-2.0
"""Entropy of the soft code assignment p(c|x) proportional to exp(2 tau <x, c>), written out over every code.

This is the definition, with its N x K table; it is what `vidkernels.ops` computes without that table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

ESTIMATORS = ("exact", "groups", "bits")
LOG_FLOORS = ("clamp", "add")


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks of a group; the gradients are summed over the ranks as well."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ANN001
        ctx.group = group
        total = x.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def entropy_of(p: Tensor, log_floor: float, mode: str) -> Tensor:
    """-sum p log p over the last axis; the logarithm sees max(p, floor) or p + floor where a floor is given."""
    if log_floor == 0.0:
        return torch.special.entr(p).sum(-1)
    return -(p * (p.clamp(min=log_floor) if mode == "clamp" else p + log_floor).log()).sum(-1)


def _per_token(log_p: Tensor, log_floor: float, mode: str) -> Tensor:
    p = log_p.exp()
    # Mode "add" is the loss of Open-MAGVIT2, which floors only the batch term.
    if log_floor > 0.0 and mode == "clamp":
        return entropy_of(p, log_floor, mode)
    return -(p * log_p).sum(-1)


def _codes(grids: Sequence[Tensor]) -> Tensor:
    return torch.cartesian_prod(*grids) if len(grids) > 1 else grids[0].unsqueeze(-1)


def assignment_entropy(
    x: Tensor,
    grids: Sequence[Tensor],
    *,
    inv_temperature: float,
    group_size: int,
    weight: Tensor | None = None,
    log_floor: float = 0.0,
    log_floor_mode: str = "clamp",
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-sample and batch entropy of x over the product of ``grids``, averaged over the codebooks.

    Args:
        x: [N, codebooks, d].
        grids: the d channels' values, each [L_i].
        group_size: channels whose joint distribution is kept in the batch term; d for the exact one.
        weight: [N] of zeros and ones, which tokens count.
        process_group: ranks over which tokens are counted together.
    """
    weight = torch.ones_like(x[:, 0, 0]) if weight is None else weight.to(x.dtype)
    starts = range(0, len(grids), group_size)
    per_token, sums = torch.zeros_like(x[:, :, 0]), []
    whole = x.new_zeros(()) if log_floor == 0.0 or log_floor_mode == "add" else None
    for start in starts:
        codes = _codes(grids[start : start + group_size]).to(x)
        log_p = (2 * inv_temperature * (x[..., start : start + group_size] @ codes.T)).log_softmax(
            -1
        )  # [N, c, K_group]
        if whole is not None:
            per_token = per_token + _per_token(log_p, 0.0, "clamp")
        sums.append(torch.einsum("n,nck->ck", weight, log_p.exp()))
    if whole is None:
        codes = _codes(grids).to(x)
        per_token = _per_token((2 * inv_temperature * (x @ codes.T)).log_softmax(-1), log_floor, log_floor_mode)
    tokens, total = weight.sum(), (weight.unsqueeze(-1) * per_token).sum()
    if process_group is not None:
        sizes = [s.numel() for s in sums]
        flat = _SumOverRanks.apply(
            torch.cat([tokens.view(1), total.view(1), *(s.flatten() for s in sums)]), process_group
        )
        tokens, total, *parts = flat.split([1, 1, *sizes])
        sums = [part.view_as(s) for part, s in zip(parts, sums, strict=True)]
        tokens, total = tokens.squeeze(0), total.squeeze(0)
    tokens = tokens.detach().clamp(min=1.0)
    batch = sum(entropy_of(s / tokens, log_floor, log_floor_mode).mean() for s in sums)
    return total / (tokens * x.shape[1]), batch


def group_size_of(estimator: str, group_size: int, channels: int) -> int:
    """Channels per group of an estimator."""
    return {"exact": channels, "groups": min(group_size, channels), "bits": 1}[estimator]


def token_weight(mask: Tensor | None, tokens: Sequence[int]) -> Tensor | None:
    """[N] from a mask over the leading token axes."""
    if mask is None:
        return None
    return mask.reshape(*mask.shape, *[1] * (len(tokens) - mask.ndim)).expand(tuple(tokens)).reshape(math.prod(tokens))
