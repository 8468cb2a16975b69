# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' AutoencoderKLCogVideoX: cached frames without concatenation, conditioned norms on latents that
are never upsampled, nearest-up + convolution by phases. `conv_cache` keeps upstream's keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching.rules import _cogvideox_units as cog
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._frame_units import doubling_reason, halving_reason
from vidkernels.patching.rules._vae_memory import may_write, overwriting
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason

_FILE = "autoencoder_kl_cogvideox"
Caches = dict[str, Any] | None


class ConvForward(Fused):
    """`CogVideoXCausalConv3d.forward`."""

    @guarded
    def forward(self, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, C, T, H, W] -> (result, frames for the next chunk)."""
        return cog.causal(self, self, inputs, conv_cache)

    def _reason(self, inputs: Tensor, conv_cache: Tensor | None) -> str | None:
        kernel = self._vidkernels_home.CogVideoXSafeConv3d
        reason = video_reason(inputs, conv_cache) or units.kernel_reason(self._modules["conv"], kernel)
        return reason or cog.padding_reason(self)


class NormForward(Fused):
    """`CogVideoXSpatialNorm3D.forward`."""

    @guarded
    def forward(self, f: Tensor, zq: Tensor, conv_cache: Caches = None) -> tuple[Tensor, dict[str, Any]]:
        """f normalized and modulated by the latents zq."""
        y = cog.spatial_normed(self, self, channels_last(f), channels_last(zq), silu=False)
        return restored(y, f), _norm_caches(zq)

    def _reason(self, f: Tensor, zq: Tensor, **rest: Any) -> str | None:
        reason = video_reason(f, zq) or cog.spatial_norm_reason(self, self._vidkernels_home)
        return reason or cog.scale_reason(f, zq)


def _norm_caches(zq: Tensor) -> dict[str, Any]:
    none = zq.new_empty((*zq.shape[:2], 0, *zq.shape[3:]))
    return {"conv_y": none, "conv_b": none}


class BlockForward(Fused):
    """`CogVideoXResnetBlock3D.forward`."""

    def _reason(self, inputs: Tensor, temb: Tensor | None, zq: Tensor | None, **rest: Any) -> str | None:
        home, parts = self._vidkernels_home, self._modules
        norm1, norm2 = parts["norm1"], parts["norm2"]
        reason = video_reason(inputs, zq) or cog.conv_reason(parts["conv1"], home)
        reason = reason or cog.conv_reason(parts["conv2"], home)
        reason = reason or child_reason(parts["nonlinearity"], nn.SiLU) or child_reason(parts["dropout"], nn.Dropout)
        if zq is None:
            reason = reason or units.group_reason(norm1, norm2)
        else:
            reason = reason or cog.spatial_norm_reason(norm1, home) or cog.spatial_norm_reason(norm2, home)
            reason = reason or cog.scale_reason(inputs, zq)
        if reason is None and self.in_channels != self.out_channels:
            shortcut = self.conv_shortcut
            wide = self.use_conv_shortcut
            reason = (
                cog.conv_reason(shortcut, home) if wide else units.kernel_reason(shortcut, home.CogVideoXSafeConv3d)
            )
        return reason or (None if temb is None else "a time embedding is given")

    def _normed(self, name: str, x: Tensor, zq: Tensor | None, kept: dict[str, Any]) -> Tensor:
        norm = self._modules[name]
        if zq is None:
            return units.group_normed(self, norm, x)
        kept[name] = _norm_caches(zq)
        return cog.spatial_normed(self, norm, x, zq)

    @guarded
    def forward(
        self, inputs: Tensor, temb: Tensor | None = None, zq: Tensor | None = None, conv_cache: Caches = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """[B, C, T, H, W] -> (result, caches)."""
        before = conv_cache or {}
        kept: dict[str, Any] = {}
        x = channels_last(inputs)
        zq = None if zq is None else channels_last(zq)
        h, kept["conv1"] = cog.causal(self, self.conv1, self._normed("norm1", x, zq, kept), before.get("conv1"))
        h = units.dropped(self.dropout, self._normed("norm2", h, zq, kept))
        out = x if self.in_channels == self.out_channels and may_write(x) else None
        if self.in_channels != self.out_channels:
            if self.use_conv_shortcut:
                x, kept["conv_shortcut"] = cog.causal(self, self.conv_shortcut, x, before.get("conv_shortcut"))
            else:
                x = units.pointwise(self, self.conv_shortcut, x)
        y, kept["conv2"] = cog.causal(self, self.conv2, h, before.get("conv2"), x, out)
        return restored(y, inputs), kept


class UpsampleForward(Fused):
    """`CogVideoXUpsample3D.forward`."""

    @guarded
    def forward(self, inputs: Tensor) -> Tensor:
        """[B, C, T, H, W] -> height and width doubled; with `compress_time` frames too, but not an odd first one."""
        y = units.doubled_in_space(self, self.conv, channels_last(inputs))
        frames = inputs.shape[2]
        if self.compress_time and frames > 1:  # equal frames have equal convolutions
            y = channels_last(units.as_clip(units.as_rows(y).repeat_interleave(2, 1)[:, frames % 2 :]))
        return restored(y, inputs)

    def _reason(self, inputs: Tensor) -> str | None:
        return video_reason(inputs) or doubling_reason(self.conv)


class DownsampleForward(Fused):
    """`CogVideoXDownsample3D.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> height and width halved; with `compress_time` frames too, but not an odd first one."""
        y = channels_last(x)
        if self.compress_time:
            odd = x.shape[2] % 2
            pooled = (y[:, :, odd::2] + y[:, :, odd + 1 :: 2]) / 2
            y = channels_last(torch.cat([y[:, :, :1], pooled], 2) if odd else pooled)
        return restored(units.halved_in_space(self, self.conv, y), x)

    def _reason(self, x: Tensor) -> str | None:
        return video_reason(x) or halving_reason(self.conv)


def _sampler_check(stride: int, padding: int) -> Any:
    def check(module: Any) -> str | None:
        conv = module.conv
        found = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        return None if found == ((3, 3), (stride,) * 2, (padding,) * 2, (1, 1)) else f"its convolution is {found}"

    return check


class _Network(Fused):
    def _network_reason(self, x: Tensor, norm_reason: str | None) -> str | None:
        home = self._vidkernels_home
        reason = video_reason(x) or cog.conv_reason(self.conv_in, home) or cog.conv_reason(self.conv_out, home)
        return reason or norm_reason or child_reason(self.conv_act, nn.SiLU)

    def _run(
        self, blocks: dict[str, Any], x: Tensor, temb: Tensor | None, zq: Tensor | None, before: Any, kept: Any
    ) -> Tensor:
        x, kept["conv_in"] = cog.causal(self, self.conv_in, x, before.get("conv_in"))
        with overwriting(self, x):
            for name, block in blocks.items():
                given = x, temb, zq, before.get(name)
                recomputed = torch.is_grad_enabled() and self.gradient_checkpointing
                x, kept[name] = self._gradient_checkpointing_func(block, *given) if recomputed else block(*given)
        return channels_last(x)

    def _end(self, x: Tensor, before: Any, kept: Any) -> tuple[Tensor, dict[str, Any]]:
        y, kept["conv_out"] = cog.causal(self, self.conv_out, x, before.get("conv_out"))
        return y.contiguous(), kept


class EncoderForward(_Network):
    """`CogVideoXEncoder3D.forward`."""

    @guarded
    def forward(
        self, sample: Tensor, temb: Tensor | None = None, conv_cache: Caches = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """[B, 3, T, H, W] -> (moments, caches)."""
        before = conv_cache or {}
        kept: dict[str, Any] = {}
        blocks = {f"down_block_{i}": block for i, block in enumerate(self.down_blocks)} | {"mid_block": self.mid_block}
        h = self._run(blocks, channels_last(sample), temb, None, before, kept)
        return self._end(units.group_normed(self, self.norm_out, h), before, kept)

    def _reason(self, sample: Tensor, **rest: Any) -> str | None:
        return self._network_reason(sample, units.group_reason(self.norm_out))


class DecoderForward(_Network):
    """`CogVideoXDecoder3D.forward`."""

    @guarded
    def forward(
        self, sample: Tensor, temb: Tensor | None = None, conv_cache: Caches = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Latents [B, z, T, H, W] -> (frames, caches)."""
        before = conv_cache or {}
        kept: dict[str, Any] = {}
        blocks = {"mid_block": self.mid_block} | {f"up_block_{i}": block for i, block in enumerate(self.up_blocks)}
        zq = channels_last(sample)
        h = self._run(blocks, zq, temb, zq, before, kept)
        kept["norm_out"] = _norm_caches(zq)
        return self._end(cog.spatial_normed(self, self.norm_out, h, zq), before, kept)

    def _reason(self, sample: Tensor, **rest: Any) -> str | None:
        return self._network_reason(sample, cog.spatial_norm_reason(self.norm_out, self._vidkernels_home))


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = next(p for p in module.parameters() if p.ndim >= 4)
    return (units.like_parameters(module, 1, weight.shape[1], 5, 8, 8),), {}


def _block_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = units.like_parameters(module, 1, module.in_channels, 5, 8, 8)
    if module.spatial_norm_dim is None:
        return (x,), {}
    return (x, None, units.like_parameters(module, 1, module.spatial_norm_dim, 3, 4, 4)), {}


def _norm_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    f = units.like_parameters(module, 1, module.norm_layer.num_channels, 5, 8, 8)
    return (f, units.like_parameters(module, 1, module.conv_y.conv.in_channels, 3, 4, 4)), {}


def _network_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    side = 4 if hasattr(module, "up_blocks") else 16
    return (units.like_parameters(module, 1, module.conv_in.conv.in_channels, 3, side, side),), {}


_CONV = {
    "CogVideoXSafeConv3d.forward": "77a4eae21db5e8c3",
    "CogVideoXCausalConv3d.__init__": "44c1f912f27b0a71",
    "CogVideoXCausalConv3d.forward": "7f3183ee6cf1d355",
    "CogVideoXCausalConv3d.fake_context_parallel_forward": "b6996fbd6930356c",
}
_NORM = _CONV | {"CogVideoXSpatialNorm3D.forward": "1c00f3afa41971cb"}
_BLOCK = _NORM | {"CogVideoXResnetBlock3D.forward": "38f17e8257b926bd"}
_ENCODER = _CONV | {"CogVideoXEncoder3D.forward": "6a27c130c9bbca19"}
_DECODER = _NORM | {"CogVideoXDecoder3D.forward": "ecfa3516ec514125"}
_UP = {"CogVideoXUpsample3D.forward": "51fdc421ddaa7d04"}
_DOWN = {"CogVideoXDownsample3D.forward": "fa9f413095d10e99"}
_BOTH = "causal_conv3d group_norm"
_ONE = "causal_conv3d"
_SAMPLERS = "models.upsampling:CogVideoXUpsample3D", "models.downsampling:CogVideoXDownsample3D"


def _first(returned: tuple[Tensor, Any]) -> Tensor:
    return returned[0]


_CACHED: dict[str, Any] = {"result": _first}  # its second result are caches; those of one tap hold nothing here

RULES = (
    units.rule(
        "cogvideox_vae.encoder", f"{_FILE}:CogVideoXEncoder3D", EncoderForward, _BOTH, _ENCODER, _network_sample
    ),
    units.rule(
        *("cogvideox_vae.decoder", f"{_FILE}:CogVideoXDecoder3D", DecoderForward, _BOTH, _DECODER, _network_sample),
        **_CACHED,
    ),
    units.rule(
        *("cogvideox_vae.resnet", f"{_FILE}:CogVideoXResnetBlock3D", BlockForward, _BOTH, _BLOCK, _block_sample),
        **_CACHED,
    ),
    units.rule(
        *("cogvideox_vae.norm", f"{_FILE}:CogVideoXSpatialNorm3D", NormForward, _BOTH, _NORM, _norm_sample), **_CACHED
    ),
    units.rule("cogvideox_vae.upsample", _SAMPLERS[0], UpsampleForward, _ONE, _UP, _sample, _sampler_check(1, 1)),
    units.rule("cogvideox_vae.downsample", _SAMPLERS[1], DownsampleForward, _ONE, _DOWN, _sample, _sampler_check(2, 0)),
    units.rule(
        *(
            "cogvideox_vae.conv",
            f"{_FILE}:CogVideoXCausalConv3d",
            ConvForward,
            _ONE,
            _CONV,
            _sample,
            cog.padding_reason,
        ),
        **_CACHED,
    ),
)
