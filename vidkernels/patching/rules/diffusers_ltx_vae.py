# SPDX-License-Identifier: Apache-2.0
"""Rules for diffusers' AutoencoderKLLTXVideo: repeated end frames as coordinates instead of a concatenated copy, RMSNorm
with timestep modulation and SiLU in one pass, pixel shuffles in one copy. LTX-2's (`diffusers_ltx2_vae`) share the code."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import child_reason, guarded
from vidkernels.patching._mechanism import Fused
from vidkernels.patching.rules import _vae_units as units
from vidkernels.patching.rules._vae_memory import may_write, overwriting
from vidkernels.patching.rules._vae_units import channels_last, restored, video_reason

_FILE = "autoencoder_kl_ltx"


def convolve(
    owner: Any,
    conv: Any,
    x: Tensor,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    more: int = 0,
    causal: bool | None = None,
) -> Tensor:
    """The convolution behind repeated first (and, if not causal, last) frames; `more` of the first. LTX-2's are told whether
    they are causal, and may reflect the borders of their frames: such frames are copied."""
    reach = conv.kernel_size[0] - 1
    causal = conv.is_causal if causal is None else causal
    frames = (reach + more, 0) if causal else (reach // 2 + more, reach // 2)
    kernel = conv.conv
    space, mode = kernel.padding[1:], kernel.padding_mode
    if mode == "reflect":
        x, space, mode = reflected(x, *space), (0, 0), "zeros"
    options = {
        "time_padding": "replicate",
        "pad_frames": frames,
        "spatial_padding": space,
        "spatial_padding_mode": mode,
    }
    return units.convolve(owner, kernel, x, residual, out, **options)


def reflected(x: Tensor, rows: int, columns: int) -> Tensor:
    """`F.pad(x, (columns, columns, rows, rows, 0, 0), "reflect")` of [B, C, T, H, W] in channels-last memory."""
    height, width = x.shape[-2:]
    if torch.is_grad_enabled() or height <= rows or width <= columns:  # where a frame is too small, torch says so
        return channels_last(F.pad(x, (columns, columns, rows, rows, 0, 0), mode="reflect"))
    size = (*x.shape[:3], height + 2 * rows, width + 2 * columns)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    inside = y[..., columns : columns + width]
    inside[..., rows : rows + height, :] = x
    for i in range(rows):
        inside[..., rows - 1 - i, :] = x[..., 1 + i, :]
        inside[..., rows + height + i, :] = x[..., height - 2 - i, :]
    for i in range(columns):
        y[..., columns - 1 - i] = y[..., columns + 1 + i]
        y[..., columns + width + i] = y[..., columns + width - 2 - i]
    return y


def normed(owner: Any, norm: Any, x: Tensor, rows: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`silu(RMSNorm(x) (1 + scale) + shift)` over channels; rows = (shift, scale) of each sample, [B, C, 1, 1, 1]."""
    backend = owner._vidkernels_backend("channel_norm")
    options: dict[str, Any] = {"kind": "rms", "eps": norm.eps, "activation": "silu", "backend": backend}
    if rows is None:
        result: Tensor = ops.channel_norm(x, getattr(norm, "weight", None), getattr(norm, "bias", None), **options)
        return result
    shift, scale = (row.flatten(1).to(x.dtype).expand(x.shape[0], -1) for row in rows)
    samples = zip(x.split(1), 1 + scale, shift, strict=True)
    parts = [ops.channel_norm(sample, weight, bias, **options) for sample, weight, bias in samples]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class Family(Fused):
    """What the modules of a model share; LTX-2's have other convolutions and norms."""

    def _conv_reason(self, conv: Any) -> str | None:
        reason = units.wrapped_reason(conv, self._vidkernels_home.LTXVideoCausalConv3d)
        return reason or units.unpadded_reason(conv._modules["conv"], 1)

    def _norm_reason(self, norm: Any, modulated: bool) -> str | None:
        reason = child_reason(norm, self._vidkernels_home.RMSNorm)
        if reason is None and modulated and norm.weight is not None:
            reason = "a norm has weights besides its modulation"
        return reason

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.conv_shortcut is None else convolve(self, self.conv_shortcut, x)


