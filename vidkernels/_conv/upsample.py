# SPDX-License-Identifier: Apache-2.0
"""Bare ops of upsample_conv3d: every run of `_upsample_plan` is one convolution of a backend, on the small tensor.

The upsampled tensor is never made: 2/3, 4/9 or 8/27 of the multiplications remain for a factor of 2 in t, hw or thw
and three taps.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vidkernels._conv.geometry import NONE, ZEROS, Geometry, full_float32, is_channels_last
from vidkernels._conv.plan import Taps
from vidkernels._conv.upsample_plan import Run, TimeRule, space_runs, time_runs
from vidkernels._conv.weights import collapse, expand, wide_dtype, with_smooth

_MODULES = {
    "cpp": "vidkernels._conv.cpp",
    "cudnn": "vidkernels.cudnn",
    "triton": "vidkernels.triton.causal_conv3d",
    "torch": "vidkernels._conv.aten",
}


@dataclass(frozen=True)
class Stream:
    """Where x lies in its clip (after `start` frames; `final`: at its end), the first frame to return, the paddings."""

    start: int
    first: int
    final: bool
    padding: tuple[int, ...]
    time_mode: int
    space_mode: int


@dataclass(frozen=True)
class _Phase:
    """One convolution: collapsed taps, the frames, rows and columns it reads and writes, its own padding."""

    runs: tuple[Run, Run, Run]
    reads: tuple[slice, slice, slice]
    past: int
    geometry: Geometry

    @property
    def taps(self) -> tuple[Taps, ...]:
        return tuple(run.taps for run in self.runs)

    def outputs(self, y: torch.Tensor) -> torch.Tensor:
        """View of this phase's elements of y."""
        t, h, w = (slice(r.start, r.start + r.step * (r.count - 1) + 1, r.step) for r in self.runs)
        return y[:, :, t, h, w]

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """View of the frames, rows and columns of x that are read."""
        t, h, w = self.reads
        return x[:, :, t, h, w]

    def history(self, history: torch.Tensor | None) -> torch.Tensor | None:
        """View of the elements of history that are read."""
        if history is None or self.past == 0:
            return None
        _, h, w = self.reads
        return history[:, :, history.shape[2] - self.past :, h, w]


def _window(run: Run, low: int, high: int) -> tuple[slice, int, int]:
    """Stored elements [low, high) that a run reads, and how many it reads before and behind them."""
    begin, end = max(run.begin, low), max(min(run.end, high), low)
    begin = min(begin, end)
    return slice(begin - low, end - low), max(low - run.begin, 0), max(run.end - high, 0)


def _phases(
    size: torch.Size, past: int, kernel: Sequence[int], scale: Sequence[int], rule: TimeRule, stream: Stream
) -> Iterator[_Phase]:
    pads = stream.padding
    total = stream.start + size[0]
    frames = time_runs(rule, kernel[0], (pads[0], pads[1]), stream.time_mode, stream.first, total, stream.final)
    rows = space_runs(size[1], scale[1], kernel[1], (pads[2], pads[3]))
    columns = space_runs(size[2], scale[2], kernel[2], (pads[4], pads[5]))
    for t, h, w in itertools.product(frames, rows, columns):
        read_t, front, back = _window(t, stream.start, total)
        read_h, top, bottom = _window(h, 0, size[1])
        read_w, left, right = _window(w, 0, size[2])
        padding = (front, back, top, bottom, left, right)
        geometry = Geometry((1, 1, 1), (1, 1, 1), padding, stream.time_mode, stream.space_mode)
        yield _Phase((t, h, w), (read_t, read_h, read_w), min(front, past), geometry)


def output_frames(rule: TimeRule, kernel: int, frames: int, stream: Stream) -> int:
    """Frames that one call returns."""
    total = stream.start + frames
    last = rule.upsampled(total) if stream.final else rule.ready(total)
    return last - stream.first + stream.padding[0] + stream.padding[1] - (kernel - 1)


def output_size(
    size: torch.Size, kernel: Sequence[int], scale: Sequence[int], rule: TimeRule, stream: Stream
) -> list[int]:
    """Frames, rows and columns that one call returns."""
    pads = stream.padding
    space = [scale[a] * size[a] + pads[2 * a] + pads[2 * a + 1] - (kernel[a] - 1) for a in (1, 2)]
    return [output_frames(rule, kernel[0], size[0], stream), *space]


