# SPDX-License-Identifier: Apache-2.0
"""Rules for Open-MAGVIT2's networks for images, in its repository, in SEED-Voken and in copies, by the digests of their methods.

The file of the first release has no adaptive norms in its decoder; both are served. Images are the frames of a clip.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidkernels.patching._guard import guarded, note_fallback
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _frame_units as frames
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules import official_magvit2 as video
from vidkernels.patching.rules._frame_units import as_frames, as_video, frames_like, frames_reason
from vidkernels.patching.rules._vae_memory import overwriting


class BlockForward(Fused):
    """`ResBlock.forward`."""

    @guarded
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """[N, in_filters, H, W] -> [N, out_filters, H, W]."""
        return frames_like(frames.residual_block(self, self._layers(), as_video(x)), x)

    def _layers(self) -> frames.ResidualLayers:
        shortcut = None
        if self.in_filters != self.out_filters:
            shortcut = self.conv_shortcut if self.use_conv_shortcut else self.nin_shortcut
        return frames.ResidualLayers(self.norm1, self.conv1, self.norm2, self.conv2, shortcut)

    def _reason(self, x: Tensor, **rest: Any) -> str | None:
        return frames_reason(x) or frames.residual_reason(self._layers())


class AdaptiveNormForward(Fused):
    """`AdaptiveGroupNorm.forward`."""

    @guarded
    def forward(self, x: Tensor, quantizer: Tensor) -> Tensor:
        """x [N, C, H, W], quantizer [N, z, h, w] -> x normalized, scaled and shifted by the codes' deviation and mean."""
        return frames_like(video.adapted(self, as_video(x, x.shape[0]), quantizer), x)

    def _reason(self, x: Tensor, quantizer: Tensor) -> str | None:
        return frames_reason(x, quantizer) or video.adapted_reason(self, x)


class UpForward(Fused):
    """`Upsampler.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2 H, 2 W]."""
        wide = frames.per_frame(self, self.conv1, as_video(x))
        return frames_like(units.from_channels(wide, (1, 2, 2), box_first=True), x)

    def _reason(self, x: Tensor) -> str | None:
        reason = frames_reason(x) or frames.conv_reason(self.conv1)
        if reason is None and self.depth2space is not self._vidkernels_home.depth_to_space:
            reason = "its channels become positions by a function of its own"
        return reason


class _Network(Fused):
    def _reason(self, x: Tensor) -> str | None:
        return frames_reason(x) or units.group_reason(self.norm_out)

    def _convolved(self, conv: Any, x: Tensor) -> Tensor:
        """A convolution of frames; the result is channels last."""
        reason = frames.conv_reason(conv)
        if reason is None:
            return as_frames(frames.per_frame(self, conv, as_video(x)))
        note_fallback(self, reason)
        called: Tensor = conv(x)
        return called

    def _blocks(self, blocks: Any, x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        return x

    def _end(self, x: Tensor) -> Tensor:
        h = units.group_normed(self, self.norm_out, as_video(x), per_frame=True)
        return self._convolved(self.conv_out, as_frames(h)).contiguous()


class EncoderForward(_Network):
    """`Encoder.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> [N, z, h, w] in front of the quantizer."""
        with overwriting(self, x):
            h = self._convolved(self.conv_in, x)
            for level in self.down:
                h = self._blocks(level.block, h)
                if hasattr(level, "downsample"):
                    h = self._convolved(level.downsample, h)
            h = self._blocks(self.mid_block, h)
        return self._end(h)


class DecoderForward(_Network):
    """`Decoder.forward`, with adaptive norms or without."""

    @guarded
    def forward(self, z: Tensor) -> Tensor:
        """Codes [N, z, h, w] -> images [N, 3, H, W]."""
        adaptive = getattr(self, "adaptive", None)
        with overwriting(self, z):
            h = self._blocks(self.mid_block, self._convolved(self.conv_in, z))
            for i in reversed(range(len(self.up))):
                h = h if adaptive is None else adaptive[i](h, z)
                h = self._blocks(self.up[i].block, h)
                if hasattr(self.up[i], "upsample"):
                    h = self.up[i].upsample(h)
        return self._end(h)

    def _reason(self, z: Tensor) -> str | None:
        return super()._reason(z)


def _check(module: Any) -> str | None:
    """Why no call of a module can be served: the same forwards stand in the file for clips."""
    for name in ("conv_in", "conv1"):
        conv = getattr(module, name, None)
        if conv is not None and not isinstance(conv, nn.Conv2d):
            return f"its {name} is a {type(conv).__name__}, not a Conv2d"
    return video.norm_check(module)


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    channels = next(p for p in module.parameters() if p.ndim == 4).shape[1]
    return (units.like_parameters(module, 1, channels, 8, 8),), {}


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    side = 2 ** len(module.down)
    return (units.like_parameters(module, 1, module.conv_in.in_channels, side, side),), {}


def _norm_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = units.like_parameters(module, 1, module.gn.num_channels, 8, 8)
    return (x, units.like_parameters(module, 1, module.gamma.in_features, 4, 4)), {}


_SWISH = {"swish": ("8b32ccd8c8b19e4f",)}


def _rule(
    name: str,
    target: str,
    mixin: type,
    uses: str,
    digests: dict[str, tuple[str, ...]],
    features: tuple[str, ...],
    **more: Any,
) -> Rule:
    return Rule(
        name=f"open_magvit2.image_{name}",
        ops=tuple(uses.split()),
        targets=(f"src.Open_MAGVIT2.modules.diffusionmodules.improved_model:{target}",),
        mixin=mixin,
        digests=digests,
        features=features,
        check=_check,
        tested_versions=("Open-MAGVIT2 21e1f93", "Open-MAGVIT2 ec8fba5"),
        **{"sample": _sample, **more},
    )


_BOTH = "causal_conv3d group_norm"

RULES = (
    _rule(
        "encoder", "Encoder", EncoderForward, _BOTH, {"Encoder.forward": ("40e2fe903e9b5be2",), **_SWISH},
        ("conv_in", "conv_out", "mid_block", "down", "norm_out"), reads=("conv_in", "conv_out", "norm_out"),
        sample=_encoder_sample,
    ),
    _rule(
        "decoder", "Decoder", DecoderForward, _BOTH,
        {"Decoder.forward": ("dd8e05f95f510692", "4cf167d0bb65e896"), **_SWISH},
        ("conv_in", "conv_out", "mid_block", "up", "norm_out"), reads=("conv_in", "conv_out", "norm_out"),
    ),
    _rule(
        "block", "ResBlock", BlockForward, _BOTH,
        {"ResBlock.forward": ("dd5fd212d238ed6d", "4843aba4c2b4d96e"), **_SWISH},
        ("in_filters", "conv1", "conv2", "norm2"), reads=("*",),
    ),
    _rule(
        "adaptive_norm", "AdaptiveGroupNorm", AdaptiveNormForward, "group_norm",
        {"AdaptiveGroupNorm.forward": ("a048c7c475561897",)}, ("gn", "gamma", "beta"), sample=_norm_sample,
    ),
    _rule(
        "upsample", "Upsampler", UpForward, "causal_conv3d",
        {"Upsampler.forward": ("973fe6d1f6846495",), "depth_to_space": ("4275a18b5f142561",)},
        ("conv1", "depth2space"), reads=("conv1",),
    ),
)  # fmt: skip
