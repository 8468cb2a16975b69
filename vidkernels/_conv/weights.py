# SPDX-License-Identifier: Apache-2.0
"""Linear maps on a kernel's taps: summed taps where several fall on one element, and a blend folded in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vidkernels._conv.plan import Taps

_AXES = (2, 3, 4)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Taps are summed, and gradients of weights kept, in float32 (float64 for float64)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _identity(size: int) -> list[list[float]]:
    return [[float(i == j) for j in range(size)] for i in range(size)]


def _mixed(weight: torch.Tensor, axis: int, rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """Slices `sum_j rows[i][j] * weight[j]` along an axis. A matrix product with an inner size of 3 is 10 times slower."""
    if [list(row) for row in rows] == _identity(weight.shape[axis]):
        return weight
    mixed = weight.new_zeros([len(rows) if a == axis else n for a, n in enumerate(weight.shape)])
    for i, row in enumerate(rows):
        for j, factor in enumerate(row):
            if factor:
                mixed.select(axis, i).add_(weight.select(axis, j), alpha=factor)
    return mixed


def collapse(weight: torch.Tensor, taps: Sequence[Taps | None]) -> torch.Tensor:
    """[K, C, kt, kh, kw] -> [K, C, positions...]: weight of each position read; None leaves an axis as it is."""
    for axis, rows in zip(_AXES, taps, strict=True):
        if rows is not None:
            weight = _mixed(weight, axis, rows)
    return weight


def expand(dweight: torch.Tensor, taps: Sequence[Taps | None]) -> torch.Tensor:
    """Transpose of `collapse`."""
    for axis, rows in zip(_AXES, taps, strict=True):
        if rows is not None:
            dweight = _mixed(dweight, axis, list(zip(*rows, strict=True)))
    return dweight


def _numbers(rows: Taps | None, size: int) -> list[float]:
    """Rows of an axis one after the other; none where they leave it as it is."""
    if rows is None or [list(row) for row in rows] == _identity(size):
        return []
    return [number for row in rows for number in row]


def collapse_cpp(
    weight: torch.Tensor,
    taps: Sequence[Taps | None],
    mix_factor: torch.Tensor | None,
    smooth_at: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """`collapse` of the weight that `summands` returns, rounded to `dtype`, in one pass of a kernel in C++.

    Args:
        smooth_at: tap (t, h, w) where the smooth part of a blend is added; empty: nowhere.

    Returns:
        [K, C, positions...], filters next to each other in memory, as convolutions arrange weights soonest; the weight
        itself where nothing changes.
    """
    rows = [_numbers(r, size) for r, size in zip(taps, weight.shape[2:], strict=True)]
    made = [size if r is None else len(r) for r, size in zip(taps, weight.shape[2:], strict=True)]
    if not any(rows) and made == [*weight.shape[2:]] and mix_factor is None and dtype == weight.dtype:
        return weight
    out = weight.new_empty([*made, weight.shape[1], weight.shape[0]], dtype=dtype).permute(4, 3, 0, 1, 2)
    if out.numel():
        torch.ops.vidkernels.sum_taps_out.default(out, weight, mix_factor, *rows, smooth_at)
    return out


def with_smooth(weight: torch.Tensor, smooth: torch.Tensor, taps: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """A copy of weight [C, C, kt, kh, kw] with `smooth` times the mean of x at those taps (t, h, w) added."""
    folded = weight.clone()
    for t, h, w in taps:
        folded[:, :, t, h, w].diagonal().add_(smooth / len(taps))
    return folded


def smooth_tap(padding: Sequence[int] | None) -> list[int]:
    """The tap (t, h, w) that reads the upsampled pixel of the result, by the paddings (front, back, top, ...)."""
    return [] if padding is None else [padding[0], padding[2], padding[4]]


def shares(mix_factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """s(m) and 1 - s(m), without cancellation, in float64."""
    exact = mix_factor.to(torch.float64).reshape(())
    return torch.sigmoid(exact), torch.sigmoid(-exact)


def wide_parts(
    weight: torch.Tensor, bias: torch.Tensor | None, mix_factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """What `blend_parts` returns, unknown to autograd."""
    smooth, rest = shares(mix_factor)
    dtype = wide_dtype(weight.dtype)
    return weight.to(dtype) * rest, None if bias is None else bias.to(dtype) * rest, smooth


def scaled_bias(bias: torch.Tensor | None, mix_factor: torch.Tensor | None) -> torch.Tensor | None:
    """The bias; of a blend in float32 (float64 for float64), with its share."""
    if bias is None or mix_factor is None:
        return bias
    return bias.to(wide_dtype(bias.dtype)) * shares(mix_factor)[1]


def summands(
    weight: torch.Tensor, bias: torch.Tensor | None, mix_factor: torch.Tensor | None, padding: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight in float32 (float64 for float64), as its taps are summed, and bias.

    Of a blend both are scaled; `padding` (front, back, top, ...) says at which tap the smooth part is added, None: nowhere.
    """
    if mix_factor is None:
        return weight.to(wide_dtype(weight.dtype)), bias
    wide, wide_bias, smooth = wide_parts(weight, bias, mix_factor)
    if padding is not None:
        wide = with_smooth(wide, smooth, [(padding[0], padding[2], padding[4])])
    return wide, wide_bias


def blend_gradients(
    dweight: torch.Tensor,
    dbias: torch.Tensor | None,
    dsmooth: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mix_factor: torch.Tensor,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of weight, bias and mix factor, as `needs` asks for, from those of the parts of a blend."""
    smooth, rest = shares(mix_factor)
    slope = None
    if needs[2] and dsmooth is not None:  # terms cancel: a sum in float32 would lose what the promise allows
        slope = dsmooth - (dweight.double() * weight).sum()
        if bias is not None and dbias is not None:
            slope = slope - (dbias.double() * bias).sum()
        slope = (slope * smooth * rest).to(mix_factor.dtype).reshape(mix_factor.shape)
    return (
        (dweight * rest).to(weight.dtype) if needs[0] else None,
        (dbias * rest).to(bias.dtype) if needs[1] and bias is not None and dbias is not None else None,
        slope,
    )


class _BlendParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, mix_factor):
        ctx.save_for_backward(weight, bias, mix_factor)
        return wide_parts(weight, bias, mix_factor)

    @staticmethod
    def backward(ctx, dweight, dbias, dsmooth):
        weight, bias, mix_factor = ctx.saved_tensors
        return blend_gradients(dweight, dbias, dsmooth, weight, bias, mix_factor, ctx.needs_input_grad)


def blend_parts(
    weight: torch.Tensor, bias: torch.Tensor | None, mix_factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(1 - s(m)) weight, (1 - s(m)) bias and s(m), for `s(m) * smooth(x) + (1 - s(m)) * conv(x)`, differentiable in all.

    Args:
        weight: [C, C, kt, kh, kw].
        bias: [C].
        mix_factor: one number m; s is the sigmoid.

    Returns:
        weight and bias in float32 (float64 for float64), so that taps are summed and gradients of weights kept before
        anything is rounded; s(m) in float64.
    """
    parts: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] = _BlendParts.apply(weight, bias, mix_factor)
    return parts
