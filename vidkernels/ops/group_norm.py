# SPDX-License-Identifier: Apache-2.0
"""GroupNorm over channels-last video, with statistics of each frame or of the whole clip, and SiLU behind it.

Composed of PyTorch's operations on a grouped view in the clip's own memory format: nothing is rearranged. No kernel of ours
yet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels import dispatch
from vidkernels._reference import channel_norm as reference
from vidkernels.errors import OptionError, ShapeError
from vidkernels.ops import _checks


def _torch_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    per_frame: bool,
) -> Tensor:
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    channels_last = x.stride(1) == 1 and x.shape[1] > 1
    rows = wide.permute(0, 2, 3, 4, 1) if channels_last else wide
    grouped = rows.unflatten(4 if channels_last else 1, (num_groups, -1))  # [B, T, H, W, G, c] or [B, G, c, T, H, W]
    axes = ((2, 3, 5) if per_frame else (1, 2, 3, 5)) if channels_last else ((2, 4, 5) if per_frame else (2, 3, 4, 5))
    # Two passes over centred values: the difference of mean squares, as in PyTorch's kernel, loses digits where |mean| is large.
    variance, mean = torch.var_mean(grouped, axes, correction=0, keepdim=True)
    normed = ((grouped - mean) * torch.rsqrt(variance + eps)).flatten(*((4, 5) if channels_last else (1, 2)))
    shape = (-1,) if channels_last else (-1, 1, 1, 1)
    if weight is not None:
        normed = normed * weight.to(normed.dtype).reshape(shape)
    if bias is not None:
        normed = normed + bias.to(normed.dtype).reshape(shape)
    y = F.silu(normed) if activation == "silu" else normed
    return (y.permute(0, 4, 1, 2, 3) if channels_last else y).to(x.dtype)


def _facts(x: Tensor, num_groups: int, *args: object, **kwargs: object) -> tuple[Tensor]:
    kwargs.pop("backend", None)
    _check(x, num_groups, *args, **kwargs)
    return (x,)


BACKENDS = dispatch.Dispatcher(
    "group_norm", facts=_facts, backends={"torch": dispatch.always, "reference": dispatch.always}
)


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: str | None = None,
    per_frame: bool = False,
) -> None:
    _checks.check_floating("x", x)
    _checks.check_ndim("x", x, 5)
    _checks.check_option("activation", activation, (None, "silu"))
    if num_groups < 1 or x.shape[1] % num_groups:
        raise OptionError("num_groups", f"a divisor of the {x.shape[1]} channels", num_groups)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.shape != (x.shape[1],):
            raise ShapeError(name, f"[C] = ({x.shape[1]},)", tuple(value.shape))
        _checks.check_same_device(name, value, "x", x)
        _checks.check_same_dtype(name, value, "x", x)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: str | None = None,
    per_frame: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`act((x - mean) / sqrt(var + eps) * weight + bias)`, mean and variance over the channels of a group and over space.

    Args:
        x: [B, C, T, H, W], float32, float64, bfloat16 or float16.
        num_groups: divides C.
        weight, bias: [C], dtype of x.
        eps: added to the biased variance.
        activation: None or "silu".
        per_frame: statistics of each frame by itself, so that no frame depends on another; otherwise of the whole clip.
        backend: "auto", "torch" or "reference".

    Returns:
        The shape and memory format of x.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.

    Source: arXiv 1803.08494; VQGAN, MAGVIT and Open-MAGVIT2 over clips, per frame as VidTok's causal variant.
    """
    _check(x, num_groups, weight, bias, eps=eps, activation=activation, per_frame=per_frame)
    chosen = BACKENDS.select(backend, x)
    if chosen == "reference":
        return reference.group_norm(x, num_groups, weight, bias, eps=eps, activation=activation, per_frame=per_frame)
    if x.numel() == 0:
        return torch.empty_like(x)
    return _torch_group_norm(x, num_groups, weight, bias, eps, activation, per_frame)
