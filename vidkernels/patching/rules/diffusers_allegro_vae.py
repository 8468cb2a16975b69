# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' AutoencoderKLAllegro: 2-D and temporal blocks on one channels-last layout without the
rearrangements between them, norm + SiLU in one op, upsampling by phases.

diffusers' `ResnetBlock2D`, `Upsample2D` and `Downsample2D` belong to many models: they get no rule of their own, but
are fused inside Allegro's blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching.rules import _resnet2d_units as parts
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._frame_units import as_frames, as_video, over_time, per_frame
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason

_FILE = "autoencoder_kl_allegro"


class TemporalForward(Fused):
    """`AllegroTemporalConvLayer.forward`."""

    def _reason(self, hidden_states: Tensor, **rest: Any) -> str | None:
        reason = call_reason(hidden_states)
        for part in (self.conv1, self.conv2, self.conv3, self.conv4):
            reason = reason or child_reason(part, nn.Sequential) or units.group_reason(part[0])
            reason = reason or child_reason(part[1], nn.SiLU) or units.kernel_reason(part[-1], nn.Conv3d)
            reason = reason or (child_reason(part[2], nn.Dropout) if len(part) == 4 else None)
        return reason

    @guarded
    def forward(self, hidden_states: Tensor, batch_size: int) -> Tensor:
        """Frames [B*T, C, H, W]: four convolutions over time and their input; half or twice the frames in samplers."""
        x = as_video(hidden_states, batch_size)
        h = self._part(self.conv1, x, not (self.down_sample or self.up_sample))
        if self.down_sample:
            x = x[:, :, ::2]
        elif self.up_sample:
            x = units.as_clip(units.as_rows(x).repeat_interleave(2, 1))
            # The first half of the channels makes even frames, the other odd ones.
            rows = units.as_rows(h).unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5)
            h = units.as_clip(rows.flatten(1, 2))
        h = self._part(self.conv3, self._part(self.conv2, h, True), True)
        y = as_frames(self._part(self.conv4, h, True, channels_last(x)))
        plain = hidden_states.is_contiguous()
        return y.contiguous() if plain else y

    def _part(self, part: Any, x: Tensor, ends: bool, residual: Tensor | None = None) -> Tensor:
        """Norm over the clip, SiLU, dropout and a convolution; the norm's means count the `ends` repeated frames, too,
        so here they are written."""
        x = channels_last(torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2) if ends else x)
        h = units.group_normed(self, part[0], x)
        h = units.dropped(part[2], h) if len(part) == 4 else h
        return units.convolve(self, part[-1], h, residual, time_padding="none", spatial_padding=part[-1].padding[1:])


class _Block(parts.FrameBlock):
    """What down, up and middle blocks share."""

    def _blocks(self, x: Tensor) -> Tensor:
        for resnet, temporal in zip(self.resnets, self.temp_convs, strict=False):
            x = self._called(temporal, self._resnet(resnet, x), batch_size=x.shape[0])
        return x


class DownForward(_Block):
    """`AllegroDownBlock3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, out, T or T / 2, H / 2, W / 2]."""
        x = self._blocks(channels_last(hidden_states))
        if self.add_temp_downsample:
            x = self._called(self.temp_convs_down, x, batch_size=x.shape[0])
        for sampler in self.downsamplers or ():
            x = self._sampled(sampler, x, False)
        return restored(x, hidden_states)

    def _reason(self, hidden_states: Tensor) -> str | None:
        return video_reason(hidden_states)


class UpForward(_Block):
    """`AllegroUpBlock3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, out, T or 2 T, 2 H, 2 W]."""
        x = self._blocks(channels_last(hidden_states))
        if self.add_temp_upsample:
            x = self._called(self.temp_conv_up, x, batch_size=x.shape[0])
        for sampler in self.upsamplers or ():
            x = self._sampled(sampler, x, True)
        return restored(x, hidden_states)

    def _reason(self, hidden_states: Tensor) -> str | None:
        return video_reason(hidden_states)


class MidForward(_Block):
    """`AllegroMidBlock3DConv.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W]; attention over the positions of each frame, called as upstream calls it."""
        x = self._resnet(self.resnets[0], channels_last(hidden_states))
        x = self._called(self.temp_convs[0], x, batch_size=x.shape[0])
        for attention, resnet, temporal in zip(self.attentions, self.resnets[1:], self.temp_convs[1:], strict=False):
            # upstream's attention views [B*T, C, H, W] as contiguous
            x = as_video(attention(as_frames(x).contiguous()), x.shape[0])
            x = self._called(temporal, self._resnet(resnet, x), batch_size=x.shape[0])
        return restored(x, hidden_states)

    def _reason(self, hidden_states: Tensor) -> str | None:
        return video_reason(hidden_states)


