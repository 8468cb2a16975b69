# SPDX-License-Identifier: Apache-2.0
"""Rules for the causal VAE of Open-Sora 2.0 (`hunyuan_vae`), HunyuanVideo's, and copies of it, found by the digests of their
methods: what `diffusers_hunyuan_vae` does. Its middle block is handed a mask of N x N numbers, made position by position: the
networks make none where the attention runs frame by frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules import diffusers_hunyuan_vae as hunyuan
from vidkernels.patching.rules._vae_memory import may_write, overwriting
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason

# In place of the mask in which a frame sees itself and the frames before it; a string, which graphs can be guarded by.
_CAUSAL = "frame by frame"


def _kernel(home: Any) -> type[nn.Conv3d]:
    """The class of the convolution inside a causal one: torch's in HunyuanVideo's own files."""
    cls: type[nn.Conv3d] = getattr(home, "ChannelChunkConv3d", nn.Conv3d)
    return cls


class Family(Fused):
    """What blocks and samplers of such a VAE share."""

    def _conv_reason(self, *convs: Any) -> str | None:
        """Why causal convolutions must be called."""
        home = self._vidkernels_home
        for conv in convs:
            reason = units.padded_reason(conv, home.CausalConv3d, _kernel(home))
            if reason is not None:
                return reason
        return None


class ConvForward(Fused):
    """`CausalConv3d.forward`. Its convolution takes channels in parts where a clip has 2^31 values: to rounding the same."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, K, T', H', W']."""
        return hunyuan.padded(self, self, x)

    def _reason(self, x: Tensor) -> str | None:
        reason = video_reason(x) or units.kernel_reason(self.conv, _kernel(self._vidkernels_home))
        return reason or units.padding_reason(self)


class Block(Family):
    """What a residual block does without an embedding."""

    def _serve(self, input_tensor: Tensor) -> Tensor:
        x, parts = channels_last(input_tensor), self._modules
        h = hunyuan.padded(self, parts["conv1"], units.group_normed(self, parts["norm1"], x))
        h = units.dropped(parts["dropout"], units.group_normed(self, parts["norm2"], h))
        out = x if self.conv_shortcut is None and may_write(x) else None
        shortcut = x if self.conv_shortcut is None else hunyuan.padded(self, self.conv_shortcut, x)
        return restored(hunyuan.padded(self, parts["conv2"], h, shortcut, out), input_tensor)

    def _clip_reason(self, input_tensor: Tensor) -> str | None:
        parts = self._modules
        reason = video_reason(input_tensor) or units.group_reason(parts["norm1"], parts["norm2"])
        reason = reason or self._conv_reason(parts["conv1"], parts["conv2"])
        if self.conv_shortcut is not None:
            reason = reason or self._conv_reason(self.conv_shortcut)
        reason = reason or child_reason(parts["nonlinearity"], nn.SiLU) or child_reason(parts["dropout"], nn.Dropout)
        return reason or _scale_reason(self)


class BlockForward(Block):
    """`ResnetBlockCausal3D.forward`."""

    @guarded
    def forward(self, input_tensor: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, out_channels, T, H, W]."""
        return self._serve(input_tensor)

    def _reason(self, input_tensor: Tensor) -> str | None:
        return self._clip_reason(input_tensor)


def _scale_reason(block: Any) -> str | None:
    scale = block.output_scale_factor
    return None if scale == 1 else f"its result is divided by {scale}"


def block_check(block: Any) -> str | None:
    """Why a residual block can never be served."""
    return units.silu_check(block) or _scale_reason(block)


class Upsample(Family):
    """Values repeated in time and space, but the first frame in space alone, in front of a convolution."""

    def _serve(self, input_tensor: Tensor) -> Tensor:
        conv = self.conv.conv
        options = {"scale": self.upsample_factor, "first_frame": "single", **units.padding_of(self.conv)}
        options["backend"] = self._vidkernels_backend("causal_conv3d")
        y: Tensor = ops.upsample_conv3d(channels_last(input_tensor), conv.weight, conv.bias, **options)
        return restored(y, input_tensor)

    def _clip_reason(self, input_tensor: Tensor) -> str | None:
        return video_reason(input_tensor) or self._conv_reason(self.conv) or hunyuan.upsample_check(self)


class UpsampleForward(Upsample):
    """`UpsampleCausal3D.forward`."""

    @guarded
    def forward(self, input_tensor: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, K, 1 + (T - 1) f0, H f1, W f2]."""
        return self._serve(input_tensor)

    def _reason(self, input_tensor: Tensor) -> str | None:
        return self._clip_reason(input_tensor)


