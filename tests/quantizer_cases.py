# SPDX-License-Identifier: Apache-2.0
"""What the tests of FSQ and LFQ share: backends, layouts, special values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vidkernels import _library

needs_library = pytest.mark.skipif(_library.cpu_missing is not None, reason=str(_library.cpu_missing))

# (backend, device); the interpreter's pass runs Triton on CPU tensors.
BACKENDS = [
    pytest.param(("cpp", "cpu"), id="cpp", marks=needs_library),
    pytest.param(("triton", "cpu"), id="triton-interpreter", marks=pytest.mark.interpreter),
    pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def dtypes_of(backend: str) -> list[torch.dtype]:
    """Dtypes that a backend serves."""
    return [dtype for dtype in DTYPES if dtype != torch.float64 or backend != "triton"]


def rounding_dtypes_of(backend: str, device: str) -> list[torch.dtype]:
    """Dtypes to which a backend rounds as it should: Triton's interpreter cuts float32 off to bfloat16."""
    interpreted = backend == "triton" and device == "cpu"
    return [dtype for dtype in dtypes_of(backend) if not (interpreted and dtype == torch.bfloat16)]


def layouts(channels: int, device: str) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(name, values, channel axis): every path of the kernels, with token counts that no vector divides."""

    def normal(*shape: int) -> torch.Tensor:
        return 1.5 * torch.randn(*shape, device=device)

    yield "tokens", normal(3, 87, channels), -1
    yield "video", normal(2, channels, 3, 5, 7), 1
    yield "video channels_last_3d", normal(2, channels, 3, 5, 7).contiguous(memory_format=torch.channels_last_3d), 1
    yield "one token", normal(1, channels), 1
    yield "one frame of a clip", normal(2, channels, 4, 5, 7)[:, :, 1:2], 1
    yield "every other token", normal(4, 31, channels)[:, ::2], -1
    yield "first axis", normal(channels, 41), 0
    yield "transposed tokens", normal(5, 6, 7, channels).permute(2, 0, 1, 3), -1
    yield "expanded", normal(1, channels, 1).expand(3, channels, 11), 1
    yield "whole vectors", normal(2, channels, 64), 1
    yield "empty", normal(0, channels, 4), 1


def ulps(values: torch.Tensor, reach: int) -> torch.Tensor:
    """The numbers up to ``reach`` steps above and below each value, in the value's dtype."""
    up, down, result = values, values, [values]
    for _ in range(reach):
        up = torch.nextafter(up, torch.full_like(up, torch.inf))
        down = torch.nextafter(down, torch.full_like(down, -torch.inf))
        result += [up, down]
    return torch.cat(result)
