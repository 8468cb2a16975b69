# SPDX-License-Identifier: Apache-2.0
"""The units of VidTok's encoders and decoders, fused, on one layout: [B, C, T, H, W] in channels-last memory.

The computations serve diffusers' modules and the official ones (`_official_vidtok_units`), the guards here diffusers'.
Frames, pixels and volumes are the same memory there, so 2-D, 1-D and 3-D blocks follow each other without the
rearrangements of the original. A unit whose modules were changed after patching (LoRA, hooks, shards) is called as it
is, on tensors arranged as it expects; the units around it stay fused.

Without gradients the residual stream is updated in place and temporaries are a few megabytes (`nn._residual`, which this
package's own VidTok goes through as well).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.nn._residual import in_pieces, is_traced
from vidkernels.patching._guard import child_reason, is_autocast, note_fallback, parameter_of
from vidkernels.patching.rules._vidtok_convs import (
    Call,
    channels_last,
    conv_options,
    conv_reason,
    convolve,
    kernel_of,
    past_end,
    volume,
)

Unit = tuple[
    Callable[[Any, Tensor, Call], Tensor], Callable[[Call, Any], "str | None"], Callable[..., Tensor], tuple[Any, ...]
]
# Elements of an upsampled piece: 2 frames of 256 channels and 256 x 256 pixels, whose convolutions take an H200 0.1 ms or more by its
# rates. 16 MiB of float32 on a CPU. Pieces of more than a quarter of the clip save nothing: the result lies beside them.
_RAISED_CPU, _RAISED_GPU = 1 << 22, 1 << 25


def normed(norm: Any, x: Tensor, call: Call, activation: str | None = "silu") -> Tensor:
    """LayerNorm over channels, with SiLU, in one pass."""
    inner = norm._modules["norm"]
    weight, bias = parameter_of(inner, "weight"), parameter_of(inner, "bias")
    result: Tensor = ops.channel_norm(x, weight, bias, eps=inner.eps, activation=activation, backend=call.norms)
    return result


def norm_reason(call: Call, norm: Any) -> str | None:
    """Why a norm has to be called."""
    return child_reason(norm, call.home.VidTokLayerNorm) or child_reason(norm._modules["norm"], nn.LayerNorm)


def block_reason(call: Call, block: Any) -> str | None:
    """Why a residual block has to be called."""
    parts = block._modules
    reason = child_reason(block, call.home.VidTokResnetBlock)
    reason = reason or norm_reason(call, parts["norm1"]) or conv_reason(call, parts["conv1"])
    reason = reason or norm_reason(call, parts["norm2"]) or conv_reason(call, parts["conv2"])
    reason = reason or child_reason(parts["nonlinearity"], nn.SiLU) or child_reason(parts["dropout"], nn.Dropout)
    if reason is None and block.in_channels != block.out_channels:
        if block.use_conv_shortcut:
            return "a block has a 3x3 shortcut"
        reason = conv_reason(call, parts["nin_shortcut"])
    return reason


def _branch(block: Any, x: Tensor, call: Call, residual: Tensor | None, out: Tensor | None = None) -> Tensor:
    parts = block._modules
    h = convolve(parts["conv1"], normed(parts["norm1"], x, call), call)
    h = normed(parts["norm2"], h, call)
    if block.training and block.dropout.p > 0:
        h = F.dropout(h, block.dropout.p)
    return convolve(parts["conv2"], h, call, residual, out)


def _frames(block: Any, x: Tensor, call: Call, out: Tensor | None) -> Tensor:
    shortcut = block._modules.get("nin_shortcut")
    return _branch(block, x, call, x if shortcut is None else convolve(shortcut, x, call, out=out), out)


def frame_block(block: Any, x: Tensor, call: Call) -> Tensor:
    """2-D residual block: every frame by itself."""
    if not call.inplace:
        return _frames(block, x, call, None)
    return in_pieces(lambda x, out: _frames(block, x, call, out), x, 2, block.out_channels, inplace=True)


def time_block(block: Any, x: Tensor, call: Call) -> Tensor:
    """1-D residual block: every pixel by itself, so rows can go one after the other."""
    if not call.inplace or call.keep:
        return _branch(block, x, call, x)
    return in_pieces(lambda x, out: _branch(block, x, call, x, out), x, 3, x.shape[1], inplace=True)


def volume_block(block: Any, x: Tensor, call: Call) -> Tensor:
    """3-D residual block, in the middle where tensors are small."""
    return _branch(block, x, call, x)


def attention_reason(call: Call, block: Any) -> str | None:
    """Why the attention block has to be called."""
    reason = child_reason(block, call.home.VidTokAttnBlock) or norm_reason(call, block.norm)
    for name in ("q", "k", "v", "proj_out"):
        reason = reason or conv_reason(call, getattr(block, name))
    return reason


def attention(block: Any, x: Tensor, call: Call) -> Tensor:
    """Self-attention over the positions of each frame, one head as wide as the channels, plus the input."""
    batch, channels, frames, height, width = x.shape
    h = normed(block.norm, x, call, None)
    q, k, v = (
        convolve(conv, h, call).permute(0, 2, 3, 4, 1).reshape(batch * frames, 1, height * width, channels)
        for conv in (block.q, block.k, block.v)
    )  # [B*T, 1, H*W, C]
    mixed = F.scaled_dot_product_attention(q, k, v)
    mixed = mixed.reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
    return convolve(block.proj_out, mixed, call, x)


def sampler_reason(call: Call, sampler: Any) -> str | None:
    """Why an up- or down-sampler has to be called."""
    home = call.home
    known = home.VidTokDownsample2D, home.VidTokUpsample2D, home.VidTokDownsample3D, home.VidTokUpsample3D
    reason = child_reason(sampler, *known) or conv_reason(call, sampler.conv)
    return reason or (child_reason(sampler.avg_pool, nn.AvgPool3d) if hasattr(sampler, "avg_pool") else None)


def space_down(sampler: Any, x: Tensor, call: Call) -> Tensor:
    """3x3 of stride 2 with one zero row below and one zero column to the right."""
    options = conv_options(sampler.conv, call) | {"spatial_padding": (0, 1, 0, 1)}
    conv = sampler.conv
    result: Tensor = ops.causal_conv3d(x, volume(conv.weight), conv.bias, **options)
    return result


def space_up(sampler: Any, x: Tensor, call: Call) -> Tensor:
    """Nearest doubling and 3x3, without the doubled tensor."""
    conv = sampler.conv
    options: dict[str, Any] = {"scale": (1, 2, 2), "pad_frames": 0, "backend": call.convs}
    result: Tensor = ops.upsample_conv3d(x, volume(conv.weight), conv.bias, **options)
    return result


def _blended(call: Call, smooth: Tensor, convolved: Tensor, mix: Tensor) -> Tensor:
    """`sigmoid(mix) * smooth + (1 - sigmoid(mix)) * convolved`. Under autocast the factor is a float32 tensor of one
    dimension, so that the original's sum is float32."""
    if smooth.dtype != convolved.dtype or is_autocast(smooth):
        smooth, convolved = smooth.to(mix.dtype), convolved.to(mix.dtype)
    result: Tensor = ops.alpha_blend(smooth, convolved, mix, backend=call.backend("alpha_blend"))
    return result


