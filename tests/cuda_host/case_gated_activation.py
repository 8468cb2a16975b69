# SPDX-License-Identifier: Apache-2.0
"""The gated activation's C++ kernels under sanitizers: whole and partial packs, rows with gaps, extreme values."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_gated_activation as cases


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", cases.HALVES.values(), ids=str)
@pytest.mark.parametrize("name", cases.SHAPES)
def test_both_directions(name: str, dtype: torch.dtype, activation: str) -> None:
    cases.check(cases.SHAPES[name], dtype, "cpp", activation)


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_extremes_rows_and_float64(activation: str) -> None:
    cases.check_float64(activation, "cpp")
    cases.check_extremes(activation, "cpp")
    cases.check_rows("cpp")
