# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' AutoencoderKLTemporalDecoder (Stable Video Diffusion, Latte): spatial and temporal blocks on one layout
without the rearrangements between them, and the blend of the two inside the last convolution of the temporal one.

The encoder is that of `diffusers_image_vae`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import child_reason, guarded, note_fallback, parameter_of
from vidkernels.patching._match import digest
from vidkernels.patching.rules import _frame_units as frames
from vidkernels.patching.rules import _resnet2d_units as parts
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_memory import may_write, overwriting

_RESNET = "diffusers.models.resnet"
# Of classes in `_RESNET` that the blocks' own module does not name.
_KNOWN = {
    "TemporalResnetBlock.forward": "9138a876c8482c3e",
    "AlphaBlender.forward": "b6b8c574c848444c",
    "AlphaBlender.get_alpha": "e7cbf36422e3b058",
}


class _Block(parts.FrameBlock):
    """What blocks share: a clip [B, C, T, H, W] in channels-last memory between all units."""

    def _clip(self, x: Tensor, image_only_indicator: Tensor) -> Tensor:
        return frames.as_video(x, x.shape[0] // image_only_indicator.shape[-1])

    def _mixed(self, resnet: Any, x: Tensor, image_only_indicator: Tensor) -> Tensor:
        """A residual block over each frame, one over time, and the blend of the two."""
        reason = _mixed_reason(resnet)
        if reason is not None:
            note_fallback(self, reason)
            return self._called(resnet, x, image_only_indicator=image_only_indicator)
        x = self._resnet(resnet.spatial_res_block, x)
        block, mixer = resnet.temporal_res_block, resnet.time_mixer
        h = frames.over_time(self, block.conv1, units.group_normed(self, block.norm1, x))
        h = units.dropped(block.dropout, units.group_normed(self, block.norm2, h))
        if mixer.merge_strategy == "learned_with_images":
            alpha = mixer.get_alpha(image_only_indicator, 5).to(x.dtype)
            share = alpha if mixer.switch_spatial_to_temporal_mix else 1 - alpha
            return x + share * frames.over_time(self, block.conv2, h)
        return self._blended(mixer, block.conv2, h, x)

    def _blended(self, mixer: Any, conv: Any, h: Tensor, x: Tensor) -> Tensor:
        """The blend of x and `x + conv(h)`, which is x and a share of `conv(h)`: a convolution by as much smaller weights."""
        learned, switched = mixer.merge_strategy == "learned", mixer.switch_spatial_to_temporal_mix
        mix = parameter_of(mixer, "mix_factor") if learned else mixer.mix_factor
        weight, bias = parameter_of(conv, "weight"), parameter_of(conv, "bias")
        if learned and torch.is_grad_enabled():  # a mix factor's gradient through weights in half precision is far off
            y = frames.over_time(self, conv, h, x)
            pair = (y, x) if switched else (x, y)
            blended: Tensor = ops.alpha_blend(*pair, mix, backend=self._vidkernels_backend("alpha_blend"))
            return blended
        wide = torch.promote_types(weight.dtype, torch.float32)
        share = mix.to(wide).sigmoid() if learned else mix.to(wide)
        share = share if switched else 1 - share
        weight = (weight.to(wide) * share).to(weight.dtype)
        bias = None if bias is None else (bias.to(wide) * share).to(bias.dtype)
        options = {"pad_frames": (conv.padding[0],) * 2, "spatial_padding": conv.padding[1:]}
        options |= {"stride": conv.stride, "dilation": conv.dilation}
        return units.convolve_by(self, weight, bias, h, x, x if may_write(x) else None, **options)

    def _reason(self, hidden_states: Tensor, image_only_indicator: Tensor) -> str | None:
        reason = frames.frames_reason(hidden_states, image_only_indicator)
        if reason is None and hidden_states.shape[0] % image_only_indicator.shape[-1] != 0:
            reason = "its frames are not whole clips"
        return reason


def _mixed_reason(resnet: Any) -> str | None:
    home: Any = sys.modules[_RESNET]
    reason = child_reason(resnet, home.SpatioTemporalResBlock)
    if reason is not None:
        return reason
    block = resnet.temporal_res_block
    reason = child_reason(resnet.time_mixer, home.AlphaBlender) or child_reason(block, home.TemporalResnetBlock)
    reason = reason or units.group_reason(block.norm1, block.norm2)
    reason = reason or units.kernel_reason(block.conv1, nn.Conv3d) or units.kernel_reason(block.conv2, nn.Conv3d)
    return reason or child_reason(block.nonlinearity, nn.SiLU) or child_reason(block.dropout, nn.Dropout)


class MidForward(_Block):
    """`MidBlockTemporalDecoder.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, image_only_indicator: Tensor) -> Tensor:
        """Frames [B*T, C, H, W]; indicator [B, T]."""
        x = self._clip(hidden_states, image_only_indicator)
        x = self._mixed(self.resnets[0], x, image_only_indicator)
        for resnet, attention in zip(list(self.resnets)[1:], self.attentions, strict=False):
            x = self._mixed(resnet, self._attended(attention, x), image_only_indicator)
        return frames.as_frames(x)


class UpForward(_Block):
    """`UpBlockTemporalDecoder.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, image_only_indicator: Tensor) -> Tensor:
        """Frames [B*T, C, H, W] -> [B*T, out, 2 H, 2 W]; indicator [B, T]."""
        x = self._clip(hidden_states, image_only_indicator)
        for resnet in self.resnets:
            x = self._mixed(resnet, x, image_only_indicator)
        for sampler in self.upsamplers or ():
            x = self._sampled(sampler, x, True)
        return frames.frames_like(x, hidden_states)


class DecoderForward(parts.FrameNetwork):
    """`TemporalDecoder.forward`."""

    @guarded
    def forward(self, sample: Tensor, image_only_indicator: Tensor, num_frames: int = 1) -> Tensor:
        """Latents [B*T, z, H, W] and an indicator [B, T] -> frames [B*T, 3, 8 H, 8 W]."""
        x = frames.as_frames(self._conv(self.conv_in, frames.as_video(sample)))
        with overwriting(self, sample):
            x = self._block(self.mid_block, x, image_only_indicator)
            x = x.to(next(self.up_blocks.parameters()).dtype)
            for block in self.up_blocks:
                x = self._block(block, x, image_only_indicator)
        x = frames.as_frames(self._end(x))
        y = frames.over_time(self, self.time_conv_out, frames.as_video(x, x.shape[0] // num_frames))
        return frames.frames_like(y, sample)

    def _reason(self, sample: Tensor, image_only_indicator: Tensor, num_frames: int) -> str | None:
        reason = frames.frames_reason(sample, image_only_indicator)
        if reason is None and sample.shape[0] % num_frames != 0:
            reason = "its frames are not whole clips"
        return reason or units.kernel_reason(self.time_conv_out, nn.Conv3d)


def _block_check(block: Any) -> str | None:
    home: Any = sys.modules[_RESNET]
    for key, known in _KNOWN.items():
        name, _, method = key.partition(".")
        found = digest(getattr(getattr(home, name, None), method, None))
        if found != known:
            return f"{key} has digest {found}"
    for resnet in block.resnets:
        temporal = resnet.temporal_res_block
        if temporal.time_emb_proj is not None or temporal.conv_shortcut is not None:
            return "a residual block takes a time embedding or changes its channels over time"
        reason = parts.resnet_check(resnet.spatial_res_block) or units.silu_check(temporal)
        if reason is not None:
            return reason
    return None


def _mid_check(block: Any) -> str | None:
    return _block_check(block) or parts.processor_check(block.attentions)


def _network_sample(network: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    z = units.like_parameters(network, 4, network.conv_in.in_channels, 4, 4)
    return (z, z.new_zeros(2, 2)), {"num_frames": 2}


def _block_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = units.like_parameters(block, 4, block.resnets[0].spatial_res_block.in_channels, 8, 8)
    return (x, x.new_zeros(2, 2)), {}


_OPS = "causal_conv3d group_norm alpha_blend"
_BLOCKS = "models.unets.unet_3d_blocks"
_MIXED = {"SpatioTemporalResBlock.forward": "5777d5700c978ef0", **parts.RESNET}
_MID = {"MidBlockTemporalDecoder.forward": "c846ebd4dead1d89", **_MIXED, **parts.ATTENTION}
_UP = {"UpBlockTemporalDecoder.forward": "9ea731f06eea8598", **_MIXED, **parts.UPSAMPLE}

RULES = (
    units.rule(
        *("temporal_decoder.decoder", "autoencoder_kl_temporal_decoder:TemporalDecoder", DecoderForward),
        *("causal_conv3d group_norm", {"TemporalDecoder.forward": "70ff13c650466c09"}, _network_sample),
    ),
    units.rule(
        *("temporal_decoder.mid_block", f"{_BLOCKS}:MidBlockTemporalDecoder", MidForward, _OPS),
        *(_MID, _block_sample, _mid_check),
    ),
    units.rule(
        *("temporal_decoder.up_block", f"{_BLOCKS}:UpBlockTemporalDecoder", UpForward, _OPS),
        *(_UP, _block_sample, _block_check),
    ),
)
