# SPDX-License-Identifier: Apache-2.0
"""Sizes of grids and tiles, and what divides strides, computed on the host.

`triton.cdiv` and `triton.next_power_of_2` are made for kernels: outside of one they look for constants to unwrap, which
takes 2 us a call, and a launch needs up to 20.
"""

from __future__ import annotations

from collections.abc import Iterable


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`, and at least 1."""
    return 1 << max(size - 1, 0).bit_length()


def common_divisor(strides: Iterable[int]) -> int:
    """The largest power of two up to 16 that divides all of them.

    Kernels take strides divided by it and multiply them again: so the compiler knows that rows of, say, a 72-channel head begin
    at multiples of 8 channels, and loads 16 bytes at once where it would load channel by channel.
    """
    bits = 16
    for stride in strides:
        bits |= stride
    return bits & -bits
