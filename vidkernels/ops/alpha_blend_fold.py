# SPDX-License-Identifier: Apache-2.0
"""The alpha blend inside a convolution's weights: the blend then moves no bytes at all."""

from __future__ import annotations

import torch

from vidkernels import _reference
from vidkernels.errors import ShapeError
from vidkernels.ops._checks import check_floating, check_ndim, check_option, check_same_device, check_shape

BRANCHES = ("pool", "newest", "centre")


def fold_alpha_blend(
    weight: torch.Tensor, bias: torch.Tensor | None, mix_factor: torch.Tensor, *, branch: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the one convolution that equals `sigmoid(m) * S(x) + (1 - sigmoid(m)) * conv(x)`.

    S is a fixed temporal filter of the convolution's own (padded) input: w'[o, o, t, centre] = w sigmoid(-m) +
    sigmoid(m) s[t], elsewhere w' = w sigmoid(-m), and bias' = bias sigmoid(-m).

    Args:
        weight: [C, C, k_t, k_h, k_w] with odd k_h and k_w; bias: [C] or None.
        mix_factor: m, one element.
        branch: S. `pool`, the mean over the temporal taps (VidTok's down-sampling, stride 2); `newest`, the last tap's
            frame (causal up-sampling); `centre`, the middle tap's frame (non-causal up-sampling).

    Returns:
        Folded weight and bias in the dtypes of `weight` and `bias`. Differentiable in all three tensors, so training
        works: the gradient of m comes out of the convolution's weight gradient.

    Raises:
        ShapeError, DTypeError, DeviceError, OptionError: an argument does not fit.

    Source: linearity of convolution; the blend is VidTok's (arXiv 2412.13061).
    """
    check_floating("weight", weight)
    check_ndim("weight", weight, 5)
    check_floating("mix_factor", mix_factor)
    check_same_device("mix_factor", mix_factor, "weight", weight)
    check_option("branch", branch, BRANCHES)
    if weight.shape[0] != weight.shape[1] or weight.shape[3] % 2 == 0 or weight.shape[4] % 2 == 0:
        expected = "[C, C, k_t, k_h, k_w] with odd k_h and k_w"
        raise ShapeError("weight", expected, tuple(weight.shape), "Other convolutions have no tap for the identity.")
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (weight.shape[0],), "[C], one per filter of weight")
        check_same_device("bias", bias, "weight", weight)
    if mix_factor.numel() != 1:
        raise ShapeError("mix_factor", "one element", tuple(mix_factor.shape), "One factor serves all channels.")
    return _reference.alpha_blend.fold_alpha_blend(weight, bias, mix_factor, branch=branch)
