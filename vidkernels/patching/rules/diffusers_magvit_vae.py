# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' AutoencoderKLMagvit (EasyAnimate): a causal convolution runs on all its frames at once, where
the original pads, concatenates, and convolves frame by frame; norm + SiLU in one op, nearest-up + convolution by phases.

`prev_features` of a convolution keeps upstream's two frames. An upsampler's, which is asked only whether it is there,
keeps none."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_memory import may_write, overwriting
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason

_FILE = "autoencoder_kl_magvit"


def causal(
    owner: Any,
    conv: Any,
    x: Tensor,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    behind: tuple[int, int] = (0, 0),
) -> Tensor:
    """The convolution behind the frames of an earlier chunk, or behind its first frame repeated.

    Its cache takes the last two frames for the next chunk, as upstream with the zeros that upstream has written `behind`
    the rows and columns.
    """
    top, left = conv.padding[1:]
    options: dict[str, Any] = {"spatial_padding": (left, left + behind[1], top, top + behind[0])}
    before = conv.prev_features
    if before is None:
        oldest = x[:, :, :1].expand(-1, -1, 2, -1, -1)
        options |= {"time_padding": "replicate", "pad_frames": 2}
    else:
        oldest = channels_last(before[..., : x.shape[3], : x.shape[4]]).to(x)
        options |= {"time_padding": "history", "history": oldest[:, :, -1:] if conv.t_stride == 2 else oldest}
    kept = units.last_frames(x, oldest, 2)
    conv.prev_features = F.pad(kept, (0, behind[1], 0, behind[0])) if any(behind) else kept
    return units.convolve(owner, conv, x, residual, out, **options)


def _temporal_reason(conv: Any) -> str | None:
    fits = conv.temporal_padding == 2 and conv.kernel_size[0] == 3 and conv.t_stride in (1, 2)
    if not fits:
        return f"its {conv.kernel_size[0]} taps in time have stride {conv.t_stride}"
    return units.unpadded_reason(conv, 1)


class _Family(Fused):
    def _conv_reason(self, conv: Any) -> str | None:
        reason = units.kernel_reason(conv, self._vidkernels_home.EasyAnimateCausalConv3d)
        return reason or _temporal_reason(conv)

    def _normed(self, norm: Any, x: Tensor) -> Tensor:
        return units.group_normed(self, norm, x, per_frame=self.spatial_group_norm)


class ConvForward(_Family):
    """`EasyAnimateCausalConv3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W]; the next call goes on behind this one's frames."""
        return causal(self, self, hidden_states)

    def _reason(self, hidden_states: Tensor) -> str | None:
        return video_reason(hidden_states) or _conv_check(self)


def _conv_check(module: Any) -> str | None:
    return units.options_reason(module) or _temporal_reason(module)


