# SPDX-License-Identifier: Apache-2.0
"""FSQ's kernels on the host against the reference: every dtype, both channel layouts, sizes off the block size."""

from __future__ import annotations

import pytest
import torch

from vidkernels import ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [((3, 6, 2, 5, 7), 1), ((37, 6), -1), ((1, 6, 1), 1)]
LEVELS = [8, 8, 8, 5, 5, 5]


def quantized(z: torch.Tensor, dim: int, backend: str) -> list[torch.Tensor]:
    z = z.clone().requires_grad_(True)
    codes, indices = ops.fsq_quantize(z, LEVELS, dim=dim, backend=backend)
    cotangent = torch.linspace(-1, 1, codes.numel(), dtype=torch.float32).reshape(codes.shape).to(codes.dtype)
    (gradient,) = torch.autograd.grad(codes, z, cotangent)
    return [codes.detach(), indices, gradient]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=["channels second", "channels last", "one token"])
def test_quantize(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    z = torch.randn(shape).to(dtype) * 2
    codes, indices, gradient = quantized(z, dim, "cpp")
    expected = quantized(z, dim, "reference")
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(codes, expected[0])
    torch.testing.assert_close(gradient, expected[2])


def test_indices_to_codes() -> None:
    indices = torch.randint(0, 64000, (2, 3, 5), dtype=torch.int32)
    for dim in (1, -1):
        actual = ops.fsq_indices_to_codes(indices, LEVELS, dim=dim, backend="cpp")
        assert torch.equal(actual, ops.fsq_indices_to_codes(indices, LEVELS, dim=dim, backend="reference"))
