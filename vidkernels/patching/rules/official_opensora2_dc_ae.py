# SPDX-License-Identifier: Apache-2.0
"""Rules for the video autoencoder of Open-Sora 2.0 with high compression (`dc_ae`) and copies of it, by the digests of its layers:
convolutions that look both ways without padded copies, norm + SiLU in one pass, nearest-up + convolution by phases, the gate of a
wide MLP in one pass. Linear attention and the shuffles of shortcuts stay upstream's; networks bring clips to the layout of the
convolutions and back. Image models, of 2-D convolutions, stay upstream's as a whole."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import child_reason, guarded, parameter_of
from vidkernels.patching._match import digest
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason

NORMS = {"a630f3b12f6cc16f"}  # `RMSNorm3d.forward`


def _norm_class(home: Any) -> Any:
    return sys.modules[home.build_norm.__module__].RMSNorm3d


def _normed(owner: Any, norm: Any, x: Tensor, activation: str | None = None) -> Tensor:
    """A norm's result in the wider dtype of x and weight: under autocast that of the weight."""
    weight, bias = parameter_of(norm, "weight"), parameter_of(norm, "bias")
    options: dict[str, Any] = {"kind": "rms", "eps": norm.eps, "activation": activation}
    options["backend"] = owner._vidkernels_backend("channel_norm")
    result: Tensor = ops.channel_norm(x.to(torch.promote_types(x.dtype, weight.dtype)), weight, bias, **options)
    return result


def _affine_reason(norm: Any) -> str | None:
    whole = norm.elementwise_affine and parameter_of(norm, "bias") is not None
    return None if whole else "a norm has no weight or no bias"


def _padding(layer: Any) -> dict[str, Any]:
    """The zeros around a clip, as options of `ops.causal_conv3d` and `ops.upsample_conv3d`."""
    left, right, top, bottom, front, behind = layer.padding
    return {"time_padding": "zeros", "pad_frames": (front, behind), "spatial_padding": (left, right, top, bottom)}


def _kernel_reason(layer: Any, home: Any) -> str | None:
    """Why a layer's convolution must be called."""
    if not layer.is_video or layer.pad_mode_3d != "constant" or layer.pad is not F.pad:
        return "a layer is for images or does not pad by zeros"
    kernel = layer._modules["conv"]
    reason = child_reason(kernel, home.ChannelChunkConv3d)
    if reason is None and (kernel.padding_mode != "zeros" or any(kernel.padding)):
        reason = "a convolution pads by itself, too"
    return reason


class ConvForward(Fused):
    """`ConvLayer.forward`: dropout, convolution, norm, activation; the last two may be missing."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, K, T', H', W']."""
        norm, act = self.norm, self.act
        y = self._convolved(x if self.dropout is None else self.dropout(x))
        silu = act is not None and child_reason(act, nn.SiLU) is None
        if norm is not None:
            y = _normed(self, norm, y, "silu" if silu else None)
        elif silu:
            y = F.silu(y, inplace=not torch.is_grad_enabled())
        if act is not None and not silu:
            y = act(y)
        return y

    def _convolved(self, x: Tensor) -> Tensor:
        kernel: Any = self._modules["conv"]
        if kernel.groups == 1:
            return units.convolve(self, kernel, x, **_padding(self))
        sides = self.padding[4], self.padding[2], self.padding[0]
        weight, bias = parameter_of(kernel, "weight"), parameter_of(kernel, "bias")
        return restored(F.conv3d(x, weight, bias, kernel.stride, sides, kernel.dilation, kernel.groups), x)

    def _reason(self, x: Tensor) -> str | None:
        reason = video_reason(x) or _kernel_reason(self, self._vidkernels_home)
        if reason is None and self.conv.groups != 1 and self.padding[::2] != self.padding[1::2]:
            reason = "a grouped convolution pads its two sides differently"
        if self.norm is not None:
            reason = reason or child_reason(self.norm, _norm_class(self._vidkernels_home)) or _affine_reason(self.norm)
        return reason


class NormForward(Fused):
    """`RMSNorm3d.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W]."""
        return _normed(self, self, x)

    def _reason(self, x: Tensor) -> str | None:
        return video_reason(x) or _affine_reason(self)


class UpsampleForward(Fused):
    """`InterpolateConvUpSampleLayer.forward`. A clip of one frame stays one."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, K, T or f T, f H, f W]."""
        kernel, factor = self.conv.conv, self.factor
        options: dict[str, Any] = {
            "scale": (factor if self.temporal_upsample and x.shape[2] != 1 else 1, factor, factor)
        }
        options["backend"] = self._vidkernels_backend("causal_conv3d")
        weight, bias = parameter_of(kernel, "weight"), parameter_of(kernel, "bias")
        y: Tensor = ops.upsample_conv3d(channels_last(x), weight, bias, **options, **_padding(self.conv))
        return restored(y, x)

    def _reason(self, x: Tensor) -> str | None:
        home, layer = self._vidkernels_home, self.conv
        reason = video_reason(x) or child_reason(layer, home.ConvLayer) or _kernel_reason(layer, home)
        return reason or _upsample_check(self)


