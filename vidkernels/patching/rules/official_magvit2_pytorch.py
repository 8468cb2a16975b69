# SPDX-License-Identifier: Apache-2.0
"""Rules for the layers of magvit2-pytorch's `VideoTokenizer`, and copies of them, found by the digests of their methods.

The tokenizer brings a clip to channels-last memory once, and every layer with a rule keeps the format that it is given:
no rearrangement around 2-D and 1-D convolutions, no padded copy in front of any. Attention, gate loops, conditioned
layers and discriminators run upstream's code; LFQ and FSQ have rules in `quantizers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import call_reason, child_reason, note_fallback
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules._vae_units import (
    channels_last,
    convolve,
    is_autocast,
    kernel_reason,
    pointwise,
    restored,
    rms_normed,
    video_reason,
)


class TokenizerCalls(Fused):
    """`VideoTokenizer.encode` and `decode`: the memory format that the layers inside hand on."""

    def encode(self, video: Any, *args: Any, **kwargs: Any) -> Any:
        encoded = super().encode(_clip(video), *args, **kwargs)  # type: ignore[misc]
        return encoded.contiguous() if isinstance(encoded, Tensor) else encoded

    def decode(self, quantized: Any, *args: Any, **kwargs: Any) -> Tensor:
        decoded: Tensor = super().decode(_clip(quantized), *args, **kwargs)  # type: ignore[misc]
        return decoded.contiguous()


def _clip(x: Any) -> Any:
    """A clip in channels-last memory; what else upstream takes, as it is."""
    return channels_last(x) if isinstance(x, Tensor) and x.ndim == 5 and call_reason(x) is None else x


class CausalConvForward(Fused):
    """`CausalConv3d.forward`: the padding as coordinates."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, K, T', H, W]."""
        reason = video_reason(x) or kernel_reason(self.conv)
        if reason is None:
            reason = _padding_reason(self, x)
        if reason is not None:
            note_fallback(self, reason)
            original: Tensor = super().forward(x)
            return original
        return _causal(self, self, x)


def _padding_reason(conv: Any, x: Tensor) -> str | None:
    """Why a causal convolution's padding is not the op's."""
    if any(conv.conv.padding):
        return "a convolution pads twice"
    known = conv.pad_mode in ("constant", "replicate") or conv.time_pad >= x.shape[2]
    return None if known else f"a convolution pads by {conv.pad_mode!r}"


def _causal(owner: Any, conv: Any, x: Tensor) -> Tensor:
    """A causal convolution of `owner`. Upstream pads by zeros, or repeats what lies at the borders, in space as well; a
    clip that is no longer than the padding gets zeros either way."""
    mode = "replicate" if conv.pad_mode == "replicate" and conv.time_pad < x.shape[2] else "zeros"
    padding = conv.time_causal_padding
    options: dict[str, Any] = {"time_padding": mode, "spatial_padding_mode": mode, "pad_frames": tuple(padding[4:])}
    return convolve(owner, conv.conv, x, spatial_padding=tuple(padding[:4]), **options)


