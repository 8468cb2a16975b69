# SPDX-License-Identifier: Apache-2.0
"""Numbers that describe one 3D convolution, shared by its checks, fakes and backends.

Axes are always (t, h, w). `padding` is (front, back, top, bottom, left, right): frames, rows and columns that the
convolution sees before and behind the tensor. They exist only as coordinates: no backend writes them to memory.

Value at a padded coordinate:
    t < 0:          frame `history_frames + t` of `history` where that exists, otherwise `time_mode`
    t >= T:         `time_mode` (the last frame for REPLICATE)
    h or w outside: `space_mode`
`time_mode` REPLICATE in front repeats the oldest frame there is: `history[:, :, 0]`, or `x[:, :, 0]` without history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vidkernels._tracing import constant_while_tracing

ZEROS, REPLICATE = 0, 1
MODES = {"zeros": ZEROS, "replicate": REPLICATE}
NONE, SILU = 0, 1
ACTIVATIONS = {None: NONE, "silu": SILU}


@dataclass(frozen=True)
class Geometry:
    """Stride, dilation, padding and padding modes of a convolution, in the order of the bare ops' arguments."""

    stride: tuple[int, int, int]
    dilation: tuple[int, int, int]
    padding: tuple[int, int, int, int, int, int]
    time_mode: int
    space_mode: int

    def args(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int]:
        """As arguments of `causal_conv3d_fwd`, and trailing ones of the launchers of gradients."""
        return self.stride, self.dilation, self.padding, self.time_mode, self.space_mode

    def flat(self) -> list[int]:
        """The same 14 numbers in one list, as an argument of `causal_conv3d_bwd`."""
        return [*self.stride, *self.dilation, *self.padding, self.time_mode, self.space_mode]


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], padding: Sequence[int]
) -> list[int]:
    """Output frames, rows and columns of an input of `size` (t, h, w); zero or less where the kernel does not fit."""
    sizes = []
    for axis in range(3):
        padded = size[axis] + padding[2 * axis] + padding[2 * axis + 1]
        sizes.append((padded - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1)
    return sizes


@constant_while_tracing
def tf32_allowed() -> bool:
    """torch's own switch for convolutions. From 2.9 on it has two interfaces, and reading the old one
    (`torch.backends.cudnn.allow_tf32`) raises where the new one was used."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    return torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"


def full_float32(dtype: torch.dtype) -> bool:
    """Whether products on a GPU must be those of float32."""
    return dtype == torch.float32 and not tf32_allowed()


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether results made from x are to be channels_last_3d: x is, or is a slice of such a tensor."""
    if x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last_3d) or x.stride(1) == 1
