# SPDX-License-Identifier: Apache-2.0
"""Losses over a pack. Mean over tokens and mean over samples differ: the first lets long videos dominate."""

from __future__ import annotations

import torch

from vidkernels.errors import OptionError, ShapeError


def per_sample_mean(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of each sample (and over all further axes): `[N, ...]` -> `[B]` in float32 (float64 stays).

    Sums run in token order, so the result is equal in every run. A sample without tokens gets 0.
    """
    if values.ndim < 1:
        raise ShapeError("values", "[N, ...], one row per token", tuple(values.shape), "Do not reduce it before.")
    wide = values if values.dtype == torch.float64 else values.float()
    rows = wide.flatten(1).mean(dim=1) if wide.ndim > 1 else wide
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    # unsafe: without reading the lengths back to check that they sum to N
    sums = torch.segment_reduce(rows, "sum", lengths=lengths, unsafe=True, initial=0)
    return sums / lengths.clamp(min=1)


def packed_mean(
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    reduction: str = "sample",
    *,
    denominator: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Scalar loss of a pack.

    Args:
        values: loss per token, `[N, ...]`; further axes are averaged.
        cu_seqlens: int32 `[B + 1]`.
        reduction: "sample" = mean over samples of the mean over their tokens; "token" = mean over all tokens.
        denominator: number of samples or tokens to divide by instead of this pack's own, for example the total over
            all ranks or accumulation steps, whose packs hold different numbers.
    """
    if reduction == "sample":
        means = per_sample_mean(values, cu_seqlens)
        return means.sum() / (max(means.shape[0], 1) if denominator is None else denominator)
    if reduction == "token":
        wide = values if values.dtype == torch.float64 else values.float()
        rows = wide.flatten(1).mean(dim=1) if wide.ndim > 1 else wide
        return rows.sum() / (max(rows.shape[0], 1) if denominator is None else denominator)
    raise OptionError("reduction", "'sample' or 'token'", repr(reduction), "They weight long videos differently.")
