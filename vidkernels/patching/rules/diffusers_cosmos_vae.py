# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' AutoencoderKLCosmos: factorized causal convolutions without padded copies, norm of each frame +
SiLU in one op, upsampling by phases, wavelets as matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching.rules import _cosmos_units
from vidkernels.patching.rules import _cosmos_wavelets as wavelets
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_memory import may_write, overwriting
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason

_FILE = "autoencoder_kl_cosmos"


def _padding(conv: Any) -> dict[str, Any]:
    mode = units.PAD_MODES[conv.pad_mode]
    space = {"spatial_padding": conv.spatial_pad, "spatial_padding_mode": mode}
    return {"time_padding": "replicate", "pad_frames": conv.temporal_pad, **space}


def convolve(owner: Any, conv: Any, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The convolution behind the repeated first frame and padding in space."""
    return units.convolve(owner, conv, x, residual, out, **_padding(conv))


def projected(
    owner: Any, projection: Any, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """A convolution in space, then one in time."""
    return convolve(owner, projection.conv_t, convolve(owner, projection.conv_s, x), residual, out)


class _Family(Fused):
    def _conv_reason(self, *convs: Any) -> str | None:
        for conv in convs:
            reason = child_reason(conv, self._vidkernels_home.CosmosCausalConv3d) or _conv_check(conv)
            if reason is not None:
                return reason
        return None

    def _projection_reason(self, projection: Any) -> str | None:
        reason = child_reason(projection, self._vidkernels_home.CosmosConvProjection3d)
        return reason or self._conv_reason(projection.conv_s, projection.conv_t)

    def _norm_reason(self, norm: Any) -> str | None:
        return child_reason(norm, self._vidkernels_home.CosmosCausalGroupNorm) or units.group_reason(norm.norm)

    def _normed(self, norm: Any, x: Tensor, activation: str | None = "silu") -> Tensor:
        return units.group_normed(self, norm.norm, x, activation, per_frame=norm.num_groups == 1)


class ConvForward(_Family):
    """`CosmosCausalConv3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W]."""
        return convolve(self, self, hidden_states)

    def _reason(self, hidden_states: Tensor) -> str | None:
        return video_reason(hidden_states) or _conv_check(self)


def _conv_check(conv: Any) -> str | None:
    if conv.pad_mode not in units.PAD_MODES or conv.temporal_pad < 0:
        return f"a convolution pads by mode {conv.pad_mode} and {conv.temporal_pad} frames"
    return units.options_reason(conv) or units.unpadded_reason(conv)


class BlockForward(_Family):
    """`CosmosResnetBlock3d.forward`."""

    def _reason(self, hidden_states: Tensor) -> str | None:
        reason = video_reason(hidden_states) or self._norm_reason(self.norm1) or self._projection_reason(self.conv1)
        reason = reason or self._norm_reason(self.norm2) or self._projection_reason(self.conv2)
        reason = reason or child_reason(self.dropout, nn.Dropout)
        if reason is None:
            plain = type(self.conv_shortcut) is nn.Identity
            reason = child_reason(self.conv_shortcut, nn.Identity) if plain else self._conv_reason(self.conv_shortcut)
        return reason

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, out_channels, T, H, W]."""
        x = channels_last(hidden_states)
        h = projected(self, self.conv1, self._normed(self.norm1, x))
        h = units.dropped(self.dropout, self._normed(self.norm2, h))
        plain = type(self.conv_shortcut) is nn.Identity
        shortcut = x if plain else convolve(self, self.conv_shortcut, x)
        out = x if plain and may_write(x) else None
        return restored(projected(self, self.conv2, h, shortcut, out), hidden_states)


class AttentionForward(_Family):
    """`CosmosCausalAttention.forward` with upstream's two processors."""

    def _reason(self, hidden_states: Tensor, attention_mask: Tensor | None) -> str | None:
        home = self._vidkernels_home
        known = home.CosmosSpatialAttentionProcessor2_0, home.CosmosTemporalAttentionProcessor2_0
        reason = video_reason(hidden_states, attention_mask) or self._norm_reason(self.norm)
        reason = reason or self._conv_reason(self.to_q, self.to_k, self.to_v, self.to_out[0])
        reason = reason or child_reason(self.to_out[1], nn.Dropout)
        if reason is None and type(self.processor) not in known:
            reason = f"it uses {type(self.processor).__name__}"
        return reason

    @guarded
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Over the positions of each frame, or over the frames of each position; plus the input."""
        x = channels_last(hidden_states)
        h = self._normed(self.norm, x, None)
        temporal = type(self.processor) is self._vidkernels_home.CosmosTemporalAttentionProcessor2_0
        parts = [convolve(self, conv, h) for conv in (self.to_q, self.to_k, self.to_v)]
        y = _cosmos_units.attended(parts, self.num_attention_heads, temporal, attention_mask)
        dropout = self.to_out[1]
        if dropout.training and dropout.p > 0:
            return restored(units.dropped(dropout, convolve(self, self.to_out[0], y)) + x, hidden_states)
        return restored(convolve(self, self.to_out[0], y, x), hidden_states)


class DownsampleForward(_Family):
    """`CosmosDownsample3d.forward`."""

    def _reason(self, hidden_states: Tensor) -> str | None:
        used = (self.spatial_downsample, self.conv1), (self.temporal_downsample, self.conv2), (True, self.conv3)
        reason = video_reason(hidden_states) or _samples_nothing(self)
        reason = reason or self._conv_reason(*(conv for on, conv in used if on))
        if reason is None and self.spatial_downsample and any(self.conv1.spatial_pad):
            reason = f"a convolution behind padded frames pads them by {self.conv1.spatial_pad}, too"
        return reason

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W] -> half the height and width, half the frames: convolutions plus means."""
        x = channels_last(hidden_states)
        if self.spatial_downsample:
            x = _cosmos_units.halved_in_space(self, self.conv1, _padding(self.conv1), x)
        if self.temporal_downsample:
            x = _cosmos_units.halved_in_time(self, self.conv2, _padding(self.conv2), x)
        return restored(convolve(self, self.conv3, x), hidden_states)


class UpsampleForward(_Family):
    """`CosmosUpsample3d.forward`."""

    def _reason(self, hidden_states: Tensor) -> str | None:
        used = (self.temporal_upsample, self.conv1), (self.spatial_upsample, self.conv2), (True, self.conv3)
        reason = video_reason(hidden_states) or _samples_nothing(self)
        return reason or self._conv_reason(*(conv for on, conv in used if on))

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W] -> 2 T - 1 frames, doubled height and width: repeated values plus their convolutions."""
        x = channels_last(hidden_states)
        if self.temporal_upsample:
            x = _cosmos_units.doubled_in_time(self, self.conv1, _padding(self.conv1), x)
        if self.spatial_upsample:
            x = _cosmos_units.doubled_in_space(self, self.conv2, _padding(self.conv2), x)
        return restored(convolve(self, self.conv3, x), hidden_states)


def _samples_nothing(module: Any) -> str | None:
    kinds = ("spatial_upsample", "temporal_upsample", "spatial_downsample", "temporal_downsample")
    return None if any(getattr(module, kind, False) for kind in kinds) else "it samples nothing"


class _Network(_Family):
    def _reason(self, hidden_states: Tensor, **rest: Any) -> str | None:
        reason = (
            video_reason(hidden_states)
            or self._projection_reason(self.conv_in)
            or self._projection_reason(self.conv_out)
        )
        return reason or self._norm_reason(self.norm_out)

    def _run(self, blocks: list[tuple[nn.Module, bool]], x: Tensor) -> Tensor:
        x = projected(self, self.conv_in, channels_last(x))
        with overwriting(self, x):
            for block, recomputable in blocks:
                recomputed = torch.is_grad_enabled() and self.gradient_checkpointing and recomputable
                x = self._gradient_checkpointing_func(block, x) if recomputed else block(x)
        return projected(self, self.conv_out, self._normed(self.norm_out, channels_last(x))).contiguous()


class EncoderForward(_Network):
    """`CosmosEncoder3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> latents."""
        blocks = [(block, True) for block in (*self.down_blocks, self.mid_block)]
        return self._run(blocks, self.patch_embed(hidden_states))


class DecoderForward(_Network):
    """`CosmosDecoder3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Latents [B, z, T, H, W] -> frames."""
        blocks = [(self.mid_block, False), *((block, True) for block in self.up_blocks)]
        frames: Tensor = self.unpatch_embed(self._run(blocks, hidden_states))
        return frames


class PatchForward(wavelets.Wavelet):
    """`CosmosPatchEmbed3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, p^3 C, 1 + (T - 1) / p, H / p, W / p]."""
        return self._apart(hidden_states)

    def _reason(self, hidden_states: Tensor) -> str | None:
        return self._call_reason(hidden_states)


class UnpatchForward(wavelets.Wavelet):
    """`CosmosUnpatcher3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, p^3 C, T, H, W] -> [B, C, 1 + p (T - 1), p H, p W]."""
        return self._together(hidden_states)

    def _reason(self, hidden_states: Tensor) -> str | None:
        return self._bands_reason(hidden_states)


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = next(p for p in module.parameters() if p.ndim == 5)
    return (units.like_parameters(module, 1, weight.shape[1], 3, 8, 8),), {}


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    side = module.patch_embed.patch_size
    channels = module.conv_in.conv_s.in_channels // side**3
    return (units.like_parameters(module, 1, channels, 1 + 2 * side, 8 * side, 8 * side),), {}


_CONV = {
    "CosmosCausalConv3d.__init__": "7bfcb7f88ea64163",
    "CosmosCausalConv3d.forward": "954fbc13eb3a7da4",
}
_NORM = _CONV | {
    "CosmosCausalGroupNorm.forward": "2544524085f239b7",
    "CosmosConvProjection3d.forward": "542c4b53b8f239d9",
}
_BLOCK = _NORM | {"CosmosResnetBlock3d.forward": "c8e279c87f3502b2"}
_ATTENTION = _NORM | {
    "CosmosCausalAttention.forward": "fae759437fc49aa3",
    "CosmosSpatialAttentionProcessor2_0.__call__": "a3aa228d27ee1e24",
    "CosmosTemporalAttentionProcessor2_0.__call__": "0b4bbf8bdddc7058",
}
_DOWN = _CONV | {"CosmosDownsample3d.forward": "fdf4a2ec9ed9ca28"}
_UP = _CONV | {"CosmosUpsample3d.forward": "12b694fb838a8baa"}
_ENCODER = _NORM | {"CosmosEncoder3d.forward": "d4b5b203cf692a9a"}
_DECODER = _NORM | {"CosmosDecoder3d.forward": "694bef96041ed96e"}
_PATCH = {
    "CosmosPatchEmbed3d.forward": "05c4c49b1913676b",
    "CosmosPatchEmbed3d._dwt": "c330ed35d8dcad7c",
    "CosmosPatchEmbed3d._haar": "0e9a4a4f36da222d",
}
_UNPATCH = {
    "CosmosUnpatcher3d.forward": "340c045132872b65",
    "CosmosUnpatcher3d._idwt": "a0e5fe26a1e1a34c",
    "CosmosUnpatcher3d._ihaar": "9aa898d115b9945d",
}
_BOTH, _ONE = "causal_conv3d group_norm", "causal_conv3d"

RULES = (
    units.rule("cosmos_vae.encoder", f"{_FILE}:CosmosEncoder3d", EncoderForward, _BOTH, _ENCODER, _encoder_sample),
    units.rule("cosmos_vae.decoder", f"{_FILE}:CosmosDecoder3d", DecoderForward, _BOTH, _DECODER, _sample),
    units.rule("cosmos_vae.resnet", f"{_FILE}:CosmosResnetBlock3d", BlockForward, _BOTH, _BLOCK, _sample),
    units.rule("cosmos_vae.attention", f"{_FILE}:CosmosCausalAttention", AttentionForward, _BOTH, _ATTENTION, _sample),
    units.rule(
        *("cosmos_vae.downsample", f"{_FILE}:CosmosDownsample3d", DownsampleForward, _ONE, _DOWN, _sample),
        _samples_nothing,
    ),
    units.rule(
        *("cosmos_vae.upsample", f"{_FILE}:CosmosUpsample3d", UpsampleForward, _ONE, _UP, _sample), _samples_nothing
    ),
    units.rule(
        *("cosmos_vae.patch", f"{_FILE}:CosmosPatchEmbed3d", PatchForward, _ONE, _PATCH, wavelets.clip_sample),
        wavelets.check,
    ),
    units.rule(
        *("cosmos_vae.unpatch", f"{_FILE}:CosmosUnpatcher3d", UnpatchForward, _ONE, _UNPATCH, wavelets.clip_bands),
        wavelets.check,
    ),
    units.rule("cosmos_vae.conv", f"{_FILE}:CosmosCausalConv3d", ConvForward, _ONE, _CONV, _sample, _conv_check),
)
