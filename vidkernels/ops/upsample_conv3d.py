# SPDX-License-Identifier: Apache-2.0
"""Upsampling + causal convolution (+ blend) without the upsampled tensor.

Bare ops, per backend (suffix `_cpp`, `_cudnn`, `_triton`, `_torch`): upsample_conv3d_fwd, _dgrad, _wgrad, with the arguments of
causal_conv3d's and the rule of upsampling. They cut the work into phases (`_upsample_plan`) and give each to the convolution of
that backend. A blend scales weight and bias; the smooth part's share is added to the weights of the taps it reads, or, where
float32 sums too much in one chain, to the result. Its factor's gradient comes out of wgrad.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from vidkernels import _signature, dispatch
from vidkernels._conv.geometry import MODES, NONE, is_channels_last
from vidkernels._conv.phases import Stream, output_size
from vidkernels._conv.upsample_plan import TimeRule
from vidkernels._conv.weights import wide_dtype
from vidkernels._reference import upsample_conv3d as reference
from vidkernels.errors import OptionError, ShapeError
from vidkernels.ops import _checks
from vidkernels.ops import causal_conv3d as _defined  # noqa: F401  the op of the kernels in C++, which phases call
from vidkernels.ops._autograd import needs_grad
from vidkernels.ops._blended_conv3d import blended_empty_result, check_mix_factor, upsample_convolve, upsample_op
from vidkernels.ops._causal_conv3d_backends import SUFFIX, rank_phases, table
from vidkernels.ops._causal_conv3d_call import (
    autocast,
    check_fit,
    check_tensors,
    dense,
    frame_padding,
    signature,
    space_padding,
    triple,
)
from vidkernels.ops._register import PYTORCH_KEYS, TRITON_KEYS, Launcher, define_variant

_RULE = (
    "int[] scale, bool linear, int dropped, int split, SymInt start, SymInt first, bool final, int[] padding, "
    "int time_mode, int space_mode"
)
_SCHEMAS = {
    "fwd": f"(Tensor x, Tensor weight, Tensor? bias, Tensor? history, Tensor? mix_factor, {_RULE}) -> Tensor",
    "dgrad": "(Tensor grad, Tensor weight, Tensor? mix_factor, SymInt[] input_size, SymInt history_frames, "
    f"{_RULE}) -> (Tensor, Tensor)",
    "wgrad": f"(Tensor grad, Tensor x, Tensor? history, int[] kernel, {_RULE}) -> Tensor",
}


def _fwd_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    mix_factor: torch.Tensor | None,
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
    torch._check(x.shape[1] == weight.shape[1], lambda: "upsample_conv3d_fwd: x and weight differ in input channels")
    rule, stream = TimeRule(scale[0], linear, dropped, split), Stream(start, first, final, tuple(padding), *modes)
    size = output_size(x.shape[2:], weight.shape[2:], scale, rule, stream)
    memory_format = torch.channels_last_3d if is_channels_last(x) else torch.contiguous_format
    size = [x.shape[0], weight.shape[0], *size]
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _dgrad_fake(
    grad: torch.Tensor,
    weight: torch.Tensor,
    mix_factor: torch.Tensor | None,
    input_size: Sequence[int],
    history_frames: int,
    *rule: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch._check(grad.shape[1] == weight.shape[0], lambda: "upsample_conv3d_dgrad: grad and weight differ in channels")
    memory_format = torch.channels_last_3d if is_channels_last(grad) else torch.contiguous_format
    options: dict[str, Any] = {"dtype": grad.dtype, "device": grad.device, "memory_format": memory_format}
    batch, channels, _, height, width = input_size
    return torch.empty(input_size, **options), torch.empty([batch, channels, history_frames, height, width], **options)


def _wgrad_fake(
    grad: torch.Tensor, x: torch.Tensor, history: torch.Tensor | None, kernel: Sequence[int], *rule: Any
) -> torch.Tensor:
    return torch.empty([grad.shape[1], x.shape[1], *kernel], dtype=wide_dtype(x.dtype), device=x.device)


_KEYS = {
    "cpp": ("CPU",),
    "cudnn": ("CUDA",),
    "triton": TRITON_KEYS,
    "torch": PYTORCH_KEYS,
}
for _name, _fake in (("fwd", _fwd_fake), ("dgrad", _dgrad_fake), ("wgrad", _wgrad_fake)):
    for _backend, _keys in _KEYS.items():
        _target = f"vidkernels._conv.upsample:{_name}_{_backend}"
        define_variant(f"upsample_conv3d_{_name}", _backend, _SCHEMAS[_name], _fake, _target, _keys)


@dataclass(frozen=True)
class _Call:
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    history: torch.Tensor | None
    scale: tuple[int, int, int]
    rule: TimeRule
    stream: Stream
    mix_factor: torch.Tensor | None = None

    @property
    def size(self) -> list[int]:
        return output_size(self.x.shape[2:], list(self.weight.shape[2:]), list(self.scale), self.rule, self.stream)

    @property
    def args(self) -> tuple[Any, ...]:
        """The rule as trailing arguments of the bare ops."""
        rule, stream = self.rule, self.stream
        named = list(self.scale), rule.linear, rule.dropped, rule.split, stream.start, stream.first, stream.final
        return *named, list(stream.padding), stream.time_mode, stream.space_mode

    def facts(self) -> tuple[Any, ...]:
        """Those of the convolutions that the phases are, for the predicates of causal_conv3d."""
        kernel = tuple(-(-(k - 1) // s) + 1 for k, s in zip(self.weight.shape[2:], self.scale, strict=True))
        frames = 0 if self.history is None else self.history.shape[2]
        ones = (1, 1, 1)
        modes = self.stream.time_mode, self.stream.space_mode
        return self.x, self.weight.shape[0], kernel, ones, ones, self.stream.padding, *modes, frames, NONE


def _prepare(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: int | tuple[int, int, int] = (2, 1, 1),
    mode: str = "nearest",
    first_frame: str = "repeat",
    split: int = 0,
    time_padding: str = "zeros",
    history: torch.Tensor | None = None,
    start: int = 0,
    final: bool | None = None,
    pad_frames: int | tuple[int, int] | None = None,
    spatial_padding: int | tuple[int, ...] | None = None,
    spatial_padding_mode: str = "zeros",
    mix_factor: torch.Tensor | None = None,
    return_history: bool = False,
) -> _Call:
    check_tensors(x, weight, bias, history)
    for name, value, allowed in (
        ("mode", mode, ("nearest", "linear_time")),
        ("first_frame", first_frame, ("repeat", "single")),
        ("time_padding", time_padding, MODES),
        ("spatial_padding_mode", spatial_padding_mode, MODES),
    ):
        _checks.check_option(name, value, allowed)
    scale, linear = triple("scale", scale), mode == "linear_time"
    _checks.check_flag("return_history", return_history)
    final = not return_history if final is None else final
    if linear and first_frame == "single":
        raise OptionError(
            "first_frame", "'repeat' for mode='linear_time'", "'single'", "Use split=1 for VidTok's rule."
        )
    for option, count in (("split", split), ("start", start)):
        if _checks.whole_number(count, 0) is None:
            raise OptionError(option, "at least 0, a whole number", repr(count))
    _checks.check_flag("final", final)
    past = 0 if history is None else history.shape[2]
    if past > start:
        raise ShapeError(
            "history", f"at most start={start} frames", past, "Pass start=, the frames of the clip before x."
        )
    kernel = tuple(weight.shape[2:])
    frames = frame_padding(kernel[0], 1, 1, pad_frames, None)
    if frames[1] > 0 and (return_history or start > 0 or not final):
        raise OptionError("pad_frames", "no frames behind when a clip comes in chunks", repr(pad_frames))
    padding = (*frames, *space_padding(kernel[1:], (1, 1), spatial_padding))
    rule = TimeRule(scale[0], linear, scale[0] - 1 if first_frame == "single" else 0, split)
    stream = Stream(start, rule.ready(start), final, padding, MODES[time_padding], MODES[spatial_padding_mode])
    needed = rule.lookback(start, frames[0])
    if past < needed:
        raise ShapeError(
            "history", f"the last {needed} frames before x", past, "Pass the history that the previous call returned."
        )
    call = _Call(x, weight, bias, history if past else None, scale, rule, stream, mix_factor)
    check_fit(call.size, x, kernel)
    if mix_factor is not None:
        _check_blend(call, mix_factor)
    return call


def _check_blend(call: _Call, mix_factor: torch.Tensor) -> None:
    check_mix_factor(mix_factor, call.x)
    padding, kernel = call.stream.padding, call.weight.shape[2:]
    if call.weight.shape[0] != call.weight.shape[1]:
        raise ShapeError("weight", "as many filters as channels, to blend", tuple(call.weight.shape))
    if any(padding[2 * a] + padding[2 * a + 1] != kernel[a] - 1 for a in range(3)):
        raise OptionError("mix_factor", "paddings that keep the upsampled size", padding, "Use the default paddings.")


def _facts(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return _prepare(*args, **kwargs).facts()


_SERVING = {name: predicate for name, predicate in table().items() if name in (*_KEYS, "reference")}
BACKENDS = dispatch.Dispatcher("upsample_conv3d", facts=_facts, backends=_SERVING, rank=rank_phases)


def _next_history(call: _Call) -> torch.Tensor:
    frames = call.x.shape[2]
    reach = call.rule.lookback(call.stream.start + frames, call.stream.padding[0])
    if reach <= frames:
        return call.x[:, :, frames - reach :].clone()
    assert call.history is not None  # _prepare has asked for as many frames as the last call returned
    return torch.cat([call.history[:, :, call.history.shape[2] + frames - reach :], call.x], 2)


class _Decision(NamedTuple):
    """What shapes and options alone decide."""

    scale: tuple[int, int, int]
    rule: TimeRule
    stream: Stream
    reads_history: bool
    is_empty: bool
    backend: str
    launch: Launcher | None  # None: the call is not kept


_DECISIONS = _signature.Memo()


def _decided(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    mix_factor: torch.Tensor | None,
    backend: str,
    options: dict[str, Any],
) -> tuple[_Call, _Decision]:
    """A checked call, and who serves it."""
    if torch.compiler.is_compiling():  # before anything that graphs would be guarded by
        x, weight, (bias, history) = autocast(x, weight, bias, history)
        return _decide(x, weight, bias, history, mix_factor, backend, options)
    if torch._C._is_any_autocast_enabled():
        x, weight, (bias, history) = autocast(x, weight, bias, history)
    values = (*options.values(), backend)
    key = signature(values, x, weight, bias, history, mix_factor)
    if key is None:
        return _decide(x, weight, bias, history, mix_factor, backend, options)
    known: _Decision | None = _DECISIONS.get(key)
    if known is not None:
        history = history if known.reads_history else None
        return _Call(x, weight, bias, history, known.scale, known.rule, known.stream, mix_factor), known
    call, decision = _decide(x, weight, bias, history, mix_factor, backend, options)
    if decision.backend in SUFFIX:
        decision = decision._replace(launch=Launcher(upsample_op("fwd", decision.backend), x))
    if decision.backend != "reference":  # which may warn, or be an error, each time
        _DECISIONS.keep(key, values, decision)
    return call, decision


def _decide(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    mix_factor: torch.Tensor | None,
    backend: str,
    options: dict[str, Any],
) -> tuple[_Call, _Decision]:
    """The same by all checks and predicates."""
    call = _prepare(x, weight, bias, history=history, mix_factor=mix_factor, **options)
    chosen = BACKENDS.select(backend, *call.facts())
    reads = call.history is not None
    return call, _Decision(call.scale, call.rule, call.stream, reads, _is_empty(call), chosen, None)


def _run(call: _Call, decision: _Decision) -> torch.Tensor:
    if decision.is_empty:
        return blended_empty_result(call.x, call.weight, call.bias, call.mix_factor, call.size)
    call = _with_a_frame(call)
    tensors, args = (call.x, call.weight, dense(call.bias), call.history, call.mix_factor), call.args
    if decision.launch is not None and not needs_grad(*tensors):
        return decision.launch(*tensors, *args)
    return upsample_convolve(*tensors, args, decision.backend)


def _with_a_frame(call: _Call) -> _Call:
    """A chunk without frames (the end of the clip) reads the last frame of its history instead."""
    if call.x.shape[2] > 0 or call.history is None:
        return call
    stream = replace(call.stream, start=call.stream.start - 1)
    history = call.history[:, :, :-1] if call.history.shape[2] > 1 else None
    return replace(call, x=call.history[:, :, -1:], history=history, stream=stream)


def upsample_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: int | tuple[int, int, int] = (2, 1, 1),
    mode: str = "nearest",
    first_frame: str = "repeat",
    split: int = 0,
    time_padding: str = "zeros",
    history: torch.Tensor | None = None,
    start: int = 0,
    final: bool | None = None,
    pad_frames: int | tuple[int, int] | None = None,
    spatial_padding: int | tuple[int, ...] | None = None,
    spatial_padding_mode: str = "zeros",
    mix_factor: torch.Tensor | None = None,
    return_history: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`u = upsample(x)`, `y = causal_conv3d(u, weight, bias)`; with `mix_factor` m: `y = s(m) u + (1 - s(m)) conv(u)`.

    u is never stored: each phase of y (its even or odd positions) is a convolution of x with summed taps. For three taps and
    nearest upsampling by two in t, hw or thw this takes 2/3, 4/9 or 8/27 of the multiplications. Sums are rounded once.

    Args:
        x: [B, C, T, H, W], float32, float64, bfloat16 or float16; fastest in `torch.channels_last_3d`.
        weight: [K, C, kt, kh, kw], dtype of x; K = C with `mix_factor`.
        bias: [K].
        scale: factors of (t, h, w), or one for all.
        mode: "nearest", or "linear_time": linear in time with half-pixel centres, nearest in space.
        first_frame: "repeat", or "single": the clip's first frame appears once (nearest only; HunyuanVideo).
        split: the first `split` frames are interpolated by themselves ("linear_time"; VidTok 1.1).
        time_padding: frames before the first upsampled one: "zeros" or "replicate".
        history: [B, C, P, H, W], frames of the clip before x, as the call before returned them.
        start: how many frames of the clip lie before x.
        final: whether x ends the clip; otherwise frames that depend on later ones are held back. Default: True, but
            False with `return_history`. The last chunk may have no frames.
        pad_frames, spatial_padding, spatial_padding_mode: as in `causal_conv3d`, counted in upsampled pixels.
        mix_factor: one number m; s is the sigmoid. The blend is folded into the weights.
        return_history: also return the frames that the next chunk needs.
        backend: "auto", or one of `vidkernels.explain("upsample_conv3d", x, weight)`.

    Returns:
        y [B, K, scale_t T, scale_h H, scale_w W] with default paddings, in the memory format of x; of a chunk, the
        frames that no later chunk can change.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: VidTok (arXiv 2412.13061) and its AlphaBlender; HunyuanVideo's VAE.
    """
    options: dict[str, Any] = {
        "scale": scale,
        "mode": mode,
        "first_frame": first_frame,
        "split": split,
        "time_padding": time_padding,
        "start": start,
        "final": final,
        "pad_frames": pad_frames,
        "spatial_padding": spatial_padding,
        "spatial_padding_mode": spatial_padding_mode,
        "return_history": return_history,
    }
    call, decision = _decided(x, weight, bias, history, mix_factor, backend, options)
    if decision.backend == "reference" and not decision.is_empty:
        x, weight, (bias, history) = autocast(x, weight, bias, history)
        return reference.upsample_conv3d(x, weight, bias, history=history, mix_factor=mix_factor, **options)
    y = _run(call, decision)
    return (y, _next_history(call)) if return_history else y


def _is_empty(call: _Call) -> bool:
    frames = 0 if call.history is None else call.history.shape[2]
    sizes = *call.size, *call.x.shape[:2], *call.x.shape[3:], call.x.shape[2] + frames, call.weight.shape[0]
    return any(size <= 0 for size in sizes)  # one by one, as `Call.is_empty` of causal_conv3d