def time_down(sampler: Any, x: Tensor, call: Call) -> Tensor:
    """Half the frames: a mean of three frames blended with a convolution; together one convolution."""
    kernel, mix, mode = kernel_of(sampler.conv), sampler.mix_factor, past_end(sampler)
    if is_autocast(x) or (mode == "replicate" and (call.keep or not sampler.is_first_chunk)):
        return _time_down_parts(sampler, x, call)
    ends = {"time_padding": "zeros", "pad_frames": (0, 1)} if mode == "noncausal" else {"time_padding": mode}
    options = {"stride": kernel.stride, "backend": call.convs, **ends}
    result: Tensor = ops.downsample_conv3d(x, kernel.weight, kernel.bias, mix_factor=mix, **options)
    return result


def _time_down_parts(sampler: Any, x: Tensor, call: Call) -> Tensor:
    mode = past_end(sampler)
    first: str | Tensor = mode
    if mode == "replicate":
        first = mode if sampler.is_first_chunk else channels_last(sampler.causal_cache)
        if call.keep:
            sampler.causal_cache = x[:, :, -1:].clone()
    if mode != "noncausal":
        convolved = convolve(sampler.conv, x, call)
    else:
        options = conv_options(sampler.conv, call) | {"pad_frames": (0, 1)}
        convolved = ops.causal_conv3d(x, sampler.conv.weight, sampler.conv.bias, **options)
    if is_autocast(x) or x.dtype != convolved.dtype:
        x, convolved = x.to(sampler.mix_factor.dtype), convolved.to(sampler.mix_factor.dtype)
        first = first if isinstance(first, str) else first.to(x.dtype)
    backend = call.backend("alpha_blend")
    result: Tensor = ops.alpha_blend_down(x, convolved, sampler.mix_factor, first_frame=first, backend=backend)
    return result


