# SPDX-License-Identifier: Apache-2.0
"""GroupNorm of images and clips, with statistics of each frame or of the whole clip, and SiLU behind it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels import _signature, dispatch
from vidkernels._reference import group_norm as reference
from vidkernels.errors import OptionError
from vidkernels.ops._autograd import distinct, first_order, laid_out, needs_grad
from vidkernels.ops._checks import check_eps, check_flag, check_floating, check_ndim, check_option, is_whole
from vidkernels.ops._register import Launcher, define
from vidkernels.ops.channel_norm import ACTIVATIONS, check_affine, is_narrow

_FRAME_AXIS = 2
# Triton merges the channels of a group in one block; wider ones would spill.
_TRITON_MAX_WIDTH = 4096


def _fwd_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    per_frame: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(x.ndim >= 2, lambda: "group_norm_fwd: x must be [B, C, ...]")
    samples = x.shape[0] * (x.shape[_FRAME_AXIS] if per_frame else 1)
    mean = x.new_empty((samples, groups), dtype=torch.float64)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    silu: bool,
    per_frame: bool,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(dy.ndim == x.ndim, lambda: "group_norm_bwd: dy must have the shape of x")
    wanted = ((x, want_x), (weight, want_weight), (bias, want_bias))
    grads = [x.new_empty(0) if t is None else torch.empty_like(t) if want else t.new_empty(0) for t, want in wanted]
    return grads[0], grads[1], grads[2]


define(
    "group_norm_fwd",
    "(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, bool silu, bool per_frame)"
    " -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
    triton="vidkernels.triton.group_norm:group_norm_fwd",
)
define(
    "group_norm_bwd",
    "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int groups, bool silu,"
    " bool per_frame, bool want_x, bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    triton="vidkernels.triton.group_norm:group_norm_bwd",
)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
        per_frame: bool,
        backend: str,
    ) -> Tensor:
        y, mean, rstd = dispatch.op("group_norm_fwd", backend)(x, weight, bias, groups, eps, silu, per_frame)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.options = (groups, silu, per_frame)
        ctx.backend = backend
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under gradient checkpointing a second look is an error
        x = saved[0]
        wanted = ctx.needs_input_grad[:3]
        if dy.stride() != x.stride():
            dy = laid_out(dy, _is_channels_last(x))
        bwd = dispatch.op("group_norm_bwd", ctx.backend)
        grads = bwd(dy, *saved, *ctx.options, *wanted)
        return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 5)


def _torch_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    per_frame: bool,
) -> Tensor:
    """PyTorch's operations on a grouped view in the memory format of x: nothing is rearranged."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    channels_last = x.ndim > 2 and x.shape[1] > 1 and x.stride(1) == 1
    axis = x.ndim - 1 if channels_last else 1
    rows = wide.movedim(1, -1) if channels_last else wide
    grouped = rows.unflatten(axis, (num_groups, -1))
    kept = (0, axis, *((1 if channels_last else 3,) if per_frame else ()))  # batch, group, frame
    axes = [i for i in range(grouped.ndim) if i not in kept]
    # Two passes over centred values: the difference of mean squares, as in PyTorch's own kernel, loses digits where
    # |mean| is large.
    variance, mean = torch.var_mean(grouped, axes, correction=0, keepdim=True)
    normed = ((grouped - mean) * torch.rsqrt(variance + eps)).flatten(axis, axis + 1)
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    if weight is not None:
        normed = normed * weight.to(normed.dtype).reshape(shape)
    if bias is not None:
        normed = normed + bias.to(normed.dtype).reshape(shape)
    y = F.silu(normed) if activation == "silu" else normed
    return (y.movedim(-1, 1) if channels_last else y).to(x.dtype)


def _facts(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: str | None = None,
    per_frame: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, int]:
    check_floating("x", x)
    check_flag("per_frame", per_frame)
    check_ndim("x", x, 3 if per_frame else 2, 5)
    check_option("activation", activation, ACTIVATIONS)
    if not is_whole(num_groups) or x.shape[1] % num_groups:
        raise OptionError(
            "num_groups", f"a divisor of the {x.shape[1]} channels", repr(num_groups), "Groups are equal."
        )
    check_eps(eps)
    check_affine("weight", weight, x, x.shape[1])
    check_affine("bias", bias, x, x.shape[1])
    return x, x.shape[1] // num_groups


