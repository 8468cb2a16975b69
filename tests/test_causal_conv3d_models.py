# SPDX-License-Identifier: Apache-2.0
"""The reference against layers that others wrote: the causal convolutions of diffusers' video autoencoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vidkernels._reference import causal_conv3d as reference

pytest.importorskip("diffusers")

from diffusers.models.autoencoders import (
    autoencoder_kl_cogvideox,
    autoencoder_kl_hunyuan_video,
    autoencoder_kl_wan,
    autoencoder_vidtok,
)


def _clip(channels: int, frames: int = 5) -> torch.Tensor:
    return torch.randn(2, channels, frames, 6, 8, dtype=torch.float64)


def _check(expected: torch.Tensor, x: torch.Tensor, conv: torch.nn.Module, **options: Any) -> None:
    weight = conv.weight
    if weight.ndim == 4:
        weight = weight[:, :, None]
    y = reference.causal_conv3d(x, weight, conv.bias, **options)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kernel", [1, 3, (3, 1, 1)], ids=str)
@pytest.mark.parametrize("stride", [1, (2, 1, 1)], ids=str)
def test_vidtok_3d(kernel: Any, stride: Any) -> None:
    if kernel == 1 and stride != 1:
        pytest.skip("a front padding of -1: no such layer")
    layer = autoencoder_vidtok.VidTokCausalConv3d(4, 6, kernel, stride=stride).double()
    x = _clip(4)
    _check(layer(x), x, layer.conv, stride=stride, time_padding="replicate")


def test_vidtok_3d_chunks_carry_their_history() -> None:
    """The layer's cached second chunk equals `history`; so does the history that the reference hands on."""
    layer = autoencoder_vidtok.VidTokCausalConv3d(4, 6, 3).double()
    first, second = _clip(4, 3), _clip(4, 2)
    expected = [layer(first)]
    layer.is_first_chunk = False
    expected.append(layer(second))
    y, state = reference.causal_conv3d(
        first, layer.conv.weight, layer.conv.bias, time_padding="replicate", return_history=True
    )
    torch.testing.assert_close(y, expected[0])
    _check(expected[1], second, layer.conv, time_padding="history", history=state)


@pytest.mark.parametrize("stride", [1, 2])
def test_vidtok_1d(stride: int) -> None:
    layer = autoencoder_vidtok.VidTokCausalConv1d(4, 6, 3, stride=stride).double()
    x = torch.randn(5, 4, 7, dtype=torch.float64)
    y = reference.causal_conv3d(
        x[..., None, None],
        layer.conv.weight[..., None, None],
        layer.conv.bias,
        stride=(stride, 1, 1),
        time_padding="replicate",
    )
    torch.testing.assert_close(y[..., 0, 0], layer(x))


def test_vidtok_spatial_down() -> None:
    layer = autoencoder_vidtok.VidTokDownsample2D(4).double()
    x = _clip(4, 1)
    _check(layer(x[:, :, 0])[:, :, None], x, layer.conv, stride=(1, 2, 2), spatial_padding=(0, 1, 0, 1))


@pytest.mark.parametrize("pad_mode", ["constant", "replicate"])
def test_cogvideox(pad_mode: str) -> None:
    """Zeros in space and the first frame in time, or replication of everything."""
    layer = autoencoder_kl_cogvideox.CogVideoXCausalConv3d(4, 6, 3, pad_mode=pad_mode).double()
    x = _clip(4)
    mode = "replicate" if pad_mode == "replicate" else "zeros"
    expected, cache = layer(x)
    _check(expected, x, layer.conv, time_padding="replicate", spatial_padding_mode=mode)
    if pad_mode == "constant":
        expected, _ = layer(x, cache)
        _check(expected, x, layer.conv, history=cache)


@pytest.mark.parametrize("cached", [0, 1, 2])
def test_wan(cached: int) -> None:
    """Zeros in front of as many cached frames as there are."""
    layer = autoencoder_kl_wan.WanCausalConv3d(4, 6, 3, padding=1).double()
    x, cache = _clip(4), _clip(4, cached)
    _check(layer(x, cache if cached else None), x, layer, history=cache)


def test_wan_temporal_down() -> None:
    layer = autoencoder_kl_wan.WanCausalConv3d(4, 4, (3, 1, 1), stride=(2, 1, 1), padding=(0, 0, 0)).double()
    x, cache = _clip(4, 4), _clip(4, 1)
    expected = layer(torch.cat([cache, x], 2))
    _check(expected, x, layer, stride=(2, 1, 1), time_padding="history", history=cache)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (1, 1), (3, (2, 2, 2)), (3, (1, 2, 2))], ids=str)
def test_hunyuan_video(kernel: int, stride: Any) -> None:
    layer = autoencoder_kl_hunyuan_video.HunyuanVideoCausalConv3d(4, 6, kernel, stride).double()
    x = _clip(4)
    options: dict[str, Any] = {"spatial_padding_mode": "replicate", "time_padding": "replicate"}
    _check(layer(x), x, layer.conv, stride=stride, pad_frames=kernel - 1, spatial_padding=kernel // 2, **options)


def test_reference_differentiates_in_float64() -> None:
    inputs = [t.requires_grad_() for t in (torch.randn(1, 2, 3, 3, 3).double(), torch.randn(2, 2, 2, 2, 2).double())]

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return reference.causal_conv3d(x, weight, time_padding="replicate", activation="silu")

    torch.autograd.gradcheck(function, inputs)
