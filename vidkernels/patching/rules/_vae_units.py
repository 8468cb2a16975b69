# SPDX-License-Identifier: Apache-2.0
"""What the rules for diffusers' video VAEs share: one layout, convolutions read behind their modules' backs, caches.

A network (encoder, decoder) brings its input to channels-last memory once; blocks and layers below keep the format
that they are given, so nothing is rearranged between them. Every level has a rule of its own: where a block has to run
its original forward (LoRA, hooks, shards on a child), the layers inside it are still fused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels._conv.geometry import is_channels_last
from vidkernels.patching._guard import call_reason, child_reason, is_autocast, parameter_of
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules._small_convs import (
    convolve_padded,
    doubled_copy,
    doubles_by_copy,
    reads_mostly_weights,
)

TESTED = ("diffusers 0.42.1",)
# Elements of the largest tensor when several chunks of a clip go through a network in one call: enough to fill a GPU. On a
# CPU they go one by one, as upstream's: two together peaked at 1.06 to 1.17 of upstream's memory, one at 0.75 to 0.92, and all
# in one call were 1.05 to 1.5 times as fast.
_BUDGET = {"cpu": 0}
_BUDGET_GPU = 1 << 27
_MOST_CHUNKS = 4  # at most: four of Wan's, a clip of 17 frames, peak at 0.7 to 0.9 of upstream's memory
_TORCH = (nn.Conv2d, nn.Conv3d)


def channels_last(x: Tensor) -> Tensor:
    """[B, C, T, H, W] in channels-last memory."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def restored(y: Tensor, like: Tensor) -> Tensor:
    """y in the memory format of `like`, the input of the module that returns y."""
    return y if is_channels_last(like) else y.contiguous()


def video_reason(x: Any, *others: Tensor | None) -> str | None:
    """Why a call cannot use kernels whatever the module; its first input has to be a clip."""
    reason = call_reason(x, *others)
    if reason is None and (x.ndim != 5 or not x.dtype.is_floating_point):
        reason = f"an input has {x.ndim} axes and dtype {x.dtype}"
    return reason


def kernel_reason(kernel: Any, *classes: type) -> str | None:
    """Why a torch convolution must be called; `classes` default to `nn.Conv2d` and `nn.Conv3d`."""
    return child_reason(kernel, *(classes or _TORCH)) or options_reason(kernel)


def options_reason(kernel: Any) -> str | None:
    """Why kernels cannot serve the options of a torch convolution, which may have been changed since it was patched."""
    if kernel.groups != 1 or kernel.padding_mode != "zeros":
        return f"a convolution has {kernel.groups} groups and padding mode {kernel.padding_mode}"
    return None


def unpadded_reason(kernel: Any, axes: int = 3) -> str | None:
    """Why a convolution behind a copy padded by its module must be called: it pads the first of its axes by itself, too."""
    return f"a convolution pads twice, by {kernel.padding}, too" if any(kernel.padding[:axes]) else None


def wrapped_reason(conv: Any, wrapper: type, *kernels: type) -> str | None:
    """Why a causal wrapper and the convolution inside it must be called."""
    return child_reason(conv, wrapper) or kernel_reason(conv._modules["conv"], *kernels)


def convolve(
    owner: Any, kernel: Any, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None, **options: Any
) -> Tensor:
    """`conv(x) + residual` with the weights, stride and dilation of a torch convolution, padded as `options` say.

    out: receives the result; without gradients and autocast. It may be the residual.
    """
    weight, bias = parameter_of(kernel, "weight"), parameter_of(kernel, "bias")
    options["stride"], options["dilation"] = kernel.stride, kernel.dilation
    if weight.ndim == 4:
        weight = weight.unsqueeze(2)
        options["stride"], options["dilation"] = (1, *kernel.stride), (1, *kernel.dilation)
    return convolve_by(owner, weight, bias, x, residual, out, **options)


