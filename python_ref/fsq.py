# SPDX-License-Identifier: Apache-2.0
"""Finite scalar quantization (arXiv 2309.15505): every channel is squashed onto its own small grid of levels.

Three bounds are in use, and a checkpoint trained under one is not exact under another:

* ``"atanh"``      vector-quantize-pytorch, VidTok, Cosmos: h = (L-1)(1+eps)/2, shift = atanh(o/h)
* ``"tan"``        appendix A.1 of the paper:               h = (L-1)(1-eps)/2, shift = tan(o/h)
* ``"symmetric"``  stable-codec (arXiv 2411.19842):         c = 2/(L-1) * floor((L-1)(tanh z + 1)/2 + 1/2) - 1

with eps = 1e-3 and o = 1/2 for even L, 0 for odd L. The first two give c = round(tanh(z+shift) h - o) / floor(L/2).
``hard_clamp`` replaces tanh by a clamp to [-1, 1] and atanh and tan by the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BOUNDS = ("atanh", "tan", "symmetric")
EPSILON = 1e-3
# The index of a token that holds a NaN: no code has it, and it is what a float-to-int32 conversion of NaN gives on x86.
NAN_INDEX = -(2**31)


def bound_constants(
    levels: Sequence[int], *, bound: str = "atanh", hard_clamp: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """``(h, o, shift)`` of each channel, [d] float32.

    They are float32 whatever the input's dtype, because the implementations whose checkpoints exist compute them so, and
    whatever torch's default dtype, in which integers times a number would be.
    """
    count = torch.tensor(list(levels), dtype=torch.float32, device="cpu")
    half = (count - 1) * (1 - EPSILON if bound == "tan" else 1 + EPSILON) / 2
    offset = (count + 1) % 2 / 2
    ratio = offset / half
    return half, offset, ratio if hard_clamp else ratio.tan() if bound == "tan" else ratio.atanh()


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach()


def _clamp(z: Tensor) -> Tensor:
    """z clamped to [-1, 1], with slope 1 at both ends, too: that of torch.clamp is 1 there up to torch 2.13 and 0 from 2.14 on."""
    return torch.where(z.abs() <= 1.0, z, z.detach().clamp(-1.0, 1.0))


def _quantize_last(z: Tensor, levels: Sequence[int], bound: str, hard_clamp: bool) -> tuple[Tensor, Tensor]:
    """Codes and level numbers (as floating point; NaN stays NaN) of z [..., d] in float32 or float64."""
    count = torch.tensor(list(levels), dtype=torch.int32, device=z.device)
    if bound == "symmetric":
        squashed = _clamp(z) if hard_clamp else z.tanh()
        place = (count - 1) * (squashed + 1) / 2.0 + 0.5
        level = _straight_through(place, place.floor())
        return 2.0 / (count - 1).float() * level - 1.0, level.detach()
    half, offset, shift = (t.to(z.device) for t in bound_constants(levels, bound=bound, hard_clamp=hard_clamp))
    moved = z + shift
    place = (_clamp(moved) if hard_clamp else moved.tanh()) * half - offset
    level = _straight_through(place, place.round())
    return level / (count // 2), level.detach() + count // 2


def level_numbers(z: Tensor, levels: Sequence[int], *, bound: str = "atanh", hard_clamp: bool = False) -> Tensor:
    """Level of each value of z [..., d], 0 to L-1, as floating point; float32 or float64."""
    return _quantize_last(z, levels, bound, hard_clamp)[1]


def basis(levels: Sequence[int]) -> list[int]:
    """Weights of the digits: the first channel is the least significant."""
    return [math.prod(levels[:position]) for position in range(len(levels))]


def _digits_to_indices(digits: Tensor, levels: Sequence[int]) -> Tensor:
    whole = digits.nan_to_num(0.0, 0.0, 0.0).to(torch.int64)
    index = (whole * torch.tensor(basis(levels), device=digits.device)).sum(-1)
    return index.masked_fill(digits.isnan().any(-1), NAN_INDEX).to(torch.int32)


def split_codebooks(x: Tensor, dim: int, num_codebooks: int, channels: int) -> Tensor:
    """[..., c*d at dim, ...] -> [..., c, d]: codebook major."""
    return x.movedim(dim, -1).unflatten(-1, (num_codebooks, channels))


def _merge(x: Tensor, dim: int) -> Tensor:
    return x.flatten(-2).movedim(-1, dim)


def fsq_quantize(
    z: Tensor,
    levels: Sequence[int],
    *,
    bound: str = "atanh",
    dim: int = -1,
    num_codebooks: int = 1,
    hard_clamp: bool = False,
    return_codes: bool = True,
    return_indices: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Codes of z and their indices, sum over channels of digit_i * prod_{j<i} L_j.

    Args:
        z: any floating dtype, with num_codebooks * len(levels) channels at ``dim``. bfloat16 and float16 are quantized
            in float32.

    Returns:
        codes like z, with the straight-through gradient (that of the bound before rounding); indices int32 without the
        channel axis, with a last axis of size num_codebooks if that is not 1. A NaN gives a NaN code and ``NAN_INDEX``.
    """
    wide = split_codebooks(z, dim, num_codebooks, len(levels))
    wide = wide if wide.dtype == torch.float64 else wide.float()
    codes, digits = _quantize_last(wide, levels, bound, hard_clamp)
    indices = None
    if return_indices:
        indices = _digits_to_indices(digits, levels)
        indices = indices.squeeze(-1) if num_codebooks == 1 else indices
    return _merge(codes, dim).to(z.dtype) if return_codes else None, indices


