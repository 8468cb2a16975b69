# SPDX-License-Identifier: Apache-2.0
"""The learned blend of VidTok's temporal samplers (arXiv 2412.13061): `sigmoid(m) * a + sigmoid(-m) * b`.

`a` is the smooth branch (a 3-frame mean going down, repeated or interpolated frames going up), `b` a convolution.
Low-precision inputs are computed in float32 and rounded once.
"""

from __future__ import annotations

import torch

_HALF = (torch.bfloat16, torch.float16)
_BRANCHES = ("pool", "newest", "centre")


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in _HALF else x


def _blend(a: torch.Tensor, b: torch.Tensor, mix_factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mix = mix_factor.reshape(()).to(a.dtype)
    # sigmoid(-m) instead of 1 - sigmoid(m): the latter is 0 in float32 from m = 17 on
    return (torch.sigmoid(mix) * a + torch.sigmoid(-mix) * b).to(dtype)


def alpha_blend(a: torch.Tensor, b: torch.Tensor, mix_factor: torch.Tensor) -> torch.Tensor:
    """`sigmoid(m) * a + (1 - sigmoid(m)) * b` for tensors of one shape and a one-element `m`."""
    return _blend(_wide(a), _wide(b), mix_factor, a.dtype)


def _pool_window(x: torch.Tensor, first_frame: str | torch.Tensor) -> torch.Tensor:
    """`x` with the frames in front of it (or behind it) that windows of 3 with stride 2 need."""
    if isinstance(first_frame, torch.Tensor):
        return torch.cat([_wide(first_frame).to(x.dtype), x], dim=2)
    zero = torch.zeros_like(x[:, :, :1])
    if first_frame == "noncausal":
        return torch.cat([x, zero], dim=2)
    return torch.cat([x[:, :, :1] if first_frame == "replicate" else zero, x], dim=2)


def alpha_blend_down(
    x: torch.Tensor, b: torch.Tensor, mix_factor: torch.Tensor, *, first_frame: str | torch.Tensor = "zeros"
) -> torch.Tensor:
    """`sigmoid(m) * P(x) + (1 - sigmoid(m)) * b`, P the mean of 3 frames with stride 2; `b` is the strided convolution.

    Output i takes frames 2i-1, 2i, 2i+1 (`noncausal`: 2i, 2i+1, 2i+2, with a zero frame behind). The frame in front is
    zero, a copy of the first frame, or given: a tensor of the last 1 or 2 frames before `x`.
    """
    frames = _pool_window(_wide(x), first_frame)
    count = max(frames.shape[2] - 1, 0) // 2
    taps = [frames[:, :, k : k + 2 * count : 2][:, :, :count] for k in range(3)]
    return _blend((taps[0] + taps[1] + taps[2]) / 3, _wide(b), mix_factor, x.dtype)


def _linear(x: torch.Tensor, before: torch.Tensor | None, after: torch.Tensor | None) -> torch.Tensor:
    """Frames at half-pixel centres, twice as many; a missing neighbour is the end frame itself."""
    if x.shape[2] == 0:
        return x
    previous = torch.cat([x[:, :, :1] if before is None else before, x[:, :, :-1]], dim=2)
    following = torch.cat([x[:, :, 1:], x[:, :, -1:] if after is None else after], dim=2)
    return torch.stack([0.25 * previous + 0.75 * x, 0.75 * x + 0.25 * following], dim=3).flatten(2, 3)


def _upsample(
    x: torch.Tensor, mode: str, split: int, history: torch.Tensor | None, lookahead: torch.Tensor | None
) -> torch.Tensor:
    if mode == "nearest":
        return x.repeat_interleave(2, dim=2)
    frames = x.shape[2]
    before = None if history is None else _wide(history).to(x.dtype)
    after = None if lookahead is None or split == frames else _wide(lookahead).to(x.dtype)
    if not 0 < split < frames:
        return _linear(x, before, after)
    return torch.cat([_linear(x[:, :, :split], before, None), _linear(x[:, :, split:], None, after)], dim=2)


def alpha_blend_up(
    x: torch.Tensor,
    b: torch.Tensor,
    mix_factor: torch.Tensor,
    *,
    mode: str = "nearest",
    split: int = 1,
    history: torch.Tensor | None = None,
    lookahead: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sigmoid(m) * U(x) + (1 - sigmoid(m)) * b`, U doubling the frames; `b` is the convolution of U(x).

    `nearest` repeats each frame. `linear` interpolates at half-pixel centres: U[2k] = x[k-1]/4 + 3x[k]/4 and
    U[2k+1] = 3x[k]/4 + x[k+1]/4, the first `split` frames apart from the rest. A neighbour outside is `history` or
    `lookahead` where given (one frame each), otherwise the end frame itself.
    """
    return _blend(_upsample(_wide(x), mode, split, history, lookahead), _wide(b), mix_factor, x.dtype)


def fold_alpha_blend(
    weight: torch.Tensor, bias: torch.Tensor | None, mix_factor: torch.Tensor, *, branch: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the one convolution that equals `sigmoid(m) * S(x) + (1 - sigmoid(m)) * conv(x)`.

    S is a fixed temporal filter of the convolution's own input: `pool`, the mean over its temporal taps;
    `newest`, the last tap's frame (causal up-sampling); `centre`, the middle tap's frame (non-causal up-sampling).
    """
    if branch not in _BRANCHES:
        raise ValueError(f"branch must be one of {_BRANCHES}, got {branch!r}")
    mix = mix_factor.reshape(()).to(_wide(weight).dtype)
    alpha, beta = torch.sigmoid(mix), torch.sigmoid(-mix)
    taps = weight.shape[2]
    share = torch.zeros(taps, dtype=mix.dtype, device=weight.device)
    share[{"pool": slice(None), "newest": slice(-1, None), "centre": slice(taps // 2, taps // 2 + 1)}[branch]] = 1
    identity = torch.zeros(weight.shape[0], weight.shape[1], *weight.shape[2:], dtype=mix.dtype, device=weight.device)
    centre = identity
    for size in weight.shape[3:]:
        centre = centre.select(3, size // 2)  # at last [O, I, k_t]
    centre.diagonal(0, 0, 1).copy_((share / share.sum())[:, None])
    folded = (beta * _wide(weight) + alpha * identity).to(weight.dtype)
    return folded, None if bias is None else (beta * _wide(bias)).to(bias.dtype)
