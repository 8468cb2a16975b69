# SPDX-License-Identifier: Apache-2.0
"""FSQ's bare ops on every layout and dtype: the kernels' memory accesses under sanitizers, their bits against the
reference."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quantizer_cases import DTYPES, layouts

from vidkernels._reference import fsq as reference
from vidkernels.ops import _fsq_thresholds as tables
from vidkernels.ops import fsq as _ops  # noqa: F401

BARE = torch.ops.vidkernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("levels", "books"), [((8, 5, 3), 1), ((4, 17), 2)], ids=["8x5x3", "two of 4x17"])
def test_forward_and_backward(levels: tuple[int, ...], books: int, dtype: torch.dtype) -> None:
    bound = "symmetric" if books == 2 else "atanh"
    found = tables.thresholds(levels, bound, False, torch.device("cpu"), dtype == torch.float64)
    slopes = tables.shifts(levels, bound, False), tables.slopes(levels, bound, False)
    for name, values, dim in layouts(books * len(levels), "cpu"):
        z = values.to(dtype)
        if z.numel() > 9 and name != "expanded":
            z.movedim(dim, -1)[..., 0, 0] = torch.nan
        axis = dim % z.ndim
        expected = reference.fsq_quantize(z, levels, bound=bound, dim=axis, num_codebooks=books)
        for parts in ((True, True), (True, False), (False, True)):
            outputs = BARE.fsq_fwd(z, levels, found, bound == "symmetric", axis, books, *parts)
            for wanted, output, right in zip(parts, outputs, expected, strict=True):
                if wanted:
                    assert torch.equal(output.nan_to_num(9.0), right.nan_to_num(9.0)), name
        for grad in (torch.randn_like(z), torch.randn(z.shape, dtype=dtype)):
            for clamp in (False, True):
                dz = BARE.fsq_bwd(grad, z, *slopes, clamp, axis, books)
                assert torch.equal(dz.isnan(), z.isnan() | (grad.isnan())), name
        indices = expected[1].clamp(min=-1)
        codes = BARE.fsq_decode(indices, levels, bound == "symmetric", axis, books, dtype)
        right = reference.fsq_indices_to_codes(indices, levels, bound=bound, dim=axis, num_codebooks=books, dtype=dtype)
        assert torch.equal(codes.nan_to_num(9.0), right.nan_to_num(9.0)), name


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (3,) * 9, (16, 12)], ids=["8x8x8x5x5x5", "nine", "16x12"])
def test_whole_blocks(levels: tuple[int, ...]) -> None:
    """More tokens than a block has threads, in both orders of memory; more channels than a word of digits holds."""
    found = tables.thresholds(levels, "atanh", False, torch.device("cpu"), False)
    whole = torch.randn(2, len(levels), 21, 16)
    for z in (whole, whole[:, :, :17].contiguous(memory_format=torch.channels_last)):
        codes, indices = BARE.fsq_fwd(z, levels, found, False, 1, 1, True, True)
        expected, expected_indices = reference.fsq_quantize(z, levels, dim=1)
        assert torch.equal(codes, expected) and torch.equal(indices, expected_indices)


def test_wide_tiles() -> None:
    """Two tiles of 1024 tokens for each of the shim's four multiprocessors, from where on tiles are that wide."""
    levels = (4, 3)
    found = tables.thresholds(levels, "atanh", False, torch.device("cpu"), False)
    z = torch.randn(1, 91, 91, len(levels))
    z[0, 90, 90, 0] = torch.nan
    codes, indices = BARE.fsq_fwd(z, levels, found, False, 3, 1, True, True)
    expected, expected_indices = reference.fsq_quantize(z, levels, dim=-1)
    assert torch.equal(codes.nan_to_num(9.0), expected.nan_to_num(9.0)) and torch.equal(indices, expected_indices)


@pytest.mark.parametrize("levels", [(2, 3, 7, 11, 100), (65537, 32767)], ids=["small", "large"])
def test_every_digit(levels: tuple[int, ...]) -> None:
    """Digits come from products with rounded reciprocals: the last index of each digit and its neighbours."""
    size = torch.tensor(levels).prod().item()
    step = 1
    picked = [0, size - 1]
    for level in levels:
        picked += [k * step + d for k in (1, level // 2, level - 1) for d in (-1, 0, 1)]
        step *= level
    indices = torch.tensor([i for i in picked if 0 <= i < size]).repeat(9)
    for axis in (0, 1):
        codes = BARE.fsq_decode(indices, levels, False, axis, 1, torch.float32)
        right = reference.fsq_indices_to_codes(indices, levels, bound="atanh", dim=axis, dtype=torch.float32)
        assert torch.equal(codes, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_16_bits(dtype: torch.dtype) -> None:
    """They are compared in pairs with thresholds rounded up to their type: NaN, infinities, zeros and subnormals too."""
    levels = (8, 5, 16)
    found = tables.thresholds(levels, "atanh", False, torch.device("cpu"), False)
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    for z, dim in ((every.expand(3, -1).contiguous()[None], 1), (every[:, None].expand(-1, 3).contiguous(), 1)):
        codes, indices = BARE.fsq_fwd(z, levels, found, False, dim, 1, True, True)
        expected, expected_indices = reference.fsq_quantize(z, levels, dim=dim)
        assert torch.equal(codes.isnan(), z.isnan())
        assert torch.equal(codes.nan_to_num(9.0), expected.nan_to_num(9.0)) and torch.equal(indices, expected_indices)
