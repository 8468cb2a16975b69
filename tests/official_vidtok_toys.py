# SPDX-License-Identifier: Apache-2.0
"""Small networks with the attributes, class names and results of VidTok's official code, written anew in plain PyTorch.

The official files are no package and not part of this one. A version is an argument here: "1.0", "1.1" or "noncausal".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VERSIONS = ("1.0", "1.1", "noncausal")


def nonlinearity(x: Tensor) -> Tensor:
    return F.silu(x)


def pad_at_dim(
    x: Tensor, pad: tuple[int, int], dim: int = -1, pad_mode: str = "constant", value: float = 0.0
) -> Tensor:
    front = x.narrow(dim, 0, 1).repeat_interleave(pad[0], dim)
    return torch.cat([front if pad_mode == "replicate" else torch.full_like(front, value), x], dim)


class LayerNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class Causal(nn.Module):
    def __init__(self, kernel: Any, version: str) -> None:
        super().__init__()
        self.conv, self.pad_mode = kernel, "constant"
        self.time_pad = kernel.kernel_size[0] - kernel.stride[0]
        border = 4 * (kernel.kernel_size[-1] // 2,) if kernel.weight.ndim == 5 else ()
        if version == "1.1":
            self.spatial_padding = (*border, 0, 0)
            self.is_first_chunk, self.causal_cache, self.cache_offset = True, None, 0
        else:
            self.time_causal_padding = (*border, self.time_pad, 0)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "time_causal_padding"):
            return self.conv(F.pad(x, self.time_causal_padding))
        front = x[:, :, :1].repeat_interleave(self.time_pad, 2) if self.is_first_chunk else self.causal_cache
        x = torch.cat([front[:, :, front.shape[2] - self.time_pad :], x], 2)
        self.causal_cache = x[:, :, : x.shape[2] - self.cache_offset].clone()
        return self.conv(F.pad(x, self.spatial_padding))


class CausalConv1d(Causal):
    pass


class CausalConv3d(Causal):
    pass


def conv(axes: int, channels: tuple[int, int], size: int, version: str, stride: Any = 1, behind: bool = False) -> Any:
    """A convolution in time of some version; `behind`: padded by its caller."""
    kind = nn.Conv1d if axes == 1 else nn.Conv3d
    if version == "noncausal":
        half = size // 2
        return kind(*channels, size, stride, (0, half, half) if behind else half)
    return (CausalConv1d if axes == 1 else CausalConv3d)(kind(*channels, size, stride), version)


class Block(nn.Module):
    def __init__(self, axes: int, channels: tuple[int, int], version: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.in_channels, self.out_channels = channels
        self.use_conv_shortcut, self.use_checkpoint = False, options.get("use_checkpoint", False)

        def make(first: int, size: int) -> Any:
            if axes == 2:
                return nn.Conv2d(first, channels[1], size, padding=size // 2)
            return conv(axes, (first, channels[1]), size, version)

        self.norm1, self.conv1 = LayerNorm(channels[0]), make(channels[0], 3)
        self.norm2, self.conv2 = LayerNorm(channels[1]), make(channels[1], 3)
        self.dropout = nn.Dropout(options.get("dropout", 0.0))
        if channels[0] != channels[1]:
            self.nin_shortcut = make(channels[0], 1)

    def forward(self, x: Tensor, temb: None) -> Tensor:
        h = self.conv1(nonlinearity(self.norm1(x)))
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        return h + (self.nin_shortcut(x) if self.in_channels != self.out_channels else x)


class ResnetBlock(Block):
    pass


class ResnetCausalBlock(Block):
    pass


class ResnetCausalBlock1D(Block):
    pass


class AttnBlockWrapper(nn.Module):
    def __init__(self, width: int, version: str) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.q, self.k, self.v, self.proj_out = (conv(3, (width, width), 1, version) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(3).permute(0, 2, 3, 1) for part in (self.q, self.k, self.v))
        scores = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return x + self.proj_out((scores @ v).permute(0, 3, 1, 2).unflatten(3, x.shape[3:]))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.with_conv = nn.Conv2d(width, width, 3, 2), True

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.with_conv = nn.Conv2d(width, width, 3, padding=1), True

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class TimeDownsampleResCausal2x(nn.Module):
    def __init__(self, width: int, version: str) -> None:
        super().__init__()
        self.avg_pool = nn.AvgPool3d((3, 1, 1), (2, 1, 1))
        self.conv = conv(3, (width, width), 3, version, (2, 1, 1), behind=True)
        self.mix_factor = nn.Parameter(torch.tensor([1.0]))
        if version == "1.1":
            self.is_first_chunk, self.causal_cache = True, None

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.mix_factor.sigmoid()
        if isinstance(self.conv, nn.Conv3d):
            x = padded = F.pad(x, (0, 0, 0, 0, 0, 1))
        elif not hasattr(self, "causal_cache"):
            padded = F.pad(x, (0, 0, 0, 0, 1, 0))
        else:
            padded = torch.cat([x[:, :, :1] if self.is_first_chunk else self.causal_cache, x], 2)
            self.causal_cache = x[:, :, -1:].clone()
        return alpha * self.avg_pool(padded) + (1 - alpha) * self.conv(x)


def interpolated(x: Tensor, mode: str) -> Tensor:
    return F.interpolate(x, scale_factor=(2.0, 1.0, 1.0), mode=mode) if x.shape[2] else x.repeat(1, 1, 2, 1, 1)


class TimeUpsampleResCausal2x(nn.Module):
    def __init__(self, width: int, version: str, mode: str, split: int) -> None:
        super().__init__()
        self.conv = conv(3, (width, width), 3, version)
        self.mix_factor = nn.Parameter(torch.tensor([1.0]))
        if version == "1.1":
            self.interpolation_mode, self.num_temp_upsample = mode, split
            self.enable_cached, self.is_first_chunk, self.causal_cache = mode == "trilinear", True, None

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.mix_factor.sigmoid()
        if not getattr(self, "enable_cached", False):
            x = x.repeat_interleave(2, 2)
        elif self.is_first_chunk:
            n = self.num_temp_upsample
            self.causal_cache = x[:, :, -n:].clone()
            x = torch.cat([interpolated(part, "trilinear") for part in (x[:, :, :n], x[:, :, n:])], 2)
        else:
            n, x = self.num_temp_upsample, torch.cat([self.causal_cache, x], 2)
            self.causal_cache = x[:, :, -2 * n : -n].clone()
            x = interpolated(x, "trilinear")[:, :, 2 * n :]
        return alpha * x + (1 - alpha) * self.conv(x)


class Network(nn.Module):
    """What both directions have: the middle, the ends, and the order in which blocks see frames and pixels."""

    def finish(self, width: int, channels: int, version: str, options: dict[str, Any]) -> None:
        self.mid = nn.Module()
        self.mid.block_1 = ResnetCausalBlock(3, (options["top"],) * 2, version, options)
        self.mid.attn_1 = AttnBlockWrapper(options["top"], version)
        self.mid.block_2 = ResnetCausalBlock(3, (options["top"],) * 2, version, options)
        self.norm_out, self.conv_out = LayerNorm(width), conv(3, (width, channels), 3, version)
        if version != "noncausal":
            self.time_downsample_factor, self.init_pad_mode = 2 ** options["times"], "replicate"
        if version == "1.0":
            self.time_padding = 2 ** options["times"] - 1

    def middle(self, x: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(x, None)), None)

    def end(self, x: Tensor) -> Tensor:
        return self.conv_out(nonlinearity(self.norm_out(x)))


def frames(module: Any, x: Tensor, *args: None) -> Tensor:
    return module(x.transpose(1, 2).flatten(0, 1), *args).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def pixels(module: Any, x: Tensor, *args: None) -> Tensor:
    batch, _, _, height, width = x.shape
    y = module(x.permute(0, 3, 4, 1, 2).flatten(0, 2), *args)
    return y.unflatten(0, (batch, height, width)).permute(0, 3, 4, 1, 2)


def level(widths: tuple[int, int], count: int, version: str, options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    space, time = nn.Module(), nn.Module()
    pairs = [(widths if i == 0 else (widths[1],) * 2) for i in range(count)]
    space.block = nn.ModuleList(ResnetBlock(2, pair, version, options) for pair in pairs)
    time.block = nn.ModuleList(ResnetCausalBlock1D(1, (widths[1],) * 2, version, options) for _ in range(count))
    return space, time


class Encoder(Network):
    def __init__(self, version: str, widths: tuple[int, ...], z: int, times: int = 2, **options: Any) -> None:
        super().__init__()
        self.conv_in = conv(3, (3, widths[0]), 3, version)
        self.down, self.down_temporal, last = nn.ModuleList(), nn.ModuleList(), len(widths) - 1
        for i, width in enumerate(widths):
            space, time = level((widths[max(i - 1, 0)], width), 1, version, options)
            if i < last:
                space.downsample = Downsample(width)
                if i >= last - times:
                    time.downsample = TimeDownsampleResCausal2x(width, version)
            self.down.append(space)
            self.down_temporal.append(time)
        self.finish(widths[-1], z, version, {**options, "top": widths[-1], "times": times})

    def forward(self, x: Tensor) -> Tensor:
        ratio = getattr(self, "time_downsample_factor", 1)
        if x.shape[2] % ratio:
            front = getattr(self, "time_padding", ratio - x.shape[2] % ratio)
            x = pad_at_dim(x, (front, 0), dim=2, pad_mode=self.init_pad_mode)
        x = self.conv_in(x)
        for space, time in zip(self.down, self.down_temporal, strict=True):
            for block, block_t in zip(space.block, time.block, strict=True):
                x = pixels(block_t, frames(block, x, None), None)
            if hasattr(space, "downsample"):
                x = frames(space.downsample, x)
                x = time.downsample(x) if hasattr(time, "downsample") else x
        return self.end(self.middle(x))


class Decoder(Network):
    def __init__(
        self, version: str, widths: tuple[int, ...], z: int, times: int = 2, mode: str = "trilinear", **options: Any
    ) -> None:
        super().__init__()
        self.give_pre_end, self.tanh_out = options.get("give_pre_end", False), options.get("tanh_out", False)
        self.conv_in, before = conv(3, (z, widths[-1]), 3, version), widths[-1]
        self.up, self.up_temporal = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(len(widths))):
            space, time = level((before, widths[i]), 2, version, options)
            if i > 0:
                space.upsample = Upsample(widths[i])
                if i <= times:
                    split = 2 ** (min(times, len(widths) - 1) - i)
                    time.upsample = TimeUpsampleResCausal2x(widths[i], version, mode, split)
            self.up.insert(0, space)
            self.up_temporal.insert(0, time)
            before = widths[i]
        self.finish(widths[0], 3, version, {**options, "top": widths[-1], "times": times})

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.conv_in(z))
        for space, time in zip(reversed(self.up), reversed(self.up_temporal), strict=True):
            for block, block_t in zip(space.block, time.block, strict=True):
                x = pixels(block_t, frames(block, x, None), None)
            if hasattr(space, "upsample"):
                x = frames(space.upsample, x)
                x = time.upsample(x) if hasattr(time, "upsample") else x
        if not self.give_pre_end:
            x = self.end(x)
            x = x.tanh() if self.tanh_out else x
        return x[:, :, getattr(self, "time_padding", 0) :]


class EncoderCausal3DPadding(Encoder):
    pass


class DecoderCausal3DPadding(Decoder):
    pass


class Encoder3D(Encoder):
    pass


class Decoder3D(Decoder):
    pass


class AutoencodingEngine(nn.Module):
    """The engine of 1.1: a clip in one piece, or its first frame and then chunks of it, with a frame to look ahead."""

    def __init__(self, encoder: Any, decoder: Any) -> None:
        super().__init__()
        self.encoder, self.decoder, self.ratio = encoder, decoder, encoder.time_downsample_factor
        self.use_tiling, self.use_overlap, self.t_chunk_enc, self.t_chunk_dec = False, False, 8, 8 // self.ratio

    def _set_first_chunk(self, first: bool = True) -> None:
        for module in self.modules():
            if hasattr(module, "is_first_chunk"):
                module.is_first_chunk = first

    def _empty_causal_cached(self, parent: nn.Module) -> None:
        for module in parent.modules():
            if hasattr(module, "causal_cache"):
                module.causal_cache = None

    def _pieces(self, network: Any, x: Tensor, size: int, ahead: int) -> Tensor:
        found, start = [], 0
        while start < x.shape[2]:
            self._set_first_chunk(start == 0)
            end = min(start + size, x.shape[2]) if start else 1
            more = ahead if end < x.shape[2] else 0
            y = network(x[:, :, start : end + more])
            found.append(y[:, :, : y.shape[2] - more * self.ratio])
            start = end
        return torch.cat(found, 2)

    def encode(self, x: Any, return_reg_log: bool = False) -> Any:
        self._empty_causal_cached(self.encoder)
        self._set_first_chunk(True)
        z = self._pieces(self.encoder, x, self.t_chunk_enc, 0) if self.use_tiling else self.encoder(x)
        return (z, {}) if return_reg_log else z

    def decode(self, z: Any, decode_from_indices: bool = False) -> Tensor:
        self._empty_causal_cached(self.decoder)
        self._set_first_chunk(True)
        if self.use_tiling and self.use_overlap:
            for name, module in self.decoder.named_modules():
                if hasattr(module, "cache_offset"):
                    fast = name.startswith(("up_temporal.0", "up_temporal.1.upsample", "conv_out"))
                    slow = not fast and name.startswith(("up_temporal.1", "up_temporal.2.upsample"))
                    module.cache_offset = 4 if fast else 2 if slow else 1
        return self._pieces(self.decoder, z, self.t_chunk_dec, self.use_overlap) if self.use_tiling else self.decoder(z)

    def forward(self, x: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        z = self.encode(x)
        return z, self.decode(z)[:, :, -x.shape[2] :], {}
