# SPDX-License-Identifier: Apache-2.0
"""vidkernels.nn: causal convolution and samplers, whole clips and chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vidkernels
from vidkernels import nn

CUTS = [(9,), (1,) * 9, (1, 4, 4), (1, 8), (2, 5, 2), (3, 1, 5)]
LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "conv": lambda: nn.CausalConv3d(16, 24, 3),
    "conv-replicate": lambda: nn.CausalConv3d(16, 16, 3, time_padding="replicate", activation="silu"),
    "temporal": lambda: nn.CausalConv3d(16, 16, (3, 1, 1), time_padding="replicate"),
    "pointwise": lambda: nn.CausalConv3d(16, 8, 1),
    "dilated": lambda: nn.CausalConv3d(16, 16, (3, 1, 1), dilation=(3, 1, 1)),
    "strided": lambda: nn.CausalConv3d(16, 16, (3, 3, 3), stride=(2, 1, 1), time_padding="replicate"),
    "strided-hunyuan": lambda: nn.CausalConv3d(
        16, 16, 3, stride=2, pad_frames=2, spatial_padding=1, time_padding="replicate"
    ),
    "stride-over-gap": lambda: nn.CausalConv3d(16, 16, (4, 1, 1), stride=(3, 1, 1)),
    "spatial-down": lambda: nn.SpatialDownsample(16),
    "spatial-up": lambda: nn.SpatialUpsample(16, 8),
    "temporal-down": lambda: nn.TemporalDownsample(16, time_padding="replicate"),
    "temporal-up": lambda: nn.TemporalUpsample(16),
    "temporal-up-linear": lambda: nn.TemporalUpsample(16, mode="linear_time", split=2, time_padding="replicate"),
}
STATELESS = {"spatial-down", "spatial-up"}


def in_chunks(layer: torch.nn.Module, clip: torch.Tensor, cuts: tuple[int, ...], stateless: bool) -> torch.Tensor:
    parts, state, start = [], None, 0
    for number, count in enumerate(cuts):
        x = clip[:, :, start : start + count]
        start += count
        if stateless:
            parts.append(layer(x))
            continue
        options: dict[str, Any] = {"final": number == len(cuts) - 1} if isinstance(layer, nn.TemporalUpsample) else {}
        y, state = layer(x, state, return_state=True, **options)
        parts.append(y)
    return torch.cat(parts, 2)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("name", LAYERS.keys())
def test_chunks_equal_the_whole_clip(name: str, cuts: tuple[int, ...]) -> None:
    """Bit for bit in C++: an element's sum has the same order wherever a chunk begins. torch's own convolutions choose
    another order for another number of frames, so that backend is equal to rounding."""
    layer = LAYERS[name]()
    clip = torch.randn(1, 16, 9, 10, 12).contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        chunked, whole = in_chunks(layer, clip, cuts, name in STATELESS), layer(clip)
    if vidkernels.explain("causal_conv3d", clip, torch.zeros(16, 16, 3, 3, 3)).chosen == "cpp":
        assert torch.equal(chunked, whole)
    else:
        torch.testing.assert_close(chunked, whole, rtol=0, atol=4e-6)


def test_images_are_clips_of_one_frame() -> None:
    layer = nn.CausalConv3d(8, 8, 3, time_padding="replicate")
    image = torch.randn(3, 8, 1, 6, 6)
    still = image.expand(-1, -1, 4, -1, -1).contiguous()
    torch.testing.assert_close(layer(image), layer(still)[:, :, 3:])


def test_state_does_not_hold_the_activation() -> None:
    """The state is a copy of a few frames, not a view that keeps the whole input alive."""
    layer = nn.CausalConv3d(8, 8, 3)
    x = torch.randn(1, 8, 40, 6, 6)
    _, state = layer(x, return_state=True)
    assert state.shape[2] == 2 and state.untyped_storage().nbytes() == state.numel() * 4


def test_gradient_flows_through_the_state() -> None:
    layer = nn.CausalConv3d(4, 4, 3).double()
    clip = torch.randn(1, 4, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(1, 4, 5, 4, 4, dtype=torch.float64)
    whole = torch.autograd.grad(layer(clip), [clip, *layer.parameters()], cotangent)
    chunked = torch.autograd.grad(in_chunks(layer, clip, (2, 1, 2), False), [clip, *layer.parameters()], cotangent)
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b)


def test_parameters_are_those_of_conv3d() -> None:
    ours, theirs = nn.CausalConv3d(4, 6, (3, 1, 3)), torch.nn.Conv3d(4, 6, (3, 1, 3))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert "bias" not in nn.CausalConv3d(4, 6, 3, bias=False).state_dict()
    assert nn.CausalConv3d(4, 6, 3, device="meta", dtype=torch.bfloat16).weight.dtype == torch.bfloat16