def _splits(sampler: Any) -> int:
    return sampler.num_temp_upsample if past_end(sampler) == "replicate" and sampler.enable_cached else 0


def _is_linear(sampler: Any) -> bool:
    return getattr(sampler, "interpolation_mode", "nearest") == "trilinear"


def _is_one_op(sampler: Any, x: Tensor, call: Call) -> bool:
    """Whether a temporal upsampler is one op: no frames of another chunk, nothing wider than x."""
    return not (call.keep or is_autocast(x) or (past_end(sampler) == "replicate" and not sampler.is_first_chunk))


def time_up(sampler: Any, x: Tensor, call: Call) -> Tensor:
    """Twice the frames: interpolated (1.1) or repeated ones blended with their convolution; together one op."""
    if not _is_one_op(sampler, x, call):
        doubled = _doubled(sampler, x, call.keep, _splits(sampler), _is_linear(sampler))
        return _blended(call, doubled, convolve(sampler.conv, doubled, call), sampler.mix_factor)
    result: Tensor = _time_up(sampler, x, call)
    return result


def _time_up(sampler: Any, x: Tensor, call: Call, **stream: Any) -> Any:
    kernel, mode = kernel_of(sampler.conv), past_end(sampler)
    ends = {"pad_frames": (1, 1)} if mode == "noncausal" else {"time_padding": mode}
    rule = {"mode": "linear_time", "split": _splits(sampler)} if _is_linear(sampler) else {}
    options = {"scale": (2, 1, 1), "mix_factor": sampler.mix_factor, "backend": call.convs, **ends, **rule, **stream}
    return ops.upsample_conv3d(x, kernel.weight, kernel.bias, **options)


def _raised(sampler: Any, x: Tensor, call: Call, count: int, in_time: bool) -> Iterator[Tensor]:
    """The upsampled frames, so many of x at a time."""
    frames, past = x.shape[2], kernel_of(sampler.conv).weight.shape[2]
    for start in range(0, frames, count):
        piece = x[:, :, start : start + count]
        if in_time:
            history = x[:, :, max(0, start - past) : start] if start else None
            yield _time_up(sampler, piece, call, history=history, start=start, final=start + count >= frames)
        else:
            yield space_up(sampler, piece, call)


