# SPDX-License-Identifier: Apache-2.0
"""Summed taps of the C++ backend: one kernel makes the weights of phases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_within_promise, run_python
from torch.library import opcheck

import vidkernels
from vidkernels import ops
from vidkernels._conv import weights
from vidkernels._conv.phases import call_of
from vidkernels._reference import causal_conv3d as reference

_REASON = vidkernels.explain("causal_conv3d", torch.zeros(1, 2, 2, 3, 3), torch.zeros(2, 2, 3, 3, 3)).choices[0].reason
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [(40, 17, 3, 3, 3), (33, 9, 3, 3, 3), (5, 1, 1, 3, 3), (1, 20, 3, 1, 1), (48, 24, 2, 5, 4), (17, 8, 1, 1, 1)]


def _phases(kernel: tuple[int, ...], scale: tuple[int, int, int], linear: bool) -> list[tuple[Any, ...]]:
    """Taps of all phases of an upsampling convolution."""
    padding = [kernel[0] - 1, 0, *((k - 1) // 2 for k in kernel[1:] for _ in range(2))]
    call = call_of((4, 5, 6), 0, kernel, scale, linear, 0, 0, 0, 0, True, padding, 0, 0)
    return list(dict.fromkeys(phase.taps for phase in call.plan.phases if phase.taps[0]))


def _layouts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers in other places."""
    gaps = weight.new_empty([n + 1 for n in weight.shape])[tuple(slice(n) for n in weight.shape)]
    return {
        "contiguous": weight,
        "channels-last": weight.contiguous(memory_format=torch.channels_last_3d),
        "transposed": weight.transpose(0, 1).contiguous().transpose(0, 1),
        "filters-inside": weight.permute(2, 3, 4, 1, 0).contiguous().permute(4, 3, 0, 1, 2),
        "gaps": gaps.copy_(weight),
        "expanded": weight[:1].expand(weight.shape),
    }


