# SPDX-License-Identifier: Apache-2.0
"""Token dropping: every sample keeps a random part of its tokens (NaViT, arXiv 2307.06304, section 2.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from vidkernels.errors import OptionError, ShapeError
from vidkernels.ops._checks import check_fits, check_same_device, check_tensor, is_finite
from vidkernels.packing._offsets import longest, offsets, segment_ids
from vidkernels.packing._pack import Packed, check_packed, pack_grids


def drop_tokens(packed: Packed, rate: float | Sequence[float], *, generator: torch.Generator | None = None) -> Packed:
    """Drop a random part of each sample's tokens: sample i keeps `max(1, round((1 - rate_i) * length_i))` of them.

    A sample without tokens stays empty. Kept tokens stay in order, and keep their positions in the whole sample. Only which
    tokens are kept is random; how many follows from the lengths, so the new offsets are known without waiting for a GPU.

    Args:
        packed: a pack with all its tokens.
        rate: share to drop, in [0, 1), one for all samples or one each.
        generator: on the pack's device.
    """
    check_packed(packed)
    rates = [rate] * len(packed) if isinstance(rate, (int, float)) else rate
    if (
        not isinstance(rates, (tuple, list, Sequence))
        or len(rates) != len(packed)
        or not all(is_finite(r) and 0 <= r < 1 for r in rates)
    ):
        raise OptionError("rate", f"one number or {len(packed)} numbers in [0, 1)", repr(rate), "0 keeps every token.")
    if packed.kept is not None:
        raise OptionError("packed", "a pack with all its tokens", "one with dropped tokens", "Drop once.")
    device, total = packed.cu_seqlens.device, sum(packed.lengths)
    counts = tuple(min(n, max(1, round((1 - r) * n))) for r, n in zip(rates, packed.lengths, strict=True))
    # Graphs with open sizes know `rand` without a generator alone.
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    draw = torch.rand(total, device=device, dtype=torch.float64, **source)
    # Half a draw keeps the sum below the next sample's even after rounding.
    shuffled = (0.5 * draw + segment_ids(packed.cu_seqlens, total)).argsort()  # random order inside each sample
    cu_seqlens = offsets(counts, device)
    segment = segment_ids(cu_seqlens, sum(counts))
    rank = torch.arange(sum(counts), device=device) - cu_seqlens[segment]
    kept = shuffled[packed.cu_seqlens[segment] + rank].sort().values
    return dataclasses.replace(
        packed,
        tokens=packed.tokens[kept],
        cu_seqlens=cu_seqlens,
        max_seqlen=longest(counts),
        positions=packed.positions[kept],
        lengths=counts,
        kept=kept,
    )


def restore_tokens(packed: Packed, tokens: torch.Tensor | None = None, fill: float | torch.Tensor = 0.0) -> Packed:
    """Undo `drop_tokens`: kept tokens at their places, `fill` (a number or one token's vector) in place of dropped ones."""
    check_packed(packed)
    tokens = packed.tokens if tokens is None else tokens
    check_tensor("tokens", tokens)
    check_same_device("tokens", tokens, "packed.tokens", packed.tokens)
    if tokens.ndim < 1 or tokens.shape[0] != sum(packed.lengths):
        raise ShapeError("tokens", f"{sum(packed.lengths)} tokens, those kept", tuple(tokens.shape), "")
    if packed.kept is None:
        return packed.with_tokens(tokens)
    lengths = tuple(t * h * w for t, h, w in packed.sizes)
    # A number through new_full: as_tensor on a GPU would copy it from the host and wait for the stream.
    if not isinstance(fill, torch.Tensor):
        check_fits("fill", fill, tokens.dtype)
    else:
        check_tensor("fill", fill)
        check_same_device("fill", fill, "tokens", tokens)
        row = tuple(tokens.shape[1:])
        if fill.ndim > len(row) or tuple(fill.shape) != row[len(row) - fill.ndim :]:
            raise ShapeError("fill", f"a number or {row}, one token's", tuple(fill.shape), "")
    token = fill.to(tokens) if isinstance(fill, torch.Tensor) else tokens.new_full((), fill)
    whole = token.expand(sum(lengths), *tokens.shape[1:])
    filled = whole.index_copy(0, packed.kept, tokens)
    return pack_grids(packed.sizes, filled, patch=packed.patch, order=packed.order)
