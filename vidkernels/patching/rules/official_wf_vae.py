# SPDX-License-Identifier: Apache-2.0
"""Rules for the networks of WF-VAE and WF-VAE 2, the VAEs of Open-Sora-Plan 1.3 and 1.5, found by the digests of their methods.

Residual blocks, samplers and convolutions are served by `official_opensora_plan_vae`, in chunks, too. A network keeps one layout,
drops what upstream keeps until its end, and lets blocks write over their inputs; a wavelet transform is one matrix product.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vidkernels.patching._guard import call_reason, child_reason, guarded
from vidkernels.patching._match import digest
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _frame_units as frames
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules import _wf_wavelets as wavelets
from vidkernels.patching.rules._opensora_plan_units import (
    FRAMEWISE,
    Family,
    as_clip,
    framewise_check,
    inner_function,
    last,
    norm_check,
    normed,
)
from vidkernels.patching.rules._vae_memory import overwriting
from vidkernels.patching.rules._vae_units import channels_last, restored


class _Network(Family):
    """Stages are sequences of layers, some of which are convolutions over frames: they are read, the others called."""

    def _frame_conv(self, conv: Any, x: Tensor) -> Tensor:
        """In channels-last memory; x is a clip, or images [N, C, H, W]."""
        y = frames.per_frame(self, conv, as_clip(x))
        return y if x.ndim == 5 else frames.as_frames(y)

    def _normed_end(self, x: Tensor, activation: str | None) -> Tensor:
        y = normed(self, self.norm_out, as_clip(x), activation, per_frame=x.ndim == 4)
        return y if x.ndim == 5 else frames.as_frames(y)

    def _coefficients(self, stage: Any, x: Tensor) -> Tensor:
        """Of a level, by layers and a convolution over frames behind them."""
        *others, last = stage
        for layer in others:
            x = layer(x)
        return self._frame_conv(last, x).contiguous()

    def _frame_conv_reason(self, *convs: Any) -> str | None:
        """Why convolutions over frames must be called."""
        for conv in convs:
            reason = child_reason(conv, self._vidkernels_home.Conv2d)
            if reason is None and (conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str)):
                reason = f"a convolution has {conv.groups} groups and the padding {conv.padding_mode} {conv.padding}"
            if reason is not None:
                return reason
        return None

    def _stage_reason(self, *stages: Any) -> str | None:
        """Why sequences with a convolution over frames must be called."""
        for stage in stages:
            reason = child_reason(stage, nn.Sequential)
            if reason is not None:
                return reason
        return None


class EncoderForward(_Network):
    """`Encoder.forward`."""

    @guarded
    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[B, 3, T, H, W] -> moments [B, 2 z, 1 + (T - 1) / 4, H / 8, W / 8] and the coefficients of two levels."""
        with overwriting(self, x):
            coefficients = channels_last(self.wavelet_transform_in(x))
            fine = self.wavelet_transform_l1(coefficients[:, :3])
            coarse = self.wavelet_transform_l2(fine[:, :3])
            h = self._stage(self.down1, coefficients)
            del coefficients
            h = self._stage(self.down2, torch.cat([h, self._frame_conv(self.connect_l1, fine)], 1))
            h = self.mid(channels_last(torch.cat([h, self._frame_conv(self.connect_l2, coarse)], 1)))
        y: Tensor = self.conv_out(normed(self, self.norm_out, channels_last(h)))
        return y.contiguous(), (fine, coarse)

    def _stage(self, stage: Any, x: Tensor) -> Tensor:
        first, *others = stage
        x = self._frame_conv(first, x)
        for layer in others:
            x = layer(x)
        return x

    def _reason(self, x: Tensor) -> str | None:
        reason = self._clip_reason(x) or self._norm_reason(self.norm_out) or self._stage_reason(self.down1, self.down2)
        return reason or self._frame_conv_reason(self.connect_l1, self.connect_l2, self.down1[0], self.down2[0])


