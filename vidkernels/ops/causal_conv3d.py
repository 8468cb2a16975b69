# SPDX-License-Identifier: Apache-2.0
"""Causal 3D convolution without a padded copy of its input: bare ops, fakes, autograd, dispatch, public function.

Bare ops, one triple per backend (suffix none: C++ on the CPU; `_triton`, `_cudnn`, `_torch`):

    causal_conv3d_fwd    y = residual + act(conv(x, weight) + bias)          [B, K, To, Ho, Wo], dtype and format of x
    causal_conv3d_dgrad  (dx, dhistory) from the gradient of the conv's sum  dhistory is [B, C, 0, H, W] without history
    causal_conv3d_wgrad  dweight, in float32 (float64 for float64)           [K, C, kt, kh, kw]

`padding` = (front, back, top, bottom, left, right); what lies at padded coordinates is said in `_conv_geometry`.
`activation`: 0 none, 1 SiLU. The caller has checked everything, nothing is empty, and the kernel fits at least once.
A forward launcher takes one more keyword, `out=`: a strided view (stride 1 along the channels) that receives the
result; `ops.upsample_conv3d` uses it to let every phase write its own frames, rows and columns.
"""

from __future__ import annotations

import torch

from vidkernels._conv_geometry import is_channels_last, output_size
from vidkernels.ops._register import define

_GEOMETRY = "int[] stride, int[] dilation, int[] padding, int time_mode, int space_mode"
_FWD = f"(Tensor x, Tensor weight, Tensor? bias, Tensor? history, Tensor? residual, {_GEOMETRY}, int activation) -> Tensor"
_DGRAD = f"(Tensor grad, Tensor weight, SymInt[] input_size, SymInt history_frames, {_GEOMETRY}) -> (Tensor, Tensor)"
_WGRAD = f"(Tensor grad, Tensor x, Tensor? history, int[] kernel, {_GEOMETRY}) -> Tensor"


def _fwd_fake(x, weight, bias, history, residual, stride, dilation, padding, time_mode, space_mode, activation):
    torch._check(x.shape[1] == weight.shape[1], lambda: "causal_conv3d_fwd: x and weight differ in input channels")
    size = output_size(x.shape[2:], weight.shape[2:], stride, dilation, padding)
    memory_format = torch.channels_last_3d if is_channels_last(x) else torch.contiguous_format
    return torch.empty(
        [x.shape[0], weight.shape[0], *size], dtype=x.dtype, device=x.device, memory_format=memory_format
    )


def _dgrad_fake(grad, weight, input_size, history_frames, stride, dilation, padding, time_mode, space_mode):
    torch._check(grad.shape[1] == weight.shape[0], lambda: "causal_conv3d_dgrad: grad and weight differ in channels")
    memory_format = torch.channels_last_3d if is_channels_last(grad) else torch.contiguous_format
    batch, channels, _, height, width = input_size
    dx = torch.empty(input_size, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    size = [batch, channels, history_frames, height, width]
    return dx, torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format)


def _wgrad_fake(grad, x, history, kernel, stride, dilation, padding, time_mode, space_mode):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty([grad.shape[1], x.shape[1], *kernel], dtype=dtype, device=x.device)


define("causal_conv3d_fwd", _FWD, _fwd_fake, triton="vidkernels.triton.causal_conv3d:causal_conv3d_fwd")
define("causal_conv3d_dgrad", _DGRAD, _dgrad_fake, triton="vidkernels.triton.causal_conv3d:causal_conv3d_dgrad")
define("causal_conv3d_wgrad", _WGRAD, _wgrad_fake, triton="vidkernels.triton.causal_conv3d:causal_conv3d_wgrad")
