# SPDX-License-Identifier: Apache-2.0
"""Normalisation over the channel axis at every position, with affine and optional SiLU, in any memory format."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from vidkernels import _reference, _signature, dispatch
from vidkernels.errors import DTypeError
from vidkernels.ops._autograd import distinct, first_order, needs_grad
from vidkernels.ops._checks import (
    check_dim,
    check_eps,
    check_floating,
    check_ndim,
    check_option,
    check_same_device,
    check_shape,
)
from vidkernels.ops._register import Launcher, define

KINDS = {"layer": 0, "rms": 1, "l2": 2}
ACTIVATIONS = (None, "silu")
_MAX_NDIM = 9
# Triton holds the channels of a position in one block; wider ones would spill.
_TRITON_MAX_CHANNELS = 8192
# Below this many channels the C++ kernels compute in float64: in float32, 1.3 to 4.4 % of random checks broke the promise,
# which is about the largest error of a few values there. From 8 on it is below 0.3 %, and float64 slower than eager.
NARROW = 8


def _fwd_fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dim: int,
    kind: int,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    for affine in (weight, bias):
        torch._check(affine is None or affine.ndim == 1, lambda: "channel_norm_fwd: weight and bias must be [C]")
    return torch.empty_like(x)


def _bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dim: int,
    kind: int,
    eps: float,
    silu: bool,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch._check(dy.ndim == x.ndim, lambda: "channel_norm_bwd: dy must have the shape of x")
    dx = torch.empty_like(x) if want_x else x.new_empty(0)
    return dx, _affine_grad(weight, x, want_weight), _affine_grad(bias, x, want_bias)


def _affine_grad(affine: torch.Tensor | None, x: torch.Tensor, wanted: bool) -> torch.Tensor:
    if affine is None:
        return x.new_empty(0)
    return torch.empty_like(affine) if wanted else affine.new_empty(0)


_OPTIONS = "int dim, int kind, float eps, bool silu"
define(
    "channel_norm_fwd",
    f"(Tensor x, Tensor? weight, Tensor? bias, {_OPTIONS}) -> Tensor",
    _fwd_fake,
    triton="vidkernels.triton.channel_norm:channel_norm_fwd",
)
define(
    "channel_norm_bwd",
    f"(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, {_OPTIONS}, bool want_x, bool want_weight, bool want_bias)"
    " -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    triton="vidkernels.triton.channel_norm:channel_norm_bwd",
)


class _ChannelNorm(torch.autograd.Function):
    """Saves x alone: the backward reads it anyway and computes the statistics again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        dim: int,
        kind: int,
        eps: float,
        silu: bool,
        backend: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.options = (dim, kind, eps, silu)
        ctx.backend = backend
        return dispatch.op("channel_norm_fwd", backend)(x, weight, bias, dim, kind, eps, silu)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        bwd = dispatch.op("channel_norm_bwd", ctx.backend)
        grads = bwd(dy, x, weight, bias, *ctx.options, *wanted)
        return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 5)


def check_affine(name: str, affine: torch.Tensor | None, x: torch.Tensor, channels: int) -> None:
    """`affine` is None or a [C] tensor beside `x`, in x's dtype or float32."""
    if affine is None:
        return
    check_floating(name, affine)
    check_shape(name, affine, (channels,), "[C], the channel axis of x")
    check_same_device(name, affine, "x", x)
    if affine.dtype not in (x.dtype, torch.float32):
        raise DTypeError(
            name, f"the dtype of x, {x.dtype}, or float32", affine.dtype, f"Convert it: {name}.to(x.dtype)."
        )


def is_narrow(x: torch.Tensor, channels: int) -> bool:
    """Whether the C++ kernels take x in float64."""
    return channels < NARROW and x.dtype != torch.float64


def _facts(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    kind: str = "layer",
    eps: float | None = None,
    dim: int = 1,
    activation: str | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, int]:
    check_floating("x", x)
    check_ndim("x", x, 1, _MAX_NDIM)
    check_option("kind", kind, KINDS)
    check_option("activation", activation, ACTIVATIONS)
    axis = check_dim("x", dim, x.ndim)
    if eps is not None:
        check_eps(eps)
    channels = x.shape[axis]
    check_affine("weight", weight, x, channels)
    check_affine("bias", bias, x, channels)
    return x, channels


