# SPDX-License-Identifier: Apache-2.0
"""The blended temporal downsampler, on the kernels of causal_conv3d."""

from __future__ import annotations

from typing import Any

import torch

from vidkernels import _env, _library, dispatch
from vidkernels._conv.geometry import NONE
from vidkernels._conv.upsample import long_chains
from vidkernels._conv.weights import blend_parts, with_smooth
from vidkernels._reference import upsample_conv3d as reference
from vidkernels.errors import ShapeError
from vidkernels.ops._autograd import needs_grad
from vidkernels.ops._blended_conv3d import blended_empty_result, check_mix_factor, wide_convolve
from vidkernels.ops._causal_conv3d_backends import bare_op
from vidkernels.ops._causal_conv3d_call import Call, autocast, check_tensors, dense, next_history, prepare
from vidkernels.ops._register import TRITON_KEYS, define_variant
from vidkernels.ops.causal_conv3d import BACKENDS, causal_conv3d


def _blended_weight_fake(weight: torch.Tensor, bias: torch.Tensor | None, mix_factor: torch.Tensor) -> torch.Tensor:
    return weight.new_empty(weight.numel() + (0 if bias is None else weight.shape[0]))


define_variant(
    "blended_weight",
    "triton",
    "(Tensor weight, Tensor? bias, Tensor mix_factor) -> Tensor",
    _blended_weight_fake,
    "vidkernels.triton._conv_phases:blended_weight",
    TRITON_KEYS,
)


def _weights_in_one_launch(x: torch.Tensor, *inputs: torch.Tensor | None) -> bool:
    """Whether a Triton kernel makes the weights, which takes torch 12 ops: on a GPU, without gradients."""
    if _library.triton_missing() is not None or x.dtype not in dispatch.FLOATING or needs_grad(x, *inputs):
        return False
    return x.device.type == "cuda" or _env.TRITON_INTERPRET


def _of_made_weight(call: Call, mix_factor: torch.Tensor, backend: str) -> torch.Tensor:
    """One convolution with the weight and bias that a kernel makes, in the layout that convolutions read."""
    channels, _, *kernel = call.weight.shape
    made = torch.ops.vidkernels.blended_weight_triton.default(call.weight, call.bias, mix_factor)
    weight = made[: call.weight.numel()].view(channels, *kernel, channels).permute(0, 4, 1, 2, 3)
    bias = None if call.bias is None else made[call.weight.numel() :]
    fwd = bare_op("causal_conv3d_fwd", backend)
    result: torch.Tensor = fwd(call.x, weight, bias, call.history, None, *call.geometry.args(), NONE)
    return result


def downsample_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    mix_factor: torch.Tensor,
    stride: int | tuple[int, int, int] = (2, 1, 1),
    time_padding: str = "zeros",
    history: torch.Tensor | None = None,
    pad_frames: int | tuple[int, int] | None = None,
    return_history: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`y = s(m) mean(x) + (1 - s(m)) conv(x)` as one convolution: the mean of kt frames goes into the weights.

    Args:
        x: [B, C, T, H, W].
        weight: [C, C, kt, kh, kw], kh and kw odd, dtype of x.
        bias: [C].
        mix_factor: one number m; s is the sigmoid.
        stride, time_padding, history, pad_frames, return_history: as in `causal_conv3d`. The padding frames take part
            in the mean, and count.
        backend: "auto", or one of `vidkernels.explain("causal_conv3d", x, weight)`.

    Returns:
        y as of `causal_conv3d`.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: VidTok's temporal AlphaBlender (arXiv 2412.13061).
    """
    x, weight, (bias, history) = autocast(x, weight, bias, history)
    check_tensors(x, weight, bias, history)
    check_mix_factor(mix_factor, x)
    bias = dense(bias)
    channels, filters, frames, height, width = weight.shape
    if channels != filters or height % 2 == 0 or width % 2 == 0:
        raise ShapeError("weight", "[C, C, kt, kh, kw] with odd kh and kw", tuple(weight.shape))
    options: dict[str, Any] = {
        "stride": stride, "time_padding": time_padding, "history": history, "pad_frames": pad_frames,
    }  # fmt: skip
    call = prepare(x, weight, bias, return_history=return_history, **options)
    chosen: Any = None if call.is_empty else BACKENDS.select(backend, *call.facts())
    y: Any
    if chosen == "reference":
        return reference.downsample_conv3d(
            x, weight, bias, mix_factor=mix_factor, return_history=return_history, **options
        )
    if chosen is None:
        y = blended_empty_result(x, weight, bias, mix_factor, call.size)
        return (y, next_history(call)) if return_history else y
    apart = chosen in ("torch", "triton") and long_chains(x)
    if not apart and _weights_in_one_launch(x, weight, bias, mix_factor, call.history):
        y = _of_made_weight(call, mix_factor, chosen)
        return (y, next_history(call)) if return_history else y
    weight, bias, smooth = blend_parts(weight, bias, mix_factor)
    if apart:  # 11 roundings of the result as one convolution, 3 as two
        mean = torch.eye(channels, dtype=smooth.dtype, device=x.device)[:, :, None, None, None] * (smooth / frames)
        mean = mean.expand(-1, -1, frames, 1, 1).to(x.dtype)
        y = causal_conv3d(x, weight, bias, backend=chosen, **options)
        y = causal_conv3d(x, mean, residual=y, backend=chosen, **options)
    else:
        weight = with_smooth(weight, smooth, [(t, height // 2, width // 2) for t in range(frames)])
        y = wide_convolve(x, weight, bias, call.history, call.geometry, chosen)
    return (y, next_history(call)) if return_history else y
