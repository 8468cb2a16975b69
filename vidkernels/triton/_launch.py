# SPDX-License-Identifier: Apache-2.0
"""Launches of Triton kernels that repeat an earlier one with other addresses.

Triton's own launch binds about 60 arguments, specializes each, looks the kernel up by a text of its options and encodes
every descriptor in Python: most of the 75 us that a convolution's launcher took on this project's CPU machine (17 with this
file), and more on an H200's host, where patched video VAEs waited for it (VidTok's decoder of 20 x 256 x 256: 67 ms for 31
ms of kernels). A launcher that can name all that its arguments depend on (shapes, strides, alignments, options) asks here
first: what is left then is a look-up and one call of `csrc/common/kernel_launch.cpp`, which fills in addresses and calls
the driver.

The first launch of its kind is always Triton's; whatever this file does not know about a kernel (scratch memory, clusters,
launch hooks of profilers, another vendor) stays Triton's, too. `VIDKERNELS_TRITON_LAUNCH=1` leaves it every launch.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vidkernels import _env, _library

_MOST_ARGUMENTS, _MOST_MAPS, _MOST_AXES = 128, 8, 5
_NUMBER, _TENSOR, _TENSOR_MAP = 0, 1, 2
_INTEGERS = ("i1", "i8", "i16", "i32", "i64", "u1", "u8", "u16", "u32", "u64")
_INVALID_CONTEXT = 201  # a thread that has not called the CUDA runtime yet
# Launches of one process: a model has a few hundred a size of its clips. Past this they are forgotten all at once.
_MOST_LAUNCHES = 4096
_NONE = id(None)
# Facts of a compiled kernel whose launch needs more than a grid, threads and shared memory.
_UNKNOWN = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")


class _Argument(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int64), ("value", ctypes.c_int64))


class _TensorMap(ctypes.Structure):
    _fields_ = (
        ("tensor", ctypes.c_int32), ("dtype", ctypes.c_int32), ("rank", ctypes.c_int32), ("swizzle", ctypes.c_int32),
        ("sizes", ctypes.c_uint64 * _MOST_AXES), ("strides", ctypes.c_uint64 * _MOST_AXES), ("box", ctypes.c_uint32 * _MOST_AXES),
    )  # fmt: skip


class _Plan(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_void_p), ("grid", ctypes.c_uint32 * 3), ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32), ("argument_count", ctypes.c_int32), ("map_count", ctypes.c_int32),
        ("arguments", _Argument * _MOST_ARGUMENTS), ("maps", _TensorMap * _MOST_MAPS),
    )  # fmt: skip


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL | None:
    """The compiled launch; None where Triton launches everything itself."""
    if _env.TRITON_LAUNCH or _env.TRITON_INTERPRET or torch.version.hip or not torch.cuda.is_available():
        return None
    if _library.cpu_missing is not None:
        return None
    library = ctypes.CDLL(str(_library.folder() / "libvidkernels_cpu.so"))
    try:
        library.vidkernels_launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        library.vidkernels_launch_error.restype = ctypes.c_char_p
    except AttributeError:  # a library of an earlier version
        return None
    return library


@lru_cache(maxsize=1)
def _hooks() -> Any:
    """Triton's run-time settings, or None in a version that keeps its launch hooks elsewhere."""
    try:
        from triton import knobs
    except ImportError:
        return None
    return knobs.runtime


def _watched() -> bool:
    """Whether a profiler wants to see Triton's launches."""
    hooks = _hooks()
    return hooks is None or bool(hooks.launch_enter_hook.calls) or bool(hooks.launch_exit_hook.calls)


class _Launch:
    """A kernel with all its arguments but the addresses of `count` tensors. Keeps the kernel loaded."""

    def __init__(self, kernel: Any, plan: _Plan, count: int) -> None:
        self.kernel, self.plan = kernel, plan
        self.address = ctypes.addressof(plan)
        self.addresses = ctypes.c_uint64 * count


def _current_device() -> int:
    return torch.cuda.current_device() if _driver() is not None else -1


_launches: dict[Any, _Launch | None] = {}