def _fwd(
    backend: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    smooth: torch.Tensor | None,
    scale: Sequence[int],
    linear: bool,
    dropped: int,
    split: int,
    start: int,
    first: int,
    final: bool,
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
) -> torch.Tensor:
    module = importlib.import_module(_MODULES[backend])
    rule, stream = (
        TimeRule(scale[0], linear, dropped, split),
        Stream(start, first, final, tuple(padding), time_mode, space_mode),
    )
    kernel = list(weight.shape[2:])
    memory_format = torch.channels_last_3d if is_channels_last(x) else torch.contiguous_format
    size = [x.shape[0], weight.shape[0], *output_size(x.shape[2:], kernel, scale, rule, stream)]
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)
    wide = weight.to(wide_dtype(weight.dtype))
    apart = long_chains(x)
    if smooth is not None and not apart:
        wide = with_smooth(wide, smooth, [(padding[0], padding[2], padding[4])])
    past = 0 if history is None else history.shape[2]
    doubled = getattr(module, "reads_doubled", None)
    if doubled is not None and doubled(x, weight, scale, padding, space_mode):
        _fwd_doubled(module, y, x, wide, bias, history, rule, stream)
        return y
    narrow_bias = None if bias is None else bias.to(x.dtype)
    for phase in _phases(x.shape[2:], past, kernel, scale, rule, stream):
        if not phase.runs[0].taps:  # frames of nothing but zero padding
            phase.outputs(y).copy_(weight.new_zeros(()) if bias is None else bias[:, None, None, None])
            continue
        w = collapse(wide, phase.taps).to(x.dtype)
        inputs = phase.inputs(x), w, narrow_bias, phase.history(history), None
        module.causal_conv3d_fwd(*inputs, *phase.geometry.args(), NONE, out=phase.outputs(y))
    if smooth is not None and apart:
        for view, frames, share in _upsampled(y, x, history, scale, rule, stream):
            view.addcmul_(frames, smooth.to(y.dtype), value=share)
    return y


def long_chains(x: torch.Tensor) -> bool:
    """Whether a convolution of x rounds every addition: a blend's smooth part is added to its result then. As one more weight
    it makes partial sums large early: 10 roundings of the result where the reference has 2.5 (32 channels, 3x3x3, s 0.88).
    It takes no more time either: 440 against 444 ms (256 channels, 5x64x64)."""
    return x.dtype == torch.float32 and (x.device.type == "cpu" or full_float32(x.dtype))


