# SPDX-License-Identifier: Apache-2.0
"""Launchers of the alpha blend's Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidkernels.triton._alpha_blend_kernels import (
    _alpha_blend_bwd_b_kernel,
    _alpha_blend_bwd_x_kernel,
    _alpha_blend_fwd_kernel,
)
from vidkernels.triton._sizes import cdiv

# Values of BlendMode in csrc/alpha_blend/alpha_blend.h.
PLAIN, NEAREST, LINEAR = 0, 5, 6


@dataclass(frozen=True)
class BlendConfig:
    """Positions of a program, and its warps: 16 bytes a thread and load."""

    block: int
    num_warps: int


def blend_config(element_size: int) -> BlendConfig:
    """The choice for elements of that many bytes."""
    return BlendConfig(block=2048 // element_size, num_warps=4) if element_size <= 2 else BlendConfig(1024, 4)


@dataclass(frozen=True)
class _Call:
    """A call's operands as [outer, frames, inner] and what the kernels' arguments have in common."""

    x: torch.Tensor
    b: torch.Tensor
    history: torch.Tensor | None
    lookahead: torch.Tensor | None
    mode: int
    split: int
    out_frames: int

    @property
    def sampling(self) -> tuple[int, int, int, int, int]:
        """frames, out_frames, history, lookahead, split."""
        given = (0 if t is None else t.shape[1] for t in (self.history, self.lookahead))
        return (self.x.shape[1], self.out_frames, *given, self.split)

    @property
    def strides(self) -> tuple[int, ...]:
        """Outer and frame strides of x, b and history; the outer stride of lookahead."""
        h = (0, 0) if self.history is None else self.history.stride()[:2]
        look = 0 if self.lookahead is None else self.lookahead.stride(0)
        return (*self.x.stride()[:2], *self.b.stride()[:2], *h, look)

    def constants(self) -> dict[str, int | float | bool]:
        """Compile-time arguments of the kernels that gather frames of x."""
        return {
            "MODE": self.mode,
            "TERMS": {PLAIN: 1, NEAREST: 1, LINEAR: 2}.get(self.mode, 3),
            "HAS_HISTORY": self.history is not None,
            "HAS_LOOKAHEAD": self.lookahead is not None,
            "SCALE": 1 / 3 if PLAIN < self.mode < NEAREST else 1.0,
        }


def _as_frames(t: torch.Tensor | None, mode: int, last: bool) -> torch.Tensor | None:
    """[outer, frames, inner] of an operand with adjacent inner positions: a view where its memory allows."""
    if t is None:
        return None
    if mode == PLAIN:
        return t.reshape(1, 1, -1)
    t = t.permute(0, 2, 3, 4, 1).unsqueeze(1) if last else t
    # sizes are given, since an operand of no frames leaves nothing to infer
    return t.reshape(t.shape[0] * t.shape[1], t.shape[2], -1 if t.shape[2] else 0)


def _arranged(
    x: torch.Tensor, y: torch.Tensor, history: torch.Tensor | None, lookahead: torch.Tensor | None, mode: int
) -> tuple[torch.Tensor, ...]:
    """x, y, history and lookahead as [outer, frames, inner] in y's memory order; y is dense."""
    if mode == PLAIN:
        if x.stride() != y.stride():
            x = torch.empty_like(y).copy_(x)
        order = sorted(range(y.ndim), key=lambda axis: -y.stride(axis))
        return x.permute(order).reshape(1, 1, -1), y.permute(order).reshape(1, 1, -1), None, None
    last = y.shape[1] > 1 and y.stride(1) == 1
    return tuple(_as_frames(t, mode, last) for t in (x, y, history, lookahead))


def _same_order(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)


def _grid(inner: int, outer: int, frames: int, config: BlendConfig) -> tuple[int]:
    return (cdiv(inner, config.block) * outer * frames,)


