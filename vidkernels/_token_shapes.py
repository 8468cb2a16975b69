# SPDX-License-Identifier: Apache-2.0
"""Shapes of codes and of their indices: channels on one axis, tokens on the others."""

from __future__ import annotations

from collections.abc import Sequence


def index_shape(shape: Sequence[int], dim: int, num_codebooks: int) -> list[int]:
    """One integer per token: ``shape`` without the channel axis, with a last axis of codebooks if there are several."""
    return [*shape[:dim], *shape[dim + 1 :], *([num_codebooks] if num_codebooks > 1 else [])]


def code_shape(shape: Sequence[int], dim: int, num_codebooks: int, channels: int) -> list[int]:
    """Shape of the codes of indices of ``shape``."""
    tokens = shape if num_codebooks == 1 else shape[:-1]
    return [*tokens[:dim], num_codebooks * channels, *tokens[dim:]]