def _upsample_check(module: Any) -> str | None:
    layer = module.conv
    plain = layer.norm is None and layer.act is None and layer.dropout is None and isinstance(module.factor, int)
    kernel = layer.conv
    plain = plain and kernel.groups == 1 and kernel.stride == (1, 1, 1) and kernel.dilation == (1, 1, 1)
    return None if plain and module.mode == "nearest" else "it is more than a nearest upsampling and a convolution"


class GluForward(Fused):
    """`GLUMBConv.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W]."""
        wide = units.as_rows(channels_last(self.depth_conv(self.inverted_conv(x))))
        gated = ops.gated_activation(wide, "silu", backend=self._vidkernels_backend("gated_activation"))
        return restored(channels_last(self.point_conv(units.as_clip(gated))), x)

    def _reason(self, x: Tensor) -> str | None:
        return video_reason(x) or child_reason(self.glu_act, nn.SiLU)


class NetworkForward(Fused):
    """`Encoder.forward` and `Decoder.forward`, on one layout."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the same axes, contiguous."""
        y: Tensor = super().forward(channels_last(x))
        return y.contiguous()

    def _reason(self, x: Tensor) -> str | None:
        return video_reason(x)


def _video_check(module: Any) -> str | None:
    return None if module.cfg.is_video else "it is a network for images"


def _conv_check(layer: Any) -> str | None:
    if not layer.is_video:
        return "it is a layer for images"
    norm = layer.norm
    if norm is not None and digest(type(norm).forward) not in NORMS:
        return f"its norm is a {type(norm).__name__}, not a known RMSNorm3d"
    return None


def _glu_check(module: Any) -> str | None:
    return None if isinstance(module.glu_act, nn.SiLU) else f"its gate is {type(module.glu_act).__name__}, not SiLU"


def _sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = next(p for p in module.parameters() if p.ndim == 5)
    groups = module.conv.groups if hasattr(getattr(module, "conv", None), "groups") else 1
    return (units.like_parameters(module, 1, weight.shape[1] * groups, 3, 6, 8),), {}


def _norm_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 1, module.weight.numel(), 3, 4, 4),), {}


def _network_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    halvings = 2 ** (len(module.stages) - 1)
    weight = next(p for p in module.parameters() if p.ndim == 5)
    size = (4, 2 * halvings, 2 * halvings) if weight.shape[1] <= 4 else (2, 2, 2)
    return (units.like_parameters(module, 1, weight.shape[1], *size),), {}


def _rule(name: str, target: str, mixin: type, uses: str, digest: str, features: str, **more: Any) -> Rule:
    more = {"sample": _sample, **more}
    return Rule(
        name=f"opensora2_dc_ae.{name}",
        ops=tuple(uses.split()),
        targets=(f"opensora.models.dc_ae.models.{target}",),
        mixin=mixin,
        digests={f"{target.partition(':')[2]}.forward": (digest,), **more.pop("code", {})},
        features=tuple(features.split()),
        tested_versions=("hpcaitech/Open-Sora 2.0 (16c304b)",),
        **more,
    )


_CHUNKS = {"ChannelChunkConv3d.forward": ("aaa97ec5e4a21b38",)}
_LAYER = {"ConvLayer.forward": ("011061239f3d5646",)}
_NETWORK: dict[str, Any] = {"check": _video_check, "sample": _network_sample}

RULES = (
    _rule(
        *("encoder", "dc_ae:Encoder", NetworkForward, "causal_conv3d", "8e30a5c9349c9744"),
        *("project_in stages project_out cfg",),
        **_NETWORK,
    ),
    _rule(
        *("decoder", "dc_ae:Decoder", NetworkForward, "causal_conv3d", "bd3c0983b794a534"),
        *("project_in stages project_out cfg",),
        **_NETWORK,
    ),
    _rule(
        *("glu", "nn.ops:GLUMBConv", GluForward, "gated_activation", "ef226d5d823c80f6"),
        *("inverted_conv depth_conv point_conv",),
        check=_glu_check,
    ),
    _rule(
        *("upsample", "nn.ops:InterpolateConvUpSampleLayer", UpsampleForward, "causal_conv3d", "c279484258ffc767"),
        *("conv temporal_upsample",),
        code=_CHUNKS | _LAYER | {"chunked_interpolate": ("300c8c2cafa10054",)},
        check=_upsample_check,
        reads=("conv", "conv.conv"),
    ),
    _rule(
        *("conv", "nn.ops:ConvLayer", ConvForward, "causal_conv3d channel_norm", "011061239f3d5646"),
        *("conv is_video",),
        code=_CHUNKS,
        check=_conv_check,
        reads=("conv", "norm"),
    ),
    _rule(
        *("norm", "nn.norm:RMSNorm3d", NormForward, "channel_norm", "a630f3b12f6cc16f", "elementwise_affine eps"),
        sample=_norm_sample,
    ),
)
