# SPDX-License-Identifier: Apache-2.0
"""Losses over a pack. Mean over tokens and mean over samples differ: the first lets long videos dominate."""

from __future__ import annotations

import torch

from vidkernels.errors import DTypeError, OptionError, ShapeError
from vidkernels.ops._checks import check_number, check_option, check_tensor
from vidkernels.ops.varlen_attention import check_offsets


def _check_values(values: torch.Tensor) -> None:
    check_tensor("values", values)
    if values.is_complex() or values.is_quantized:
        raise DTypeError("values", "real numbers", values.dtype, "Take its absolute value.")
    if values.ndim < 1:
        raise ShapeError("values", "[N, ...], one row per token", tuple(values.shape), "Do not reduce it before.")


def per_sample_mean(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of each sample (and over all further axes): `[N, ...]` -> `[B]` in float32 (float64 stays).

    Sums run in token order, so the result is equal in every run. A sample without tokens gets 0. On a GPU it is not checked
    that the offsets end at N.
    """
    _check_values(values)
    check_offsets("cu_seqlens", cu_seqlens, values, "values")  # the sums below read as many rows as it says
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
    """Average the loss per token of a pack to one number, over samples or over tokens.

    Args:
        values: loss per token, `[N, ...]`; further axes are averaged.
        cu_seqlens: int32 `[B + 1]`.
        reduction: "sample" = mean over samples of the mean over their tokens; "token" = mean over all tokens.
        denominator: number of samples or tokens to divide by instead of this pack's own, for example the total over
            all ranks or accumulation steps, whose packs hold different numbers.
    """
    check_option("reduction", reduction, ("sample", "token"))
    _check_values(values)
    if isinstance(denominator, torch.Tensor):
        check_tensor("denominator", denominator)
        if denominator.numel() != 1:
            raise ShapeError("denominator", "one number", tuple(denominator.shape))
        denominator = denominator.reshape(())  # a count of shape [1] would make the loss a vector
    elif denominator is not None:
        check_number("denominator", denominator)
        if not denominator > 0:
            raise OptionError("denominator", "a positive number", denominator, "It counts samples or tokens.")
    if reduction == "sample":
        means = per_sample_mean(values, cu_seqlens)
        return means.sum() / (max(means.shape[0], 1) if denominator is None else denominator)
    wide = values if values.dtype == torch.float64 else values.float()
    rows = wide.flatten(1).mean(dim=1) if wide.ndim > 1 else wide
    return rows.sum() / (max(rows.shape[0], 1) if denominator is None else denominator)
