# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' AutoencoderKLLTX2Video (LTX-2): LTX's, whose convolutions are told by each call whether they are causal,
and reflect the borders of their frames in the published decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules import diffusers_ltx_vae as ltx
from vidkernels.patching.rules._vae_units import video_reason

_FILE = "autoencoder_kl_ltx2"
_MODES = ("zeros", "reflect", "replicate")


def _kernel_reason(conv: Any) -> str | None:
    kernel = conv._modules["conv"]
    reason = child_reason(kernel, nn.Conv3d)
    if reason is None and (kernel.groups != 1 or kernel.padding_mode not in _MODES):
        reason = f"a convolution has {kernel.groups} groups and padding mode {kernel.padding_mode}"
    return reason or units.unpadded_reason(kernel, 1)


class _Family(ltx.Family):
    def _conv_reason(self, conv: Any) -> str | None:
        return child_reason(conv, self._vidkernels_home.LTX2VideoCausalConv3d) or _kernel_reason(conv)

    def _norm_reason(self, norm: Any, modulated: bool) -> str | None:
        reason = child_reason(norm, self._vidkernels_home.PerChannelRMSNorm)
        return reason or (None if norm.channel_dim == 1 else f"a norm is over axis {norm.channel_dim}")


class ConvForward(_Family):
    """`LTX2VideoCausalConv3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, causal: bool = True) -> Tensor:
        """[B, C, T, H, W]."""
        return ltx.convolve(self, self, hidden_states, causal=causal)

    def _reason(self, hidden_states: Tensor, causal: bool) -> str | None:
        return video_reason(hidden_states) or _kernel_reason(self)


class BlockForward(_Family, ltx.Block):
    """`LTX2VideoResnetBlock3d.forward`."""

    @guarded
    def forward(
        self,
        inputs: Tensor,
        temb: Tensor | None = None,
        generator: torch.Generator | None = None,
        causal: bool = True,
    ) -> Tensor:
        """[B, C, T, H, W]; temb [B, 4 C, 1, 1, 1] for a conditioned decoder."""
        return self._block(inputs, temb, generator, causal)

    def _shortcut_reason(self, conv: Any) -> str | None:
        return units.kernel_reason(conv, nn.Conv3d)

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.conv_shortcut is None else units.pointwise(self, self.conv_shortcut, x)


class DownsampleForward(_Family, ltx.Sampler):
    """`LTX2VideoDownsampler3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, causal: bool = True) -> Tensor:
        """[B, C, T, H, W] -> [B, out, T / t, H / h, W / w]."""
        return self._downsampled(hidden_states, causal)


class UpsampleForward(_Family, ltx.Sampler):
    """`LTX2VideoUpsampler3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, causal: bool = True) -> Tensor:
        """[B, C, T, H, W] -> [B, out, t T - t + 1, h H, w W]."""
        return self._upsampled(hidden_states, causal)


class EncoderForward(_Family, ltx.Network):
    """`LTX2VideoEncoder3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, causal: bool | None = None) -> Tensor:
        """[B, 3, T, H, W] -> moments of equal variance for all channels."""
        causal = causal or self.is_causal  # as upstream: a causal network cannot be asked not to be
        blocks = [*self.down_blocks, self.mid_block]
        return self._moments(self._run(blocks, self._patches(hidden_states), None, None, causal, causal=causal), causal)

    def _reason(self, hidden_states: Tensor, **rest: Any) -> str | None:
        return self._network_reason(hidden_states, False)


class DecoderForward(_Family, ltx.Network):
    """`LTX2VideoDecoder3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, temb: Tensor | None = None, causal: bool | None = None) -> Tensor:
        """Latents [B, z, T, H, W] and, for a conditioned decoder, timesteps [B] -> frames."""
        causal = causal or self.is_causal
        if self.timestep_scale_multiplier is not None:
            temb = temb * self.timestep_scale_multiplier
        blocks = [self.mid_block, *self.up_blocks]
        return self._frames(self._run(blocks, hidden_states, temb, None, causal, causal=causal), temb, causal)

    def _reason(self, hidden_states: Tensor, temb: Tensor | None, **rest: Any) -> str | None:
        return self._network_reason(hidden_states, self.time_embedder is not None, temb)


def _border_check(module: Any) -> str | None:
    """Circular borders, and kernels that reflect further than a sample's small frames reach, are no model's."""
    modes = {m.padding_mode for m in module.modules() if isinstance(m, nn.Conv3d)}
    return None if modes <= set(_MODES) else f"its convolutions pad by mode {', '.join(sorted(modes - set(_MODES)))}"


def _downsample_check(module: Any) -> str | None:
    return ltx.downsample_check(module) or _border_check(module)


def _decoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # four rows and columns: reflected borders need two
    z = units.like_parameters(module, 1, module.conv_in.in_channels, 2, 4, 4)
    return (z, None if module.time_embedder is None else torch.full((1,), 0.05, dtype=z.dtype, device=z.device)), {}


_CONV = {
    "LTX2VideoCausalConv3d.__init__": "68fc4869b92d1e40",
    "LTX2VideoCausalConv3d.forward": "be1e59f32407d160",
}
_NORM = _CONV | {"PerChannelRMSNorm.forward": "587fe2d694cff3b9"}
_BLOCK = _NORM | {"LTX2VideoResnetBlock3d.forward": "89f9e68789867203"}
_DOWN = _CONV | {
    "LTX2VideoDownsampler3d.__init__": "c0e6732d5ec2a5bf",
    "LTX2VideoDownsampler3d.forward": "2b093e8fe976de22",
}
_UP = _CONV | {"LTX2VideoUpsampler3d.forward": "f17e12ce1fd56634"}
_ENCODER = _NORM | {"LTX2VideoEncoder3d.forward": "095bb68dd4777386"}
_DECODER = _NORM | {"LTX2VideoDecoder3d.forward": "6a1949491f4bd13d"}
_BOTH, _ONE = "causal_conv3d channel_norm", "causal_conv3d"
_PREFIX = f"{_FILE}:LTX2Video"


def _rule(name: str, target: str, mixin: type[Fused], uses: str, digests: dict[str, str], sample: Any) -> Any:
    check = _downsample_check if mixin is DownsampleForward else _border_check
    return units.rule(f"ltx2_vae.{name}", f"{_PREFIX}{target}", mixin, uses, digests, sample, check)


RULES = (
    _rule("encoder", "Encoder3d", EncoderForward, _BOTH, _ENCODER, ltx.encoder_sample),
    _rule("decoder", "Decoder3d", DecoderForward, _BOTH, _DECODER, _decoder_sample),
    _rule("resnet", "ResnetBlock3d", BlockForward, _BOTH, _BLOCK, ltx.block_sample),
    _rule("downsample", "Downsampler3d", DownsampleForward, _ONE, _DOWN, ltx.downsample_sample),
    _rule("upsample", "Upsampler3d", UpsampleForward, _ONE, _UP, ltx.sample),
    _rule("conv", "CausalConv3d", ConvForward, _ONE, _CONV, ltx.sample),
)
