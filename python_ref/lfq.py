# SPDX-License-Identifier: Apache-2.0
"""Lookup-free quantization (arXiv 2310.05737): one bit per channel, q = +s where x > 0 and -s elsewhere.

Binary spherical quantization (arXiv 2406.07548) first puts x on the sphere of radius s, and its codes there as well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BIT_ORDERS = ("msb_first", "lsb_first")
STRAIGHT_THROUGH = ("exact", "additive")


def _weights(bits: int, bit_order: str, device: torch.device) -> Tensor:
    exponents = torch.arange(bits, device=device)
    return torch.ones_like(exponents) << (exponents.flip(0) if bit_order == "msb_first" else exponents)


def sphere(x: Tensor, scale: float) -> Tensor:
    """x on the sphere of radius ``scale``, over the last axis."""
    return F.normalize(x, dim=-1) * scale


def code_magnitude(bits: int, scale: float, spherical: bool, like: Tensor) -> Tensor:
    """Absolute value of every channel of a code: scale, or scale / sqrt(bits), rounded step by step in like's dtype."""
    one = torch.ones((), dtype=like.dtype, device=like.device)
    return one / (one * bits).sqrt() * scale if spherical else one * scale


class _StraightThrough(torch.autograd.Function):
    """The codes as value, the identity as gradient of x; also under `torch.func` and in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codes: Tensor) -> Tensor:
        return codes.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Tensor) -> Tensor:
        return tangent.clone()


def _straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """Codes with the gradient of x."""
    if torch.compiler.is_compiling():  # Dynamo (torch 2.13) drops the tangents of an autograd function without a word
        return codes + torch.where(x.isfinite(), x - x.detach(), 0.0)
    return _StraightThrough.apply(x, codes)


def split_codebooks(x: Tensor, dim: int, num_codebooks: int) -> Tensor:
    return x.movedim(dim, -1).unflatten(-1, (num_codebooks, x.shape[dim] // num_codebooks))


def lfq_quantize(
    x: Tensor,
    *,
    scale: float = 1.0,
    bit_order: str = "msb_first",
    spherical: bool = False,
    dim: int = -1,
    num_codebooks: int = 1,
    straight_through: str = "exact",
) -> tuple[Tensor, Tensor]:
    """Signs of x at the given scale, and the integer they spell.

    Args:
        x: any floating dtype, with num_codebooks * bits channels at ``dim``; 0 and NaN count as negative.
        straight_through: "exact" returns the codes; "additive" returns x + (q - x) as training loops write it, whose
            rounding may move the value away from the code when abs(x) is large.

    Returns:
        quantized like x, with the straight-through gradient; indices int64 without the channel axis, with a last axis
        of size num_codebooks if that is not 1.
    """
    wide = split_codebooks(x, dim, num_codebooks)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    wide = sphere(wide, scale) if spherical else wide
    magnitude = code_magnitude(wide.shape[-1], scale, spherical, wide)
    quantized = torch.where(wide > 0, magnitude, -magnitude)
    indices = ((wide > 0) * _weights(wide.shape[-1], bit_order, x.device)).sum(-1)
    if straight_through == "exact":
        value = _straight_through(wide, quantized.detach())
    else:
        value = wide + (quantized - wide).detach()
    return value.flatten(-2).movedim(-1, dim).to(x.dtype), indices.squeeze(-1) if num_codebooks == 1 else indices


def lfq_indices_to_codes(
    indices: Tensor,
    bits: int,
    *,
    scale: float = 1.0,
    bit_order: str = "msb_first",
    spherical: bool = False,
    dim: int = -1,
    num_codebooks: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Codes of indices, with the channel axis at ``dim``; only the lowest ``bits`` bits of an index are read."""
    indices = (indices.unsqueeze(-1) if num_codebooks == 1 else indices).long().unsqueeze(-1)
    positive = (indices & _weights(bits, bit_order, indices.device)) != 0
    wide = torch.zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=indices.device)
    magnitude = code_magnitude(bits, scale, spherical, wide)
    codes = torch.where(positive, magnitude, -magnitude)
    return codes.flatten(-2).movedim(-1, dim).to(dtype)


def lfq_codes_to_indices(
    codes: Tensor, *, bit_order: str = "msb_first", dim: int = -1, num_codebooks: int = 1
) -> Tensor:
    """Indices (int64) of codes, by their signs."""
    return lfq_quantize(codes, bit_order=bit_order, dim=dim, num_codebooks=num_codebooks)[1]
