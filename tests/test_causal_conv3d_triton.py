# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of causal_conv3d in the interpreter: values and gradients through boxes and through pointers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers import assert_gradients_within_promise, assert_within_promise
from test_causal_conv3d import Case, call, make
from test_causal_conv3d_memory import GEOMETRIES
from test_causal_conv3d_memory import _Allocations as Allocations

from vidkernels import ops
from vidkernels._reference import causal_conv3d as reference
from vidkernels._reference import upsample_conv3d as upsample_reference

pytest.importorskip("triton")

# (B, C, T, H, W), (K, kt, kh, kw), options; boxes are 4 x 4 or 1 x 16 positions, blocks 16 channels and filters here
BOXES: dict[str, Case] = {
    "zeros": ((1, 24, 2, 4, 5), (24, 3, 3, 3), {}),
    "one-row": ((1, 16, 2, 2, 20), (16, 1, 3, 3), {}),
    "replicate": ((2, 16, 2, 4, 5), (16, 3, 3, 3), {"time_padding": "replicate"}),
    "one-frame": ((1, 16, 1, 5, 5), (16, 3, 3, 3), {"time_padding": "replicate"}),
    "history": ((2, 16, 2, 4, 5), (16, 3, 3, 3), {"time_padding": "history", "P": 2}),
    "short-history": ((1, 16, 2, 4, 5), (16, 3, 3, 3), {"P": 1}),
    "short-history-replicate": ((1, 16, 2, 4, 5), (16, 3, 2, 2), {"P": 1, "time_padding": "replicate"}),
    "long-history": ((1, 16, 2, 4, 6), (16, 3, 1, 1), {"P": 5}),
    "temporal": ((2, 40, 4, 4, 5), (24, 3, 1, 1), {"time_padding": "replicate"}),
    "pointwise": ((2, 48, 2, 4, 7), (16, 1, 1, 1), {}),
    "temporal-down": ((1, 16, 5, 4, 4), (16, 3, 3, 3), {"stride": (2, 1, 1), "time_padding": "replicate"}),
    "temporal-down-history": ((1, 16, 4, 4, 4), (16, 3, 1, 1), {"stride": (2, 1, 1), "P": 2}),
    "non-causal": ((1, 16, 3, 4, 4), (16, 3, 3, 3), {"pad_frames": (1, 1)}),
    "non-causal-replicate": ((1, 16, 3, 4, 4), (16, 3, 1, 3), {"pad_frames": (1, 1), "time_padding": "replicate"}),
    "dilated": ((1, 16, 5, 6, 5), (16, 3, 3, 3), {"dilation": 2, "time_padding": "replicate"}),
    "dilated-history": ((1, 16, 6, 4, 4), (16, 3, 1, 1), {"dilation": (3, 1, 1), "P": 4}),
    "even-kernel": ((1, 16, 3, 5, 4), (16, 2, 4, 2), {}),
    "valid": ((1, 16, 4, 5, 5), (16, 3, 3, 3), {"time_padding": "none", "spatial_padding": 0}),
    "wide-padding": ((1, 16, 2, 3, 3), (16, 2, 2, 2), {"pad_frames": 3, "spatial_padding": 3}),
    "silu-residual": ((1, 16, 2, 4, 5), (24, 3, 1, 3), {"activation": "silu", "residual": True}),
    "residual": ((1, 16, 2, 4, 5), (16, 1, 3, 3), {"residual": True}),
}
# strides and replication in space, and channel counts that bulk copies cannot address
MIXED: dict[str, Case] = {
    "rgb-in": ((1, 3, 2, 4, 5), (24, 3, 3, 3), {}),
    "rgb-in-history": ((1, 3, 2, 4, 5), (16, 3, 3, 3), {"P": 1, "time_padding": "replicate"}),
    "rgb-out": ((1, 16, 2, 4, 5), (3, 3, 3, 3), {"time_padding": "replicate"}),
    "odd-channels": ((1, 33, 2, 3, 5), (17, 1, 3, 3), {}),
    "spatial-down": ((2, 16, 2, 6, 5), (16, 1, 3, 3), {"stride": (1, 2, 2), "spatial_padding": (0, 1, 0, 1)}),
    "down-2x2x2": ((1, 16, 3, 5, 4), (16, 3, 3, 3), {"stride": 2, "pad_frames": 2, "time_padding": "replicate"}),
    "hunyuan": ((1, 8, 2, 3, 2), (8, 3, 3, 3), {"time_padding": "replicate", "spatial_padding_mode": "replicate"}),
    "five-taps": ((1, 8, 2, 3, 3), (8, 2, 5, 3), {"spatial_padding_mode": "replicate"}),
    "stride-3": ((1, 8, 5, 7, 8), (8, 2, 3, 3), {"stride": 3, "spatial_padding": (2, 0, 1, 3)}),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Tiles so small that tiny shapes have several along every axis; counts the tensors read as boxes."""
    from vidkernels.triton import _conv_configs, _correlate, causal_conv3d

    taken = {"boxes": 0}
    original = _correlate.boxes_of

    def boxes(*args: Any) -> Any:
        taken["boxes"] += 1
        return original(*args)

    for module in (_correlate, causal_conv3d):
        monkeypatch.setattr(module, "boxes_of", boxes)
    monkeypatch.setattr(_conv_configs, "_BOX_POSITIONS", 1)
    monkeypatch.setattr(_conv_configs, "_BOXES", ((4, 4, 1.0), (1, 16, 1.0)))
    monkeypatch.setattr(_conv_configs, "_SUMMED_BOXES", ((4, 4, 1.0), (1, 16, 1.0)))
    return taken


def check(case: Case, dtype: torch.dtype) -> None:
    tensors, names, options = make(case, dtype)
    ours = call(ops.causal_conv3d, names, options, backend="triton")
    assert_gradients_within_promise(ours, call(reference.causal_conv3d, names, options), tensors, names=names)


SLOW = set(BOXES) - {
    "zeros",
    "one-row",
    "short-history-replicate",
    "temporal-down-history",
    "wide-padding",
    "silu-residual",
}


def marked(names: Iterable[str], slow: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.interpreter
@pytest.mark.parametrize("name", marked(BOXES, SLOW))
def test_boxes(name: str, small: dict[str, int]) -> None:
    """Output and all gradients in float32 against float64, every tensor through descriptors."""
    check(BOXES[name], torch.float32)
    assert small["boxes"] > 0


@pytest.mark.interpreter
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_that_pass_through_all_frames_together(
    rows: int, small: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five rows of boxes, the last group with fewer rows than the others; several frames and clips."""
    from vidkernels.triton import _conv_configs

    case: Case = ((2, 16, 3, 18, 5), (16, 3, 1, 1), {})
    monkeypatch.setattr(_conv_configs, "_GROUP_BYTES", rows * 4 * 5 * 16 * 4)
    assert _conv_configs.group_rows(5, 4 * 5 * 16 * 4, 3) == rows
    check(case, torch.float32)
    assert small["boxes"] > 0


# tiles, filters: the second sum has 2 filters, or none in its last program; sums of no warps are stored in halves
TILES: dict[str, tuple[dict[str, int], int]] = {
    "second-sum": ({"block_w": 16, "block_n": 16, "block_n2": 16}, 18),
    "second-sum-empty": ({"block_w": 16, "block_n": 32, "block_n2": 16}, 75),
    "second-sum-rows": ({"block_h": 4, "block_w": 4, "block_n": 16, "block_n2": 32}, 66),
    "halves": ({"block_w": 16, "block_n": 32, "num_warps": 0}, 40),
    "halves-second-sum": ({"block_w": 16, "block_n": 32, "block_n2": 16, "num_warps": 0}, 40),
    "transposed": ({"block_h": 4, "block_w": 4, "block_n": 32, "transposed": True}, 40),
    "transposed-all": (
        {"block_h": 2, "block_w": 8, "block_n": 32, "block_n2": 16, "num_warps": 0, "transposed": True},
        40,
    ),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", TILES)
def test_tiles_of_many_filters(name: str, small: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sums over the same boxes, transposed ones, and sums that are stored in halves: SiLU, residual, history, bias."""
    from vidkernels.triton import _conv_configs, _correlate

    tile, filters = TILES[name]
    config = _conv_configs.BoxConfig(**{"block_h": 1, "block_c": 16, "num_warps": 4, "num_stages": 3, **tile})
    monkeypatch.setattr(_correlate, "box_config", lambda *args: config)
    options = {"activation": "silu", "residual": True, "P": 2, "time_padding": "history"}
    check(((1, 24, 2, 4, 5), (filters, 3, 1, 2), options), torch.float32)
    assert small["boxes"] > 0


@pytest.mark.interpreter
def test_second_sum_in_a_view_with_steps(small: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases of an upsampled image: every second row and column, 18 filters."""
    from vidkernels.triton import _conv_configs, _correlate

    config = _conv_configs.BoxConfig(1, 16, 16, 16, 4, 3, block_n2=16)
    monkeypatch.setattr(_correlate, "box_config", lambda *args: config)
    x, weight = (
        torch.randn(1, 16, 1, 3, 4).contiguous(memory_format=torch.channels_last_3d),  # frames are alike: one is enough
        torch.randn(18, 16, 1, 3, 3) / 12,
    )
    ours = lambda x, w: ops.upsample_conv3d(x, w, scale=(1, 2, 2), backend="triton")  # noqa: E731
    theirs = lambda x, w: upsample_reference.upsample_conv3d(x, w, scale=(1, 2, 2))  # noqa: E731
    assert_gradients_within_promise(ours, theirs, [x, weight], names=("x", "weight"))
    assert small["boxes"] > 0


@pytest.mark.parametrize(
    ("filters", "tile"),
    [(3, (16, 0)), (96, (128, 0)), (128, (128, 0)), (160, (128, 32)), (192, (128, 64)), (256, (256, 0))]
    + [(320, (128, 32)), (384, (128, 64)), (512, (256, 0)), (640, (128, 32)), (1024, (256, 0))],
)
def test_filters_of_a_program(filters: int, tile: tuple[int, int]) -> None:
    """Frames and clips are no argument; a tile leaves no program without filters."""
    from vidkernels.triton import _conv_configs

    config = _conv_configs.box_config(torch.bfloat16, 128, filters, (3, 3, 3), 64, 128, "sm_90")
    assert (config.block_n, config.block_n2) == tile and config.filters == sum(tile) and not config.transposed


@pytest.mark.parametrize(
    ("filters", "size", "box", "tile"),
    [
        (512, (32, 32), (8, 16), (128, 128)),
        (192, (240, 416), (1, 128), (128, 64)),
        (192, (48, 80), (8, 16), (128, 64)),
        (192, (90, 64), (2, 64), (128, 64)),
        (192, (1, 64), (1, 64), (128, 64)),
        (64, (4, 32), (4, 32), (64, 0)),
        (32, (32, 32), (8, 16), (32, 0)),
        (160, (32, 32), (8, 16), (128, 64)),
    ],
)
def test_boxes_of_several_rows_are_the_second_operand(
    filters: int, size: tuple[int, int], box: tuple[int, int], tile: tuple[int, int]
) -> None:
    """Where filters fill the rows of the matrix unit, 64 of them."""
    from vidkernels.triton import _conv_configs

    config = _conv_configs.box_config(torch.bfloat16, 128, filters, (3, 3, 3), *size, "sm_90")
    assert (config.block_h, config.block_w) == box and (config.block_n, config.block_n2) == tile
    assert config.transposed == (box[0] > 1 and filters >= 64)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", marked(MIXED, ()))
def test_strides_space_and_odd_channels(name: str, small: dict[str, int]) -> None:
    """Forward through pointers; gradients through whichever fits."""
    check(MIXED[name], torch.float32)


def without_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidkernels.triton import _correlate, causal_conv3d

    for module in (_correlate, causal_conv3d):
        monkeypatch.setattr(module, "use_boxes", lambda *args: False)


QUICK_POINTERS = {"replicate", "temporal-down-history", "wide-padding", "silu-residual"}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", marked(BOXES, set(BOXES) - QUICK_POINTERS))
def test_pointers(name: str, small: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases of boxes without descriptors."""
    without_boxes(monkeypatch)
    check(BOXES[name], torch.float32)
    assert small["boxes"] == 0


@pytest.mark.interpreter
@pytest.mark.parametrize("name", marked(["silu-residual", "rgb-in-history", "history"], ["history"]))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_half_precision(name: str, dtype: torch.dtype, small: dict[str, int]) -> None:
    """Rounding of results and of gradients; bfloat16 products are widened in the interpreter only."""
    check({**BOXES, **MIXED}[name], dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["rgb-in-history", "stride-3", "temporal", "odd-channels"])
def test_full_float32(name: str, small: dict[str, int]) -> None:
    """Without TF32 everything goes through pointers, and the weight gradient is summed in compensated short chains."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check({**BOXES, **MIXED}[name], torch.float32)
    assert small["boxes"] == 0


@pytest.mark.interpreter
@pytest.mark.parametrize(("channels", "filters"), [(32, 16), (8, 128)], ids=["channels", "flat"])
def test_small_terms_beside_a_large_one_are_kept(channels: int, filters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In full float32: 2^24 and 1023 terms of 1/64, no block of which would change it."""
    from vidkernels.triton import causal_conv3d as launchers

    monkeypatch.setattr(launchers, "multiprocessors", lambda device: 1)  # then one program sums all pixels
    x = torch.full((1, channels, 1, 32, 32), 1 / 64).contiguous(memory_format=torch.channels_last_3d)
    x[:, :, 0, 0, 0] = 2.0**24
    grad = torch.ones(1, filters, 1, 32, 32).contiguous(memory_format=torch.channels_last_3d)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        dweight = launchers.causal_conv3d_wgrad(grad, x, None, [1] * 3, [1] * 3, [1] * 3, [0] * 6, 0, 0)
        assert (dweight - 2.0**24 - 16).abs().max() <= 2  # numbers of this size are 2 apart
        x[:, :, 0, 0, 0] = float("inf")
        dweight = launchers.causal_conv3d_wgrad(grad, x, None, [1] * 3, [1] * 3, [1] * 3, [0] * 6, 0, 0)
    assert torch.isposinf(dweight).all()


@pytest.mark.interpreter
def test_offsets_beyond_32_bits(small: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64-bit branch on small tensors."""
    from vidkernels.triton import _correlate, causal_conv3d

    for module in (_correlate, causal_conv3d):
        monkeypatch.setattr(module, "long_offsets", lambda *tensors: True)
    for name in ("rgb-in-history", "spatial-down"):
        check(MIXED[name], torch.float32)


def test_span_decides_about_64_bits() -> None:
    from vidkernels.triton._correlate import long_offsets

    strided = lambda size, stride: torch.empty_strided(size, stride, device="meta")  # noqa: E731
    assert not long_offsets(strided((2, 2, 2, 2, 2), (1 << 29, 1, 1 << 28, 1 << 27, 1 << 26)), None)
    assert long_offsets(strided((2, 2, 2, 2, 2), (1 << 30, 1, 1 << 29, 1 << 28, 1 << 28)), None)
    assert not long_offsets(strided((1, 1, 1, 1, 1), (1 << 31, 1, 1, 1, 1)))


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["contiguous", "window", "expanded"])
def test_layouts(layout: str, small: dict[str, int]) -> None:
    """Any strides are read correctly; a contiguous input gives a contiguous result."""
    x = torch.randn(2, 16, 3, 5, 7)
    x = x if layout == "contiguous" else x.contiguous(memory_format=torch.channels_last_3d)
    x = {"contiguous": x, "window": x[:, :, 1:, 1:, :-2], "expanded": x[:1].expand(3, -1, -1, -1, -1)}[layout]
    weight, residual = torch.randn(16, 16, 2, 3, 3) / 17, torch.randn(x.shape)
    options = {"residual": residual, "backend": "triton"}
    y = ops.causal_conv3d(x, weight, **options)
    truth = reference.causal_conv3d(x.double(), weight.double(), residual=residual.double())
    assert_within_promise(y, reference.causal_conv3d(x, weight, residual=residual), truth)
    assert y.is_contiguous() == (layout == "contiguous")


def streamed(x: torch.Tensor, sizes: list[int], weight: torch.Tensor, **options: Any) -> torch.Tensor:
    parts, history = [], None
    for chunk in x.split(sizes, 2):
        y, history = ops.causal_conv3d(chunk, weight, history=history, return_history=True, backend="triton", **options)
        parts.append(y)
    return torch.cat(parts, 2)


@pytest.mark.interpreter
@pytest.mark.parametrize("boxes", [True, False], ids=["boxes", "pointers"])
@pytest.mark.parametrize("time_padding", ["zeros", "replicate"])
def test_chunks_are_the_clip_bit_for_bit(
    time_padding: str, boxes: bool, small: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not boxes:
        without_boxes(monkeypatch)
    x = torch.randn(1, 16, 4, 3, 5).half().contiguous(memory_format=torch.channels_last_3d)
    weight, bias = (torch.randn(16, 16, 3, 1, 3) / 15).half(), torch.randn(16).half()
    options = {"bias": bias, "time_padding": time_padding, "activation": "silu"}
    whole = ops.causal_conv3d(x, weight, backend="triton", **options)
    for sizes in ([1, 3], [2, 2], [1, 1, 1, 1]):
        assert torch.equal(streamed(x, sizes, weight, **options), whole), sizes


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("scale", "kernel", "layout"),
    [
        ((2, 1, 1), (3, 1, 1), torch.channels_last_3d),
        pytest.param((1, 2, 2), (1, 3, 3), torch.contiguous_format, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), (3, 3, 3), torch.channels_last_3d, marks=pytest.mark.slow),
    ],
    ids=["t", "hw-contiguous", "thw"],
)
def test_upsampling_phases(
    scale: tuple[int, int, int], kernel: tuple[int, int, int], layout: torch.memory_format, small: dict[str, int]
) -> None:
    """Each phase writes its own frames, rows and columns; forward and gradients, in chunks bit for bit."""
    x = torch.randn(1, 16, 3, 2, 4).contiguous(memory_format=layout)
    tensors = [x, torch.randn(16, 16, *kernel) / 12, torch.randn(16)]
    ours = lambda x, w, b: ops.upsample_conv3d(x, w, b, scale=scale, backend="triton")  # noqa: E731
    theirs = lambda x, w, b: upsample_reference.upsample_conv3d(x, w, b, scale=scale)  # noqa: E731
    assert_gradients_within_promise(ours, theirs, tensors, names=("x", "weight", "bias"))
    options = {"scale": scale, "backend": "triton"}
    first, history = ops.upsample_conv3d(x[:, :, :1], *tensors[1:], return_history=True, **options)
    rest = ops.upsample_conv3d(x[:, :, 1:], *tensors[1:], history=history, start=1, **options)
    assert torch.equal(torch.cat([first, rest], 2), ours(*tensors))


class _Launched:
    """In place of a kernel: the launchers alone run, on the tensors they allocate."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.count += math.prod(grid) > 0
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_no_allocation_exceeds_the_activation(
    geometry: tuple[Any, ...], gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, data and weight gradient allocate results, weights and sums of edges: nothing padded, nothing joined."""
    from vidkernels.triton import _conv_configs, _conv_kernels, _conv_wgrad, _correlate
    from vidkernels.triton import causal_conv3d as launchers

    taken = {name: _Launched() for name in ("box", "pointer")}
    for name, kernel in taken.items():
        monkeypatch.setattr(_conv_kernels, f"_conv_{name}_kernel", kernel)
        monkeypatch.setattr(_conv_wgrad, f"_wgrad_{name}_kernel", kernel)
    for module in (_conv_configs, _correlate, launchers):
        monkeypatch.setattr(module, "family", lambda device: gpu)
    kernel, padding, time_mode, space_mode, past = geometry
    x = torch.randn(1, 32, 9, 24, 24).half().contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(32, 32, *kernel).half()
    history = torch.randn_like(x[:, :, :past]) if past else None
    args = [1, 1, 1], [1, 1, 1], padding, time_mode, space_mode
    y = torch.empty_like(launchers.causal_conv3d_fwd(x, weight, None, history, None, *args, 0))
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: launchers.causal_conv3d_fwd(x, weight, None, history, None, *args, 0),
        "dgrad": lambda: launchers.causal_conv3d_dgrad(y, weight, list(x.shape), past, *args),
        "wgrad": lambda: launchers.causal_conv3d_wgrad(y, x, history, list(kernel), *args),
    }
    for name, run in runs.items():
        with Allocations() as allocations:
            run()
        # The weight gradient sums in up to eight parts, 4 multiprocessors twice over: their number depends on the device.
        limit = 8 * weight.numel() if name == "wgrad" else max(x.numel(), weight.numel())
        too_large = [entry for entry in allocations.sizes if entry[1] > limit]
        assert allocations.sizes and not too_large, (name, too_large, limit)
    assert taken["pointer" if gpu == "sm_80" or space_mode else "box"].count >= 3