class ResidualUnitForward(Fused):
    """`Residual.forward` around causal convolution, ELU, 1x1x1 convolution, ELU and squeeze-excite."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """[B, C, T, H, W] -> x + gates * ELU(conv(ELU(causal conv(x))))."""
        reason = self._reason(x, kwargs)
        if reason is not None:
            note_fallback(self, reason)
            original: Tensor = super().forward(x, **kwargs)
            return original
        conv, _, mixing, _, excite = self.fn
        inplace = not torch.is_grad_enabled()
        h = F.elu(_causal(self, conv, x), inplace=inplace)
        h = F.elu(pointwise(self, mixing, h), inplace=inplace)
        gates = _gates(excite, h)
        if is_autocast(x) or h.dtype != x.dtype:
            return gates * h + x
        return torch.addcmul(x, gates, h)

    def _reason(self, x: Any, kwargs: dict[str, Any]) -> str | None:
        reason = video_reason(x) or (f"it was called with {', '.join(kwargs)}" if kwargs else None)
        if reason is not None:
            return reason
        home: Any = self._vidkernels_home
        if type(self.fn) is not nn.Sequential or len(self.fn) != 5:
            return "a unit does not have five layers"
        layers: Any = self.fn
        conv, first, mixing, second, excite = layers
        reason = child_reason(self.fn, nn.Sequential) or child_reason(conv, home.CausalConv3d)
        reason = reason or kernel_reason(conv.conv) or _padding_reason(conv, x)
        reason = reason or child_reason(first, nn.ELU) or child_reason(second, nn.ELU)
        reason = reason or kernel_reason(mixing, nn.Conv3d)
        if reason is None and (mixing.kernel_size != (1, 1, 1) or mixing.stride != (1, 1, 1) or any(mixing.padding)):
            reason = "the second convolution of a unit has more than one tap"
        if reason is None and (first.alpha != 1 or second.alpha != 1):
            reason = "an ELU has another slope"
        return reason or child_reason(excite, home.SqueezeExcite) or _excite_reason(excite)


def _excite_reason(excite: Any) -> str | None:
    """Why a squeeze-excite has to be called."""
    squeeze, between, expand, last = excite.net
    reason = child_reason(excite.to_k, nn.Conv2d) or child_reason(squeeze, nn.Conv2d) or child_reason(expand, nn.Conv2d)
    return reason or child_reason(between, nn.LeakyReLU) or child_reason(last, nn.Sigmoid)


def _gates(excite: Any, x: Tensor) -> Tensor:
    """[B, C, T, 1, 1]: of each frame, a mean of its positions weighted by a softmax, through two layers."""
    rows = x.permute(0, 2, 3, 4, 1).flatten(2, 3)  # [B, T, H*W, C], a view of either memory format
    squeeze, between, expand, _ = excite.net
    weight, bias = excite.to_k.weight.flatten(), excite.to_k.bias
    if torch.is_grad_enabled() and rows.dtype in (torch.float32, torch.float64):
        # Products with a vector add all positions one after the other on a CPU, which leaves the gradient of to_k 5 times
        # as far off as upstream's; sums add them in a tree.
        share = ((rows * weight).sum(3) + bias).softmax(2)
        mean = (share[..., None] * rows).sum(2)  # [B, T, C]
    else:
        share = (torch.matmul(rows, weight) + bias).softmax(2)
        mean = (share[:, :, None] @ rows).squeeze(2)
    hidden = F.leaky_relu(F.linear(mean, squeeze.weight.flatten(1), squeeze.bias), between.negative_slope)
    gates = F.linear(hidden, expand.weight.flatten(1), expand.bias).sigmoid()
    return gates.transpose(1, 2)[..., None, None]


class DownForward(Fused):
    """`SpatialDownsample2x.forward` and `TimeDownsample2x.forward`."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> half the height and width, or half the frames."""
        reason = video_reason(x) or kernel_reason(self.conv, nn.Conv1d, nn.Conv2d)
        if reason is not None:
            note_fallback(self, reason)
            original: Tensor = super().forward(x)
            return original
        conv: Any = self.conv
        spatial = conv.weight.ndim == 4
        x = self.maybe_blur(x, space_only=True) if spatial else self.maybe_blur(x, time_only=True)
        backend = self._vidkernels_backend("causal_conv3d")
        if spatial:
            weight, (height, width) = conv.weight.unsqueeze(2), conv.padding
            borders = (width, width, height, height)
            options: dict[str, Any] = {"stride": (1, *conv.stride), "pad_frames": 0, "spatial_padding": borders}
        else:
            weight = conv.weight[..., None, None]
            options = {"stride": (*conv.stride, 1, 1), "pad_frames": self.time_causal_padding, "spatial_padding": 0}
        result: Tensor = ops.causal_conv3d(x, weight, conv.bias, backend=backend, **options)
        return result


class UpForward(Fused):
    """`SpatialUpsample2x.forward` and `TimeUpsample2x.forward`."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> 1x1 convolution, SiLU, and the channels of a position spread over 2x2 pixels or 2 frames."""
        conv, activation = self.net[0], self.net[1]
        reason = video_reason(x) or kernel_reason(conv, nn.Conv1d, nn.Conv2d) or child_reason(activation, nn.SiLU)
        if reason is not None:
            note_fallback(self, reason)
            original: Tensor = super().forward(x)
            return original
        spatial = conv.weight.ndim == 4
        parts = 4 if spatial else 2
        # Upstream's filters count (channel, place); as (place, channel) whole rows of channels move to their pixels.
        weight = conv.weight.flatten(1).unflatten(0, (-1, parts)).transpose(0, 1).flatten(0, 1)
        bias = conv.bias.unflatten(0, (-1, parts)).t().flatten()
        options: dict[str, Any] = {"activation": "silu", "backend": self._vidkernels_backend("causal_conv3d")}
        y: Tensor = ops.causal_conv3d(x, weight[..., None, None, None], bias, **options)
        batch, _, frames, height, width = y.shape
        rows = y.permute(0, 2, 3, 4, 1)  # [B, T, H, W, place * C]
        if spatial:
            rows = rows.unflatten(4, (2, 2, -1)).permute(0, 1, 2, 4, 3, 5, 6)
            rows = rows.reshape(batch, frames, 2 * height, 2 * width, -1)
        else:
            rows = rows.unflatten(4, (2, -1)).permute(0, 1, 4, 2, 3, 5)
            rows = rows.reshape(batch, 2 * frames, height, width, -1)
        return restored(rows.permute(0, 4, 1, 2, 3), x)