def alpha_blend_fwd(
    x: torch.Tensor,
    b: torch.Tensor,
    mix_factor: torch.Tensor,
    history: torch.Tensor | None,
    lookahead: torch.Tensor | None,
    mode: int,
    split: int,
) -> torch.Tensor:
    """Launcher of `vidkernels::alpha_blend_fwd_triton`."""
    y = torch.empty_like(b)
    if y.numel() == 0:
        return y
    b = _same_order(b, y)
    x3, y3, h3, l3 = _arranged(x, y, history, lookahead, mode)
    _, b3, _, _ = _arranged(x, b, None, None, mode)
    call = _Call(x3, b3, h3, l3, mode, split, y3.shape[1])
    config = blend_config(x.element_size())
    _alpha_blend_fwd_kernel[_grid(y3.shape[2], y3.shape[0], y3.shape[1], config)](
        x3, b3, y3, mix_factor, h3, l3, *call.strides, y3.shape[2], *call.sampling, **call.constants(),
        BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip
    return _brought_home(y3, y, y)


def _empty_grad(t: torch.Tensor | None, x: torch.Tensor, wanted: bool) -> torch.Tensor:
    if t is None:
        return x.new_empty(0)
    return torch.empty_like(t) if wanted else t.new_empty(0)


def alpha_blend_bwd(
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
    """Launcher of `vidkernels::alpha_blend_bwd_triton`."""
    like = torch.empty_like(b)
    grads = [
        _empty_grad(t, x, want)
        for t, want in (
            (like if mode == PLAIN else x, want_x),
            (like, want_b),
            (mix_factor, want_mix),
            (history, want_history),
            (lookahead, want_lookahead),
        )
    ]
    if like.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    config = blend_config(x.element_size())
    x3, dy3, h3, l3 = _arranged(x, _same_order(dy, like), history, lookahead, mode)
    _, b3, _, _ = _arranged(x, _same_order(b, like), None, None, mode)
    call = _Call(x3, b3, h3, l3, mode, split, dy3.shape[1])
    if want_b or want_mix:
        db3 = _arranged(x, grads[1], None, None, mode)[1] if want_b else None
        _through_b(call, dy3, db3, grads[2] if want_mix else None, mix_factor, config)
        if db3 is not None:
            _brought_home(db3, grads[1], like)
    frames = x3.shape[1]
    pieces = (
        (grads[0], 0, want_x),
        (grads[3], -call.sampling[2], want_history),
        (grads[4], frames, want_lookahead),
    )
    for grad, first, wanted in pieces:
        if wanted and grad.numel() > 0:
            _through_x(call, dy3, grad, like, mix_factor, first, config)
    return tuple(grads)


def _through_b(
    call: _Call,
    dy: torch.Tensor,
    db: torch.Tensor | None,
    dmix: torch.Tensor | None,
    mix_factor: torch.Tensor,
    config: BlendConfig,
) -> None:
    grid = _grid(dy.shape[2], dy.shape[0], dy.shape[1], config)
    partial = None if dmix is None else torch.empty(grid[0], dtype=torch.float64, device=dy.device)
    _alpha_blend_bwd_b_kernel[grid](
        dy, call.x, call.b, db, partial, mix_factor, call.history, call.lookahead, *call.strides, dy.shape[2],
        *call.sampling, **call.constants(), WANT_B=db is not None, WANT_MIX=dmix is not None,
        BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip
    if dmix is not None and partial is not None:
        m = mix_factor.double()
        dmix.copy_((partial.sum() * torch.sigmoid(m) * torch.sigmoid(-m)).reshape(dmix.shape))


def _through_x(
    call: _Call,
    dy: torch.Tensor,
    grad: torch.Tensor,
    like: torch.Tensor,
    mix_factor: torch.Tensor,
    first: int,
    config: BlendConfig,
) -> None:
    """Gradient of the frames from number `first` on, by a dense tensor in y's order where `grad` is not one."""
    dense = _arranged(grad, like, None, None, call.mode)[0]
    _alpha_blend_bwd_x_kernel[_grid(dense.shape[2], dense.shape[0], dense.shape[1], config)](
        dy, dense, mix_factor, *dense.stride()[:2], *dy.stride()[:2], dy.shape[2], first, dense.shape[1],
        *call.sampling, MODE=call.mode, TERMS={PLAIN: 1, LINEAR: 4}.get(call.mode, 2),
        SCALE=call.constants()["SCALE"], BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip
    _brought_home(dense, grad, like)


def _brought_home(dense: torch.Tensor, result: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`result` with the values of its [outer, frames, inner], which is a copy where its axes lie in another order than those
    of the two memory formats."""
    if dense.data_ptr() == result.data_ptr():
        return result
    if like.shape[1] > 1 and like.stride(1) == 1:
        batch, channels, frames, height, width = result.shape
        dense = dense.reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
    return result.copy_(dense.reshape(result.shape))
