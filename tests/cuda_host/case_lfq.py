# SPDX-License-Identifier: Apache-2.0
"""LFQ's bare ops on every layout and dtype: the kernels' memory accesses under sanitizers, their bits against the
reference."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quantizer_cases import DTYPES, layouts

from vidkernels._reference import lfq as reference
from vidkernels.ops import lfq as _ops  # noqa: F401

BARE = torch.ops.vidkernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "books"), [(7, 1), (3, 2), (36, 1)], ids=["7", "two of 3", "36"])
def test_forward_and_backward(bits: int, books: int, dtype: torch.dtype) -> None:
    for name, values, dim in layouts(books * bits, "cpu"):
        x = values.to(dtype)
        axis = dim % x.ndim
        for spherical in (False, True):
            options = dict(scale=0.3, spherical=spherical, bit_order="lsb_first", dim=axis, num_codebooks=books)
            right, right_indices = reference.lfq_quantize(x, **options)
            for parts in ((True, True), (True, False), (False, True)):
                values_, indices = BARE.lfq_fwd(x, 0.3, True, spherical, False, axis, books, *parts)
                assert not parts[0] or torch.equal(values_, right), name
                assert not parts[1] or torch.equal(indices, right_indices), name
            codes = BARE.lfq_decode(right_indices, bits, 0.3, True, spherical, axis, books, dtype)
            assert torch.equal(codes, right), name
        grad = torch.randn(x.shape, dtype=dtype)
        dx = BARE.lfq_bwd(grad, x, 0.3, axis, books)
        wide = x.double().requires_grad_()
        value, _ = reference.lfq_quantize(wide, scale=0.3, spherical=True, dim=axis, num_codebooks=books)
        (truth,) = torch.autograd.grad(value, wide, grad.double())
        rounding = torch.finfo(dtype).eps * truth.abs().max().item() if x.numel() else 0.0
        torch.testing.assert_close(dx.double(), truth, rtol=0, atol=8 * rounding)


def test_gradient_on_the_sphere_rounds_once() -> None:
    """float32: half a unit of the largest value, for vectors of any length; beyond, infinities as the reference has."""
    base = torch.randn(4, 5, 300)
    for x in (base, base * 1e-12, base * 1e15, base.transpose(1, 2).contiguous()):
        axis = 1 if x.shape[1] == 5 else 2
        wide, grad = x.double().requires_grad_(), torch.randn(x.shape)
        value, _ = reference.lfq_quantize(wide, spherical=True, dim=axis)
        (truth,) = torch.autograd.grad(value, wide, grad.double())
        error = (BARE.lfq_bwd(grad, x, 1.0, axis, 1).double() - truth).abs().amax(axis)
        assert (error <= 1.001 * 2.0**-24 * truth.abs().amax(axis)).all()
    huge = torch.tensor([[1e30, -2e30, 1.0]])
    assert torch.equal(BARE.lfq_bwd(torch.ones(1, 3), huge, 1.0, 1, 1), torch.zeros(1, 3))


def test_whole_blocks() -> None:
    """More tokens than a block has threads, in both orders of memory."""
    for x in (torch.randn(2, 18, 21, 16), torch.randn(2, 18, 17, 16).contiguous(memory_format=torch.channels_last)):
        values, indices = BARE.lfq_fwd(x, 1.0, False, False, True, 1, 1, True, True)
        right, right_indices = reference.lfq_quantize(x, dim=1, straight_through="additive")
        assert torch.equal(values, right) and torch.equal(indices, right_indices)


def test_wide_tiles() -> None:
    """Two tiles of 1024 tokens for each of the shim's four multiprocessors, from where on tiles are that wide."""
    x = torch.randn(1, 91, 91, 4)
    values, indices = BARE.lfq_fwd(x, 1.0, False, False, False, 3, 2, True, True)
    right, right_indices = reference.lfq_quantize(x, dim=-1, num_codebooks=2)
    assert torch.equal(values, right) and torch.equal(indices, right_indices)
    values, indices = BARE.lfq_fwd(x, 1.0, False, True, False, 3, 1, True, True)
    right, right_indices = reference.lfq_quantize(x, spherical=True, dim=-1)
    torch.testing.assert_close(values, right, rtol=0, atol=2e-7)
    assert torch.equal(indices, right_indices)
