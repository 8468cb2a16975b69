# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the public ops. Each raises a typed error that names argument, expected, got and remedy."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Iterable, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from vidkernels.errors import DeviceError, DTypeError, OptionError, ShapeError

_PROXY = torch._C._TorchDispatchModeKey.PROXY
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_STRIDED = torch.strided
# Sizes, steps and paddings beyond it overflow in products, and no tensor has them.
_LARGEST = 2**31 - 1


def is_unread(x: torch.Tensor) -> bool:
    """Whether a check leaves the values of `x` alone: a device would have to be waited for, graphs and fakes have none."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return True
    return is_proxied()


def is_proxied() -> bool:
    """Whether `make_fx` records torch's ops: their results have no values, and what is written in place is not recorded as such.
    `torch.export` and `torch.compile` trace otherwise, and are told by `is_compiling`."""
    return torch._C._get_dispatch_mode(_PROXY) is not None


def check_tensor(name: str, value: object) -> None:
    """`value` is a dense tensor."""
    if not isinstance(value, torch.Tensor):
        raise DTypeError(name, "a torch.Tensor", type(value).__name__, "Convert it with torch.as_tensor.")
    if value.layout != _STRIDED or value.is_nested:
        got = "a nested tensor" if value.is_nested else value.layout
        raise DTypeError(name, "a dense tensor", got, f"Convert it: {name}.to_dense(), or pack it.")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """`tensor` is float32, float64, bfloat16 or float16."""
    check_tensor(name, tensor)
    if tensor.dtype not in _FLOATING:
        raise DTypeError(name, "float32, float64, bfloat16 or float16", tensor.dtype, f"Convert it: {name}.float().")


def check_integer(name: str, tensor: torch.Tensor) -> None:
    """`tensor` holds integers."""
    check_tensor(name, tensor)
    if tensor.dtype not in _INTEGERS:
        raise DTypeError(name, "an integer dtype", tensor.dtype, f"Convert it: {name}.long().")


def check_same_dtype(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Both tensors have one dtype."""
    if tensor.dtype != other.dtype:
        raise DTypeError(
            name,
            f"the dtype of {other_name}, {other.dtype}",
            tensor.dtype,
            f"Convert it: {name}.to({other_name}.dtype).",
        )


def check_same_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Both tensors live on one device."""
    if tensor.device != other.device:
        raise DeviceError(
            name,
            f"the device of {other_name}, {other.device}",
            tensor.device,
            f"Move it: {name}.to({other_name}.device).",
        )


def check_option(name: str, value: object, allowed: Iterable[object]) -> None:
    """`value` is one of `allowed`."""
    allowed = tuple(allowed)
    # An array equals an option element by element; a nested tensor does not even say whether it has a shape.
    if isinstance(value, torch.Tensor) or hasattr(value, "shape") or value not in allowed:
        raise OptionError(name, f"one of {', '.join(map(repr, allowed))}", repr(value), "Choose one of those.")


def check_flag(name: str, value: object) -> None:
    """`value` is True or False: the truth of anything else, "False" among them, is an accident."""
    if value is not True and value is not False:
        raise OptionError(name, "True or False", repr(value), "Convert it with bool() if that is meant.")


def is_finite(value: object) -> bool:
    """Whether a value is a finite number, also of numpy or of a graph, that a float can hold."""
    is_number = isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real))
    return is_number and -sys.float_info.max <= value <= sys.float_info.max  # type: ignore[operator]


def check_number(name: str, value: object, least: float = float("-inf"), remedy: str = "") -> None:
    """`value` is a finite number of at least `least`, also of numpy or of a graph."""
    if not is_finite(value) or value < least:  # type: ignore[operator]
        expected = "a finite number" if least == float("-inf") else f"a number of at least {least:g}"
        raise OptionError(name, expected, repr(value), remedy)


def check_fits(name: str, value: object, dtype: torch.dtype) -> None:
    """`value` is a finite number that a tensor of `dtype` can be filled with."""
    check_number(name, value)
    if dtype == torch.bool:
        return
    limits = torch.finfo(dtype) if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype)
    if not limits.min <= value <= limits.max:  # type: ignore[operator]
        raise OptionError(name, f"a number from {limits.min:g} to {limits.max:g}, as {dtype} has them", repr(value))


def check_positive(name: str, value: object) -> float:
    """`value` as a positive float."""
    if not is_finite(value) or not value > 0:  # type: ignore[operator]
        raise OptionError(name, "a positive number", repr(value))
    return float(value)  # type: ignore[arg-type]


def is_whole(value: object, least: int = 1) -> bool:
    """Whether a value is a whole number of at least `least`, also of numpy; True and False are none."""
    return isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool) and int(value) >= least


def check_whole(name: str, value: object, least: int = 1) -> None:
    """`value` is a whole number of at least `least`."""
    if not is_whole(value, least):
        raise OptionError(name, f"a whole number of at least {least}", repr(value))


def whole_number(value: object, least: int) -> int | None:
    """A size, step or padding as an int from `least` to 2^31 - 1, also of numpy or of a graph; None if it is none."""
    if type(value) is int:  # 0.3 us less, and a convolution asks 12 times
        return value if least <= value <= _LARGEST else None
    if not isinstance(value, (int, torch.SymInt)):
        if not isinstance(value, numbers.Integral):
            return None
        value = int(value)
    return None if isinstance(value, bool) or not least <= value <= _LARGEST else value  # type: ignore[return-value]


def whole_numbers(values: object, least: int) -> tuple[int, ...] | None:
    """The same of a tuple or list; None if one of them is none."""
    if not isinstance(values, (tuple, list, Sequence)) or isinstance(values, str):
        return None
    found = []
    for value in values:
        number = whole_number(value, least)
        if number is None:
            return None
        found.append(number)
    return tuple(found)


def check_sizes(**sizes: object) -> None:
    """Each is a whole number from 1 to 2^31 - 1: a width, a count of channels or heads."""
    for name, value in sizes.items():
        if whole_number(value, 1) is None:
            raise OptionError(name, "a whole number of at least 1", repr(value))


def check_flags(**flags: object) -> None:
    """Each is True or False."""
    for name, value in flags.items():
        check_flag(name, value)


def check_projected(name: str, x: torch.Tensor, width: int, layer: object) -> None:
    """`x` is what a projection reads: `width` channels at the last axis, in its weight's dtype (but for autocast) and device."""
    check_floating(name, x)
    if x.ndim < 1 or x.shape[-1] != width:
        raise ShapeError(name, f"{width} channels at the last axis", tuple(x.shape))
    if type(layer) is torch.nn.Linear:  # layers of other libraries convert as they like
        check_same_device(name, x, "weight", layer.weight)
        if autocast_dtype(x) is None:
            check_same_dtype(name, x, "weight", layer.weight)


