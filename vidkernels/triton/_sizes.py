# SPDX-License-Identifier: Apache-2.0
"""Sizes of grids and tiles, computed on the host.

`triton.cdiv` and `triton.next_power_of_2` are made for kernels: outside of one they look for constants to unwrap, which
takes 2 us a call, and a launch needs up to 20.
"""

from __future__ import annotations


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`, and at least 1."""
    return 1 << max(size - 1, 0).bit_length()
