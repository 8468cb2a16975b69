# SPDX-License-Identifier: Apache-2.0
"""Few channels and few filters in the Triton backend: values and gradients in the interpreter, whatever the parts of a clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_causal_conv3d import Case
from test_causal_conv3d_memory import _Allocations as Allocations
from test_causal_conv3d_triton import _Launched as Launched
from test_causal_conv3d_triton import check, marked, streamed

from vidkernels import ops

pytest.importorskip("triton")

# (B, C, T, H, W), (K, kt, kh, kw), options, and how many correlations take each form, forward and data gradient together
CHANNELS: dict[str, tuple[Case, int, int]] = {
    "rgb": (((1, 3, 2, 4, 5), (32, 3, 3, 3), {}), 1, 1),
    "rgb-history": (((2, 3, 2, 4, 5), (32, 3, 3, 3), {"P": 1, "time_padding": "replicate"}), 1, 3),
    "rgb-long-history": (((1, 3, 2, 4, 5), (32, 3, 3, 3), {"P": 4, "time_padding": "history", "pad_frames": 2}), 1, 2),
    "grey-1x5": (((1, 1, 3, 4, 6), (33, 2, 1, 5), {"spatial_padding": (2, 2, 0, 0)}), 1, 0),
    "four": (((2, 4, 1, 5, 4), (32, 1, 3, 3), {}), 1, 0),
    "down": (((1, 3, 5, 7, 8), (32, 3, 3, 3), {"stride": 2, "pad_frames": 2, "time_padding": "replicate"}), 1, 2),
    "dilated": (((1, 3, 5, 6, 5), (32, 3, 3, 3), {"dilation": 2, "time_padding": "replicate"}), 1, 2),
    "space": (((1, 3, 2, 4, 3), (32, 2, 3, 3), {"spatial_padding_mode": "replicate"}), 1, 9),
    "silu-residual": (((1, 3, 2, 4, 5), (32, 3, 3, 3), {"activation": "silu", "residual": True}), 1, 1),
    "far-padding": (((1, 2, 2, 3, 3), (32, 2, 2, 2), {"pad_frames": (4, 4), "spatial_padding": 3}), 1, 1),
}
FILTERS: dict[str, tuple[Case, int, int]] = {
    "rgb": (((1, 32, 2, 4, 5), (3, 3, 3, 3), {}), 1, 1),
    "rgb-history": (((2, 32, 2, 4, 5), (3, 3, 3, 3), {"P": 1, "time_padding": "replicate"}), 3, 1),
    "one-1x5": (((1, 64, 3, 4, 6), (1, 1, 1, 5), {"spatial_padding": (2, 2, 0, 0)}), 1, 1),
    "seven": (((1, 64, 2, 4, 5), (7, 3, 3, 3), {"time_padding": "replicate"}), 2, 1),
    "temporal-down": (((1, 32, 5, 4, 4), (3, 3, 3, 3), {"stride": (2, 1, 1), "time_padding": "replicate"}), 3, 1),
    "dilated": (((1, 40, 3, 5, 4), (3, 3, 3, 3), {"dilation": 2}), 1, 1),
    "silu-residual": (((1, 32, 2, 4, 5), (3, 3, 3, 3), {"activation": "silu", "residual": True}), 1, 1),
    "asymmetric": (((1, 32, 4, 5, 6), (3, 3, 3, 3), {"spatial_padding": (0, 1, 2, 0), "time_padding": "none"}), 1, 1),
}


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Tiles so small that tiny shapes have several along every axis; counts the correlations of either form, and the weight
    gradients of packed sources."""
    from vidkernels.triton import _conv_configs, _conv_fold, causal_conv3d

    taken = {"channels": 0, "filters": 0, "weights": 0}

    def counted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            taken[kind] += 1
            return function(*args)

        return run

    monkeypatch.setattr(_conv_fold, "_correlate_packed", counted("channels", _conv_fold._correlate_packed))
    monkeypatch.setattr(_conv_fold, "_correlate_and_gather", counted("filters", _conv_fold._correlate_and_gather))
    monkeypatch.setattr(causal_conv3d, "packed_bands", counted("weights", causal_conv3d.packed_bands))
    monkeypatch.setattr(_conv_configs, "_BOX_POSITIONS", 1)
    monkeypatch.setattr(_conv_configs, "_BOXES", ((4, 4, 1.0), (1, 16, 1.0)))
    monkeypatch.setattr(_conv_configs, "_SUMMED_BOXES", ((4, 4, 1.0), (1, 16, 1.0)))
    return taken