def _triton_check(x: torch.Tensor, channels: int) -> str | None:
    if channels > _TRITON_MAX_CHANNELS:
        return f"it serves up to {_TRITON_MAX_CHANNELS} channels, got {channels}"
    return None


BACKENDS = dispatch.Dispatcher(
    "channel_norm",
    facts=_facts,
    backends={
        "cpp": dispatch.cpp(),
        "cuda": dispatch.cuda(),
        "triton": dispatch.triton(check=_triton_check),
        "reference": dispatch.always,
    },
)
_DECISIONS = _signature.Memo()


def channel_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    kind: str = "layer",
    eps: float | None = None,
    dim: int = 1,
    activation: str | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`act(norm(x) * weight + bias)` over axis `dim`, separately at every position of the other axes.

    `layer`: (x - mean) / sqrt(var + eps), biased variance; `rms`: x / sqrt(mean(x^2) + eps); `l2`: sqrt(C) x /
    max(|x|, eps), the norm of the Wan, QwenImage and HunyuanVideo-1.5 VAEs. One read and one write of the tensor.

    Args:
        x: any shape, e.g. [B, C, T, H, W]; float32, float64, bfloat16 or float16; any strides. Channels-last and
            contiguous tensors, and slices of them, are read in place.
        weight, bias: [C] in x's dtype or float32, or None.
        kind: `layer`, `rms` or `l2`.
        eps: default 1e-6, for `l2` 1e-12.
        dim: the channel axis.
        activation: None or `silu`.
        backend: `auto`, `cpp`, `cuda`, `triton` or `reference`.

    Returns:
        A tensor like x, in x's memory format. Differentiable once in x, weight and bias.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: Ba et al. 2016 (arXiv 1607.06450) per position as in VidTok (arXiv 2412.13061); Zhang and Sennrich 2019.
    """
    if torch.compiler.is_compiling():  # before anything that graphs would be guarded by
        return _decided_anew(x, weight, bias, kind, eps, dim, activation, backend, None)
    key = _signature.signature((kind, eps, dim, activation, backend), x, weight, bias)
    decision = _DECISIONS.get(key)
    if decision is None:
        return _decided_anew(x, weight, bias, kind, eps, dim, activation, backend, key)
    return _served(x, weight, bias, *decision)


def _decided_anew(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
    eps: float | None,
    dim: int,
    activation: str | None,
    backend: str,
    key: Hashable,
) -> torch.Tensor:
    """The call by all checks and predicates; what shapes and options alone decide is kept under `key`."""
    facts = _facts(x, weight, bias, kind=kind, eps=eps, dim=dim, activation=activation)
    chosen = BACKENDS.select(backend, *facts)
    if chosen == "reference":
        reference = _reference.channel_norm.channel_norm
        return reference(x, weight, bias, kind=kind, eps=eps, dim=dim, activation=activation)
    epsilon = (1e-12 if kind == "l2" else 1e-6) if eps is None else eps
    if chosen == "cpp" and is_narrow(x, facts[1]):
        # channels outermost: positions fill the vectors
        wide = x.movedim(dim, 0).to(torch.float64, memory_format=torch.contiguous_format)
        weight, bias = (None if t is None else t.double() for t in (weight, bias))
        y = channel_norm(wide, weight, bias, kind=kind, eps=epsilon, dim=0, activation=activation, backend=chosen)
        return torch.empty_like(x).copy_(y.movedim(0, dim))
    options = (dim % x.ndim, KINDS[kind], epsilon, activation == "silu")
    launch = dispatch.op("channel_norm_fwd", chosen)
    if key is not None:
        launch = Launcher(launch, x)
        _DECISIONS.keep(key, (kind, eps, dim, activation, backend), (options, chosen, launch))
    return _served(x, weight, bias, options, chosen, launch)


def _served(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    options: tuple[int, int, float, bool],
    backend: str,
    launch: Callable[..., torch.Tensor],
) -> torch.Tensor:
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if needs_grad(x, weight, bias):
        result: torch.Tensor = _ChannelNorm.apply(*distinct(x, weight, bias), *options, backend)
        return result
    return launch(x, weight, bias, *options)
