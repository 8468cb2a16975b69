# SPDX-License-Identifier: Apache-2.0
"""Rules for the VAE of Open-Sora 1.3 (`vae_v1_3`, an asymmetric MAGVIT-v2) and copies of it, found by the digests of their methods.

Upstream's blocks write over their inputs unless they are told `is_training`; ours do where nobody else reads them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._opensora_plan_units import framewise_check
from vidkernels.patching.rules._vae_memory import may_write, overwriting
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason
from vidkernels.patching.rules.diffusers_hunyuan_vae import padded

# What `video_to_image` calls for frames.
_INNER: dict[str, tuple[str, ...]] = {"Downsample2D": ("fce3431c3ffe3012",), "Upsample2D": ("fc9753812bf3821f",)}


def _zeros_reason(conv: Any) -> str | None:
    """A padding that differs with the length of the clip, or is not zeros."""
    return units.padding_reason(conv) if conv.pad_mode == "constant" else f"a convolution pads by mode {conv.pad_mode}"


def _convs_reason(home: Any, *convs: Any) -> str | None:
    """Why causal convolutions must be called."""
    for conv in convs:
        reason = units.wrapped_reason(conv, home.CausalConv3dPlainAR, nn.Conv3d) or _zeros_reason(conv)
        if reason is not None:
            return reason
    return None


class ConvForward(Fused):
    """`CausalConv3dPlainAR.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, K, T', H', W']."""
        return padded(self, self, x)

    def _reason(self, x: Tensor) -> str | None:
        return video_reason(x) or units.kernel_reason(self.conv, nn.Conv3d) or _zeros_reason(self)


class BlockForward(Fused):
    """`Resnet3DBlock.forward`."""

    @guarded
    def forward(self, x: Tensor, is_training: bool = False) -> Tensor:
        """[B, C, T, H, W] -> [B, out_channels, T, H, W]."""
        clip, parts = channels_last(x), self._modules
        h = padded(self, parts["conv1"], units.group_normed(self, parts["norm1"], clip))
        h = units.dropped(parts["dropout"], units.group_normed(self, parts["norm2"], h))
        shortcut = self._shortcut()
        before = clip if shortcut is None else padded(self, parts[shortcut], clip)
        return restored(padded(self, parts["conv2"], h, before, before if may_write(clip) else None), x)

    def _shortcut(self) -> str | None:
        if self.in_channels == self.out_channels:
            return None
        return "conv_shortcut" if self.use_conv_shortcut else "nin_shortcut"

    def _reason(self, x: Tensor, is_training: bool) -> str | None:
        parts, shortcut = self._modules, self._shortcut()
        reason = video_reason(x) or units.group_reason(parts["norm1"], parts["norm2"])
        convs = [parts[name] for name in ("conv1", "conv2", shortcut) if name is not None]
        reason = reason or _convs_reason(self._vidkernels_home, *convs)
        reason = reason or child_reason(parts["dropout"], nn.Dropout)
        return reason or ("it empties the GPU's cache" if self.empty_cache and not is_training else None)


class AttentionForward(Fused):
    """`AttnBlock.forward`: one head, over all positions in their order; a position sees itself and those before."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W]."""
        clip, parts = channels_last(x), self._modules
        h = units.group_normed(self, parts["norm"], clip, None)
        q, k, v = (units.as_rows(padded(self, parts[name], h)).flatten(1, 3)[:, None] for name in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0].unflatten(1, x.shape[2:])
        return restored(padded(self, parts["proj_out"], units.as_clip(mixed), clip), x)

    def _reason(self, x: Tensor) -> str | None:
        parts: Any = self._modules
        reason = video_reason(x) or units.group_reason(parts["norm"])
        return reason or _convs_reason(self._vidkernels_home, *(parts[name] for name in ("q", "k", "v", "proj_out")))


class _Framewise(Fused):
    def _reason(self, x: Tensor, **rest: Any) -> str | None:
        return video_reason(x) or units.kernel_reason(self.conv, nn.Conv2d) or _frames_check(self)


def _frames_check(module: Any) -> str | None:
    if not module.with_conv:
        return "it has no convolution"
    kernel = module.conv
    down = kernel.stride == (2, 2) and kernel.padding == (0, 0)
    plain = down or (kernel.stride == (1, 1) and kernel.padding == (1, 1))
    return None if plain and kernel.dilation == (1, 1) else "its convolution has other strides or padding"


class FrameDownForward(_Framewise):
    """`Downsample2D.forward`: on the clip, without a padded copy."""

    @guarded
    def forward(self, x: Tensor, is_training: bool = False) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T, H / 2, W / 2]."""
        return restored(units.halved_in_space(self, self.conv, channels_last(x)), x)


class FrameUpForward(_Framewise):
    """`Upsample2D.forward`: on the clip, by phases."""

    @guarded
    def forward(self, x: Tensor, is_split: bool = False, is_training: bool = False) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T, 2 H, 2 W]."""
        return restored(units.doubled_in_space(self, self.conv, channels_last(x)), x)


class UpsampleForward(Fused):
    """`Upsample3D.forward`: the first convolution of its block by phases of the clip, the repeated clip for two sums alone."""

    @guarded
    def forward(self, x: Tensor, is_split: bool = False, is_training: bool = False) -> Tensor:
        """[B, C, T, H, W] -> [B, C, f T, f H, f W]."""
        clip, factor, block = channels_last(x), self.scale_factor, self.conv3d
        kernel = block.conv1.conv
        options = {"scale": factor, **units.padding_of(block.conv1)}
        options["backend"] = self._vidkernels_backend("causal_conv3d")
        h: Tensor = ops.upsample_conv3d(clip, kernel.weight, kernel.bias, **options)
        wide = units.as_clip(_repeated(units.as_rows(clip), factor))
        return restored(_sum(_tail(self, block, h, wide), wide), x)

    def _reason(self, x: Tensor, **rest: Any) -> str | None:
        block = self.conv3d
        reason = video_reason(x) or child_reason(block, self._vidkernels_home.Res3DBlockUpsample)
        reason = reason or _tail_reason(block, self._vidkernels_home)
        if reason is None and block.conv1.conv.stride != (1, 1, 1):
            reason = "its first convolution is strided"
        return reason


class UpsampleBlockForward(Fused):
    """`Res3DBlockUpsample.forward`."""

    @guarded
    def forward(self, x: Tensor, is_training: bool = False) -> Tensor:
        """[B, C, T, H, W]."""
        clip = channels_last(x)
        return restored(_tail(self, self, padded(self, self.conv1, clip), clip), x)

    def _reason(self, x: Tensor, **rest: Any) -> str | None:
        return video_reason(x) or _tail_reason(self, self._vidkernels_home)


def _tail(owner: Any, block: Any, h: Tensor, identity: Tensor) -> Tensor:
    """A block for repeated clips, behind its first convolution."""
    h = padded(owner, block.conv2, units.group_normed(owner, block.norm1, h))
    h = _sum(units.group_normed(owner, block.norm2, h, None), identity)
    return F.silu(h, inplace=not torch.is_grad_enabled())


def _sum(h: Tensor, other: Tensor) -> Tensor:
    """`h + other` in h's dtype, and in its place without gradients."""
    return (h + other).to(h.dtype) if torch.is_grad_enabled() else h.add_(other)


def _tail_reason(block: Any, home: Any) -> str | None:
    if not block.with_norm or block.down_sampling or block.num_filters != block.input_filters:
        return "a block for repeated clips has no norms or a shortcut of its own"
    reason = units.group_reason(block.norm1, block.norm2) or child_reason(block.act, nn.SiLU)
    return reason or _convs_reason(home, block.conv1, block.conv2)


def _repeated(rows: Tensor, factor: int) -> Tensor:
    """[B, T, H, W, C] with every position `factor` times along each axis."""
    batch, frames, height, width, channels = rows.shape
    wide = rows[:, :, None, :, None, :, None].expand(-1, -1, factor, -1, factor, -1, factor, -1)
    return wide.reshape(batch, frames * factor, height * factor, width * factor, channels)


class _Network(Fused):
    def _middle(self, h: Tensor, is_training: bool) -> Tensor:
        h = self.mid.attn_1(self.mid.block_1(h, is_training=is_training))
        y: Tensor = self.mid.block_2(h, is_training=is_training)
        return y

    def _last(self, h: Tensor) -> Tensor:
        return units.group_normed(self, self.norm_out, channels_last(h))


class EncoderForward(_Network):
    """`VideoEncoder.forward`, which prints a line where a clip has a length that it does not expect: ours prints none."""

    @guarded
    def forward(self, x: Tensor, is_training: bool = False) -> Tensor:
        """[B, 3, T, H, W] -> moments [B, 2 z, 1 + (T - 1) / 4, H / 8, W / 8]."""
        with overwriting(self, x):
            h = self.conv_in(channels_last(x))
            for index, level in enumerate(self.down):
                for block in level.block:
                    h = block(h, is_training=is_training)
                if index != self.num_resolutions - 1:
                    h = level.downsample(h, is_training=is_training)
            h = self._middle(h, is_training)
        y: Tensor = self.conv_out(self._last(h))
        return y.contiguous()

    def _reason(self, x: Tensor, **rest: Any) -> str | None:
        return video_reason(x) or units.group_reason(self.norm_out)


class DecoderForward(_Network):
    """`VideoDecoder.forward`."""

    @guarded
    def forward(self, z: Tensor, is_training: bool = False) -> Tensor:
        """Latents [B, z, T, H, W] -> frames [B, 3, 4 T - 3, 8 H, 8 W]."""
        self.last_z_shape = z.shape
        with overwriting(self, z):
            h = self._middle(self.conv_in(channels_last(z)), is_training)
            for index in reversed(range(self.num_resolutions)):
                level = self.up[index]
                for block in level.block:
                    h = block(h, is_training=is_training)
                if index != 0:
                    h = level.upsample(h, is_split=True, is_training=is_training)
        left, right, top, bottom, front, _ = self.time_causal_padding
        sides = {"pad_frames": front, "spatial_padding": (left, right, top, bottom)}
        y = units.convolve(self, self.conv_out, self._last(h), time_padding="zeros", **sides)
        return y.contiguous()[:, :, self.temporal_downsample - 1 :]

    def _reason(self, z: Tensor, **rest: Any) -> str | None:
        reason = video_reason(z) or units.group_reason(self.norm_out) or units.kernel_reason(self.conv_out, nn.Conv3d)
        if reason is None and (any(self.conv_out.padding) or self.time_causal_padding[5]):
            reason = "its last convolution pads otherwise"
        return reason


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = next(p for p in module.parameters() if p.ndim >= 4)
    return (units.like_parameters(module, 1, weight.shape[1], 4, 6, 8),), {}


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 1, module.conv_in.conv.in_channels, 5, 16, 16),), {}


def _decoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 1, module.conv_in.conv.in_channels, 2, 4, 4),), {}


_CONV = {
    "CausalConv3dPlainAR.__init__": ("85f06dce176b82f0",),
    "CausalConv3dPlainAR.forward": ("e79c155279e2dfa7",),
}
_SILU = {"nonlinearity": ("0e59c59a15890939",)}
_TAIL = {"Res3DBlockUpsample.forward": ("6251ea1578690c0b",)}
_BOTH = ("causal_conv3d", "group_norm")


def _rule(name: str, target: str, mixin: type, digests: dict[str, Any], features: str, **more: Any) -> Rule:
    return Rule(
        name=f"opensora13_vae.{name}",
        ops=more.pop("ops", _BOTH),
        targets=(f"opensora.models.vae_v1_3.{target}",),
        mixin=mixin,
        digests=digests,
        features=tuple(features.split()),
        reads=more.pop("reads", ("*",)),
        sample=more.pop("sample", _sample),
        tested_versions=("hpcaitech/Open-Sora 1.3 (f1c6b8b)",),
        **more,
    )


def _frames_rule(name: str, target: str, mixin: type) -> Rule:
    known, cls = framewise_check(_INNER, target), f"modules.updownsample:{target}"

    def check(module: Any) -> str | None:
        found: str | None = known(module) or _frames_check(module)
        return found

    digests = {f"{target}.forward": ("535fd204481cfc70",)}
    features = "with_conv micro_batch_size_2d"
    return _rule(name, cls, mixin, digests, features, ops=("causal_conv3d",), check=check)


RULES = (
    _rule(
        *("encoder", "encoder:VideoEncoder", EncoderForward, {"VideoEncoder.forward": ("6a9e69c1e6469fec",)} | _SILU),
        "down mid.attn_1 norm_out conv_in down_sampling_layer",
        ops=("group_norm",),
        reads=("norm_out",),
        sample=_encoder_sample,
    ),
    _rule(
        *("decoder", "decoder:VideoDecoder", DecoderForward, {"VideoDecoder.forward": ("809f82a4cecc1051",)} | _SILU),
        "up mid.attn_1 norm_out conv_in temporal_up_layers",
        reads=("norm_out", "conv_out"),
        sample=_decoder_sample,
    ),
    _rule(
        *("block", "modules.resblock:Resnet3DBlock", BlockForward),
        _CONV | _SILU | {"Resnet3DBlock.forward": ("6b1a93da42644e87",)},
        "norm1 conv1.conv norm2 conv2.conv use_conv_shortcut empty_cache",
    ),
    _rule(
        *("attention", "modules.attention:AttnBlock", AttentionForward),
        _CONV | {"AttnBlock.forward": ("b865516b5591d3d9",), "AttnBlock.attention": ("d5540c246131c0b3",)},
        "norm q.conv k.conv v.conv proj_out.conv",
    ),
    _frames_rule("frame_down", "Downsample2D", FrameDownForward),
    _frames_rule("frame_up", "Upsample2D", FrameUpForward),
    _rule(
        *("up", "modules.updownsample:Upsample3D", UpsampleForward),
        _CONV | _TAIL | {"Upsample3D.forward": ("6ef850f29edf723f",)},
        "conv3d.conv1 scale_factor",
    ),
    _rule(
        *("up_block", "modules.updownsample:Res3DBlockUpsample", UpsampleBlockForward, _CONV | _TAIL),
        "conv1.conv conv2.conv act with_norm down_sampling",
    ),
    _rule(
        *("conv", "modules.conv:CausalConv3dPlainAR", ConvForward, _CONV, "conv time_pad time_causal_padding"),
        ops=("causal_conv3d",),
        check=_zeros_reason,
    ),
)