@pytest.mark.interpreter
@pytest.mark.parametrize("name", marked(CHANNELS, ("dilated", "rgb-long-history", "four")))
def test_few_channels(name: str, folded: dict[str, int]) -> None:
    case, channels, filters = CHANNELS[name]
    check(case, torch.float32)
    sources = 0 if case[1][0] % 4 else 1 + ("P" in case[2])  # boxes are 16 bytes wide at least
    assert folded == {"channels": channels, "filters": filters, "weights": sources}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", marked(FILTERS, ("dilated", "seven")))
def test_few_filters(name: str, folded: dict[str, int]) -> None:
    case, channels, filters = FILTERS[name]
    check(case, torch.float32)
    assert folded == {"channels": channels, "filters": filters, "weights": 0}


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_half_precision(dtype: torch.dtype, folded: dict[str, int]) -> None:
    check(CHANNELS["silu-residual"][0], dtype)
    check(FILTERS["silu-residual"][0], dtype)
    assert min(folded.values()) > 0


@pytest.mark.interpreter
def test_weight_gradient_in_bands(folded: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of a row: their sums are added up, clamped frames and history among them."""
    from vidkernels.triton import _conv_fold

    monkeypatch.setattr(_conv_fold, "WORKSPACE", 4000)
    check(CHANNELS["rgb-history"][0], torch.float32)
    assert folded["weights"] == 2


@pytest.mark.interpreter
def test_full_float32_and_small_frames_do_without(folded: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of full float32 have no boxes, and frames of fewer pixels than a box leave them empty."""
    from vidkernels.triton import _conv_configs

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check(CHANNELS["rgb"][0], torch.float32)
    monkeypatch.setattr(_conv_configs, "_BOX_POSITIONS", 64)
    check(FILTERS["rgb"][0], torch.float32)
    assert folded == {"channels": 0, "filters": 0, "weights": 0}


def clip(channels: int, filters: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    x = torch.randn(2, channels, 2, 4, 17).half().contiguous(memory_format=torch.channels_last_3d)
    weight = (torch.randn(filters, channels, 3, 3, 3) / 15).half()
    residual = torch.randn(2, filters, 2, 4, 17).half().contiguous(memory_format=torch.channels_last_3d)
    options = {"bias": torch.randn(filters).half(), "residual": residual, "activation": "silu", "backend": "triton"}
    return x, weight, options


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(3, 32), (64, 3)], ids=["channels", "filters"])
def test_parts_are_the_clip_bit_for_bit(
    shape: tuple[int, int], folded: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fits into the workspace: whole clips, some frames and rows of one, rows cut in two. Then in chunks of frames,
    as a stream brings them."""
    from vidkernels.triton import _conv_fold

    x, weight, options = clip(*shape)
    whole = ops.causal_conv3d(x, weight, **options)
    monkeypatch.setattr(_conv_fold, "_COLUMNS", 16)
    for bytes_at_once in (20_000, 14_000, 1):
        monkeypatch.setattr(_conv_fold, "WORKSPACE", bytes_at_once)
        assert torch.equal(ops.causal_conv3d(x, weight, **options), whole), bytes_at_once
    assert sum(folded.values()) == 4
    del options["residual"], options["backend"]
    monkeypatch.setattr(_conv_fold, "WORKSPACE", 14_000)
    x = x[:1]
    whole = ops.causal_conv3d(x, weight, backend="triton", **options)
    assert torch.equal(streamed(x, [1, 1], weight, **options), whole)
    assert sum(folded.values()) == 7


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(3, 32), (64, 3)], ids=["channels", "filters"])
def test_results_with_gaps(shape: tuple[int, int], folded: dict[str, int]) -> None:
    """y and the residual are windows of larger tensors, the source one of more channels; what lies between stays."""
    from vidkernels.triton._conv_fold import fold_or_correlate

    channels, filters = shape
    source = torch.randn(1, 2, 6, 8, channels + 64)[..., 64:].permute(0, 4, 1, 2, 3)
    weight, bias = torch.randn(filters, channels, 2, 3, 3) / 9, torch.randn(filters)
    large = torch.full((1, 4, 12, 16, filters + 5), 7.0)
    y, residual = (t[:, 1::2, ::2, 1::2, 5:].permute(0, 4, 1, 2, 3) for t in (large, torch.randn(large.shape)))
    fold_or_correlate(y, source, None, weight, bias, residual, (1, 1, 1), (-1, -1, -1), (1, 1, 1), (False, False), 0)
    expected = ops.causal_conv3d(source, weight, bias, residual=residual, backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.fill_(7.0)
    assert (large == 7.0).all() and sum(folded.values()) == 1


@pytest.mark.parametrize("workspace", [1 << 25, 1 << 20, 50_000, 1])
@pytest.mark.parametrize(
    ("batch", "frames", "height", "width", "halo"),
    [(1, 81, 480, 832, 2), (1, 17, 256, 256, 2), (64, 1, 256, 256, 2), (3, 5, 7, 1280, 4), (2, 100, 33, 64, 0)],
)
def test_parts_cover_a_clip_once_within_the_workspace(
    batch: int, frames: int, height: int, width: int, halo: int, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No smaller than they must be: one row with its neighbours, or 128 columns of all frames."""
    from vidkernels.triton import _conv_fold

    monkeypatch.setattr(_conv_fold, "WORKSPACE", workspace)
    seen = torch.zeros(height, width, dtype=torch.int8)
    each = batch * frames * 64
    for rows, columns in _conv_fold._bands(height, width, each):
        seen[rows, columns] += 1
        size = (rows.stop - rows.start) * (columns.stop - columns.start) * each
        assert size <= max(workspace, 128 * each)
    assert (seen == 1).all()
    seen = torch.zeros(batch, frames, height, dtype=torch.int8)
    for clips, times, rows in _conv_fold._blocks(batch, frames, height, halo, height, width * 128):
        seen[clips, times, rows] += 1
        counts = [part.stop - part.start for part in (clips, times, rows)]
        size = counts[0] * counts[1] * min(counts[2] + halo, height) * width * 128
        assert size <= max(workspace, min(1 + halo, height) * width * 128)
    assert (seen == 1).all()


@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("shape", [(3, 64), (128, 3)], ids=["channels", "filters"])
def test_memory_is_bounded(shape: tuple[int, int], past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No allocation but results is larger than the workspace, of which there is one at a time (two with history)."""
    from vidkernels.triton import _conv_configs, _conv_fold, _conv_fold_kernels, _conv_kernels
    from vidkernels.triton import causal_conv3d as launchers

    taken = {name: Launched() for name in ("pack_kernel", "gather_kernel", "_conv_box_kernel")}
    for name, kernel in taken.items():
        monkeypatch.setattr(_conv_kernels if "box" in name else _conv_fold_kernels, name, kernel)
    monkeypatch.setattr(_conv_configs, "family", lambda device: "sm_90")
    monkeypatch.setattr(_conv_fold, "WORKSPACE", 1 << 19)
    channels, filters = shape
    x = torch.empty(1, channels, 9, 64, 64).half().contiguous(memory_format=torch.channels_last_3d)
    history = torch.empty_like(x[:, :, :past]) if past else None
    weight, y = torch.empty(filters, channels, 3, 3, 3).half(), torch.empty(1, 9, 64, 64, filters).half()
    args = [1, 1, 1], [1, 1, 1], [2, 0, 1, 1, 1, 1], 1, 0, 0
    with Allocations() as allocations:
        launchers.causal_conv3d_fwd(x, weight, None, history, None, *args, out=y.permute(0, 4, 1, 2, 3))
    sizes = [size for name, size in allocations.sizes]
    elements = (1 << 19) // (2 if channels == 3 else 4)
    assert elements // 2 < max(sizes) <= max(elements, weight.numel())
    parts = taken["_conv_box_kernel"].count
    assert parts > 4 and taken["pack_kernel"].count + taken["gather_kernel"].count >= parts
