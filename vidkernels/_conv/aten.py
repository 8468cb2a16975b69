# SPDX-License-Identifier: Apache-2.0
"""Backend "torch" of causal_conv3d: torch's own convolutions, on any device, without a padded copy.

The padded convolution is cut into unpadded ones by `_conv.plan`: one for the interior, small ones with collapsed
weights at the edges. On a GPU a clip of up to 256 KiB takes one convolution of a padded copy instead, forward and backward.
bfloat16 and float16 on a CPU without such units go through float32 in slices of a few frames: torch's convolution is 50
times slower there than its float32 one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vidkernels import _env
from vidkernels._conv.geometry import REPLICATE, SILU, ZEROS, is_channels_last, output_size
from vidkernels._conv.gradients import backward_by, chosen, like_weight, rule_of
from vidkernels._conv.pieces import Piece, pieces_of
from vidkernels._conv.plan import HISTORY
from vidkernels._conv.weights import collapse, expand, wide_dtype
from vidkernels._tracing import constant_while_tracing

_SLICE_ELEMENTS = 1 << 21  # 8 MB of float32 at a time, when a low-precision tensor is widened on the CPU
_WRITTEN_OUT_BYTES = 1 << 18  # a copy takes less time than the launch of one more convolution
_AXES = (2, 3, 4)
# Values of oneDNN's ONEDNN_MAX_CPU_ISA that take AVX512_BF16 and AMX away, and those that take AMX alone.
_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}
_WITHOUT_AMX = {*_WITHOUT_BF16, "AVX2_VNNI_2", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"}


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


@constant_while_tracing
def tiles_on_cpu() -> bool:
    """Whether bfloat16 is multiplied by AMX's tiles, eight times as fast as by AVX512_BF16: the processor has them, the
    system gives them to this process, and the user left them on."""
    return _env.ONEDNN_MAX_CPU_ISA not in _WITHOUT_AMX and _amx_granted()


@functools.cache
def _amx_granted() -> bool:
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def _widens(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and not native_on_cpu(x.dtype)


def _read(piece: Piece, x: torch.Tensor, history: torch.Tensor | None) -> torch.Tensor:
    """What a piece reads of x or of the frames before it."""
    if piece.source == HISTORY:
        assert history is not None
        return piece.inputs(history)
    return piece.inputs(x)


def _taps(piece: Piece, weight: torch.Tensor, compute: torch.dtype, channels_last: bool) -> torch.Tensor:
    """The weights of a piece; taps that it sums are summed in float32 or wider, others need no such copy."""
    weight = piece.part(weight)
    if any(taps is not None for taps in piece.summed):
        weight = collapse(weight.to(wide_dtype(weight.dtype)), piece.summed)
    return weight.to(compute).contiguous(memory_format=_format(channels_last))


def _slice_frames(x: torch.Tensor, size: Sequence[int] | None = None) -> int:
    """Output frames per piece of x (of `size`, with the dtype of x); all of them where nothing has to be widened."""
    if not _widens(x):
        return 1 << 30
    batch, channels, _, height, width = x.shape if size is None else size
    return max(1, _SLICE_ELEMENTS // max(batch * channels * height * width, 1))


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
        width, step = x.shape[4] + 2 * padding[2] - (weight.shape[4] - 1) * dilation[2], stride[2]
        if step > 1 and width <= step:
            # For one column oneDNN 3.12 computes garbage with steps beyond 1, in bfloat16 by AMX and in float32 of one channel.
            stride = (*stride[:2], 1)
        y = torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, 1)
        return y if stride[2] == step else y[..., :1]
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
    frames = 0 if history is None else history.shape[2]
    compute = wide_dtype(x.dtype) if _widens(x) else x.dtype
    kernel, rest = weight.shape[2:], (stride, dilation, padding, time_mode, space_mode)
    pieces = pieces_of(x.shape[2:], frames, kernel, *rest, _slice_frames(x))
    if len(pieces) > 1 and _writes_out(x, padding):
        x, history, padding = _written_out(x, history, padding, time_mode, space_mode), None, [0] * 6
        pieces = pieces_of(x.shape[2:], 0, kernel, stride, dilation, padding, ZEROS, ZEROS, _slice_frames(x))
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


def _sum_dtype(pieces: Sequence[Piece], dtype: torch.dtype) -> torch.dtype:
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `_conv.gradients`."""
    channels_last = is_channels_last(grad)
    batch, channels, _, height, width = input_size
    compute = wide_dtype(grad.dtype) if _widens(grad) else grad.dtype
    args = weight.shape[2:], stride, dilation, padding, time_mode, space_mode
    frames = _slice_frames(grad, input_size)
    pieces = [p for p in pieces_of(input_size[2:], history_frames, *args, frames) if not p.reads_nothing]
    whole = len(pieces) == 1 and pieces[0].source != HISTORY
    added = _sum_dtype(pieces, grad.dtype)
    options: dict[str, Any] = {"device": grad.device, "memory_format": _format(channels_last)}
    dx = torch.empty(input_size, dtype=added, **options)
    dhistory = None
    if history_frames:
        dhistory = torch.empty([batch, channels, history_frames, height, width], dtype=added, **options).zero_()
    if not whole:
        dx.zero_()
    for piece in pieces:
        source = dhistory if piece.source == HISTORY else dx
        assert source is not None  # there are frames of history where pieces read them
        target = piece.inputs(source)
        part, _, _ = torch.ops.aten.convolution_backward(
            piece.outputs(grad).to(compute),
            target if target.dtype == compute else target.new_empty(target.shape, dtype=compute),
            _taps(piece, weight, compute, channels_last),
            None,
            *_transposed(piece.geometry, [True, False, False]),
        )
        if whole and part.shape == dx.shape and part.dtype == dx.dtype:
            return part.contiguous(memory_format=_format(channels_last)), dhistory
        if whole:
            dx.zero_()
        target.add_(part)
    return dx.to(grad.dtype), None if dhistory is None else dhistory.to(grad.dtype)