def _triton_check(x: Tensor, width: int) -> str | None:
    if width > _TRITON_MAX_WIDTH:
        return f"it serves up to {_TRITON_MAX_WIDTH} channels a group, got {width}"
    return None


BACKENDS = dispatch.Dispatcher(
    "group_norm",
    facts=_facts,
    backends={
        "cpp": dispatch.cpp(),
        "triton": dispatch.triton(check=_triton_check),
        "torch": dispatch.always,
        "reference": dispatch.always,
    },
)
_DECISIONS = _signature.Memo()


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim >= 4 and x.shape[1] > 1 and x.stride(1) == 1


def _dense(x: Tensor) -> Tensor:
    """x, or a copy that is contiguous or channels last, whichever is nearer."""
    if _is_channels_last(x):
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    return x.contiguous()


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
    """`act((x - mean) / sqrt(var + eps) * weight + bias)`, mean and variance over the channels of a group and positions.

    Args:
        x: [B, C, ...], 2 to 5 axes, e.g. [B, C, T, H, W]; float32, float64, bfloat16 or float16.
        num_groups: divides C.
        weight, bias: [C] in x's dtype or float32, or None.
        eps: added to the biased variance.
        activation: None or `silu`.
        per_frame: statistics of each frame (axis 2) by itself, so that no frame depends on another; otherwise of the
            whole clip.
        backend: `auto`, `cpp`, `triton`, `torch` (PyTorch's operations in x's own memory format) or `reference`.

    Returns:
        The shape of x, in its memory format (contiguous or channels last). Differentiable once in x, weight and bias.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: arXiv 1803.08494; VQGAN, MAGVIT and Open-MAGVIT2 over clips, per frame as VidTok's causal variant.
    """
    given = num_groups, eps, activation, per_frame, backend
    if torch.compiler.is_compiling():  # before anything that graphs would be guarded by
        return _decided_anew(x, weight, bias, *given, None)
    key = _signature.signature(given, x, weight, bias)
    decision = _DECISIONS.get(key)
    return _decided_anew(x, weight, bias, *given, key) if decision is None else _served(x, weight, bias, *decision)


def _decided_anew(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str | None,
    per_frame: bool,
    backend: str,
    key: Hashable,
) -> Tensor:
    """The call by all checks and predicates; what shapes and options alone decide is kept under `key`."""
    facts = _facts(x, num_groups, weight, bias, eps=eps, activation=activation, per_frame=per_frame)
    chosen = BACKENDS.select(backend, *facts)
    if chosen == "reference" or x.numel() == 0:
        return reference.group_norm(x, num_groups, weight, bias, eps=eps, activation=activation, per_frame=per_frame)
    if chosen == "torch":
        return _torch_group_norm(x, num_groups, weight, bias, eps, activation, per_frame)
    if chosen == "cpp" and is_narrow(x, x.shape[1]):
        weight, bias = (None if t is None else t.double() for t in (weight, bias))
        return group_norm(
            x.double(), num_groups, weight, bias, eps=eps, activation=activation, per_frame=per_frame, backend=chosen
        ).to(x.dtype)
    options = (num_groups, eps, activation == "silu", per_frame)
    launch = dispatch.op("group_norm_fwd", chosen)
    if key is not None:
        launch = Launcher(launch, x)
        _DECISIONS.keep(key, (num_groups, eps, activation, per_frame, backend), (options, chosen, launch))
    return _served(x, weight, bias, options, chosen, launch)


def _served(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: tuple[int, float, bool, bool],
    backend: str,
    launch: Callable[..., Any],
) -> Tensor:
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if needs_grad(x, weight, bias):
        return _GroupNorm.apply(*distinct(_dense(x), weight, bias), *options, backend)
    result: Tensor = launch(_dense(x), weight, bias, *options)[0]
    return result
