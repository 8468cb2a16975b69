# SPDX-License-Identifier: Apache-2.0
"""Lookup-free and binary spherical quantization: signs and indices of a tensor, and back. Maths: docs/lfq.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidkernels import dispatch
from vidkernels._reference import lfq as reference
from vidkernels._token_shapes import code_shape, index_shape
from vidkernels.errors import OptionError, ShapeError
from vidkernels.ops._autograd import first_order, needs_grad
from vidkernels.ops._checks import (
    check_dim,
    check_flag,
    check_floating,
    check_integer,
    check_option,
    check_positive,
    is_whole,
)
from vidkernels.ops._register import define
from vidkernels.ops._tokens import check_codebook_axis, check_codebooks, too_many_codes

BIT_ORDERS = ("msb_first", "lsb_first")
STRAIGHT_THROUGH = ("exact", "additive")
MAX_BITS = 62


def _fwd_fake(
    x: Tensor,
    scale: float,
    lsb_first: bool,
    spherical: bool,
    additive: bool,
    dim: int,
    num_codebooks: int,
    return_values: bool,
    return_indices: bool,
) -> tuple[Tensor, Tensor]:
    torch._check(x.shape[dim] % num_codebooks == 0, lambda: f"x: expected channels divisible by {num_codebooks}")
    values = torch.empty_like(x) if return_values else x.new_empty(0)
    shape = index_shape(x.shape, dim, num_codebooks) if return_indices else [0]
    return values, x.new_empty(shape, dtype=torch.int64)


def _bwd_fake(grad: Tensor, x: Tensor, scale: float, dim: int, num_codebooks: int) -> Tensor:
    torch._check(grad.shape == x.shape, lambda: "grad: expected the shape of x")
    return torch.empty_like(x)


def _decode_fake(
    indices: Tensor,
    bits: int,
    scale: float,
    lsb_first: bool,
    spherical: bool,
    dim: int,
    num_codebooks: int,
    dtype: torch.dtype,
) -> Tensor:
    return indices.new_empty(code_shape(indices.shape, dim, num_codebooks, bits), dtype=dtype)


define(
    "lfq_fwd",
    "(Tensor x, float scale, bool lsb_first, bool spherical, bool additive, int dim, "
    "int num_codebooks, bool return_values, bool return_indices) -> (Tensor, Tensor)",
    _fwd_fake,
    triton="vidkernels.triton.lfq:lfq_fwd",
)
define(
    "lfq_bwd",
    "(Tensor grad, Tensor x, float scale, int dim, int num_codebooks) -> Tensor",
    _bwd_fake,
    triton="vidkernels.triton.lfq:lfq_bwd",
)
define(
    "lfq_decode",
    "(Tensor indices, int bits, float scale, bool lsb_first, bool spherical, int dim, int num_codebooks, "
    "ScalarType dtype) -> Tensor",
    _decode_fake,
    triton="vidkernels.triton.lfq:lfq_decode",
)


class _LfqFunction(torch.autograd.Function):
    """The bare forward; its gradient is the identity, or that of the projection to the sphere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: str, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        values, indices = dispatch.op("lfq_fwd", chosen)(x, *arguments)
        ctx.chosen, ctx.scale, ctx.spherical, ctx.places = chosen, arguments[0], arguments[2], arguments[4:6]
        ctx.save_for_backward(*([x] if ctx.spherical else []))
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return (_spherical_backward(ctx, grad)[0] if ctx.spherical else grad), None, None


@first_order
def _spherical_backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    (x,) = ctx.saved_tensors
    return (dispatch.op("lfq_bwd", ctx.chosen)(grad, x, ctx.scale, *ctx.places),)


def check_bits(name: str, x: Tensor, dim: int, num_codebooks: int) -> tuple[int, int]:
    """The non-negative channel axis of ``x`` and the bits of one codebook."""
    check_codebooks(num_codebooks)
    dim = check_dim(name, dim, x.ndim)
    bits = x.shape[dim] // num_codebooks
    if bits < 1 or bits * num_codebooks != x.shape[dim]:
        expected = f"a positive multiple of num_codebooks={num_codebooks} channels at axis {dim}"
        raise ShapeError(name, expected, f"{x.shape[dim]} (shape {tuple(x.shape)})", "Give the channel axis as dim=.")
    return dim, bits