def raised_block(upsampling: tuple[Unit, Any], block: Any, x: Tensor, call: Call, block_unit: Unit) -> Tensor | None:
    """A block of frames behind an upsampler, some frames at a time: the upsampled tensor, twice as wide as what the last
    block makes of it, was a decoder's peak. None where it is small, or where the two must be called one after the other."""
    unit, sampler = upsampling
    in_time = unit[0] is time_up
    if not call.inplace or call.autocast or is_traced():
        return None
    if unit[1](call, sampler) is not None or block_unit[1](call, block) is not None:
        return None
    if in_time and (past_end(sampler) == "noncausal" or not _is_one_op(sampler, x, call)):
        return None
    batch, channels, frames, height, width = x.shape
    factors = (2, 1) if in_time else (1, 2)
    each = batch * channels * factors[0] * height * factors[1] * width * factors[1]
    count = max(1, (_RAISED_CPU if x.is_cpu else _RAISED_GPU) // max(1, each))
    if 4 * count > frames:
        return None
    size = batch, block.out_channels, frames * factors[0], height * factors[1], width * factors[1]
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    end = 0
    for raised in _raised(sampler, x, call, count, in_time):
        begin, end = end, end + raised.shape[2]
        if begin < end:
            _frames(block, raised, call, y[:, :, begin:end])
    return y


def _doubled(sampler: Any, x: Tensor, keep: bool, split: int, linear: bool) -> Tensor:
    """The upsampled frames themselves, with diffusers' cache of the frames before a chunk."""
    if not linear:
        return channels_last(x.repeat_interleave(2, 2))
    if sampler.enable_cached and not sampler.is_first_chunk:
        x = torch.cat([channels_last(sampler.causal_cache.to(x.dtype)), x], 2)
        if keep:
            sampler.causal_cache = x[:, :, -2 * split : -split].clone()
        return _interpolated(x)[:, :, 2 * split :]
    if sampler.enable_cached and keep:
        sampler.causal_cache = x[:, :, -split:].clone()
    if not 0 < split < x.shape[2]:
        return _interpolated(x)
    return torch.cat([_interpolated(x[:, :, :split]), _interpolated(x[:, :, split:])], 2)


def _interpolated(x: Tensor) -> Tensor:
    """Twice the frames at half-pixel centres; a missing neighbour is the end frame itself. float32 for half dtypes."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    before = torch.cat([wide[:, :, :1], wide[:, :, :-1]], 2)
    behind = torch.cat([wide[:, :, 1:], wide[:, :, -1:]], 2)
    pairs = torch.stack([before.lerp(wide, 0.75), behind.lerp(wide, 0.75)], 3)
    return channels_last(pairs.flatten(2, 3).to(x.dtype))


def conv_unit(conv: Any, x: Tensor, call: Call) -> Tensor:
    """The first or last convolution."""
    return convolve(conv, x, call)


def _as_frames(module: nn.Module, x: Tensor, *args: Any) -> Tensor:
    batch, _, frames, height, width = x.shape
    y = module(x.permute(0, 2, 1, 3, 4).reshape(batch * frames, -1, height, width), *args)
    return channels_last(y.reshape(batch, frames, *y.shape[1:]).permute(0, 2, 1, 3, 4))


def _as_pixels(module: nn.Module, x: Tensor, *args: Any) -> Tensor:
    batch, _, frames, height, width = x.shape
    y = module(x.permute(0, 3, 4, 1, 2).reshape(batch * height * width, -1, frames), *args)
    return channels_last(y.reshape(batch, height, width, -1, frames).permute(0, 3, 4, 1, 2))


def _as_volume(module: nn.Module, x: Tensor, *args: Any) -> Tensor:
    y: Tensor = module(x, *args)
    return y.clone(memory_format=torch.channels_last_3d)  # what a module returns may be its input


# fused form, guard, how the original is called, its further arguments
FRAME_BLOCK: Unit = (frame_block, block_reason, _as_frames, (None,))
TIME_BLOCK: Unit = (time_block, block_reason, _as_pixels, (None,))
VOLUME_BLOCK: Unit = (volume_block, block_reason, _as_volume, (None,))
ATTENTION: Unit = (attention, attention_reason, _as_volume, ())
SPACE_DOWN: Unit = (space_down, sampler_reason, _as_frames, ())
SPACE_UP: Unit = (space_up, sampler_reason, _as_frames, ())
TIME_DOWN: Unit = (time_down, sampler_reason, _as_volume, ())
TIME_UP: Unit = (time_up, sampler_reason, _as_volume, ())
CONV: Unit = (conv_unit, conv_reason, _as_volume, ())


def run(unit: Unit, module: nn.Module, x: Tensor, call: Call) -> Tensor:
    """One unit, fused where its modules are as upstream made them."""
    fused, guard, arrange, args = unit
    reason = guard(call, module)
    if reason is None:
        return fused(module, x, call)
    note_fallback(call.owner, reason)
    return arrange(module, x, *args)
