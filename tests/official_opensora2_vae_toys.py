# SPDX-License-Identifier: Apache-2.0
"""A small VAE with the attributes, class names and results of Open-Sora 2.0's `hunyuan_vae`, written anew in plain PyTorch around
diffusers' attention. The official files are no package and not part of this one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def auto_grad_checkpoint(module: Any, *call: Any) -> Any:
    if getattr(module, "grad_checkpointing", False):
        return checkpoint(module, *call, use_reentrant=True)
    return module(*call)


class ChannelChunkConv3d(nn.Conv3d):
    """Upstream takes channels in parts where there are too many values for one call."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)


class CausalConv3d(nn.Module):
    def __init__(self, cin: int, cout: int, size: int = 3, stride: Any = 1, pad_mode: str = "replicate") -> None:
        super().__init__()
        self.pad_mode = pad_mode
        self.time_causal_padding = (*(size // 2,) * 4, size - 1, 0)
        self.conv = ChannelChunkConv3d(cin, cout, size, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.time_causal_padding, self.pad_mode))


class UpsampleCausal3D(nn.Module):
    def __init__(self, width: int, factors: tuple[int, int, int]) -> None:
        super().__init__()
        self.channels, self.upsample_factor, self.conv = width, factors, CausalConv3d(width, width)

    def forward(self, input_tensor: Tensor) -> Tensor:
        time, height, width = self.upsample_factor
        first, others = input_tensor[:, :, :1], input_tensor[:, :, 1:].repeat_interleave(time, 2)
        frames = torch.cat((first, others), 2)
        return self.conv(frames.repeat_interleave(height, 3).repeat_interleave(width, 4))


class DownsampleCausal3D(nn.Module):
    def __init__(self, width: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, stride=stride)

    def forward(self, input_tensor: Tensor) -> Tensor:
        return self.conv(input_tensor)


class ResnetBlockCausal3D(nn.Module):
    def __init__(
        self, cin: int, cout: int, groups: int, scale: float = 1.0, act: Any = nn.SiLU, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, cin, 1e-6), nn.GroupNorm(groups, cout, 1e-6)
        self.conv1, self.conv2 = CausalConv3d(cin, cout), CausalConv3d(cout, cout)
        self.dropout, self.nonlinearity, self.output_scale_factor = nn.Dropout(dropout), act(), scale
        self.conv_shortcut = None if cin == cout else CausalConv3d(cin, cout, 1)

    def forward(self, input_tensor: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        h = self.conv2(self.dropout(self.nonlinearity(self.norm2(h))))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return (shortcut + h) / self.output_scale_factor


class UNetMidBlockCausal3D(nn.Module):
    def __init__(self, width: int, groups: int, attention: bool = True) -> None:
        super().__init__()
        self.add_attention = attention
        options = {"heads": 1, "dim_head": width, "eps": 1e-6, "norm_num_groups": groups, "bias": True}
        shared = {"residual_connection": True, "upcast_softmax": True, "_from_deprecated_attn_block": True}
        self.attentions = nn.ModuleList([Attention(width, **options, **shared) if attention else None])
        self.resnets = nn.ModuleList(ResnetBlockCausal3D(width, width, groups) for _ in range(2))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        x = self.resnets[0](hidden_states)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:
                size = x.shape[2:]
                x = attention(x.flatten(2).mT, attention_mask=attention_mask).mT.unflatten(2, size)
            x = resnet(x)
        return x


class _Level(nn.Module):
    def __init__(self, cin: int, cout: int, count: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlockCausal3D(cin if i == 0 else cout, cout, groups) for i in range(count))


class DownEncoderBlockCausal3D(_Level):
    def __init__(self, cin: int, cout: int, count: int, groups: int, stride: Any) -> None:
        super().__init__(cin, cout, count, groups)
        self.downsamplers = None if stride is None else nn.ModuleList([DownsampleCausal3D(cout, stride)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in [*self.resnets, *(self.downsamplers or ())]:
            hidden_states = auto_grad_checkpoint(layer, hidden_states)
        return hidden_states


class UpDecoderBlockCausal3D(_Level):
    def __init__(self, cin: int, cout: int, count: int, groups: int, factors: Any) -> None:
        super().__init__(cin, cout, count, groups)
        self.upsamplers = None if factors is None else nn.ModuleList([UpsampleCausal3D(cout, factors)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in [*self.resnets, *(self.upsamplers or ())]:
            hidden_states = auto_grad_checkpoint(layer, hidden_states)
        return hidden_states


class _Network(nn.Module):
    def prepare_attention_mask(self, hidden_states: Tensor) -> Tensor:
        """[B, N, N], N = T H W: a position sees all of its frame and of those before."""
        batch, _, frames, height, width = hidden_states.shape
        frame = torch.arange(frames, device=hidden_states.device).repeat_interleave(height * width)
        hidden = frame[:, None] < frame
        return torch.zeros_like(hidden, dtype=hidden_states.dtype).masked_fill(hidden, -torch.inf).repeat(batch, 1, 1)

    def middle(self, x: Tensor) -> Tensor:
        mask = self.prepare_attention_mask(x) if self.mid_block.add_attention else None
        return auto_grad_checkpoint(self.mid_block, x, mask)


class EncoderCausal3D(_Network):
    def __init__(self, widths: tuple[int, ...], z: int, count: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.conv_in, strides = CausalConv3d(3, widths[0]), ((1, 2, 2), (2, 2, 2), None)
        befores = (widths[0], *widths)
        self.down_blocks = nn.ModuleList(
            DownEncoderBlockCausal3D(before, width, count, groups, stride)
            for before, width, stride in zip(befores, widths, strides, strict=False)
        )
        self.mid_block = UNetMidBlockCausal3D(widths[-1], groups, attention)
        self.conv_norm_out, self.conv_act = nn.GroupNorm(groups, widths[-1], 1e-6), nn.SiLU()
        self.conv_out = CausalConv3d(widths[-1], 2 * z)

    def forward(self, sample: Tensor) -> Tensor:
        x = self.conv_in(sample)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(self.middle(x))))


class DecoderCausal3D(_Network):
    def __init__(self, widths: tuple[int, ...], z: int, count: int, groups: int, attention: bool) -> None:
        super().__init__()
        widths, factors = widths[::-1], ((2, 2, 2), (1, 2, 2), None)
        self.conv_in, self.mid_block = CausalConv3d(z, widths[0]), UNetMidBlockCausal3D(widths[0], groups, attention)
        befores = (widths[0], *widths)
        self.up_blocks = nn.ModuleList(
            UpDecoderBlockCausal3D(before, width, count + 1, groups, factor)
            for before, width, factor in zip(befores, widths, factors, strict=False)
        )
        self.conv_norm_out, self.conv_act = nn.GroupNorm(groups, widths[-1], 1e-6), nn.SiLU()
        self.conv_out = CausalConv3d(widths[-1], 3)

    def post_process(self, sample: Tensor) -> Tensor:
        return self.conv_act(self.conv_norm_out(sample))

    def forward(self, sample: Tensor) -> Tensor:
        x = self.conv_in(sample)
        x = self.middle(x).to(self.up_blocks[0].resnets[0].norm1.weight.dtype)
        for block in self.up_blocks:
            x = block(x)
        if getattr(self, "grad_checkpointing", False):
            return self.conv_out(checkpoint(self.post_process, x, use_reentrant=True))
        return self.conv_out(self.post_process(x))


class AutoencoderKLCausal3D(nn.Module):
    """Tiles in time, of which neighbours share frames that are blended in place."""

    networks: Any = (EncoderCausal3D, DecoderCausal3D)

    def __init__(
        self, widths: tuple[int, ...] = (16, 16, 24), z: int = 4, count: int = 1, attention: bool = True
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = (kind(widths, z, count, 4, attention) for kind in self.networks)
        self.quant_conv, self.post_quant_conv = nn.Conv3d(2 * z, 2 * z, 1), nn.Conv3d(z, z, 1)
        self.tile = 0

    def encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        if not self.tile or z.shape[2] <= self.tile:
            return self.decoder(self.post_quant_conv(z))
        step = self.tile // 2
        tiles = [
            self.decoder(self.post_quant_conv(z[:, :, i : i + self.tile])) for i in range(0, z.shape[2] - step, step)
        ]
        for left, right in zip(tiles, tiles[1:], strict=False):
            right[:, :, :1] = 0.5 * left[:, :, -1:] + 0.5 * right[:, :, :1]
        return torch.cat([tile[:, :, : 2 * step] for tile in tiles], 2)
