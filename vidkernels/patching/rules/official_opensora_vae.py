# SPDX-License-Identifier: Apache-2.0
"""Rules for the temporal VAE of Open-Sora 1.2 (`vae_temporal.py`) and copies of it, found by the digests of their methods:
causal convolutions without padded copies, norm + SiLU in one op, residuals inside the last convolution. Its spatial half
is diffusers' AutoencoderKL."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_memory import may_write, overwriting
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason


def _convolved(owner: Any, conv: Any, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """A causal convolution, its padding as coordinates."""
    return units.convolve(owner, conv._modules["conv"], x, residual, out, **units.padding_of(conv))


def _padding_reason(conv: Any) -> str | None:
    """Why the padding of a causal convolution is not the op's. Of the encoder's last one torch pads "same": a single tap."""
    kernel = conv._modules["conv"]
    same = kernel.padding == "same" and all(size == 1 for size in kernel.kernel_size)
    if conv.pad_mode in units.PAD_MODES and (same or not any(kernel.padding)):
        return None
    return f"a convolution pads by mode {conv.pad_mode} and {kernel.padding}"


class ConvForward(Fused):
    """`CausalConv3d.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, K, T', H, W]."""
        return _convolved(self, self, x)

    def _reason(self, x: Tensor) -> str | None:
        return video_reason(x) or units.kernel_reason(self.conv, nn.Conv3d) or _padding_reason(self)


class BlockForward(Fused):
    """`ResBlock.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, filters, T, H, W]."""
        clip, parts = channels_last(x), self._modules
        h = _convolved(self, parts["conv1"], units.group_normed(self, parts["norm1"], clip))
        h = units.group_normed(self, parts["norm2"], h)
        shortcut = clip if self.in_channels == self.filters else _convolved(self, parts["conv3"], clip)
        y = _convolved(self, parts["conv2"], h, shortcut, shortcut if may_write(clip) else None)
        return restored(y, x)

    def _reason(self, x: Tensor) -> str | None:
        parts, wrapper = self._modules, self._vidkernels_home.CausalConv3d
        reason = video_reason(x) or units.group_reason(parts["norm1"], parts["norm2"])
        for name in ("conv1", "conv2", "conv3"):
            if name in parts:
                reason = reason or units.wrapped_reason(parts[name], wrapper, nn.Conv3d) or _padding_reason(parts[name])
        return reason or child_reason(parts["activate"], nn.SiLU)


class _Network(Fused):
    def _reason(self, x: Tensor) -> str | None:
        return video_reason(x) or units.group_reason(self.norm1) or child_reason(self.activate, nn.SiLU)

    def _blocks(self, blocks: Any, x: Tensor) -> Tensor:
        for index in range(self.num_res_blocks):
            x = blocks[index](x)
        return x


class EncoderForward(_Network):
    """`Encoder.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, 4, T, H, W] -> moments [B, 2 z, T / ratio, H, W]."""
        with overwriting(self, x):
            x = self.conv_in(channels_last(x))
            for level in range(self.num_blocks):
                x = self._blocks(self.block_res_blocks[level], x)
                if level < self.num_blocks - 1:
                    x = self.conv_blocks[level](x)
            x = self._blocks(self.res_blocks, x)
        y: Tensor = self.conv2(units.group_normed(self, self.norm1, channels_last(x)))
        return y.contiguous()


class DecoderForward(_Network):
    """`Decoder.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """Latents [B, z, T, H, W] -> [B, 4, T ratio, H, W]."""
        with overwriting(self, x):
            x = self._blocks(self.res_blocks, self.conv1(channels_last(x)))
            for level in reversed(range(self.num_blocks)):
                x = self._blocks(self.block_res_blocks[level], x)
                if level > 0:
                    x = self._upsampled(level - 1, x)
        y: Tensor = self.conv_out(units.group_normed(self, self.norm1, channels_last(x)))
        return y.contiguous()

    def _upsampled(self, level: int, x: Tensor) -> Tensor:
        """The next level's clip: a convolution whose channels are spread over frames, or the clip as it is."""
        factors = (2 if self.temporal_downsample[level] else 1, self.s_stride, self.s_stride)
        wide: Tensor = self.conv_blocks[level](x)
        return wide if factors == (1, 1, 1) else channels_last(units.from_channels(channels_last(wide), factors))


def _silu_check(module: Any) -> str | None:
    return None if type(module.activate) is nn.SiLU else f"its activation is {type(module.activate).__name__}, not SiLU"


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kernel = next(parameter for parameter in module.parameters() if parameter.ndim == 5)
    return (units.like_parameters(module, 1, kernel.shape[1], 4, 6, 8),), {}


_CONV = {"CausalConv3d.__init__": ("18c19392eb0bbfe2",), "CausalConv3d.forward": ("13dea85e79967e35",)}
_BLOCK = _CONV | {"ResBlock.forward": ("a8e8aeb55693f803",)}
_BOTH = ("causal_conv3d", "group_norm")
_FILE = "opensora.models.vae.vae_temporal"
_TESTED = ("Open-Sora 1.2",)

RULES = (
    Rule(
        name="opensora_vae.encoder",
        ops=("group_norm",),
        targets=(f"{_FILE}:Encoder",),
        mixin=EncoderForward,
        digests={"Encoder.forward": ("c0a25efc72c29832",)},
        features=("block_res_blocks", "conv_blocks", "res_blocks", "conv_in"),
        reads=("norm1",),
        check=_silu_check,
        sample=_sample,
        tested_versions=_TESTED,
    ),
    Rule(
        name="opensora_vae.decoder",
        ops=("group_norm",),
        targets=(f"{_FILE}:Decoder",),
        mixin=DecoderForward,
        digests={"Decoder.forward": ("0e060f1061952d48",)},
        features=("block_res_blocks", "conv_blocks", "res_blocks", "conv_out"),
        reads=("norm1",),
        check=_silu_check,
        sample=_sample,
        tested_versions=_TESTED,
    ),
    Rule(
        name="opensora_vae.resblock",
        ops=_BOTH,
        targets=(f"{_FILE}:ResBlock",),
        mixin=BlockForward,
        digests=_BLOCK,
        features=("norm1", "conv1.conv", "norm2", "conv2.conv", "activate", "filters"),
        reads=("*",),
        check=_silu_check,
        sample=_sample,
        tested_versions=_TESTED,
    ),
    Rule(
        name="opensora_vae.causal_conv",
        ops=("causal_conv3d",),
        targets=(f"{_FILE}:CausalConv3d",),
        mixin=ConvForward,
        digests=_CONV,
        features=("time_causal_padding", "pad_mode", "conv"),
        reads=("conv",),
        check=_padding_reason,
        sample=_sample,
        tested_versions=_TESTED,
    ),
)
