# SPDX-License-Identifier: Apache-2.0
"""Which convolutions the CUDA kernel takes, and the boxes it makes of a frame. Its results: test_causal_conv3d_gpu.py on a GPU,
test_cuda_host.py on the host."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from vidkernels._conv import cuda
from vidkernels._conv.geometry import REPLICATE, ZEROS
from vidkernels.ops import _causal_conv3d_backends as backends

ONES, PADDING = (1, 1, 1), (2, 0, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("filters", "tile"), [(96, 96), (160, 160), (256, 128), (288, 96), (320, 160), (384, 192), (640, 160)]
)
def test_tiles_divide_the_filters(filters: int, tile: int) -> None:
    assert cuda.tile_filters(filters) == tile


def test_other_filters_have_no_tile() -> None:
    assert {n for n in range(1, 193) if cuda.tile_filters(n)} == {96, 128, 160, 192}


@pytest.mark.parametrize("height", [1, 8, 60, 240, 480])
@pytest.mark.parametrize("width", [1, 16, 104, 416, 832])
@pytest.mark.parametrize("filters", [96, 128, 160, 192])
def test_boxes_cover_a_frame_with_the_fewest(filters: int, height: int, width: int) -> None:
    tile, rows, columns, group = cuda._tile(filters, height, width, 2 * filters * width)
    blocks = cuda._BLOCKS[tile]
    assert rows * columns == blocks and 1 <= group <= -(-height // (8 * rows))

    def boxes(rows: int) -> int:
        return -(-height // (8 * rows)) * -(-width // (8 * blocks // rows))

    assert boxes(rows) == min(boxes(n) for n in range(1, blocks + 1) if blocks % n == 0)


def test_shared_memory_holds_the_buffers() -> None:
    """227 KB of an H100: three boxes with their border, four rows of weights, the bias and where positions are."""
    for filters, blocks in cuda._BLOCKS.items():
        for rows in (n for n in range(1, blocks + 1) if blocks % n == 0):
            positions = (8 * rows + 2) * (8 * blocks // rows + 2)
            copied = 4 * 3 * 4 * filters * 16 + 3 * 4 * (positions + 8) * 16
            assert 128 + copied + 4 * (filters + positions) <= 227 << 10


REFUSED: dict[str, tuple[tuple[int, ...], dict[str, Any], str]] = {
    "taps": ((1, 8, 2, 4, 4), {"kernel": (3, 1, 1)}, "3x3 taps"),
    "stride": ((1, 8, 2, 4, 4), {"stride": (1, 2, 2)}, "stride"),
    "dilation": ((1, 8, 2, 4, 4), {"dilation": (2, 1, 1)}, "dilation"),
    "channels": ((1, 12, 2, 4, 4), {}, "multiple of 8"),
    "filters": ((1, 8, 2, 4, 4), {"filters": 64}, "got 8 and 64"),
    "frame": ((1, 96, 1, 1 << 13, 1 << 12), {}, "2^31"),
    "padded frame": ((1, 96, 1, 4, 4), {"padding": (2, 0, 1 << 12, 1 << 12, 1 << 11, 1 << 11)}, "2^31"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_cannot_do_has_a_reason(name: str) -> None:
    shape, given, part = REFUSED[name]
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    facts = {"filters": 96, "kernel": (3, 3, 3), "stride": ONES, "dilation": ONES, "padding": PADDING, **given}
    reason = backends._cuda(x, *facts.values())
    assert reason is not None and part in reason


def test_a_convolution_that_it_takes_has_none() -> None:
    x = torch.empty(1, 96, 5, 480, 832, dtype=torch.bfloat16, device="meta")
    assert backends._cuda(x, 96, (3, 3, 3), ONES, ONES, PADDING) is None


def test_what_it_reads_and_writes_where_it_is() -> None:
    """Offsets in a frame have 32 bits: `out` may be a slice of something larger."""
    last = torch.channels_last_3d
    assert cuda._is_readable(torch.empty(2, 8, 3, 4, 4).to(memory_format=last))
    assert not cuda._is_readable(torch.empty(2, 8, 3, 4, 4))
    for distance, fits in ((1 << 28, True), (1 << 30, False)):
        x = torch.empty(1, device="meta").as_strided((1, 8, 1, 3, 4), (1, 1, 1, distance, 8))
        assert cuda._is_readable(x) == fits


def test_it_is_behind_the_others_unless_boxes_pay() -> None:
    assert list(backends.table())[-2:] == ["cuda", "reference"]
    for channels in (96, 128, 192, 384):
        assert "cuda" not in backends.heuristic(channels, channels, (3, 3, 3), False)


PAYS: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...], bool]] = {
    "96": (96, 96, (3, 3, 3), (4, 480, 832), True),
    "96 one tap along time": (96, 96, (1, 3, 3), (4, 480, 832), True),
    "192": (192, 192, (3, 3, 3), (1, 240, 416), True),
    "384 in two tiles": (384, 384, (3, 3, 3), (2, 120, 208), True),
    "too few programs": (384, 384, (3, 3, 3), (1, 60, 104), False),
    "128": (128, 128, (3, 3, 3), (17, 256, 256), True),
    "128 one tap along time": (128, 128, (1, 3, 3), (17, 256, 256), False),
    "256": (256, 256, (3, 3, 3), (4, 352, 640), True),
    "256 in boxes that reach beyond": (256, 256, (3, 3, 3), (20, 128, 128), False),
    "temporal": (192, 192, (3, 1, 1), (4, 240, 416), False),
    "few channels": (3, 96, (3, 3, 3), (4, 480, 832), False),
    "other filters": (96, 64, (3, 3, 3), (4, 480, 832), False),
}


@pytest.mark.parametrize("name", PAYS)
def test_where_boxes_pay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the 132 multiprocessors of an H200."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "multiprocessors", lambda device: 132)
    channels, filters, kernel, size, pays = PAYS[name]
    x = torch.empty(1, channels, *size, dtype=torch.bfloat16, device="meta")
    other = backends.heuristic(channels, filters, kernel, False)[0]
    assert backends._boxes_pay(x, filters, kernel, other) == pays
    assert not backends._boxes_pay(x.float(), filters, kernel, other)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("filters", "pays", "can"), [(96, True, True), (128, False, True), (64, False, False)])
def test_choice_in_a_graph(filters: int, pays: bool, can: bool, dynamic: bool) -> None:
    """One graph for all clips asks no size: 128 filters, where boxes must fit, stay with others. Nor does it trace what only
    Python can tell: which kernels there are."""
    # a function of Dynamo's constants, and no other wrapper, behind which it would be traced
    assert inspect.isfunction(backends._lacks) and backends._lacks._dynamo_marked_constant

    def choice(x: torch.Tensor) -> torch.Tensor:
        first = backends._boxes_pay(x, filters, (3, 3, 3), "triton")
        reason = backends._cuda(x, filters, (3, 3, 3), ONES, ONES, PADDING)
        return x.new_full((), 2 * first + (reason is None))

    torch.compiler.reset()
    traced = torch.compile(choice, fullgraph=True, dynamic=dynamic, backend="eager")
    for size in ((4, 48, 80), (1, 16, 16)):
        assert traced(torch.empty(1, 96, *size, dtype=torch.bfloat16)) == 2 * pays + can


def test_choice_for_exported_clips() -> None:
    class Choice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if backends._boxes_pay(x, 96, (3, 3, 3), "triton") else x

    x, frames = torch.zeros(1, 96, 4, 48, 80, dtype=torch.bfloat16), torch.export.Dim("frames", min=2, max=40)
    for strict in (True, False):
        program = torch.export.export(Choice(), (x,), dynamic_shapes={"x": {2: frames}}, strict=strict)
        assert torch.equal(program.module()(torch.zeros_like(x[:, :, :3])), torch.ones_like(x[:, :, :3]))


def test_what_is_filled() -> None:
    """By a count of every program's positions."""
    tile, rows, columns, _ = cuda._tile(384, 60, 104, 1)
    high, wide = 8 * rows, 8 * columns
    programs = 3 * len(range(0, 60, high)) * len(range(0, 104, wide)) * (384 // tile)
    made = -(-programs // 100) * 100 * tile * high * wide
    assert cuda.filled(1, 384, 3, 60, 104, 100) == pytest.approx(3 * 384 * 60 * 104 / made)
    assert cuda.filled(0, 384, 3, 60, 104, 100) == cuda.filled(1, 384, 3, 0, 104, 100) == 0


def test_gradients_that_it_leaves_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is repeated, and channels that no tile divides."""
    from types import SimpleNamespace

    asked = []

    def dgrad(grad: torch.Tensor, weight: torch.Tensor, size: Any, *rule: Any) -> tuple[torch.Tensor, None]:
        asked.append(tuple(size))
        return torch.empty(size), None

    monkeypatch.setattr(cuda, "_others", lambda: SimpleNamespace(causal_conv3d_dgrad=dgrad))
    grad = torch.empty(1, 96, 2, 4, 4)
    for channels, modes in ((96, (REPLICATE, ZEROS)), (96, (ZEROS, REPLICATE)), (64, (ZEROS, ZEROS))):
        weight = torch.empty(96, channels, 3, 3, 3)
        cuda.causal_conv3d_dgrad(grad, weight, (1, channels, 2, 4, 4), 1, ONES, ONES, PADDING, *modes)
    assert asked == [(1, 96, 2, 4, 4), (1, 96, 2, 4, 4), (1, 64, 2, 4, 4)]
