# SPDX-License-Identifier: Apache-2.0
"""Rules for the encoder and decoder of VQGAN and of latent diffusion's autoencoders (taming-transformers, latent-diffusion,
generative-models, and the many copies of one file), found by the digests of their methods.

Images are the frames of a clip. Upstream's encoder keeps the results of all its layers, ours only the one that is read next.
Blocks that take a timestep embedding, pooling without a convolution and learned codebooks stay upstream's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _frame_units as frames
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._frame_units import as_frames, as_video, frames_like, frames_reason
from vidkernels.patching.rules._vae_memory import overwriting


class BlockForward(Fused):
    """`ResnetBlock.forward` without a timestep embedding."""

    @guarded
    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H, W]."""
        return frames_like(frames.residual_block(self, self._layers(), as_video(x)), x)

    def _layers(self) -> frames.ResidualLayers:
        shortcut = None
        if self.in_channels != self.out_channels:
            shortcut = self.conv_shortcut if self.use_conv_shortcut else self.nin_shortcut
        return frames.ResidualLayers(self.norm1, self.conv1, self.norm2, self.conv2, shortcut, self.dropout)

    def _reason(self, x: Tensor, temb: Tensor | None) -> str | None:
        reason = frames_reason(x) or frames.residual_reason(self._layers())
        return reason or (None if temb is None else "it was called with a timestep embedding")


class AttentionForward(Fused):
    """`AttnBlock.forward`: scores written out, or torch's own attention."""

    @guarded
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """[N, C, H, W]: every image attends to itself, with one head as wide as the channels."""
        return frames_like(frames.attention(self, self._layers(), as_video(x)), x)

    def _layers(self) -> frames.AttentionLayers:
        return frames.AttentionLayers(self.norm, self.q, self.k, self.v, self.proj_out)

    def _reason(self, x: Tensor, **rest: Any) -> str | None:
        reason = frames_reason(x) or frames.attention_reason(self._layers())
        return reason or (f"it was called with {', '.join(rest)}" if rest else None)


class UpForward(Fused):
    """`Upsample.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2 H, 2 W]."""
        return frames_like(frames.doubled(self, self.conv, as_video(x)), x)

    def _reason(self, x: Tensor) -> str | None:
        return frames_reason(x) or frames.doubling_reason(self.conv)


class DownForward(Fused):
    """`Downsample.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H / 2, W / 2]."""
        return frames_like(frames.halved(self, self.conv, as_video(x)), x)

    def _reason(self, x: Tensor) -> str | None:
        return frames_reason(x) or frames.halving_reason(self.conv)


class _Network(Fused):
    def _frames_reason(self, x: Tensor, rest: dict[str, Any]) -> str | None:
        reason = frames_reason(x) or frames.conv_reason(self.conv_in) or frames.conv_reason(self.conv_out)
        reason = reason or units.group_reason(self.norm_out)
        return reason or (f"it was called with {', '.join(rest)}" if rest else None)

    def _begin(self, x: Tensor) -> Tensor:
        return as_frames(frames.per_frame(self, self.conv_in, as_video(x)))

    def _level(self, level: Any, h: Tensor) -> Tensor:
        for i, block in enumerate(level.block):
            h = block(h, None)
            if len(level.attn) > 0:
                h = level.attn[i](h)
        return h

    def _middle(self, h: Tensor) -> Tensor:
        middle: Any = self.mid
        result: Tensor = middle.block_2(middle.attn_1(middle.block_1(h, None)), None)
        return result

    def _end(self, h: Tensor) -> Tensor:
        normed = units.group_normed(self, self.norm_out, as_video(h), per_frame=True)
        return as_frames(frames.per_frame(self, self.conv_out, normed)).contiguous()


class EncoderForward(_Network):
    """`Encoder.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> moments or codes before quantization [N, z, h, w]."""
        with overwriting(self, x):
            h = self._begin(x)
            for level in self.down:
                h = self._level(level, h)
                if hasattr(level, "downsample"):
                    h = level.downsample(h)
            h = self._middle(h)
        return self._end(h)

    def _reason(self, x: Tensor) -> str | None:
        return self._frames_reason(x, {})


