# SPDX-License-Identifier: Apache-2.0
"""Rules for the causal VAE of Open-Sora-Plan 1.0 to 1.2 and copies of it, found by the digests of their methods: causal
convolutions without repeated frames in memory, 2-D blocks on the frames of a clip without rearrangements or loops, blended
samplers as one convolution, attention without the N x N scores. Encoders drop what upstream keeps until their end."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _frame_units as frames
from vidkernels.patching.rules import _opensora_plan_samplers as samplers
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._opensora_plan_units import (
    FRAMEWISE,
    Family,
    as_clip,
    as_given,
    causal,
    causal_reason,
    framewise_check,
    norm_check,
    normed,
)
from vidkernels.patching.rules._vae_memory import may_write, overwriting
from vidkernels.patching.rules._vae_units import channels_last, restored


class ConvForward(Family):
    """`CausalConv3d.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, K, T', H', W']."""
        return causal(self, self, x)

    def _reason(self, x: Tensor) -> str | None:
        return self._clip_reason(x) or causal_reason(self)


_LAYERS = "norm1", "conv1", "norm2", "conv2", "dropout"


def _shortcut(block: Any) -> Any:
    """The convolution beside a residual block, or None."""
    if block.in_channels == block.out_channels:
        return None
    return block._modules["conv_shortcut" if block.use_conv_shortcut else "nin_shortcut"]


class BlockForward(Family):
    """`ResnetBlock3D.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, out_channels, T, H, W]."""
        clip, parts, shortcut = channels_last(x), self._modules, _shortcut(self)
        h = causal(self, parts["conv1"], normed(self, parts["norm1"], clip))
        h = units.dropped(parts["dropout"], normed(self, parts["norm2"], h))
        beside = clip if shortcut is None else causal(self, shortcut, clip)
        y = causal(self, parts["conv2"], h, beside, beside if may_write(clip) else None)
        return restored(y, x)

    def _reason(self, x: Tensor) -> str | None:
        parts, shortcut = self._modules, _shortcut(self)
        reason = self._clip_reason(x) or self._norm_reason(parts["norm1"], parts["norm2"])
        reason = reason or child_reason(parts["dropout"], nn.Dropout)
        return reason or self._conv_reason(parts["conv1"], parts["conv2"], *([] if shortcut is None else [shortcut]))


class FrameBlockForward(Family):
    """`ResnetBlock2D.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, out_channels, T, H, W], every frame by itself; or images [N, C, H, W]."""
        return as_given(frames.residual_block(self, self._layers(), as_clip(x), normed), x)

    def _reason(self, x: Tensor) -> str | None:
        return self._frames_reason(x) or frames.residual_reason(self._layers(), self._norm_reason)

    def _layers(self) -> frames.ResidualLayers:
        norm1, conv1, norm2, conv2, dropout = (self._modules[name] for name in _LAYERS)
        return frames.ResidualLayers(norm1, conv1, norm2, conv2, _shortcut(self), dropout)


class AttentionForward(Family):
    """`AttnBlock3DFix.forward`, and `AttnBlock3D.forward`, which takes channels of several frames for those of one."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W]; attention over the positions of each frame, plus the input."""
        clip, parts = channels_last(x), self._modules
        h = normed(self, parts["norm"], clip, None)
        q, k, v = (causal(self, parts[name], h) for name in ("q", "k", "v"))
        mixed = self._mixed(q, k, v)
        return restored(causal(self, parts["proj_out"], mixed, clip), x)

    def _reason(self, x: Tensor) -> str | None:
        parts = self._modules
        reason = self._clip_reason(x) or self._norm_reason(parts["norm"])
        return reason or self._conv_reason(*(parts[name] for name in ("q", "k", "v", "proj_out")))

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return units.frame_attention(q, k, v)


class MixedAttentionForward(AttentionForward):
    """`AttnBlock3D.forward`: [B, C, T, H, W] is read as B T matrices [C, H W], whatever lies there."""

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, channels, count, height, width = q.shape
        size = batch * count, 1, channels, height * width
        rows = [t.contiguous().view(size).transpose(2, 3) for t in (q, k, v)]
        mixed = F.scaled_dot_product_attention(rows[0], rows[1], rows[2]).transpose(2, 3)
        return channels_last(mixed.reshape(batch, channels, count, height, width))


class _Network(Family):
    def _level(self, level: Any, x: Tensor, count: int) -> Tensor:
        """The residual blocks of a level, with attention behind each where the level has any."""
        for index in range(count):
            x = level.block[index](x)
            if len(level.attn) > 0:
                x = level.attn[index](x)
        return x

    def _sampled(self, level: Any, x: Tensor, *names: str) -> Tensor:
        for name in names:
            if hasattr(level, name):
                x = getattr(level, name)(x)
        return x

    def _middle(self, x: Tensor) -> Tensor:
        y: Tensor = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return y

    def _end(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv_out(units.group_normed(self, self.norm_out, channels_last(x)))
        return y.contiguous()


class EncoderForward(_Network):
    """`Encoder.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> moments [B, 2 z, 1 + (T - 1) / ratio, H / 8, W / 8]."""
        with overwriting(self, x):
            x = channels_last(self.conv_in(x))
            for level in self.down[: self.num_resolutions]:
                x = self._level(level, x, self.num_res_blocks)
                x = self._sampled(level, x, "downsample", "time_downsample")
            x = self._middle(x)
        return self._end(x)

    def _reason(self, x: Tensor) -> str | None:
        return self._clip_reason(x) or units.group_reason(self.norm_out)


class DecoderForward(_Network):
    """`Decoder.forward`."""

    @guarded
    def forward(self, z: Tensor) -> Tensor:
        """Latents [B, z, T, H, W] -> frames [B, 3, 1 + (T - 1) ratio, 8 H, 8 W]."""
        with overwriting(self, z):
            x = self._middle(channels_last(self.conv_in(z)))
            for index in reversed(range(self.num_resolutions)):
                x = self._level(self.up[index], x, self.num_res_blocks + 1)
                x = self._sampled(self.up[index], x, "upsample", "time_upsample")
        return self._end(x)

    def _reason(self, z: Tensor) -> str | None:
        return self._clip_reason(z) or units.group_reason(self.norm_out)


def _encoder_check(module: Any) -> str | None:
    last = module.down[module.num_resolutions - 1]
    if hasattr(last, "downsample") or hasattr(last, "time_downsample"):
        return "its last level has a sampler, whose result upstream drops"
    return norm_check(module)


def _frame_check(name: str) -> Any:
    framewise = framewise_check(_INNER, name)

    def check(module: Any) -> str | None:
        without = None if getattr(module, "with_conv", True) else "it has no convolution"
        return without or framewise(module) or norm_check(module)

    return check


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = next((parameter for parameter in module.parameters() if parameter.ndim >= 4), None)
    if weight is None:
        return (torch.randn(1, 4, 5, 4, 6),), {}
    return (units.like_parameters(module, 1, weight.shape[1], 5, 16, 16),), {}


def _attention_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 1, module.q.chan_in, 3, 4, 6),), {}


_PATH = "opensora.models.causalvideovae.model."
_TESTED = ("Open-Sora-Plan 1.0", "Open-Sora-Plan 1.1", "Open-Sora-Plan 1.2")
_CONV_FORWARDS = (
    *("d8df794b1da68473", "3e43ebba301ec81f", "fd62afdbb7a372ce"),
    *("947d8496e055d2c9", "fe6669188631c548", "9f2d9f6cc0fbce1e"),  # these can keep frames for a next chunk
)
_CONV = {"CausalConv3d.forward": _CONV_FORWARDS}
_SILU = {"nonlinearity": ("8b32ccd8c8b19e4f",)}
_INNER = {
    "ResnetBlock2D": ("3bc27600536e23da", "920c369c46c07a97"),
    "Upsample": ("6288b45b54213ee0",),
    "Downsample": ("35560636504758f6", "09f4c96acf77e95c", "7a844630f1dd82aa", "1619dce926268d48"),
}
_CONVS = ("causal_conv3d",)
_BOTH = ("causal_conv3d", "group_norm", "channel_norm")


def _rule(name: str, target: str, mixin: type, used: tuple[str, ...], *digests: str, **more: Any) -> Rule:
    """A rule of a class whose forward has one of the digests; `more`: what differs from that of a layer."""
    code = {f"{target}.forward": digests, **more.pop("code", {})}
    file = more.pop("file", "modules.updownsample")
    options = {"reads": ("*",), "sample": _sample, "tested_versions": _TESTED, **more}
    return Rule(f"opensora_plan_vae.{name}", used, (f"{_PATH}{file}:{target}",), mixin, code, **options)


_NETWORK: dict[str, Any] = {"reads": ("norm_out",), "code": _SILU, "file": "causal_vae.modeling_causalvae"}
_BLOCKS: dict[str, Any] = {"file": "modules.resnet_block", "features": _LAYERS}
_ATTENTION: dict[str, Any] = {
    "file": "modules.attention", "code": _CONV, "check": norm_check, "sample": _attention_sample,
    "features": ("norm", "q", "k", "v", "proj_out"),
}  # fmt: skip

RULES = (
    _rule(
        "encoder", "Encoder", EncoderForward, ("group_norm",), "6bd10ce740e6b5e1", "7da392834744ec29",
        features=("down", "mid.block_1", "norm_out", "num_resolutions", "in_ch_mult"), check=_encoder_check, **_NETWORK,
    ),
    _rule(
        "decoder", "Decoder", DecoderForward, ("group_norm",), "1bac88c622115556", "bb95059fc71983cc",
        features=("up", "mid.block_1", "norm_out", "num_resolutions"), check=norm_check, **_NETWORK,
    ),
    _rule(
        "block", "ResnetBlock3D", BlockForward, _BOTH, "cdcfbb38762e29d5", "06359cd3aa928936", "f3216ad36395f032",
        code=_SILU | _CONV, check=norm_check, **_BLOCKS,
    ),
    _rule(
        "frame_block", "ResnetBlock2D", FrameBlockForward, _BOTH, *FRAMEWISE,
        code=_SILU, check=_frame_check("ResnetBlock2D"), **_BLOCKS | {"features": (*_LAYERS, "!time_emb_proj")},
    ),
    _rule(
        "attention", "AttnBlock3DFix", AttentionForward, _BOTH,
        *("6bece4e82a9b9eaf", "c9b2be51fd59b3f6", "82aca9206f950854", "7d4662f30d80d261", "f0cf45dcc9f5fb08"), "cb61b8cf3f8facc8",
        **_ATTENTION,
    ),
    _rule(
        "mixed_attention", "AttnBlock3D", MixedAttentionForward, _BOTH, "628d6861aa085e9c", "2d55e6a87a2cb7c3",
        **_ATTENTION,
    ),
    _rule("frame_up", "Upsample", samplers.FrameUpForward, _CONVS, *FRAMEWISE, features=("conv", "with_conv"),
          check=_frame_check("Upsample")),
    _rule("frame_down", "Downsample", samplers.FrameDownForward, _CONVS, *FRAMEWISE, features=("conv", "with_conv"),
          check=_frame_check("Downsample")),
    *(
        _rule(name, target, samplers.DownForward, _CONVS, "29ba7142e234aea8", code=_CONV)
        for name, target in (
            ("space_down", "SpatialDownsample2x"),
            ("down", "Spatial2xTime2x3DDownsample"),
            ("space_down_3d", "Spatial2x3DDownsample"),
        )
    ),
    _rule("space_up", "SpatialUpsample2x", samplers.UpForward, _CONVS, "8d9c6dcabf3e4a47", "7b8b578ff17cb1ed",
          code=_CONV, features=("conv.conv",), check=samplers.up_check),
    _rule("up", "Spatial2xTime2x3DUpsample", samplers.LinearUpForward, _CONVS, "ef26d73d7bcbeecc", "f0aa022a54a3ccbf", "10ec7585ab7ba94b",
          code=_CONV, check=samplers.linear_check),
    _rule("space_up_3d", "Spatial2x3DUpsample", samplers.SpaceLinearUpForward, _CONVS, "93782cc5706966f9", code=_CONV),
    _rule("time_down", "TimeDownsample2x", samplers.MeanDownForward, _CONVS,
          "39d357dabdc85d6b", "1e2f2f01d1c011ad", "da4e9b932698450a", features=("kernel_size",)),
    _rule("time_up", "TimeUpsample2x", samplers.MeanUpForward, _CONVS, "873daf9daeda509d"),
    _rule("blended_down", "TimeDownsampleRes2x", samplers.BlendedDownForward, _CONVS,
          "e4068d048a2cc97b", "cec5ad97e11be913", "c3fe430daf1746a9", features=("mix_factor", "kernel_size"),
          check=samplers.blended_check),
    _rule("blended_up", "TimeUpsampleRes2x", samplers.BlendedUpForward, _CONVS, "1a615a59308ec9c3", "da7ec64392d06f06",
          code=_CONV, features=("mix_factor", "conv.conv"), check=samplers.blended_check),
    _rule("causal_conv", "CausalConv3d", ConvForward, _CONVS, *_CONV_FORWARDS,
          features=("time_kernel_size", "chan_in", "conv"), file="modules.conv"),
)  # fmt: skip
