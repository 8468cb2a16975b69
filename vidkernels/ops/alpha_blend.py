# SPDX-License-Identifier: Apache-2.0
"""VidTok's learned blend, `sigmoid(m) * a + (1 - sigmoid(m)) * b`, alone or with the temporal sampling of `a` inside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from vidkernels import _reference, dispatch
from vidkernels.errors import OptionError, ShapeError
from vidkernels.ops._autograd import distinct, first_order, needs_grad
from vidkernels.ops._checks import (
    check_floating,
    check_ndim,
    check_option,
    check_same_device,
    check_same_dtype,
    check_shape,
    whole_number,
)
from vidkernels.ops._register import define

# Values of BlendMode in csrc/alpha_blend/alpha_blend.h.
PLAIN, HISTORY, NEAREST, LINEAR = 0, 4, 5, 6
FIRST_FRAMES = {"zeros": 1, "replicate": 2, "noncausal": 3}
UP_MODES = {"nearest": NEAREST, "linear": LINEAR}


def frames_out(mode: int, frames: int, history: int) -> int:
    """Frames of the output for `frames` of x and `history` given frames in front."""
    if mode == PLAIN:
        return frames
    if mode in (NEAREST, LINEAR):
        return 2 * frames
    return (frames + (history if mode == HISTORY else 1) - 1) // 2 if frames > 0 else 0


def _fwd_fake(
    x: torch.Tensor,
    b: torch.Tensor,
    mix_factor: torch.Tensor,
    history: torch.Tensor | None,
    lookahead: torch.Tensor | None,
    mode: int,
    split: int,
) -> torch.Tensor:
    torch._check(x.ndim == b.ndim, lambda: "alpha_blend_fwd: x and b must have one number of axes")
    return torch.empty_like(b)


def _bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    b: torch.Tensor,
    mix_factor: torch.Tensor,
    history: torch.Tensor | None,
    lookahead: torch.Tensor | None,
    mode: int,
    split: int,
    want_x: bool,
    want_b: bool,
    want_mix: bool,
    want_history: bool,
    want_lookahead: bool,
) -> tuple[torch.Tensor, ...]:
    torch._check(dy.ndim == b.ndim, lambda: "alpha_blend_bwd: dy must have the shape of b")
    # Without frames to sample all is one pass in the memory order of b.
    operands = (b if mode == PLAIN else x, b, mix_factor, history, lookahead)
    wanted = (want_x, want_b, want_mix, want_history, want_lookahead)
    return tuple(
        x.new_empty(0) if t is None else torch.empty_like(t) if want else t.new_empty(0)
        for t, want in zip(operands, wanted, strict=True)
    )


_OPERANDS = "Tensor x, Tensor b, Tensor mix_factor, Tensor? history, Tensor? lookahead, int mode, int split"
define(
    "alpha_blend_fwd",
    f"({_OPERANDS}) -> Tensor",
    _fwd_fake,
    triton="vidkernels.triton.alpha_blend:alpha_blend_fwd",
)
define(
    "alpha_blend_bwd",
    f"(Tensor dy, {_OPERANDS}, bool want_x, bool want_b, bool want_mix, bool want_history, bool want_lookahead)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    triton="vidkernels.triton.alpha_blend:alpha_blend_bwd",
)


class _AlphaBlend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        b: torch.Tensor,
        mix_factor: torch.Tensor,
        history: torch.Tensor | None,
        lookahead: torch.Tensor | None,
        mode: int,
        split: int,
        backend: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, b, mix_factor, history, lookahead)
        ctx.mode, ctx.split, ctx.backend = mode, split, backend
        return dispatch.op("alpha_blend_fwd", backend)(x, b, mix_factor, history, lookahead, mode, split)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:5]
        bwd = dispatch.op("alpha_blend_bwd", ctx.backend)
        grads = bwd(dy, *ctx.saved_tensors, ctx.mode, ctx.split, *wanted)
        return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None)


def _check_pair(name: str, x: torch.Tensor, b: torch.Tensor, mix_factor: torch.Tensor) -> None:
    check_floating(name, x)
    check_floating("b", b)
    check_floating("mix_factor", mix_factor)
    check_same_dtype("b", b, name, x)
    for other_name, other in (("b", b), ("mix_factor", mix_factor)):
        check_same_device(other_name, other, name, x)
    if mix_factor.numel() != 1:
        raise ShapeError("mix_factor", "one element", tuple(mix_factor.shape), "One factor serves all channels.")


def _check_neighbour(name: str, frames: torch.Tensor, x: torch.Tensor, most: int) -> None:
    check_floating(name, frames)
    check_ndim(name, frames, 5)
    check_same_dtype(name, frames, "x", x)
    check_same_device(name, frames, "x", x)
    count = frames.shape[2]
    if not 1 <= count <= most:
        raise ShapeError(name, "1 frame" if most == 1 else f"1 to {most} frames", count, "Axis 2 counts frames.")
    check_shape(name, frames, (*x.shape[:2], count, *x.shape[3:]), "[B, C, frames, H, W] of x")


def _check_frames(x: torch.Tensor, b: torch.Tensor, mode: int, history: int) -> None:
    expected = (*x.shape[:2], frames_out(mode, x.shape[2], history), *x.shape[3:])
    check_shape("b", b, expected, f"the output for {x.shape[2]} frames of x")


def _blend_facts(
    a: torch.Tensor, b: torch.Tensor, mix_factor: torch.Tensor, *, backend: str = "auto"
) -> tuple[torch.Tensor]:
    _check_pair("a", a, b, mix_factor)
    check_shape("b", b, tuple(a.shape), "that of a")
    return (a,)


def _down_facts(
    x: torch.Tensor,
    b: torch.Tensor,
    mix_factor: torch.Tensor,
    *,
    first_frame: str | torch.Tensor = "zeros",
    backend: str = "auto",
) -> tuple[torch.Tensor]:
    _check_pair("x", x, b, mix_factor)
    check_ndim("x", x, 5)
    if isinstance(first_frame, torch.Tensor):
        _check_neighbour("first_frame", first_frame, x, 2)
        _check_frames(x, b, HISTORY, first_frame.shape[2])
    else:
        check_option("first_frame", first_frame, FIRST_FRAMES)
        _check_frames(x, b, FIRST_FRAMES[first_frame], 0)
    return (x,)


def _up_facts(
    x: torch.Tensor,
    b: torch.Tensor,
    mix_factor: torch.Tensor,
    *,
    mode: str = "nearest",
    split: int = 1,
    history: torch.Tensor | None = None,
    lookahead: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor]:
    _check_pair("x", x, b, mix_factor)
    check_ndim("x", x, 5)
    check_option("mode", mode, UP_MODES)
    if whole_number(split, 0) is None:
        raise OptionError("split", "0 or more frames", repr(split), "0 interpolates all frames together.")
    for name, frames in (("history", history), ("lookahead", lookahead)):
        if frames is not None:
            if mode == "nearest":
                raise OptionError(name, "None with mode='nearest'", "a tensor", "Repeated frames have no neighbours.")
            _check_neighbour(name, frames, x, 1)
    _check_frames(x, b, UP_MODES[mode], 0)
    return (x,)


def _dispatcher(op: str, facts: Any) -> dispatch.Dispatcher:
    backends = {
        "cpp": dispatch.cpp(),
        "cuda": dispatch.cuda(),
        "triton": dispatch.triton(),
        "reference": dispatch.always,
    }
    return dispatch.Dispatcher(op, facts=facts, backends=backends)


BLEND = _dispatcher("alpha_blend", _blend_facts)
DOWN = _dispatcher("alpha_blend_down", _down_facts)
UP = _dispatcher("alpha_blend_up", _up_facts)


def _adjacent(t: torch.Tensor, axis: int) -> bool:
    steps = t.stride()  # two of 1: windows over one memory, or an axis of one element, where nothing is copied
    return steps[axis] == 1 and 0 not in steps and steps.count(1) == 1


def _frames_first(t: torch.Tensor) -> torch.Tensor:
    return t.movedim(2, 0).contiguous().movedim(0, 2)


def _arranged(
    b: torch.Tensor, x: torch.Tensor, *neighbours: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    """All operands in the memory order of `b` ([B, C, T, H, W] or channels last); copies only what differs.

    Kernels walk frame by frame, so the innermost axis but the frames' has adjacent elements in all of them. Where frames
    of one value are contiguous, the frames themselves lie innermost, and go to the front.
    """
    arrange: Callable[[torch.Tensor], torch.Tensor]
    if b.shape[1] > 1 and b.stride(1) == 1:
        axis, arrange = 1, functools.partial(torch.Tensor.contiguous, memory_format=torch.channels_last_3d)
    elif b.shape[4] > 1 or b.shape[3] > 1:
        axis, arrange = 4 if b.shape[4] > 1 else 3, torch.Tensor.contiguous
    else:
        axis, arrange = 1 if b.shape[1] > 1 else 0, _frames_first

    def arranged(t: torch.Tensor) -> torch.Tensor:
        return t if t.shape[axis] == 1 or _adjacent(t, axis) else arrange(t)

    return arranged(b), arranged(x), [t if t is None else arranged(t) for t in neighbours]


def _run(
    chosen: str,
    x: torch.Tensor,
    b: torch.Tensor,
    mix_factor: torch.Tensor,
    mode: int,
    split: int = 0,
    history: torch.Tensor | None = None,
    lookahead: torch.Tensor | None = None,
) -> torch.Tensor:
    like = b
    if mode != PLAIN:
        b, x, (history, lookahead) = _arranged(b, x, history, lookahead)
    operands = (x, b, mix_factor, history, lookahead)
    if needs_grad(*operands):
        y = _AlphaBlend.apply(*distinct(*operands), mode, split, chosen)
    else:
        y = dispatch.op("alpha_blend_fwd", chosen)(*operands, mode, split)
    return y.contiguous() if b is not like and like.is_contiguous() else y


def alpha_blend(a: torch.Tensor, b: torch.Tensor, mix_factor: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """`sigmoid(m) * a + (1 - sigmoid(m)) * b`, in one pass; the gradient of m is a deterministic sum in one pass, too.

    Args:
        a, b: tensors of one shape and dtype (float32, float64, bfloat16, float16), any strides.
        mix_factor: m, one element of any floating dtype.
        backend: `auto`, `cpp`, `cuda`, `triton` or `reference`.

    Returns:
        A tensor like `b`. Differentiable once in a, b and mix_factor.

    Raises:
        ShapeError, DTypeError, DeviceError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: VidTok (arXiv 2412.13061), "AlphaBlender".
    """
    facts = _blend_facts(a, b, mix_factor)
    chosen = BLEND.select(backend, *facts)
    if chosen == "reference":
        return _reference.alpha_blend.alpha_blend(a, b, mix_factor)
    return _run(chosen, a, b, mix_factor, PLAIN)


def alpha_blend_down(
    x: torch.Tensor,
    b: torch.Tensor,
    mix_factor: torch.Tensor,
    *,
    first_frame: str | torch.Tensor = "zeros",
    backend: str = "auto",
) -> torch.Tensor:
    """`sigmoid(m) * P(x) + (1 - sigmoid(m)) * b`, P the mean of 3 frames with stride 2, never stored.

    Args:
        x: [B, C, T, H, W].
        b: the strided convolution's output, [B, C, T // 2, H, W], in x's dtype and best in x's memory format.
        mix_factor: m, one element.
        first_frame: output i averages frames 2i-1, 2i, 2i+1, and x[-1] is zero (`zeros`, VidTok 1.0), a copy of x[0]
            (`replicate`, VidTok 1.1), or given: a tensor of the last 1 or 2 frames before x, [B, C, 1 or 2, H, W]
            (streaming; n frames give (T + n - 1) // 2 outputs). `noncausal`: frames 2i, 2i+1, 2i+2, with x[T] = 0.
        backend: `auto`, `cpp`, `cuda`, `triton` or `reference`.

    Returns:
        A tensor like `b`. Differentiable once in x, b, mix_factor and a given first frame.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: VidTok (arXiv 2412.13061), temporal down-sampling.
    """
    facts = _down_facts(x, b, mix_factor, first_frame=first_frame)
    chosen = DOWN.select(backend, *facts)
    if chosen == "reference":
        return _reference.alpha_blend.alpha_blend_down(x, b, mix_factor, first_frame=first_frame)
    if isinstance(first_frame, torch.Tensor):
        return _run(chosen, x, b, mix_factor, HISTORY, history=first_frame)
    return _run(chosen, x, b, mix_factor, FIRST_FRAMES[first_frame])


def alpha_blend_up(
    x: torch.Tensor,
    b: torch.Tensor,
    mix_factor: torch.Tensor,
    *,
    mode: str = "nearest",
    split: int = 1,
    history: torch.Tensor | None = None,
    lookahead: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`sigmoid(m) * U(x) + (1 - sigmoid(m)) * b`, U doubling the frames, never stored.

    Args:
        x: [B, C, T, H, W].
        b: the convolution's output, [B, C, 2T, H, W], in x's dtype and best in x's memory format.
        mix_factor: m, one element.
        mode: `nearest` repeats each frame (VidTok 1.0 and non-causal); `linear` interpolates at half-pixel centres
            (VidTok 1.1): U[2k] = x[k-1]/4 + 3x[k]/4, U[2k+1] = 3x[k]/4 + x[k+1]/4, a missing neighbour being x[k].
        split: `linear` only: the first `split` frames of x are interpolated apart from the rest; 0: all together.
        history, lookahead: `linear` only: the frame before and behind x, [B, C, 1, H, W], for chunks of a longer clip.
            A lookahead behind the split (T == split) is not blended in.
        backend: `auto`, `cpp`, `cuda`, `triton` or `reference`.

    Returns:
        A tensor like `b`. Differentiable once in all tensors.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.
        BackendUnavailable: the named backend cannot serve this call.

    Source: VidTok (arXiv 2412.13061), temporal up-sampling.
    """
    facts = _up_facts(x, b, mix_factor, mode=mode, split=split, history=history, lookahead=lookahead)
    chosen = UP.select(backend, *facts)
    if chosen == "reference":
        reference = _reference.alpha_blend.alpha_blend_up
        return reference(x, b, mix_factor, mode=mode, split=split, history=history, lookahead=lookahead)
    return _run(chosen, x, b, mix_factor, UP_MODES[mode], split, history, lookahead)
