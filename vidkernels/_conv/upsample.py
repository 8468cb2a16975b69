# SPDX-License-Identifier: Apache-2.0
"""Bare ops of upsample_conv3d: every phase of a plan is one convolution of a backend, on the small tensor.

The upsampled tensor is never made: 2/3, 4/9 or 8/27 of the multiplications remain for a factor of 2 in t, hw or thw
and three taps.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from vidkernels import _library
from vidkernels._conv.geometry import NONE, ZEROS, full_float32, is_channels_last
from vidkernels._conv.phases import Call, Plan, Stream, call_of, runs_in_time
from vidkernels._conv.upsample_plan import TimeRule, time_runs
from vidkernels._conv.weights import (
    collapse,
    collapse_cpp,
    expand,
    scaled_bias,
    shares,
    smooth_tap,
    summands,
    wide_dtype,
)

_MODULES = {
    "cpp": "vidkernels._conv.cpp",
    "cudnn": "vidkernels.cudnn",
    "triton": "vidkernels.triton.causal_conv3d",
    "torch": "vidkernels._conv.aten",
}
_PHASES = "vidkernels.triton._conv_phases"


def _fwd(
    backend: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    mix_factor: torch.Tensor | None,
    scale: Sequence[int],
    *rule: Any,
) -> torch.Tensor:
    call = call_of(x.shape[2:], 0 if history is None else history.shape[2], weight.shape[2:], scale, *rule)
    size = [x.shape[0], weight.shape[0], *call.size]
    apart = mix_factor is not None and long_chains(x)
    if backend == "triton":
        phases = sys.modules.get(_PHASES) or importlib.import_module(_PHASES)
        y = phases.convolve(call.plan, size, x, weight, bias, history, mix_factor, scale, call.stream.padding, apart)
    else:
        memory_format = torch.channels_last_3d if is_channels_last(x) else torch.contiguous_format
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)
        _convolve(backend, y, x, weight, bias, history, mix_factor, scale, call, apart)
    if mix_factor is not None and apart:
        smooth = shares(mix_factor)[0].to(y.dtype)
        for view, frames, share in _upsampled(y, x, history, scale, call.rule, call.stream):
            view.addcmul_(frames, smooth, value=share)
    return y


def _convolve(
    backend: str,
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    mix_factor: torch.Tensor | None,
    scale: Sequence[int],
    call: Call,
    apart: bool,
) -> None:
    """Phase by phase into y; without the smooth part of a blend if that is `apart`."""
    rule, stream = call.rule, call.stream
    module, tap = importlib.import_module(_MODULES[backend]), None if apart else stream.padding
    if _kernel_makes_weights(backend, weight):
        separate = importlib.import_module(_PHASES).separate_weights
        _convolve_phases(module, y, x, history, call.plan, *separate(call.plan, weight, bias, mix_factor, tap))
        return
    whole_bias = scaled_bias(bias, mix_factor)
    doubled = getattr(module, "reads_doubled", None)
    if doubled is not None and doubled(x, weight, scale, stream.padding, stream.space_mode):
        _fwd_doubled(module, y, x, weight, whole_bias, history, mix_factor, tap, rule, stream)
        return
    narrow_bias = None if whole_bias is None else whole_bias.to(x.dtype)
    each = _phase_weights(backend, call.plan, weight, mix_factor, stream.padding, apart)
    _convolve_phases(module, y, x, history, call.plan, each, narrow_bias)


def _convolve_phases(
    module: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    history: torch.Tensor | None,
    plan: Plan,
    weights: Iterator[torch.Tensor],
    bias: torch.Tensor | None,
) -> None:
    """One convolution of a backend after the other, each into its own elements of y."""
    for phase, weight in zip(plan.phases, weights, strict=True):
        if not phase.taps[0]:  # frames of nothing but zero padding
            phase.outputs(y).copy_(x.new_zeros(()) if bias is None else bias[:, None, None, None])
            continue
        inputs = phase.inputs(x), weight, bias, phase.history(history), None
        module.causal_conv3d_fwd(*inputs, *phase.geometry.args(), NONE, out=phase.outputs(y))


def _kernel_makes_weights(backend: str, weight: torch.Tensor) -> bool:
    """Whether a Triton kernel sums the taps of all phases in one launch, where torch takes up to 100: on a GPU."""
    if backend == "triton":
        return True
    return weight.is_cuda and weight.dtype != torch.float64 and _library.triton_missing() is None


def _phase_weights(
    backend: str,
    plan: Plan,
    weight: torch.Tensor,
    mix_factor: torch.Tensor | None,
    padding: Sequence[int],
    apart: bool,
    *,
    channels_inside: bool = False,
) -> Iterator[torch.Tensor]:
    """Of every phase in turn, in the dtype of the weight; in C++ with filters next to each other in memory, or channels."""
    tap = None if apart else padding
    if _kernel_makes_weights(backend, weight):
        yield from importlib.import_module(_PHASES).separate_weights(plan, weight, None, mix_factor, tap)[0]
        return
    if backend == "cpp":
        if channels_inside:
            each = _summed_by_kernel(plan, weight.transpose(0, 1), mix_factor, tap)
            yield from (w.transpose(0, 1) for w in each)
        else:
            yield from _summed_by_kernel(plan, weight, mix_factor, tap)
        return
    wide = summands(weight, None, mix_factor, tap)[0]
    for phase in plan.phases:
        yield collapse(wide, phase.taps).to(weight.dtype)


def _summed_by_kernel(
    plan: Plan, weight: torch.Tensor, mix_factor: torch.Tensor | None, padding: Sequence[int] | None
) -> Iterator[torch.Tensor]:
    """The same in C++: those of all phases in space at a time, which are views."""
    for frames in plan.axes[0]:
        rows, columns = (tuple(itertools.chain.from_iterable(run.taps for run in axis)) for axis in plan.axes[1:])
        summed = collapse_cpp(weight, (frames.taps, rows, columns), mix_factor, smooth_tap(padding), weight.dtype)
        top = 0
        for h in plan.axes[1]:
            left = 0
            for w in plan.axes[2]:
                yield summed[:, :, :, top : top + len(h.taps), left : left + len(w.taps)]
                left += len(w.taps)
            top += len(h.taps)


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
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    mix_factor: torch.Tensor | None,
    padding: Sequence[int] | None,
    rule: TimeRule,
    stream: Stream,
) -> None:
    """Phases in time only: the backend's kernel doubles height and width by itself, and reads weights in float32."""
    for run, view, frames, older, front in runs_in_time(y, x, history, weight.shape[2], rule, stream):
        if not run.taps:
            view.copy_(x.new_zeros(()) if bias is None else bias[:, None, None, None])
            continue
        wide = collapse_cpp(weight, (run.taps, None, None), mix_factor, smooth_tap(padding), wide_dtype(weight.dtype))
        module.convolve_doubled(view, frames, wide, bias, older, front, stream.time_mode, stream.space_mode)


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
    for run, view, frames, older, front in runs_in_time(grad, x, history, dweight.shape[2], rule, stream):
        if run.taps:
            part = module.wgrad_doubled(view, frames, older, len(run.taps), front, stream.time_mode, stream.space_mode)
            dweight += expand(part, (run.taps, None, None))


