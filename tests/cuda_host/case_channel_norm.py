# SPDX-License-Identifier: Apache-2.0
"""The kernels of the channel and group norms on the host against the reference: kinds, dtypes, layouts, both directions."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_group_norm
from channel_norm_cases import CASES, DTYPES, WIDE, Case, compare


@pytest.fixture(autouse=True)
def narrow_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few channels reach the kernels of their own dtype, which a GPU runs."""
    monkeypatch.setattr(importlib.import_module("vidkernels.ops.channel_norm"), "NARROW", 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_norm(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype, "cpp", "cpu")


@pytest.mark.parametrize("case", WIDE.values(), ids=list(WIDE))
def test_widths(case: Case) -> None:
    compare(case, torch.bfloat16, "cpp", "cpu", affine=torch.float32)


@pytest.mark.skipif(os.environ.get("VIDKERNELS_HOST_KERNELS") == "cuda", reason="group_norm has no CUDA kernel")
@pytest.mark.parametrize("layout", test_group_norm.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", test_group_norm.CASES)
def test_groups(name: str, dtype: torch.dtype, layout: str) -> None:
    test_group_norm.check(name, dtype, layout, "cpp", dtype)
