# SPDX-License-Identifier: Apache-2.0
"""The adaLN kernels on the host against the reference: every form of rows, every way of holding a row in threads."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from adaln_zero_cases import CALLS, FORMS, Form, check, draw

from vidkernels import ops


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_rows(form: Form) -> None:
    for op in CALLS:
        check(op, form, 40, torch.bfloat16, "cpp", table_dtype=torch.float32)


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [
        (torch.float32, 32),  # 8 threads a row, 16 rows a block
        (torch.float16, 120),  # 16 threads, the last one idle
        (torch.bfloat16, 264),  # two warps, the second almost idle: a barrier a row
        (torch.bfloat16, 2240),  # nine warps, 8 columns a thread
        (torch.bfloat16, 3072),  # six warps, 16 columns a thread
        (torch.float32, 2080),  # five warps, 16 columns: the residual's operands are not staged
        (torch.bfloat16, 101),  # rows that 16-byte vectors do not fit
        (torch.float32, 1030),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_ways_of_holding_a_row(dtype: torch.dtype, channels: int) -> None:
    if channels > 1000:  # two tokens a block on the shim's device; a thread of its own costs the shim 10 us
        return check("adaln_zero", Form((1, 12), (1,)), channels, dtype, "cpp")
    for op in CALLS:
        check(op, FORMS["per_sample"], channels, dtype, "cpp")


@pytest.fixture
def little_shared_memory() -> Iterator[None]:
    """A device on which no staged row fits, so that the kernels that load rows where they use them run."""
    if os.environ.get("VIDKERNELS_HOST_KERNELS") != "cuda":
        pytest.skip("about CUDA kernels")
    library = ctypes.CDLL(str(Path(os.environ["VIDKERNELS_LIBRARY_DIR"]) / "libvidkernels_cpu.so"))
    limit = ctypes.c_int64.in_dll(library, "vk_adaln_shared_limit")
    limit.value = 1
    yield
    limit.value = 0


@pytest.mark.usefixtures("little_shared_memory")
@pytest.mark.parametrize(
    ("dtype", "channels"),
    [(torch.bfloat16, 264), (torch.float32, 96), (torch.bfloat16, 3072), (torch.float32, 2080)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_rows_that_do_not_fit_into_shared_memory(dtype: torch.dtype, channels: int) -> None:
    form = Form((1, 12), (1,)) if channels > 1000 else FORMS["packed"]
    for op in ("adaln_zero",) if channels > 1000 else CALLS:
        check(op, form, channels, dtype, "cpp")


@pytest.mark.parametrize("norm", ["rms", "none"])
def test_other_norms(norm: str) -> None:
    check("adaln_zero", FORMS["packed"], 296, torch.bfloat16, "cpp", norm=norm)


@pytest.mark.parametrize("missing", [("gate",), ("shift", "scale"), ("weight", "bias")], ids="+".join)
def test_missing_operands(missing: tuple[str, ...]) -> None:
    check("adaln_zero", FORMS["per_frame"], 48, torch.float32, "cpp", missing=missing)


def test_pointers_that_are_not_aligned() -> None:
    """A view that begins 2 bytes into its storage takes the path of single values."""
    t = draw(FORMS["per_sample"], 64, torch.bfloat16)
    storage = torch.empty(t["residual"].numel() + 1, dtype=torch.bfloat16)
    shifted = storage[1:].view_as(t["residual"]).copy_(t["residual"])
    assert shifted.data_ptr() % 16 != 0
    actual = ops.adaln_modulate(shifted, t["shift"], t["scale"], backend="cpp")
    expected = ops.adaln_modulate(t["residual"], t["shift"], t["scale"], backend="cpp")
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-8)


def test_empty() -> None:
    x = torch.randn(2, 0, 8, requires_grad=True)
    table = torch.randn(2, 8, requires_grad=True)
    ops.adaln_modulate(x, table, table, backend="cpp").sum().backward()
    assert torch.equal(table.grad, torch.zeros_like(table))
