# SPDX-License-Identifier: Apache-2.0
"""Rules for the official VidTok networks, version 1.0, 1.1 and non-causal, found by the digests of their methods.

1.0 puts zero frames in front of every causal convolution and repeats frames when it upsamples; 1.1 repeats the first
frame of a layer's own input, interpolates in time, and keeps a clone of every convolution's whole input for the next
chunk, in unchunked calls as well. Both are called `EncoderCausal3DPadding` and `DecoderCausal3DPadding`; which one a
module is shows in its attributes. Everything between the first and the last convolution is the layout of diffusers'
rules (`_vidtok_units`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidkernels.patching._guard import call_reason, note_fallback
from vidkernels.patching._match import digest
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _official_vidtok_units as units
from vidkernels.patching.rules._vidtok_convs import Call, channels_last
from vidkernels.patching.rules._vidtok_units import Unit, normed, run
from vidkernels.patching.rules.diffusers_vidtok import ChunkMarks, call_of, clip_for, keeping


class _Network(Fused):
    """What encoders and decoders share."""

    def _begin(self, x: Tensor) -> tuple[Tensor, Call]:
        call = call_of(self, x, hasattr(self.conv_in, "causal_cache"), units.home_of(self._vidkernels_home))
        return run(units.CONV, self.conv_in, channels_last(x), call), call

    def _run(self, unit: Unit, module: Any, x: Tensor, call: Call) -> Tensor:
        if torch.is_grad_enabled() and getattr(module, "use_checkpoint", False):
            checkpointed: Tensor = checkpoint(run, unit, module, x, call, use_reentrant=False)
            return checkpointed
        return run(unit, module, x, call)

    def _pairs(self, frames: Any, pixels: Any, x: Tensor, call: Call) -> Tensor:
        """The residual blocks of a level: one for every frame, one for every pixel, and so on."""
        for frame_block, time_block in zip(frames.block, pixels.block, strict=True):
            x = self._run(units.FRAME_BLOCK, frame_block, x, call)
            x = self._run(units.TIME_BLOCK, time_block, x, call)
        return x

    def _middle(self, x: Tensor, call: Call) -> Tensor:
        mid: Any = self.mid
        x = self._run(units.VOLUME_BLOCK, mid.block_1, x, call)
        x = self._run(units.ATTENTION, mid.attn_1, x, call)
        return self._run(units.VOLUME_BLOCK, mid.block_2, x, call)

    def _end(self, x: Tensor, call: Call) -> Tensor:
        reason = units.norm_reason(call, self.norm_out)
        if reason is None:
            x = normed(self.norm_out, x, call)
        else:
            note_fallback(self, reason)
            x = self._vidkernels_home.nonlinearity(self.norm_out(x))
        return run(units.CONV, self.conv_out, x, call).contiguous()  # the format in which the original returns it


class EncoderForward(_Network):
    """`EncoderCausal3DPadding.forward` and `Encoder3D.forward`."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> moments or codes before quantization, [B, Z, T / ratio, H / ratio, W / ratio]."""
        reason = call_reason(x)
        if reason is not None:
            note_fallback(self, reason)
            original: Tensor = super().forward(x)
            return original
        x, call = self._begin(self._with_front(x))
        for down, down_temporal in zip(self.down, self.down_temporal, strict=True):
            x = self._pairs(down, down_temporal, x, call)
            if hasattr(down, "downsample"):
                x = self._run(units.SPACE_DOWN, down.downsample, x, call)
                if hasattr(down_temporal, "downsample"):
                    x = self._run(units.TIME_DOWN, down_temporal.downsample, x, call)
        return self._end(self._middle(x, call), call)

    def _with_front(self, x: Tensor) -> Tensor:
        """A clip whose length the ratio does not divide, with frames in front: ratio - 1 (1.0), or what is missing."""
        ratio = getattr(self, "time_downsample_factor", 1)
        over = x.shape[2] % ratio
        if over == 0:
            return x
        front = self.time_padding if hasattr(self, "time_padding") else ratio - over
        pad_at_dim: Any = self._vidkernels_home.pad_at_dim
        padded: Tensor = pad_at_dim(x, (front, 0), dim=2, pad_mode=self.init_pad_mode, value=0.0)
        return padded


