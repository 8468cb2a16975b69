# SPDX-License-Identifier: Apache-2.0
"""Rules for the video networks in NVIDIA's own code of the Cosmos tokenizers (Cosmos-Tokenizer, Cosmos 1, cosmos-predict1) and
copies of it, found by the digests of their methods.

Factorized networks, which all published tokenizers have, and those of whole 3x3x3 kernels. What upstream's encoders keep of all
levels until their end is dropped.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _cosmos_units as cosmos
from vidkernels.patching.rules import _cosmos_wavelets as wavelets
from vidkernels.patching.rules import _official_cosmos_units as own
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._official_cosmos_units import Family, convolve
from vidkernels.patching.rules._vae_memory import may_write, overwriting
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason


class BlockForward(Family):
    """`CausalResnetBlockFactorized3d.forward` and `CausalResnetBlock3d.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, out_channels, T, H, W]."""
        clip = channels_last(x)
        h = convolve(self, self.conv1, self._normed(self.norm1, clip))
        h = units.dropped(self.dropout, self._normed(self.norm2, h))
        plain = type(self.nin_shortcut) is nn.Identity
        shortcut = clip if plain else convolve(self, self.nin_shortcut, clip)
        out = clip if plain and may_write(clip) else None
        return restored(convolve(self, self.conv2, h, shortcut, out), x)

    def _reason(self, x: Tensor) -> str | None:
        reason = video_reason(x) or self._norms_reason(self.norm1, self.norm2)
        reason = reason or self._convs_reason(self.conv1, self.conv2) or child_reason(self.dropout, nn.Dropout)
        if type(self.nin_shortcut) is nn.Identity:
            return reason or child_reason(self.nin_shortcut, nn.Identity)
        return reason or self._convs_reason(self.nin_shortcut)


class AttentionForward(Family):
    """`CausalAttnBlock.forward`: over the positions of each frame."""

    _along_time = False

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W], plus the input."""
        clip = channels_last(x)
        h = self._normed(self.norm, clip, None)
        parts = [convolve(self, conv, h) for conv in (self.q, self.k, self.v)]
        y = cosmos.attended(parts, 1, self._along_time, causal=self._along_time)
        return restored(convolve(self, self.proj_out, y, clip), x)

    def _reason(self, x: Tensor) -> str | None:
        reason = video_reason(x) or self._norms_reason(self.norm)
        return reason or self._convs_reason(self.q, self.k, self.v, self.proj_out)


class TemporalAttentionForward(AttentionForward):
    """`CausalTemporalAttnBlock.forward`: a frame of a position sees itself and those before."""

    _along_time = True


class _Network(Family):
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

    def _end(self, h: Tensor) -> Tensor:
        return convolve(self, self.conv_out, self._normed(self.norm_out, channels_last(h))).contiguous()

    def _reason(self, x: Tensor) -> str | None:
        reason = video_reason(x) or self._convs_reason(self.conv_in, self.conv_out)
        return reason or self._norms_reason(self.norm_out)


class EncoderForward(_Network):
    """`EncoderFactorized.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> latents [B, z, T', H', W']."""
        with overwriting(self, x):
            h = convolve(self, self.conv_in, channels_last(self.patcher3d(x)))
            for index, level in enumerate(self.down):
                h = self._level(level, h)
                if index != self.num_resolutions - 1:
                    h = level.downsample(h)
            h = self._middle(h)
        return self._end(h)


class DecoderForward(_Network):
    """`DecoderFactorized.forward`."""

    @guarded
    def forward(self, z: Tensor) -> Tensor:
        """Latents [B, z, T', H', W'] -> frames."""
        with overwriting(self, z):
            h = self._middle(convolve(self, self.conv_in, channels_last(z)))
            for index in reversed(range(self.num_resolutions)):
                h = self._level(self.up[index], h)
                if index != 0:
                    h = self.up[index].upsample(h)
        frames: Tensor = self.unpatcher3d(self._end(self._last(h)))
        return frames

    def _last(self, h: Tensor) -> Tensor:
        return h

    def _reason(self, z: Tensor) -> str | None:
        return super()._reason(z)


class BaseEncoderForward(EncoderForward):
    """`EncoderBase.forward`, whose last level halves the frames by means."""

    def _middle(self, h: Tensor) -> Tensor:
        return super()._middle(cosmos.frame_means(channels_last(h)))


class BaseDecoderForward(DecoderForward):
    """`DecoderBase.forward`, whose last level doubles the frames."""

    def _last(self, h: Tensor) -> Tensor:
        return channels_last(h).repeat_interleave(2, dim=2)[:, :, 1:]


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = next(p for p in module.parameters() if p.ndim == 5)
    return (units.like_parameters(module, 1, weight.shape[1], 3, 8, 8),), {}


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    patcher, volume = getattr(module, "patcher", None), 2
    if patcher is None:
        patcher, volume = module.patcher3d, 3
    side = patcher.patch_size
    channels = next(p for p in module.conv_in.parameters()).shape[1] // side**volume
    edge = side * 2 ** len(module.down)
    return (units.like_parameters(module, 1, channels, 1 + 2 * side, edge, edge),), {}


_CONV = {
    "CausalConv3d.forward": "1ad6113ec9dd6f61",
    "CausalConv3d._replication_pad": "78211722987d56b4",
}
_NORM = {"CausalNormalize.forward": "50179e15c39d22de"}
_SILU = {"nonlinearity": "8b32ccd8c8b19e4f"}
_FRAMES = {"time2batch": "8cf7b00475a4f787", "batch2time": "1cd2ac73c41350ba"}
_POSITIONS = {"space2batch": "714b780f3796cb25", "batch2space": "1330c68e29b5e4a8"}
_ONE_MORE = {"replication_pad": "40c92809586e0de3"}
_BLOCK = _CONV | _NORM | _SILU
_NETWORK = _BLOCK | _ONE_MORE
_BOTH, _ONE = ("causal_conv3d", "group_norm"), ("causal_conv3d",)
_TESTED = ("Cosmos-Tokenizer (9ea5083)", "Cosmos (4b2af12, 605d66d)", "cosmos-predict1 (080332f)")


def _rule(name: str, target: str, mixin: type, digests: dict[str, str], features: str, **more: Any) -> Rule:
    return Rule(
        name=f"cosmos_tokenizer.{name}",
        ops=more.pop("ops", _BOTH),
        targets=(f"cosmos_tokenizer.modules.layers3d:{target}",),
        mixin=mixin,
        digests={key: (value,) for key, value in digests.items()},
        features=tuple(features.split()),
        reads=more.pop("reads", ("*",)),
        sample=more.pop("sample", _sample),
        tested_versions=_TESTED,
        **more,
    )


def _network(name: str, target: str, mixin: type, digests: dict[str, str], features: str, **more: Any) -> Rule:
    ends = ("conv_in", "conv_out", "norm_out")
    inner = tuple(f"conv_{end}{path}" for end in ("in", "out") for path in (".conv3d", ".0.conv3d", ".1.conv3d"))
    every = f"{features} mid.attn_1 {' '.join(ends)}"
    return _rule(name, target, mixin, _NETWORK | digests, every, reads=(*inner, "norm_out.norm"), **more)


RULES = (
    *wavelets.RULES,
    _network(
        *("encoder", "EncoderFactorized", EncoderForward, {"EncoderFactorized.forward": "32db0c05567306ea"}),
        *("down patcher3d",),
        sample=_encoder_sample,
    ),
    _network(
        *("decoder", "DecoderFactorized", DecoderForward, {"DecoderFactorized.forward": "553b404c7f035c74"}),
        *("up unpatcher3d",),
    ),
    _network(
        *("base_encoder", "EncoderBase", BaseEncoderForward),
        *({"EncoderBase.forward": "2bb02611114de401"}, "down patcher"),
        sample=_encoder_sample,
    ),
    _network(
        *("base_decoder", "DecoderBase", BaseDecoderForward),
        *({"DecoderBase.forward": "428510f309fd9ef0"}, "up unpatcher"),
    ),
    _rule(
        *("block", "CausalResnetBlockFactorized3d", BlockForward),
        *(_BLOCK | {"CausalResnetBlockFactorized3d.forward": "f7720e4bac5231a4"}, "norm1.norm conv1.0 nin_shortcut"),
    ),
    _rule(
        *("base_block", "CausalResnetBlock3d", BlockForward),
        *(_BLOCK | {"CausalResnetBlock3d.forward": "f7720e4bac5231a4"}, "norm1.norm conv1.conv3d nin_shortcut"),
    ),
    _rule(
        *("attention", "CausalAttnBlock", AttentionForward),
        *(
            _CONV | _NORM | _FRAMES | {"CausalAttnBlock.forward": "13df86417edea2bf"},
            "norm.norm q.conv3d proj_out.conv3d",
        ),
    ),
    _rule(
        *("temporal_attention", "CausalTemporalAttnBlock", TemporalAttentionForward),
        _CONV | _NORM | _POSITIONS | {"CausalTemporalAttnBlock.forward": "402f4038f38acbb3"},
        "norm.norm q.conv3d proj_out.conv3d",
    ),
    _rule(
        *("hybrid_down", "CausalHybridDownsample3d", own.HybridDownForward),
        _CONV | _ONE_MORE | {"CausalHybridDownsample3d.forward": "160bee5224f90000"},
        *("conv1 conv2 conv3 spatial_down temporal_down",),
        ops=_ONE,
        check=own.samples_nothing,
    ),
    _rule(
        *("hybrid_up", "CausalHybridUpsample3d", own.HybridUpForward),
        _CONV | {"CausalHybridUpsample3d.forward": "c12e68a6fe04666c"},
        *("conv1 conv2 conv3 spatial_up temporal_up",),
        ops=_ONE,
        check=own.samples_nothing,
    ),
    _rule(
        *("down", "CausalDownsample3d", own.DownForward),
        *(_CONV | _ONE_MORE | {"CausalDownsample3d.forward": "7590c6fe46faea64"}, "conv.conv3d"),
        ops=_ONE,
    ),
    _rule(
        *("up", "CausalUpsample3d", own.UpForward),
        *(_CONV | {"CausalUpsample3d.forward": "92d4a058b7920c6b"}, "conv.conv3d"),
        ops=_ONE,
    ),
    _rule(
        *("conv", "CausalConv3d", own.ConvForward, _CONV, "conv3d time_pad spatial_pad pad_mode"),
        ops=_ONE,
        check=own.conv_check,
    ),
)