class ConvForward(Family):
    """`LTXVideoCausalConv3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W]."""
        return convolve(self, self, hidden_states)

    def _reason(self, hidden_states: Tensor) -> str | None:
        return video_reason(hidden_states) or units.kernel_reason(self.conv) or units.unpadded_reason(self.conv, 1)


class Block(Family):
    """Residual blocks."""

    def _reason(self, inputs: Tensor, temb: Tensor | None, **rest: Any) -> str | None:
        modulated = self.scale_shift_table is not None
        reason = video_reason(inputs, temb) or self._norm_reason(self.norm1, modulated)
        reason = (
            reason
            or self._norm_reason(self.norm2, modulated)
            or self._conv_reason(self.conv1)
            or self._conv_reason(self.conv2)
        )
        reason = reason or child_reason(self.nonlinearity, nn.SiLU) or child_reason(self.dropout, nn.Dropout)
        if reason is None and self.conv_shortcut is not None:
            reason = self._shortcut_reason(self.conv_shortcut)
        return reason or (None if self.norm3 is None else child_reason(self.norm3, nn.LayerNorm))

    def _shortcut_reason(self, conv: Any) -> str | None:
        return self._conv_reason(conv)

    def _block(
        self, inputs: Tensor, temb: Tensor | None, generator: torch.Generator | None, causal: bool | None
    ) -> Tensor:
        """[B, C, T, H, W]; temb [B, 4 C, 1, 1, 1] for a conditioned decoder."""
        first = second = None
        if self.scale_shift_table is not None and temb is not None:
            table = self.scale_shift_table[None, ..., None, None, None]
            shift1, scale1, shift2, scale2 = (temb.unflatten(1, (4, -1)) + table).unbind(1)
            first, second = (shift1, scale1), (shift2, scale2)
        x = channels_last(inputs)
        h = convolve(self, self.conv1, normed(self, self.norm1, x, first), causal=causal)
        h = self._noisy(h, self.per_channel_scale1, generator)
        h = units.dropped(self.dropout, normed(self, self.norm2, h, second))
        noise = self.per_channel_scale2
        if self.norm3 is None and self.conv_shortcut is None and noise is None:
            return restored(convolve(self, self.conv2, h, x, x if may_write(x) else None, causal=causal), inputs)
        if self.norm3 is not None:
            backend = self._vidkernels_backend("channel_norm")
            x = ops.channel_norm(x, self.norm3.weight, self.norm3.bias, eps=self.norm3.eps, backend=backend)
        x = self._shortcut(x)
        h = convolve(self, self.conv2, h, x if noise is None else None, causal=causal)
        return restored(h if noise is None else self._noisy(h, noise, generator) + x, inputs)

    def _noisy(self, h: Tensor, scale: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """h plus one frame of noise, scaled for each channel; random numbers are drawn as upstream draws them."""
        if scale is None:
            return h
        noise = torch.randn(h.shape[-2:], generator=generator, device=h.device, dtype=h.dtype)
        return channels_last(h + (noise[None] * scale)[None, :, None])


class BlockForward(Block):
    """`LTXVideoResnetBlock3d.forward`."""

    @guarded
    def forward(self, inputs: Tensor, temb: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """[B, C, T, H, W]; temb [B, 4 C, 1, 1, 1] for a conditioned decoder."""
        return self._block(inputs, temb, generator, None)


class Sampler(Family):
    """Downsamplers and upsamplers by pixel shuffles."""

    def _reason(self, hidden_states: Tensor, **rest: Any) -> str | None:
        return video_reason(hidden_states) or self._conv_reason(self.conv)

    def _downsampled(self, hidden_states: Tensor, causal: bool | None) -> Tensor:
        """[B, C, T, H, W] -> boxes of `stride` as channels, plus means of the input's boxes."""
        x, more = channels_last(hidden_states), self.stride[0] - 1
        y = units.to_channels(convolve(self, self.conv, x, more=more, causal=causal), self.stride)
        if more:
            x = channels_last(torch.cat([x[:, :, :more], x], 2))
        boxes = units.as_rows(units.to_channels(x, self.stride)).unflatten(-1, (-1, self.group_size))
        return restored(y + units.as_clip(boxes.mean(-1)), hidden_states)

    def _upsampled(self, hidden_states: Tensor, causal: bool | None) -> Tensor:
        """[B, C, T, H, W] -> channels as boxes of `stride`, without the first `stride[0] - 1` frames."""
        x, skipped = channels_last(hidden_states), self.stride[0] - 1
        y = units.from_channels(convolve(self, self.conv, x, causal=causal), self.stride)[:, :, skipped:]
        if self.residual:
            repeats = self.stride[0] * self.stride[1] * self.stride[2] // self.upscale_factor
            rows = units.as_rows(units.from_channels(x, self.stride)[:, :, skipped:])
            y = y + units.as_clip(rows.repeat(1, 1, 1, 1, repeats))
        return restored(channels_last(y), hidden_states)


class DownsampleForward(Sampler):
    """`LTXVideoDownsampler3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, out, T / t, H / h, W / w]."""
        return self._downsampled(hidden_states, None)


def downsample_check(module: Any) -> str | None:
    """Why a downsampler can never be served."""
    # one repeated frame in front is what the convolution's own padding repeats, too; more would be other frames
    return None if module.stride[0] in (1, 2) else f"it takes {module.stride[0]} frames together"


class UpsampleForward(Sampler):
    """`LTXVideoUpsampler3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, out, t T - t + 1, h H, w W]."""
        return self._upsampled(hidden_states, None)


class Network(Family):
    """Encoders and decoders."""

    def _network_reason(self, x: Tensor, modulated: bool, temb: Tensor | None = None) -> str | None:
        reason = video_reason(x, temb) or self._conv_reason(self.conv_in) or self._conv_reason(self.conv_out)
        return reason or self._norm_reason(self.norm_out, modulated) or child_reason(self.conv_act, nn.SiLU)

    def _run(self, blocks: list[nn.Module], x: Tensor, *given: Any, causal: bool | None = None) -> Tensor:
        x = convolve(self, self.conv_in, channels_last(x), causal=causal)
        with overwriting(self, x):
            for block in blocks:
                recomputed = torch.is_grad_enabled() and self.gradient_checkpointing
                x = self._gradient_checkpointing_func(block, x, *given) if recomputed else block(x, *given)
        return channels_last(x)

    def _patches(self, frames: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> patches as channels, in channels-last memory."""
        side = self.patch_size
        boxes = frames.unflatten(4, (-1, side)).unflatten(3, (-1, side)).unflatten(2, (-1, self.patch_size_t))
        # [B, C, T, t, H, h, W, w]: upstream's channels are (C, t, w, h)
        return units.as_clip(boxes.permute(0, 2, 4, 6, 1, 3, 7, 5).flatten(4))

    def _moments(self, x: Tensor, causal: bool | None = None) -> Tensor:
        """The end of an encoder: moments of equal variance for all channels."""
        x = normed(self, self.norm_out, x)
        y = convolve(self, self.conv_out, x, causal=causal)
        return torch.cat([y, y[:, -1:].expand(-1, y.shape[1] - 2, -1, -1, -1)], 1).contiguous()

    def _frames(self, x: Tensor, temb: Tensor | None, causal: bool | None = None) -> Tensor:
        """The end of a decoder."""
        rows = self._modulation(temb, x) if self.time_embedder is not None and temb is not None else None
        x = normed(self, self.norm_out, x, rows)
        x = convolve(self, self.conv_out, x, causal=causal)
        side = self.patch_size
        boxes = units.as_rows(x).unflatten(-1, (-1, self.patch_size_t, side, side))  # [B, T, H, W, C, t, w, h]
        return boxes.permute(0, 4, 1, 5, 2, 7, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3).contiguous()

    def _modulation(self, temb: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        options = {"resolution": None, "aspect_ratio": None, "batch_size": x.shape[0], "hidden_dtype": x.dtype}
        embedded = self.time_embedder(timestep=temb.flatten(), **options)
        table = self.scale_shift_table[None, ..., None, None, None]
        shift, scale = (embedded.view(x.shape[0], 2, -1, 1, 1, 1) + table).unbind(1)
        return shift, scale


class EncoderForward(Network):
    """`LTXVideoEncoder3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> moments of equal variance for all channels."""
        return self._moments(self._run([*self.down_blocks, self.mid_block], self._patches(hidden_states)))

    def _reason(self, hidden_states: Tensor) -> str | None:
        return self._network_reason(hidden_states, False)


class DecoderForward(Network):
    """`LTXVideoDecoder3d.forward`."""

    @guarded
    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        """Latents [B, z, T, H, W] and, for a conditioned decoder, timesteps [B] -> frames."""
        if self.timestep_scale_multiplier is not None:
            temb = temb * self.timestep_scale_multiplier
        return self._frames(self._run([self.mid_block, *self.up_blocks], hidden_states, temb), temb)

    def _reason(self, hidden_states: Tensor, temb: Tensor | None) -> str | None:
        return self._network_reason(hidden_states, self.time_embedder is not None, temb)


class _WideNorm(nn.Module):
    """RMSNorm in the dtype of its input: upstream's goes through float32 whatever that is."""

    eps: float
    weight: Tensor | None

    def forward(self, hidden_states: Tensor) -> Tensor:
        y = F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)
        return y if self.weight is None else y * self.weight


def _widen(module: nn.Module) -> nn.Module:
    double = module.double()
    for child in double.modules():
        if type(child).__name__ == "RMSNorm" and getattr(child, "bias", None) is None:
            child.__class__ = _WideNorm
    return double


def sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weight = next(p for p in module.parameters() if p.ndim == 5)
    return (units.like_parameters(module, 1, weight.shape[1], 3, 8, 8),), {}


def block_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = units.like_parameters(module, 2, module.conv1.in_channels, 3, 8, 8)
    conditioned = module.scale_shift_table is not None
    return (x, units.like_parameters(module, 2, 4 * x.shape[1], 1, 1, 1) if conditioned else None), {}


def downsample_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (units.like_parameters(module, 1, module.conv.in_channels, 5, 8, 8),), {}


def encoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    channels = module.in_channels // module.patch_size**2
    return (units.like_parameters(module, 1, channels, 9 * module.patch_size_t, 64, 64),), {}


def _decoder_sample(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    z = units.like_parameters(module, 1, module.conv_in.in_channels, 2, 2, 2)
    return (z, None if module.time_embedder is None else torch.full((1,), 0.05, dtype=z.dtype, device=z.device)), {}


_CONV = {
    "LTXVideoCausalConv3d.__init__": "f7b23fcb4f2100b5",
    "LTXVideoCausalConv3d.forward": "55725cd993d9bd4a",
}
_NORM = _CONV | {"RMSNorm.forward": "d6bf5d21fcac4a44"}
_BLOCK = _NORM | {"LTXVideoResnetBlock3d.forward": "43e9957ee0d9c4b2"}
_DOWN = _CONV | {
    "LTXVideoDownsampler3d.__init__": "99b9e04f76f6f922",
    "LTXVideoDownsampler3d.forward": "2df3db634b80dfeb",
}
_UP = _CONV | {"LTXVideoUpsampler3d.forward": "6f747756db94b886"}
_ENCODER = _NORM | {"LTXVideoEncoder3d.forward": "f049d40b7bb3e3b3"}
_DECODER = _NORM | {"LTXVideoDecoder3d.forward": "f852cda8f068bd47"}
_BOTH, _ONE = "causal_conv3d channel_norm", "causal_conv3d"

RULES = (
    units.rule(
        *("ltx_vae.encoder", f"{_FILE}:LTXVideoEncoder3d", EncoderForward, _BOTH, _ENCODER, encoder_sample),
        widen=_widen,
    ),
    units.rule(
        *("ltx_vae.decoder", f"{_FILE}:LTXVideoDecoder3d", DecoderForward, _BOTH, _DECODER, _decoder_sample),
        widen=_widen,
    ),
    units.rule(
        *("ltx_vae.resnet", f"{_FILE}:LTXVideoResnetBlock3d", BlockForward, _BOTH, _BLOCK, block_sample), widen=_widen
    ),
    units.rule(
        *("ltx_vae.downsample", f"{_FILE}:LTXVideoDownsampler3d", DownsampleForward, _ONE, _DOWN, downsample_sample),
        check=downsample_check,
    ),
    units.rule("ltx_vae.upsample", f"{_FILE}:LTXVideoUpsampler3d", UpsampleForward, _ONE, _UP, sample),
    units.rule("ltx_vae.conv", f"{_FILE}:LTXVideoCausalConv3d", ConvForward, _ONE, _CONV, sample),
)
