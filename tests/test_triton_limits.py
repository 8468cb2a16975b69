# SPDX-License-Identifier: Apache-2.0
"""Triton kernels at the ends of 32-bit numbers, and tensors whose values are not what lies in memory."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

import vidkernels
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


def far_channels(channels: int, tokens: int) -> torch.Tensor:
    """[1, channels, tokens] with 2^30 elements between channels, as a clip of as many tokens has: addresses without memory, as
    many in front, where a 32-bit offset that wraps around would lead."""
    step = 2**30
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    memory = torch.frombuffer(mmap.mmap(-1, 4 * channels * step, flags=flags), dtype=torch.float16)
    return memory.as_strided((1, channels, tokens), (channels * step, step, 1), channels * step)


@pytest.mark.interpreter
@pytest.mark.skipif(sys.platform != "linux", reason="addresses without memory")
def test_channels_far_apart() -> None:
    """From the third channel on, 2^31 elements lie between a token's channels."""
    x = far_channels(4, 3).copy_(torch.tensor([[-2, 0.3, -1], [0.5, 2, 1], [-1, 0.2, 3], [0.7, -0.1, 0.6]]).half())
    near, grad = x.clone(), torch.randn(1, 4, 3).half()
    for call in (
        lambda x: ops.fsq_quantize(x, [8, 5, 5, 5], dim=1, backend="triton"),
        lambda x: ops.lfq_quantize(x, dim=1, backend="triton"),
        lambda x: ops.lfq_quantize(x, dim=1, spherical=True, straight_through="additive", backend="triton"),
    ):
        found = []
        for leaf in (x.detach().requires_grad_(), near.detach().requires_grad_()):
            codes, indices = call(leaf)[:2]
            found.append((codes.detach(), indices, *torch.autograd.grad(codes, leaf, grad)))
        assert all(map(torch.equal, *found))


@pytest.mark.interpreter
@pytest.mark.parametrize(("count", "served"), [(2**30, True), (2**31, False)])
def test_quantizers_count_to_2_31(count: int, served: bool) -> None:
    """Tokens times codebooks; the last block may not end beyond."""
    x, indices = torch.zeros(()).expand(1, 6, count // 2), torch.zeros((), dtype=torch.int32).expand(1, count)
    for explained in (
        vidkernels.explain("fsq_quantize", x, [8, 5, 5], dim=1, num_codebooks=2),
        vidkernels.explain("lfq_quantize", x, dim=1, num_codebooks=2),
        vidkernels.explain("fsq_indices_to_codes", indices, [8, 5, 5]),
        vidkernels.explain("lfq_indices_to_codes", indices, 3),
    ):
        assert ("end at 2^31" in str(explained)) != served


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
