# SPDX-License-Identifier: Apache-2.0
"""Cases of causal_conv3d's CUDA kernel, for a GPU and for the host (cuda_host): every tile of filters, borders that leave boxes
partly empty, channels that do not fill a step, frames that are padded, repeated or of the history."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_within_promise

from vidkernels import ops
from vidkernels._conv import cuda
from vidkernels._conv.geometry import NONE, REPLICATE, SILU, ZEROS
from vidkernels._reference import causal_conv3d as reference

ops.causal_conv3d  # defines the bare op  # noqa: B018
# x, filters and frames of taps, then options
Case = tuple[tuple[int, ...], int, int, dict[str, Any]]
DTYPES = cuda.DTYPES
CASES: dict[str, Case] = {
    "96": ((1, 40, 2, 17, 33), 96, 3, {"bias": True}),
    "96-epilogue": ((1, 8, 1, 9, 35), 96, 1, {"bias": True, "activation": "silu", "residual": True}),
    "128-history": ((2, 32, 1, 5, 26), 128, 3, {"history": 2, "residual": True}),
    "160-repeated": ((1, 16, 2, 18, 15), 160, 3, {"history": 1, "time_padding": "replicate", "activation": "silu"}),
    "192-borders": ((1, 24, 1, 17, 9), 192, 1, {"spatial_padding_mode": "replicate", "bias": True}),
    "192-both-sides": ((1, 8, 3, 4, 4), 192, 3, {"pad_frames": (1, 1)}),
    "two-tiles": ((1, 8, 2, 8, 40), 256, 2, {"bias": True}),
    "valid": ((1, 8, 3, 11, 12), 96, 3, {"spatial_padding": 0, "pad_frames": 0}),
    "nothing-but-padding": ((1, 8, 1, 5, 5), 96, 2, {"pad_frames": (4, 0), "bias": True}),
}
# Of x, whose channels are then the filters.
GRADIENTS: dict[str, Case] = {
    "96": ((1, 96, 2, 17, 33), 16, 3, {}),
    "96-one-tap": ((1, 96, 2, 9, 35), 8, 1, {}),
    "128-valid": ((1, 128, 3, 11, 12), 8, 3, {"spatial_padding": 0, "pad_frames": 0}),
    "160-both-sides": ((1, 160, 3, 4, 4), 24, 3, {"pad_frames": (1, 1)}),
    "160-padded-beyond": ((1, 160, 2, 5, 5), 8, 2, {"pad_frames": (4, 0)}),
    "192-history": ((2, 192, 1, 5, 26), 8, 3, {"history": 2, "time_padding": "replicate"}),
    "192-no-frames": ((1, 192, 0, 5, 5), 8, 3, {"history": 4}),
    "96-no-results": ((1, 96, 1, 5, 5), 8, 3, {"pad_frames": 0}),
}


def material(case: Case, dtype: torch.dtype, device: str) -> tuple[list[torch.Tensor | None], dict[str, Any]]:
    """x, weight, bias, history and residual in `dtype`, and the rest as arguments of `ops.causal_conv3d`."""
    torch.manual_seed(3)
    shape, filters, taps, options = case
    options = dict(options)
    make = {"dtype": dtype, "device": device}
    last = {"memory_format": torch.channels_last_3d}
    x = torch.randn(shape, **make).contiguous(**last)
    weight = torch.randn(filters, shape[1], taps, 3, 3, **make) / (9 * taps * shape[1]) ** 0.5
    bias = torch.randn(filters, **make) if options.pop("bias", False) else None
    frames = options.pop("history", 0)
    history = torch.randn(shape[0], shape[1], frames, *shape[3:], **make).contiguous(**last) if frames else None
    residual = None
    if options.pop("residual", False):
        size = reference.causal_conv3d(x, weight, history=history, **options).shape
        residual = torch.randn(size, **make).contiguous(**last)
    return [x, weight, bias, history, residual], options


def rule(weight: torch.Tensor, options: dict[str, Any]) -> tuple[Any, ...]:
    """Stride, dilation, padding, time_mode and space_mode of the bare ops."""
    front = options.get("pad_frames", weight.shape[2] - 1)
    times = (front, 0) if isinstance(front, int) else front
    space = options.get("spatial_padding", 1)
    mode = {"zeros": ZEROS, "replicate": REPLICATE}
    modes = mode[options.get("time_padding", "zeros")], mode[options.get("spatial_padding_mode", "zeros")]
    ones, padding = (1, 1, 1), (*times, *(space,) * 4)
    return ones, ones, padding, *modes


def launch(tensors: list[torch.Tensor | None], options: dict[str, Any], **more: Any) -> torch.Tensor:
    """The backend's launcher itself, past the choice of a backend."""
    x, weight, bias, history, residual = tensors
    assert x is not None and weight is not None
    activation = SILU if options.get("activation") else NONE
    return cuda.causal_conv3d_fwd(x, weight, bias, history, residual, *rule(weight, options), activation, **more)


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Within the promise, and so where `out` is poisoned, weights are laid out otherwise and x is a slice."""
    tensors, options = material(case, dtype, device)
    x, weight, bias, history, residual = tensors
    named = dict(bias=bias, history=history, residual=residual, **options)
    wide = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in named.items()}
    same = reference.causal_conv3d(x, weight, **named)
    truth = reference.causal_conv3d(x.double(), weight.double(), **wide)
    y = launch(tensors, options)
    assert_within_promise(y, same, truth)
    poisoned = torch.full_like(y, torch.nan)
    tensors[0] = torch.stack([x, x], 1)[:, 0].contiguous(memory_format=torch.channels_last_3d)
    tensors[1] = weight.contiguous(memory_format=torch.channels_last_3d)
    assert launch(tensors, options, out=poisoned) is poisoned
    assert torch.equal(poisoned, y)


def check_gradient(case: Case, dtype: torch.dtype, device: str) -> None:
    """Gradients of x and history within the promise, by the kernel itself."""
    (x, weight, _, history, _), options = material(case, dtype, device)
    assert x is not None and weight is not None

    def differentiated(wide: torch.dtype) -> tuple[torch.Tensor, ...]:
        inputs = [t.to(wide).requires_grad_(True) for t in (x, history) if t is not None]
        past = inputs[1] if history is not None else None
        y = reference.causal_conv3d(inputs[0], weight.to(wide), history=past, **options)
        return torch.autograd.grad(y, inputs, grad.to(wide))

    same = reference.causal_conv3d(x, weight, history=history, **options)
    grad = torch.randn_like(same).contiguous(memory_format=torch.channels_last_3d)
    frames = 0 if history is None else history.shape[2]
    ours = cuda.causal_conv3d_dgrad(grad, weight, x.shape, frames, *rule(weight, options))
    found = [gradient for gradient in ours if gradient is not None]
    for mine, near, truth in zip(found, differentiated(dtype), differentiated(torch.float64), strict=True):
        assert_within_promise(mine, near, truth)


def check_chunks(mode: str, device: str) -> None:
    """Frames in front of a chunk as history give the bits of the whole clip."""
    (x, weight, *rest), options = material(((1, 40, 5, 9, 20), 96, 3, {"time_padding": mode}), torch.bfloat16, device)
    assert x is not None
    whole = launch([x, weight, *rest], options)
    for sizes in ([1, 4], [2, 1, 2]):
        parts, end = [], 0
        for count in sizes:
            chunk, past = x[:, :, end : end + count], x[:, :, max(0, end - 2) : end]
            parts.append(launch([chunk, weight, None, past if end else None, None], options))
            end += count
        assert torch.equal(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_chunks_of_boxes(mode: str) -> None:
    check_chunks(mode, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRADIENTS.values(), ids=list(GRADIENTS))
def test_gradients_of_boxes(case: Case, dtype: torch.dtype) -> None:
    check_gradient(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_boxes(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cpu")


def test_buffers_of_many_programs() -> None:
    """Blocks make several boxes one after the other (the host has 4 multiprocessors): buffers go round, across boxes."""
    check(((1, 8, 2, 40, 20), 192, 2, {"bias": True}), torch.bfloat16, "cpu")
