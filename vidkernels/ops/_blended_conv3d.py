# SPDX-License-Identifier: Apache-2.0
"""Autograd of upsampling convolutions and of blends, whose weights are wider than the activations.

A blend's weight is scaled in float32 or wider, and its gradient is summed once more, into that of the mix factor. Through
a gradient in bfloat16 that sum was off by 4 roundings, and outside of the promise at every third seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vidkernels._conv.geometry import NONE, Geometry, is_channels_last
from vidkernels._conv.weights import blend_gradients, wide_dtype
from vidkernels.errors import ShapeError
from vidkernels.ops import _checks
from vidkernels.ops._autograd import check_single, first_order, laid_out, needs_grad
from vidkernels.ops._causal_conv3d_backends import bare_op
from vidkernels.ops._causal_conv3d_call import empty_result


def check_mix_factor(mix_factor: torch.Tensor, x: torch.Tensor) -> None:
    """A blend's factor is one floating number beside x."""
    _checks.check_floating("mix_factor", mix_factor)
    _checks.check_same_device("mix_factor", mix_factor, "x", x)
    if mix_factor.numel() != 1:
        raise ShapeError("mix_factor", "one number", tuple(mix_factor.shape))


def blended_empty_result(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mix_factor: torch.Tensor | None,
    size: Sequence[int],
) -> torch.Tensor:
    """`empty_result` of a blend, which scales the bias; by torch's own ops, since no backend has been asked whether a transform
    of torch.func or forward mode is active."""
    if mix_factor is not None:
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        bias = (bias.double() * (1 - mix_factor.reshape(()).double().sigmoid())).to(x.dtype)
    return empty_result(x, weight, bias, size)


def upsample_op(name: str, backend: str) -> Any:
    """The bare op `vidkernels::upsample_conv3d_{name}` of a backend."""
    return getattr(torch.ops.vidkernels, f"upsample_conv3d_{name}_{backend}").default


class _UpsampleConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, history, mix_factor, rule: tuple[Any, ...], backend: str):
        ctx.save_for_backward(x, weight, bias, history, mix_factor)
        ctx.rule, ctx.backend = rule, backend
        return upsample_op("fwd", backend)(x, weight, bias, history, mix_factor, *rule)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        x, weight, bias, history, mix_factor = ctx.saved_tensors
        need_x, need_weight, need_bias, need_history, need_mix = ctx.needs_input_grad[:5]
        grad, blended = laid_out(grad, is_channels_last(x)), mix_factor is not None
        dx = dweight = dbias = dhistory = dmix = None
        if need_x or need_history:
            frames = 0 if history is None else history.shape[2]
            dx, dhistory = upsample_op("dgrad", ctx.backend)(grad, weight, mix_factor, list(x.shape), frames, *ctx.rule)
        if need_weight or need_mix:
            dweight = upsample_op("wgrad", ctx.backend)(grad, x, history, list(weight.shape[2:]), *ctx.rule)
        if bias is not None and (need_bias or need_mix):
            dbias = grad.sum((0, 2, 3, 4), dtype=wide_dtype(bias.dtype) if blended else bias.dtype)
        if blended:
            dweight, dbias, dmix = _of_blend(ctx, dweight, dbias, weight, bias, mix_factor)
        elif dweight is not None:
            dweight = dweight.to(weight.dtype)
        return dx, dweight, dbias, dhistory if need_history else None, dmix, None, None


def _of_blend(ctx, dweight, dbias, weight, bias, mix_factor):
    """Gradients of weight, bias and mix factor from those of the scaled weight and bias."""
    _, need_weight, need_bias, _, need_mix = ctx.needs_input_grad[:5]
    dsmooth = None
    if need_mix:
        front, _, top, _, left, _ = ctx.rule[7]
        dsmooth = dweight[:, :, front, top, left].diagonal().sum(dtype=torch.float64)
    needs = need_weight, need_bias, need_mix
    return blend_gradients(dweight, dbias, dsmooth, weight, bias, mix_factor, needs)


def upsample_convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    mix_factor: torch.Tensor | None,
    rule: tuple[Any, ...],
    backend: str,
) -> torch.Tensor:
    """`conv(upsample(x))` of checked tensors, or its blend with `upsample(x)`; differentiable where a gradient is asked for.

    Args:
        weight, bias: in the dtype of x.
        mix_factor: one number; None without a blend.
        rule: trailing arguments of the bare ops.
    """
    inputs = x, weight, bias, history, mix_factor
    return (
        _UpsampleConv3d.apply(*inputs, rule, backend)
        if needs_grad(*inputs)
        else upsample_op("fwd", backend)(*inputs, *rule)
    )


class _WideConv3d(torch.autograd.Function):
    """A causal convolution of bfloat16 or float16 whose weight, bias and their gradients are float32."""

    @staticmethod
    def forward(ctx, x, weight, bias, history, geometry: Geometry, backend: str):
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(x, weight, narrow, history)
        ctx.geometry, ctx.backend = geometry, backend
        bias = None if bias is None else bias.to(x.dtype)
        return bare_op("causal_conv3d_fwd", backend)(x, narrow, bias, history, None, *geometry.args(), NONE)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        x, weight, narrow, history = ctx.saved_tensors
        need_x, need_weight, need_bias, need_history = ctx.needs_input_grad[:4]
        check_single(grad, "downsample_conv3d")
        grad, geometry = laid_out(grad, is_channels_last(x)), ctx.geometry.flat()
        bwd = bare_op("causal_conv3d_bwd", ctx.backend)
        dx = dweight = dbias = dhistory = None
        if need_x or need_history:
            found = iter(bwd(grad, x, narrow, history, geometry, [need_x, need_history, False, False]))
            dx, dhistory = (next(found) if need else None for need in (need_x, need_history))
        if need_weight:  # in the dtype of the weight that is passed; torch's own call takes and returns that of x
            passed = narrow if ctx.backend == "torch" else weight
            dweight = bwd(grad, x, passed, history, geometry, [False, False, True, False])[0].to(weight.dtype)
        if need_bias:
            dbias = grad.sum((0, 2, 3, 4), dtype=weight.dtype)
        return dx, dweight, dbias, dhistory, None, None


def wide_convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    geometry: Geometry,
    backend: str,
) -> torch.Tensor:
    """The causal convolution of checked tensors; weight, bias and their gradients may be wider than x."""
    result: torch.Tensor = _WideConv3d.apply(x, weight, bias, history, geometry, backend)
    return result
