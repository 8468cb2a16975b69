# SPDX-License-Identifier: Apache-2.0
"""VidTok's convolutions, diffusers' and official, on `ops.causal_conv3d`, on [B, C, T, H, W] in channels-last memory.

A causal conv of diffusers and of VidTok 1.1 clones its whole padded input after every call. Here a call that may be followed by another
chunk (`keep`) stores the few frames that this next chunk reads, in the same attribute and layout, so that a fallback to
the original forward in the middle of a clip finds them. Other calls store nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import child_reason, parameter_of

# Attributes of modules are 0.4 to 1.5 us each (a child, a missing name), and a decoder asks about 1000 times: what is known
# to be there is taken from `_modules` and `_parameters`.
TORCH = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CAUSAL = (nn.Conv1d, nn.Conv3d)


@dataclass(frozen=True)
class Call:
    """One forward of an encoder or decoder.

    owner: the patched module; home: what its guards know of the upstream file. keep: later chunks need this one's last frames. inplace: no
    gradient is needed, so the residual stream is updated in place. autocast: it is on. convs, norms: their backends.
    """

    owner: Any
    home: Any
    keep: bool
    inplace: bool
    autocast: bool
    convs: str
    norms: str

    def backend(self, op: str) -> str:
        """The backend that `patch` was told to use for an op."""
        name: str = self.owner._vidkernels_backend(op)
        return name


def channels_last(x: Tensor) -> Tensor:
    """[B, C, T, H, W] in channels-last memory."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def kernel_of(conv: Any) -> Any:
    """The torch convolution: inside a causal wrapper, or the module itself."""
    return conv if type(conv) in TORCH else conv._modules["conv"]


def past_end(module: Any) -> str:
    """What a causal convolution or a temporal sampler finds before its first frame: "replicate", that frame again, or
    what the last chunk has left; "zeros" (VidTok 1.0); or "noncausal", where it looks ahead as well."""
    if not hasattr(module, "time_pad") and not hasattr(module.conv, "time_pad"):
        return "noncausal"
    return "replicate" if hasattr(module, "causal_cache") else "zeros"


def volume(weight: Tensor) -> Tensor:
    """A kernel [K, C, 3], [K, C, kh, kw] or [K, C, kt, kh, kw] as the last of these; a view."""
    if weight.ndim == 5:
        return weight
    return weight.unsqueeze(2) if weight.ndim == 4 else weight.unsqueeze(3).unsqueeze(4)


def conv_reason(call: Call, conv: Any) -> str | None:
    """Why a convolution, causal or not, has to be called instead of read."""
    if type(conv) in TORCH or not hasattr(conv, "time_pad"):
        return child_reason(conv, *TORCH)
    home = call.home
    reason = child_reason(conv, home.VidTokCausalConv1d, home.VidTokCausalConv3d)
    return reason or child_reason(conv._modules["conv"], *_CAUSAL)


def conv_options(conv: Any, call: Call) -> dict[str, Any]:
    """Padding, stride and backend of a convolution as keywords of `ops.causal_conv3d`."""
    kernel = kernel_of(conv)
    stride, padding = kernel.stride, kernel.padding
    axes = len(stride)
    space: Any = 0
    if kernel is not conv:
        time = past_end(conv)
        frames: Any = conv.time_pad
        if axes == 3:
            space = (conv.spatial_padding if time == "replicate" else conv.time_causal_padding)[:4]
    elif axes == 2:
        time, frames, space = "none", None, padding
    else:
        time, frames = "zeros", (padding[0], padding[0])
        if axes == 3:
            space = padding[1:]
    return {
        "stride": stride if axes == 3 else (1, *stride) if axes == 2 else (stride[0], 1, 1),
        "time_padding": time,
        "pad_frames": frames,
        "spatial_padding": space,
        "backend": call.convs,
    }


def convolve(conv: Any, x: Tensor, call: Call, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`conv(x) + residual` (in `out`, which may be the residual), with the caches of diffusers' causal convolutions."""
    options = conv_options(conv, call)
    kernel = kernel_of(conv)
    if kernel is not conv:
        options["history"] = history = history_of(conv, x)
        if call.keep:
            conv.causal_cache = _as_cache(conv, _remembered(x, history, conv.time_pad, conv.cache_offset))
    weight, bias = volume(parameter_of(kernel, "weight")), parameter_of(kernel, "bias")
    if not call.autocast:
        result: Tensor = ops.causal_conv3d(x, weight, bias, residual=residual, out=out, **options)
        return result
    # The residual stream may be wider than the convolution's result, and the sum takes its dtype.
    result = ops.causal_conv3d(x, weight, bias, **options)
    if residual is not None and residual is out:
        return out.add_(result)
    result = result if residual is None else residual + result
    return result if out is None else out.copy_(result)


def history_of(conv: Any, x: Tensor) -> Tensor | None:
    """The frames before x that an earlier chunk left, [B, C, time_pad, H, W]; None for the first chunk."""
    if conv.time_pad == 0 or past_end(conv) == "zeros" or conv.is_first_chunk:
        return None
    cache = conv.causal_cache[:, :, -conv.time_pad :]
    if cache.ndim == 3:  # [B*H*W, C, P]
        batch, _, _, height, width = x.shape
        cache = cache.reshape(batch, height, width, *cache.shape[1:]).permute(0, 3, 4, 1, 2)
    return channels_last(cache)


def _remembered(x: Tensor, history: Tensor | None, frames: int, offset: int) -> Tensor:
    """The last `frames` frames of (padding, x) without its last `offset` frames, as the next chunk wants them."""
    end = x.shape[2] - offset
    if end >= frames:
        return x[:, :, end - frames : end].clone()
    front = x[:, :, :1].expand(-1, -1, frames, -1, -1) if history is None else history
    return torch.cat([front, x], 2)[:, :, max(end, 0) : end + frames]


def _as_cache(conv: Any, frames: Tensor) -> Tensor:
    """Frames in the layout in which diffusers keeps them."""
    if len(conv.conv.stride) == 3:
        return frames
    return frames.permute(0, 3, 4, 1, 2).flatten(0, 2)  # [B*H*W, C, P]
