# SPDX-License-Identifier: Apache-2.0
"""Triton kernels at the ends of 32-bit numbers, and tensors whose values are not what lies in memory."""

from __future__ import annotations

import pytest
import torch

from vidkernels import ops

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
conv_wgrad = pytest.importorskip("vidkernels.triton._conv_wgrad")


@triton.jit
def _shares(out, steps, parts):
    first, last = conv_wgrad._share(steps, tl.program_id(0), parts)
    tl.store(out + tl.program_id(0), first)
    tl.store(out + parts + tl.program_id(0), last)


@pytest.mark.interpreter
def test_parts_of_a_weight_gradient_beyond_32_bits() -> None:
    """The product of steps and parts passes 2^31 from 2^23 steps on: 5 x 2^26 pixels in full float32."""
    for steps, parts in ((5 * 2**21 + 3, 264), (7, 3), (2, 5)):
        out = torch.zeros(2, parts, dtype=torch.int32)
        _shares[(parts,)](out, steps, parts)
        first, last = out.tolist()
        assert first[0] == 0 and last[-1] == steps and first[1:] == last[:-1]
        assert {b - a for a, b in zip(first, last, strict=True)} <= {steps // parts, steps // parts + 1}


@pytest.mark.interpreter
def test_a_gate_in_rows_far_apart() -> None:
    """2048 rows of a tile reach 2^31 elements from a distance of 2^20 on: such rows are copied."""
    from vidkernels.triton import gated_activation as launchers

    near, far = torch.randn(8, 6)[:, :4], torch.empty(8 * 2**20).as_strided((8, 4), (2**20, 1)).normal_()
    assert launchers._narrow(near) is near and launchers._narrow(far).is_contiguous()
    torch.testing.assert_close(
        ops.gated_activation(far, backend="triton"), ops.gated_activation(far, backend="reference")
    )
    close = far.clone().requires_grad_()
    for x in (close, far.requires_grad_()):
        ops.gated_activation(x, backend="triton").sum().backward()
    assert close.grad is not None and far.grad is not None and torch.equal(close.grad, far.grad)


@pytest.mark.interpreter
def test_negated_views() -> None:
    """Of such a view memory holds the opposite of its values; kernels that are called past torch's dispatcher read memory."""
    x = torch.randn(2, 8, 3, 4, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    expected = ops.channel_norm(x, backend="reference")
    for _ in range(2):
        torch.testing.assert_close(ops.channel_norm(x, backend="triton"), expected)


@pytest.mark.interpreter
def test_every_other_value_of_a_vector() -> None:
    """Weight and bias of a norm as views with a stride."""
    x, branch = torch.randn(2, 2, 5, 24)
    rows = [torch.randn(2, 24) for _ in range(3)]
    found = []
    for backend in ("reference", "triton"):
        weight, bias = (vector.clone().requires_grad_() for vector in torch.linspace(-2, 3, 96).view(2, 48))
        affine = {"weight": weight[::2], "bias": bias[::2]}
        y = ops.adaln_modulate(x, *rows[:2], **affine, backend=backend)
        hidden, z = ops.adaln_zero(x, branch, *rows, **affine, backend=backend)
        found.append((y, hidden, z, *torch.autograd.grad((y * z).sum(), (weight, bias))))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
