# SPDX-License-Identifier: Apache-2.0
"""Argument checks of `ops.qk_norm_rope`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from vidkernels._reference import qk_norm_rope as reference
from vidkernels.errors import DTypeError, OptionError, ShapeError
from vidkernels.ops import _checks

NORMS = (None, "head", "full")
LAYOUTS = ("interleaved", "half", "axis_half")
POSITION_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)


def _per_axis(name: str, value: float | Sequence[float], count: int) -> list[float]:
    values = (value,) * count if isinstance(value, (int, float)) else value
    if (
        not isinstance(values, (tuple, list, Sequence))
        or len(values) != count
        or not all(map(_checks.is_finite, values))
    ):
        raise OptionError(
            name, f"one number or {count}, one per axis", repr(value), "Give one finite number per position axis."
        )
    return [float(v) for v in values]


def _check_frequencies(frequencies: Tensor, q: Tensor, k: Tensor | None, layout: str) -> None:
    _checks.check_floating("frequencies", frequencies)
    _checks.check_same_device("frequencies", frequencies, "q", q)
    _checks.check_ndim("frequencies", frequencies, 2, 3)
    if layout == "axis_half":
        raise OptionError(
            "layout", "'interleaved' or 'half' with a frequency table", repr(layout), "Give axes= instead."
        )
    if frequencies.ndim == 3:
        for name, x in (("q", q), ("k", k)):
            if x is not None and frequencies.shape[1] != x.shape[-2]:
                raise ShapeError(
                    "frequencies",
                    f"one table per head of {name}, [A, {x.shape[-2]}, P]",
                    tuple(frequencies.shape),
                    "Share one table: [A, P].",
                )


def _check_positions(positions: Tensor, q: Tensor) -> None:
    _checks.check_tensor("positions", positions)
    if positions.dtype not in POSITION_DTYPES:
        raise DTypeError(
            "positions",
            "int32, int64, float32 or float64",
            positions.dtype,
            "Narrower types cannot hold positions above 256.",
        )
    _checks.check_same_device("positions", positions, "q", q)
    leading, size = q.shape[:-2], positions.shape
    fits = len(size) >= 2 and (size[:-1] == leading or size[:-1] == leading[-1:])
    if not fits or not 1 <= size[-1] <= 3:
        raise ShapeError(
            "positions",
            f"{[*leading[-1:], 'A']} or {[*leading, 'A']} with A = 1 to 3",
            tuple(positions.shape),
            "One row (t, h, w) per token.",
        )


def _is(value: object, default: float) -> bool:
    return isinstance(value, (int, float)) and value == default


def _are_pairs(axes: object, count: int) -> bool:
    if not isinstance(axes, (tuple, list, Sequence)) or len(axes) != count:
        return False
    for dims in axes:  # a generator in all() takes twice as long
        if not isinstance(dims, int) or isinstance(dims, bool) or dims < 0 or dims % 2:
            return False
    return True


def check_rotation(
    q: Tensor,
    k: Tensor | None,
    positions: Tensor | None,
    axes: Sequence[int] | None,
    theta: float | Sequence[float],
    position_scale: float | Sequence[float],
    frequencies: Tensor | None,
    layout: str,
) -> tuple[list[int], list[float], list[float]]:
    """Axes, theta and scale as the bare ops take them; without positions there is no rotation."""
    if positions is None:
        return [], [], []
    _check_positions(positions, q)
    count, head_dim = positions.shape[-1], q.shape[-1]
    if frequencies is not None:
        if axes is not None or not (_is(theta, 10000.0) and _is(position_scale, 1.0)):
            raise OptionError(
                "frequencies",
                "no axes, theta or position_scale beside it",
                (axes, theta, position_scale),
                "Give one or the other.",
            )
        _check_frequencies(frequencies, q, k, layout)
        _checks.check_size("frequencies", frequencies, 0, count)
        axes, thetas, scales = (2 * frequencies.shape[-1],), [1.0], [1.0]
    else:
        axes = reference.default_axes(index(head_dim), index(count)) if axes is None else axes  # constants of a graph
        if not _are_pairs(axes, count):
            expected = f"{count} even numbers, one per position axis"
            raise OptionError("axes", expected, repr(axes), "They are rotated dimensions, two a pair.")
        thetas, scales = _per_axis("theta", theta, count), _per_axis("position_scale", position_scale, count)
        if min(thetas) <= 0:
            raise OptionError("theta", "positive numbers", theta, "It is the base of the frequencies.")
    if sum(axes) > head_dim:
        raise OptionError("axes", f"at most {head_dim} rotated dimensions (the head's)", sum(axes), "Rotate fewer.")
    return list(axes), thetas, scales


def _check_weight(name: str, weight: Tensor | None, x_name: str, x: Tensor | None, norm: str | None) -> None:
    if weight is None:
        return
    if x is None:
        raise OptionError(name, "None without k", "a tensor", "Pass k as well.")
    if norm is None:
        raise OptionError(name, "None with norm=None", "a tensor", "Choose norm='head' or 'full'.")
    _checks.check_floating(name, weight)
    _checks.check_same_device(name, weight, x_name, x)
    sizes = x.shape
    size = sizes[-1] if norm == "head" else sizes[-1] * sizes[-2]
    _checks.check_shape(name, weight, (size,), "[D] for norm='head', [H * D] for norm='full'")


def check_arguments(
    q: Tensor, k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, norm: str | None, layout: str
) -> None:
    _checks.check_floating("q", q)
    _checks.check_ndim("q", q, 3, 4)
    _checks.check_option("norm", norm, NORMS)
    _checks.check_option("layout", layout, LAYOUTS)
    if q.shape[-1] < 1:
        raise ShapeError("q", "a head dimension of at least 1", tuple(q.shape), "The last axis is the head's.")
    if k is not None:
        _checks.check_floating("k", k)
        _checks.check_same_dtype("k", k, "q", q)
        _checks.check_same_device("k", k, "q", q)
        _checks.check_ndim("k", k, q.ndim)
        sizes, others = q.shape, k.shape
        if others != sizes and (others[:-2] != sizes[:-2] or others[-1] != sizes[-1]):
            raise ShapeError(
                "k",
                f"{[*q.shape[:-2], 'H', q.shape[-1]]}, q's tokens and head dimension",
                tuple(k.shape),
                "Call once per side.",
            )
    _check_weight("q_weight", q_weight, "q", q, norm)
    _check_weight("k_weight", k_weight, "k", k, norm)
