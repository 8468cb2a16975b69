# SPDX-License-Identifier: Apache-2.0
"""Rules for the image networks in NVIDIA's own code of the Cosmos tokenizers and copies of it, found by the digests of their
methods: VQGAN's, with wavelets at both ends. Images are the frames of a clip.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidkernels.patching._guard import child_reason, guarded, note_fallback
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _frame_units as frames
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._frame_units import as_frames, as_video, frames_like, frames_reason
from vidkernels.patching.rules._vae_memory import overwriting
from vidkernels.patching.rules.official_vqgan import AttentionForward


class BlockForward(Fused):
    """`ResnetBlock.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H, W]."""
        return frames_like(frames.residual_block(self, self._layers(), as_video(x)), x)

    def _layers(self) -> frames.ResidualLayers:
        shortcut = None if type(self.nin_shortcut) is nn.Identity else self.nin_shortcut
        return frames.ResidualLayers(self.norm1, self.conv1, self.norm2, self.conv2, shortcut, self.dropout)

    def _reason(self, x: Tensor) -> str | None:
        reason = frames_reason(x) or frames.residual_reason(self._layers())
        if reason is None and type(self.nin_shortcut) is nn.Identity:
            return child_reason(self.nin_shortcut, nn.Identity)
        return reason


class _Network(Fused):
    def _frames_reason(self, x: Tensor) -> str | None:
        reason = frames_reason(x) or frames.conv_reason(self.conv_in) or frames.conv_reason(self.conv_out)
        return reason or units.group_reason(self.norm_out)

    def _begin(self, x: Tensor) -> Tensor:
        return as_frames(frames.per_frame(self, self.conv_in, as_video(x)))

    def _level(self, level: Any, h: Tensor) -> Tensor:
        for i, block in enumerate(level.block):
            h = block(h)
            if len(level.attn) > 0:
                h = level.attn[i](h)
        return h

    def _middle(self, h: Tensor) -> Tensor:
        middle: Any = self.mid
        result: Tensor = middle.block_2(middle.attn_1(middle.block_1(h)))
        return result

    def _sampled(self, sampler: Any, h: Tensor, upwards: bool) -> Tensor:
        """A sampler's convolution; `Upsample` and `Downsample` are names of too many classes for rules of their own."""
        home = self._vidkernels_home
        reason = child_reason(sampler, home.Upsample if upwards else home.Downsample)
        reason = reason or (frames.doubling_reason if upwards else frames.halving_reason)(sampler.conv)
        if reason is not None:
            note_fallback(self, reason)
            called: Tensor = sampler(h)
            return called
        return as_frames((frames.doubled if upwards else frames.halved)(self, sampler.conv, as_video(h)))

    def _end(self, h: Tensor) -> Tensor:
        normed = units.group_normed(self, self.norm_out, as_video(h), per_frame=True)
        return as_frames(frames.per_frame(self, self.conv_out, normed)).contiguous()


class EncoderForward(_Network):
    """`Encoder.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> latents [N, z, h, w]."""
        with overwriting(self, x):
            h = self._begin(self.patcher(x))
            for index, level in enumerate(self.down):
                h = self._level(level, h)
                if index < self.num_downsamples:
                    h = self._sampled(level.downsample, h, upwards=False)
            h = self._middle(h)
        return self._end(h)

    def _reason(self, x: Tensor) -> str | None:
        return self._frames_reason(x)


class DecoderForward(_Network):
    """`Decoder.forward`."""

    @guarded
    def forward(self, z: Tensor) -> Tensor:
        """Latents [N, z, h, w] -> images [N, 3, H, W]."""
        with overwriting(self, z):
            h = self._middle(self._begin(z))
            for index in reversed(range(self.num_resolutions)):
                h = self._level(self.up[index], h)
                if index >= self.num_resolutions - self.num_upsamples:
                    h = self._sampled(self.up[index].upsample, h, upwards=True)
        images: Tensor = self.unpatcher(self._end(h))
        return images

    def _reason(self, z: Tensor) -> str | None:
        return self._frames_reason(z)


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    channels = next(p for p in module.parameters() if p.ndim == 4).shape[1]
    return (units.like_parameters(module, 1, channels, 8, 8),), {}


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    patch = module.patcher.patch_size
    side = patch * 2 ** len(module.down)
    return (units.like_parameters(module, 1, module.conv_in.in_channels // patch**2, side, side),), {}


_SILU = {"nonlinearity": "8b32ccd8c8b19e4f"}
_ENDS = ("conv_in", "conv_out", "norm_out")


def _rule(name: str, target: str, mixin: type, digests: dict[str, str], features: str, **more: Any) -> Rule:
    return Rule(
        name=f"cosmos_tokenizer.{name}",
        ops=more.pop("ops", ("causal_conv3d", "group_norm")),
        targets=(f"cosmos_tokenizer.modules.layers2d:{target}",),
        mixin=mixin,
        digests={key: (value,) for key, value in digests.items()},
        features=tuple(features.split()),
        sample=more.pop("sample", _sample),
        tested_versions=("Cosmos-Tokenizer (9ea5083)",),
        **more,
    )


RULES = (
    _rule(
        *("image_encoder", "Encoder", EncoderForward),
        _SILU | {"Encoder.forward": "e96323d3b14e4ad8", "Downsample.forward": "04e69c8dd289ea01"},
        "patcher down mid.attn_1 conv_in norm_out num_downsamples",
        reads=_ENDS,
        sample=_encoder_sample,
    ),
    _rule(
        *("image_decoder", "Decoder", DecoderForward),
        _SILU | {"Decoder.forward": "ac0a418a590b5e60", "Upsample.forward": "9c927c6847e71807"},
        "unpatcher up mid.attn_1 conv_in norm_out num_upsamples",
        reads=_ENDS,
    ),
    _rule(
        *("image_block", "ResnetBlock", BlockForward, _SILU | {"ResnetBlock.forward": "f7720e4bac5231a4"}),
        "norm1 conv1 norm2 conv2 dropout nin_shortcut !use_conv_shortcut !temb_proj",
        reads=("*",),
    ),
    _rule(
        *("image_attention", "AttnBlock", AttentionForward, {"AttnBlock.forward": "2159e2921a3bf351"}),
        "norm q k v proj_out !in_channels",
        ops=("group_norm",),
        reads=("*",),
    ),
)
