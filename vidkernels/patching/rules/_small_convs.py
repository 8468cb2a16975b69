# SPDX-License-Identifier: Apache-2.0
"""Convolutions over so few positions that their time goes to reading weights: computed as upstream computes them.

On a CPU our kernels arrange the weights anew in every call, which the positions have to pay for. Here a padded copy is small
beside the weights, and torch's convolution takes them as they lie. In bfloat16 by AMX's tiles, our kernels need 0.17 to 0.53 of
upstream's time there (256 to 1024 channels, 8 to 128 positions), and serve them all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels._conv.aten import native_on_cpu
from vidkernels._conv.cpp import multiplies_tiles
from vidkernels._conv.geometry import REPLICATE, is_channels_last
from vidkernels.ops._causal_conv3d_call import Call, prepare

# Measured on one core against `ops.causal_conv3d`, kernels of one to 27 taps and up to 512 channels. Inside these bounds the
# padded copy takes 0.25 to 0.8 of the time in float32, beyond them 1.1 to 4; in bfloat16 0.7 to 1.1 at 80 positions and 0.93 to 1.9
# from 128 on. Models in bfloat16 against upstream, with 96 and with 1280 positions as bound: Cosmos's decoder at 9x64x64 0.99 and
# 0.92, EasyAnimate's encoder at 5x64x64 1.11 and 1.06, LTX's at 9x64x64 1.02 and 0.99.
_FEW = 48  # positions: the weights of any kernel are more numbers than its input
# In float32 on a Xeon with two AVX-512 multipliers a core, 512 channels: the padded copy takes 0.58 of the time for 1x3x3 at 64
# positions, and 0.57 to 0.89 for 1x3x3, 3x1x1 and 3x3x3 at 108 to 128; these stay with ours, since other processors pay less for
# weights.
_WIDE, _FEW_OF_WIDE = 512, 80
# One frame under three taps there, ours over the padded copy's time: 1.2 to 2.2 at 16 positions, 0.66 to 1.15 at 36, 0.2 to 0.4 at 1024.
_FEW_OF_ONE = 24
_CHANNELS = {torch.float32: 256, torch.bfloat16: 128}
_POSITIONS = {torch.float32: 320, torch.bfloat16: 96}
# In float32 our tiles pay from 16 pixels a frame on, for kernels of more weights than this from 100 on.
_MANY_WEIGHTS, _TILED_PIXELS = 1 << 22, 100
# Positions of a tensor in front of a nearest doubling and a 3x3 convolution, bfloat16 by tiles, two threads: with a doubled copy 1.1
# instead of 15 ms (512 channels, 64 positions), 8.6 instead of 23 (1024), 0.8 instead of 4.5 (256 channels, 256) and 2.0 instead of
# 3.7 (128, 1024), since summing the taps of four phases takes 2 to 15 ms whatever the positions; as long from 2048 on.
_DOUBLED = 1024


def reads_mostly_weights(x: Tensor, weight: Tensor, history: Tensor | None = None, repeats: bool = False) -> bool:
    """Whether upstream's way is the faster one for x [B, C, T, H, W] and a kernel [K, C, kt, kh, kw].

    Args:
        history: frames before x.
        repeats: frames beyond the ends are repeated ones, not zeros.
    """
    dtype = x.dtype
    if x.device.type != "cpu" or dtype not in _CHANNELS or weight.dtype != dtype or torch.is_autocast_enabled("cpu"):
        return False
    if min(weight.shape[:2]) < _CHANNELS[dtype] or not native_on_cpu(dtype) or multiplies_tiles(dtype):
        return False
    pixels = x.shape[3] * x.shape[4]
    positions = x.shape[0] * x.shape[2] * pixels
    # Our kernels leave out taps on frames of zeros, and do not arrange their weights: most of them where a clip has one frame.
    frames = x.shape[2] + (0 if history is None else history.shape[2])
    if frames <= weight.shape[2] // 2 and not repeats:
        return positions <= (_FEW_OF_ONE if dtype == torch.float32 else _FEW)
    wide = dtype == torch.float32 and min(weight.shape[:2]) >= _WIDE
    if positions <= (_FEW_OF_WIDE if wide else _FEW):
        return True
    limit = _POSITIONS[dtype] * (2 if repeats and dtype == torch.bfloat16 else 1)
    if positions > limit:
        return False
    return dtype == torch.bfloat16 or (weight.numel() >= _MANY_WEIGHTS and pixels < _TILED_PIXELS)


def doubles_by_copy(x: Tensor, weight: Tensor) -> bool:
    """Whether doubling height and width of x [B, C, T, H, W] by a copy is faster than convolutions with summed taps."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or weight.dtype != x.dtype or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not multiplies_tiles(x.dtype):
        return False
    return x.numel() <= _DOUBLED * x.shape[1]


def doubled_copy(x: Tensor) -> Tensor:
    """[B, C, T, H, W] in channels-last memory with every pixel four times, [B, C, T, 2 H, 2 W]."""
    batch, channels, frames, height, width = x.shape
    rows = x.permute(0, 2, 3, 4, 1)[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1)
    return rows.reshape(batch, frames, 2 * height, 2 * width, channels).permute(0, 4, 1, 2, 3)


def convolve_padded(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """`ops.causal_conv3d` with a padded copy of x and torch's convolution of contiguous tensors; the format of x is kept."""
    call = prepare(x, weight, bias, **options)
    if call.is_empty:
        return call.empty_result()
    geometry, (padded, sides) = call.geometry, _padded(call)
    y = F.conv3d(padded, weight, bias, geometry.stride, sides, geometry.dilation)
    return y.contiguous(memory_format=torch.channels_last_3d) if is_channels_last(x) else y


def _padded(call: Call) -> tuple[Tensor, tuple[int, int, int]]:
    """A contiguous clip with the padding that differs between two sides, and what torch's convolution adds to both."""
    geometry, x = call.geometry, call.x.contiguous()
    front, back, top, bottom, left, right = geometry.padding
    past = x[:, :, :0] if call.history is None else call.history
    missing = front - past.shape[2]
    if geometry.time_mode == REPLICATE:
        oldest, last = (past if past.shape[2] else x)[:, :, :1], x[:, :, -1:]
        x = torch.cat([oldest.expand(-1, -1, missing, -1, -1), past, x, last.expand(-1, -1, back, -1, -1)], 2)
    else:
        x = x if call.history is None else torch.cat([past, x], 2)
        if missing != back:
            x = F.pad(x, (0, 0, 0, 0, missing, back))
    both = missing if geometry.time_mode != REPLICATE and missing == back else 0
    if geometry.space_mode == REPLICATE and any(geometry.padding[2:]):
        return F.pad(x, (left, right, top, bottom, 0, 0), mode="replicate").contiguous(), (both, 0, 0)
    if (top, left) != (bottom, right):
        return F.pad(x, (left, right, top, bottom)).contiguous(), (both, 0, 0)
    return x.contiguous(), (both, top, left)