class RMSNormForward(Fused):
    """`RMSNorm.forward` over the channels of a clip, in front of a feed-forward layer."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> x / |x| * sqrt(C) * gamma + bias."""
        reason = video_reason(x)
        if reason is None and (is_autocast(x) or x.dtype != self.gamma.dtype):
            reason = "under autocast upstream's result is float32"
        if reason is not None:
            note_fallback(self, reason)
            original: Tensor = super().forward(x)
            return original
        return rms_normed(self, self, x, None)


def _norm_check(module: Any) -> str | None:
    if module.channel_first and module.gamma.ndim == 4:
        return None
    return "it is no norm of clips (discriminators, whose gradient penalty differentiates twice, have these)"


_MODULE = "magvit2_pytorch.magvit2_pytorch"
_TESTED = ("magvit2-pytorch 0.5.1",)
_EXCITE = {"SqueezeExcite.forward": ("7d9dbe1c877b84e8",)}
_CAUSAL = {"CausalConv3d.forward": ("7d5cff8e85479b21",)}


def _tokenizer_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = module.conv_in.conv.weight
    options = {"dtype": weight.dtype, "device": weight.device}
    condition = {"cond": torch.randn(1, module.dim_cond, **options)} if module.has_cond else {}
    return (torch.randn(1, module.channels, 1, module.image_size, module.image_size, **options),), condition


def _nothing(returned: Any) -> None:
    """What `verify` compares of a tokenizer, whose layers it compares one by one: a code is a sign, and where that hangs
    on the last bit two right results differ by a whole step."""


def _clip_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight: Tensor = next(p for p in module.parameters() if p.ndim > 1)
    return (torch.randn(1, weight.shape[1], 4, 6, 10, dtype=weight.dtype, device=weight.device),), {}


def _norm_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    gamma = module.gamma
    return (torch.randn(1, gamma.shape[0], 2, 4, 4, dtype=gamma.dtype, device=gamma.device),), {}


def _layer(
    name: str, ops_used: tuple[str, ...], target: str, mixin: type, code: Mapping[str, tuple[str, ...]], **more: Any
) -> Rule:
    return Rule(
        name=f"magvit2_pytorch.{name}",
        ops=ops_used,
        targets=(f"{_MODULE}:{target}",),
        mixin=mixin,
        digests=code,
        tested_versions=_TESTED,
        **{"sample": _clip_sample, **more},
    )


_CONV = ("causal_conv3d",)

RULES = (
    _layer(
        "tokenizer", _CONV, "VideoTokenizer", TokenizerCalls,
        {"VideoTokenizer.encode": ("dfc10d90f2655327",), "VideoTokenizer.decode": ("548c8dfb987b62ef",)},
        features=("encoder_layers", "decoder_layers", "quantizers", "time_padding"),
        sample=_tokenizer_sample, result=_nothing,
    ),
    _layer(
        "residual_unit", _CONV, "Residual", ResidualUnitForward,
        {"Residual.forward": ("b66779c5b34ac08e",), **_CAUSAL, **_EXCITE},
        features=("fn.0.conv", "fn.2", "fn.4.to_k", "fn.4.net"), reads=("*",),
    ),
    _layer(
        "causal_conv", _CONV, "CausalConv3d", CausalConvForward, _CAUSAL,
        features=("time_causal_padding",), reads=("conv",),
    ),
    _layer(
        "spatial_down", _CONV, "SpatialDownsample2x", DownForward,
        {"SpatialDownsample2x.forward": ("747ec8ff41fdf59d",)}, reads=("conv",),
    ),
    _layer(
        "time_down", _CONV, "TimeDownsample2x", DownForward,
        {"TimeDownsample2x.forward": ("63cd4461b4143069",)}, reads=("conv",),
    ),
    _layer(
        "spatial_up", _CONV, "SpatialUpsample2x", UpForward,
        {"SpatialUpsample2x.forward": ("df42753d4fa98f4f",)}, reads=("net.0",),
    ),
    _layer(
        "time_up", _CONV, "TimeUpsample2x", UpForward,
        {"TimeUpsample2x.forward": ("1e8e061cf78eaf20",)}, reads=("net.0",),
    ),
    _layer(
        "rms_norm", ("channel_norm",), "RMSNorm", RMSNormForward, {"RMSNorm.forward": ("380f6c82270f8128",)},
        features=("gamma", "scale", "channel_first", "bias"), check=_norm_check, sample=_norm_sample,
    ),
)  # fmt: skip
