# SPDX-License-Identifier: Apache-2.0
"""Checks shared by the quantizers: channels on one axis, tokens on the others."""

from __future__ import annotations

from torch import Tensor

from vidkernels.errors import OptionError, ShapeError

_MOST_CODES = 2**31 - 2**10  # whole blocks of tokens stay below 2^31


def check_codebooks(num_codebooks: int) -> None:
    """``num_codebooks`` is an int of at least 1."""
    if not isinstance(num_codebooks, int) or isinstance(num_codebooks, bool) or num_codebooks < 1:
        raise OptionError("num_codebooks", "an int of at least 1", repr(num_codebooks))


def check_codebook_axis(indices: Tensor, num_codebooks: int) -> None:
    """Several codebooks lie on the last axis of ``indices``."""
    if num_codebooks > 1 and (indices.ndim == 0 or indices.shape[-1] != num_codebooks):
        raise ShapeError("indices", f"a last axis of {num_codebooks} codebooks", f"shape {tuple(indices.shape)}")


def too_many_codes(count: int) -> str | None:
    """Why Triton's kernels cannot serve as many tokens times codebooks; None where they can."""
    return None if count < _MOST_CODES else f"its counters of tokens end at 2^31, got {count}"
