# SPDX-License-Identifier: Apache-2.0
"""Backend "torch" of causal_conv3d: torch's own convolutions, on any device, without a padded copy.

The padded convolution is cut into unpadded ones by `_conv.plan`: one for the interior, small ones with collapsed
weights at the edges. On a GPU the weight gradient of a clip of up to 256 KiB is one convolution of a padded copy instead.
bfloat16 and float16 on a CPU without such units go through float32 in slices of a few frames: torch's convolution is 50
times slower there than its float32 one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vidkernels import _env
from vidkernels._conv.geometry import REPLICATE, SILU, ZEROS, is_channels_last, output_size
from vidkernels._conv.plan import HISTORY, AxisRun, Taps, axis_runs
from vidkernels._conv.weights import collapse, expand, wide_dtype
from vidkernels._tracing import constant_while_tracing

_SLICE_ELEMENTS = 1 << 21  # 8 MB of float32 at a time, when a low-precision tensor is widened on the CPU
_WRITTEN_OUT_BYTES = 1 << 18  # a copy takes less time than the launch of one more convolution
_AXES = (2, 3, 4)
# Values of oneDNN's ONEDNN_MAX_CPU_ISA that take AVX512_BF16 and AMX away.
_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}


@constant_while_tracing
def native_on_cpu(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies the dtype in units of its own: the processor has them and the user left them on.

    Without them oneDNN emulates bfloat16 on AVX-512 (15 times slower than float32 here) and refuses it on AVX2, where
    torch falls back to loops.
    """
    if dtype != torch.bfloat16:
        return dtype != torch.float16
    if not torch.backends.mkldnn.is_available() or _env.ONEDNN_MAX_CPU_ISA in _WITHOUT_BF16:
        return False
    return torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _widens(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and not native_on_cpu(x.dtype)


@dataclass(frozen=True)
class _Piece:
    """One unpadded convolution: which outputs, from which part of x or history, with which weights."""

    runs: tuple[AxisRun, AxisRun, AxisRun]

    @property
    def source(self) -> int:
        return self.runs[0].source

    @property
    def reads_nothing(self) -> bool:
        return any(run.taps == () for run in self.runs)

    @property
    def first(self) -> bool:
        return all(run.first for run in self.runs)

    def outputs(self, y: torch.Tensor) -> torch.Tensor:
        for axis, run in zip(_AXES, self.runs, strict=True):
            y = y.narrow(axis, run.start, run.count)
        return y

    def inputs(self, source: torch.Tensor) -> torch.Tensor:
        for axis, run in zip(_AXES, self.runs, strict=True):
            if not run.pad:
                source = source.narrow(axis, run.begin, run.extent)
        return source

    @property
    def taps(self) -> tuple[Taps | None, ...]:
        return tuple(run.taps for run in self.runs)

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        """Stride, padding, dilation of torch's convolution."""
        return [r.stride for r in self.runs], [r.pad for r in self.runs], [r.spacing for r in self.runs]


def _pieces(
    size: Sequence[int],
    history_frames: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
    slice_frames: int,
) -> Iterator[_Piece]:
    plans = [
        axis_runs(
            *(int(size[axis]), int(history_frames) if axis == 0 else 0, kernel[axis], stride[axis], dilation[axis]),
            padding=(padding[2 * axis], padding[2 * axis + 1]),
            mode=time_mode if axis == 0 else space_mode,
        )
        for axis in range(3)
    ]
    time = [part for run in plans[0] for part in run.split(slice_frames)]
    return (_Piece(runs) for runs in itertools.product(time, plans[1], plans[2]))


def _read(piece: _Piece, x: torch.Tensor, history: torch.Tensor | None) -> torch.Tensor:
    """What a piece reads of x or of the frames before it."""
    if piece.source == HISTORY:
        assert history is not None
        return piece.inputs(history)
    return piece.inputs(x)


def _taps(piece: _Piece, weight: torch.Tensor, compute: torch.dtype, channels_last: bool) -> torch.Tensor:
    """The weights of a piece; taps that it sums are summed in float32 or wider, others need no such copy."""
    if any(taps is not None for taps in piece.taps):
        weight = collapse(weight.to(wide_dtype(weight.dtype)), piece.taps)
    return weight.to(compute).contiguous(memory_format=_format(channels_last))


def _slice_frames(x: torch.Tensor) -> int:
    """Output frames per piece; all of them where nothing has to be widened."""
    if not _widens(x):
        return 1 << 30
    return max(1, _SLICE_ELEMENTS // max(x.shape[0] * x.shape[1] * x.shape[3] * x.shape[4], 1))


def _empty(like: torch.Tensor, size: list[int], channels_last: bool) -> torch.Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=_format(channels_last))


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """An unpadded (or symmetrically padded) convolution. On the CPU oneDNN is called by name: for small tensors
    `F.conv3d` prefers a routine that unfolds the whole input, 27 times its size, and that sums in another order."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available():
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, 1)
    return F.conv3d(x, weight, bias, stride, padding, dilation)


def _epilogue(y: torch.Tensor, activation: int, residual: torch.Tensor | None) -> torch.Tensor:
    if activation == SILU:
        F.silu(y, inplace=True)
    return y if residual is None else y.add_(residual)


def causal_conv3d_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
    activation: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ops.causal_conv3d`."""
    kernel = list(weight.shape[2:])
    frames = 0 if history is None else history.shape[2]
    compute = wide_dtype(x.dtype) if _widens(x) else x.dtype
    pieces = list(
        _pieces(x.shape[2:], frames, kernel, stride, dilation, padding, time_mode, space_mode, _slice_frames(x))
    )
    channels_last = is_channels_last(x)
    bias = None if bias is None else bias.to(compute)
    y = out
    for piece in pieces:
        if piece.reads_nothing:
            part = None
        else:
            source = _read(piece, x, history).to(compute)
            w = _taps(piece, weight, compute, channels_last)
            part = _convolve(source, w, bias if piece.first else None, *piece.geometry)
        if len(pieces) == 1 and y is None and part is not None and part.dtype == x.dtype:
            return _epilogue(part.contiguous(memory_format=_format(channels_last)), activation, residual)
        if y is None:
            size = output_size(x.shape[2:], kernel, stride, dilation, padding)
            y = _empty(x, [x.shape[0], weight.shape[0], *size], channels_last)
        _store(piece.outputs(y), part, bias, piece.first)
    assert y is not None  # there is at least one piece
    return _epilogue(y, activation, residual)


def _store(target: torch.Tensor, part: torch.Tensor | None, bias: torch.Tensor | None, first: bool) -> None:
    if part is not None and first:
        target.copy_(part)
    elif part is not None:
        target.add_(part)
    elif first and bias is not None:
        target.copy_(bias[:, None, None, None])
    elif first:
        target.zero_()


def _sum_dtype(pieces: Sequence[_Piece], dtype: torch.dtype) -> torch.dtype:
    """In which the pieces' gradients of x are added: float32 where frames are cut on both sides of both axes. With 5x5x5
    taps an element lies in up to 45 pieces there, and as many roundings to bfloat16 were 1.7 times the promise on a GPU."""
    return wide_dtype(dtype) if len({p.runs[1:] for p in pieces}) > 4 else dtype


def causal_conv3d_dgrad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    history_frames: int,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.causal_conv3d`."""
    channels_last = is_channels_last(grad)
    batch, channels, _, height, width = input_size
    compute = wide_dtype(grad.dtype) if _widens(grad) else grad.dtype
    args = list(weight.shape[2:]), stride, dilation, padding, time_mode, space_mode
    frames = _slice_frames(grad.new_empty(1).expand(list(input_size)))
    pieces = [p for p in _pieces(input_size[2:], history_frames, *args, frames) if not p.reads_nothing]
    whole = len(pieces) == 1 and pieces[0].source != HISTORY
    total = grad.new_empty(0, dtype=_sum_dtype(pieces, grad.dtype))
    dhistory = _empty(total, [batch, channels, history_frames, height, width], channels_last).zero_()
    dx = _empty(total, list(input_size), channels_last)
    if not whole:
        dx.zero_()
    for piece in pieces:
        target = piece.inputs(dhistory if piece.source == HISTORY else dx)
        w = _taps(piece, weight, compute, channels_last)
        steps, pads, spacing = piece.geometry
        part, _, _ = torch.ops.aten.convolution_backward(
            piece.outputs(grad).to(compute),
            target if target.dtype == compute else target.new_empty(target.shape, dtype=compute),
            w,
            None,
            *(steps, pads, spacing, False, [0, 0, 0], 1, [True, False, False]),
        )
        if whole and part.shape == dx.shape and part.dtype == dx.dtype:
            return part.contiguous(memory_format=_format(channels_last)), dhistory
        if whole:
            dx.zero_()
        target.add_(part)
    return dx.to(grad.dtype), dhistory.to(grad.dtype)


def _pad_short_axes(
    x: torch.Tensor, kernel: Sequence[int], pads: Sequence[int], spacing: Sequence[int]
) -> tuple[torch.Tensor, list[int]]:
    """x with the zeros of its short axes written out, and the padding that is left to the convolution.

    oneDNN's bfloat16 weight gradient (3.12, avx512_core_bf16) reads and writes beyond its buffers where a padded axis is
    not much longer than the kernel: 76 of 400 random small shapes gave garbage or crashed. None of 700 did whose padded axes have
    at least twice the kernel's extent, and none of 600 without padding.
    """
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return x, list(pads)
    sizes, extents = x.shape[2:], [(k - 1) * d + 1 for k, d in zip(kernel, spacing, strict=True)]
    written = [p if size < 2 * extent else 0 for p, size, extent in zip(pads, sizes, extents, strict=True)]
    if any(written):
        x = F.pad(x, [p for p in reversed(written) for _ in range(2)]).contiguous(
            memory_format=_format(is_channels_last(x))
        )
    return x, [p - w for p, w in zip(pads, written, strict=True)]


def _writes_out(x: torch.Tensor, padding: Sequence[int]) -> bool:
    """Whether the weight gradient pads x in memory. cuDNN chooses by shape, and may add all pixels of a small piece in one
    chain of float32 where it cuts those of the whole: four pieces and an interior of 297 were 1.05 times the promise."""
    sizes = (size + sum(padding[2 * axis : 2 * axis + 2]) for axis, size in enumerate(x.shape[2:]))
    padded = x.shape[0] * x.shape[1] * math.prod(sizes) * x.element_size()
    return x.device.type == "cuda" and padded <= _WRITTEN_OUT_BYTES


def _written_out(
    x: torch.Tensor, history: torch.Tensor | None, padding: Sequence[int], time_mode: int, space_mode: int
) -> torch.Tensor:
    """history and x in one tensor with the frames, rows and columns of the padding; in the format of x."""
    past = 0 if history is None else history.shape[2]
    padded = x if history is None else torch.cat([history, x], 2)
    for axis, mode in zip(_AXES, (time_mode, space_mode, space_mode), strict=True):
        before, behind = padding[2 * axis - 4] - (past if axis == 2 else 0), padding[2 * axis - 3]
        if mode == REPLICATE:
            index = torch.arange(-before, padded.shape[axis] + behind, device=x.device)
            padded = padded.index_select(axis, index.clamp(0, padded.shape[axis] - 1))
        else:
            padded = F.pad(padded, (0, 0) * (4 - axis) + (before, behind))
    return padded.contiguous(memory_format=_format(is_channels_last(x)))


def causal_conv3d_wgrad(
    grad: torch.Tensor,
    x: torch.Tensor,
    history: torch.Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
) -> torch.Tensor:
    """See `ops.causal_conv3d`."""
    frames = 0 if history is None else history.shape[2]
    if any(padding) and _writes_out(x, padding):
        x, history, frames = _written_out(x, history, padding, time_mode, space_mode), None, 0
        padding, time_mode, space_mode = [0] * 6, ZEROS, ZEROS
    compute = wide_dtype(x.dtype) if _widens(x) else x.dtype
    args = kernel, stride, dilation, padding, time_mode, space_mode
    pieces = [p for p in _pieces(x.shape[2:], frames, *args, _slice_frames(x)) if not p.reads_nothing]
    # Float64 for several pieces: 125 roundings (5x5x5 taps, replicated) to float32 were 1.9 times the promise on a GPU.
    accumulate = torch.float64 if len(pieces) > 1 and x.dtype == torch.float32 else wide_dtype(x.dtype)
    dweight = torch.zeros([grad.shape[1], x.shape[1], *kernel], dtype=accumulate, device=x.device)
    for piece in pieces:
        source = _read(piece, x, history).to(compute)
        w = torch.empty([*dweight.shape[:2], *(run.positions for run in piece.runs)], dtype=compute, device=x.device)
        steps, pads, spacing = piece.geometry
        source, pads = _pad_short_axes(source, w.shape[2:], pads, spacing)
        _, part, _ = torch.ops.aten.convolution_backward(
            piece.outputs(grad).to(compute),
            source,
            w,
            None,
            *(steps, pads, spacing, False, [0, 0, 0], 1, [False, True, False]),
        )
        dweight += expand(part.to(accumulate), piece.taps)
    return dweight.to(wide_dtype(x.dtype))
