# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' 2-D VAEs: encoders and decoders of AutoencoderKL (Stable Diffusion, Flux, PixArt, Latte), VQModel and
their relatives. Frames go through on one channels-last layout, norm + SiLU in one op, residuals inside convolutions,
upsampling by phases, without padded copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import guarded
from vidkernels.patching.rules import _frame_units as frames
from vidkernels.patching.rules import _resnet2d_units as parts
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_memory import overwriting


class DownForward(parts.FrameBlock):
    """`DownEncoderBlock2D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out, H / 2, W / 2]."""
        x = frames.as_video(hidden_states)
        for resnet in self.resnets:
            x = self._resnet(resnet, x)
        for sampler in self.downsamplers or ():
            x = self._sampled(sampler, x, False)
        return frames.frames_like(x, hidden_states)

    def _reason(self, hidden_states: Tensor) -> str | None:
        return frames.frames_reason(hidden_states)


class UpForward(parts.FrameBlock):
    """`UpDecoderBlock2D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        """[N, C, H, W] -> [N, out, 2 H, 2 W]."""
        x = frames.as_video(hidden_states)
        for resnet in self.resnets:
            x = self._resnet(resnet, x)
        for sampler in self.upsamplers or ():
            x = self._sampled(sampler, x, True)
        return frames.frames_like(x, hidden_states)

    def _reason(self, hidden_states: Tensor, temb: Tensor | None = None) -> str | None:
        return frames.frames_reason(hidden_states) or _embedding_reason(temb)


class MidForward(parts.FrameBlock):
    """`UNetMidBlock2D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        """[N, C, H, W]."""
        x = self._resnet(self.resnets[0], frames.as_video(hidden_states))
        recomputed = torch.is_grad_enabled() and self.gradient_checkpointing
        for attention, resnet in zip(self.attentions, list(self.resnets)[1:], strict=False):
            if attention is not None:
                x = self._attended(attention, x)
            given = resnet, x
            x = self._gradient_checkpointing_func(self._resnet, *given) if recomputed else self._resnet(*given)
        return frames.as_frames(x) if _attends(self) else frames.frames_like(x, hidden_states)

    def _reason(self, hidden_states: Tensor, temb: Tensor | None = None) -> str | None:
        return frames.frames_reason(hidden_states) or _embedding_reason(temb)


def _embedding_reason(embedding: Tensor | None) -> str | None:
    return None if embedding is None else "it is given an embedding"


def _attends(mid_block: Any) -> bool:
    # a block of another class, put in the place of upstream's, may have none
    return any(attention is not None for attention in getattr(mid_block, "attentions", ()))


def _returned(y: Tensor, sample: Tensor, mid_block: Any) -> Tensor:
    """A network's result in the memory format of the original's: attention in the middle turns several frames, though
    not a single one, to channels-last memory."""
    turned = _attends(mid_block) and y.shape[2] > 1
    return frames.as_frames(y) if turned else frames.frames_like(y, sample)


class EncoderForward(parts.FrameNetwork):
    """`Encoder.forward`."""

    @guarded
    def forward(self, sample: Tensor) -> Tensor:
        """[N, 3, H, W] -> moments."""
        x = frames.as_frames(self._conv(self.conv_in, frames.as_video(sample)))
        with overwriting(self, sample):
            for block in (*self.down_blocks, self.mid_block):
                x = self._block(block, x)
        return _returned(self._end(x), sample, self.mid_block)

    def _reason(self, sample: Tensor) -> str | None:
        return frames.frames_reason(sample)


class DecoderForward(parts.FrameNetwork):
    """`Decoder.forward`."""

    @guarded
    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """Latents [N, z, H, W] -> frames."""
        x = frames.as_frames(self._conv(self.conv_in, frames.as_video(sample)))
        with overwriting(self, sample):
            for block in (self.mid_block, *self.up_blocks):
                x = self._block(block, x, latent_embeds)
        return _returned(self._end(x), sample, self.mid_block)

    def _reason(self, sample: Tensor, latent_embeds: Tensor | None = None) -> str | None:
        return frames.frames_reason(sample) or _embedding_reason(latent_embeds)


def _norm_check(network: Any) -> str | None:
    norm = network.conv_norm_out
    return None if isinstance(norm, nn.GroupNorm) else f"its last norm is a {type(norm).__name__}"


def _mid_check(block: Any) -> str | None:
    return parts.block_check(block) or parts.processor_check(block.attentions)


def _network_sample(network: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(network, 2, network.conv_in.in_channels, 16, 16),), {}


def _block_sample(block: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(block, 2, block.resnets[0].in_channels, 8, 8),), {}


# Many a model has an `Encoder` and a `Decoder`; those of other make are no near misses.
_FEATURES = ("conv_in", "mid_block", "conv_norm_out", "conv_act", "conv_out")
_BOTH = "causal_conv3d group_norm"
_VAE, _BLOCKS = "vae", "models.unets.unet_2d_blocks"
_DOWN = {"DownEncoderBlock2D.forward": "2e8bee861f663847", **parts.RESNET, **parts.DOWNSAMPLE}
_UP = {"UpDecoderBlock2D.forward": "22bf103b7f9260e7", **parts.RESNET, **parts.UPSAMPLE}
_MID = {"UNetMidBlock2D.forward": "b026ddc437eb42e0", **parts.RESNET, **parts.ATTENTION}

RULES = (
    units.rule(
        *("image_vae.encoder", f"{_VAE}:Encoder", EncoderForward, _BOTH),
        *({"Encoder.forward": "d016d97482c2c01a"}, _network_sample, _norm_check),
        features=(*_FEATURES, "down_blocks"),
    ),
    units.rule(
        *("image_vae.decoder", f"{_VAE}:Decoder", DecoderForward, _BOTH),
        *({"Decoder.forward": "946d0d007ce079b0"}, _network_sample, _norm_check),
        features=(*_FEATURES, "up_blocks"),
    ),
    units.rule(
        *("image_vae.down_block", f"{_BLOCKS}:DownEncoderBlock2D", DownForward, _BOTH),
        *(_DOWN, _block_sample, parts.block_check),
    ),
    units.rule(
        *("image_vae.up_block", f"{_BLOCKS}:UpDecoderBlock2D", UpForward, _BOTH),
        *(_UP, _block_sample, parts.block_check),
    ),
    units.rule(
        *("image_vae.mid_block", f"{_BLOCKS}:UNetMidBlock2D", MidForward, _BOTH),
        *(_MID, _block_sample, _mid_check),
    ),
)