def fsq_codes_to_indices(
    codes: Tensor, levels: Sequence[int], *, bound: str = "atanh", dim: int = -1, num_codebooks: int = 1
) -> Tensor:
    """Indices (int32) of codes that lie on the grid; each value goes to its nearest level."""
    wide = split_codebooks(codes, dim, num_codebooks, len(levels))
    wide = wide if wide.dtype == torch.float64 else wide.float()
    count = torch.tensor(list(levels), device=codes.device)
    digits = (wide + 1) * (count - 1) / 2 if bound == "symmetric" else wide * (count // 2) + count // 2
    digits = digits.round().clamp(torch.zeros_like(count), count - 1)
    indices = _digits_to_indices(digits, levels)
    return indices.squeeze(-1) if num_codebooks == 1 else indices


def fsq_indices_to_codes(
    indices: Tensor,
    levels: Sequence[int],
    *,
    bound: str = "atanh",
    dim: int = -1,
    num_codebooks: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Codes of indices, with the channel axis at ``dim``. An index outside the codebook gives NaN in all its channels."""
    indices = (indices.unsqueeze(-1) if num_codebooks == 1 else indices).long().unsqueeze(-1)
    count = torch.tensor(list(levels), device=indices.device)
    digits = indices.div(torch.tensor(basis(levels), device=indices.device), rounding_mode="floor") % count
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if bound == "symmetric":
        codes = digits.to(wide) * (2.0 / (count - 1).float()) - 1.0
    else:
        codes = (digits - count // 2).to(wide) / (count // 2)
    outside = (indices < 0) | (indices >= math.prod(levels))
    return _merge(codes.masked_fill(outside, math.nan), dim).to(dtype)


def fsq_codebook(
    levels: Sequence[int],
    *,
    bound: str = "atanh",
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> Tensor:
    """All codes in the order of their indices, [K, d]."""
    return fsq_indices_to_codes(torch.arange(math.prod(levels), device=device), levels, bound=bound, dtype=dtype)


def level_grid(count: int, *, bound: str = "atanh") -> Tensor:
    """The values one channel may take, [L] float64, lowest first."""
    return fsq_codebook([count], bound=bound)[:, 0]
