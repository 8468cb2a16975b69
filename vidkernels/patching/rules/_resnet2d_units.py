# SPDX-License-Identifier: Apache-2.0
"""diffusers' `ResnetBlock2D`, `Upsample2D`, `Downsample2D` and `Attention` inside fused blocks of VAEs.

These classes belong to UNets, too, where they take time embeddings: they have no rules of their own, whose refusals would
fill the report on every UNet. A block that is fused takes their layers, or calls them as they are.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import child_reason, note_fallback
from vidkernels.patching._match import digest
from vidkernels.patching._mechanism import Fused
from vidkernels.patching.rules import _frame_units as frames
from vidkernels.patching.rules import _vae_units as units

_ATTENTION = "diffusers.models.attention_processor"
_RESNET = "diffusers.models.resnet"
_PROCESSOR = "c0eb5d4e54dbafef"  # AttnProcessor2_0.__call__
RESNET = {"ResnetBlock2D.forward": "97a311e362b6eb42"}
UPSAMPLE = {"Upsample2D.forward": "c7358d9fd6b39bf9"}
DOWNSAMPLE = {"Downsample2D.forward": "1b498b94d12777eb"}
ATTENTION = {"Attention.forward": "b329f38beafa4c39"}


class FrameBlock(Fused):
    """What blocks of such modules share: a clip [B, C, T, H, W] in channels-last memory between all units."""

    def _called(self, module: Any, x: Tensor, **options: Any) -> Tensor:
        return frames.as_video(module(frames.as_frames(x), **options), x.shape[0])

    def _resnet(self, resnet: Any, x: Tensor) -> Tensor:
        reason = resnet_reason(resnet, self._vidkernels_home.ResnetBlock2D)
        if reason is not None:
            note_fallback(self, reason)
            return self._called(resnet, x, temb=None)
        y = frames.residual_block(self, resnet_layers(resnet), x)
        return y if resnet.output_scale_factor == 1 else y / resnet.output_scale_factor

    def _sampled(self, sampler: Any, x: Tensor, upwards: bool) -> Tensor:
        home = self._vidkernels_home
        reason = _sampler_reason(sampler, home.Upsample2D if upwards else home.Downsample2D, upwards)
        if reason is not None:
            note_fallback(self, reason)
            return self._called(sampler, x)
        return (frames.doubled if upwards else frames.halved)(self, sampler.conv, x)

    def _attended(self, attention: Any, x: Tensor) -> Tensor:
        """Attention over the positions of each frame."""
        reason = _attention_reason(attention)
        if reason is not None:
            note_fallback(self, reason)
            # it views [B*T, C, H, W] as contiguous
            return frames.as_video(attention(frames.as_frames(x).contiguous()), x.shape[0])
        layers = _attention_layers(attention)
        y = frames.attention(self, layers, x, attention.heads, attention.residual_connection)
        return y if attention.rescale_output_factor == 1 else y / attention.rescale_output_factor


class FrameNetwork(Fused):
    """What networks for frames share."""

    def _conv(self, conv: Any, x: Tensor) -> Tensor:
        reason = frames.conv_reason(conv)
        if reason is None:
            return frames.per_frame(self, conv, x)
        note_fallback(self, reason)
        return frames.as_video(conv(frames.as_frames(x)))

    def _block(self, block: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        recomputed = torch.is_grad_enabled() and self.gradient_checkpointing
        y: Tensor = self._gradient_checkpointing_func(block, x, *rest) if recomputed else block(x, *rest)
        return y

    def _end(self, x: Tensor) -> Tensor:
        """The last norm, SiLU and convolution of frames, as a clip."""
        reason = units.group_reason(self.conv_norm_out) or child_reason(self.conv_act, nn.SiLU)
        if reason is None:
            return self._conv(
                self.conv_out, units.group_normed(self, self.conv_norm_out, frames.as_video(x), per_frame=True)
            )
        note_fallback(self, reason)
        return self._conv(self.conv_out, frames.as_video(self.conv_act(self.conv_norm_out(x))))


def resnet_layers(resnet: Any) -> frames.ResidualLayers:
    """The layers of a `ResnetBlock2D`, or of a block with the same names."""
    convs = resnet.norm1, resnet.conv1, resnet.norm2, resnet.conv2
    return frames.ResidualLayers(*convs, resnet.conv_shortcut, resnet.dropout)


def resnet_reason(resnet: Any, cls: type) -> str | None:
    """Why a residual block must be called."""
    reason = child_reason(resnet, cls) or frames.residual_reason(resnet_layers(resnet))
    reason = reason or child_reason(resnet.nonlinearity, nn.SiLU)
    return reason or _options_reason(resnet)


def _options_reason(resnet: Any) -> str | None:
    extras = resnet.upsample, resnet.downsample, resnet.time_emb_proj
    if resnet.time_embedding_norm == "scale_shift" or any(extra is not None for extra in extras):
        return "a residual block resamples or takes a time embedding"
    return None


def _sampler_reason(sampler: Any, cls: type, upwards: bool) -> str | None:
    reason = child_reason(sampler, cls)
    if reason is None and (sampler.norm is not None or not sampler.use_conv or (not upwards and sampler.padding != 0)):
        reason = "a sampler has a norm, no convolution or symmetric padding"
    if reason is None and upwards and (sampler.name != "conv" or sampler.use_conv_transpose or not sampler.interpolate):
        reason = "an upsampler transposes a convolution or does not interpolate"
    if reason is not None:
        return reason
    return (frames.doubling_reason if upwards else frames.halving_reason)(sampler.conv)


def _attention_layers(attention: Any) -> frames.AttentionLayers:
    projections = attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]
    return frames.AttentionLayers(attention.group_norm, *projections)


def _attention_reason(attention: Any) -> str | None:
    home: Any = sys.modules[_ATTENTION]
    reason = child_reason(attention, home.Attention)
    if reason is None and type(attention.processor) is not home.AttnProcessor2_0:
        reason = f"an attention uses {type(attention.processor).__name__}"
    extras = ("spatial_norm", "norm_q", "norm_k", "norm_cross")
    if reason is None and any(getattr(attention, name, None) for name in extras):
        reason = "an attention has further norms"
    reason = reason or child_reason(attention.to_out[1], nn.Dropout)
    if reason is None and attention.to_out[1].training and attention.to_out[1].p > 0:
        reason = "an attention drops parts of its result"
    return reason or frames.attention_reason(_attention_layers(attention))


def resnet_check(resnet: Any) -> str | None:
    """Why a residual block can never be served."""
    home: Any = sys.modules[_RESNET]
    if not isinstance(resnet, home.ResnetBlock2D):
        return f"its residual blocks are of class {type(resnet).__name__}"
    return units.silu_check(resnet) or _options_reason(resnet)


def block_check(block: Any) -> str | None:
    """Why a block of such modules can never be served: each of its calls would run them as they are."""
    return next((reason for resnet in block.resnets if (reason := resnet_check(resnet)) is not None), None)


def processor_check(attentions: Any) -> str | None:
    """Why a block cannot stand in for the processor of its attentions, if it has any."""
    home: Any = sys.modules[_ATTENTION]
    found = digest(home.AttnProcessor2_0.__call__)
    known = found == _PROCESSOR or not any(attention is not None for attention in attentions)
    return None if known else f"AttnProcessor2_0.__call__ has digest {found}"
