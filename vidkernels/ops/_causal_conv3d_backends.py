# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a causal convolution. One predicate per backend: None, or the reason why it cannot; and one rank
per op: which of those that can is tried first.

Facts, after the leading tensor x: output channels, then kernel, stride, dilation, padding, time_mode, space_mode as in
the bare ops, frames of history (0: none), activation and whether there is a residual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import torch

from vidkernels import _measured, cudnn, dispatch
from vidkernels._conv import cuda
from vidkernels._conv.aten import native_on_cpu
from vidkernels._conv.cpp import WINOGRAD, algorithm, multiplies_pairs, multiplies_tiles
from vidkernels._conv.geometry import NONE, REPLICATE, ZEROS, full_float32
from vidkernels._tracing import constant_while_tracing
from vidkernels.triton._device import capability, multiprocessors

SUFFIX = {"cpp": "", "cudnn": "_cudnn", "triton": "_triton", "torch": "_torch", "cuda": "_cuda"}
_INT32 = 1 << 31
_CUDNN_CHANNELS, _CUDNN_TILE, _PRODUCTS_A_VALUE = 128, 64, 1000
# How much of its rounds `cuda` must fill to be the fastest, by the filters of a program (docs/performance.md).
_FILLED = {96: 0.45, 128: 0.95, 160: 0.65, 192: 0.7}
_CLOSE, _FILLED_BY_MORE = 128, 0.97  # the tile with which others are nearly as fast; the same for several of it
_SMALL_FRAME = 1 << 14  # values
_LARGE_FRAME = 512  # pixels
_ROWS_IN_PLACE = 128  # channels from which pairs are read where they are, and zeros left out
_FEW_CHANNELS = 16


def bare_op(name: str, backend: str) -> Callable[..., Any]:
    """The bare op of one backend, e.g. `vidkernels::causal_conv3d_fwd_torch`."""
    return getattr(torch.ops.vidkernels, name + SUFFIX[backend]).default


def _cudnn(
    x: torch.Tensor,
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
    history_frames: int,
    *epilogue: int,
) -> str | None:
    if x.device.type != "cuda":
        return f"it runs on cuda tensors, got {x.device.type}"
    if cudnn.missing() is not None:
        return cudnn.missing()
    if x.dtype not in dispatch.FLOATING:
        return f"dtype {str(x.dtype).removeprefix('torch.')} is not one of float32, bfloat16, float16"
    if full_float32(x.dtype):
        return "float32 runs there in TF32, which torch.backends.cudnn.conv.fp32_precision forbids"
    if history_frames:
        return "cuDNN reads one tensor, and this call has frames of history"
    if time_mode == REPLICATE and padding[0] + padding[1]:
        return "cuDNN pads with zeros, and this call repeats frames"
    if space_mode == REPLICATE and any(padding[2:]):
        return "cuDNN pads with zeros, and this call repeats pixels"
    if x.shape[1] % 8 or out_channels % 8:
        return f"channels and filters must be multiples of 8, got {index(x.shape[1])} and {index(out_channels)}"
    if x.numel() * max(out_channels, x.shape[1]) >= _INT32 * x.shape[1]:
        return "beyond 2^31 elements cuDNN has one slow engine only"
    return None


def _cuda(
    x: torch.Tensor,
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    *rest: Any,
) -> str | None:
    if tuple(kernel[1:]) != (3, 3) or max(*stride, *dilation) > 1:
        return "it has 3x3 taps in space with stride and dilation 1"
    if cuda.tile_filters(out_channels) is None or x.shape[1] % 8:
        return f"channels must be a multiple of 8 and filters of 96, 128 or 160, got {index(x.shape[1])} and {index(out_channels)}"
    height, width = x.shape[3] + padding[2] + padding[3], x.shape[4] + padding[4] + padding[5]
    if max(x.shape[1], out_channels) * height * width >= _INT32:
        return "its indices of a frame's values end at 2^31"
    return _lacks(x.device)


@constant_while_tracing
def _lacks(device: torch.device) -> str | None:
    """What a GPU or the loaded library lacks to run the CUDA kernel."""
    if device.type != "cuda":
        return None
    if capability(device) != (9, 0):
        return "it multiplies by instructions that only GPUs of compute capability 9.0 have"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("vidkernels::causal_conv3d_box_out", "CUDA"):
        return "the loaded library was built without 9.0a in TORCH_CUDA_ARCH_LIST"
    return None


def _triton(x: torch.Tensor, *facts: object) -> str | None:
    positions = x.shape[0] * x.shape[2] * x.shape[3] * x.shape[4]
    return None if positions < _INT32 // 2 else f"its indices of positions end at 2^30, got {positions}"


