# SPDX-License-Identifier: Apache-2.0
"""The alpha blend's kernels on the host against the reference: every mode, dtype and memory format, both directions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alpha_blend_cases import CASES, DTYPES, INFINITE, Case, compare, compare_infinite


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_blend(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype, "cpp", "cpu")


def test_mix_factor_of_another_dtype() -> None:
    compare(CASES["down history of 2"], torch.bfloat16, "cpp", "cpu", mix_dtype=torch.float32)


def test_sixteen_byte_vectors_and_a_part_of_a_block() -> None:
    compare(Case("alpha_blend_up", (2, 16, 10, 4, 8)), torch.float16, "cpp", "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", INFINITE)
def test_an_infinity(name: str, dtype: torch.dtype) -> None:
    compare_infinite(CASES[name], dtype, "cpp", "cpu")
