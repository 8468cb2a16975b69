# SPDX-License-Identifier: Apache-2.0
"""Entropy losses of LFQ, BSQ and FSQ: exact over 2^18 codes in a matrix product. Maths and biases: docs/entropy.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidkernels import dispatch
from vidkernels._reference import entropy as reference
from vidkernels._reference import lfq as lfq_reference
from vidkernels._tracing import constant_while_tracing
from vidkernels.errors import DTypeError, OptionError, ShapeError
from vidkernels.ops._autograd import first_order, needs_grad
from vidkernels.ops._checks import (
    check_flag,
    check_floating,
    check_option,
    check_positive,
    check_same_device,
    check_tensor,
    is_finite,
    is_whole,
)
from vidkernels.ops._fsq_thresholds import level_values
from vidkernels.ops._register import PYTORCH_KEYS, define, implement
from vidkernels.ops.fsq import check_channels, check_levels
from vidkernels.ops.lfq import check_bits

ESTIMATORS = ("exact", "groups", "bits")
LOG_FLOOR_MODES = ("clamp", "add")
# Codes of one joint distribution: its table of sums has one float each.
MAX_JOINT_CODES = 2**31


def _codes_of_groups(counts: Sequence[int], group_size: int) -> list[int]:
    return [math.prod(counts[first : first + group_size]) for first in range(0, len(counts), group_size)]


def _sums_fake(
    x: Tensor,
    weight: Tensor | None,
    counts: Sequence[int],
    values: Sequence[float],
    group_size: int,
    inv_temperature: float,
    log_floor: float,
) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() == 3, lambda: "x: expected [tokens, codebooks, channels]")
    torch._check(x.shape[2] == len(counts), lambda: f"x: expected {len(counts)} channels")
    return x.new_empty(x.shape[1], sum(_codes_of_groups(counts, group_size))), x.new_empty(())


def _sums_bwd_fake(dsums: Tensor, dtotal: Tensor, sums: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    torch._check(dsums.shape == sums.shape, lambda: "dsums: expected the shape of sums")
    return torch.empty_like(x)


_ARGUMENTS = (
    "Tensor x, Tensor? weight, int[] counts, float[] values, int group_size, float inv_temperature, float log_floor"
)
define("entropy_sums", f"({_ARGUMENTS}) -> (Tensor, Tensor)", _sums_fake)
define("entropy_sums_bwd", f"(Tensor dsums, Tensor dtotal, Tensor sums, {_ARGUMENTS}) -> Tensor", _sums_bwd_fake)
for _key in PYTORCH_KEYS:
    implement("entropy_sums", "vidkernels.ops._entropy_sums:entropy_sums", _key)
    implement("entropy_sums_bwd", "vidkernels.ops._entropy_sums:entropy_sums_bwd", _key)


class _EntropySums(torch.autograd.Function):
    """The bare op with its backward; the arguments beyond x are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, static: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        sums, total = torch.ops.vidkernels.entropy_sums(x, weight, *static)
        ctx.save_for_backward(sums, x, weight)
        ctx.static = static
        return sums, total

    @staticmethod
    @first_order
    def backward(ctx: Any, dsums: Tensor, dtotal: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        sums, x, weight = ctx.saved_tensors
        return torch.ops.vidkernels.entropy_sums_bwd(dsums, dtotal, sums, x, weight, *ctx.static), None, None


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks of a group, forward and backward: the adjoint of a sum that every rank reads is the sum of
    what every rank sends back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _entropy_of(p: Tensor, log_floor: float, mode: str) -> Tensor:
    """-sum p log max(p, floor), or -sum p log(p + floor), over the last axis, averaged over the codebooks."""
    if log_floor == 0.0:
        # 0 log 0 = 0, with a finite slope that a zero probability then multiplies.
        log_floor, mode = torch.finfo(p.dtype).tiny, "clamp"
    return -(p * (p.clamp(min=log_floor) if mode == "clamp" else p + log_floor).log()).sum(-1).mean()


def _entropies(
    x: Tensor,
    weight: Tensor | None,
    counts: tuple[int, ...],
    values: tuple[float, ...],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(per-sample, batch) of x [N, codebooks, d] in float32 or float64."""
    size = {"exact": len(counts), "groups": min(options["group_size"], len(counts)), "bits": 1}[options["estimator"]]
    floor, mode = options["log_floor"], options["log_floor_mode"]
    static = (counts, values, size, options["inv_temperature"], floor if mode == "clamp" else 0.0)
    if weight is not None:  # a token that does not count must not hand on its NaN either
        x = torch.where(weight.view(-1, 1, 1) != 0, x, 0.0)
    if needs_grad(x):
        sums, total = _EntropySums.apply(x, weight, static)
    else:
        sums, total = torch.ops.vidkernels.entropy_sums(x, weight, *static)
    tokens = x.new_full((), float(x.shape[0])) if weight is None else weight.sum()
    group = options["process_group"]
    if group is not None:
        flat = _SumOverRanks.apply(torch.cat([tokens.view(1), total.view(1), sums.flatten()]), group)
        tokens, total, sums = flat[0], flat[1], flat[2:].view_as(sums)
    tokens = tokens.detach().clamp(min=1.0)
    parts = (sums / tokens).split(_codes_of_groups(counts, size), dim=-1)
    batch = torch.stack([_entropy_of(p, floor, mode) for p in parts]).sum()
    return total / (tokens * x.shape[1]), batch


def _check_options(
    inv_temperature: float, estimator: str, group_size: int, log_floor: float, log_floor_mode: str
) -> None:
    check_option("estimator", estimator, ESTIMATORS)
    check_option("log_floor_mode", log_floor_mode, LOG_FLOOR_MODES)
    check_positive("inv_temperature", inv_temperature)
    if not is_whole(group_size):
        raise OptionError("group_size", "an int of at least 1", repr(group_size))
    if not is_finite(log_floor) or not 0 <= log_floor < 1:
        raise OptionError("log_floor", "a number of at least 0 and below 1", repr(log_floor), "0 is the exact entropy.")


def _check_joint_size(counts: Sequence[int], estimator: str, group_size: int, floored: bool) -> None:
    size = {"exact": len(counts), "groups": group_size, "bits": 1}[estimator]
    largest = math.prod(counts) if floored else max(_codes_of_groups(counts, size))
    if largest > MAX_JOINT_CODES:
        remedy = 'Use estimator="groups", and log_floor=0 for the per-sample term.'
        raise OptionError("estimator", f"a joint distribution of at most {MAX_JOINT_CODES} codes", str(largest), remedy)


def _check_mask(name: str, x: Tensor, mask: Tensor | None, dim: int) -> None:
    if mask is None:
        return
    check_tensor("mask", mask)
    check_same_device("mask", mask, name, x)
    if mask.dtype.is_complex or mask.is_quantized:
        raise DTypeError("mask", "bool, integers or floats", mask.dtype, "Convert it: mask != 0.")
    tokens = [*x.shape[:dim], *x.shape[dim + 1 :]]
    if mask.ndim > len(tokens) or list(mask.shape) != tokens[: mask.ndim]:
        raise ShapeError("mask", f"leading axes of the tokens' shape {tuple(tokens)}", tuple(mask.shape))


def _rows(x: Tensor, dim: int, num_codebooks: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x as [N, codebooks, d] in float32 or float64, and the mask as [N] of zeros and ones in that dtype."""
    wide = x.movedim(dim, -1)
    tokens = wide.shape[:-1]
    wide = wide.reshape(math.prod(tokens), num_codebooks, x.shape[dim] // num_codebooks)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    if mask is None:
        return wide, None
    weight = mask.reshape([*mask.shape, *[1] * (len(tokens) - mask.ndim)]).expand(tokens)
    return wide, (weight != 0).to(wide.dtype).reshape(math.prod(tokens))


def _lfq_facts(
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
    process_group: Any = None,
    backend: str = "auto",
) -> tuple[Any, ...]:
    check_floating("x", x)
    check_positive("scale", scale)
    check_flag("spherical", spherical)
    dim, bits = check_bits("x", x, dim, num_codebooks)
    _check_options(inv_temperature, estimator, group_size, log_floor, log_floor_mode)
    _check_mask("x", x, mask, dim)
    _check_joint_size([2] * bits, estimator, group_size, log_floor > 0 and log_floor_mode == "clamp")
    return x, dim, bits


_BACKENDS = {"torch": dispatch.pytorch, "reference": dispatch.always}
LFQ_BACKENDS = dispatch.Dispatcher("lfq_entropy", facts=_lfq_facts, backends=_BACKENDS)


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
    process_group: Any = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The two entropies of LFQ's and BSQ's loss, in nats: the mean over tokens of H(p_n), and H of the mean of p_n.

    p_n(c) is proportional to exp(2 tau <x_n, c>) over all codes c in {-s, s}^bits. A training loss adds the first and
    subtracts the second.

    Args:
        x: `[..., C]`, or C at axis ``dim`` as in `[B, C, T, H, W]`, C = num_codebooks * bits: the raw input of the
            quantizer; float32, float64, bfloat16 or float16. Half precision is computed in float32.
        inv_temperature: tau. BSQ's own 1/temperature is twice it.
        scale, spherical: as in `lfq_quantize`; on the sphere both x and the codes are normalised.
        estimator: of the second term. ``"exact"``: over all 2^bits codes. ``"groups"``: sum of the entropies of
            consecutive groups of ``group_size`` bits. ``"bits"``: sum over single bits. The last two are upper bounds.
        mask: which tokens count, over the leading token axes (true or non-zero counts).
        log_floor: 0, or the floor that other implementations put under the logarithm: 1e-5 with mode ``"clamp"``
            reproduces vector-quantize-pytorch (log max(p, floor) in both terms, the first of which then visits every
            code of every token), with ``"add"`` Open-MAGVIT2 (log(p + floor) in the second term).
        process_group: ranks whose tokens count together. Values are equal on all ranks; gradients are scaled so that
            their average over the ranks, which DDP and FSDP take, is the gradient of one process with all tokens.

    Returns:
        Two scalars, float32 (float64 for float64 x), averaged over codebooks. No token at all gives 0.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: arXiv 2310.05737; the product form is worked out in docs/entropy.md.
    """
    _, axis, bits = _lfq_facts(
        x, inv_temperature=inv_temperature, scale=scale, spherical=spherical, dim=dim, num_codebooks=num_codebooks,
        estimator=estimator, group_size=group_size, mask=mask, log_floor=log_floor, log_floor_mode=log_floor_mode,
    )  # fmt: skip
    options = dict(
        inv_temperature=float(inv_temperature), estimator=estimator, group_size=group_size, log_floor=float(log_floor),
        log_floor_mode=log_floor_mode, process_group=process_group,
    )  # fmt: skip
    if LFQ_BACKENDS.select(backend, x, axis, bits) == "reference":
        return reference.lfq_entropy(
            x, scale=scale, spherical=spherical, dim=axis, num_codebooks=num_codebooks, mask=mask, **options
        )
    rows, weight = _rows(x, axis, num_codebooks, mask)
    magnitude = float(scale)
    if spherical:
        rows, magnitude = lfq_reference.sphere(rows, scale), scale / math.sqrt(bits)
    return _entropies(rows, weight, (2,) * bits, (-magnitude, magnitude) * bits, options)


def _fsq_facts(
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
    process_group: Any = None,
    backend: str = "auto",
) -> tuple[Any, ...]:
    check_floating("z", z)
    counts = check_levels(levels, bound)
    dim = check_channels("z", z, dim, len(counts), num_codebooks)
    _check_options(inv_temperature, estimator, group_size, log_floor, log_floor_mode)
    _check_mask("z", z, mask, dim)
    _check_joint_size(counts, estimator, group_size, log_floor > 0 and log_floor_mode == "clamp")
    return z, dim, counts


FSQ_BACKENDS = dispatch.Dispatcher("fsq_entropy", facts=_fsq_facts, backends=_BACKENDS)


@constant_while_tracing
def _fsq_values(counts: tuple[int, ...], bound: str) -> tuple[float, ...]:
    return tuple(value for count in counts for value in level_values(count, bound))


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
    process_group: Any = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The two entropies of the loss of VidTok's FSQ, in nats: the mean over tokens of H(p_n), and H of the mean of p_n.

    p_n(c) is proportional to exp(2 tau <z_n, c>) over all codes c of the level grid; z is the raw input, before the bound.
    These codes differ in norm, so <z, c> is not a distance up to a constant; VidTok's checkpoints were trained with it.

    Args:
        z: as x of `lfq_entropy` (`[..., C]`, the same dtypes), C = num_codebooks * len(levels).
        levels, bound: the grid, as in `fsq_quantize`.
        group_size: channels of a group.
        inv_temperature, estimator, mask, log_floor, log_floor_mode, process_group: as in `lfq_entropy`.

    Returns:
        Two scalars, as `lfq_entropy`.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: arXiv 2412.13061 (VidTok).
    """
    _, axis, counts = _fsq_facts(
        z, levels, bound=bound, inv_temperature=inv_temperature, dim=dim, num_codebooks=num_codebooks,
        estimator=estimator, group_size=group_size, mask=mask, log_floor=log_floor, log_floor_mode=log_floor_mode,
    )  # fmt: skip
    options = dict(
        inv_temperature=float(inv_temperature), estimator=estimator, group_size=group_size, log_floor=float(log_floor),
        log_floor_mode=log_floor_mode, process_group=process_group,
    )  # fmt: skip
    if FSQ_BACKENDS.select(backend, z, axis, counts) == "reference":
        return reference.fsq_entropy(
            z, counts, bound=bound, dim=axis, num_codebooks=num_codebooks, mask=mask, **options
        )
    rows, weight = _rows(z, axis, num_codebooks, mask)
    return _entropies(rows, weight, counts, _fsq_values(counts, bound), options)