class DecoderForward(_Network):
    """`DecoderCausal3DPadding.forward` and `Decoder3D.forward`."""

    def forward(self, z: Tensor, **kwargs: Any) -> Tensor:
        """Latents [B, Z, T, H, W] -> frames [B, 3, T * ratio, H * ratio, W * ratio], ratio - 1 fewer in 1.0."""
        reason = call_reason(z) or (f"it was called with {', '.join(kwargs)}" if kwargs else None)
        if reason is not None:
            note_fallback(self, reason)
            original: Tensor = super().forward(z, **kwargs)
            return original
        x, call = self._begin(z)
        x = self._middle(x, call)
        levels = list(zip(self.up, self.up_temporal, strict=True))
        for up, up_temporal in reversed(levels):
            x = self._pairs(up, up_temporal, x, call)
            if hasattr(up, "upsample"):
                x = self._run(units.SPACE_UP, up.upsample, x, call)
                if hasattr(up_temporal, "upsample"):
                    x = self._run(units.TIME_UP, up_temporal.upsample, x, call)
        if self.give_pre_end:
            x = x.contiguous()
        else:
            x = self._end(x, call)
            x = torch.tanh(x) if self.tanh_out else x
        return x[:, :, self.time_padding :] if hasattr(self, "time_padding") else x


class EngineCalls(ChunkMarks):
    """`AutoencodingEngine.encode` and `decode` of 1.1: only tiled calls come in chunks, so only they keep frames."""

    def encode(self, x: Any, return_reg_log: bool = False) -> Any:
        with keeping(self.encoder, self.use_tiling):
            encoded = super().encode(x, return_reg_log)  # type: ignore[misc]
        return encoded

    def decode(self, z: Any, decode_from_indices: bool = False) -> Tensor:
        with keeping(self.decoder, self.use_tiling):
            decoded: Tensor = super().decode(z, decode_from_indices)  # type: ignore[misc]
        return decoded


_LAYER_NORM = "f33756831e9d70eb"


def _norm_check(module: Any) -> str | None:
    norm = type(module.norm_out)
    if norm is nn.GroupNorm:
        return "its norms are over groups of channels (norm_type='groupnorm'), which no published configuration has"
    found = digest(norm.forward)
    return None if found == _LAYER_NORM else f"its {norm.__name__}.forward has digest {found}, not {_LAYER_NORM}"


def _levels(module: Any, lists: str, sampler: str) -> int:
    """How many levels of a network have a sampler."""
    return sum(hasattr(level, sampler) for level in getattr(module, lists))


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    side = 2 ** (_levels(module, "down", "downsample") + 1)
    frames = 2 ** (_levels(module, "down_temporal", "downsample") + 1)
    return (clip_for(module.conv_in, frames + hasattr(module, "time_downsample_factor"), side),), {}


def _decoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (clip_for(module.conv_in, 3, 2),), {}


def _engine_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _encoder_sample(module.encoder)


_OPS = ("causal_conv3d", "channel_norm", "alpha_blend")
_PATH = "vidtok.modules.model_3d"
_TESTED = ("VidTok 3334483", "VidTok 24c30a7")
_TESTED_1_1 = ("VidTok 0c7aa52",)
_BLOCK_FORWARD = "21f0ace694de1958"
_ATTENTION_FORWARD = "74085d861398a405"
_ALL = {
    "nonlinearity": ("8b32ccd8c8b19e4f",),
    "spatial_temporal_resblk": ("3add76d8498e6141",),
    "AttnBlock._forward": ("3be97c2b9987d9ce",),
    "ResnetBlock._forward": ("e1076cc461d0aa6b",),
    "Upsample.forward": ("ddd93cdebfcfa755",),
    "Downsample.forward": ("35560636504758f6",),
}
_CAUSAL = _ALL | {
    "LayerNorm.forward": (_LAYER_NORM,),
    "AttnBlockWrapper.attention": ("7283a6e74d7246ad",),
    "ResnetCausalBlock._forward": ("deb2e46643fdc8cb",),
    "ResnetCausalBlock1D._forward": ("30d30ded6018d465",),
}
_BLOCKS = ("ResnetBlock", "ResnetCausalBlock", "ResnetCausalBlock1D")
# 24c30a7 looks for itself whether to checkpoint, and then asks the same flag.
_V1_0 = (
    _CAUSAL
    | {f"{name}.forward": (_BLOCK_FORWARD, "87328a6eb4030d81") for name in _BLOCKS}
    | {
        "AttnBlock.forward": (_ATTENTION_FORWARD, "9b2eb1c356958a34"),
        "CausalConv1d.forward": ("7d5cff8e85479b21",),
        "CausalConv3d.forward": ("7d5cff8e85479b21",),
        "TimeDownsampleResCausal2x.forward": ("410275c4a27e790e",),
        "TimeUpsampleResCausal2x.forward": ("aa7b06cd861621bc",),
    }
)
_V1_1 = (
    _CAUSAL
    | {f"{name}.forward": (_BLOCK_FORWARD,) for name in _BLOCKS}
    | {
        "AttnBlock.forward": (_ATTENTION_FORWARD,),
        "CausalConv1d.forward": ("95c1be318219c04c",),
        "CausalConv3d.forward": ("58cbad51e0610093",),
        "TimeDownsampleResCausal2x.forward": ("bcfcf327986bce8c",),
        "TimeUpsampleResCausal2x.forward": ("7e507f705fa4e534",),
    }
)
_NONCAUSAL = (
    _ALL
    | {f"{name}.forward": (_BLOCK_FORWARD,) for name in ("ResnetBlock", "ResnetBlock1D", "ResnetNoncausalBlock")}
    | {f"{name}._forward": ("e1076cc461d0aa6b",) for name in ("ResnetBlock1D", "ResnetNoncausalBlock")}
    | {
        "AttnBlock.forward": (_ATTENTION_FORWARD, "9b2eb1c356958a34"),
        "AttnBlockWrapper.attention": ("9ebecbf7b105cab2",),
        "TimeDownsampleRes2x.forward": ("91a7fc771d9ee97f",),
        "TimeUpsampleRes2x.forward": ("d0e1dfa4b4e0f2d7",),
    }
)