class BlockForward(_Family):
    """`EasyAnimateResidualBlock3D.forward`."""

    def _reason(self, hidden_states: Tensor) -> str | None:
        reason = (
            video_reason(hidden_states) or units.group_reason(self.norm1, self.norm2) or self._conv_reason(self.conv1)
        )
        reason = reason or self._conv_reason(self.conv2) or child_reason(self.nonlinearity, nn.SiLU)
        reason = reason or child_reason(self.dropout, nn.Dropout)
        plain = type(self.shortcut) is nn.Identity
        check = child_reason if plain else units.kernel_reason
        return reason or check(self.shortcut, nn.Identity if plain else nn.Conv3d)

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, out_channels, T, H, W]."""
        x = channels_last(hidden_states)
        h = causal(self, self.conv1, self._normed(self.norm1, x))
        h = units.dropped(self.dropout, self._normed(self.norm2, h))
        plain = type(self.shortcut) is nn.Identity
        shortcut = x if plain else units.pointwise(self, self.shortcut, x)
        y = causal(self, self.conv2, h, shortcut, x if plain and may_write(x) else None)
        return restored(y if self.output_scale_factor == 1 else y / self.output_scale_factor, hidden_states)


class DownsampleForward(_Family):
    """`EasyAnimateDownsampler3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Stride 2 in space behind one zero row below and one zero column to the right, and 1 or 2 in time."""
        return restored(causal(self, self.conv, channels_last(hidden_states), behind=(1, 1)), hidden_states)

    def _reason(self, hidden_states: Tensor) -> str | None:
        return video_reason(hidden_states) or self._conv_reason(self.conv)


class UpsampleForward(_Family):
    """`EasyAnimateUpsampler3D.forward`."""

    prev_features: Tensor | None

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Height and width doubled; behind the first chunk frames too, if `temporal_upsample`."""
        y = self._doubled_in_space(channels_last(hidden_states))
        if self.temporal_upsample:
            if self.prev_features is None:
                self.prev_features = y[:, :, :0].clone()
            elif self.spatial_group_norm:
                y = units.as_clip(units.as_rows(y).repeat_interleave(2, 1))
            else:
                y = channels_last(F.interpolate(y, scale_factor=(2, 1, 1), mode="trilinear"))
        return restored(y, hidden_states)

    def _reason(self, hidden_states: Tensor) -> str | None:
        conv = self.conv
        reason = video_reason(hidden_states) or self._conv_reason(conv)
        if reason is None and (conv.stride != (1, 1, 1) or conv.dilation != (1, 1, 1)):
            reason = f"its convolution has stride {conv.stride} and dilation {conv.dilation}"
        return reason

    def _doubled_in_space(self, x: Tensor) -> Tensor:
        """Nearest doubling and convolution. The convolution's cache holds doubled frames, as upstream's."""
        conv, before = self.conv, self.conv.prev_features
        options: dict[str, Any] = {"spatial_padding": conv.padding[1:], "pad_frames": 2, "time_padding": "replicate"}
        if before is None:
            kept = units.last_frames(x, x[:, :, :1].expand(-1, -1, 2, -1, -1), 2)
        else:
            small = channels_last(before[..., ::2, ::2]).to(x)
            options |= {"history": small, "start": small.shape[2]}
            kept = units.last_frames(x, small, 2)
        conv.prev_features = units.as_clip(units.as_rows(kept).repeat_interleave(2, 2).repeat_interleave(2, 3))
        backend = self._vidkernels_backend("causal_conv3d")
        y: Tensor = ops.upsample_conv3d(x, conv.weight, conv.bias, scale=(1, 2, 2), backend=backend, **options)
        return y


class _Network(_Family):
    def _reason(self, hidden_states: Tensor, **rest: Any) -> str | None:
        reason = video_reason(hidden_states) or self._conv_reason(self.conv_in) or self._conv_reason(self.conv_out)
        return reason or units.group_reason(self.conv_norm_out) or child_reason(self.conv_act, nn.SiLU)

    def _run(self, blocks: list[tuple[nn.Module, bool]], x: Tensor) -> Tensor:
        x = causal(self, self.conv_in, channels_last(x))
        with overwriting(self, x):
            for block, recomputable in blocks:
                recomputed = torch.is_grad_enabled() and self.gradient_checkpointing and recomputable
                x = self._gradient_checkpointing_func(block, x) if recomputed else block(x)
        return causal(self, self.conv_out, self._normed(self.conv_norm_out, channels_last(x))).contiguous()


class EncoderForward(_Network):
    """`EasyAnimateEncoder.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> moments; one frame first, then chunks of four."""
        blocks = [*((block, True) for block in self.down_blocks), (self.mid_block, False)]
        return self._run(blocks, hidden_states)


class DecoderForward(_Network):
    """`EasyAnimateDecoder.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Latents [B, z, T, H, W] -> frames."""
        return self._run([(block, True) for block in (self.mid_block, *self.up_blocks)], hidden_states)


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = next(p for p in module.parameters() if p.ndim == 5)
    return (units.like_parameters(module, 1, weight.shape[1], 3, 8, 8),), {}


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 1, module.conv_in.in_channels, 5, 32, 32),), {}


_CONV = {
    "EasyAnimateCausalConv3d.__init__": "e56f5d4221cf1f04",
    "EasyAnimateCausalConv3d.forward": "c24822516a485ff7",
    "EasyAnimateCausalConv3d._clear_conv_cache": "048287b2c5b023be",
}
_BLOCK = _CONV | {"EasyAnimateResidualBlock3D.forward": "1bddb31bea33de45"}
_DOWN = _CONV | {"EasyAnimateDownsampler3D.forward": "e39652af4d06ac9b"}
_UP = _CONV | {
    "EasyAnimateUpsampler3D.forward": "1371f01889f5af3b",
    "EasyAnimateUpsampler3D._clear_conv_cache": "048287b2c5b023be",
}
_ENCODER = _CONV | {"EasyAnimateEncoder.forward": "628172c515dfadc7"}
_DECODER = _CONV | {"EasyAnimateDecoder.forward": "010a05e066d063c9"}
_BOTH, _ONE = "causal_conv3d group_norm", "causal_conv3d"

RULES = (
    units.rule("magvit_vae.encoder", f"{_FILE}:EasyAnimateEncoder", EncoderForward, _BOTH, _ENCODER, _encoder_sample),
    units.rule("magvit_vae.decoder", f"{_FILE}:EasyAnimateDecoder", DecoderForward, _BOTH, _DECODER, _sample),
    units.rule("magvit_vae.resnet", f"{_FILE}:EasyAnimateResidualBlock3D", BlockForward, _BOTH, _BLOCK, _sample),
    units.rule("magvit_vae.downsample", f"{_FILE}:EasyAnimateDownsampler3D", DownsampleForward, _ONE, _DOWN, _sample),
    units.rule("magvit_vae.upsample", f"{_FILE}:EasyAnimateUpsampler3D", UpsampleForward, _ONE, _UP, _sample),
    units.rule("magvit_vae.conv", f"{_FILE}:EasyAnimateCausalConv3d", ConvForward, _ONE, _CONV, _sample, _conv_check),
)
