# SPDX-License-Identifier: Apache-2.0
"""The C++ backend's weight gradient: three algorithms and the doubled image, against convolutions of PyTorch in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import HAS_TILES, assert_within_promise, opcheck, run_python
from torch.utils._python_dispatch import TorchDispatchMode

import vidkernels
from vidkernels import ops
from vidkernels._conv import cpp
from vidkernels._reference import causal_conv3d as reference
from vidkernels._reference import upsample_conv3d as reference_upsample

_REASON = vidkernels.explain("causal_conv3d", torch.zeros(1, 2, 2, 3, 3), torch.zeros(2, 2, 3, 3, 3)).choices[0].reason
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

# x, (filters, kernel), options
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "odd": ((2, 5, 3, 7, 9), (3, 3, 3, 3), {}),
    "vectors-and-rest": ((1, 33, 2, 6, 6), (35, 2, 3, 3), {"time_padding": "replicate"}),
    "blocks": ((1, 140, 2, 7, 6), (130, 2, 3, 3), {}),
    "replicate": ((1, 18, 4, 5, 8), (16, 3, 3, 3), {"time_padding": "replicate", "spatial_padding_mode": "replicate"}),
    "stride-dilation-in-time": ((1, 8, 7, 6, 6), (8, 3, 3, 3), {"stride": (2, 1, 1), "dilation": (2, 1, 1)}),
    "valid": ((1, 8, 3, 9, 8), (8, 1, 3, 3), {"spatial_padding": 0}),
    "wide": ((1, 8, 2, 3, 3), (8, 1, 3, 3), {"spatial_padding": (4, 0, 2, 5)}),
    "one-pixel": ((1, 8, 1, 1, 1), (8, 3, 3, 3), {}),
    "only-padding": ((1, 8, 1, 4, 4), (8, 3, 3, 3), {"pad_frames": (5, 4)}),
    "frames-behind": ((2, 8, 3, 5, 4), (8, 3, 3, 3), {"pad_frames": (1, 1), "time_padding": "replicate"}),
    "temporal": ((2, 70, 5, 6, 7), (37, 3, 1, 1), {"time_padding": "replicate"}),
    "pointwise": ((1, 130, 3, 5, 9), (140, 1, 1, 1), {}),
    "down": ((1, 20, 2, 9, 12), (24, 1, 3, 3), {"stride": (1, 2, 2), "spatial_padding": (0, 1, 0, 1)}),
    "dilated": ((1, 20, 3, 12, 9), (33, 1, 3, 3), {"dilation": (1, 2, 3)}),
    "rgb-in": ((2, 3, 3, 9, 11), (40, 3, 3, 3), {"spatial_padding_mode": "replicate"}),
    "even-kernel": ((1, 6, 3, 8, 7), (9, 2, 4, 2), {"spatial_padding": (1, 2, 0, 1)}),
    "rgb-out": ((2, 37, 3, 9, 11), (3, 3, 3, 3), {"time_padding": "replicate"}),
    "one-out": ((1, 150, 2, 5, 6), (1, 1, 3, 3), {}),
    "few-dilated": ((1, 20, 3, 12, 9), (4, 1, 3, 3), {"dilation": (1, 2, 3)}),
    "few-wide": ((1, 16, 2, 3, 3), (3, 1, 3, 3), {"spatial_padding": (4, 0, 2, 5)}),
    "few-valid": ((1, 16, 3, 9, 8), (3, 2, 2, 3), {"spatial_padding": 0, "time_padding": "none"}),
    "few-replicate": ((1, 16, 3, 5, 6), (3, 3, 3, 3), {"spatial_padding_mode": "replicate"}),
}
ALGORITHMS = {"direct": cpp.DIRECT, "winograd": cpp.WINOGRAD, "few": cpp.FEW_FILTERS}


def _fits(algorithm: str, filters: int, kernel: Sequence[int], options: dict[str, Any]) -> bool:
    """What each algorithm can compute, whatever the heuristic would choose."""
    unit = tuple(options.get("stride", (1, 1, 1)))[1:] == (1, 1)
    dense = tuple(options.get("dilation", (1, 1, 1)))[1:] == (1, 1)
    if algorithm == "winograd":
        return unit and dense and tuple(kernel[1:]) == (3, 3)
    return algorithm in ("direct", "tiles") or (unit and options.get("spatial_padding_mode") != "replicate")


def _gradient(function: Any, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, **options: Any) -> torch.Tensor:
    leaf = weight.detach().requires_grad_()
    return torch.autograd.grad(function(x, leaf, **options), leaf, grad)[0]


@pytest.mark.parametrize("layout", ["channels-last", "contiguous", "gaps"])
@pytest.mark.parametrize(
    ("algorithm", "case"),
    [
        pytest.param(a, c, id=f"{a}-{n}")
        for a in ALGORITHMS
        for n, c in CASES.items()
        if _fits(a, c[1][0], c[1][1:], c[2])
    ],
)
def test_every_algorithm(algorithm: str, case: Any, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64: only rounding may differ, at any size, and nothing is left of what the result's memory held."""
    monkeypatch.setattr(cpp, "wgrad_algorithm", lambda *args, **facts: ALGORITHMS[algorithm])
    shape, (filters, *kernel), options = case
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(filters, shape[1], *kernel, dtype=torch.float64)
    if layout == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    elif layout == "gaps":
        wide = torch.full((shape[0], shape[2] + 1, shape[3] + 2, shape[4], shape[1] + 3), float("nan"), dtype=x.dtype)
        view = wide.permute(0, 4, 1, 2, 3)[:, : shape[1], 1:, 1:-1]
        x = view.copy_(x)
    grad = torch.randn(reference.causal_conv3d(x, weight, **options).shape, dtype=torch.float64)
    torch.full_like(weight, float("nan"))  # the allocator gives this memory to the result
    actual = _gradient(ops.causal_conv3d, x, weight, grad, backend="cpp", **options)
    expected = _gradient(reference.causal_conv3d, x, weight, grad, **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.skipif(not cpp.multiplies_pairs(torch.bfloat16), reason="needs a processor with AVX512_BF16")
@pytest.mark.parametrize(
    ("algorithm", "case"),
    [
        pytest.param(a, c, id=f"{a}-{n}")
        for a in ("direct", "few", *["tiles"] * HAS_TILES)
        for n, c in CASES.items()
        if _fits(a, c[1][0], c[1][1:], c[2])
    ],
)
def test_pairs(algorithm: str, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16, odd numbers of pixels among them: as if the exact gradient were rounded."""
    chosen = {"direct": cpp.DIRECT_PAIRS, "few": cpp.FEW_FILTERS_PAIRS, "tiles": cpp.DIRECT_TILES}[algorithm]
    monkeypatch.setattr(cpp, "wgrad_algorithm", lambda *args, **facts: chosen)
    shape, (filters, *kernel), options = case
    x = torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(filters, shape[1], *kernel).bfloat16()
    grad = torch.randn(reference.causal_conv3d(x, weight, **options).shape).bfloat16()
    actual = _gradient(ops.causal_conv3d, x, weight, grad, backend="cpp", **options)
    truth = _gradient(reference.causal_conv3d, x.double(), weight.double(), grad.double(), **options)
    assert_within_promise(actual, truth.bfloat16(), truth)


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
@pytest.mark.parametrize("time_padding", ["zeros", "replicate"])
def test_history(time_padding: str, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of a clip in chunks add up to that of the whole clip."""
    monkeypatch.setattr(cpp, "wgrad_algorithm", lambda *args, **facts: ALGORITHMS[algorithm])
    x, weight = torch.randn(2, 18, 7, 5, 6, dtype=torch.float64), torch.randn(20, 18, 3, 3, 3, dtype=torch.float64)
    grad = torch.randn(2, 20, 7, 5, 6, dtype=torch.float64)
    whole = _gradient(reference.causal_conv3d, x, weight, grad, time_padding=time_padding)
    history, total = None, torch.zeros_like(weight)
    for part, cotangent in zip(x.split((1, 1, 2, 3), 2), grad.split((1, 1, 2, 3), 2), strict=True):
        options: dict[str, Any] = {"time_padding": time_padding, "history": history}
        total += _gradient(ops.causal_conv3d, part, weight, cotangent, backend="cpp", **options)
        _, history = ops.causal_conv3d(part, weight, return_history=True, **options)
    torch.testing.assert_close(total, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
@pytest.mark.parametrize("scale", [(1, 2, 2), (2, 2, 2)], ids=str)
def test_doubled_image(scale: tuple[int, int, int], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 21, 3, 4, 7, dtype=torch.float64), torch.randn(33, 21, 3, 3, 3, dtype=torch.float64)
    options = {"scale": scale, "spatial_padding_mode": mode, "time_padding": mode}
    seen = []
    doubled = cpp.wgrad_doubled
    monkeypatch.setattr(cpp, "wgrad_doubled", lambda *args: seen.append(args) or doubled(*args))
    grad = torch.randn(reference_upsample.upsample_conv3d(x, weight, **options).shape, dtype=torch.float64)
    actual = _gradient(ops.upsample_conv3d, x, weight, grad, backend="cpp", **options)
    expected = _gradient(reference_upsample.upsample_conv3d, x, weight, grad, **options)
    assert seen
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("shape", [(64, 48, 1, 3, 3), (48, 64, 3, 1, 1), (3, 64, 1, 3, 3), (64, 3, 1, 3, 3)], ids=str)
def test_error_against_the_more_exact_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Sums over 12288 pixels, with a mean that makes them large: the promise holds against the better of PyTorch's
    contiguous and channels-last gradients, Winograd's transforms included."""
    channels, filters, *kernel = shape
    x, weight = (
        F.silu(torch.randn(1, channels, 3, 64, 64)).to(dtype),
        torch.zeros(filters, channels, *kernel, dtype=dtype),
    )
    grad = (torch.randn(1, filters, 3, 64, 64) + 0.1).to(dtype)
    truth = _gradient(reference.causal_conv3d, x.double(), weight.double(), grad.double())
    x, grad = (t.to(memory_format=torch.channels_last_3d) for t in (x, grad))
    actual = _gradient(ops.causal_conv3d, x, weight, grad, backend="cpp")
    # float16 has no such routine on CPUs that sums in float32, and oneDNN's bfloat16 gradient for 3 filters is what lay in
    # memory where it multiplies by AMX: the exact result in that dtype takes their place.
    layouts = () if dtype == torch.float16 else (x, x.contiguous())
    candidates = [_gradient(reference.causal_conv3d, i, weight, grad) for i in layouts]
    candidates = [c for c in candidates if c.isfinite().all()] or [truth.to(dtype)]
    best = min(candidates, key=lambda c: (c.double() - truth).abs().max().item())
    assert_within_promise(actual, best, truth)


@pytest.mark.parametrize("shape", [(32, 32, 3, 3, 3), (48, 40, 3, 1, 1), (32, 3, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Laid out for our kernels: torch's own, which serve some contiguous tensors, need not."""
    channels, filters, *kernel = shape
    weight = torch.randn(filters, channels, *kernel).to(dtype)
    x, grad = (
        torch.randn(1, c, 5, 40, 40).to(dtype).contiguous(memory_format=torch.channels_last_3d)
        for c in (channels, filters)
    )
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(_gradient(ops.causal_conv3d, x, weight, grad, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and "alias" not in str(func):
            self.elements += result.numel()
        return result


def test_allocates_the_gradient_alone() -> None:
    """Channels-last activations are read where they are: no padded, shifted or converted copy."""
    x, grad = (torch.randn(1, 24, 4, 12, 12).to(memory_format=torch.channels_last_3d) for _ in range(2))
    with _Calls() as calls:
        cpp.causal_conv3d_wgrad(grad, x, None, [3, 3, 3], [1] * 3, [1] * 3, [2, 0, 1, 1, 1, 1], 0, 0)
    assert calls.elements == 24 * 24 * 27, calls.names


def test_choice() -> None:
    """Where each algorithm serves, and where torch's own routine stays."""

    def choice(channels: int, filters: int, kernel: tuple[int, ...], **other: Any) -> int | None:
        facts = {"stride": (1, 1, 1), "dilation": (1, 1, 1), "space_mode": 0, "native": False, "contiguous": False}
        return cpp.wgrad_algorithm(channels, filters, kernel, **{**facts, **other})

    assert choice(128, 128, (3, 3, 3)) == choice(512, 512, (1, 3, 3)) == cpp.WINOGRAD
    assert choice(128, 128, (3, 3, 3), native=True) == choice(128, 128, (1, 3, 3), contiguous=True) == cpp.WINOGRAD
    assert choice(128, 128, (1, 3, 3), stride=(1, 2, 2)) == choice(128, 128, (3, 1, 1)) == cpp.DIRECT
    assert choice(3, 128, (3, 3, 3)) == choice(128, 3, (3, 3, 3), space_mode=1) == cpp.DIRECT
    assert choice(128, 3, (3, 3, 3)) == choice(128, 3, (3, 3, 3), native=True) == cpp.FEW_FILTERS
    assert choice(128, 128, (3, 1, 1), native=True) is choice(128, 128, (3, 1, 1), contiguous=True) is None
    assert choice(128, 128, (3, 1, 1), native=True, pairs=True) == cpp.DIRECT_PAIRS
    assert choice(128, 3, (3, 3, 3), native=True, pairs=True) == cpp.FEW_FILTERS_PAIRS
    assert choice(128, 3, (3, 3, 3), space_mode=1, native=True, pairs=True) == cpp.DIRECT_PAIRS
    assert choice(128, 128, (3, 1, 1), contiguous=True, pairs=True) is None
    assert choice(128, 3, (3, 1, 1), contiguous=True, native=True, pairs=True, tiles=True) == cpp.DIRECT_TILES


@pytest.mark.parametrize("shape", [(64, 3, 1, 3, 3), (64, 32, 3, 3, 3)], ids=str)
def test_torch_in_bfloat16(shape: tuple[int, ...]) -> None:
    """With AMX oneDNN's gradient of 3 filters is what lay in memory, and that of 256 channels does not end: not asked for."""
    channels, filters, *kernel = shape
    x, grad = (
        torch.randn(1, c, 3, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last_3d)
        for c in (channels, filters)
    )
    weight = torch.randn(filters, channels, *kernel).bfloat16()
    actual = _gradient(ops.causal_conv3d, x, weight, grad, backend="torch")
    truth = _gradient(reference.causal_conv3d, x.double(), weight.double(), grad.double())
    assert_within_promise(actual, truth.bfloat16(), truth)


def test_opcheck_of_the_kernel() -> None:
    x, grad = (torch.randn(1, 4, 3, 6, 6).to(memory_format=torch.channels_last_3d) for _ in range(2))
    args = torch.empty(4, 4, 3, 3, 3), grad, x, None, [1] * 3, [1] * 3, [2, 1, 1], 0, 0, cpp.WINOGRAD
    opcheck(torch.ops.vidkernels.causal_conv3d_wgrad_out.default, args)


_VARIANT = """
import torch
from vidkernels import ops
from vidkernels._conv import aten
torch.manual_seed(0)
cl = torch.channels_last_3d
for channels, filters, *kernel in ((37, 21, 3, 3, 3), (37, 21, 3, 1, 1), (37, 3, 1, 3, 3), (3, 40, 1, 3, 3)):
    pads = [kernel[0] - 1, 0, *(kernel[1] // 2,) * 4]
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-4), (torch.bfloat16, 0.3), (torch.float16, 0.05)):
        x, grad = torch.randn(1, channels, 3, 12, 13).to(dtype), torch.randn(1, filters, 3, 12, 13).to(dtype)
        weight = torch.zeros(filters, channels, *kernel, dtype=dtype, requires_grad=True)
        x = x.to(memory_format=cl)
        (actual,) = torch.autograd.grad(ops.causal_conv3d(x, weight, backend="cpp"), weight, grad)
        geometry = [1] * 3, [1] * 3, pads, 0, 0
        expected = aten.causal_conv3d_wgrad(grad.double(), x.double(), None, kernel, *geometry)
        assert (actual.double() - expected).abs().max() < tolerance, (filters, kernel, dtype)
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_other_instruction_sets(capability: str) -> None:
    run_python(_VARIANT, env={"ATEN_CPU_CAPABILITY": capability})