def _dgrad(
    backend: str,
    grad: torch.Tensor,
    weight: torch.Tensor,
    mix_factor: torch.Tensor | None,
    input_size: Sequence[int],
    history_frames: int,
    scale: Sequence[int],
    *rule: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    module = importlib.import_module(_MODULES[backend])
    batch, channels, *size = input_size
    memory_format = torch.channels_last_3d if is_channels_last(grad) else torch.contiguous_format
    options: dict[str, Any] = {"dtype": grad.dtype, "device": grad.device, "memory_format": memory_format}
    dx = torch.empty(input_size, **options).zero_()
    dhistory = torch.empty([batch, channels, history_frames, *size[1:]], **options).zero_()
    apart = mix_factor is not None and long_chains(grad)
    call = call_of(size, history_frames, weight.shape[2:], scale, *rule)
    padding = call.stream.padding
    weights = _phase_weights(backend, call.plan, weight, mix_factor, padding, apart, channels_inside=True)
    for phase, w in zip(call.plan.phases, weights, strict=True):
        if not phase.taps[0]:
            continue
        target, past = phase.inputs(dx), phase.history(dhistory)
        cotangent = phase.outputs(grad).contiguous(memory_format=memory_format)
        part, dpast = module.causal_conv3d_dgrad(cotangent, w, list(target.shape), phase.past, *phase.geometry.args())
        target += part
        if past is not None:
            past += dpast
    if mix_factor is not None and apart:
        smooth = shares(mix_factor)[0].to(dx.dtype)
        past = dhistory if history_frames else None
        for view, frames, share in _upsampled(grad, dx, past, scale, call.rule, call.stream):
            frames.addcmul_(view, smooth, value=share)
    return dx, dhistory


def _wgrad(
    backend: str,
    grad: torch.Tensor,
    x: torch.Tensor,
    history: torch.Tensor | None,
    kernel: Sequence[int],
    scale: Sequence[int],
    *rule: Any,
) -> torch.Tensor:
    module = importlib.import_module(_MODULES[backend])
    call = call_of(x.shape[2:], 0 if history is None else history.shape[2], kernel, scale, *rule)
    stream = call.stream
    memory_format = torch.channels_last_3d if is_channels_last(grad) else torch.contiguous_format
    dweight = torch.zeros([grad.shape[1], x.shape[1], *kernel], dtype=wide_dtype(x.dtype), device=x.device)
    doubled = getattr(module, "reads_doubled", None)
    if doubled is not None and doubled(x, dweight, scale, stream.padding, stream.space_mode):
        _wgrad_doubled(module, dweight, grad, x, history, call.rule, stream)
        return dweight
    for phase in call.plan.phases:
        if not phase.taps[0]:
            continue
        cotangent = phase.outputs(grad).contiguous(memory_format=memory_format)
        inputs = cotangent, phase.inputs(x), phase.history(history)
        part = module.causal_conv3d_wgrad(*inputs, list(phase.kernel), *phase.geometry.args())
        dweight += expand(part, phase.taps)
    return dweight


for _backend in _MODULES:  # fwd_torch, dgrad_torch, ...: the names that ops.upsample_conv3d registers
    globals().update(
        {
            f"{name}_{_backend}": partial(f, _backend)
            for name, f in (("fwd", _fwd), ("dgrad", _dgrad), ("wgrad", _wgrad))
        }
    )