def _network(name: str, target: str, code: Mapping[str, tuple[str, ...]], feature: str = "mid", **digests: str) -> Rule:
    """The rule of an encoder or decoder: the digests of its file, and of its own forward and those it inherits."""
    encodes = "encoder" in name
    return Rule(
        name=name,
        ops=_OPS,
        targets=(f"{_PATH}{target}",),
        mixin=EncoderForward if encodes else DecoderForward,
        digests={**code, **{f"{cls}.forward": (value,) for cls, value in digests.items()}},
        features=(feature, "down_temporal" if encodes else "up_temporal", "norm_out"),
        subsumes=True,
        check=_norm_check,
        sample=_encoder_sample if encodes else _decoder_sample,
        tested_versions=_TESTED_1_1 if "v1_1" in name else _TESTED,
    )


_ENCODER, _DECODER = "8c5b339e23eb2d11", "4c6121ab20b5a91c"

RULES = (
    Rule(
        name="vidtok.autoencoder_v1_1",
        ops=("causal_conv3d",),
        targets=("vidtok.models.autoencoder_v1_1:AutoencodingEngine",),
        mixin=EngineCalls,
        digests={
            "AutoencodingEngine.encode": ("1cc5dd827fbdf4df", "05bb5ad0ce425f87"),  # the second with tiles in space as well
            "AutoencodingEngine.decode": ("2691dce0bd43c6cb",),
            "AutoencodingEngine._set_first_chunk": ("9d8eca837a1d4a09",),
            "AutoencodingEngine._empty_causal_cached": ("b8acb05ae08f228b",),
        },
        features=("t_chunk_dec", "use_tiling"),
        sample=_engine_sample,
        tested_versions=_TESTED_1_1,
    ),
    # Only modules of 1.0 have `time_padding`, so those of 1.1 are no near miss of it.
    _network(
        "vidtok.encoder", "causal:EncoderCausal3DPadding", _V1_0, "time_padding",
        EncoderCausal3D=_ENCODER, EncoderCausal3DPadding="51fb640cb1bdc695",
    ),
    _network(
        "vidtok.decoder", "causal:DecoderCausal3DPadding", _V1_0, "time_padding",
        DecoderCausal3D=_DECODER, DecoderCausal3DPadding="92f9a42ae2682a4d",
    ),
    _network(
        "vidtok.encoder_v1_1", "causal_v1_1:EncoderCausal3DPadding", _V1_1,
        EncoderCausal3D=_ENCODER, EncoderCausal3DPadding="4a13d1b7697f5890",
    ),
    _network(
        "vidtok.decoder_v1_1", "causal_v1_1:DecoderCausal3DPadding", _V1_1,
        DecoderCausal3D=_DECODER, DecoderCausal3DPadding="bedb3c9fcdae8541",
    ),
    _network("vidtok.encoder_noncausal", "noncausal:Encoder3D", _NONCAUSAL, Encoder3D="434980d843dd5906"),
    _network("vidtok.decoder_noncausal", "noncausal:Decoder3D", _NONCAUSAL, Decoder3D="5c870efbcbf41314"),
)  # fmt: skip
