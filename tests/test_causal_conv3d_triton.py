# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of causal_conv3d in the interpreter: values and gradients through boxes and through pointers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_gradients_within_promise
from test_causal_conv3d import Case, call, make

from vidkernels import ops
from vidkernels._reference import causal_conv3d as reference

pytest.importorskip("triton")

# (B, C, T, H, W), (K, kt, kh, kw), options; boxes are 4 x 4 or 1 x 16 positions, blocks 16 channels and filters here
BOXES: dict[str, Case] = {
    "zeros": ((1, 24, 3, 5, 6), (24, 3, 3, 3), {}),
    "one-row": ((1, 16, 2, 2, 20), (16, 1, 3, 3), {}),
    "replicate": ((2, 16, 3, 4, 5), (16, 3, 3, 3), {"time_padding": "replicate"}),
    "one-frame": ((1, 16, 1, 5, 5), (16, 3, 3, 3), {"time_padding": "replicate"}),
    "history": ((2, 16, 2, 4, 5), (16, 3, 3, 3), {"time_padding": "history", "P": 2}),
    "short-history": ((1, 16, 2, 4, 5), (16, 3, 3, 3), {"P": 1}),
    "short-history-replicate": ((1, 16, 2, 4, 5), (16, 3, 3, 3), {"P": 1, "time_padding": "replicate"}),
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
POINTERS: dict[str, Case] = {
    "rgb-in": ((1, 3, 3, 4, 5), (24, 3, 3, 3), {}),
    "rgb-in-history": ((1, 3, 2, 4, 5), (16, 3, 3, 3), {"P": 1, "time_padding": "replicate"}),
    "rgb-out": ((1, 16, 2, 4, 5), (3, 3, 3, 3), {"time_padding": "replicate"}),
    "odd-channels": ((1, 33, 2, 3, 5), (17, 1, 3, 3), {}),
    "spatial-down": ((2, 16, 2, 6, 5), (16, 1, 3, 3), {"stride": (1, 2, 2), "spatial_padding": (0, 1, 0, 1)}),
    "down-2x2x2": ((1, 16, 5, 5, 5), (16, 3, 3, 3), {"stride": 2, "pad_frames": 2, "time_padding": "replicate"}),
    "hunyuan": ((1, 16, 2, 3, 4), (16, 3, 3, 3), {"time_padding": "replicate", "spatial_padding_mode": "replicate"}),
    "five-taps": ((1, 8, 3, 5, 4), (8, 5, 5, 5), {"spatial_padding_mode": "replicate"}),
    "stride-3": ((1, 8, 5, 7, 8), (8, 2, 3, 3), {"stride": 3, "spatial_padding": (2, 0, 1, 3)}),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Tiles so small that tiny shapes have several along every axis; counts the tensors read as boxes."""
    from vidkernels.triton import _conv_configs, causal_conv3d

    taken = {"boxes": 0}
    original = causal_conv3d._boxes

    def boxes(*args: Any) -> Any:
        taken["boxes"] += 1
        return original(*args)

    monkeypatch.setattr(causal_conv3d, "_boxes", boxes)
    monkeypatch.setattr(_conv_configs, "_BOX_POSITIONS", 1)
    monkeypatch.setattr(_conv_configs, "_BOXES", ((4, 4, 1.0), (1, 16, 1.0)))
    monkeypatch.setattr(_conv_configs, "_SUMMED_BOXES", ((4, 4, 1.0), (1, 16, 1.0)))
    return taken


def check(case: Case, dtype: torch.dtype) -> None:
    tensors, names, options = make(case, dtype)
    ours = call(ops.causal_conv3d, names, options, backend="triton")
    assert_gradients_within_promise(ours, call(reference.causal_conv3d, names, options), tensors, names=names)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", BOXES)
def test_boxes(name: str, small: dict[str, int]) -> None:
    """Output and all gradients in float32 against float64, every tensor through descriptors."""
    check(BOXES[name], torch.float32)
    assert small["boxes"] > 0


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [*BOXES, *POINTERS])
def test_pointers(name: str, small: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without descriptors."""
    from vidkernels.triton import causal_conv3d

    if name in BOXES:
        monkeypatch.setattr(causal_conv3d, "use_boxes", lambda *args: False)
    check({**BOXES, **POINTERS}[name], torch.float32)
    assert small["boxes"] == 0