def check_callable(name: str, value: object, meaning: str) -> None:
    """`value` can be called."""
    if not callable(value):
        raise OptionError(name, meaning, repr(value))


def check_dim(name: str, dim: object, ndim: int) -> int:
    """`dim` as a non-negative axis of `name`, which has `ndim` axes."""
    if type(dim) is not int:
        if not isinstance(dim, numbers.Integral) or isinstance(dim, bool):
            raise OptionError("dim", f"an int, an axis of {name}", repr(dim))
        dim = int(dim)
    if not -ndim <= dim < ndim:
        if not ndim:
            raise ShapeError(name, "at least one axis", "a scalar")
        raise ShapeError("dim", f"an axis of {name}, {-ndim} to {ndim - 1}", dim)
    return dim % ndim


def check_eps(eps: object) -> None:
    """`eps` is a number that keeps a variance positive."""
    check_number("eps", eps, 0, "The usual value is 1e-6.")


def check_ndim(name: str, tensor: torch.Tensor, low: int, high: int | None = None) -> None:
    """`tensor` has between `low` and `high` dimensions (exactly `low` if `high` is None)."""
    check_tensor(name, tensor)
    high = low if high is None else high
    if not low <= tensor.ndim <= high:
        expected = f"{low} dimensions" if low == high else f"{low} to {high} dimensions"
        raise ShapeError(
            name, expected, f"{tensor.ndim} (shape {tuple(tensor.shape)})", "Reshape it or add the missing axes."
        )


def check_size(name: str, tensor: torch.Tensor, dim: int, size: int) -> None:
    """Axis `dim` of `tensor` has length `size`."""
    if tensor.shape[dim] != size:
        axes = [axis for axis in range(dim + 1, tensor.ndim) if tensor.shape[axis] == size]
        remedy = f"Axis {axes[0]} has {size}: {name}.movedim({axes[0]}, {dim})." if len(axes) == 1 else ""
        got = f"{tensor.shape[dim]} (shape {tuple(tensor.shape)})"
        raise ShapeError(name, f"size {size} at axis {dim}", got, remedy)


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """`tensor` has exactly this shape; `meaning` says what the sizes are, e.g. `[B, C] of x`."""
    check_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(name, f"shape {tuple(shape)} ({meaning})", tuple(tensor.shape))


def may_overlap(x: torch.Tensor) -> bool:
    """Whether elements of `x` may share memory (expanded tensors, sliding windows), so that nothing can be written there."""
    if torch.compiler.is_compiling():  # an order of symbolic strides would be guarded on
        return any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True))
    reach = 0
    for step, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return x.numel() > 0
            reach += step * (size - 1)
    return False


def starts_alike(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors begin at one place of one memory; not known while a graph is traced."""
    if torch.compiler.is_compiling() or x.storage_offset() != other.storage_offset():
        return False
    return torch._C._is_alias_of(x, other)  # type: ignore[attr-defined,no-any-return]


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to products of tensors on x's device, or None where it is off or unknown (meta)."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