class DecoderForward(_Network):
    """`Decoder.forward`."""

    @guarded
    def forward(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Latents [B, z, T, H, W] -> frames [B, 3, 1 + 4 (T - 1), 8 H, 8 W] and the coefficients of two levels."""
        with overwriting(self, z):
            flow, h = _parted(self.mid(channels_last(self.conv_in(z))), self.energy_flow_hidden_size)
            coarse = self._coefficients(self.connect_l2, flow)
            detail = self.inverse_wavelet_transform_l2(coarse)
            flow, h = _parted(self.up2(h), self.energy_flow_hidden_size)
            fine = self._coefficients(self.connect_l1, flow)
            del flow
            fine = _with_detail(fine, detail)
            detail = self.inverse_wavelet_transform_l1(fine)
            h = self.layer(self.up1(h))
        h = normed(self, self.norm_out, channels_last(h))
        h = _with_detail(self._frame_conv(self.conv_out, h).contiguous(), detail)
        return self.inverse_wavelet_transform_out(h), (fine, coarse)

    def _reason(self, z: Tensor) -> str | None:
        reason = self._clip_reason(z) or self._norm_reason(self.norm_out)
        reason = reason or self._stage_reason(self.connect_l1, self.connect_l2)
        return reason or self._frame_conv_reason(self.conv_out, self.connect_l1[-1], self.connect_l2[-1])


class DownBlockForward(_Network):
    """`WFDownBlock.forward` of WF-VAE 2."""

    @guarded
    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Features and coefficients of one level -> those of the next coarser one."""
        coefficients = self.wavelet_transform(w[:, :3])
        h = self.down(self.res_block(last(x)))
        h = last(torch.cat([h, self._frame_conv(self.in_flow_conv, coefficients)], 1))
        return _like(self.out_res_block(h), x), coefficients

    def _reason(self, x: Tensor, w: Tensor) -> str | None:
        return self._frames_reason(x) or call_reason(w) or self._frame_conv_reason(self.in_flow_conv)


class UpBlockForward(_Network):
    """`WFUpBlock.forward` of WF-VAE 2."""

    @guarded
    def forward(self, x: Tensor, w: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Features of one level, and its lowest band where there is a coarser one -> both of the next finer level, coefficients."""
        flow, h = _parted(self.branch_conv(last(x)), self.energy_flow_size)
        coefficients = self._coefficients(self.out_flow_conv, flow)
        del flow
        if w is not None:
            coefficients = _with_detail(coefficients, w)
        detail = self.inverse_wavelet_transform(coefficients)
        return _like(self.out_res_block(self.up(self.res_block(h))), x), detail, coefficients

    def _reason(self, x: Tensor, w: Tensor | None = None) -> str | None:
        reason = self._frames_reason(x) or call_reason(x, w) or self._stage_reason(self.out_flow_conv)
        return reason or self._frame_conv_reason(self.out_flow_conv[-1])


class Encoder2Forward(_Network):
    """`Encoder.forward` of WF-VAE 2."""

    @guarded
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, 3, T, H, W] -> moments [B, 2 z, T', H', W'] and the coefficients of all levels; or images [N, 3, H, W]."""
        levels: list[Tensor] = []
        with overwriting(self, x):
            coefficients = last(self.wavelet_transform_in(x))
            h = self._frame_conv(self.conv_in, coefficients)
            for block in self.down_blocks:
                h, coefficients = block(h, coefficients)
                levels.append(coefficients)
            h = self.mid(h)
        y: Tensor = self.conv_out(self._normed_end(h, "silu"))
        return y.contiguous(), levels

    def _reason(self, x: Tensor) -> str | None:
        return self._frames_reason(x) or self._norm_reason(self.norm_out) or self._frame_conv_reason(self.conv_in)


class Decoder2Forward(_Network):
    """`Decoder.forward` of WF-VAE 2, whose last norm has no activation behind it."""

    _vidkernels_activation: ClassVar[str | None] = None

    @guarded
    def forward(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Latents [B, z, T, H, W] -> frames [B, 3, T', H', W'] and the coefficients of all levels; or of images [N, z, H, W]."""
        levels: list[Tensor] = []
        with overwriting(self, z):
            h = self.mid(last(self.conv_in(z)))
            detail: Any = None
            for block in self.up_blocks:
                h, detail, coefficients = block(h, detail)
                levels.append(coefficients)
        h = self._normed_end(h, self._vidkernels_activation)
        h = _with_detail(self._frame_conv(self.conv_out, h).contiguous(), detail)
        return self.inverse_wavelet_transform_out(h), levels

    def _reason(self, z: Tensor) -> str | None:
        return self._frames_reason(z) or self._norm_reason(self.norm_out) or self._frame_conv_reason(self.conv_out)


class ActivatedDecoder2Forward(Decoder2Forward):
    """`Decoder.forward` of copies for images, whose last norm has one."""

    _vidkernels_activation = "silu"


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format of x, both clips or both images."""
    return restored(y, x) if x.ndim == 5 else frames.frames_like(as_clip(y), x)


def _parted(h: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The last channels, which go to a level's coefficients, and the others; nobody else holds either."""
    return last(h[:, -count:]), last(h[:, :-count])


def _with_detail(coefficients: Tensor, detail: Tensor) -> Tensor:
    """The next finer level's lowest band goes to the first three coefficients, in place."""
    coefficients[:, :3] += detail
    return coefficients


_FRAME_CONV = {"c917e9609f93a58b"}
# Where a module has convolutions over frames, if it has them; a causal one may stand there.
_FRAME_CONVS = ("connect_l1", "connect_l2", "conv_in", "conv_out", "in_flow_conv", "out_flow_conv")


def _check(module: Any) -> str | None:
    names = [name for name in _FRAME_CONVS if hasattr(module, name) and not hasattr(getattr(module, name), "chan_in")]
    found = [getattr(module, name) for name in names]
    for conv in (stage[-1] if isinstance(stage, nn.Sequential) else stage for stage in found):
        kind = type(conv)
        inner = inner_function(kind) if digest(kind.forward) in FRAMEWISE else None
        if digest(inner) not in _FRAME_CONV:
            return f"its convolutions over frames are {kind.__name__} with an unknown forward"
    return norm_check(module)


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    size = (1, 3, 5, 32, 32) if hasattr(module.conv_out, "chan_in") else (2, 3, 32, 32)
    return (units.like_parameters(module, *size),), {}


def _decoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    conv = module.conv_in
    size = (1, conv.chan_in, 2, 4, 4) if hasattr(conv, "chan_in") else (2, conv.in_channels, 4, 4)
    return (units.like_parameters(module, *size),), {}


def _down_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    features, flow = module.in_channels, module.in_flow_conv.in_channels
    return (units.like_parameters(module, 1, features, 5, 8, 8), units.like_parameters(module, 1, flow, 5, 8, 8)), {}


def _up_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 1, module.in_channels, 3, 4, 4),), {}


_HOMES = ("opensora.models.causalvideovae.model.", "causalvideovae.model.")
_SILU = {"nonlinearity": ("8b32ccd8c8b19e4f",)}
_OPS = ("causal_conv3d", "group_norm", "channel_norm")
_TESTED = ("Open-Sora-Plan 1.3 (4b14d58)", "WF-VAE (27adef1, a327dd7)")
_TESTED_2 = ("WF-VAE (7709aa2)",)
_PARTS = ("connect_l1", "connect_l2", "mid")
# What `video_to_image` calls for frames.
_INNER: dict[str, tuple[str, ...]] = {
    "HaarWaveletTransform2D": ("475c0bb010794306",),
    "InverseHaarWaveletTransform2D": ("2e4c115ae621be14",),
}


def _rule(name: str, file: str, target: str, mixin: type, digests: dict[str, tuple[str, ...]], **more: Any) -> Rule:
    paths = tuple(f"{home}{file}:{target}" for home in _HOMES)
    options = {"tested_versions": _TESTED, **more}
    return Rule(f"wf_vae.{name}", options.pop("ops", ("causal_conv3d",)), paths, mixin, digests, **options)


def _wavelet(name: str, target: str, mixin: type, sample: Any, *digests: Any, **more: Any) -> Rule:
    own = {f"{target}.forward": digests, **more.pop("code", {})}
    return _rule(name, "modules.wavelet", target, mixin, own, sample=sample, **more)


def _network(
    name: str, target: str, mixin: type, sample: Any, *digests: str, reads: tuple[str, ...], **more: Any
) -> Rule:
    file = more.pop("file", "vae.modeling_wfvae")
    shared = {"ops": _OPS, "check": _check, "sample": sample, "result": _first, "code": _SILU, **more}
    code = {f"{target}.forward": digests, **shared.pop("code")}
    return _rule(name, file, target, mixin, code, reads=reads, **shared)


_NORM = ("norm_out", "norm_out.norm")
_VERSION_2: dict[str, Any] = {"file": "vae.modeling_wfvae2", "tested_versions": _TESTED_2}
_LEVEL: dict[str, Any] = {**_VERSION_2, "ops": ("causal_conv3d",), "code": {}}


def _first(returned: Any) -> Any:
    return returned[0]


SECOND_VERSION = (
    _network(
        *("encoder2", "Encoder", Encoder2Forward, _encoder_sample, "3fea6b1e19232447"),
        reads=(*_NORM, "conv_in"),
        features=("down_blocks", "wavelet_transform_in", "mid"),
        **_VERSION_2,
    ),
    _network(
        *("decoder2", "Decoder", Decoder2Forward, _decoder_sample, "b8bd2bd568e7e232"),
        reads=(*_NORM, "conv_out"),
        features=("up_blocks", "inverse_wavelet_transform_out", "mid"),
        **_VERSION_2,
    ),
    _network(
        *("activated_decoder2", "Decoder", ActivatedDecoder2Forward, _decoder_sample, "7b888b56849cfb0d"),
        reads=(*_NORM, "conv_out"),
        features=("up_blocks", "inverse_wavelet_transform_out", "mid"),
        **_VERSION_2,
    ),
    _network(
        *("down_block", "WFDownBlock", DownBlockForward, _down_sample, "48da9830a3a27f1b"),
        reads=("in_flow_conv",),
        **_LEVEL,
    ),
    _network(
        *("up_block", "WFUpBlock", UpBlockForward, _up_sample, "b444edebcb2bc237"), reads=("out_flow_conv",), **_LEVEL
    ),
)

RULES = (
    _network(
        *("encoder", "Encoder", EncoderForward, _encoder_sample, "ff2b2b3b320f352e", "667cb06501fe475b"),
        reads=(*_NORM, "connect_l1", "connect_l2", "down1", "down1.0", "down2", "down2.0"),
        features=("down1", "down2", "wavelet_transform_in", *_PARTS),
    ),
    _network(
        *("decoder", "Decoder", DecoderForward, _decoder_sample, "0c570798bdf49a2d", "a448cabdacc51d49"),
        reads=(*_NORM, "conv_out", "connect_l1", "connect_l2"),
        features=("up1", "up2", "inverse_wavelet_transform_out", *_PARTS),
    ),
    _wavelet(
        *("wavelet", "HaarWaveletTransform3D", wavelets.HaarForward, wavelets.sample),
        *("756a4c004b66ce6a", "31164f0171f81056", "8a41ef93ca302340"),
        code={"CausalConv3d.forward": ("9f2d9f6cc0fbce1e",)},
        features=tuple(f"{name}_conv.conv" for name in wavelets.VOLUME),
        reads=("*",),
        check=wavelets.conv_check,
    ),
    _wavelet(
        *("inverse_wavelet", "InverseHaarWaveletTransform3D", wavelets.InverseHaarForward, wavelets.inverse_sample),
        *("eee4994188ff2250", "405cb1949af51ec8"),
        features=wavelets.VOLUME,
        check=wavelets.buffer_check,
    ),
    _wavelet(
        *("frame_wavelet", "HaarWaveletTransform2D", wavelets.FrameHaarForward, wavelets.sample, *FRAMEWISE),
        features=wavelets.FRAME,
        check=framewise_check(_INNER, "HaarWaveletTransform2D"),
    ),
    _wavelet(
        *("inverse_frame_wavelet", "InverseHaarWaveletTransform2D", wavelets.InverseFrameHaarForward),
        *(wavelets.inverse_frame_sample, *FRAMEWISE),
        features=wavelets.FRAME,
        check=framewise_check(_INNER, "InverseHaarWaveletTransform2D"),
    ),
    *SECOND_VERSION,
)
