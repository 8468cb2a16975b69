# SPDX-License-Identifier: Apache-2.0
"""Lookup-free quantization (arXiv 2310.05737): one bit per channel, q = +s where x > 0 and -s elsewhere.

Binary spherical quantization (arXiv 2406.07548) first puts x on the sphere of radius s, and its codes there as well.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .entropy import assignment_entropy, group_size_of, token_weight

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
    """The codes as value, the identity as gradient of x."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor) -> Tensor:  # noqa: ANN001
        return codes.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        return grad, None


def _split(x: Tensor, dim: int, num_codebooks: int) -> Tensor:
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
    wide = _split(x, dim, num_codebooks)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    wide = sphere(wide, scale) if spherical else wide
    magnitude = code_magnitude(wide.shape[-1], scale, spherical, wide)
    quantized = torch.where(wide > 0, magnitude, -magnitude)
    indices = ((wide > 0) * _weights(wide.shape[-1], bit_order, x.device)).sum(-1)
    if straight_through == "exact":
        value = _StraightThrough.apply(wide, quantized.detach())
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
    wide = _split(x, dim, num_codebooks)
    tokens = wide.shape[:-2]
    wide = wide.reshape(math.prod(tokens), num_codebooks, -1)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    magnitude = scale
    if spherical:
        wide, magnitude = sphere(wide, scale), scale / math.sqrt(wide.shape[-1])
    grid = wide.new_tensor([-magnitude, magnitude])
    return assignment_entropy(
        wide,
        [grid] * wide.shape[-1],
        inv_temperature=inv_temperature,
        group_size=group_size_of(estimator, group_size, wide.shape[-1]),
        weight=token_weight(mask, tokens),
        log_floor=log_floor,
        log_floor_mode=log_floor_mode,
        process_group=process_group,
    )