def _facts(
    x: Tensor,
    *,
    scale: float = 1.0,
    bit_order: str = "msb_first",
    spherical: bool = False,
    dim: int = -1,
    num_codebooks: int = 1,
    straight_through: str = "exact",
    return_quantized: bool = True,
    return_indices: bool = True,
    backend: str = "auto",
) -> tuple[Any, ...]:
    check_floating("x", x)
    check_option("bit_order", bit_order, BIT_ORDERS)
    check_option("straight_through", straight_through, STRAIGHT_THROUGH)
    check_positive("scale", scale)
    dim, bits = check_bits("x", x, dim, num_codebooks)
    check_flag("spherical", spherical)
    check_flag("return_quantized", return_quantized)
    check_flag("return_indices", return_indices)
    if bits > MAX_BITS:
        remedy = "Split the channels with num_codebooks."
        raise ShapeError("x", f"at most {MAX_BITS} channels a codebook (int64 indices)", bits, remedy)
    return x, bits, dim


def _few_codes(x: Tensor, bits: int, dim: int) -> str | None:
    return too_many_codes(x.numel() // bits)


def _few_indices(indices: Tensor, bits: int, dim: int) -> str | None:
    return too_many_codes(indices.numel())


BACKENDS = dispatch.Dispatcher(
    "lfq_quantize",
    facts=_facts,
    backends={
        "cpp": dispatch.cpp(),
        "cuda": dispatch.cuda(dispatch.FLOATING_AND_DOUBLE),
        "triton": dispatch.triton(check=_few_codes),
        "reference": dispatch.always,
    },
)


def lfq_quantize(
    x: Tensor,
    *,
    scale: float = 1.0,
    bit_order: str = "msb_first",
    spherical: bool = False,
    dim: int = -1,
    num_codebooks: int = 1,
    straight_through: str = "exact",
    return_quantized: bool = True,
    return_indices: bool = True,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """Lookup-free quantization: the code is the sign of each channel, and the signs are the bits of the index.

    q_i = s where x_i > 0 and -s elsewhere; index = sum_i 2^place(i) [x_i > 0], place(i) by ``bit_order``.

    Args:
        x: float32, float64, bfloat16 or float16, any strides, with num_codebooks * bits channels at ``dim`` (the channels
            of a codebook are neighbours), at most 62 bits per codebook. Half precision is quantized in float32.
        scale: s. On the sphere the radius: u = s x / max(|x|, 1e-12), codes +-s / sqrt(bits).
        bit_order: ``"msb_first"`` (vector-quantize-pytorch, BSQ: the first channel weighs most) or ``"lsb_first"``
            (the paper, Open-MAGVIT2).
        spherical: binary spherical quantization.
        straight_through: ``"exact"`` returns the codes; ``"additive"`` returns u + (q - u), as training loops write
            it, which rounds away from the code when abs(u) is large. The gradient is the same.
        return_quantized, return_indices: leave out what is not needed; it comes back as None.

    Returns:
        quantized: dtype, shape and memory format of x; gradient of u (the identity, or of the projection to the sphere).
        indices: int64, shape of x without ``dim``, plus a last axis of codebooks if num_codebooks > 1.
        Zero and NaN count as negative; ``"additive"`` passes a NaN on.

    Raises:
        ShapeError, DTypeError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: arXiv 2310.05737 (LFQ), arXiv 2406.07548 (BSQ).
    """
    x, bits, axis = _facts(
        x, scale=scale, bit_order=bit_order, spherical=spherical, dim=dim, num_codebooks=num_codebooks,
        straight_through=straight_through, return_quantized=return_quantized, return_indices=return_indices,
    )  # fmt: skip
    chosen = BACKENDS.select(backend, x, bits, axis)
    if chosen == "reference":
        values, indices = reference.lfq_quantize(
            x, scale=scale, bit_order=bit_order, spherical=spherical, dim=axis, num_codebooks=num_codebooks,
            straight_through=straight_through,
        )  # fmt: skip
        return values if return_quantized else None, indices if return_indices else None
    arguments = (
        float(scale), bit_order == "lsb_first", spherical, straight_through == "additive", axis, num_codebooks,
        return_quantized, return_indices,
    )  # fmt: skip
    if return_quantized and needs_grad(x):
        values, indices = _LfqFunction.apply(x, chosen, arguments)
    else:
        values, indices = dispatch.op("lfq_fwd", chosen)(x, *arguments)
    return values if return_quantized else None, indices if return_indices else None


def lfq_codes_to_indices(
    codes: Tensor, *, bit_order: str = "msb_first", dim: int = -1, num_codebooks: int = 1, backend: str = "auto"
) -> Tensor:
    """Indices of codes by their signs: index = sum_i 2^place(i) [code_i > 0].

    Args:
        codes: as x of `lfq_quantize`, with num_codebooks * bits channels at ``dim``.
        bit_order: as in `lfq_quantize`.

    Returns:
        int64, shape of codes without ``dim``, plus a last axis of codebooks if num_codebooks > 1.

    Raises:
        ShapeError, DTypeError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: arXiv 2310.05737.
    """
    check_floating("codes", codes)
    check_bits("codes", codes, dim, num_codebooks)
    indices = lfq_quantize(
        codes, bit_order=bit_order, dim=dim, num_codebooks=num_codebooks, return_quantized=False, backend=backend
    )[1]
    assert indices is not None
    return indices


def _indices_facts(
    indices: Tensor,
    bits: int,
    *,
    scale: float = 1.0,
    bit_order: str = "msb_first",
    spherical: bool = False,
    dim: int = -1,
    num_codebooks: int = 1,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> tuple[Any, ...]:
    check_integer("indices", indices)
    if not is_whole(bits) or bits > MAX_BITS:
        raise OptionError("bits", f"an int of 1 to {MAX_BITS}", repr(bits), "It is log2 of the codebook's size.")
    check_option("bit_order", bit_order, BIT_ORDERS)
    check_option("dtype", dtype, dispatch.FLOATING_AND_DOUBLE)
    check_positive("scale", scale)
    check_flag("spherical", spherical)
    check_codebooks(num_codebooks)
    check_codebook_axis(indices, num_codebooks)
    return indices, bits, check_dim("the codes", dim, indices.ndim + (num_codebooks == 1))


_INDEX_DTYPES = (torch.int32, torch.int64)
INDICES_BACKENDS = dispatch.Dispatcher(
    "lfq_indices_to_codes",
    facts=_indices_facts,
    backends={
        "cpp": dispatch.cpp(_INDEX_DTYPES),
        "cuda": dispatch.cuda(_INDEX_DTYPES),
        "triton": dispatch.triton(_INDEX_DTYPES, check=_few_indices),
        "reference": dispatch.always,
    },
)


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
    backend: str = "auto",
) -> Tensor:
    """Codes of indices: +s where the channel's bit is set, -s elsewhere (s / sqrt(bits) on the sphere).

    Args:
        indices: int32 or int64, any shape; with num_codebooks > 1 the last axis holds the codebooks. Only the lowest
            ``bits`` bits of an index are read.
        bits: channels of one codebook, log2 of its size.
        scale, bit_order, spherical: as in `lfq_quantize`.
        dim: place of the channel axis in the result.
        dtype: of the codes.

    Returns:
        codes with num_codebooks * bits channels at ``dim``, contiguous.

    Raises:
        ShapeError, DTypeError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: arXiv 2310.05737; sphere: arXiv 2406.07548.
    """
    indices, bits, axis = _indices_facts(
        indices, bits, scale=scale, bit_order=bit_order, spherical=spherical, dim=dim, num_codebooks=num_codebooks,
        dtype=dtype,
    )  # fmt: skip
    chosen = INDICES_BACKENDS.select(backend, indices, bits, axis)
    if chosen == "reference":
        return reference.lfq_indices_to_codes(
            indices, bits, scale=scale, bit_order=bit_order, spherical=spherical, dim=axis, num_codebooks=num_codebooks,
            dtype=dtype,
        )  # fmt: skip
    arguments = (bits, float(scale), bit_order == "lsb_first", spherical, axis, num_codebooks, dtype)
    return dispatch.op("lfq_decode", chosen)(indices, *arguments)
