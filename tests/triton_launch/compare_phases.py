# SPDX-License-Identifier: Apache-2.0
"""The comparison of `compare.py` for upsampling convolutions: `python compare_phases.py LIBRARY`."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import compare
import torch

from vidkernels._conv import upsample
from vidkernels.triton import _conv_phases

LAST = torch.channels_last_3d


def convolve(channels: int, size: tuple[int, int, int], history: int = 0, **options: Any) -> None:
    """With a bias; with a blend where `mix_factor` is among the options."""
    x = torch.zeros(2, channels, *size).bfloat16().contiguous(memory_format=LAST)
    past = torch.zeros(2, channels, history, *size[1:]).bfloat16().contiguous(memory_format=LAST) if history else None
    weight, bias = torch.zeros(channels, channels, 3, 3, 3).bfloat16(), torch.zeros(channels).bfloat16()
    prepare = importlib.import_module("vidkernels.ops.upsample_conv3d")._prepare
    call = prepare(x, weight, bias, history=past, start=history, **options)
    upsample.fwd_triton(call.x, call.weight, call.bias, call.history, call.mix_factor, *call.args)


def main() -> None:
    """Weights planar and of a blend; boxes of one and of two sums, with history; phases one by one."""
    compare.install(sys.argv[1])
    mix = torch.zeros(1)
    with torch.no_grad():
        convolve(
            192, (3, 16, 32), scale=(2, 1, 1), mode="linear_time", split=1, time_padding="replicate", mix_factor=mix
        )
        convolve(64, (3, 8, 16), history=2, scale=(2, 2, 2))
        convolve(32, (2, 9, 11), scale=(1, 2, 2), spatial_padding_mode="replicate")
        _conv_phases.blended_weight(torch.zeros(32, 32, 3, 3, 3).bfloat16(), torch.zeros(32).bfloat16(), mix)
    print(" ".join(f"{name}={count}" for name, count in sorted(compare.compared.items())))


if __name__ == "__main__":
    main()
