# SPDX-License-Identifier: Apache-2.0
"""Backend "cpp" of causal_conv3d: C++ kernels on channels-last tensors. Here are allocation, layout and the choice of
algorithm; `csrc/causal_conv3d` has no policy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from vidkernels._conv import aten
from vidkernels._conv.geometry import NONE, REPLICATE, ZEROS
from vidkernels._conv.gradients import backward_by
from vidkernels._conv.results import delivered, empty, has_channels_last, laid_out, target
from vidkernels._conv.weights import wide_dtype
from vidkernels._tracing import constant_while_tracing

DIRECT, WINOGRAD, WINOGRAD_UPSAMPLED, FEW_FILTERS, DIRECT_PAIRS, FEW_FILTERS_PAIRS, DIRECT_TILES = range(7)
# Of the padded gradient that is made at a time where pixels beyond the borders repeat those on them: 8 MB of bfloat16.
_FOLDED_ELEMENTS = 1 << 22
# Fewer channels, filters or pixels do not pay for transforming tiles and weights.
_WINOGRAD_CHANNELS, _WINOGRAD_FILTERS, _WINOGRAD_PIXELS = 16, 16, 16
# Transformed weights (16 values for 9) of more values than this have to be read by more pixels to pay: 512 to 512 3x3x3.
_MANY_WEIGHTS, _MANY_PIXELS = 1 << 23, 100
# 128 to 3 takes a quarter of the direct algorithm's time; with fewer channels than a vector has lanes nothing is gained.
_FEW_FILTERS, _FEW_FILTERS_CHANNELS = 4, 16


@constant_while_tracing
def multiplies_pairs(dtype: torch.dtype) -> bool:
    """Whether the kernels multiply this dtype in pairs: bfloat16 on a processor with AVX512_BF16."""
    if dtype != torch.bfloat16 or not aten.native_on_cpu(dtype):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@constant_while_tracing
def multiplies_tiles(dtype: torch.dtype) -> bool:
    """Whether the kernels multiply this dtype by tiles: bfloat16 on a processor with AMX that the system lets us use."""
    return multiplies_pairs(dtype) and aten.tiles_on_cpu()


def algorithm(
    channels: int,
    filters: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pixels: int,
    *,
    pairs: bool = False,
    tiles: bool = False,
) -> int:
    """Winograd for 3x3 taps of stride 1 in space wherever it saves time, taps as filters where there are at most 4 filters,
    otherwise the direct algorithm. Products of bfloat16 in pairs take half the time, which Winograd in float32 saves as
    well (128 channels, 3x3x3: 22.1 and 21.1 ms), but for the transform of weights that few pixels read (512 channels, 5x8x8:
    28 and 61 ms).

    Args:
        pixels: of one frame of the result. The number of frames has no say: every chunking of a clip must sum in the
            same order.
        pairs: whether `multiplies_pairs`.
        tiles: whether `multiplies_tiles`: then whatever the shape, as pairs take 4 to 16 times as long.
    """
    if tiles:
        return DIRECT_TILES
    fits = tuple(kernel[1:]) == (3, 3) and tuple(stride[1:]) == (1, 1) and tuple(dilation[1:]) == (1, 1)
    many = 16 * channels * filters * kernel[0] > _MANY_WEIGHTS
    large = channels >= _WINOGRAD_CHANNELS and filters >= _WINOGRAD_FILTERS
    large = large and pixels >= (_MANY_PIXELS if many else _WINOGRAD_PIXELS)
    if fits and large and not pairs:
        return WINOGRAD
    few = filters <= _FEW_FILTERS and channels >= _FEW_FILTERS_CHANNELS and kernel[1] * kernel[2] > 1
    if few and tuple(stride[1:]) == (1, 1):
        return FEW_FILTERS_PAIRS if pairs else FEW_FILTERS
    return DIRECT_PAIRS if pairs else DIRECT


def _channels_last(x: torch.Tensor | None) -> torch.Tensor | None:
    """x itself if its channels lie next to each other, else a copy in channels_last_3d (a layout change, no padding)."""
    if x is None or has_channels_last(x):
        return x
    return x.contiguous(memory_format=torch.channels_last_3d)


def _convolve(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    stride: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
    modes: Sequence[int],
) -> None:
    """y = the result; `tensors` are bias, history, residual, `modes` those of time, space and activation.

    Output (t, h, w) reads x from (t, h, w) * stride - before on, whatever y's size: parts of a result are fine.
    """
    bias, history, residual = tensors
    sizes = x.shape[1], y.shape[1], weight.shape[2:], stride, dilation, y.shape[3] * y.shape[4]
    same = weight.dtype == x.dtype
    chosen = algorithm(*sizes, pairs=same and multiplies_pairs(x.dtype), tiles=same and multiplies_tiles(x.dtype))
    inputs = _channels_last(x), weight, bias, _channels_last(history), _channels_last(residual)
    torch.ops.vidkernels.causal_conv3d_out.default(y, *inputs, stride, dilation, before, *modes, chosen)


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
    y = target(x, weight, stride, dilation, padding, out)
    modes = time_mode, space_mode, activation
    _convolve(y, x, weight, (bias, history, residual), stride, dilation, [padding[0], padding[2], padding[4]], modes)
    return delivered(y, x, out)


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
    """See `_conv.gradients`. The gradient is itself a convolution, of `grad` with the mirrored kernel: one per residue of
    the strides, each with the taps that read pixels of that residue."""
    if any(s > 1 and d > 1 for s, d in zip(stride, dilation, strict=True)):
        args = stride, dilation, padding, time_mode, space_mode
        return aten.causal_conv3d_dgrad(grad, weight, input_size, history_frames, *args)
    mirrored = _MirroredKernel(grad, weight, stride, dilation, [padding[0], padding[2], padding[4]])
    front, back, top, bottom, left, right = padding
    batch, channels, frames, height, width = input_size
    if space_mode == ZEROS:
        top = bottom = left = right = 0

    def gradient(begin: int, end: int) -> torch.Tensor:
        """Of the padded clip's frames [begin, end), which begins at -front."""
        part = empty(grad, [batch, channels, end - begin, height, width])
        if not part.numel():
            return part
        if not (top or bottom or left or right):
            mirrored.convolve(part, (begin, 0, 0))
            return part
        # Pixels beyond the borders repeat those on them, which their gradients are added to.
        wide = height + top + bottom, width + left + right
        step = max(1, _FOLDED_ELEMENTS // max(batch * channels * wide[0] * wide[1], 1))
        for first in range(0, end - begin, step):
            count = min(step, end - begin - first)
            padded = empty(grad, [batch, channels, count, *wide])
            mirrored.convolve(padded, (begin + first, -top, -left))
            part[:, :, first : first + count] = _folded(_folded(padded, 3, top, bottom), 4, left, right)
        return part

    if time_mode == REPLICATE and not history_frames and weight.numel() > batch * channels * frames * height * width:
        # Weights are arranged once a call, which takes longer here than a few frames more.
        padded = gradient(-front, frames + back)
        return laid_out(_folded(padded, 2, front, back).contiguous(memory_format=torch.channels_last_3d), grad), None
    dx = gradient(0, frames)
    dhistory = gradient(-history_frames, 0) if history_frames else None
    if time_mode == REPLICATE:  # virtual frames repeat the oldest and the last one
        oldest = dx if dhistory is None else dhistory
        if front > history_frames:
            oldest[:, :, 0] += gradient(-front, -history_frames).sum(2)
        if back:
            dx[:, :, -1] += gradient(frames, frames + back).sum(2)
    return laid_out(dx, grad), None if dhistory is None else laid_out(dhistory, grad)


def _folded(padded: torch.Tensor, axis: int, before: int, behind: int) -> torch.Tensor:
    """A view of `padded` without the elements beyond its ends, which are added to those at the ends."""
    size = padded.shape[axis] - before - behind
    inside = padded.narrow(axis, before, size)
    if before:
        inside.select(axis, 0).add_(padded.narrow(axis, 0, before).sum(axis))
    if behind:
        inside.select(axis, size - 1).add_(padded.narrow(axis, before + size, behind).sum(axis))
    return inside


class _MirroredKernel:
    """The gradient of x as convolutions of the gradient of y."""

    def __init__(
        self,
        grad: torch.Tensor,
        weight: torch.Tensor,
        stride: Sequence[int],
        dilation: Sequence[int],
        before: Sequence[int],
    ) -> None:
        self.grad = grad if has_channels_last(grad) else grad.contiguous(memory_format=torch.channels_last_3d)
        self.weight = weight.transpose(0, 1)
        self.stride, self.dilation, self.before = stride, dilation, before

    def convolve(self, part: torch.Tensor, begin: Sequence[int]) -> None:
        """part = gradient at the positions of the padded clip from `begin` on, where x's first is 0."""
        for residues in itertools.product(*(range(s) for s in self.stride)):
            w, y, first = self.weight, part, []
            for axis, (residue, stride) in enumerate(zip(residues, self.stride, strict=True)):
                # Position begin + skip is the first that lies a multiple of the stride behind `residue`.
                at = begin[axis] + self.before[axis]
                skip = (residue - at) % stride
                every = [slice(None)] * (2 + axis)
                y, w = y[tuple([*every, slice(skip, None, stride)])], w[tuple([*every, slice(residue, None, stride)])]
                first.append((at + skip - residue) // stride)
            if not w.numel():
                y.zero_()
            elif y.numel():
                self._convolve(y, w, first)

    def _convolve(self, y: torch.Tensor, w: torch.Tensor, first: Sequence[int]) -> None:
        """y[o] = sum over taps j of grad[first + o - j * dilation] w[j]."""
        ones, dilation, before = (1, 1, 1), self.dilation, [-f for f in first]
        sizes = self.grad.shape[1], y.shape[1], w.shape[2:], ones, dilation, y.shape[3] * y.shape[4]
        chosen = algorithm(*sizes, pairs=multiplies_pairs(y.dtype), tiles=multiplies_tiles(y.dtype))
        if chosen in (DIRECT, DIRECT_PAIRS, DIRECT_TILES):
            dilation = [-d for d in dilation]  # saves the mirrored copy of the weights
        else:
            before = [b + (k - 1) * d for b, k, d in zip(before, w.shape[2:], dilation, strict=True)]
            w = w.flip(2, 3, 4)
        _convolve(y, self.grad, w, (None, None, None), ones, dilation, before, (ZEROS, ZEROS, NONE))


def reads_doubled(
    x: torch.Tensor, weight: torch.Tensor, scale: Sequence[int], padding: Sequence[int], space_mode: int
) -> bool:
    """Whether `convolve_doubled` and `wgrad_doubled` serve an upsampling convolution: height and width doubled, 3x3 taps,
    padded by one. Tiles of bfloat16 compute its phases in less time."""
    if multiplies_tiles(x.dtype):
        return False
    doubles = tuple(scale[1:]) == (2, 2) and tuple(padding[2:]) == (1, 1, 1, 1)
    pixels = 4 * x.shape[3] * x.shape[4]
    return doubles and algorithm(x.shape[1], weight.shape[0], weight.shape[2:], (1,) * 3, (1,) * 3, pixels) == WINOGRAD


def convolve_doubled(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    front: int,
    time_mode: int,
    space_mode: int,
) -> None:
    """y = convolution of x with height and width doubled, 9 products instead of 36 per 2x2 pixels.

    Args:
        y: view that receives the result, [B, K, To, 2H, 2W].
        weight: [K, C, kt, 3, 3], float32 (float64 for float64); bias in the dtype of x.
        front: frames that the first output reads before x.
    """
    ones = [1, 1, 1]
    wide_bias = None if bias is None else bias.to(weight.dtype)
    inputs = _channels_last(x), weight, wide_bias, _channels_last(history), None
    written = y if has_channels_last(y) else empty(y, y.shape)
    torch.ops.vidkernels.causal_conv3d_out.default(
        written, *inputs, ones, ones, [front, 1, 1], time_mode, space_mode, NONE, WINOGRAD_UPSAMPLED
    )
    if written is not y:
        y.copy_(written)


def wgrad_algorithm(
    channels: int,
    filters: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    *,
    space_mode: int,
    native: bool,
    contiguous: bool,
    pairs: bool = False,
    tiles: bool = False,
) -> int | None:
    """Algorithm of the weight gradient, or None where torch's own routine is as fast or faster.

    As in the forward pass, but Winograd serves frames of any size: there are no weights to transform, and chunks need
    not sum in the same order. The direct algorithm takes 0.6 of oneDNN's time in float32, but 1.1 to 3 times as long where
    contiguous tensors have to be laid out first, and twice as long as oneDNN's units for bfloat16 unless it has pairs.

    Args:
        native: whether oneDNN multiplies this low-precision dtype in units of its own.
        contiguous: whether the activations would have to be copied into channels_last_3d.
        pairs: whether `multiplies_pairs`.
        tiles: whether `multiplies_tiles`. oneDNN's own (3.12) does not end there for some shapes and is garbage for others.
    """
    if tiles:
        return DIRECT_TILES
    chosen = algorithm(channels, filters, kernel, stride, dilation, _MANY_PIXELS, pairs=pairs)
    if chosen in (FEW_FILTERS, FEW_FILTERS_PAIRS) and space_mode != ZEROS:
        chosen = DIRECT_PAIRS if pairs else DIRECT
    slow = contiguous or (native and not pairs)
    return None if chosen in (DIRECT, DIRECT_PAIRS) and slow else chosen


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
    """See `_conv.gradients`. The same bits for any number of threads."""
    native = x.dtype in (torch.bfloat16, torch.float16) and aten.native_on_cpu(x.dtype)
    moved = not (has_channels_last(grad) and has_channels_last(x))
    sizes = x.shape[1], grad.shape[1], kernel, stride, dilation
    pairs, tiles = multiplies_pairs(x.dtype), multiplies_tiles(x.dtype)
    chosen = wgrad_algorithm(*sizes, space_mode=space_mode, native=native, contiguous=moved, pairs=pairs, tiles=tiles)
    if chosen is None:
        return aten.causal_conv3d_wgrad(grad, x, history, kernel, stride, dilation, padding, time_mode, space_mode)
    before = [padding[0], padding[2], padding[4]]
    return _wgrad(grad, x, history, kernel, stride, dilation, before, (time_mode, space_mode, chosen))


causal_conv3d_bwd = backward_by(causal_conv3d_dgrad, causal_conv3d_wgrad)


def wgrad_doubled(
    grad: torch.Tensor,
    x: torch.Tensor,
    history: torch.Tensor | None,
    taps: int,
    front: int,
    time_mode: int,
    space_mode: int,
) -> torch.Tensor:
    """Weight gradient [K, C, taps, 3, 3] of `convolve_doubled`, from the gradient of its y."""
    ones, modes = [1, 1, 1], (time_mode, space_mode, WINOGRAD_UPSAMPLED)
    return _wgrad(grad, x, history, [taps, 3, 3], ones, ones, [front, 1, 1], modes)


def _wgrad(
    grad: torch.Tensor,
    x: torch.Tensor,
    history: torch.Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
    modes: Sequence[int],
) -> torch.Tensor:
    """`modes` are those of time and space, and the algorithm."""
    dweight = torch.empty([grad.shape[1], x.shape[1], *kernel], dtype=wide_dtype(x.dtype), device=x.device)
    tensors = _channels_last(grad), _channels_last(x), _channels_last(history)
    torch.ops.vidkernels.causal_conv3d_wgrad_out.default(dweight, *tensors, stride, dilation, before, *modes)
    return dweight
