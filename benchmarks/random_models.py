# SPDX-License-Identifier: Apache-2.0
"""Models with random weights for whole-model cases."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.phases import phase


def build(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """`make()` with seed 0, made on the device and in the dtype (fake parameters cannot be converted afterwards), in eval mode.

    Parameters that start at zero (gates, ends of residual branches) would leave most of a model out of its result: they
    get small random values.
    """
    with phase("build", device):
        return _build(make, device, dtype)


def _build(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make()
    finally:
        torch.set_default_dtype(before)
    model = model.eval().requires_grad_(False)
    _gather(model, device)
    for parameter in model.parameters():
        if not parameter.is_meta and not isinstance(parameter, FakeTensor) and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def _gather(model: torch.nn.Module, device: torch.device) -> None:
    """Bring to the device what `torch.Tensor([...])` has made elsewhere, as diffusers' VidTok does with its mix_factor: that
    constructor knows no `torch.device` around it, and the first product on a GPU would fail."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type != device.type and not isinstance(parameter, FakeTensor):
                setattr(module, name, torch.nn.Parameter(parameter.to(device), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device.type != device.type and not isinstance(buffer, FakeTensor):
                setattr(module, name, buffer.to(device))


def compile_blocks(model: Any) -> Any:
    """The model with each block of its repeated ones compiled in place: one compilation serves blocks that are alike, where
    28 or 30 of them in one graph take minutes. What diffusers' `compile_repeated_blocks` does, for models without it too.
    """
    lists = [child for child in model.children() if isinstance(child, torch.nn.ModuleList)]
    for block in (block for blocks in lists for block in blocks):
        block.compile(dynamic=False)
    return model


def own_error(model: Any, call: Callable[[Any, Any], Any], inputs: dict[str, Any], wide: torch.dtype) -> Tensor:
    """Largest error of `call(model, inputs)` against the same weights in `wide`, over the result's largest value.

    Whole models in a wider dtype take a minute at the sizes people run, so inputs are a small crop.
    """
    widened = {k: v.to(wide) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = floating(call(model, inputs))
        exact = floating(call(copy.deepcopy(model).to(wide), widened))
    errors = [(x.to(wide) - y).abs().max() / y.abs().max() for x, y in zip(found, exact, strict=True)]
    return torch.stack(errors).max().double()


def floating(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of a result."""
    found = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [x for x in found if x.is_floating_point()]


def near_reference(actual: Sequence[Tensor], reference: Sequence[Tensor], truth: Sequence[Tensor]) -> str | None:
    """What a result within the promise can differ from eager: twice eager's own error (`truth`: `own_error` of a crop), that
    error, and a rounding.

    Tokens: in float32 a digit on a rounding boundary may fall on either side.
    """
    for index, (x, y) in enumerate(zip(actual, reference, strict=True)):
        if x.shape != y.shape:
            return f"tensor {index} has shape {tuple(x.shape)}, expected {tuple(y.shape)}"
        if not x.is_floating_point():
            share = (x == y).float().mean().item()
            if share < 0.99 and actual[0].dtype == torch.float32:
                return f"tensor {index}: {share:.2%} of the tokens are equal, at least 99 % are expected"
            continue
        limit = (3 * truth[0].item() + torch.finfo(x.dtype).eps) * y.abs().max().item()
        error = (x.double() - y.double()).abs().max().item()
        if not error <= limit:
            return f"tensor {index}: differs by {error:.3g}, allowed {limit:.3g}"
    return None
