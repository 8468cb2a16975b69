# SPDX-License-Identifier: Apache-2.0
"""A small VAE with the attributes, class names and results of HunyuanVideo's own `hyvideo.vae`, written anew in plain PyTorch
around diffusers' attention. The official files are no package and not part of this one."""

from __future__ import annotations

from typing import Any

import official_opensora2_vae_toys as opensora2
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def prepare_causal_attention_mask(frames: int, each: int, dtype: Any, device: Any, batch: int) -> Tensor:
    """[B, N, N], N = frames * each: a position sees all of its frame and of those before."""
    frame = torch.arange(frames, device=device).repeat_interleave(each)
    hidden = frame[:, None] < frame
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf).expand(batch, -1, -1)


class CausalConv3d(nn.Module):
    def __init__(self, cin: int, cout: int, size: int = 3, stride: Any = 1, pad_mode: str = "replicate") -> None:
        super().__init__()
        self.pad_mode = pad_mode
        self.time_causal_padding = (*(size // 2,) * 4, size - 1, 0)
        self.conv = nn.Conv3d(cin, cout, size, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.time_causal_padding, self.pad_mode))


class UpsampleCausal3D(nn.Module):
    def __init__(self, width: int, factors: Any, use_conv: bool = True) -> None:
        super().__init__()
        self.channels, self.upsample_factor, self.norm, self.name = width, factors, None, "conv"
        self.interpolate, self.use_conv, self.use_conv_transpose = True, use_conv, False
        self.conv = CausalConv3d(width, width) if use_conv else None

    def forward(self, hidden_states: Tensor, output_size: Any = None, scale: float = 1.0) -> Tensor:
        x = hidden_states
        if self.norm is not None or output_size is not None:
            raise NotImplementedError
        if self.interpolate:
            time, height, width = self.upsample_factor
            frames = torch.cat((x[:, :, :1], x[:, :, 1:].repeat_interleave(time, 2)), 2)
            x = frames.repeat_interleave(height, 3).repeat_interleave(width, 4)
        return self.conv(x) if self.use_conv else x


class DownsampleCausal3D(nn.Module):
    def __init__(self, width: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, stride=stride)

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return self.conv(hidden_states)


class ResnetBlockCausal3D(nn.Module):
    def __init__(
        self,
        cin: int,
        cout: int,
        groups: int,
        scale: float = 1.0,
        act: Any = nn.SiLU,
        dropout: float = 0.0,
        embedding: int = 0,
        up: bool = False,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, cin, 1e-6), nn.GroupNorm(groups, cout, 1e-6)
        self.conv1, self.conv2 = CausalConv3d(cin, cout), CausalConv3d(cout, cout)
        self.dropout, self.nonlinearity, self.output_scale_factor = nn.Dropout(dropout), act(), scale
        self.conv_shortcut = None if cin == cout else CausalConv3d(cin, cout, 1)
        self.time_embedding_norm, self.downsample = "default", None
        self.upsample = UpsampleCausal3D(cin, (1, 2, 2), use_conv=False) if up else None
        self.time_emb_proj = nn.Linear(embedding, cout) if embedding else None

    def forward(self, input_tensor: Tensor, temb: Tensor | None, scale: float = 1.0) -> Tensor:
        h = self.nonlinearity(self.norm1(input_tensor))
        if self.upsample is not None:
            input_tensor, h = self.upsample(input_tensor), self.upsample(h)
        h = self.conv1(h)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(self.nonlinearity(temb))
        if temb is not None:
            h = h + temb[:, :, None, None, None]
        h = self.conv2(self.dropout(self.nonlinearity(self.norm2(h))))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return (shortcut + h) / self.output_scale_factor


class UNetMidBlockCausal3D(nn.Module):
    def __init__(self, width: int, groups: int, attention: bool = True) -> None:
        super().__init__()
        options = {"heads": 1, "dim_head": width, "eps": 1e-6, "norm_num_groups": groups, "bias": True}
        shared = {"residual_connection": True, "upcast_softmax": True, "_from_deprecated_attn_block": True}
        self.attentions = nn.ModuleList([Attention(width, **options, **shared) if attention else None])
        self.resnets = nn.ModuleList(ResnetBlockCausal3D(width, width, groups) for _ in range(2))

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        x = self.resnets[0](hidden_states, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:
                batch, _, frames, *size = x.shape
                mask = prepare_causal_attention_mask(frames, size[0] * size[1], x.dtype, x.device, batch)
                x = attention(x.flatten(2).mT, temb=temb, attention_mask=mask).mT.unflatten(2, (frames, *size))
            x = resnet(x, temb)
        return x


class _Level(nn.Module):
    def __init__(self, cin: int, cout: int, count: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlockCausal3D(cin if i == 0 else cout, cout, groups) for i in range(count))


class DownEncoderBlockCausal3D(_Level):
    def __init__(self, cin: int, cout: int, count: int, groups: int, stride: Any) -> None:
        super().__init__(cin, cout, count, groups)
        self.downsamplers = None if stride is None else nn.ModuleList([DownsampleCausal3D(cout, stride)])

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states, temb=None, scale=scale)
        for sampler in self.downsamplers or ():
            hidden_states = sampler(hidden_states, scale)
        return hidden_states


class UpDecoderBlockCausal3D(_Level):
    def __init__(self, cin: int, cout: int, count: int, groups: int, factors: Any) -> None:
        super().__init__(cin, cout, count, groups)
        self.upsamplers = None if factors is None else nn.ModuleList([UpsampleCausal3D(cout, factors)])

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None, scale: float = 1.0) -> Tensor:
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states, temb=temb, scale=scale)
        for sampler in self.upsamplers or ():
            hidden_states = sampler(hidden_states)
        return hidden_states


class EncoderCausal3D(nn.Module):
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
        return self.conv_out(self.conv_act(self.conv_norm_out(self.mid_block(x))))


class DecoderCausal3D(nn.Module):
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
        self.gradient_checkpointing = False

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        x = self._through(self.mid_block, self.conv_in(sample), latent_embeds)
        x = x.to(self.up_blocks[0].resnets[0].norm1.weight.dtype)
        for block in self.up_blocks:
            x = self._through(block, x, latent_embeds)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))

    def _through(self, block: Any, *call: Any) -> Tensor:
        if self.training and self.gradient_checkpointing:
            return checkpoint(block, *call, use_reentrant=False)
        return block(*call)


class AutoencoderKLCausal3D(opensora2.AutoencoderKLCausal3D):
    networks = EncoderCausal3D, DecoderCausal3D