class MidBlockForward(Fused):
    """`UNetMidBlockCausal3D.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, attention_mask: Any) -> Tensor:
        """[B, C, T, H, W]; residual blocks and, between them, attention over all positions."""
        x = channels_last(self.resnets[0](channels_last(hidden_states)))
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=False):
            if attention is not None:
                x = self._attend(attention, x, attention_mask)
            x = channels_last(resnet(x))
        return restored(x, hidden_states)

    def _reason(self, hidden_states: Tensor, attention_mask: Any) -> str | None:
        reason = video_reason(hidden_states)
        if isinstance(attention_mask, str):
            for attention in self.attentions:
                reason = reason or (None if attention is None else hunyuan.attention_reason(attention))
        return reason

    def _attend(self, attention: Any, x: Tensor, mask: Any) -> Tensor:
        """By the attention itself, where a mask is given: it may say anything."""
        if isinstance(mask, str):
            return hunyuan.attended(self, attention, x)
        rows = attention(units.as_rows(x).flatten(1, 3), attention_mask=mask)
        return channels_last(units.as_clip(rows.unflatten(1, x.shape[2:])))


class Network(Fused):
    """What encoders and decoders share."""

    def _reason(self, sample: Tensor, **rest: Any) -> str | None:
        reason = video_reason(sample) or units.group_reason(self.conv_norm_out)
        return reason or child_reason(self.conv_act, nn.SiLU)

    def _middle(self, x: Tensor) -> Tensor:
        y: Tensor = self._vidkernels_home.auto_grad_checkpoint(self.mid_block, x, self._mask(x))
        return y

    def _mask(self, x: Tensor) -> Any:
        """What the middle block is told about its mask: nothing more than that it is causal, where it is served."""
        middle: Any = self.mid_block
        if not middle.add_attention:
            return None
        known = child_reason(middle, self._vidkernels_home.UNetMidBlockCausal3D) is None
        if known and isinstance(middle, MidBlockForward) and middle._reason(x, _CAUSAL) is None:
            return _CAUSAL
        return self.prepare_attention_mask(x)

    def _end(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv_out(units.group_normed(self, self.conv_norm_out, channels_last(x)))
        return y.contiguous()


class EncoderForward(Network):
    """`EncoderCausal3D.forward`."""

    @guarded
    def forward(self, sample: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> moments [B, 2 z, 1 + (T - 1) / 4, H / 8, W / 8]."""
        with overwriting(self, sample):
            x = self.conv_in(channels_last(sample))
            for block in self.down_blocks:
                x = block(x)
            x = self._middle(x)
        return self._end(x)


class DecoderForward(Network):
    """`DecoderCausal3D.forward`. Where blocks are recomputed, upstream recomputes its last norm, too: ours keeps no more."""

    @guarded
    def forward(self, sample: Tensor) -> Tensor:
        """Latents [B, z, T, H, W] -> frames [B, 3, 4 T - 3, 8 H, 8 W]."""
        with overwriting(self, sample):
            x = self.conv_in(channels_last(sample))
            x = self._middle(x).to(next(iter(self.up_blocks.parameters())).dtype)
            for block in self.up_blocks:
                x = block(x)
        return self._end(x)


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = next(p for p in module.parameters() if p.ndim == 5)
    return (units.like_parameters(module, 1, weight.shape[1], 3, 8, 8),), {}


def _middle_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (x,), options = _sample(module)
    return (x[..., :2, :2].contiguous(), torch.zeros((1, 12, 12), dtype=x.dtype, device=x.device)), options


_HOME = "opensora.models.hunyuan_vae"
_TESTED = ("hpcaitech/Open-Sora 2.0 (1b8253c)",)
_CONV = {
    "CausalConv3d.__init__": ("c38db5b4952fc572",),
    "CausalConv3d.forward": ("3fc0fb271b2dbda5",),
    "ChannelChunkConv3d.forward": ("aaa97ec5e4a21b38",),
}
_MASK = "0f841ce379cb2544"
_BOTH = ("causal_conv3d", "group_norm")


def _rule(
    name: str, target: str, mixin: type, digests: Mapping[str, tuple[str, ...]], features: str, **more: Any
) -> Rule:
    return Rule(
        name=f"opensora2_vae.{name}",
        ops=more.pop("ops", _BOTH),
        targets=(f"{_HOME}.{target}",),
        mixin=mixin,
        digests=digests,
        features=tuple(features.split()),
        reads=more.pop("reads", ("*",)),
        sample=more.pop("sample", _sample),
        tested_versions=_TESTED,
        **more,
    )


def _network(name: str, target: str, mixin: type, features: str, digest: str, **more: tuple[str, ...]) -> Rule:
    cls = target.partition(":")[2]
    digests = {f"{cls}.forward": (digest,), f"{cls}.prepare_attention_mask": (_MASK,), **more}
    features = f"conv_in conv_out conv_norm_out mid_block {features}"
    reads = ("conv_norm_out",)
    return _rule(name, target, mixin, digests, features, ops=("group_norm",), check=units.silu_check, reads=reads)


_UNET = "unet_causal_3d_blocks"
_POST = {"DecoderCausal3D.post_process": ("7cbe210bf861babe",)}

RULES = (
    _network("encoder", "vae:EncoderCausal3D", EncoderForward, "down_blocks", "f9d86e40059a9e65"),
    _network("decoder", "vae:DecoderCausal3D", DecoderForward, "up_blocks", "85842779df00fd50", **_POST),
    _rule(
        *("mid_block", f"{_UNET}:UNetMidBlockCausal3D", MidBlockForward),
        {"UNetMidBlockCausal3D.forward": ("dc9e64e0c6e16965",)},
        "attentions resnets add_attention",
        ops=("group_norm",),
        reads=("attentions.0", "attentions.0.group_norm"),
        sample=_middle_sample,
    ),
    _rule(
        *("resnet", f"{_UNET}:ResnetBlockCausal3D", BlockForward),
        _CONV | {"ResnetBlockCausal3D.forward": ("d11b78b25d13345f",)},
        "norm1 conv1.conv norm2 conv2.conv nonlinearity output_scale_factor",
        check=block_check,
    ),
    _rule(
        *("upsample", f"{_UNET}:UpsampleCausal3D", UpsampleForward),
        _CONV | {"UpsampleCausal3D.forward": ("49b695fae37bd6d9",)},
        "conv.conv upsample_factor",
        ops=("causal_conv3d",),
        check=hunyuan.upsample_check,
    ),
    _rule(
        *("conv", f"{_UNET}:CausalConv3d", ConvForward, _CONV, "conv pad_mode time_causal_padding"),
        ops=("causal_conv3d",),
        check=hunyuan.padding_check,
    ),
)