def table() -> dict[str, dispatch.Predicate]:
    """Backends of causal_conv3d. Call it after the bare ops are defined."""
    # A library built for some stems only (VIDKERNELS_OPS) may lack this one.
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key("vidkernels::causal_conv3d_out", "CPU")

    def has_kernel(x: torch.Tensor, *facts: object) -> str | None:
        return None if compiled else "the loaded library was built without causal_conv3d"

    return {
        "cpp": dispatch.cpp(check=has_kernel),
        "cudnn": _cudnn,
        "triton": dispatch.triton(check=_triton),
        "torch": dispatch.pytorch,
        # Behind the others, but where `rank` says so.
        "cuda": dispatch.cuda(cuda.DTYPES, _cuda),
        "reference": dispatch.always,
    }


def shape_key(channels: int, filters: int, kernel: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> str:
    """E.g. "128-128 3x3x3 / 1x1x1 bfloat16"."""
    sizes = "x".join(map(str, kernel)), "x".join(map(str, stride))
    return f"{channels}-{filters} {sizes[0]} / {sizes[1]} {str(dtype).removeprefix('torch.')}"


def heuristic(
    channels: int, filters: int, kernel: Sequence[int], exact: bool, activation: int = 0, residual: bool = False
) -> tuple[str, ...]:
    """Order on a GPU without a measurement, for convolutions that every backend can run.

    Full float32 products run on the plain units, where cuDNN's (through torch) are the best known. Otherwise cuDNN's kernels
    are about 15 % faster than Triton's where products outweigh traffic and filters fill its tiles of 64. On an H200 in bfloat16,
    milliseconds of cudnn and triton: 128 channels 3x1x1 at 20x256x256 0.333, 0.286; 1x3x3 0.551, 0.685; 384 3x1x1 0.171, 0.270;
    192 3x3x3 7.5, 8.4; 384 3x3x3 1.87, 2.06; 512 3x3x3 at 5x32x32 0.149, 0.161; 512 1x3x3 at 10x64x64 0.267, 0.281; but 160
    3x3x3 6.33, 5.30, 128 3x3x3 at 17x256x256 1.52, 1.33, 256 to 128 3.23, 2.79 and, on an H100, 96 3x3x3 16.9, 13.5 and 256 to 128
    1x1x1 0.39, 0.36.

    Behind cuDNN a residual is a pass of its own that reads two values for each result and writes one, an activation one that
    reads and writes: adding 128 channels of 16x256x256 took 183 us, 4.4 TB/s, the 1x3x3 convolution before 423, Triton's with the sum
    about 550. A product and sum take 2 / 650 TFLOP/s, of which 15 % pay for one 2-byte value at 4.4 TB/s from about 1000 of them on.

    Torch comes last: its pieces and summed weights took 0.909 ms where cuDNN's 512 channels 3x3x3 took 0.149.
    """
    if exact:
        return ("torch", "triton")
    moved = 3 * bool(residual) + 2 * (activation != NONE)
    products = channels * kernel[0] * kernel[1] * kernel[2]
    wasted = 10 * (-filters % _CUDNN_TILE) > filters
    few = min(channels, filters) < _CUDNN_CHANNELS or products < _PRODUCTS_A_VALUE * max(moved, 1)
    if few or wasted or (filters == _CUDNN_CHANNELS and tuple(kernel) == (3, 3, 3)):
        return ("triton", "cudnn", "torch")
    return ("cudnn", "triton", "torch")


def cpu_heuristic(
    x: torch.Tensor, filters: int, kernel: Sequence[int], stride: Sequence[int], *rest: Any
) -> tuple[str, ...]:
    """Order on a CPU without a measurement: ours, but for some bfloat16 convolutions on processors with units for it.

    Measured with AVX512_BF16, where oneDNN and our kernels both multiply in them: 3x3 taps of stride 1 take 0.96 of the time in
    oneDNN where it runs once (128 channels 1x3x3, 8x32x32). With frames in front of the clip it runs in three pieces, with weights
    summed or copied anew for two of them. Where these frames are zeros that takes 1.04 (128 channels, 5x32x32) to 2 times (5x8x8)
    of our time; where they repeat the first one, summed taps save products: 0.8 on frames of 32 x 32, 1.09 on 16 x 16 with 256
    channels, 2 on 8 x 8 with 512. Borders repeated in space are nine pieces each (up to 17 times our time), strided kernels take
    1.2 times as long, kernels of one tap in space as long, and those of a few channels or filters 1.3 to 2.7 times. On small
    frames the pieces cost more to start: 0.4 against 0.2 ms on 32 channels of 12 x 12.

    With AMX ours come first: without frames in front oneDNN's take 0.85 (128 channels 1x3x3) and 0.7 to 1.2 (256 to 128 1x1x1) of the time,
    with them 1.03 to 7 times as long, and eager's padded copies up to 18 times.
    """
    if x.dtype != torch.bfloat16 or x.shape[1] * x.shape[3] * x.shape[4] < _SMALL_FRAME or not native_on_cpu(x.dtype):
        return ()
    if multiplies_tiles(x.dtype):
        return ()
    dilation, padding, time_mode, space_mode = rest[:4]
    if not multiplies_pairs(x.dtype):
        repeats = space_mode == REPLICATE and any(padding[2:])
        tiled = algorithm(x.shape[1], filters, kernel, stride, dilation, x.shape[3] * x.shape[4]) == WINOGRAD
        return () if repeats and tiled else ("torch", "cpp")
    few = min(x.shape[1], filters) < _FEW_CHANNELS or kernel[1] * kernel[2] == 1 or tuple(stride) != (1, 1, 1)
    top, bottom, left, right = padding[2:]
    pieces = (top, left) != (bottom, right) or (space_mode == REPLICATE and top + left > 0)
    zeros = time_mode == ZEROS and x.shape[1] >= _ROWS_IN_PLACE
    in_front = padding[0] + padding[1] > 0 and (zeros or x.shape[3] * x.shape[4] < _LARGE_FRAME)
    return () if few or pieces or in_front else ("torch", "cpp")


def rank(
    x: torch.Tensor, out_channels: int, kernel: Sequence[int], stride: Sequence[int], *rest: Any
) -> tuple[str, ...]:
    """Order of causal_conv3d for this call: as measured on this device (`tune`), else by heuristic."""
    # `index` rather than `int`: a graph with symbolic sizes then holds for these alone, of which it knows no text.
    channels, filters, taps = index(x.shape[1]), index(out_channels), tuple(index(k) for k in kernel)
    steps = tuple(index(step) for step in stride)
    order = _measured.order("causal_conv3d", x.device, shape_key(channels, filters, taps, steps, x.dtype))
    if order is not None:
        return order
    if x.device.type != "cuda":
        return cpu_heuristic(x, filters, taps, steps, *rest)
    order = heuristic(channels, filters, taps, full_float32(x.dtype), *rest[5:])
    return ("cuda", *order) if _boxes_pay(x, filters, taps, order[0]) else order


def _boxes_pay(x: torch.Tensor, filters: int, kernel: Sequence[int], other: str) -> bool:
    """Whether boxes with a border come before the `other` first one of a GPU.

    On an H200, its TFLOP/s, then cudnn's and triton's: 96 channels 3x3x3 at 480x832 720, 280 and 290; 160 at 176x320 670 and
    triton's 430; 192 at 240x416 770, 550 and 560; 384 at 60x104 700, 560 and 510; 128 at 256x256 760, 650 and 740;
    but 128 channels 1x3x3 660, 720 and 620. What they do not fill costs as much: 384 channels of one frame of 60x104 are 52 programs
    for 132 multiprocessors and took 183 us, Triton's 109; 256 of 128x128 fill 86 % and took 1.73 ms, cudnn's 1.52.
    """
    tile = cuda.tile_filters(filters)
    if x.dtype not in cuda.DTYPES or tuple(kernel[1:]) != (3, 3) or tile is None or index(x.shape[1]) % cuda.STEP:
        return False
    batch, _, frames, height, width = x.shape
    if torch.compiler.is_compiling() or any(isinstance(size, torch.SymInt) for size in (batch, frames, height, width)):
        return tile != _CLOSE  # a graph may meet clips of other sizes, and holds for what it asks about alone
    if not torch.cuda.is_available():  # tensors without data of a device that is not here
        return False
    needed = _FILLED[tile]
    if tile == _CLOSE:
        if kernel[0] == 1 and other == "cudnn":
            return False
        needed = needed if filters == tile else _FILLED_BY_MORE
    return cuda.filled(batch, filters, frames, height, width, multiprocessors(x.device)) >= needed


def rank_phases(x: torch.Tensor, filters: int, kernel: Sequence[int], *rest: Any) -> tuple[str, ...]:
    """Order of upsample_conv3d, whose phases have `kernel`: Triton writes every second pixel in place, the others a tensor
    that is copied there. On a CPU ours is the first where 3x3 taps meet doubled pixels, in bfloat16 too: oneDNN's units take
    0.97 to 3.2 times as long (128 to 512 channels of 12x12 to 48x48)."""
    if x.device.type != "cuda":
        return () if tuple(kernel[1:]) == (2, 2) else cpu_heuristic(x, filters, kernel, *rest)
    return ("torch", "triton") if full_float32(x.dtype) else ("triton", "cudnn", "torch")
