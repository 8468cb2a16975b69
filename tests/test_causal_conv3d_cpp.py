# SPDX-License-Identifier: Apache-2.0
"""What only the C++ backend has: two algorithms, three instruction sets, strided outputs, rounding kept small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import HAS_TILES, assert_within_promise, run_python

import vidkernels
from vidkernels import ops
from vidkernels._conv import cpp
from vidkernels._reference import causal_conv3d as reference
from vidkernels._reference import upsample_conv3d as reference_upsample
from vidkernels.ops import _causal_conv3d_backends as backends

_REASON = vidkernels.explain("causal_conv3d", torch.zeros(1, 2, 2, 3, 3), torch.zeros(2, 2, 3, 3, 3)).choices[0].reason
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "odd": ((2, 5, 3, 7, 9), (3, 3, 3, 3), {}),
    "vectors-and-rest": ((1, 33, 2, 6, 6), (35, 2, 3, 3), {"time_padding": "replicate"}),
    "replicate": ((1, 18, 4, 5, 8), (16, 3, 3, 3), {"time_padding": "replicate", "spatial_padding_mode": "replicate"}),
    "stride-dilation-in-time": ((1, 8, 7, 6, 6), (8, 3, 3, 3), {"stride": (2, 1, 1), "dilation": (2, 1, 1)}),
    "valid": ((1, 8, 3, 9, 8), (8, 1, 3, 3), {"spatial_padding": 0}),
    "wide": ((1, 8, 2, 3, 3), (8, 1, 3, 3), {"spatial_padding": (4, 0, 2, 5)}),
    "one-pixel": ((1, 8, 1, 1, 1), (8, 3, 3, 3), {"activation": "silu"}),
    # Taps that meet zeros alone: their weights are not arranged.
    "first-frame": ((1, 256, 1, 4, 4), (8, 3, 3, 3), {}),
    "one-frame-of-three": ((2, 256, 1, 4, 5), (8, 3, 3, 3), {"pad_frames": (1, 1)}),
    "frames-apart": ((1, 256, 2, 4, 4), (8, 3, 3, 3), {"dilation": (2, 1, 1)}),
    "frames-of-zeros": ((1, 256, 1, 4, 4), (8, 2, 3, 3), {"pad_frames": (4, 0)}),
}


def _force(monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    limit = 0 if algorithm == "winograd" else 1 << 30
    for name in ("_WINOGRAD_CHANNELS", "_WINOGRAD_FILTERS", "_WINOGRAD_PIXELS"):
        monkeypatch.setattr(cpp, name, limit)


@pytest.mark.parametrize("algorithm", range(7))
def test_bare_ops_without_elements(algorithm: int) -> None:
    """Frames of no rows have no result, and weights no gradient: a quotient by a number of pixels ended the process."""
    x, y = (torch.empty(1, channels, 3, 0, 4, memory_format=torch.channels_last_3d) for channels in (2, 5))
    weight, dweight = torch.ones(5, 2, 1, 1, 1), torch.full((5, 2, 1, 1, 1), 7.0)
    ones, none = [1, 1, 1], [0, 0, 0]
    torch.ops.vidkernels.causal_conv3d_out(y, x, weight, None, None, None, ones, ones, none, 0, 0, 0, algorithm)
    torch.ops.vidkernels.causal_conv3d_wgrad_out(dweight, y, x, None, ones, ones, none, 0, 0, algorithm)
    assert (dweight == 0).all()


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_both_algorithms(case: Any, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64: only rounding may differ, at any size, also where the heuristic would choose otherwise."""
    _force(monkeypatch, algorithm)
    shape, kernel, options = case
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(kernel[0], shape[1], *kernel[1:], dtype=torch.float64)
    bias = torch.randn(kernel[0], dtype=torch.float64)
    y = ops.causal_conv3d(x, weight, bias, backend="cpp", **options)
    torch.testing.assert_close(y, reference.causal_conv3d(x, weight, bias, **options), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [(1, 2, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_doubled_image(scale: tuple[int, int, int], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _force(monkeypatch, "winograd")
    x, weight = torch.randn(2, 5, 3, 4, 7, dtype=torch.float64), torch.randn(6, 5, 3, 3, 3, dtype=torch.float64)
    options = {"scale": scale, "spatial_padding_mode": mode, "time_padding": mode}
    assert cpp.reads_doubled(x, weight, scale, (2, 0, 1, 1, 1, 1), 0)
    y = ops.upsample_conv3d(x, weight, backend="cpp", **options)
    torch.testing.assert_close(y, reference_upsample.upsample_conv3d(x, weight, **options), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3), (3, 1, 1)], ids=str)
def test_error_against_the_more_exact_reference(kernel: tuple[int, ...], dtype: torch.dtype) -> None:
    """The contiguous convolution of PyTorch sums in blocks and is several times more exact than its channels-last one:
    the promise holds against the better of the two, Winograd's transforms included."""
    x, weight, bias = torch.randn(1, 128, 3, 16, 16), torch.randn(64, 128, *kernel), torch.randn(64)
    x, weight, bias = F.silu(x).to(dtype), (weight * (128 * weight[0, 0].numel()) ** -0.5).to(dtype), bias.to(dtype)
    expected = reference.causal_conv3d(x, weight, bias)
    truth = reference.causal_conv3d(x.double(), weight.double(), bias.double())
    y = ops.causal_conv3d(x.to(memory_format=torch.channels_last_3d), weight, bias, backend="cpp")
    assert_within_promise(y, expected, truth)


FEW_CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "rgb": ((2, 37, 3, 19, 11), (3, 3, 3, 3), {"activation": "silu"}),
    "one": ((1, 16, 2, 5, 6), (1, 1, 3, 3), {"spatial_padding_mode": "replicate"}),
    "two": ((1, 130, 4, 9, 8), (2, 3, 3, 3), {"time_padding": "replicate", "spatial_padding_mode": "replicate"}),
    "four": ((1, 16, 3, 33, 5), (4, 2, 5, 4), {"stride": (2, 1, 1)}),
    "dilated": ((1, 20, 3, 12, 9), (3, 1, 3, 3), {"dilation": (1, 2, 3)}),
    "wide": ((1, 16, 2, 3, 3), (3, 1, 3, 3), {"spatial_padding": (4, 0, 2, 5)}),
    "wide-replicate": ((1, 16, 2, 3, 3), (3, 1, 3, 3), {"spatial_padding": 5, "spatial_padding_mode": "replicate"}),
    "valid": ((1, 16, 3, 9, 8), (3, 3, 3, 3), {"spatial_padding": 0, "time_padding": "none"}),
    "long-rows": ((1, 16, 1, 20, 700), (3, 3, 3, 3), {}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FEW_CASES.values(), ids=FEW_CASES.keys())
def test_few_filters(case: Any, dtype: torch.dtype) -> None:
    """At most 4 filters: taps become filters of a pointwise convolution, and neighbours add up what is theirs."""
    shape, (filters, *kernel), options = case
    stride = options.get("stride", (1, 1, 1))
    assert cpp.algorithm(shape[1], filters, kernel, stride, (1, 1, 1), 1000) == cpp.FEW_FILTERS
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(filters, shape[1], *kernel).mul((shape[1] * kernel[1] * kernel[2]) ** -0.5).to(dtype)
    bias = torch.randn(filters).to(dtype)
    expected = reference.causal_conv3d(x, weight, bias, **options)
    residual = torch.randn(expected.shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    truth = reference.causal_conv3d(x.double(), weight.double(), bias.double(), **options) + residual.double()
    y = ops.causal_conv3d(x, weight, bias, residual=residual, backend="cpp", **options)
    if dtype == torch.float64:
        torch.testing.assert_close(y, truth, rtol=0, atol=1e-12)
    else:
        assert_within_promise(y, expected + residual, truth)


PAIR_CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "two-taps-a-panel": ((1, 128, 4, 9, 10), (64, 3, 3, 3), {}),
    "blocks": ((1, 600, 2, 3, 5), (40, 3, 1, 1), {"time_padding": "replicate"}),
    "odd": ((2, 37, 3, 9, 10), (21, 3, 3, 3), {"activation": "silu"}),
    "odd-pointwise": ((1, 257, 2, 9, 10), (100, 1, 1, 1), {}),
    "in-place": ((1, 256, 2, 13, 12), (48, 1, 1, 1), {}),
    "frames-together": ((2, 66, 7, 4, 4), (150, 3, 3, 3), {"time_padding": "replicate"}),
    "rgb-in": ((1, 3, 3, 9, 10), (40, 3, 3, 3), {"spatial_padding_mode": "replicate"}),
    "one-channel": ((1, 1, 3, 5, 5), (16, 3, 3, 3), {}),
    "down": ((1, 64, 5, 9, 10), (64, 3, 3, 3), {"stride": 2, "pad_frames": 2, "time_padding": "replicate"}),
    "dilated": ((1, 34, 3, 12, 9), (33, 2, 3, 3), {"dilation": (1, 2, 3), "spatial_padding_mode": "replicate"}),
    "even-kernel": ((1, 66, 3, 5, 5), (70, 2, 4, 2), {}),
    "in-place-zeros": ((1, 130, 3, 8, 8), (48, 3, 3, 3), {}),
}
_REPEATED: dict[str, Any] = {"time_padding": "replicate", "spatial_padding_mode": "replicate"}
# Float64, float32 and pairs read these channels where they are, float32 that is stored in bfloat16 gathers them.
IN_PLACE: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "zeros": ((2, 130, 3, 5, 6), (33, 3, 3, 3), {}),
    "repeated": ((1, 130, 3, 5, 6), (33, 3, 3, 3), _REPEATED),
    "wide": ((1, 130, 2, 3, 3), (8, 1, 3, 3), {"spatial_padding": (4, 0, 2, 5)}),
    "wide-repeated": ((1, 130, 2, 3, 3), (8, 1, 3, 3), {"spatial_padding": (4, 0, 2, 5), **_REPEATED}),
    "beyond": ((1, 130, 1, 4, 2), (8, 1, 3, 3), {"spatial_padding": 5, "dilation": (1, 2, 5), **_REPEATED}),
    "strided": ((1, 130, 5, 9, 10), (32, 3, 3, 3), {"stride": (1, 2, 3), **_REPEATED}),
    "dilated": ((1, 130, 3, 12, 9), (32, 2, 3, 3), {"dilation": (1, 2, 3)}),
    "frames-together": ((2, 130, 7, 4, 4), (40, 3, 3, 3), _REPEATED),
    "column": ((1, 130, 3, 40, 1), (40, 3, 3, 3), _REPEATED),
    "many-pixels": ((1, 130, 2, 17, 18), (33, 2, 3, 3), {}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gaps", [0, 3], ids=["dense", "gaps"])
@pytest.mark.parametrize("case", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_rows_in_place(case: Any, gaps: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels that are zeros are left out and no others, repeated ones are read at the border, with gaps between pixels too;
    frames of history have strides of their own."""
    _force(monkeypatch, "direct")
    (batch, channels, frames, height, width), (filters, *kernel), options = case
    wide = torch.randn(batch, channels + gaps + 1, frames + 1, height, width).to(dtype)
    clip = wide.contiguous(memory_format=torch.channels_last_3d)[:, 1 : channels + 1]
    x, history = clip[:, :, 1:], clip[:, :, :1].contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(filters, channels, *kernel).mul(0.05).to(dtype)
    for past in (None, history):
        truth = reference.causal_conv3d(
            x.double(), weight.double(), history=None if past is None else past.double(), **options
        )
        y = ops.causal_conv3d(x, weight, history=past, backend="cpp", **options)
        if dtype == torch.float64:
            torch.testing.assert_close(y, truth, rtol=0, atol=1e-12)
        else:
            assert_within_promise(y, reference.causal_conv3d(x, weight, history=past, **options), truth)


_needs_pairs = pytest.mark.skipif(
    not cpp.multiplies_pairs(torch.bfloat16), reason="needs a processor with AVX512_BF16, and oneDNN allowed to use it"
)


# Sizes at which tiles do something else: strips of a wide or of a high frame, of several frames, sums that leave the
# registers, taps before channels, one tile of filters, planes of a stride's residues, pixels that hold all taps.
TILE_CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "wide-row": ((1, 32, 2, 3, 300), (33, 3, 3, 3), {}),
    "high": ((1, 96, 2, 70, 9), (32, 1, 3, 3), {"spatial_padding_mode": "replicate"}),
    "many-products": ((1, 224, 4, 5, 20), (40, 3, 3, 3), {"time_padding": "replicate"}),
    "many-channels": ((1, 520, 3, 4, 17), (17, 2, 3, 3), {"activation": "silu"}),
    "residues": ((2, 40, 5, 13, 11), (32, 3, 3, 3), {"stride": (2, 3, 2), "dilation": (1, 1, 1)}),
    "residues-dilated": ((1, 64, 3, 12, 11), (16, 2, 3, 3), {"stride": (1, 2, 3), "dilation": (2, 3, 2)}),
    "few-channels": ((1, 6, 4, 9, 70), (50, 3, 5, 3), {"spatial_padding_mode": "replicate"}),
    "few-channels-dilated": ((1, 4, 4, 9, 10), (8, 3, 3, 3), {"dilation": (1, 2, 2)}),
    "two-filters": ((1, 64, 3, 9, 10), (2, 3, 3, 3), {}),
    "temporal": ((2, 96, 9, 4, 5), (64, 3, 1, 1), {"stride": (2, 1, 1), "pad_frames": 2}),
}
_UNITS = [
    "pairs",
    pytest.param("tiles", marks=pytest.mark.skipif(not HAS_TILES, reason="needs a processor with AMX")),
]


def _force_units(monkeypatch: pytest.MonkeyPatch, units: str) -> None:
    monkeypatch.setattr(cpp, "multiplies_tiles", lambda dtype: units == "tiles" and dtype == torch.bfloat16)


@_needs_pairs
@pytest.mark.parametrize("units", _UNITS)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "transposed"])
@pytest.mark.parametrize("case", [*PAIR_CASES.values(), *TILE_CASES.values()], ids=[*PAIR_CASES, *TILE_CASES])
def test_pairs_and_tiles(case: Any, layout: str, units: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16: every way of arranging the weights, parts of vectors, odd depths; nothing is left of scratch."""
    _force_units(monkeypatch, units)
    shape, (filters, *kernel), options = case
    x = F.silu(torch.randn(shape)).bfloat16().contiguous(memory_format=torch.channels_last_3d)
    weight = (
        torch.randn(filters, shape[1], *kernel) * (shape[1] * kernel[0] * kernel[1] * kernel[2]) ** -0.5
    ).bfloat16()
    if layout == "channels-last":
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    elif layout == "transposed":
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    bias = torch.randn(filters).bfloat16()
    truth = reference.causal_conv3d(x.double(), weight.double(), bias.double(), **options)
    used = torch.full((1 << 20,), float("nan"))  # the allocator gives this memory to the scratch
    del used
    y = ops.causal_conv3d(x, weight, bias, backend="cpp", **options)
    assert_within_promise(y, reference.causal_conv3d(x, weight, bias, **options), truth)


@_needs_pairs
@pytest.mark.parametrize("units", _UNITS)
def test_not_a_number_stays_where_it_is_read(units: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of the border, which tiles drop, and empty channels of a product's depth touch no other result."""
    _force_units(monkeypatch, units)
    x, weight = torch.randn(1, 40, 3, 7, 9).bfloat16(), torch.randn(20, 40, 2, 3, 3).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last_3d)
    y = ops.causal_conv3d(x, weight, backend="cpp")
    x[0, 39, 1, 6, 8] = float("nan")
    spoilt = ops.causal_conv3d(x, weight, backend="cpp").isnan()
    expected = torch.zeros_like(spoilt)
    expected[:, :, 1:3, 5:, 7:] = True
    assert torch.equal(spoilt, expected) and not y.isnan().any()


@_needs_pairs
def test_pairs_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cpp, backends):
        monkeypatch.setattr(module, "multiplies_tiles", lambda dtype: False)
    facts = (1, 1, 1), (1, 1, 1), 1024
    assert cpp.algorithm(128, 128, (3, 3, 3), *facts, pairs=True) == cpp.DIRECT_PAIRS
    assert cpp.algorithm(128, 3, (3, 3, 3), *facts, pairs=True) == cpp.FEW_FILTERS_PAIRS
    assert not cpp.multiplies_pairs(torch.float32) and not cpp.multiplies_pairs(torch.float16)

    def chosen(channels: int, kernel: tuple[int, ...], side: int, **options: Any) -> str:
        x = torch.empty(1, channels, 5, side, side, dtype=torch.bfloat16)
        weight = torch.empty(128, channels, *kernel, dtype=torch.bfloat16)
        return vidkernels.explain("causal_conv3d", x, weight, **options).chosen

    assert chosen(128, (1, 3, 3), 16) == chosen(128, (3, 3, 3), 32, time_padding="replicate") == "torch"
    assert chosen(64, (3, 3, 3), 32) == "torch" and chosen(128, (3, 3, 3), 32) == "cpp"
    assert chosen(512, (3, 3, 3), 8) == chosen(3, (3, 3, 3), 128) == chosen(128, (3, 1, 1), 32) == "cpp"
    assert chosen(128, (3, 3, 3), 32, spatial_padding_mode="replicate") == "cpp"
    assert chosen(128, (1, 3, 3), 32, stride=(1, 2, 2), spatial_padding=(0, 1, 0, 1)) == "cpp"


@pytest.mark.skipif(not cpp.multiplies_tiles(torch.bfloat16), reason="needs a processor with AMX")
def test_tiles_are_chosen() -> None:
    facts = (1, 1, 1), (1, 1, 1), 1024
    assert cpp.algorithm(128, 3, (3, 3, 3), *facts, pairs=True, tiles=True) == cpp.DIRECT_TILES
    assert not cpp.multiplies_tiles(torch.float32) and not cpp.multiplies_tiles(torch.float16)
    for channels, side in ((128, 32), (64, 8), (3, 64)):
        x = torch.empty(1, channels, 5, side, side, dtype=torch.bfloat16)
        weight = torch.empty(128, channels, 3, 3, 3, dtype=torch.bfloat16)
        assert vidkernels.explain("causal_conv3d", x, weight, time_padding="replicate").chosen == "cpp"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("time_padding", ["zeros", "replicate"])
@pytest.mark.parametrize("kernel", [(3, 3, 3, 3), (32, 3, 1, 1), (32, 3, 3, 3)], ids=str)
def test_chunks_give_the_bits_of_the_clip(kernel: tuple[int, ...], time_padding: str, dtype: torch.dtype) -> None:
    """Every algorithm: few filters, rows in place (history and clip have strides of their own), Winograd."""
    x, weight = torch.randn(2, 130, 7, 9, 10).to(dtype), torch.randn(kernel[0], 130, *kernel[1:]).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    options: dict[str, Any] = {"time_padding": time_padding, "backend": "cpp"}
    history, parts = None, []
    for chunk in x.split((1, 1, 2, 3), dim=2):
        y, history = ops.causal_conv3d(chunk, weight, history=history, return_history=True, **options)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 2), ops.causal_conv3d(x, weight, **options))


@pytest.mark.parametrize("filters", [3, 32])
def test_one_thread_equals_two(filters: int) -> None:
    x, weight = torch.randn(1, 32, 3, 24, 24), torch.randn(filters, 32, 3, 3, 3)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ops.causal_conv3d(x, weight, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


_VARIANT = """
import torch
from vidkernels import ops
from vidkernels._reference import causal_conv3d as reference
torch.manual_seed(0)
for filters, *kernel in ((21, 1, 3, 3), (21, 3, 1, 1), (21, 3, 3, 3), (3, 3, 3, 3), (4, 1, 3, 3)):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        x, weight = torch.randn(1, 37, 3, 12, 13).to(dtype), torch.randn(filters, 37, *kernel).mul(0.1).to(dtype)
        y = ops.causal_conv3d(x, weight, activation="silu", backend="cpp")
        expected = reference.causal_conv3d(x.double(), weight.double(), activation="silu")
        assert (y.double() - expected).abs().max() < tolerance, (filters, kernel, dtype)
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_other_instruction_sets(capability: str) -> None:
    """The variants that older processors run; where the processor lacks AVX2, both are the portable one."""
    run_python(_VARIANT, env={"ATEN_CPU_CAPABILITY": capability})


_WITHOUT_BFLOAT16_UNITS = """
import torch
import vidkernels
from vidkernels import ops
from vidkernels._conv.aten import native_on_cpu
from vidkernels._reference import causal_conv3d as reference
assert not native_on_cpu(torch.bfloat16)
x = torch.randn(1, 16, 3, 33, 33).bfloat16()
weight = torch.randn(16, 16, 3, 3, 3).mul(0.05).bfloat16().requires_grad_()
assert vidkernels.explain("causal_conv3d", x, weight).chosen == "cpp"
expected = reference.causal_conv3d(x.double(), weight.double())
for backend in ("cpp", "torch"):
    y = ops.causal_conv3d(x, weight, backend=backend)
    assert (y.double() - expected).abs().max() <= 2.0**-8 * expected.abs().max(), backend
    y.sum().backward()
"""


@pytest.mark.parametrize("limit", ["AVX512_CORE", "AVX2"])
def test_onednn_without_bfloat16_units(limit: str) -> None:
    """oneDNN told to leave its units alone: the choice follows, and nothing asks it for bfloat16, which it may refuse."""
    run_python(_WITHOUT_BFLOAT16_UNITS, env={"ONEDNN_MAX_CPU_ISA": limit})
