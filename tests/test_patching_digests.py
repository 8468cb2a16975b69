# SPDX-License-Identifier: Apache-2.0
"""Digests of upstream code: blind to layout, and the same on every Python that the rules serve."""

from __future__ import annotations

import sys

import pytest
import torch

from vidkernels.patching import digest


def test_digest_is_blind_to_layout_and_sees_code() -> None:
    def one(x: int, y: float = 2.0) -> float:
        """A docstring."""
        return x + y

    def two(x, y=2.0):
        # a comment
        return x + y

    def three(x, y=3.0):
        return x + y

    assert digest(one) == digest(two) != digest(three)
    assert digest(len) == "" and digest(None) == ""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 writes tuples otherwise")
def test_digests_are_those_of_every_python() -> None:
    def shapes(x: torch.Tensor, *rest: int, axis: int = -1) -> list[int]:
        batch, (height, width), *_ = x.shape[0], x.shape[-2:], 1
        lengths = {key: value for key, value in enumerate(rest) if value is not None}
        for place, (first, second) in enumerate(zip(rest, rest[1:], strict=False)):
            x[place, ..., axis:] = (first or second) if batch > 1e-6 else f"{height:>{width}} of {lengths!r}"
        return [*rest, -(1**2), x[1:2, (0, 1)]]

    assert digest(shapes) == "1670544ba8637e25"