class DecoderForward(_Network):
    """`Decoder.forward`."""

    @guarded
    def forward(self, z: Tensor, **kwargs: Any) -> Tensor:
        """Latents [N, z, h, w] -> images [N, 3, H, W]."""
        self.last_z_shape = z.shape
        with overwriting(self, z):
            h = self._middle(self._begin(z))
            for i in reversed(range(len(self.up))):
                h = self._level(self.up[i], h)
                if hasattr(self.up[i], "upsample"):
                    h = self.up[i].upsample(h)
        if self.give_pre_end:
            return h.contiguous()
        h = self._end(h)
        return torch.tanh(h) if getattr(self, "tanh_out", False) else h

    def _reason(self, z: Tensor, **rest: Any) -> str | None:
        return self._frames_reason(z, rest)


def _network_check(module: Any) -> str | None:
    """Decoders of clips inherit the forward of one for images, with other layers."""
    for name in ("conv_in", "conv_out"):
        cls = type(getattr(module, name))
        if cls is not nn.Conv2d:
            return f"its {name} is a {cls.__name__}, not a Conv2d"
    return None


def _block_check(module: Any) -> str | None:
    return "it takes a timestep embedding" if hasattr(module, "temb_proj") else None


def _resampling_check(module: Any) -> str | None:
    return None if module.with_conv else "it has no convolution"


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    channels = next(p for p in module.parameters() if p.ndim == 4).shape[1]
    return (units.like_parameters(module, 1, channels, 8, 8),), {}


def _block_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (*_sample(module)[0], None), {}


def _attention_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 1, module.norm.num_channels, 8, 8),), {}


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    side = 2 ** (len(module.down) + 1)
    return (units.like_parameters(module, 1, module.conv_in.in_channels, side, side),), {}


_BOTH, _CONV = "causal_conv3d group_norm", "causal_conv3d"
_SILU = {"nonlinearity": ("8b32ccd8c8b19e4f",)}
_TESTED = (
    "taming-transformers 0.0.1", "latent-diffusion 1dbf39c", "generative-models 059d8e9", "stable-diffusion 10db192",
)  # fmt: skip


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
        name=f"vqgan.{name}",
        ops=tuple(uses.split()),
        targets=(f"taming.modules.diffusionmodules.model:{target}",),
        mixin=mixin,
        digests=digests,
        features=features,
        tested_versions=_TESTED,
        **{"sample": _sample, **more},
    )


_NETWORK = ("conv_in", "conv_out", "norm_out", "mid.block_1", "mid.attn_1", "mid.block_2")
_ENDS = ("conv_in", "conv_out", "norm_out")
_ATTENTION = ("norm", "q", "k", "v", "proj_out")

RULES = (
    _rule(
        "encoder", "Encoder", EncoderForward, _BOTH, {"Encoder.forward": ("1567c69e80c6fa6a",), **_SILU},
        (*_NETWORK, "down"), reads=_ENDS, check=_network_check, sample=_encoder_sample,
    ),
    _rule(
        "decoder", "Decoder", DecoderForward, _BOTH,
        # taming-transformers; with tanh; with arguments for layers of clips; with memory given back between levels
        {"Decoder.forward": ("b464fdcb8a7bba5d", "0824f75074c2ec3e", "697c103ff51423e0", "7ae102563671f935"), **_SILU},
        (*_NETWORK, "up", "give_pre_end"), reads=_ENDS, check=_network_check,
    ),
    _rule(
        "block", "ResnetBlock", BlockForward, _BOTH,
        {"ResnetBlock.forward": ("6a038a6d4e09afcd", "66c2724720b19594"), **_SILU},
        ("norm1", "conv1", "norm2", "conv2", "dropout", "use_conv_shortcut"), reads=("*",), check=_block_check,
        sample=_block_sample,
    ),
    _rule(
        "attention", "AttnBlock", AttentionForward, "group_norm",
        {"AttnBlock.forward": ("54269f806c229d0d", "97133f068b811cd0")}, _ATTENTION, reads=("*",),
        sample=_attention_sample,
    ),
    # generative-models calls torch's attention, in a method of its own.
    _rule(
        "fused_attention", "AttnBlock", AttentionForward, "group_norm",
        {"AttnBlock.forward": ("3be97c2b9987d9ce",), "AttnBlock.attention": ("82c72ef41e1d4856",)},
        (*_ATTENTION, "attention"), reads=("*",), sample=_attention_sample,
    ),
    _rule(
        "upsample", "Upsample", UpForward, _CONV, {"Upsample.forward": ("6288b45b54213ee0",)}, ("with_conv",),
        reads=("conv",), check=_resampling_check,
    ),
    _rule(
        "downsample", "Downsample", DownForward, _CONV, {"Downsample.forward": ("35560636504758f6",)}, ("with_conv",),
        reads=("conv",), check=_resampling_check,
    ),
)  # fmt: skip
