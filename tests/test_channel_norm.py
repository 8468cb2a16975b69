# SPDX-License-Identifier: Apache-2.0
"""Channel norms: every kind and layout against float64, diffusers' norms, bare ops, tracing, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from channel_norm_cases import CASES, WIDE, compare
from helpers import opcheck

import vidkernels
from vidkernels import ops
from vidkernels._reference import channel_norm as reference
from vidkernels.errors import BackendUnavailable, DTypeError, OptionError, ShapeError


@pytest.mark.parametrize("name", [*CASES, "rows of 1152", "rows of 301", "planes of 300, odd"])
def test_output_and_gradients_keep_the_promise(name: str) -> None:
    compare({**CASES, **WIDE}[name], torch.float32, "cpp", "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["layer silu", "layer silu channels last", "rms silu channels last"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    compare(CASES[name], dtype, "cpp", "cpu", torch.float32 if dtype == torch.bfloat16 else None)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", [*CASES, *WIDE])
def test_gpu_backends(name: str, backend: str) -> None:
    compare({**CASES, **WIDE}[name], torch.float32, backend, "cuda")
    compare({**CASES, **WIDE}[name], torch.bfloat16, backend, "cuda")


def test_reference_is_torch_and_diffusers() -> None:
    x, w, b = torch.randn(2, 12, 3, 4, 5), torch.randn(12), torch.randn(12)
    rows = x.movedim(1, -1)
    expected = F.silu(F.layer_norm(rows, (12,), w, b, 1e-6)).movedim(-1, 1)
    torch.testing.assert_close(reference.channel_norm(x, w, b, activation="silu"), expected)
    torch.testing.assert_close(
        reference.channel_norm(x, w, kind="rms", eps=1e-5), F.rms_norm(rows, (12,), w, 1e-5).movedim(-1, 1)
    )
    wan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    norm = wan.WanRMS_norm(12, images=False)
    torch.nn.init.normal_(norm.gamma)
    torch.testing.assert_close(reference.channel_norm(x, norm.gamma.flatten(), kind="l2"), norm(x))


@pytest.mark.parametrize("shape", [(2, 8, 3, 4, 5), (2, 8, 4, 5), (2, 8, 5)], ids=str)
def test_memory_format_is_kept(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert ops.channel_norm(x).stride() == x.stride()
    assert ops.channel_norm(last).stride() == last.stride()


def test_non_finite_rows_do_not_touch_others_and_empty() -> None:
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.randn(1, 16, 2, 3, 5).contiguous(memory_format=layout)
        y = ops.channel_norm(x, activation="silu")
        x[0, 3, 0, 0, 0], x[0, 5, 1, 2, 4] = float("nan"), float("inf")
        z = ops.channel_norm(x, activation="silu")
        bad = torch.zeros(2, 3, 5, dtype=torch.bool)
        bad[0, 0, 0] = bad[1, 2, 4] = True
        assert torch.equal(z[0][:, ~bad], y[0][:, ~bad])
        assert z[0][:, 0, 0, 0].isnan().all()
    assert ops.channel_norm(torch.empty(0, 8, 2, 2)).shape == (0, 8, 2, 2)
    assert ops.channel_norm(torch.randn(1, 8, 0, 2)).shape == (1, 8, 0, 2)


def test_bare_ops_trace_and_compile() -> None:
    x, w, b = torch.randn(2, 8, 3, 4), torch.randn(8), torch.randn(8)
    opcheck(torch.ops.vidkernels.channel_norm_fwd.default, (x, w, b, 1, 0, 1e-6, True))
    compiled = torch.compile(
        lambda x: ops.channel_norm(x, w, b, activation="silu"), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for size in (3, 5, 7):
        x = torch.randn(2, 8, size, 4, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, ops.channel_norm(x, w, b, activation="silu"))
        y.square().sum().backward()
        assert torch.isfinite(x.grad).all()


def test_gradients_only_where_wanted() -> None:
    x, w = torch.randn(2, 8, 3, 4), torch.randn(8, requires_grad=True)
    ops.channel_norm(x, w, torch.zeros(8)).square().sum().backward()
    assert x.grad is None and w.grad is not None


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: ops.channel_norm(x.int()), DTypeError, "x: expected float32"),
        (lambda x: ops.channel_norm(x, torch.ones(5)), ShapeError, "weight"),
        (lambda x: ops.channel_norm(x, kind="batch"), OptionError, "kind: expected one of"),
        (lambda x: ops.channel_norm(x, activation="gelu"), OptionError, "activation: expected one of"),
        (lambda x: ops.channel_norm(x, dim=9), (OptionError, ShapeError), "dim"),
        (lambda x: ops.channel_norm(x, backend="cuda"), BackendUnavailable, "it runs on cuda tensors, got cpu"),
    ],
)
def test_wrong_arguments(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call(torch.randn(2, 8, 3, 4))


def test_explain_names_every_backend() -> None:
    assert "-> cpp" in str(vidkernels.explain("channel_norm", torch.randn(2, 8, 3, 4)))
