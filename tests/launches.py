# SPDX-License-Identifier: Apache-2.0
"""Launches of Triton kernels as a GPU would get them, without one: specialised, compiled, checked, not run.

with launches.record("sm_90") as found:
    ops.fsq_quantize(torch.empty(1, 6, 8, 512, 512, device="meta"), LEVELS, backend="triton")
assert all(launch.report.spills == 0 for launch in found)

Public ops and whole models run on meta tensors of any size: their bare ops go to the launchers, and a stand-in for
Triton's driver takes what these launch. So the types, divisibilities and constants that a kernel is compiled for are those
of a real call, which hand-written signatures (`aot.compile_kernel`) only guess; and every new compilation is counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import aot
import torch

# Shared memory that a block can ask for. sm_80 stands for its relatives too (sm_86, sm_89: 99 KB).
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
# Triton caches kernels, with the driver's functions in them, by device: each driver has a number of its own.
_DEVICES = itertools.count(1000)
GRID = (2**31 - 1, 65535, 65535)
_ATTENTION = ("varlen_attention", "varlen_attention_bwd", "short_attention", "short_attention_bwd")
_MODULES_WITH_FAMILY = (*_ATTENTION, "_conv_configs", "_conv_phases", "_correlate", "causal_conv3d")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: kernel, grid, and the machine code it runs (one `report` object per compilation)."""

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    report: aot.Report


def compilations(found: list[Launch]) -> list[Launch]:
    """The first launch of each compilation."""
    return list({id(launch.report): launch for launch in reversed(found)}.values())[::-1]


def check_tensor_map(
    address: int,
    swizzle: int,
    element: int,
    kind: int,
    box: list[int],
    shape: list[int],
    strides: list[int],
    *rest: Any,
) -> str:
    """The rules of cuTensorMapEncodeTiled; its caller in Triton checks none of them but the alignment."""
    assert address % 16 == 0, f"address {address:#x} is not a multiple of 16"
    assert 1 <= len(shape) <= 5 and len(box) == len(shape) == len(strides)
    assert all(1 <= size < 2**31 for size in shape), shape  # the kernel takes them as int32
    assert all(0 < stride * element < 2**40 and stride * element % 16 == 0 for stride in strides[:-1]), strides
    assert all(1 <= size <= 256 for size in box), box
    inner = box[-1] * element
    assert inner % 16 == 0, f"a box is {inner} bytes wide"
    limit = {0: None, 1: 32, 2: 64, 3: 128}[swizzle]
    assert limit is None or inner <= limit, f"a box is {inner} bytes wide, swizzled over {limit}"
    return "tensor map"


class _Driver:
    """What Triton's runtime asks of a driver. Its functions on binaries and descriptors are under `utils`, as there."""

    def __init__(self, target: str, found: list[Launch]) -> None:
        self.target, self.found = target, found
        self.device = next(_DEVICES)
        self.utils = SimpleNamespace(
            load_binary=self._load_binary,
            get_device_properties=lambda device: {"max_shared_mem": SHARED[target], "multiprocessor_count": 132},
            fill_tma_descriptor=check_tensor_map,
            fill_tma_descriptor_tiled=check_tensor_map,
        )
        self._reports: dict[int, aot.Report] = {}

    def get_current_target(self) -> Any:
        return aot.gpu_target(self.target)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def _load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, int, int, int, int]:
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "kernel.cubin"
            binary.write_bytes(kernel)
            (report,) = aot.sass_report(binary).values()
        handle = len(self._reports) + 1
        self._reports[handle] = dataclasses.replace(report, shared=shared)
        return object(), handle, report.registers, report.spills, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        kinds = list(source.signature.values())
        maps = iter(getattr(metadata, "tensordesc_meta", None) or ())
        described = {i: next(maps, None) for i, kind in enumerate(kinds) if str(kind).startswith("tensordesc")}
        assert metadata.global_scratch_size == 0, "the kernel wants scratch memory: Triton would need an allocator"

        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            for i, arg in enumerate(rest[-len(kinds) :]):
                if i in described:
                    values = [arg, described[i]]
                    make_tensordesc_arg(*values, *[None] * (make_tensordesc_arg.__code__.co_argcount - 2))
                elif kinds[i] == "i32":
                    assert -(2**31) <= arg < 2**31, f"{source.fn.arg_names[i]} = {arg} does not fit int32"
            for size, most in zip((x, y, z), GRID, strict=True):
                assert 0 <= size <= most, f"{metadata.name}: grid {(x, y, z)}"
            self.found.append(Launch(metadata.name, (x, y, z), metadata.num_warps, self._reports[function]))

        return launch


@contextlib.contextmanager
def record(target: str = "sm_90") -> Iterator[list[Launch]]:
    """Within the block, Triton backends serve meta tensors as they would serve a GPU's; yields the launches so far."""
    import triton

    from vidkernels import _env
    from vidkernels.ops import _causal_conv3d_backends, _fsq_thresholds

    found: list[Launch] = []
    runtime = triton.runtime.driver
    # A library of its own, so that the shape functions under the same key come back when it goes.
    library = torch._C._dispatch_library("IMPL", "vidkernels", "", __file__, 0)
    with contextlib.ExitStack() as stack:
        for name in _MODULES_WITH_FAMILY:
            module = importlib.import_module(f"vidkernels.triton.{name}")
            stack.enter_context(mock.patch.object(module, "family", lambda device: target))
        # Dispatch accepts tensors that are not on a GPU in the interpreter only; kernels must not know.
        stack.enter_context(mock.patch.object(_env, "TRITON_INTERPRET", True))
        for name in ("_attention", "_correlate"):
            module = importlib.import_module(f"vidkernels.triton.{name}")
            stack.enter_context(mock.patch.object(module, "_env", SimpleNamespace(TRITON_INTERPRET=False)))
        # A search by values, which meta tensors do not have.
        search = _fsq_thresholds._search
        on_cpu = mock.patch.object(
            _fsq_thresholds,
            "_search",
            lambda n, bound, hard, device, dtype: search(n, bound, hard, torch.device("cpu"), dtype),
        )
        stack.enter_context(on_cpu)
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda *device: False))  # it refuses "meta"
        upsampling = importlib.import_module("vidkernels.ops.upsample_conv3d").BACKENDS
        for owner, order in ((_causal_conv3d_backends, "cpu_heuristic"), (upsampling, "rank")):
            stack.enter_context(mock.patch.object(owner, order, lambda *facts: ("triton",)))
        for name, launcher in _launchers().items():
            library.impl(name, "Meta", launcher, False)
        before = runtime._active
        runtime.set_active(_Driver(target, found))
        try:
            yield found
        finally:
            runtime._active = before
            del library


def _launchers() -> dict[str, Callable[..., Any]]:
    from vidkernels import ops
    from vidkernels.ops import _register

    for name in ops.__all__:
        getattr(ops, name)  # modules of ops are imported, and their bare ops defined, at first use
    return {f"vidkernels::{name}": _register._lazy(target) for name, target in _register.TRITON.items()}
