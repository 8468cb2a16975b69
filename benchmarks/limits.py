# SPDX-License-Identifier: Apache-2.0
"""The two ceilings of a device, measured with the same timers as everything else: copy bandwidth and matmul rate."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from benchmarks import timing
from vidkernels._conv.aten import native_on_cpu

GIB = 1 << 30
# A large matrix product on random data; zeros run up to 13 % faster on power-limited GPUs and are no measure.
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2 * GIB, "cpu": GIB // 4}


def copy_gbps(device: torch.device) -> float:
    """GB/s of a large copy between two existing tensors, read and written bytes counted."""
    return _copy_gbps(torch.device(device.type, device.index or 0))


@functools.cache
def _copy_gbps(device: torch.device) -> float:
    count = COPY_BYTES[device.type] // 4
    source, target = torch.randn(count, device=device), torch.empty(count, device=device)
    target.copy_(source)
    times = timing.interleave({"copy": lambda: target.copy_(source)}, timing.timer(device), timing.QUICK)
    # p20: a ceiling is what the machine reaches when nothing disturbs it
    return 2 * COPY_BYTES[device.type] / times["copy"].p20 / 1e6


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product in ``dtype`` through torch, on random data."""
    return _matmul_tflops(torch.device(device.type, device.index or 0), dtype)


@functools.cache
def _matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    # On CPUs without bfloat16 units the library's product is ~170x slower than float32; upcasting reaches the latter.
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not native_on_cpu(dtype):
        dtype = torch.float32
    size = MATMUL_SIZE[device.type]
    if dtype == torch.float64:
        size //= 2
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    times = timing.interleave({"mm": lambda: torch.mm(a, b, out=out)}, timing.timer(device), timing.QUICK)
    return 2 * size**3 / times["mm"].p20 / 1e9


def launch_us(device: torch.device) -> dict[str, float]:
    """Microseconds of the smallest kernel: called from Python, and replayed from a CUDA graph."""
    x = torch.zeros(1, device=device)
    if device.type != "cuda":
        return {
            "call": timing.interleave({"add": lambda: x.add_(1)}, timing.CpuTimer(), timing.QUICK)["add"].median * 1e3
        }
    count = 1000
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(2):
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(count):
            x.add_(1)
        end.record()
        torch.cuda.synchronize(device)
    found = {"call": start.elapsed_time(end) / count * 1e3}
    replay = timing.graph_ms(lambda: lambda: x.add_(1), device, repeats=100)
    return found | ({"graph": replay * 1e3} if replay is not None else {})


def everything(device: torch.device) -> dict[str, Any]:
    """All ceilings of a device."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device.type == "cuda" else (torch.float32,)
    return {
        "copy_gbps": copy_gbps(device),
        "matmul_tflops": {str(d).removeprefix("torch."): matmul_tflops(device, d) for d in dtypes},
        "launch_us": launch_us(device),
    }


@dataclasses.dataclass(frozen=True)
class Floor:
    """No version can be faster than ``ms``, by ``bound`` ("copy" or "matmul")."""

    ms: float
    bound: str


def floor(device: torch.device, dtype: torch.dtype, bytes: int | None, flops: int | None) -> Floor | None:
    """The larger of bytes over bandwidth and operations over rate. None if the case states neither."""
    candidates = []
    if bytes:
        candidates.append(Floor(bytes / copy_gbps(device) / 1e6, "copy"))
    # Fewer than 4 operations a byte never bind on any machine in reach; skip the matrix product then.
    if flops and (not bytes or flops > 4 * bytes):
        candidates.append(Floor(flops / matmul_tflops(device, dtype) / 1e9, "matmul"))
    return max(candidates, key=lambda f: f.ms, default=None)