def convolve_by(
    owner: Any,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`convolve` by a weight [K, C, kt, kh, kw] and a bias of no module; stride and dilation are among the options."""
    # Under autocast the residual may be wider than the convolution's result, and the sum takes its dtype.
    inside = residual if residual is not None and not is_autocast(x) and residual.dtype == x.dtype else None
    backend = owner._vidkernels_backend("causal_conv3d")
    if x.is_cpu and backend == "auto":
        repeats = options.get("time_padding") == "replicate"
        if reads_mostly_weights(x, weight, options.get("history"), repeats):
            y = convolve_padded(x, weight, bias, **options)
            if out is not None:
                return out.copy_(y) if residual is None else torch.add(y, residual, out=out)
            return y if residual is None else y + residual
    result: Tensor = ops.causal_conv3d(x, weight, bias, residual=inside, out=out, backend=backend, **options)
    return result if residual is None or inside is residual else result + residual


def pointwise(owner: Any, kernel: Any, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """A convolution of one tap."""
    return convolve(owner, kernel, x, residual, out, time_padding="none", spatial_padding=0)


def doubled_in_space(owner: Any, kernel: Any, x: Tensor) -> Tensor:
    """Nearest doubling of height and width, then a 2-D 3x3 convolution padded by one: no doubled tensor, or a small one."""
    backend = owner._vidkernels_backend("causal_conv3d")
    if backend == "auto" and doubles_by_copy(x, kernel.weight):
        return convolve(owner, kernel, doubled_copy(x), time_padding="none", spatial_padding=1)
    weight = kernel.weight.unsqueeze(2)
    result: Tensor = ops.upsample_conv3d(x, weight, kernel.bias, scale=(1, 2, 2), pad_frames=0, backend=backend)
    return result


def halved_in_space(owner: Any, kernel: Any, x: Tensor) -> Tensor:
    """A 2-D 3x3 convolution of stride 2 behind one zero row below and one zero column to the right."""
    return convolve(owner, kernel, x, time_padding="none", spatial_padding=(0, 1, 0, 1))


def dropped(dropout: Any, x: Tensor) -> Tensor:
    """Dropout, where it does anything."""
    return F.dropout(x, dropout.p) if dropout.training and dropout.p > 0 else x


def last_frames(x: Tensor, before: Tensor | None, count: int, owned: bool = False) -> Tensor:
    """A copy of the last `count` frames of (before, x); of x alone where `before` is None, then perhaps fewer.

    owned: nobody else writes to x, so that x itself will do where all its frames are wanted.
    """
    if x.shape[2] >= count or before is None:
        if owned and x.shape[2] <= count:
            return x
        return x[:, :, -count:].clone(memory_format=torch.channels_last_3d)
    missing = x.shape[2] - count
    return channels_last(torch.cat([before[:, :, missing:].to(x), x], 2))


def rms_reason(norm: Any, cls: type) -> str | None:
    """Why an RMS norm of Wan's kind must be called."""
    return child_reason(norm, cls) or rms_options_reason(norm)


def rms_options_reason(norm: Any) -> str | None:
    """Why kernels cannot serve the options of an RMS norm of Wan's kind."""
    if not norm.channel_first:
        return "a norm is not over the channel axis"
    usual = norm.scale == parameter_of(norm, "gamma").numel() ** 0.5 and (
        isinstance(norm.bias, Tensor) or norm.bias == 0
    )
    return None if usual else "a norm's scale or bias was changed"


def rms_normed(owner: Any, norm: Any, x: Tensor, activation: str | None = "silu") -> Tensor:
    """`gamma sqrt(C) x / |x| + bias` over channels as by `F.normalize`, with SiLU behind it, in one pass."""
    bias = norm.bias.flatten() if isinstance(norm.bias, Tensor) else None
    backend = owner._vidkernels_backend("channel_norm")
    options: dict[str, Any] = {"kind": "l2", "eps": 1e-12, "activation": activation, "backend": backend}
    result: Tensor = ops.channel_norm(x, parameter_of(norm, "gamma").flatten(), bias, **options)
    return result


def as_rows(x: Tensor) -> Tensor:
    """[B, C, T, H, W] in channels-last memory as [B, T, H, W, C]; a view."""
    return x.permute(0, 2, 3, 4, 1)


def as_clip(rows: Tensor) -> Tensor:
    """[B, T, H, W, C] as [B, C, T, H, W] in channels-last memory; a view."""
    return rows.permute(0, 4, 1, 2, 3)


def frame_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with one head over the positions of each frame, [B, C, T, H, W] in channels-last memory."""
    batch, _, frames, height, width = q.shape
    rows = [as_rows(t).reshape(batch * frames, 1, height * width, -1) for t in (q, k, v)]
    mixed = F.scaled_dot_product_attention(rows[0], rows[1], rows[2])
    return as_clip(mixed.reshape(batch, frames, height, width, -1))


def chunks_per_call(x: Tensor, elements: int) -> int:
    """How many chunks of a clip go through a network at once, from the elements of its largest tensor for one chunk.

    Where a chunk is small, a convolution is bound by reading its weights, and by the launch on a GPU.
    """
    return max(1, min(_MOST_CHUNKS, _BUDGET.get(x.device.type, _BUDGET_GPU) // max(elements, 1)))


def like_parameters(module: nn.Module, *shape: int) -> Tensor:
    """Standard normal numbers on the device and in the dtype of a module, for a rule's `sample`."""
    parameter = next(module.parameters())
    return torch.randn(shape, dtype=parameter.dtype, device=parameter.device)


def group_reason(*norms: Any) -> str | None:
    """Why a GroupNorm must be called."""
    for norm in norms:  # not in a generator: torch.compile of torch 2.11 breaks the graph at names assigned inside one
        reason = child_reason(norm, nn.GroupNorm)
        if reason is not None:
            return reason
    return None


def group_normed(owner: Any, norm: Any, x: Tensor, activation: str | None = "silu", per_frame: bool = False) -> Tensor:
    """GroupNorm over the clip, or of each frame by itself, with SiLU behind it."""
    options: dict[str, Any] = {"eps": norm.eps, "activation": activation, "per_frame": per_frame}
    options["backend"] = owner._vidkernels_backend("group_norm")
    weight, bias = parameter_of(norm, "weight"), parameter_of(norm, "bias")
    result: Tensor = ops.group_norm(x, norm.num_groups, weight, bias, **options)
    return result


PAD_MODES = {"replicate": "replicate", "constant": "zeros"}


def padded_reason(conv: Any, wrapper: type, *kernels: type) -> str | None:
    """Why a convolution behind one `F.pad` of time and space must be called."""
    return wrapped_reason(conv, wrapper, *kernels) or padding_reason(conv)


def padding_reason(conv: Any) -> str | None:
    """Why kernels cannot serve the padding of such a convolution."""
    if conv.pad_mode not in PAD_MODES or any(conv._modules["conv"].padding) or conv.time_causal_padding[5]:
        return f"a convolution pads by mode {conv.pad_mode}, {conv.time_causal_padding} and {conv.conv.padding}"
    return None


def padding_of(conv: Any) -> dict[str, Any]:
    """The `F.pad` in front of such a convolution, as options of `ops.causal_conv3d` and `ops.upsample_conv3d`."""
    left, right, top, bottom, front, _ = conv.time_causal_padding
    mode = PAD_MODES[conv.pad_mode]
    space = {"spatial_padding": (left, right, top, bottom), "spatial_padding_mode": mode}
    return {"time_padding": mode, "pad_frames": front, **space}


def causal_frame_attention(q: Tensor, k: Tensor, v: Tensor, per_frame: int) -> Tensor:
    """Attention [B, heads, T * per_frame, d] in which a frame sees itself and the frames before it.

    One call for each frame on the keys that it sees: no mask of N x N numbers, and half the products.
    """
    parts = []
    for end in range(per_frame, q.shape[2] + 1, per_frame):
        seen = k[:, :, :end], v[:, :, :end]
        parts.append(F.scaled_dot_product_attention(q[:, :, end - per_frame : end], *seen))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def to_channels(x: Tensor, factors: tuple[int, int, int], box_first: bool = False) -> Tensor:
    """Space to depth of [B, C, T, H, W] in channels-last memory; channels (C, box), or (box, C) with `box_first`."""
    rows = as_rows(x)
    for axis in (3, 2, 1):
        rows = rows.unflatten(axis, (-1, factors[axis - 1]))
    order = (2, 4, 6, 7) if box_first else (7, 2, 4, 6)
    return as_clip(rows.permute(0, 1, 3, 5, *order).flatten(4))


def from_channels(x: Tensor, factors: tuple[int, int, int], box_first: bool = False) -> Tensor:
    """Depth to space, the inverse of `to_channels`: [B, C f, T, H, W] -> [B, C, T f0, H f1, W f2]."""
    rows = as_rows(x).unflatten(-1, (*factors, -1) if box_first else (-1, *factors))
    order = (1, 4, 2, 5, 3, 6, 7) if box_first else (1, 5, 2, 6, 3, 7, 4)
    return as_clip(rows.permute(0, *order).flatten(5, 6).flatten(3, 4).flatten(1, 2))


def silu_check(module: Any) -> str | None:
    """Why a module with another activation than SiLU behind its norms can never be served."""
    for name in ("nonlinearity", "conv_act"):
        activation = getattr(module, name, None)
        if activation is not None and not isinstance(activation, nn.SiLU):
            return f"its activation is {type(activation).__name__}, not SiLU"
    return None


def rule(
    name: str,
    target: str,
    mixin: type,
    uses: str,
    digests: dict[str, str],
    sample: Any,
    check: Any = None,
    **more: Any,
) -> Rule:
    """A rule for diffusers; `target` is `file:Class` in its autoencoders or `models.file:Class`; `uses` names the ops.

    Modules with another activation than SiLU are left out, besides those that `check` refuses.
    """

    def whole_check(module: Any) -> str | None:
        return silu_check(module) or (check(module) if check is not None else None)

    path = "diffusers." if target.startswith("models.") else "diffusers.models.autoencoders."
    return Rule(
        name=f"diffusers.{name}",
        ops=tuple(uses.split()),
        targets=(path + target,),
        mixin=mixin,
        digests={key: (value,) for key, value in digests.items()},
        check=whole_check,
        sample=sample,
        tested_versions=TESTED,
        **more,
    )
