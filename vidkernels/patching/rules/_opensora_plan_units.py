# SPDX-License-Identifier: Apache-2.0
"""Units of Open-Sora-Plan's causal VAEs: convolutions that repeat the first frame, norms, and methods called frame by frame.

Every file of its repository looks for an NPU and keeps a configuration of it, `npu_config`; where there is none it is None
or says so. Clips in chunks: WF-VAE's convolutions and samplers keep frames for the next chunk in a queue, as upstream's forwards do, so
that both can take turns. Earlier ones keep a tensor, and are called as they are then.
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import child_reason, parameter_of
from vidkernels.patching._match import digest
from vidkernels.patching._mechanism import Fused
from vidkernels.patching.rules import _frame_units as frames
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason

# `LayerNorm.forward`: over the channels of every position.
LAYER_NORMS = {"61c1e43c2047cf8b"}
# The decorator `video_to_image`: all frames as a batch, one frame after the other, either; WF-VAE's own.
FRAMEWISE = ("01d3247ca8afaa6a", "5afc8b1c764ee4f3", "77124a37b2362b10", "24eb2d97ab65b8e6")


class Family(Fused):
    """What all modules of the VAE share."""

    def _clip_reason(self, x: Any) -> str | None:
        """Why a call cannot use kernels whatever the module's layers are."""
        npu = getattr(self._vidkernels_home, "npu_config", None)
        return video_reason(x) or ("it runs on an NPU" if npu is not None and npu.on_npu else None)

    def _frames_reason(self, x: Any) -> str | None:
        """The same for what is called for frames, and takes images [N, C, H, W], too."""
        if getattr(x, "ndim", None) != 4:
            return self._clip_reason(x)
        return self._clip_reason(x.unsqueeze(2))

    def _conv_reason(self, *convs: Any) -> str | None:
        """Why causal convolutions must be called."""
        for conv in convs:
            reason = child_reason(conv, self._vidkernels_home.CausalConv3d) or causal_reason(conv)
            if reason is not None:
                return reason
        return None

    def _norm_reason(self, *norms: Any) -> str | None:
        """Why norms must be called."""
        known = norm_classes(self._vidkernels_home)
        for norm in norms:
            reason = child_reason(norm, *known)
            if reason is None and not isinstance(norm, nn.GroupNorm):
                reason = child_reason(norm._modules["norm"], nn.LayerNorm)
            if reason is not None:
                return reason
        return None


def norm_classes(home: Any) -> tuple[type, ...]:
    """The norms that a file's `Normalize` makes: GroupNorm, and a LayerNorm of later versions."""
    file = sys.modules[home.Normalize.__module__]
    return (nn.GroupNorm, file.LayerNorm) if hasattr(file, "LayerNorm") else (nn.GroupNorm,)


def norm_check(module: Any) -> str | None:
    """A norm that can never be served."""
    for name in ("norm1", "norm2", "norm", "norm_out"):
        norm = getattr(module, name, None)
        if norm is None or type(norm) is nn.GroupNorm:
            continue
        if type(norm).__name__ != "LayerNorm" or digest(type(norm).forward) not in LAYER_NORMS:
            return f"its norm is a {type(norm).__name__}, neither GroupNorm nor a LayerNorm that is known"
    return None


def normed(owner: Any, norm: Any, x: Tensor, activation: str | None = "silu", per_frame: bool = False) -> Tensor:
    """GroupNorm over the clip or over each frame, or LayerNorm over channels, with SiLU behind it."""
    if isinstance(norm, nn.GroupNorm):
        return units.group_normed(owner, norm, x, activation, per_frame)
    layer = norm._modules["norm"]
    options: dict[str, Any] = {"kind": "layer", "eps": layer.eps, "activation": activation}
    options["backend"] = owner._vidkernels_backend("channel_norm")
    result: Tensor = ops.channel_norm(x, parameter_of(layer, "weight"), parameter_of(layer, "bias"), **options)
    return result


def last(x: Tensor) -> Tensor:
    """A clip or images in channels-last memory."""
    return channels_last(x) if x.ndim == 5 else x.contiguous(memory_format=torch.channels_last)


def as_clip(x: Tensor) -> Tensor:
    """A clip, or images [N, C, H, W] as the clip [1, C, N, H, W] that has their memory; in channels-last memory."""
    return channels_last(x) if x.ndim == 5 else frames.as_video(x)


def as_given(y: Tensor, like: Tensor) -> Tensor:
    """The clip y as the clip or the images that a module got, in their memory format."""
    return restored(y, like) if like.ndim == 5 else frames.frames_like(y, like)