def _transposed(geometry: tuple[list[int], list[int], list[int]], mask: list[bool]) -> tuple[Any, ...]:
    """The trailing arguments of `aten::convolution_backward`; `mask`: which of x, weight and bias get a gradient."""
    steps, pads, spacing = geometry
    return steps, pads, spacing, False, [0, 0, 0], 1, mask


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
    zeros = [0] * 6
    for axis, mode in zip(_AXES, (time_mode, space_mode, space_mode), strict=True):
        before, behind = padding[2 * axis - 4] - (past if axis == 2 else 0), padding[2 * axis - 3]
        if mode == REPLICATE and before + behind:
            index = torch.arange(-before, padded.shape[axis] + behind, device=x.device)
            padded = padded.index_select(axis, index.clamp(0, padded.shape[axis] - 1))
        elif mode == ZEROS:
            zeros[8 - 2 * axis : 10 - 2 * axis] = before, behind
    if any(zeros):
        padded = F.pad(padded, zeros)
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
    """See `_conv.gradients`."""
    frames = 0 if history is None else history.shape[2]
    pieces = pieces_of(x.shape[2:], frames, kernel, stride, dilation, padding, time_mode, space_mode, _slice_frames(x))
    if len(pieces) > 1 and _writes_out(x, padding):
        x, history, padding = _written_out(x, history, padding, time_mode, space_mode), None, [0] * 6
        pieces = pieces_of(x.shape[2:], 0, kernel, stride, dilation, padding, ZEROS, ZEROS, _slice_frames(x))
    # By AMX's tiles oneDNN 3.12 does not end for pieces of 256 channels with 2 x 3 x 3 taps, and 3 filters give garbage.
    broken = x.device.type == "cpu" and x.dtype == torch.bfloat16 and tiles_on_cpu()
    compute = wide_dtype(x.dtype) if _widens(x) or broken else x.dtype
    pieces = tuple(p for p in pieces if not p.reads_nothing)
    # Float64 for several pieces: 125 roundings (5x5x5 taps, replicated) to float32 were 1.9 times the promise on a GPU.
    accumulate = torch.float64 if len(pieces) > 1 and x.dtype == torch.float32 else wide_dtype(x.dtype)
    dweight = None
    for piece in pieces:
        source = _read(piece, x, history).to(compute)
        positions = [run.positions for run in piece.runs]
        w = torch.empty([grad.shape[1], x.shape[1], *positions], dtype=compute, device=x.device)
        source, pads = _pad_short_axes(source, positions, piece.geometry[1], piece.geometry[2])
        _, part, _ = torch.ops.aten.convolution_backward(
            piece.outputs(grad).to(compute),
            source,
            w,
            None,
            *_transposed((piece.geometry[0], pads, piece.geometry[2]), [False, True, False]),
        )
        if len(pieces) == 1 and piece.whole:
            return part.to(accumulate)
        if dweight is None:
            dweight = torch.zeros([grad.shape[1], x.shape[1], *kernel], dtype=accumulate, device=x.device)
        piece.part(dweight).add_(expand(part.to(accumulate), piece.summed))
    if dweight is None:
        return torch.zeros([grad.shape[1], x.shape[1], *kernel], dtype=wide_dtype(x.dtype), device=x.device)
    return dweight.to(wide_dtype(x.dtype))


_by_pieces = backward_by(causal_conv3d_dgrad, causal_conv3d_wgrad)


def causal_conv3d_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    history: torch.Tensor | None,
    geometry: Sequence[int],
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """See `_conv.gradients`; one of torch's calls where there is one convolution to differentiate."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        return _by_pieces(grad, x, weight, history, geometry, needs)
    stride, dilation, padding, time_mode, space_mode = rule_of(geometry)
    rest = stride, dilation, padding, time_mode, space_mode
    past, (_, _, *size) = 0 if history is None else history.shape[2], x.shape
    pieces = pieces_of(size, past, weight.shape[2:], *rest, 1 << 30)
    padded = x
    if len(pieces) > 1:
        repeats = (time_mode == REPLICATE and any(padding[:2])) or (space_mode == REPLICATE and any(padding[2:]))
        if repeats or not _writes_out(x, padding):
            return _by_pieces(grad, x, weight, history, geometry, needs)
        padded = _written_out(x, history, padding, time_mode, space_mode)
        pieces = pieces_of(padded.shape[2:], 0, weight.shape[2:], stride, dilation, [0] * 6, ZEROS, ZEROS, 1 << 30)
    if not pieces[0].whole:
        return _by_pieces(grad, x, weight, history, geometry, needs)
    dx = dhistory = dweight = None
    if any(needs[:3]):
        mask = [needs[0] or needs[1], needs[2], False]
        rest = _transposed(pieces[0].geometry, mask)
        dx, dweight, _ = torch.ops.aten.convolution_backward(grad, padded, weight, None, *rest)
    if dx is not None and padded is not x:
        dx = dx.narrow(3, padding[2], size[1]).narrow(4, padding[4], size[2])
        dx, dhistory = dx.narrow(2, padding[0], size[0]), dx.narrow(2, padding[0] - past, past)
    memory_format = _format(is_channels_last(grad))
    dx, dhistory = (None if t is None else t.contiguous(memory_format=memory_format) for t in (dx, dhistory))
    dbias = grad.sum((0, 2, 3, 4)) if needs[3] else None
    return chosen(needs, dx, dhistory, None if dweight is None else like_weight(dweight, weight), dbias)
