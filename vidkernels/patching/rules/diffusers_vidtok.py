# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' `AutoencoderVidTok`: encoder and decoder as wholes, the quantizer, and the caches.

Everything between the first and the last convolution stays [B, C, T, H, W] in channels-last memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.nn._residual import needs_gradients
from vidkernels.patching._guard import call_reason, child_reason, guarded, is_autocast, note_fallback
from vidkernels.patching._mechanism import Fused
from vidkernels.patching._rule import Rule
from vidkernels.patching.rules import _vidtok_units as units
from vidkernels.patching.rules._vidtok_convs import Call, channels_last

_PATH = "diffusers.models.autoencoders.autoencoder_vidtok"
_KEEP = "_vidkernels_keep"


def call_of(owner: Any, x: Tensor, streams: bool, home: Any) -> Call:
    """What a forward of an encoder or decoder has to know. streams: its convolutions keep frames for a next chunk."""
    keep = streams and getattr(owner, _KEEP, True)
    backends = owner._vidkernels_backend("causal_conv3d"), owner._vidkernels_backend("channel_norm")
    return Call(owner, home, keep, not needs_gradients(owner, x), is_autocast(x), *backends)


class _Network(Fused):
    """What encoder and decoder share."""

    def _run(self, unit: units.Unit, module: nn.Module, x: Tensor, call: Call) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            checkpointed: Tensor = self._gradient_checkpointing_func(units.run, unit, module, x, call)
            return checkpointed
        return units.run(unit, module, x, call)

    def _raise(
        self, upsampling: tuple[units.Unit, Any], block: nn.Module, x: Tensor, call: Call
    ) -> tuple[Tensor, bool]:
        """(What a block of frames makes of the upsampled x, True), or (the upsampled x, False): the block then runs where the
        caller no longer holds x."""
        y = units.raised_block(upsampling, block, x, call, units.FRAME_BLOCK)
        return (self._run(upsampling[0], upsampling[1], x, call), False) if y is None else (y, True)

    def _middle(self, x: Tensor, call: Call) -> Tensor:
        mid: Any = self.mid
        x = self._run(units.VOLUME_BLOCK, mid.block_1, x, call)
        x = self._run(units.ATTENTION, mid.attn_1, x, call)
        return self._run(units.VOLUME_BLOCK, mid.block_2, x, call)

    def _end(self, x: Tensor, call: Call) -> Tensor:
        reason = units.norm_reason(call, self.norm_out) or child_reason(self.nonlinearity, nn.SiLU)
        if reason is None:
            x = units.normed(self.norm_out, x, call)
        else:
            note_fallback(self, reason)
            x = self.nonlinearity(self.norm_out(x))
        x = units.run(units.CONV, self.conv_out, x, call)
        return x.contiguous() if self.is_causal else x  # the formats in which the original returns them