def _assert_summed(made: torch.Tensor, weight: torch.Tensor, taps: Any, mix_factor: Any, padding: Any) -> None:
    """Against the torch functions that it replaces, in the same dtype and in float64."""
    double = None if mix_factor is None else mix_factor.double()
    truth = weights.collapse(weights.summands(weight.double(), None, double, padding)[0], taps)
    expected = weights.collapse(weights.summands(weight, None, mix_factor, padding)[0], taps).to(made.dtype)
    assert_within_promise(made, expected, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scale, linear", [((1, 2, 2), False), ((2, 2, 2), False), ((2, 1, 1), True)], ids=str)
def test_summed_taps(size: tuple[int, ...], scale: Any, linear: bool, dtype: torch.dtype) -> None:
    """Whatever strides a weight has, each phase's taps are summed in float32 and rounded once."""
    for name, weight in _layouts(torch.randn(size).to(dtype)).items():
        phases = _phases(size[2:], scale, linear)
        for taps in phases if name == "contiguous" else phases[-1:]:
            for target in (dtype, weights.wide_dtype(dtype)):
                made = weights.collapse_cpp(weight, taps, None, [], target)
                assert made.dtype == target
                _assert_summed(made, weight, taps, None, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [None, (2, 0, 1, 1, 1, 1), (0, 2, 1, 1, 2, 0)], ids=str)
def test_blended_taps(padding: Any, dtype: torch.dtype) -> None:
    """A blend's share comes before the sums, its smooth part falls on one tap of the diagonal."""
    mix_factor = torch.tensor([0.7]).to(dtype)
    for weight in _layouts(torch.randn(40, 40, 3, 3, 3).to(dtype)).values():
        for taps in [*_phases((3, 3, 3), (2, 2, 2), False)[:2], (None, None, None)]:
            made = weights.collapse_cpp(weight, taps, mix_factor, weights.smooth_tap(padding), dtype)
            _assert_summed(made, weight, taps, mix_factor, padding)


def test_nothing_to_sum() -> None:
    """One tap for one: the weight itself, no copy. No filters, channels or positions: empty."""
    weight = torch.randn(8, 8, 1, 3, 3)
    one = ((1.0,),)
    assert weights.collapse_cpp(weight, (one, None, None), None, [], weight.dtype) is weight
    assert weights.collapse_cpp(weight.bfloat16(), (one, None, None), None, [], torch.float32).dtype == torch.float32
    for size in ((0, 8, 1, 3, 3), (8, 0, 1, 3, 3), (8, 8, 1, 0, 3)):
        assert weights.collapse_cpp(torch.zeros(size), (one, None, None), None, [], torch.float64).numel() == 0
    assert weights.collapse_cpp(weight, ((), None, None), None, [], weight.dtype).shape == (8, 8, 0, 3, 3)


def test_infinities_and_nans() -> None:
    """They reach the sums that their tap is part of, and no other."""
    weight = torch.randn(20, 20, 3, 3, 3)
    weight[3, 5, 0, 1, 2], weight[4, 6, 2, 0, 0], weight[19, 19, 1, 1, 1] = float("inf"), float("nan"), -float("inf")
    for taps in _phases((3, 3, 3), (2, 2, 2), False):
        _assert_summed(weights.collapse_cpp(weight, taps, None, [], weight.dtype), weight, taps, None, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 1, 1), (1, 2, 2), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("channels, filters", [(32, 48), (24, 33), (40, 3), (7, 20)], ids=str)
def test_convolution_by_filters_inside(channels: int, filters: int, kernel: Any, dtype: torch.dtype) -> None:
    """Convolutions arrange such weights by whole vectors; data gradients read all weights so."""
    x = torch.randn(1, channels, 3, 6, 7).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    weight = (torch.randn(filters, channels, *kernel) * (channels * kernel[1] * kernel[2]) ** -0.5).to(dtype)
    inside = _layouts(weight)["filters-inside"]
    y = ops.causal_conv3d(x, inside, backend="cpp")
    assert torch.equal(y, ops.causal_conv3d(x, weight, backend="cpp"))
    truth = reference.causal_conv3d(x.double(), weight.double())
    if dtype == torch.float64:
        torch.testing.assert_close(y, truth, rtol=0, atol=1e-12)
    else:
        assert_within_promise(y, reference.causal_conv3d(x, weight), truth)


def test_arguments_are_checked() -> None:
    """The bare op reads and writes by addresses: whatever does not fit is an error first."""
    sum_taps, weight = torch.ops.vidkernels.sum_taps_out.default, torch.randn(4, 5, 3, 3, 3)
    rows = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    inside = torch.empty(2, 3, 3, 5, 4).permute(4, 3, 0, 1, 2)
    opcheck(sum_taps, (inside, weight, None, rows, [], [], []))
    for out, given, smooth_at, message in (
        (torch.empty(3, 3, 3, 5, 4).permute(4, 3, 0, 1, 2), rows, [], "rows"),
        (inside, [], [], "rows"),
        (torch.empty(4, 5, 2, 3, 3), rows, [], "side by side"),
        (torch.empty(5, 4, 2, 3, 3), rows, [], "filters and channels"),
        (inside.bfloat16(), rows, [], "dtype"),
        (inside, rows, [0, 3, 0], "smooth_at"),
        (inside, rows, [0], "smooth_at"),
    ):
        with pytest.raises(RuntimeError, match=message):
            sum_taps(out, weight, torch.zeros(1), given, [], [], smooth_at)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_other_instruction_sets(capability: str) -> None:
    code = """
import sys
sys.path.insert(0, "tests")
import torch
import test_upsample_conv3d_taps as taps
for dtype in taps.DTYPES:
    taps.test_summed_taps((33, 9, 3, 3, 3), (2, 2, 2), False, dtype)
    taps.test_blended_taps((2, 0, 1, 1, 1, 1), dtype)
    taps.test_convolution_by_filters_inside(24, 33, (3, 3, 3), dtype)
"""
    run_python(code, env={"ATEN_CPU_CAPABILITY": capability})
