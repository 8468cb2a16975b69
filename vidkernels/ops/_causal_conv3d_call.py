# SPDX-License-Identifier: Apache-2.0
"""Arguments of a causal convolution, checked and brought to one form."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vidkernels import _signature
from vidkernels._conv.geometry import (
    ACTIVATIONS,
    MODES,
    REPLICATE,
    SILU,
    ZEROS,
    Geometry,
    is_channels_last,
    output_size,
    tf32_allowed,
)
from vidkernels._tracing import active_transform
from vidkernels.errors import OptionError, ShapeError
from vidkernels.ops import _checks
from vidkernels.ops._autograd import needs_grad

TIME_PADDINGS = ("zeros", "replicate", "history", "none")


@dataclass(slots=True, eq=False)  # frozen, it would take 1 us longer to make
class Call:
    """One checked call: tensors, geometry, output size (t, h, w)."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    history: torch.Tensor | None
    residual: torch.Tensor | None
    geometry: Geometry
    activation: int
    size: tuple[int, int, int]

    @property
    def is_empty(self) -> bool:
        """Nothing to sum or nothing to write."""
        # Sizes one by one: a minimum would compare symbolic sizes with each other, and guard on the order.
        for size in (*self.size, *self.x.shape, self.weight.shape[0]):
            if size <= 0:
                return True
        return False

    def facts(self) -> tuple[Any, ...]:
        """What the backends' predicates look at."""
        frames = 0 if self.history is None else self.history.shape[2]
        return (
            self.x,
            self.weight.shape[0],
            tuple(self.weight.shape[2:]),
            *_flat(self.geometry),
            frames,
            self.activation,
            self.residual is not None,
        )

    def empty_result(self) -> torch.Tensor:
        """The result without a kernel: no elements, or no input channels, where the sum is the bias alone."""
        y = empty_result(self.x, self.weight, self.bias, self.size)
        if self.activation == SILU:
            y = torch.nn.functional.silu(y)
        return y if self.residual is None else y + self.residual

    def reference(self, function: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The same call on the reference."""
        g = self.geometry
        front, back, top, bottom, left, right = g.padding
        return function(
            *(self.x, self.weight, self.bias),
            stride=g.stride,
            dilation=g.dilation,
            time_padding="replicate" if g.time_mode == REPLICATE else "zeros",
            history=self.history,
            pad_frames=(front, back),
            spatial_padding=(left, right, top, bottom),
            spatial_padding_mode="replicate" if g.space_mode == REPLICATE else "zeros",
            activation="silu" if self.activation == SILU else None,
            residual=self.residual,
        )


def empty_result(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: Sequence[int]) -> torch.Tensor:
    """A convolution's result of `size` (t, h, w) where there is nothing to sum: the bias."""
    # vmap knows one memory format.
    plain = active_transform() is None
    memory_format = torch.channels_last_3d if plain and is_channels_last(x) else torch.contiguous_format
    shape = [x.shape[0], weight.shape[0], *(max(s, 0) for s in size)]
    # Products with the inputs keep the result in the autograd graph, with zero gradients.
    anchor = x.sum() * 0 + weight.sum() * 0
    y = torch.zeros(shape, dtype=x.dtype, device=x.device).to(memory_format=memory_format) + anchor
    return y if bias is None else y + bias[:, None, None, None]


def _flat(g: Geometry) -> tuple[Any, ...]:
    return g.stride, g.dilation, g.padding, g.time_mode, g.space_mode


def triple(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    """One positive int per axis."""
    values = _repeated(value, 3, 1)
    if values is None or len(values) != 3:
        raise OptionError(name, "a positive int or three of them (t, h, w)", repr(value))
    return values[0], values[1], values[2]


def _repeated(value: object, count: int, least: int) -> tuple[int, ...] | None:
    """The ints of a sequence, or one int so many times; None if there is something else, or one below `least`."""
    if isinstance(value, (tuple, list)):
        return _checks.whole_numbers(value, least)
    one = _checks.whole_number(value, least)
    return (one,) * count if one is not None else _checks.whole_numbers(value, least)


def frame_padding(
    kernel: int, stride: int, dilation: int, pad_frames: int | tuple[int, int] | None, past: int | None
) -> tuple[int, int]:
    """Frames (in front, behind); `past` is the history's length where it alone decides, otherwise None."""
    if pad_frames is None:
        return (max((kernel - 1) * dilation + 1 - stride, 0) if past is None else past), 0
    one = _checks.whole_number(pad_frames, 0)
    frames = (one, 0) if one is not None else _checks.whole_numbers(pad_frames, 0)
    if frames is None or len(frames) != 2:
        raise OptionError("pad_frames", "frames in front, or (in front, behind), at least 0", repr(pad_frames))
    return frames[0], frames[1]


def space_padding(
    kernel: Sequence[int], dilation: Sequence[int], padding: int | tuple[int, ...] | None
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) from the public argument."""
    if padding is None:
        height, width = (kernel[0] - 1) * dilation[0], (kernel[1] - 1) * dilation[1]
        return height // 2, height - height // 2, width // 2, width - width // 2
    values = _repeated(padding, 2, 0)
    if values is None or len(values) not in (2, 4):
        raise OptionError("spatial_padding", "an int, (h, w) or (left, right, top, bottom), at least 0", repr(padding))
    if len(values) == 2:
        return values[0], values[0], values[1], values[1]
    left, right, top, bottom = values
    return top, bottom, left, right


def check_tensors(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, history: torch.Tensor | None
) -> None:
    """Dimensions, channels, dtypes and devices fit together."""
    _checks.check_floating("x", x)
    _checks.check_ndim("x", x, 5)
    _checks.check_floating("weight", weight)
    _checks.check_ndim("weight", weight, 5)
    if weight.shape[1] != x.shape[1]:
        expected = f"size {x.shape[1]} at axis 1, the channels of x {tuple(x.shape)}"
        raise ShapeError("weight", expected, f"{weight.shape[1]} (shape {tuple(weight.shape)})")
    if min(weight.shape[2:]) < 1:
        raise ShapeError("weight", "at least one tap along every axis", tuple(weight.shape))
    if bias is not None:
        _checks.check_shape("bias", bias, (weight.shape[0],), "[K], one per filter of weight")
    if history is not None:
        _checks.check_ndim("history", history, 5)
        shape = (*x.shape[:2], history.shape[2], *x.shape[3:])
        _checks.check_shape("history", history, shape, "[B, C, P, H, W] around x")
    for name, tensor in (("weight", weight), ("bias", bias), ("history", history)):
        if tensor is not None:
            _checks.check_same_dtype(name, tensor, "x", x)
            _checks.check_same_device(name, tensor, "x", x)


def autocast(
    x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """x, weight and (others) as torch's convolutions take them under autocast: everything in the lower precision."""
    for name, tensor in (("x", x), ("weight", weight)):
        _checks.check_tensor(name, tensor)
    dtype = _checks.autocast_dtype(x)
    if dtype is None or not x.dtype.is_floating_point or x.dtype == torch.float64:
        return x, weight, others
    if weight.is_cuda and weight.ndim == 5 and weight.dtype != dtype and is_channels_last(x):
        # Laid out in the same pass, as every kernel there reads it: a pass less forward, up to two backward.
        weight = weight.to(dtype, memory_format=torch.channels_last_3d)
    return x.to(dtype), weight.to(dtype), tuple(None if t is None else t.to(dtype) for t in others)


def signature(options: tuple[object, ...], x: torch.Tensor, *others: torch.Tensor | None) -> Hashable:
    """The key of a convolution's call, see `_signature`; on a GPU that of float32 knows whether TF32 is allowed."""
    key = _signature.signature(options, x, *others)
    return (key, tf32_allowed()) if key is not None and x.dtype is torch.float32 and x.is_cuda else key


def dense(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A bias as kernels read it: values that are neighbours."""
    return None if bias is None else bias.contiguous()


def check_fit(size: Sequence[int], x: torch.Tensor, kernel: Sequence[int]) -> None:
    """The kernel fits at least once into padded frames; size is that of the result (t, h, w)."""
    for axis, name in ((1, "height"), (2, "width")):
        if size[axis] < 1 and x.shape[2 + axis] > 0:
            raise ShapeError(
                "x", f"a padded {name} of at least the kernel's {kernel[axis]}", x.shape[2 + axis], "Pad more."
            )


def prepare(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int | tuple[int, int, int] = 1,
    dilation: int | tuple[int, int, int] = 1,
    time_padding: str = "zeros",
    history: torch.Tensor | None = None,
    pad_frames: int | tuple[int, int] | None = None,
    spatial_padding: int | tuple[int, ...] | None = None,
    spatial_padding_mode: str = "zeros",
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    return_history: bool = False,
) -> Call:
    """Check the arguments of `ops.causal_conv3d`; raises its errors."""
    x, weight, (bias, history, residual) = autocast(x, weight, bias, history, residual)
    check_tensors(x, weight, bias, history)
    _checks.check_option("time_padding", time_padding, TIME_PADDINGS)
    _checks.check_option("spatial_padding_mode", spatial_padding_mode, MODES)
    _checks.check_option("activation", activation, ACTIVATIONS)
    _checks.check_flag("return_history", return_history)
    stride, dilation = triple("stride", stride), triple("dilation", dilation)
    kernel = tuple(weight.shape[2:])
    if time_padding == "history" and history is None:
        raise OptionError(
            "history", "the frames before x for time_padding='history'", None, "Pass history=, or pad otherwise."
        )
    if time_padding == "none" and (history is not None or pad_frames is not None):
        raise OptionError("time_padding", "a rule other than 'none' with history or pad_frames", "'none'", "Drop one.")
    past = 0 if time_padding == "none" else None
    if time_padding == "history" and history is not None:
        past = history.shape[2]
    front, back = frame_padding(kernel[0], stride[0], dilation[0], pad_frames, past)
    if past is not None and past < front:
        raise ShapeError(
            "history", f"at least {front} frames", past, "Pass time_padding='zeros' to fill up with zeros."
        )
    history = _trim(history, front)
    time_mode = REPLICATE if time_padding == "replicate" else ZEROS
    if time_mode == REPLICATE and front + back > 0 and x.shape[2] == 0 and history is None:
        raise ShapeError(
            "x", "at least one frame to replicate", tuple(x.shape), "Pass history=, or time_padding='zeros'."
        )
    if return_history and back > 0:
        raise OptionError(
            "return_history", "False where frames are padded behind", True, "Streaming needs causal padding."
        )
    if return_history and stride[0] > dilation[0] * (kernel[0] - 1) + 1:
        raise OptionError(
            "return_history",
            "a temporal stride within the kernel's extent",
            stride[0],
            "The next chunk would skip frames.",
        )
    padding = (front, back, *space_padding(kernel[1:], dilation[1:], spatial_padding))
    geometry = Geometry(stride, dilation, padding, time_mode, MODES[spatial_padding_mode])
    frames, height, width = output_size(x.shape[2:], kernel, stride, dilation, padding)
    size = (frames, height, width)
    check_fit(size, x, kernel)
    call = Call(x, weight, bias, history, None, geometry, ACTIVATIONS[activation], size)
    return call if residual is None else replace(call, residual=_checked_residual(call, residual))


def _trim(history: torch.Tensor | None, front: int) -> torch.Tensor | None:
    if history is None or history.shape[2] == 0 or front == 0:
        return None
    return history if history.shape[2] <= front else history[:, :, history.shape[2] - front :]


def _checked_residual(call: Call, residual: torch.Tensor) -> torch.Tensor:
    shape = (call.x.shape[0], call.weight.shape[0], *(max(s, 0) for s in call.size))
    _checks.check_shape("residual", residual, shape, "the shape of the result")
    _checks.check_same_dtype("residual", residual, "x", call.x)
    _checks.check_same_device("residual", residual, "x", call.x)
    return residual


def check_out(call: Call, out: torch.Tensor) -> None:
    """`out` can receive the result of a call."""
    _checks.check_tensor("out", out)
    shape = (call.x.shape[0], call.weight.shape[0], *(max(s, 0) for s in call.size))
    _checks.check_shape("out", out, shape, "the shape of the result")
    _checks.check_same_dtype("out", out, "x", call.x)
    _checks.check_same_device("out", out, "x", call.x)
    inputs = call.x, call.weight, call.bias, call.history, call.residual, out
    if needs_grad(*inputs):
        raise OptionError(
            "out", "no gradients", "inputs that need them", "Call under torch.no_grad(), or without out=."
        )
    if _checks.may_overlap(out):
        raise OptionError("out", "memory of its own for each element", f"strides {out.stride()}", "Clone it.")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise OptionError("out", "a tensor made outside of torch.inference_mode()", "one made inside", "Clone it.")
    for name, read in (("x", call.x), ("weight", call.weight), ("bias", call.bias), ("history", call.history)):
        if read is not None and out.numel() and _checks.starts_alike(out, read):
            raise OptionError("out", f"other memory than that of {name}", "the same", "Only the residual may be it.")


def next_history(call: Call) -> torch.Tensor:
    """Frames of the stream (padding, history, x) that the outputs so far have not left behind; a fresh tensor."""
    x, front = call.x, call.geometry.padding[0]
    begin = max(call.size[0], 0) * call.geometry.stride[0] - front
    if begin >= 0:
        return x[:, :, begin:].clone()
    past = x[:, :, :0] if call.history is None else call.history
    missing = -begin - past.shape[2]
    if missing <= 0:
        return torch.cat([past[:, :, -missing:], x], 2)
    oldest = (past if past.shape[2] else x)[:, :, :1].expand(-1, -1, missing, -1, -1)
    filling = (
        oldest
        if call.geometry.time_mode == REPLICATE
        else oldest.new_zeros(x.shape[0], x.shape[1], missing, *x.shape[3:])
    )
    return torch.cat([filling, past, x], 2)
