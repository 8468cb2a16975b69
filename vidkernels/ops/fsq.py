# SPDX-License-Identifier: Apache-2.0
"""Finite scalar quantization: codes and indices of a tensor, and back. Maths and conventions: docs/fsq.md."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidkernels import dispatch
from vidkernels._reference import fsq as reference
from vidkernels._token_shapes import code_shape, index_shape
from vidkernels.errors import OptionError, ShapeError
from vidkernels.ops import _fsq_thresholds as tables
from vidkernels.ops._autograd import first_order, needs_grad
from vidkernels.ops._checks import check_dim, check_flag, check_floating, check_integer, check_option
from vidkernels.ops._register import define
from vidkernels.ops._tokens import check_codebook_axis, check_codebooks, too_many_codes

BOUNDS = ("atanh", "tan", "symmetric")
NAN_INDEX = -(2**31)
MAX_CHANNELS = 32
MAX_CUDA_THRESHOLDS = 256
# Of the CUDA kernel, kMaxPadded in csrc/fsq/fsq_fwd.cu: each count's thresholds are padded to whole runs of kRun = 4.
CUDA_RUN, MAX_CUDA_PADDED = 4, 292
MAX_LEVELS = 2**16  # whose thresholds take 10 s to find; 2^20 took 250 s, and 10^9 the machine's memory


def _fwd_fake(
    z: Tensor,
    levels: Sequence[int],
    thresholds: Sequence[float],
    symmetric: bool,
    dim: int,
    num_codebooks: int,
    return_codes: bool,
    return_indices: bool,
) -> tuple[Tensor, Tensor]:
    channels = num_codebooks * len(levels)
    torch._check(z.shape[dim] == channels, lambda: f"z: expected {channels} channels at axis {dim}")
    codes = torch.empty_like(z) if return_codes else z.new_empty(0)
    shape = index_shape(z.shape, dim, num_codebooks) if return_indices else [0]
    return codes, z.new_empty(shape, dtype=torch.int32)


def _bwd_fake(
    dcodes: Tensor,
    z: Tensor,
    shift: Sequence[float],
    slope: Sequence[float],
    hard_clamp: bool,
    dim: int,
    num_codebooks: int,
) -> Tensor:
    torch._check(dcodes.shape == z.shape, lambda: "dcodes: expected the shape of z")
    return torch.empty_like(z)


def _decode_fake(
    indices: Tensor, levels: Sequence[int], symmetric: bool, dim: int, num_codebooks: int, dtype: torch.dtype
) -> Tensor:
    return indices.new_empty(code_shape(indices.shape, dim, num_codebooks, len(levels)), dtype=dtype)


define(
    "fsq_fwd",
    "(Tensor z, int[] levels, float[] thresholds, bool symmetric, int dim, int num_codebooks, bool return_codes, "
    "bool return_indices) -> (Tensor, Tensor)",
    _fwd_fake,
    triton="vidkernels.triton.fsq:fsq_fwd",
)
define(
    "fsq_bwd",
    "(Tensor dcodes, Tensor z, float[] shift, float[] slope, bool hard_clamp, int dim, int num_codebooks) -> Tensor",
    _bwd_fake,
    triton="vidkernels.triton.fsq:fsq_bwd",
)
define(
    "fsq_decode",
    "(Tensor indices, int[] levels, bool symmetric, int dim, int num_codebooks, ScalarType dtype) -> Tensor",
    _decode_fake,
    triton="vidkernels.triton.fsq:fsq_decode",
)


class _FsqFunction(torch.autograd.Function):
    """The bare forward with the gradient of the bounded value before rounding."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, chosen: str, forward_arguments: tuple[Any, ...], bound: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        codes, indices = dispatch.op("fsq_fwd", chosen)(z, *forward_arguments)
        ctx.save_for_backward(z)
        ctx.chosen, ctx.bound, ctx.places = chosen, bound, forward_arguments[3:5]
        ctx.mark_non_differentiable(indices)
        return codes, indices

    @staticmethod
    @first_order
    def backward(ctx: Any, dcodes: Tensor, _: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (z,) = ctx.saved_tensors
        return dispatch.op("fsq_bwd", ctx.chosen)(dcodes, z, *ctx.bound, *ctx.places), None, None, None


def check_levels(levels: Sequence[int], bound: str) -> tuple[int, ...]:
    """The level counts as a tuple of ints that the bound can serve."""
    check_option("bound", bound, BOUNDS)
    if not isinstance(levels, Sequence) or isinstance(levels, str) or len(levels) == 0:
        raise OptionError(
            "levels", "a non-empty sequence of ints", repr(levels), "Name each channel's levels: [8, 5, 5]."
        )
    least = 2 if bound == "symmetric" else 3
    for count in levels:
        if not isinstance(count, (int, numbers.Integral)) or not least <= count <= MAX_LEVELS:
            two = isinstance(count, int) and count == 2
            remedy = 'Two levels need bound="symmetric".' if two else "Give one number per channel, as in [8, 5, 5]."
            raise OptionError("levels", f"ints of at least {least}, at most {MAX_LEVELS}", repr(list(levels)), remedy)
    return tuple(operator.index(count) for count in levels)  # constants also in a graph with symbolic sizes


def _check_codebook_size(levels: tuple[int, ...]) -> None:
    if math.prod(levels) > 2**31 - 1:
        remedy = "Use return_indices=False, or split the channels with num_codebooks."
        raise OptionError("levels", f"at most {2**31 - 1} codes for int32 indices", str(math.prod(levels)), remedy)


def check_channels(name: str, x: Tensor, dim: int, channels: int, num_codebooks: int) -> int:
    """The non-negative channel axis of ``x``, which has num_codebooks * channels channels there."""
    check_codebooks(num_codebooks)
    dim = check_dim(name, dim, x.ndim)
    if x.shape[dim] != num_codebooks * channels:
        wanted = num_codebooks * channels
        groups = f" ({num_codebooks} codebooks of {channels})" if num_codebooks > 1 else ""
        axes = [axis for axis, size in enumerate(x.shape) if size == wanted]
        remedy = (
            f"Axis {axes[0]} has {wanted}: pass dim={axes[0]}." if len(axes) == 1 else "Give the channel axis as dim=."
        )
        raise ShapeError(
            name, f"{wanted} channels at axis {dim}{groups}", f"{x.shape[dim]} (shape {tuple(x.shape)})", remedy
        )
    return dim


def _facts(
    z: Tensor,
    levels: Sequence[int],
    *,
    bound: str = "atanh",
    dim: int = -1,
    num_codebooks: int = 1,
    hard_clamp: bool = False,
    return_codes: bool = True,
    return_indices: bool = True,
    backend: str = "auto",
) -> tuple[Any, ...]:
    check_floating("z", z)
    counts = check_levels(levels, bound)
    dim = check_channels("z", z, dim, len(counts), num_codebooks)
    check_flag("hard_clamp", hard_clamp)
    check_flag("return_codes", return_codes)
    check_flag("return_indices", return_indices)
    if return_indices:
        _check_codebook_size(counts)
    return z, counts, dim


def _few_channels(x: Tensor, counts: tuple[int, ...], dim: int) -> str | None:
    if len(counts) > MAX_CHANNELS:
        return f"it takes at most {MAX_CHANNELS} channels a codebook, got {len(counts)}"
    return None


def _few_thresholds(x: Tensor, counts: tuple[int, ...], dim: int) -> str | None:
    found = tables.distinct_thresholds(counts)
    if found > MAX_CUDA_THRESHOLDS:
        return f"it takes at most {MAX_CUDA_THRESHOLDS} distinct thresholds, got {found}"
    return _few_channels(x, counts, dim)


def _fits_triton(x: Tensor, counts: tuple[int, ...], dim: int) -> str | None:
    return _few_thresholds(x, counts, dim) or too_many_codes(x.numel() // len(counts))


def _few_indices(indices: Tensor, counts: tuple[int, ...], dim: int) -> str | None:
    return _few_channels(indices, counts, dim) or too_many_codes(indices.numel())


def _few_padded(x: Tensor, counts: tuple[int, ...], dim: int) -> str | None:
    padded = sum(-(-(count - 1) // CUDA_RUN) * CUDA_RUN for count in set(counts))
    reason = _few_thresholds(x, counts, dim)
    if reason is None and padded > MAX_CUDA_PADDED:  # of 15 distinct counts and more, which have no int32 indices
        return f"it takes at most {MAX_CUDA_PADDED} thresholds padded to runs of {CUDA_RUN} a count, got {padded}"
    return reason


BACKENDS = dispatch.Dispatcher(
    "fsq_quantize",
    facts=_facts,
    backends={
        "cpp": dispatch.cpp(check=_few_channels),
        "cuda": dispatch.cuda(dispatch.FLOATING_AND_DOUBLE, check=_few_padded),
        "triton": dispatch.triton(check=_fits_triton),
        "reference": dispatch.always,
    },
)


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
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """Finite scalar quantization: bound each channel, round it to one of its levels, and number the resulting code.

    With ``bound="atanh"`` and L_i levels in channel i: q_i = round(tanh(z_i + d_i) h_i - o_i), code_i = q_i / floor(L_i / 2),
    index = sum_i (q_i + floor(L_i / 2)) prod_{j<i} L_j, where h_i = (L_i - 1) 1.001 / 2, o_i = 1/2 for even L_i and 0 for odd,
    d_i = atanh(o_i / h_i). The first channel is the least significant digit. The other bounds: docs/fsq.md.

    Args:
        z: float32, float64, bfloat16 or float16, any strides, with num_codebooks * len(levels) channels at ``dim``
            (the channels of a codebook are neighbours). Half precision is quantized in float32.
        levels: number of levels of each channel, at least 3 (2 for ``"symmetric"``).
        bound: ``"atanh"`` (vector-quantize-pytorch, VidTok, Cosmos), ``"tan"`` (the paper's appendix) or
            ``"symmetric"`` (stable-codec: codes 2 k / (L - 1) - 1).
        hard_clamp: clamp to [-1, 1] in place of tanh.
        return_codes, return_indices: leave out what is not needed; it comes back as None.

    Returns:
        codes: dtype, shape and memory format of z; gradient of the bounded value before rounding (straight-through).
        indices: int32, shape of z without ``dim``, plus a last axis of codebooks if num_codebooks > 1.
        A NaN gives a NaN code and index -2147483648; infinities give the end levels.

    Raises:
        ShapeError, DTypeError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: arXiv 2309.15505; symmetric grid: arXiv 2411.19842.
    """
    z, counts, axis = _facts(
        z, levels, bound=bound, dim=dim, num_codebooks=num_codebooks, hard_clamp=hard_clamp,
        return_codes=return_codes, return_indices=return_indices,
    )  # fmt: skip
    chosen = BACKENDS.select(backend, z, counts, axis)
    if chosen == "reference":
        return reference.fsq_quantize(
            z, counts, bound=bound, dim=axis, num_codebooks=num_codebooks, hard_clamp=hard_clamp,
            return_codes=return_codes, return_indices=return_indices,
        )  # fmt: skip
    found = tables.thresholds(counts, bound, hard_clamp, z.device, z.dtype == torch.float64)
    arguments = (counts, found, bound == "symmetric", axis, num_codebooks, return_codes, return_indices)
    if return_codes and needs_grad(z):
        slopes = tables.shifts(counts, bound, hard_clamp), tables.slopes(counts, bound, hard_clamp), hard_clamp
        codes, indices = _FsqFunction.apply(z, chosen, arguments, slopes)
    else:
        codes, indices = dispatch.op("fsq_fwd", chosen)(z, *arguments)
    return codes if return_codes else None, indices if return_indices else None


def _codes_facts(
    codes: Tensor,
    levels: Sequence[int],
    *,
    bound: str = "atanh",
    dim: int = -1,
    num_codebooks: int = 1,
    backend: str = "auto",
) -> tuple[Any, ...]:
    check_floating("codes", codes)
    counts = check_levels(levels, bound)
    _check_codebook_size(counts)
    return codes, counts, check_channels("codes", codes, dim, len(counts), num_codebooks)


CODES_BACKENDS = dispatch.Dispatcher("fsq_codes_to_indices", facts=_codes_facts, backends=BACKENDS.backends)


def fsq_codes_to_indices(
    codes: Tensor,
    levels: Sequence[int],
    *,
    bound: str = "atanh",
    dim: int = -1,
    num_codebooks: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Indices of codes: index = sum_i digit_i prod_{j<i} L_j, where digit_i numbers the level nearest to code_i from 0.

    Args:
        codes: any floating dtype, num_codebooks * len(levels) channels at ``dim``; bfloat16 tells at most 256 levels
            of a channel apart.
        levels, bound: as in `fsq_quantize`.

    Returns:
        int32, shape of codes without ``dim``, plus a last axis of codebooks if num_codebooks > 1. A NaN gives -2147483648.

    Raises:
        ShapeError, DTypeError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: arXiv 2309.15505.
    """
    codes, counts, axis = _codes_facts(codes, levels, bound=bound, dim=dim, num_codebooks=num_codebooks)
    chosen = CODES_BACKENDS.select(backend, codes, counts, axis)
    if chosen == "reference":
        return reference.fsq_codes_to_indices(codes, counts, bound=bound, dim=axis, num_codebooks=num_codebooks)
    nearest = tables.midpoints(counts, bound)
    arguments = (counts, nearest, bound == "symmetric", axis, num_codebooks, False, True)
    return dispatch.op("fsq_fwd", chosen)(codes.detach(), *arguments)[1]


def _indices_facts(
    indices: Tensor,
    levels: Sequence[int],
    *,
    bound: str = "atanh",
    dim: int = -1,
    num_codebooks: int = 1,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> tuple[Any, ...]:
    check_integer("indices", indices)
    counts = check_levels(levels, bound)
    _check_codebook_size(counts)
    check_option("dtype", dtype, dispatch.FLOATING_AND_DOUBLE)
    check_codebooks(num_codebooks)
    check_codebook_axis(indices, num_codebooks)
    return indices, counts, check_dim("the codes", dim, indices.ndim + (num_codebooks == 1))


_INDEX_DTYPES = (torch.int32, torch.int64)
INDICES_BACKENDS = dispatch.Dispatcher(
    "fsq_indices_to_codes",
    facts=_indices_facts,
    backends={
        "cpp": dispatch.cpp(_INDEX_DTYPES, check=_few_channels),
        "cuda": dispatch.cuda(_INDEX_DTYPES, check=_few_channels),
        "triton": dispatch.triton(_INDEX_DTYPES, check=_few_indices),
        "reference": dispatch.always,
    },
)


def fsq_indices_to_codes(
    indices: Tensor,
    levels: Sequence[int],
    *,
    bound: str = "atanh",
    dim: int = -1,
    num_codebooks: int = 1,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Codes of indices: digit_i = (index // prod_{j<i} L_j) mod L_i, code_i = (digit_i - floor(L_i/2)) / floor(L_i/2).

    Args:
        indices: int32 or int64, any shape; with num_codebooks > 1 the last axis holds the codebooks.
        levels, bound: as in `fsq_quantize`; the formula holds for every bound but ``"symmetric"``.
        dim: place of the channel axis in the result.
        dtype: of the codes; half precision is rounded from float32.

    Returns:
        codes with num_codebooks * len(levels) channels at ``dim``, contiguous. An index outside the codebook gives NaN.

    Raises:
        ShapeError, DTypeError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: arXiv 2309.15505.
    """
    indices, counts, axis = _indices_facts(
        indices, levels, bound=bound, dim=dim, num_codebooks=num_codebooks, dtype=dtype
    )
    chosen = INDICES_BACKENDS.select(backend, indices, counts, axis)
    if chosen == "reference":
        return reference.fsq_indices_to_codes(
            indices, counts, bound=bound, dim=axis, num_codebooks=num_codebooks, dtype=dtype
        )
    return dispatch.op("fsq_decode", chosen)(indices, counts, bound == "symmetric", axis, num_codebooks, dtype)
