# SPDX-License-Identifier: Apache-2.0
"""The channel norm's kernels on the host against the reference: every kind, dtype and layout, both directions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from channel_norm_cases import CASES, DTYPES, WIDE, Case, compare  # noqa: E402


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_norm(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype, "cpp", "cpu")


@pytest.mark.parametrize("case", WIDE.values(), ids=list(WIDE))
def test_widths(case: Case) -> None:
    compare(case, torch.bfloat16, "cpp", "cpu", affine=torch.float32)
