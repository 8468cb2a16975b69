# SPDX-License-Identifier: Apache-2.0
"""Forwards of the official VAEs of Wan 2.1 and 2.2: those of `_wan_units` on layers under the official names.

The official code keeps the layers of a block, and the ends of a network, in `nn.Sequential`s that it walks through itself,
and hands caches to convolutions and residual blocks only. Its encoding joins the frames of all chunks anew for each.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidkernels.patching.rules import _wan_shortcuts as shortcuts
from vidkernels.patching.rules import _wan_units as wan
from vidkernels.patching.rules._wan_calls import ChunkedCalls, width_of
from vidkernels.patching.rules._wan_units import BlockParts, Cache, Ends


class _Family(wan.Family):
    _prefix = ""


class ConvForward(_Family, wan.ConvForward):
    """`CausalConv3d.forward`."""


class NormForward(_Family, wan.NormForward):
    """`RMS_norm.forward`."""


class BlockForward(_Family, wan.BlockForward):
    """`ResidualBlock.forward`."""

    def _layers(self) -> BlockParts:
        norm1, act1, conv1, norm2, act2, dropout, conv2 = self.residual._modules.values()
        return BlockParts(norm1, act1, conv1, norm2, act2, dropout, conv2, self._modules["shortcut"])


class AttentionForward(_Family, wan.AttentionForward):
    """`AttentionBlock.forward`."""


class ResampleForward(_Family, wan.ResampleForward):
    """`Resample.forward`."""


class DownBlockForward(_Family, shortcuts.DownBlockForward):
    """`Down_ResidualBlock.forward`."""

    def _layers(self) -> list[nn.Module]:
        return list(self.downsamples)


class UpBlockForward(_Family, shortcuts.UpBlockForward):
    """`Up_ResidualBlock.forward`."""

    def _layers(self) -> list[nn.Module]:
        return list(self.upsamples)

    def _keeps_width(self) -> bool:
        first: Any = self.upsamples[0]
        return bool(first.in_dim == first.out_dim)


class _Network(_Family):
    """What encoder and decoder share."""

    def _ends(self) -> Ends:
        norm, act, conv = self.head._modules.values()
        return Ends(self.conv1, norm, act, conv)

    def _walk(self, layers: Any, h: Tensor, feat_cache: Cache, index: list[int], **options: Any) -> Tensor:
        block = self._upstream("AttentionBlock")
        for layer in layers:
            if feat_cache is None or isinstance(layer, block):
                h = layer(h)
            else:
                h = layer(h, feat_cache=feat_cache, feat_idx=index, **options)
        return h


class EncoderForward(_Network, wan.EncoderForward):
    """`Encoder3d.forward`."""

    def _body(self, x: Tensor, feat_cache: Cache, index: list[int]) -> Tensor:
        h = self._walk(self.downsamples, self._begin(x, feat_cache, index), feat_cache, index)
        return self._walk(self.middle, h, feat_cache, index)


class DecoderForward(_Network, wan.DecoderForward):
    """`Decoder3d.forward` of 2.2, whose blocks know the first chunk of a clip."""

    def _body(self, x: Tensor, feat_cache: Cache, index: list[int], options: dict[str, Any]) -> Tensor:
        h = self._walk(self.middle, self._begin(x, feat_cache, index), feat_cache, index)
        return self._walk(self.upsamples, h, feat_cache, index, **options)


class PlainDecoderForward(DecoderForward):
    """`Decoder3d.forward` of 2.1."""

    def _block_options(self, first_chunk: bool) -> dict[str, Any]:
        return {}


class _Autoencoder(_Family, ChunkedCalls):
    """What the versions of `WanVAE_.encode` and `decode` share."""

    _clamped = False
    _side = 1  # of the squares of pixels that are channels of the networks

    def _patched_size(self) -> int:
        return self._side

    def _first(self, first: bool) -> dict[str, Any]:
        return {}

    def _whole_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, [B, z, T, H, W] each."""
        self.clear_cache()
        moments = self.conv1(self._moments(x, self.encoder.conv1.out_channels))
        self.clear_cache()
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance

    def _whole_clip(self, z: Tensor) -> Tensor:
        """Frames of unscaled latents."""
        self.clear_cache()
        decoder: Any = self.decoder
        doublings = sum(module.mode.startswith("up") for module in self._resamplers())
        frames = self._frames(self.conv2(z), width_of(decoder.head[0]), 2**doublings)
        self.clear_cache()
        return frames

    def _resamplers(self) -> list[Any]:
        return [module for module in self.decoder.modules() if isinstance(module, self._upstream("Resample"))]

    def _scaled(self, mean: Tensor, scale: Any) -> Tensor:
        """`(mean - scale[0]) * scale[1]`, numbers or one of each per channel."""
        shift, factor = self._per_channel(scale)
        scaled: Tensor = (mean - shift) * factor
        return scaled

    def _unscaled(self, z: Tensor, scale: Any) -> Tensor:
        """`z / scale[1] + scale[0]`."""
        shift, factor = self._per_channel(scale)
        unscaled: Tensor = z / factor + shift
        return unscaled

    def _per_channel(self, scale: Any) -> tuple[Any, Any]:
        if isinstance(scale[0], Tensor):
            return scale[0].view(1, self.z_dim, 1, 1, 1), scale[1].view(1, self.z_dim, 1, 1, 1)
        return scale[0], scale[1]


class ScaledCalls(_Autoencoder):
    """`WanVAE_.encode` and `decode` of 2.1."""

    def encode(self, x: Tensor, scale: Any) -> Tensor:
        """[B, 3, T, H, W] -> scaled means [B, z, T / 4, H / 8, W / 8]."""
        if not self._served(self.encoder, "Encoder3d", x):
            original: Tensor = super().encode(x, scale)  # type: ignore[misc]
            return original
        return self._scaled(self._whole_moments(x)[0], scale)

    def decode(self, z: Tensor, scale: Any) -> Tensor:
        """Scaled latents [B, z, T, H, W] -> frames, not clamped."""
        if not self._served(self.decoder, "Decoder3d", z):
            original: Tensor = super().decode(z, scale)  # type: ignore[misc]
            return original
        return self._whole_clip(self._unscaled(z, scale))


class PatchedCalls(ScaledCalls):
    """The same of 2.2, on squares of four pixels, which are cut chunk by chunk here."""

    _side = 2

    def _first(self, first: bool) -> dict[str, Any]:
        return {"first_chunk": True} if first else {}


class MomentsCalls(_Autoencoder):
    """The same of 2.1 as a fork mended it: `scale` may be missing, and `encode` returns the logarithm of the variance, too."""

    def encode(self, x: Tensor, scale: Any = None) -> tuple[Tensor, Tensor]:
        """[B, 3, T, H, W] -> means, scaled if there is a scale, and logarithms of variances."""
        if not self._served(self.encoder, "Encoder3d", x):
            original: tuple[Tensor, Tensor] = super().encode(x, scale)  # type: ignore[misc]
            return original
        mean, log_variance = self._whole_moments(x)
        return (mean if scale is None else self._scaled(mean, scale)), log_variance

    def decode(self, z: Tensor, scale: Any = None) -> Tensor:
        """Latents [B, z, T, H, W] -> frames, not clamped."""
        if not self._served(self.decoder, "Decoder3d", z):
            original: Tensor = super().decode(z, scale)  # type: ignore[misc]
            return original
        return self._whole_clip(z if scale is None else self._unscaled(z, scale))