class EncoderForward(_Network):
    """`VidTokEncoder3D.forward`."""

    @guarded
    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> moments or codes before quantization, [B, Z, T / ratio, H / ratio, W / ratio]."""
        call = call_of(self, x, self.is_causal, self._vidkernels_home)
        x = units.run(units.CONV, self.conv_in, channels_last(x), call)
        for level in range(self.num_resolutions):
            down, down_temporal = self.down[level], self.down_temporal[level]
            for i in range(self.num_res_blocks):
                x = self._run(units.FRAME_BLOCK, down.block[i], x, call)
                x = self._run(units.TIME_BLOCK, down_temporal.block[i], x, call)
            if level in self.spatial_ds:
                x = self._run(units.SPACE_DOWN, down.downsample, x, call)
                if level in self.tempo_ds:
                    x = self._run(units.TIME_DOWN, down_temporal.downsample, x, call)
        return self._end(self._middle(x, call), call)

    def _reason(self, x: Tensor) -> str | None:
        return call_reason(x)


class DecoderForward(_Network):
    """`VidTokDecoder3D.forward`."""

    @guarded
    def forward(self, z: Tensor) -> Tensor:
        """Latents [B, Z, T, H, W] -> frames [B, 3, T * ratio, H * ratio, W * ratio]."""
        call = call_of(self, z, self.is_causal, self._vidkernels_home)
        x = self._middle(units.run(units.CONV, self.conv_in, channels_last(z), call), call)
        # What is still to be done: the next level's first block goes along.
        upsampling: tuple[units.Unit, Any] | None = None
        for level in reversed(range(self.num_resolutions)):
            up, up_temporal = self.up[level], self.up_temporal[level]
            for i in range(self.num_res_blocks + 1):
                done = False
                if upsampling is not None:
                    x, done = self._raise(upsampling, up.block[i], x, call)
                    upsampling = None
                if not done:
                    x = self._run(units.FRAME_BLOCK, up.block[i], x, call)
                x = self._run(units.TIME_BLOCK, up_temporal.block[i], x, call)
            if level in self.spatial_us:
                upsampling = units.SPACE_UP, up.upsample
                if level in self.tempo_us:
                    x = self._run(units.SPACE_UP, up.upsample, x, call)
                    upsampling = units.TIME_UP, up_temporal.upsample
        if upsampling is not None:
            x = self._run(upsampling[0], upsampling[1], x, call)
        return self._end(x, call)

    def _reason(self, z: Tensor) -> str | None:
        return call_reason(z)


class ChunkMarks(Fused):
    """The marks of chunks on convolutions and samplers: upstream asks each of 560 modules by `hasattr`, 2 ms a call."""

    def _set_first_chunk(self, is_first_chunk: bool = True) -> None:
        _mark(self, "is_first_chunk", is_first_chunk)

    def _empty_causal_cached(self, parent: nn.Module) -> None:
        _mark(parent, "causal_cache", None)


def _mark(network: nn.Module, name: str, value: bool | None) -> None:
    """Write an attribute of every module below `network` that has it."""
    if torch.compiler.is_compiling():
        for module in network.modules():
            if hasattr(module, name):
                setattr(module, name, value)
        return
    parents, seen = [network], {network}
    for parent in parents:  # the list grows meanwhile
        if name in parent.__dict__:
            parent.__dict__[name] = value
        for child in parent._modules.values():
            if child is None:
                continue
            if child._modules:
                if child not in seen:
                    seen.add(child)
                    parents.append(child)
            elif name in child.__dict__:
                child.__dict__[name] = value


class AutoencoderCalls(ChunkMarks):
    """`AutoencoderVidTok._encode` and `_decode`: only tiled calls come in chunks, so only they keep frames."""

    def _encode(self, x: Tensor) -> Tensor:
        with keeping(self.encoder, self.use_tiling):
            encoded: Tensor = super()._encode(x)  # type: ignore[misc]
        return encoded

    def _decode(self, z: Tensor, decode_from_indices: bool = False) -> Tensor:
        with keeping(self.decoder, self.use_tiling):
            decoded: Tensor = super()._decode(z, decode_from_indices)  # type: ignore[misc]
        return decoded


class keeping:
    """Whether the calls of a network inside the block keep frames for a next chunk."""

    def __init__(self, network: nn.Module, keep: bool) -> None:
        self.network, self.keep = network, keep

    def __enter__(self) -> None:
        setattr(self.network, _KEEP, self.keep)

    def __exit__(self, *_: object) -> None:
        delattr(self.network, _KEEP)


class QuantizerForward(Fused):
    """`FSQRegularizer.forward` without projections."""

    @guarded
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """[B, D, ...] or [B, N, D] -> (codes of the same shape, int32 indices)."""
        wide = z.float() if z.dtype == torch.float64 else z  # the original quantizes in float32 always
        levels = [round(self.codebook_size ** (1 / self.codebook_dim))] * self.codebook_dim
        backend = self._vidkernels_backend("fsq")
        codes, indices = ops.fsq_quantize(wide, levels, dim=1 if z.ndim >= 4 else -1, backend=backend)
        return codes.to(z.dtype), indices

    def _reason(self, z: Tensor) -> str | None:
        reason = call_reason(z)
        reason = reason or child_reason(self.project_in, nn.Identity) or child_reason(self.project_out, nn.Identity)
        if reason is None and self.keep_num_codebooks_dim:
            reason = "it keeps an axis of codebooks"
        return reason


def _quantizer_check(module: Any) -> str | None:
    levels = module._levels.tolist()
    return None if len(set(levels)) == 1 else f"its levels differ: {levels}"


def _encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    side, frames = 2 ** (len(module.spatial_ds) + 1), 2 ** (len(module.tempo_ds) + 1)
    return (clip_for(module.conv_in, frames, side),), {}


def _decoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (clip_for(module.conv_in, 3, 2),), {}


def _autoencoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (x,), _ = _encoder_sample(module.encoder)
    return (x,), {"sample_posterior": False, "return_dict": False}


def _quantizer_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (2 * torch.randn(1, module.codebook_dim, 2, 8, 8, device=module._levels.device),), {}


def clip_for(conv: nn.Module, frames: int, side: int) -> Tensor:
    """A random clip that a network's first convolution can take."""
    weight = next(p for name, p in conv.named_parameters() if name.endswith("weight"))
    return torch.randn(1, weight.shape[1], frames, side, side, dtype=weight.dtype, device=weight.device)


