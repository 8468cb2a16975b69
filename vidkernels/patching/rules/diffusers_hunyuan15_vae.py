# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' AutoencoderKLHunyuanVideo15: replicated borders as coordinates, norm + SiLU in one pass, pixel
shuffles in one copy, causal attention frame by frame: the original fills its N x N mask row by row in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels._tracing import constant_while_tracing
from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_memory import may_write, overwriting
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason
from vidkernels.patching.rules.diffusers_hunyuan_vae import ConvForward, padded, padding_check

_FILE = "autoencoder_kl_hunyuanvideo15"


class _Family(Fused):
    def _conv_reason(self, conv: Any) -> str | None:
        return units.padded_reason(conv, self._vidkernels_home.HunyuanVideo15CausalConv3d)

    def _norm_reason(self, norm: Any) -> str | None:
        return units.rms_reason(norm, self._vidkernels_home.HunyuanVideo15RMS_norm)


class BlockForward(_Family):
    """`HunyuanVideo15ResnetBlock.forward`."""

    def _reason(self, hidden_states: Tensor) -> str | None:
        reason = video_reason(hidden_states) or self._norm_reason(self.norm1) or self._conv_reason(self.conv1)
        reason = reason or self._norm_reason(self.norm2) or self._conv_reason(self.conv2)
        reason = reason or child_reason(self.nonlinearity, nn.SiLU)
        return reason or (None if self.conv_shortcut is None else units.kernel_reason(self.conv_shortcut, nn.Conv3d))

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, out_channels, T, H, W]."""
        x = channels_last(hidden_states)
        h = padded(self, self.conv1, units.rms_normed(self, self.norm1, x))
        shortcut = x if self.conv_shortcut is None else units.pointwise(self, self.conv_shortcut, x)
        out = x if self.conv_shortcut is None and may_write(x) else None
        y = padded(self, self.conv2, units.rms_normed(self, self.norm2, h), shortcut, out)
        return restored(y, hidden_states)


class AttentionForward(_Family):
    """`HunyuanVideo15AttnBlock.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W]; one head, causal over frames."""
        identity = channels_last(x)
        h = units.rms_normed(self, self.norm, identity, None)
        convs = self.to_q, self.to_k, self.to_v
        rows = [units.as_rows(units.pointwise(self, conv, h)).flatten(1, 3).unsqueeze(1) for conv in convs]
        mixed = units.causal_frame_attention(rows[0], rows[1], rows[2], x.shape[3] * x.shape[4])
        clip = units.as_clip(mixed.squeeze(1).unflatten(1, x.shape[2:]))
        return restored(units.pointwise(self, self.proj_out, channels_last(clip), identity), x)

    def _reason(self, x: Tensor) -> str | None:
        reason = video_reason(x) or self._norm_reason(self.norm)
        for conv in (self.to_q, self.to_k, self.to_v, self.proj_out):
            reason = reason or units.kernel_reason(conv, nn.Conv3d)
        return reason


@constant_while_tracing
def _is_set(flag: Any) -> bool:
    """A flag of a sampler: upstream stores NumPy's booleans, on which Dynamo cannot branch. It takes the flag, not the
    sampler: torch 2.11's Dynamo hands over values only, no modules."""
    return bool(flag)


class UpsampleForward(_Family):
    """`HunyuanVideo15Upsample.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, out, 2 T - 1 or T, 2 H, 2 W]: channels as boxes, plus repeated channels of the input."""
        clip = channels_last(x)
        h = padded(self, self.conv, clip)
        if not _is_set(self.add_temporal_upsample):
            return restored(_up(h, 1) + _repeated(_up(clip, 1), self.repeats), x)
        # The first frame stands alone: of the two that its channels hold, the first one is kept.
        first = _up(h[:, :, :1], 1)
        first = first[:, : first.shape[1] // 2] + _repeated(_up(clip[:, :, :1], 1), self.repeats // 2)
        rest = _up(h[:, :, 1:], 2) + _repeated(_up(clip[:, :, 1:], 2), self.repeats)
        return restored(channels_last(torch.cat([first, rest], 2)), x)

    def _reason(self, x: Tensor) -> str | None:
        return video_reason(x) or self._conv_reason(self.conv)


def _up(x: Tensor, frames: int) -> Tensor:
    return units.from_channels(x, (frames, 2, 2), box_first=True)


def _down(x: Tensor, frames: int) -> Tensor:
    return units.to_channels(x, (frames, 2, 2), box_first=True)


def _repeated(x: Tensor, times: int) -> Tensor:
    return units.as_clip(units.as_rows(x).repeat_interleave(times, -1)) if times > 1 else x


def _means(x: Tensor, channels: int) -> Tensor:
    return units.as_clip(units.as_rows(x).unflatten(-1, (channels, -1)).mean(-1))


class DownsampleForward(_Family):
    """`HunyuanVideo15Downsample.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> boxes as channels, plus means over groups of the input's: the first frame stands alone."""
        clip = channels_last(x)
        h = padded(self, self.conv, clip)
        if not _is_set(self.add_temporal_downsample):
            y = _down(h, 1)
            return restored(y + _means(_down(clip, 1), y.shape[1]), x)
        first = _down(h[:, :, :1], 1)
        first = torch.cat([first, first], 1)
        channels = first.shape[1]
        first = first + _means(_down(clip[:, :, :1], 1), channels)
        rest = _down(h[:, :, 1:], 2) + _means(_down(clip[:, :, 1:], 2), channels)
        return restored(channels_last(torch.cat([first, rest], 2)), x)

    def _reason(self, x: Tensor) -> str | None:
        return video_reason(x) or self._conv_reason(self.conv)


class _Network(_Family):
    def _reason(self, hidden_states: Tensor, **rest: Any) -> str | None:
        reason = video_reason(hidden_states) or self._conv_reason(self.conv_in) or self._conv_reason(self.conv_out)
        return reason or self._norm_reason(self.norm_out) or child_reason(self.conv_act, nn.SiLU)

    def _run(self, blocks: list[nn.Module], x: Tensor) -> Tensor:
        with overwriting(self, x):
            for block in blocks:
                recomputed = torch.is_grad_enabled() and self.gradient_checkpointing
                x = self._gradient_checkpointing_func(block, x) if recomputed else block(x)
        return channels_last(x)

    def _end(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return padded(self, self.conv_out, units.rms_normed(self, self.norm_out, x), residual).contiguous()


class EncoderForward(_Network):
    """`HunyuanVideo15Encoder3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> moments, plus means over groups of channels."""
        x = padded(self, self.conv_in, channels_last(hidden_states))
        x = self._run([*self.down_blocks, self.mid_block], x)
        return self._end(x, channels_last(_means(x, x.shape[1] // self.group_size)))


class DecoderForward(_Network):
    """`HunyuanVideo15Decoder3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Latents [B, z, T, H, W] -> frames; the latents' channels are repeated as a shortcut."""
        z = channels_last(hidden_states)
        x = padded(self, self.conv_in, z, _repeated(z, self.repeat))
        return self._end(self._run([self.mid_block, *self.up_blocks], x))


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = next(p for p in module.parameters() if p.ndim == 5)
    return (units.like_parameters(module, 1, weight.shape[1], 3, 8, 8),), {}


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 1, module.in_channels, 5, 32, 32),), {}


_CONV = {
    "HunyuanVideo15CausalConv3d.__init__": "9a893b3b56809af9",
    "HunyuanVideo15CausalConv3d.forward": "127bae6ff43c0e34",
}
_RMS = {
    "HunyuanVideo15RMS_norm.__init__": "17913286caba9a38",
    "HunyuanVideo15RMS_norm.forward": "26957f57a59329b9",
}
_BLOCK = _CONV | _RMS | {"HunyuanVideo15ResnetBlock.forward": "35c91267f6a56f7c"}
_ATTENTION = _RMS | {
    "HunyuanVideo15AttnBlock.forward": "51633e85e1ee319e",
    "HunyuanVideo15AttnBlock.prepare_causal_attention_mask": "38c946e91a502c9f",
}
_UP = _CONV | {
    "HunyuanVideo15Upsample.forward": "b4a38a25e517e274",
    "HunyuanVideo15Upsample._dcae_upsample_rearrange": "2f6430a645bb8ce4",
}
_DOWN = _CONV | {
    "HunyuanVideo15Downsample.forward": "bb5de60b06038c2b",
    "HunyuanVideo15Downsample._dcae_downsample_rearrange": "99cd95cb748e3573",
}
_ENCODER = _CONV | _RMS | {"HunyuanVideo15Encoder3D.forward": "04bba5efad431eae"}
_DECODER = _CONV | _RMS | {"HunyuanVideo15Decoder3D.forward": "af11596de46308ed"}
_BOTH, _ONE = "causal_conv3d channel_norm", "causal_conv3d"
_NAME, _PREFIX = "hunyuan15_vae", f"{_FILE}:HunyuanVideo15"

RULES = (
    units.rule(f"{_NAME}.encoder", f"{_PREFIX}Encoder3D", EncoderForward, _BOTH, _ENCODER, _encoder_sample),
    units.rule(f"{_NAME}.decoder", f"{_PREFIX}Decoder3D", DecoderForward, _BOTH, _DECODER, _sample),
    units.rule(f"{_NAME}.resnet", f"{_PREFIX}ResnetBlock", BlockForward, _BOTH, _BLOCK, _sample),
    units.rule(f"{_NAME}.attention", f"{_PREFIX}AttnBlock", AttentionForward, _BOTH, _ATTENTION, _sample),
    units.rule(f"{_NAME}.upsample", f"{_PREFIX}Upsample", UpsampleForward, _ONE, _UP, _sample),
    units.rule(f"{_NAME}.downsample", f"{_PREFIX}Downsample", DownsampleForward, _ONE, _DOWN, _sample),
    units.rule(f"{_NAME}.conv", f"{_PREFIX}CausalConv3d", ConvForward, _ONE, _CONV, _sample, padding_check),
)
