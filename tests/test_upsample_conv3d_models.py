# SPDX-License-Identifier: Apache-2.0
"""The upsampling reference against layers that others wrote."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vidkernels._reference import upsample_conv3d as reference

pytest.importorskip("diffusers")

from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video, autoencoder_vidtok


def _clip(channels: int, frames: int = 5) -> torch.Tensor:
    return torch.randn(2, channels, frames, 4, 6, dtype=torch.float64)


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_vidtok_causal_up(split: int, frames: int) -> None:
    """Linear in time, the first frames by themselves, replicated first frame, blend."""
    layer = autoencoder_vidtok.VidTokUpsample3D(4, 4, mix_factor=0.3, num_temp_upsample=split).double()
    x = _clip(4, frames)
    y = reference.upsample_conv3d(
        x,
        layer.conv.conv.weight,
        layer.conv.conv.bias,
        mode="linear_time",
        split=split,
        time_padding="replicate",
        mix_factor=layer.mix_factor,
    )
    # the layer interpolates in float32
    torch.testing.assert_close(y, layer(x), rtol=0, atol=2e-6)


def test_vidtok_noncausal_up() -> None:
    layer = autoencoder_vidtok.VidTokUpsample3D(4, 4, is_causal=False).double()
    x = _clip(4)
    y = reference.upsample_conv3d(x, layer.conv.weight, layer.conv.bias, pad_frames=(1, 1), mix_factor=layer.mix_factor)
    torch.testing.assert_close(y, layer(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_vidtok_temporal_down(causal: bool) -> None:
    layer = autoencoder_vidtok.VidTokDownsample3D(4, 4, is_causal=causal).double()
    x = _clip(4, 6)
    conv = layer.conv.conv if causal else layer.conv
    options: dict[str, Any] = {"time_padding": "replicate"} if causal else {"pad_frames": (0, 1)}
    y = reference.downsample_conv3d(x, conv.weight, conv.bias, mix_factor=layer.mix_factor, **options)
    torch.testing.assert_close(y, layer(x))


def test_vidtok_spatial_up() -> None:
    layer = autoencoder_vidtok.VidTokUpsample2D(4).double()
    x = _clip(4, 1)
    y = reference.upsample_conv3d(x, layer.conv.weight[:, :, None], layer.conv.bias, scale=(1, 2, 2))
    torch.testing.assert_close(y[:, :, 0], layer(x[:, :, 0]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("factor", [(2, 2, 2), (1, 2, 2)])
def test_hunyuan_video_up(factor: tuple[int, int, int], frames: int) -> None:
    layer = autoencoder_kl_hunyuan_video.HunyuanVideoUpsampleCausal3D(4, 6, upsample_factor=factor).double()
    x = _clip(4, frames)
    y = reference.upsample_conv3d(
        x,
        layer.conv.conv.weight,
        layer.conv.conv.bias,
        scale=factor,
        first_frame="single",
        time_padding="replicate",
        spatial_padding_mode="replicate",
    )
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("scale", [(2, 1, 1), (1, 2, 2), (2, 2, 2), (3, 1, 2)], ids=str)
def test_nearest_is_interpolate_then_conv(scale: tuple[int, int, int]) -> None:
    x, weight = _clip(3), torch.randn(5, 3, 3, 3, 3, dtype=torch.float64)
    u = F.interpolate(x, scale_factor=tuple(map(float, scale)), mode="nearest")
    expected = F.conv3d(F.pad(u, (1, 1, 1, 1, 2, 0)), weight)
    torch.testing.assert_close(reference.upsample_conv3d(x, weight, scale=scale), expected)