_COMMON_DIGESTS = {
    "VidTokLayerNorm.forward": ("bb1b78d71be2fc16",),
    "VidTokCausalConv1d.__init__": ("fef5ea90583f2dd5",),
    "VidTokCausalConv1d.forward": ("95c1be318219c04c",),
    "VidTokCausalConv3d.__init__": ("004ca526c2224d2c",),
    "VidTokCausalConv3d.forward": ("58cbad51e0610093",),
    "VidTokResnetBlock.forward": ("b462edd9703f1cda",),
    "VidTokAttnBlock.attention": ("e1ff86825eaa3a2b",),
    "VidTokAttnBlock.forward": ("adfe2f542df8391e",),
}
_NETWORK_OPS = ("causal_conv3d", "channel_norm", "alpha_blend")
_TESTED = ("diffusers 0.42.1",)

RULES = (
    Rule(
        name="diffusers.vidtok.autoencoder",
        ops=("causal_conv3d",),
        targets=(f"{_PATH}:AutoencoderVidTok",),
        mixin=AutoencoderCalls,
        digests={
            "AutoencoderVidTok._encode": ("211795ff2f77f2a8",),
            "AutoencoderVidTok._decode": ("c6604fdc034ccdf9",),
            "AutoencoderVidTok._set_first_chunk": ("9d8eca837a1d4a09",),
            "AutoencoderVidTok._empty_causal_cached": ("b8acb05ae08f228b",),
        },
        sample=_autoencoder_sample,
        tested_versions=_TESTED,
    ),
    Rule(
        name="diffusers.vidtok.encoder",
        ops=_NETWORK_OPS,
        targets=(f"{_PATH}:VidTokEncoder3D",),
        mixin=EncoderForward,
        digests=_COMMON_DIGESTS
        | {
            "VidTokEncoder3D.forward": ("bd1beb135abf40ba",),
            "VidTokDownsample2D.forward": ("926b1a90e6963c01",),
            "VidTokDownsample3D.forward": ("c70eef259e0d2d1a",),
        },
        subsumes=True,
        sample=_encoder_sample,
        tested_versions=_TESTED,
    ),
    Rule(
        name="diffusers.vidtok.decoder",
        ops=_NETWORK_OPS,
        targets=(f"{_PATH}:VidTokDecoder3D",),
        mixin=DecoderForward,
        digests=_COMMON_DIGESTS
        | {
            "VidTokDecoder3D.forward": ("d3a48a14cbc7b28d",),
            "VidTokUpsample2D.forward": ("816d319a85ed7aae",),
            "VidTokUpsample3D.forward": ("7b27731cc14a7c8a",),
        },
        subsumes=True,
        sample=_decoder_sample,
        tested_versions=_TESTED,
    ),
    Rule(
        name="diffusers.vidtok.quantizer",
        ops=("fsq",),
        targets=(f"{_PATH}:FSQRegularizer",),
        mixin=QuantizerForward,
        digests={
            "FSQRegularizer.forward": ("7a0d15c8e54e7609",),
            "FSQRegularizer.quantize": ("cbc6efa8607d269e",),
            "FSQRegularizer.codes_to_indices": ("cacd8b03b1c92215",),
        },
        check=_quantizer_check,
        sample=_quantizer_sample,
        tested_versions=_TESTED,
    ),
)