def causal_reason(conv: Any) -> str | None:
    """Why a causal convolution must run its own forward."""
    kernel = conv._modules["conv"]
    reason = units.kernel_reason(kernel, nn.Conv3d)
    if reason is None and kernel.padding[0] != 0:
        reason = "a convolution pads frames twice"
    if reason is not None:
        return reason
    if not hasattr(conv, "is_first_chunk"):  # what is kept was None at first, and is a list or a tensor later
        keeps = getattr(conv, "enable_cached", False) or getattr(conv, "causal_cached", None) is not None
        return "a convolution keeps frames for the next chunk" if keeps else None
    missing = not conv.is_first_chunk and len(conv.causal_cached) == 0
    return "a convolution has kept no frames of the chunk before" if missing else None


def causal(
    owner: Any, conv: Any, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None, behind: int = 0
) -> Tensor:
    """A causal convolution; the repeated frames are coordinates.

    In a later chunk the frames that were kept come first; what the next one needs is kept. behind: zeros behind rows and columns,
    which upstream appends before the layer, so that kept frames have them.
    """
    kernel = conv._modules["conv"]
    options: dict[str, Any] = {"spatial_padding": (0, behind, 0, behind) if behind else kernel.padding[1:]}
    front = kernel.kernel_size[0] - 1
    history = None if getattr(conv, "is_first_chunk", True) else conv.causal_cached.popleft()
    if history is not None and behind:
        history = history[..., : x.shape[3], : x.shape[4]]
    if getattr(conv, "enable_cached", False):
        kept = kept_frames(conv, x, history)
        conv.causal_cached.append(F.pad(kept, (0, behind, 0, behind)) if behind else kept)
    if history is None:
        return units.convolve(owner, kernel, x, residual, out, time_padding="replicate", pad_frames=front, **options)
    if history.shape[2] == 0:
        return units.convolve(owner, kernel, x, residual, out, time_padding="none", **options)
    before = channels_last(history.to(x.dtype))
    return units.convolve(owner, kernel, x, residual, out, time_padding="history", history=before, **options)


def kept_frames(conv: Any, x: Tensor, history: Tensor | None) -> Tensor:
    """A copy of the frames that the next chunk needs: of (history, x), less the last `cache_offset`, which come again.

    history: None in the first chunk, before which the first frame is repeated.
    """
    kernel = conv._modules["conv"]
    front, stride = kernel.kernel_size[0] - 1, kernel.stride[0]
    count = -(-front // stride) if front >= stride else 0
    before = x[:, :, :1].expand(-1, -1, front, -1, -1) if history is None else history
    end = max(before.shape[2] + x.shape[2] - conv.cache_offset, 0)
    start = max(end - count, 0)
    split = before.shape[2]
    parts = before[:, :, start:end], x[:, :, max(start - split, 0) : max(end - split, 0)]
    whole = [part for part in parts if part.shape[2] > 0]
    if len(whole) > 1:
        return channels_last(torch.cat(whole, 2))
    return (whole[0] if whole else x[:, :, :0]).clone(memory_format=torch.channels_last_3d)


def averaged(x: Tensor, count: int) -> Tensor:
    """Means of `count` frames, every second one and those before it, where the first frame is repeated."""
    padded = torch.cat([x[:, :, :1].expand(-1, -1, count - 1, -1, -1), x], 2)
    behind = 2 * ((x.shape[2] - 1) // 2) + 1
    # torch has no such mean in bfloat16 on a CPU; half precision is summed in float32, as its pooling does elsewhere.
    wide = torch.promote_types(x.dtype, torch.float32)
    total = padded[:, :, :behind:2].to(wide)
    for start in range(1, count):
        total = total + padded[:, :, start : start + behind : 2]
    return channels_last((total / count).to(x.dtype))


def interpolated(x: Tensor, *factors: tuple[int, int, int]) -> Tensor:
    """Linear in all axes, by one factor after the other; the first frame stays one frame."""
    first = raised(x[:, :, :1], *((1, height, width) for _, height, width in factors))
    if x.shape[2] == 1:
        return channels_last(first)
    return channels_last(torch.cat([first, raised(x[:, :, 1:], *factors)], 2))


def raised(x: Tensor, *factors: tuple[int, int, int]) -> Tensor:
    """Linear in all axes, by one factor after the other."""
    for factor in factors:
        if factor != (1, 1, 1):
            x = F.interpolate(x, scale_factor=factor, mode="trilinear")
    return x


def inner_function(cls: type[nn.Module]) -> FunctionType | None:
    """What the forward of a class calls for frames, where it is a decorator's."""
    cells = getattr(cls.forward, "__closure__", None) or ()
    return next((cell.cell_contents for cell in cells if isinstance(cell.cell_contents, FunctionType)), None)


def framewise_check(known: dict[str, tuple[str, ...]], name: str) -> Any:
    """Check of a method behind a decorator that calls it for frames: a rule's digest is the decorator's alone."""

    def check(module: Any) -> str | None:
        found = digest(inner_function(type(module)))
        return None if found in known[name] else f"what its forward calls for frames has digest {found}"

    return check
