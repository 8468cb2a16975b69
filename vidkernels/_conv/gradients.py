# SPDX-License-Identifier: Apache-2.0
"""A convolution's backward as one call: what its bare op `causal_conv3d_bwd` runs.

One op instead of one per gradient, and one list for the geometry: a call of an op with three lists takes 5 us of the
host where one with two tensors takes 1.3, and small clips wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vidkernels._conv.geometry import is_channels_last

Rule = tuple[list[int], list[int], list[int], int, int]
Backward = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Sequence[int], Sequence[bool]], "list[Tensor]"]


def rule_of(geometry: Sequence[int]) -> Rule:
    """Stride, dilation, padding, time_mode and space_mode from `Geometry.flat()`."""
    return list(geometry[:3]), list(geometry[3:6]), list(geometry[6:12]), geometry[12], geometry[13]


def weight_format(weight: Tensor) -> torch.memory_format:
    """The format of a weight's gradient: that of the weight, so that autograd keeps it without another copy."""
    return torch.channels_last_3d if is_channels_last(weight) else torch.contiguous_format


def like_weight(dweight: Tensor, weight: Tensor) -> Tensor:
    """A weight's gradient in dtype and format of the weight, in one pass."""
    return dweight.to(weight.dtype, memory_format=weight_format(weight))


def chosen(needs: Sequence[bool], *gradients: Tensor | None) -> list[Tensor]:
    """Those of the gradients (x, history, weight, bias) that were asked for."""
    return [gradient for need, gradient in zip(needs, gradients, strict=True) if need and gradient is not None]


def backward_by(dgrad: Callable[..., tuple[Tensor, Tensor | None]], wgrad: Callable[..., Tensor]) -> Backward:
    """The launcher of a backend's `causal_conv3d_bwd` from those of its data and its weight gradient.

    dgrad(grad, weight, input_size, history_frames, *rule) gives (dx, dhistory), None without history;
    wgrad(grad, x, history, kernel, *rule) gives dweight in any dtype and format.
    """

    def causal_conv3d_bwd(
        grad: Tensor, x: Tensor, weight: Tensor, history: Tensor | None, geometry: Sequence[int], needs: Sequence[bool]
    ) -> list[Tensor]:
        rule = rule_of(geometry)
        dx = dhistory = dweight = dbias = None
        if needs[0] or needs[1]:
            frames = 0 if history is None else history.shape[2]
            dx, dhistory = dgrad(grad, weight, x.shape, frames, *rule)
        if needs[2]:
            dweight = like_weight(wgrad(grad, x, history, weight.shape[2:], *rule), weight)
        if needs[3]:
            dbias = grad.sum((0, 2, 3, 4))
        return chosen(needs, dx, dhistory, dweight, dbias)

    return causal_conv3d_bwd