class _Network(Fused):
    def _reason(self, sample: Tensor, **rest: Any) -> str | None:
        reason = video_reason(sample) or units.kernel_reason(self.conv_in, nn.Conv2d)
        reason = reason or units.kernel_reason(self.conv_out, nn.Conv2d) or child_reason(self.conv_act, nn.SiLU)
        for conv in (self.temp_conv_in, self.temp_conv_out):
            reason = reason or units.kernel_reason(conv, nn.Conv3d)
        return reason or units.group_reason(self.conv_norm_out)

    def _start(self, x: Tensor) -> Tensor:
        h = per_frame(self, self.conv_in, channels_last(x))
        return over_time(self, self.temp_conv_in, h, h)

    def _block(self, block: nn.Module, x: Tensor) -> Tensor:
        recomputed = torch.is_grad_enabled() and self.gradient_checkpointing
        y: Tensor = self._gradient_checkpointing_func(block, x) if recomputed else block(x)
        return y

    def _end(self, x: Tensor) -> Tensor:
        h = units.group_normed(self, self.conv_norm_out, channels_last(x), per_frame=True)
        y = per_frame(self, self.conv_out, over_time(self, self.temp_conv_out, h, h))
        # as the original returns it: contiguous frames
        return y.transpose(1, 2).contiguous().transpose(1, 2)


class EncoderForward(_Network):
    """`AllegroEncoder3D.forward`."""

    @guarded
    def forward(self, sample: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> moments."""
        x = self._start(sample)
        for block in (*self.down_blocks, self.mid_block):
            x = self._block(block, x)
        return self._end(x)


class DecoderForward(_Network):
    """`AllegroDecoder3D.forward`."""

    @guarded
    def forward(self, sample: Tensor) -> Tensor:
        """Latents [B, z, T, H, W] -> frames."""
        x = self._block(self.mid_block, self._start(sample))
        for block in self.up_blocks:
            x = self._block(block, x)
        return self._end(x)


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    convs = (m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    return (units.like_parameters(module, 1, next(convs).in_channels, 4, 16, 16),), {}


def _temporal_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 8, module.conv1[0].num_channels, 8, 8), 2), {}


def _block_check(block: Any) -> str | None:
    return next((reason for resnet in block.resnets if (reason := units.silu_check(resnet)) is not None), None)


def _with_resnets(digests: dict[str, str]) -> dict[str, str]:
    return {"ResnetBlock2D.forward": "97a311e362b6eb42", **digests}


_TEMPORAL = {
    "AllegroTemporalConvLayer.__init__": "9fe4c92568f06ff3",
    "AllegroTemporalConvLayer.forward": "fd93eb4ef118822c",
    "AllegroTemporalConvLayer._pad_temporal_dim": "8a31b9d4fb0a2808",
}
_DOWN = _with_resnets(
    {
        "AllegroDownBlock3D.forward": "224fc97858681c3b",
        "Downsample2D.forward": "1b498b94d12777eb",
    }
)
_UP = _with_resnets(
    {
        "AllegroUpBlock3D.forward": "8bbda50066efbcb9",
        "Upsample2D.forward": "c7358d9fd6b39bf9",
    }
)
_MID = _with_resnets({"AllegroMidBlock3DConv.forward": "f96f48bd96b867ce"})
_BOTH = "causal_conv3d group_norm"
_PREFIX = f"{_FILE}:Allegro"

RULES = (
    units.rule(
        *("allegro_vae.encoder", f"{_PREFIX}Encoder3D", EncoderForward, _BOTH),
        *({"AllegroEncoder3D.forward": "61aaf1d2c4282ba5"}, _sample),
    ),
    units.rule(
        *("allegro_vae.decoder", f"{_PREFIX}Decoder3D", DecoderForward, _BOTH),
        *({"AllegroDecoder3D.forward": "c7dca250fe8ad85d"}, _sample),
    ),
    units.rule("allegro_vae.down_block", f"{_PREFIX}DownBlock3D", DownForward, _BOTH, _DOWN, _sample, _block_check),
    units.rule("allegro_vae.up_block", f"{_PREFIX}UpBlock3D", UpForward, _BOTH, _UP, _sample, _block_check),
    units.rule("allegro_vae.mid_block", f"{_PREFIX}MidBlock3DConv", MidForward, _BOTH, _MID, _sample, _block_check),
    units.rule(
        *("allegro_vae.temporal", f"{_PREFIX}TemporalConvLayer", TemporalForward, _BOTH, _TEMPORAL, _temporal_sample)
    ),
)
