# SPDX-License-Identifier: Apache-2.0
"""Tensors beyond 2^31 elements: tokens at both ends have the results that they have in a small tensor of their own.

Everything between them is zeros. Needs `--large` and up to 15 GB, on a CPU or a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vidkernels import _library, ops

pytestmark = pytest.mark.large
HAS_TRITON = importlib.util.find_spec("triton") is not None
BEYOND, ENDS = 2**31 + 2**20, 64  # elements; tokens at each end
BACKENDS = [
    pytest.param(
        "cpp", "cpu", marks=pytest.mark.skipif(_library.cpu_missing is not None, reason=str(_library.cpu_missing))
    ),
    pytest.param(
        "cuda", "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(_library.cuda_missing is not None, reason=str(_library.cuda_missing))],
    ),
    pytest.param("triton", "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_TRITON, reason="no triton")]),
]  # fmt: skip
Call = Callable[..., Any]


def _results(made: Any) -> list[torch.Tensor]:
    return [made] if isinstance(made, torch.Tensor) else [x for x in made if isinstance(x, torch.Tensor)]


def compare(call: Call, channels: int, backend: str, device: str, planar: bool = False) -> None:
    """`call(x)` of x [1, tokens, channels], or, if planar, [1, channels, tokens], whose last channel begins beyond 2^31."""
    tokens, axis = (-(-BEYOND // (channels - 1)), 2) if planar else (-(-BEYOND // channels), 1)
    size = (1, channels, tokens) if planar else (1, tokens, channels)
    x = torch.zeros(size, dtype=torch.bfloat16, device=device)
    ends = [x.narrow(axis, start, ENDS) for start in (0, tokens - ENDS)]
    for end in ends:
        end.copy_(torch.randn(end.shape))
    expected = [_results(call(end.contiguous(), backend=backend)) for end in ends]
    found = _results(call(x, backend=backend))
    for results, start in zip(expected, (0, tokens - ENDS), strict=True):
        for small, large in zip(results, found, strict=True):
            along = axis if large.dim() == 3 else 1  # indices have no channels
            torch.testing.assert_close(large.narrow(along, start, ENDS), small)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("planar", [False, True], ids=["rows", "planes"])
def test_quantizers(planar: bool, backend: str, device: str) -> None:
    dim = 1 if planar else -1
    compare(lambda x, **o: ops.fsq_quantize(x, [8, 8, 8, 5, 5, 5], dim=dim, **o), 6, backend, device, planar)
    compare(lambda x, **o: ops.lfq_quantize(x, dim=dim, **o), 18, backend, device, planar)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("planar", [False, True], ids=["rows", "planes"])
def test_channel_norm(planar: bool, backend: str, device: str) -> None:
    weight = torch.randn(128, dtype=torch.bfloat16, device=device)

    def norm(x: torch.Tensor, **options: Any) -> torch.Tensor:
        return ops.channel_norm(x, weight, dim=1 if planar else -1, kind="rms", activation="silu", **options)

    compare(norm, 128, backend, device, planar)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_adaln(backend: str, device: str) -> None:
    shift, scale = torch.randn(2, 1, 1, 1152, dtype=torch.bfloat16, device=device)
    compare(lambda x, **o: ops.adaln_modulate(x, shift, scale, **o), 1152, backend, device)


@pytest.mark.parametrize(("backend", "device"), [BACKENDS[0], BACKENDS[2]])
def test_gated_activation(backend: str, device: str) -> None:
    compare(lambda x, **o: ops.gated_activation(x, **o), 4096, backend, device)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_alpha_blend(backend: str, device: str) -> None:
    mix = torch.tensor([0.3], device=device)
    compare(lambda x, **o: ops.alpha_blend(x, x, mix, **o), 128, backend, device)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_qk_norm_rope(backend: str, device: str) -> None:
    weight = torch.randn(64, dtype=torch.bfloat16, device=device)

    def heads(x: torch.Tensor, **options: Any) -> torch.Tensor:
        q = x.view(1, x.shape[1], 16, 64)
        return ops.qk_norm_rope(q, None, weight, None, **options)[0].flatten(2)

    compare(heads, 1024, backend, device)