def signature(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What a launch can depend on in its tensors, besides their addresses; the first one is there.

    That includes which of them are one tensor: a launch looks for the place of each argument among them.
    """
    found: list[Any] = [_current_device()]
    objects = []
    for x in tensors:
        found.append(None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() & 15))
        objects.append(id(x))
    given = [x for x in objects if x != _NONE]
    if len(set(given)) < len(given):
        found.append(tuple(map(given.index, given)))
    return tuple(found)


def repeat(key: Any, tensors: Sequence[Tensor | None]) -> bool:
    """Launch what was launched for `key`, on these tensors and the current stream. False: there is nothing to repeat."""
    known = _launches.get(key)
    if known is None or _watched():
        return False
    addresses = known.addresses(*[0 if x is None else x.data_ptr() for x in tensors])
    library: Any = _driver()
    error = library.vidkernels_launch(
        known.address, torch._C._cuda_getCurrentRawStream(torch.cuda.current_device()), addresses
    )
    if error == 0:
        return True
    if error == _INVALID_CONTEXT:
        return False  # Triton makes one
    name = library.vidkernels_launch_error(error).decode()
    raise RuntimeError(f"{known.kernel.name}: the CUDA driver answered {name} ({error}) to a launch")


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: Sequence[Any],
    options: Mapping[str, Any],
    key: Any = None,
    tensors: Sequence[Tensor | None] = (),
) -> None:
    """`kernel[grid](*args, **options)`, remembered under `key` so that `repeat` can do it with other `tensors`.

    Args:
        key: (`signature` of the tensors, whatever else decides kernel, grid, args and options); None: nothing is remembered.
        tensors: all that occur in args, also as the base of a descriptor, as the same objects.
    """
    compiled = kernel[grid](*args, **options)
    if key is None or _driver() is None or key in _launches:
        return
    if len(_launches) >= _MOST_LAUNCHES:
        _launches.clear()
    _launches[key] = _prepared(compiled, grid, args, options, tensors)


def forget() -> None:
    """Drop all launches, for tests that replace what decides them."""
    _launches.clear()


def _prepared(
    compiled: Any,
    grid: tuple[int, ...],
    args: Sequence[Any],
    options: Mapping[str, Any],
    tensors: Sequence[Tensor | None],
) -> _Launch | None:
    """The launch that just happened; None if something in it is not known here."""
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    metadata = compiled.metadata
    if metadata.num_ctas != 1 or any(getattr(metadata, name, None) for name in _UNKNOWN):
        return None
    if getattr(metadata, "instrumentation_mode", None):
        return None
    names = compiled.src.fn.arg_names
    given = {**dict(zip(names, args, strict=False)), **options}
    plan = _Plan(function=compiled.function, threads=32 * metadata.num_warps, shared_bytes=metadata.shared)
    plan.grid[:] = (*grid, 1, 1)[:3]
    filler = _Filler(plan, list(tensors), list(getattr(metadata, "tensordesc_meta", None) or ()))
    if not all(filler.add(kind, given.get(name)) for name, kind in compiled.src.signature.items()):
        return None
    filler.numbers((0, 0))  # addresses of scratch memory, which a kernel without any ignores
    return _Launch(compiled, plan, len(tensors)) if filler.fits else None


class _Filler:
    """Arguments of a plan, in the order of the kernel's parameters."""

    def __init__(self, plan: _Plan, tensors: list[Tensor | None], descriptors: list[Mapping[str, Any]]) -> None:
        self.plan, self.tensors, self.descriptors = plan, tensors, descriptors
        self.fits = True

    def _append(self, kind: int, value: int) -> None:
        self.fits = self.fits and self.plan.argument_count < _MOST_ARGUMENTS
        if self.fits:
            self.plan.arguments[self.plan.argument_count] = _Argument(kind, value)
            self.plan.argument_count += 1

    def numbers(self, values: Sequence[int]) -> None:
        """Numbers of up to 64 bits."""
        for value in values:
            self._append(_NUMBER, value)

    def _place(self, tensor: Any) -> int | None:
        return next((i for i, known in enumerate(self.tensors) if known is not None and known is tensor), None)

    def add(self, kind: Any, value: Any) -> bool:
        """One parameter of Triton's type `kind`; False if it cannot be repeated."""
        if kind == "constexpr":
            return True
        if not isinstance(kind, str):
            return False
        if kind.startswith("tensordesc"):
            return self._add_map(value)
        if kind.startswith("*"):
            place = self._place(value)
            if place is not None:
                self._append(_TENSOR, place)
            return place is not None
        if kind in ("fp32", "f32"):
            self._append(_NUMBER, struct.unpack("<i", struct.pack("<f", value))[0])
        elif kind in _INTEGERS:
            self._append(_NUMBER, int(value))
        else:
            return False
        return True

    def _add_map(self, descriptor: Any) -> bool:
        """A descriptor: the map that bulk copies take, then its sizes and strides as numbers."""
        place, count = self._place(descriptor.base), self.plan.map_count
        dtypes = _host_dtypes()
        if place is None or count >= _MOST_MAPS or not self.descriptors or dtypes is None:
            return False
        facts = self.descriptors.pop(0)
        rank = len(descriptor.shape)
        plain = descriptor.padding == "zero" and not getattr(descriptor, "round_f32_to_tf32", False)
        if not plain or facts["fp4_padded"] or facts.get("is_im2col", False) or len(facts["block_size"]) != rank:
            return False
        size = facts["elem_size"]
        entry = _TensorMap(tensor=place, dtype=dtypes[facts["elem_type"]], rank=rank, swizzle=facts["swizzle"])
        entry.sizes[:rank] = list(descriptor.shape)[::-1]
        entry.strides[: rank - 1] = [step * size for step in list(descriptor.strides)[-2::-1]]
        entry.box[:rank] = list(facts["block_size"])[::-1]
        self.plan.maps[count] = entry
        self.plan.map_count += 1
        self._append(_TENSOR_MAP, count)
        self.numbers((*descriptor.shape, *descriptor.strides))
        return True


@lru_cache(maxsize=1)
def _host_dtypes() -> Mapping[int, int] | None:
    """CUtensorMapDataType of the numbers in Triton's metadata."""
    from importlib import import_module

    try:
        driver: ModuleType = import_module("triton.backends.nvidia.driver")
    except ImportError:
        return None
    found: Mapping[int, int] | None = getattr(driver, "TMA_DTYPE_DEVICE_TO_HOST", None)
    return found
