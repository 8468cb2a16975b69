# SPDX-License-Identifier: Apache-2.0
"""The alpha blends: every mode against float64, diffusers' layers, memory formats, bare ops, tracing, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from alpha_blend_cases import CASES, compare
from helpers import opcheck

import vidkernels
from vidkernels import ops
from vidkernels._reference import alpha_blend as reference
from vidkernels.errors import BackendUnavailable, DTypeError, OptionError, ShapeError


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_keep_the_promise(name: str) -> None:
    compare(CASES[name], torch.float32, "cpp", "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["plain", "down history of 2", "linear chunk", "nearest channels last"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    compare(CASES[name], dtype, "cpp", "cpu", torch.float32 if dtype == torch.bfloat16 else None)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_gpu_backends(name: str, backend: str) -> None:
    compare(CASES[name], torch.float32, backend, "cuda")
    compare(CASES[name], torch.bfloat16, backend, "cuda")


def test_reference_is_the_plain_formula() -> None:
    a, b, m = torch.randn(1, 3, 6, 4, 4), torch.randn(1, 3, 6, 4, 4), torch.tensor([0.3])
    s = torch.sigmoid(m)
    torch.testing.assert_close(reference.alpha_blend(a, b, m), s * a + (1 - s) * b)
    pooled = F.avg_pool3d(F.pad(a, (0, 0, 0, 0, 1, 0)), (3, 1, 1), (2, 1, 1))
    torch.testing.assert_close(reference.alpha_blend_down(a, b[:, :, :3], m), s * pooled + (1 - s) * b[:, :, :3])
    doubled = F.interpolate(a, scale_factor=(2.0, 1.0, 1.0), mode="trilinear")
    wide = torch.cat([b, b], 2)
    torch.testing.assert_close(
        reference.alpha_blend_up(a, wide, m, mode="linear", split=0), s * doubled + (1 - s) * wide
    )


@pytest.mark.parametrize("op", ["alpha_blend", "alpha_blend_down", "alpha_blend_up"])
def test_memory_format_is_kept(op: str) -> None:
    frames = {"alpha_blend": 4, "alpha_blend_down": 2, "alpha_blend_up": 8}[op]
    for memory_format in (torch.channels_last_3d, torch.contiguous_format):
        x, b = (torch.randn(1, 8, t, 4, 6).contiguous(memory_format=memory_format) for t in (4, frames))
        assert getattr(ops, op)(x, b, torch.zeros(1)).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("name", ["down zeros", "linear split 2"])
def test_chunks_equal_the_whole_clip(name: str) -> None:
    x, b, m = torch.randn(1, 4, 8, 3, 3), torch.randn(1, 4, 4 if "down" in name else 16, 3, 3), torch.tensor([0.4])
    if "down" in name:
        whole = ops.alpha_blend_down(x, b, m)
        first = ops.alpha_blend_down(x[:, :, :4], b[:, :, :2], m)
        second = ops.alpha_blend_down(x[:, :, 4:], b[:, :, 2:], m, first_frame=x[:, :, 3:4])
    else:
        whole = ops.alpha_blend_up(x, b, m, mode="linear", split=0)
        first = ops.alpha_blend_up(x[:, :, :4], b[:, :, :8], m, mode="linear", split=0, lookahead=x[:, :, 4:5])
        second = ops.alpha_blend_up(x[:, :, 4:], b[:, :, 8:], m, mode="linear", split=0, history=x[:, :, 3:4])
    assert torch.equal(torch.cat([first, second], 2), whole)


def test_extremes_empty_and_non_finite() -> None:
    a, b = torch.full((1, 2, 2, 3, 3), 3e38), torch.full((1, 2, 2, 3, 3), -3e38)
    for m in (-200.0, -20.0, 0.0, 20.0, 200.0):
        y = ops.alpha_blend(a, b, torch.tensor([m]))
        torch.testing.assert_close(y, reference.alpha_blend(a, b, torch.tensor([m])))
    a[0, 0, 0, 0, 0], b[0, 1, 0, 0, 0] = float("nan"), float("inf")
    assert torch.equal(ops.alpha_blend(a, b, torch.zeros(1)).isnan(), a.isnan())
    empty = torch.empty(0, 2, 2, 3, 3)
    assert ops.alpha_blend(empty, empty, torch.zeros(1)).shape == empty.shape


def test_bare_ops_trace_and_compile() -> None:
    x, b, m = torch.randn(1, 4, 6, 3, 3), torch.randn(1, 4, 3, 3, 3), torch.tensor([0.4])
    opcheck(torch.ops.vidkernels.alpha_blend_fwd.default, (x, b, m, None, None, 1, 0))
    opcheck(
        torch.ops.vidkernels.alpha_blend_bwd.default, (b, x, b, m, None, None, 1, 0, True, True, True, False, False)
    )
    compiled = torch.compile(
        lambda x, b, m: ops.alpha_blend_down(x, b, m), fullgraph=True, backend="aot_eager", dynamic=True
    )
    x.requires_grad_()
    for frames in (6, 8, 10):
        y = torch.randn(1, 4, frames // 2, 3, 3)
        wide = torch.randn(1, 4, frames, 3, 3, requires_grad=True)
        result = compiled(wide, y, m)
        torch.testing.assert_close(result, ops.alpha_blend_down(wide, y, m))
        result.sum().backward()
        assert torch.isfinite(wide.grad).all()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x, m: ops.alpha_blend(x, x[:, :, 1:], m), ShapeError, "expected"),
        (lambda x, m: ops.alpha_blend(x, x.double(), m), DTypeError, "expected the dtype"),
        (lambda x, m: ops.alpha_blend(x.int(), x, m), DTypeError, "expected float32"),
        (lambda x, m: ops.alpha_blend(x, x, torch.zeros(2)), ShapeError, "mix_factor"),
        (lambda x, m: ops.alpha_blend_down(x, x[:, :, :2], m, first_frame="ones"), OptionError, "first_frame"),
        (
            lambda x, m: ops.alpha_blend_up(x, torch.cat([x, x], 2), m, mode="cubic"),
            OptionError,
            "mode: expected one of",
        ),
        (lambda x, m: ops.alpha_blend(x, x, m, backend="cuda"), BackendUnavailable, "it runs on cuda tensors, got cpu"),
        (lambda x, m: ops.alpha_blend(x, x, m, backend="metal"), OptionError, "backend: expected one of auto"),
    ],
)
def test_wrong_arguments(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call(torch.randn(1, 2, 4, 3, 3), torch.zeros(1))


def test_explain_names_every_backend() -> None:
    x = torch.randn(1, 2, 4, 3, 3)
    text = str(vidkernels.explain("alpha_blend", x, x, torch.zeros(1)))
    assert "-> cpp" in text and "it runs on cuda tensors, got cpu" in text and "reference" in text