def _upsampled(
    y: torch.Tensor,
    x: torch.Tensor,
    history: torch.Tensor | None,
    scale: Sequence[int],
    rule: TimeRule,
    stream: Stream,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Upsampling as terms (view of y, view of x or history, share): y is the sum of share times frames. Of a result that
    keeps the upsampled size."""
    total = stream.start + x.shape[2]
    for run in time_runs(rule, 1, (0, 0), ZEROS, stream.first, total, stream.final):
        for offset, (share,) in enumerate(run.taps):
            begin = run.begin + offset
            older = min(max(stream.start - begin, 0), run.count)
            sources = [(x, begin + older - stream.start, older, run.count)]
            if history is not None:
                sources.append((history, begin - stream.start + history.shape[2], 0, older))
            for source, first, low, high in sources:
                if not share or low == high:
                    continue
                frames = source[:, :, first : first + high - low]
                rows = slice(run.start + run.step * low, run.start + run.step * (high - 1) + 1, run.step)
                for i, j in itertools.product(range(scale[1]), range(scale[2])):
                    yield y[:, :, rows, i :: scale[1], j :: scale[2]], frames, share


def _fwd_doubled(
    module: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    wide: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    rule: TimeRule,
    stream: Stream,
) -> None:
    """Phases in time only: the backend's kernel doubles height and width by itself."""
    for run, view, frames, older, front in _runs_in_time(y, x, history, wide.shape[2], rule, stream):
        if not run.taps:
            view.copy_(wide.new_zeros(()) if bias is None else bias[:, None, None, None])
            continue
        weight = collapse(wide, (run.taps, None, None))
        module.convolve_doubled(view, frames, weight, bias, older, front, stream.time_mode, stream.space_mode)


def _wgrad_doubled(
    module: Any,
    dweight: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    history: torch.Tensor | None,
    rule: TimeRule,
    stream: Stream,
) -> None:
    """The same for the gradient of the weight, which is added to dweight."""
    for run, view, frames, older, front in _runs_in_time(grad, x, history, dweight.shape[2], rule, stream):
        if run.taps:
            part = module.wgrad_doubled(view, frames, older, len(run.taps), front, stream.time_mode, stream.space_mode)
            dweight += expand(part, (run.taps, None, None))


def _runs_in_time(
    y: torch.Tensor, x: torch.Tensor, history: torch.Tensor | None, kernel: int, rule: TimeRule, stream: Stream
) -> Iterator[tuple[Run, torch.Tensor, torch.Tensor, torch.Tensor | None, int]]:
    """Runs along time with their frames of y, of x and of the history (None: they read none), and how many frames they
    read before those of x."""
    total = stream.start + x.shape[2]
    past = 0 if history is None else history.shape[2]
    for run in time_runs(rule, kernel, stream.padding[:2], stream.time_mode, stream.first, total, stream.final):
        view = y[:, :, run.start : run.start + run.step * (run.count - 1) + 1 : run.step]
        frames, front, _ = _window(run, stream.start, total)
        used = min(front, past)
        older = history[:, :, past - used :] if history is not None and used else None
        yield run, view, x[:, :, frames], older, front


def _dgrad(
    backend: str,
    grad: torch.Tensor,
    weight: torch.Tensor,
    smooth: torch.Tensor | None,
    input_size: Sequence[int],
    history_frames: int,
    scale: Sequence[int],
    linear: bool,
    dropped: int,
    split: int,
    start: int,
    first: int,
    final: bool,
    padding: Sequence[int],
    *modes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    module = importlib.import_module(_MODULES[backend])
    rule, stream = TimeRule(scale[0], linear, dropped, split), Stream(start, first, final, tuple(padding), *modes)
    batch, channels, *size = input_size
    memory_format = torch.channels_last_3d if is_channels_last(grad) else torch.contiguous_format
    options: dict[str, Any] = {"dtype": grad.dtype, "device": grad.device, "memory_format": memory_format}
    dx = torch.empty(input_size, **options).zero_()
    dhistory = torch.empty([batch, channels, history_frames, *size[1:]], **options).zero_()
    wide = weight.to(wide_dtype(weight.dtype))
    apart = long_chains(grad)
    if smooth is not None and not apart:
        wide = with_smooth(wide, smooth, [(padding[0], padding[2], padding[4])])
    for phase in _phases(torch.Size(size), history_frames, list(weight.shape[2:]), scale, rule, stream):
        if not phase.runs[0].taps:
            continue
        w = collapse(wide, phase.taps).to(grad.dtype)
        target, past = phase.inputs(dx), phase.history(dhistory)
        cotangent = phase.outputs(grad).contiguous(memory_format=memory_format)
        part, dpast = module.causal_conv3d_dgrad(cotangent, w, list(target.shape), phase.past, *phase.geometry.args())
        target += part
        if past is not None:
            past += dpast
    if smooth is not None and apart:
        for view, frames, share in _upsampled(grad, dx, dhistory if history_frames else None, scale, rule, stream):
            frames.addcmul_(view, smooth.to(dx.dtype), value=share)
    return dx, dhistory


def _wgrad(
    backend: str,
    grad: torch.Tensor,
    x: torch.Tensor,
    history: torch.Tensor | None,
    kernel: Sequence[int],
    scale: Sequence[int],
    linear: bool,
    dropped: int,
    split: int,
    start: int,
    first: int,
    final: bool,
    padding: Sequence[int],
    *modes: int,
) -> torch.Tensor:
    module = importlib.import_module(_MODULES[backend])
    rule, stream = TimeRule(scale[0], linear, dropped, split), Stream(start, first, final, tuple(padding), *modes)
    memory_format = torch.channels_last_3d if is_channels_last(grad) else torch.contiguous_format
    dweight = torch.zeros([grad.shape[1], x.shape[1], *kernel], dtype=wide_dtype(x.dtype), device=x.device)
    doubled = getattr(module, "reads_doubled", None)
    if doubled is not None and doubled(x, dweight, scale, padding, stream.space_mode):
        _wgrad_doubled(module, dweight, grad, x, history, rule, stream)
        return dweight
    for phase in _phases(x.shape[2:], 0 if history is None else history.shape[2], kernel, scale, rule, stream):
        if not phase.runs[0].taps:
            continue
        cotangent = phase.outputs(grad).contiguous(memory_format=memory_format)
        inputs = cotangent, phase.inputs(x), phase.history(history)
        positions = [len(taps) for taps in phase.taps]
        dweight += expand(module.causal_conv3d_wgrad(*inputs, positions, *phase.geometry.args()), phase.taps)
    return dweight


for _backend in _MODULES:  # fwd_torch, dgrad_torch, ...: the names that ops.upsample_conv3d registers
    globals().update(
        {
            f"{name}_{_backend}": partial(f, _backend)
            for name, f in (("fwd", _fwd), ("dgrad", _dgrad), ("wgrad", _wgrad))
        }
    )
