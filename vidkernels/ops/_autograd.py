# SPDX-License-Identifier: Apache-2.0
"""What the autograd functions of the ops share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidkernels.errors import BackendUnavailable

_SLOW_WAY = 'Call the op with backend="reference" (in a patched model: vidkernels.patch(model, backend="reference"))'
_REMEDY = f"{_SLOW_WAY}, or leave the module out of what is differentiated twice."


class _Held:
    """A context whose saved tensors were unpacked: under gradient checkpointing a second look is an error."""

    def __init__(self, ctx: Any) -> None:
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients as they are, attached to all that they depend on; whoever differentiates them gets an error.

    `torch.autograd.function.once_differentiable` is not enough: its node leads to none of the inputs, so
    `torch.autograd.grad(..., inputs)` leaves it out.
    """

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise BackendUnavailable(f"{ctx.name}: its kernels have no second derivatives. {_REMEDY}")


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the `backward` of an autograd function that runs bare ops.

    A bare op is a constant to autograd, so a second derivative through it would be zero without a word. Under
    `create_graph=True` it is a `BackendUnavailable` instead, raised where it is computed.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *cotangents: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *cotangents)
        held = _Held(ctx)
        with torch.no_grad():
            found = backward(held, *cotangents)
        found = found if isinstance(found, tuple) else (found,)
        places = [i for i, gradient in enumerate(found) if gradient is not None]
        gradients = [found[i].detach() for i in places]
        sources = [t for t in (*cotangents, *held.saved_tensors) if isinstance(t, Tensor)]
        attached = _NoSecondDerivative.apply(backward.__module__, len(places), *gradients, *sources)
        result: list[Tensor | None] = [None] * len(found)
        for place, gradient in zip(places, attached, strict=True):
            result[place] = gradient
        return tuple(result)

    return checked


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of these."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # a generator in any() takes three times as long
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def are_several(gradient: Tensor) -> bool:
    """Whether a backward runs for several gradients at once, as `is_grads_batched` and vectorized Jacobians ask for."""
    if torch.compiler.is_compiling():
        return False
    # autograd's own vmap is not that of torch.func
    return torch._C._functorch.is_legacy_batchedtensor(gradient) or torch._C._functorch.is_batchedtensor(gradient)


def check_single(gradient: Tensor, op: str) -> None:
    """The backward of an op whose bare op returns a list, of which vmap makes no batch, runs for one gradient."""
    if are_several(gradient):
        raise BackendUnavailable(f"{op}: its kernels take one gradient at a time, not `is_grads_batched`. {_SLOW_WAY}.")


def laid_out(gradient: Tensor, channels_last: bool) -> Tensor:
    """A gradient of [B, C, ...], contiguous or with the channels innermost; also several at once, since vmap knows one memory
    format."""
    if not channels_last:
        return gradient.contiguous()
    if are_several(gradient):
        return gradient.movedim(1, -1).contiguous().movedim(-1, 1)
    return gradient.contiguous(memory_format=torch.channels_last if gradient.ndim == 4 else torch.channels_last_3d)


def distinct(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as Dynamo lets them into `apply`: none twice (a residual is often the input itself)."""
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Tensor | None] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if repeated and tensor is not None else tensor)
    return tuple(found)
