# SPDX-License-Identifier: Apache-2.0
"""Every launch of some convolutions twice, by Triton's own launcher and by `_launch.repeat`, on a driver that notes what it
is given (driver.cpp): function, grid, threads, shared memory, stream and the bytes of each argument must be the same.

`python compare.py LIBRARY`, with libcuda.so.1 of driver.cpp in front of any other; prints how many launches were compared.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from vidkernels.triton import _conv_configs, _correlate, _launch, causal_conv3d

STREAM = 77
SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u32": 4, "u64": 8, "fp32": 4}
LAST = torch.channels_last_3d
stub: Any = ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
compared: Counter[str] = Counter()


class Driver(nvidia.CudaDriver):
    """Triton's own, for an H100 that is not there."""

    def __init__(self) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def argument_sizes(compiled: Any) -> list[int]:
    """Bytes of a kernel's parameters, scratch addresses last."""
    found: list[int] = []
    for kind in compiled.src.signature.values():
        if kind.startswith("tensordesc"):
            rank = kind.partition("[")[2].count(",") + 1
            found += [128] + [4] * rank + [8] * rank
        elif kind != "constexpr":
            found.append(8 if kind[0] == "*" else SIZES[kind])
    return [*found, 8, 8]


def notes() -> bytes:
    """What the driver was asked since the last time."""
    out = (ctypes.c_ubyte * (1 << 16))()
    return bytes(out[: stub.take_notes(out)])


def install(library: str) -> None:
    """The stub in place of a GPU, and the comparison in place of launches."""
    driver.set_active(Driver())
    loaded: Any = ctypes.CDLL(library)
    loaded.vidkernels_launch.argtypes = [ctypes.c_void_p] * 3
    torch.cuda.current_device = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM
    for module in (_conv_configs, _correlate, causal_conv3d):
        module.family = lambda device: "sm_90"
    causal_conv3d.multiprocessors = lambda device: 132
    _launch._driver = lambda: loaded
    launch, repeat = _launch.launch, _launch.repeat

    def both(kernel: Any, grid: Any, args: Any, options: Any, key: Any = None, tensors: Any = ()) -> None:
        compiled = kernel.warmup(*args, grid=grid, **options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        sizes = argument_sizes(compiled)
        stub.note_sizes((ctypes.c_int * len(sizes))(*sizes), len(sizes))
        notes()
        _launch.forget()
        launch(kernel, grid, args, options, key, tensors)
        theirs = notes()
        assert len(theirs) > 56 + 16, kernel
        assert repeat(key, tensors), f"{kernel}: nothing to repeat"
        assert notes() == theirs, kernel
        others = [None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in tensors]
        assert repeat(key, others) and notes() != theirs, kernel  # other addresses
        compared[compiled.name] += 1

    _launch.launch = both
    _launch.repeat = lambda key, tensors: False


def convolve(
    channels: int,
    filters: int,
    kernel: tuple[int, int, int],
    size: tuple[int, int, int],
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    replicate: bool = False,
    history: int = 0,
    activation: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward, with a residual too, and both gradients."""
    x = torch.zeros(2, channels, *size, dtype=dtype).contiguous(memory_format=LAST)
    past = torch.zeros(2, channels, history, *size[1:], dtype=dtype).contiguous(memory_format=LAST) if history else None
    weight, bias = torch.zeros(filters, channels, *kernel, dtype=dtype), torch.zeros(filters, dtype=dtype)
    padding = [kernel[0] - 1, 0, *(k // 2 for k in kernel[1:] for _ in range(2))]
    geometry: Any = list(stride), [1, 1, 1], padding, int(replicate), 0
    y = causal_conv3d.causal_conv3d_fwd(x, weight, bias, past, None, *geometry, activation)
    causal_conv3d.causal_conv3d_fwd(x, weight, None, past, torch.zeros_like(y), *geometry, activation)
    causal_conv3d.causal_conv3d_dgrad(torch.zeros_like(y), weight, list(x.shape), history, *geometry)
    causal_conv3d.causal_conv3d_wgrad(torch.zeros_like(y), x, past, list(kernel), *geometry)


def main() -> None:
    """Boxes of one and of two sums, boxes of several rows, pointers, packed and gathered taps."""
    install(sys.argv[1])
    with torch.no_grad():
        convolve(192, 192, (3, 3, 3), (2, 16, 128), activation=1)
        convolve(64, 64, (3, 1, 1), (3, 8, 16), history=2)
        convolve(32, 48, (3, 3, 3), (4, 9, 11), stride=(2, 2, 2), replicate=True)
        convolve(3, 64, (3, 3, 3), (2, 16, 128))
        convolve(64, 3, (3, 3, 3), (2, 16, 128))
        convolve(32, 32, (1, 3, 3), (2, 16, 64), dtype=torch.float32)
    print(" ".join(f"{name}={count}" for name, count in sorted(compared.items())))


if __name__ == "__main__":
    main()
