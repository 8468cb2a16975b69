# SPDX-License-Identifier: Apache-2.0
"""VQGAN (arXiv 2012.09841), with the keys of taming-transformers' checkpoints. Images are clips of one frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.tokenizers import _foreign
from vidkernels.models.tokenizers._checkpoint import check_keys
from vidkernels.models.tokenizers._cnn_layers import (
    GroupNorm,
    ImageAttention,
    ImageBlock,
    check_counts,
    check_widths,
    recompute_blocks,
)
from vidkernels.models.tokenizers._quantizer import VectorQuantizer
from vidkernels.models.tokenizers._vidtok_layers import FrameConv, SpatialDown, SpatialUp
from vidkernels.ops._checks import check_floating, check_ndim, check_size


@dataclass(frozen=True)
class VQGANConfig:
    """Architecture of a `VQGAN`; the defaults are the f16 ImageNet model with 1024 codes.

    Attributes:
        resolution: image side that it was trained at; it decides where attention is.
        attention_resolutions: sides of the feature maps with attention.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    residual_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    resolution: int = 256
    z_channels: int = 256
    embedding_channels: int = 256
    codes: int = 1024

    def __post_init__(self) -> None:
        check_counts(residual_blocks=self.residual_blocks, resolution=self.resolution, z_channels=self.z_channels)
        check_counts(embedding_channels=self.embedding_channels, codes=self.codes)
        check_widths(self.channels, self.channel_multipliers)

    @property
    def factor(self) -> int:
        """Pixels per latent position."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def width(self, level: int) -> int:
        """Channels at a level."""
        return self.channels * self.channel_multipliers[level]

    def attends(self, level: int) -> bool:
        """Whether the blocks of a level have attention."""
        return self.resolution // 2**level in self.attention_resolutions


class _Level(nn.Module):
    downsample: nn.Module
    upsample: nn.Module

    def __init__(self, blocks: list[nn.Module], attentions: list[nn.Module]) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(blocks), nn.ModuleList(attentions)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ImageBlock(channels, channels)
        self.attn_1 = ImageAttention(channels)
        self.block_2 = ImageBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def _level(config: VQGANConfig, level: int, width_in: int, count: int) -> _Level:
    width = config.width(level)
    blocks: list[nn.Module] = [ImageBlock(width_in if i == 0 else width, width) for i in range(count)]
    return _Level(blocks, [ImageAttention(width) for _ in range(count)] if config.attends(level) else [])


class _Encoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        levels = len(config.channel_multipliers)
        self.conv_in = FrameConv(3, config.channels)
        self.down = nn.ModuleList()
        width = config.channels
        for level in range(levels):
            made = _level(config, level, width, config.residual_blocks)
            width = config.width(level)
            if level + 1 < levels:
                made.downsample = SpatialDown(width)
            self.down.append(made)
        self.mid = _Middle(width)
        self.norm_out = GroupNorm(width)
        self.conv_out = FrameConv(width, config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            assert isinstance(level, _Level)
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class _Decoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        levels = len(config.channel_multipliers)
        width = config.width(levels - 1)
        self.conv_in = FrameConv(config.z_channels, width)
        self.mid = _Middle(width)
        up: list[nn.Module] = []
        for level in reversed(range(levels)):
            made = _level(config, level, width, config.residual_blocks + 1)
            width = config.width(level)
            if level:
                made.upsample = SpatialUp(width)
            up.insert(0, made)
        self.up = nn.ModuleList(up)
        self.norm_out = GroupNorm(width)
        self.conv_out = FrameConv(width, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            assert isinstance(level, _Level)
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(self.norm_out(x))


class VQGAN(nn.Module):
    """VQGAN over images [B, 3, H, W] in -1..1, or over the frames of clips [B, 3, T, H, W]."""

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VQGANConfig()
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)
        self.quantize = VectorQuantizer(config.codes, config.embedding_channels)
        self.quant_conv = FrameConv(config.z_channels, config.embedding_channels, 1)
        self.post_quant_conv = FrameConv(config.embedding_channels, config.z_channels, 1)

    @classmethod
    def from_checkpoint(cls, source: _foreign.Source, config: VQGANConfig | None = None) -> VQGAN:
        """taming-transformers' checkpoint: a Lightning `.ckpt`, a file of tensors or a state dict; losses and moving averages
        are left out.

        Raises:
            ShapeError: other keys or shapes; names the first.
        """
        tensors, where = _foreign.tensors_of(source)
        model = cls(config)
        own = {key: value for key, value in tensors.items() if not key.startswith(("loss.", "model_ema."))}
        check_keys(model.state_dict(), own, where, "VQGAN")
        model.load_state_dict(own)
        return model

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute every residual block in the backward pass instead of keeping its activations."""
        recompute_blocks(self, enabled)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, C, (T,) h, w], int64 tokens [B, (T,) h, w], codebook loss."""
        check_floating("images", images)
        check_ndim("images", images, 4, 5)
        check_size("images", images, 1, 3)
        if images.shape[-2] % self.config.factor or images.shape[-1] % self.config.factor or 0 in images.shape[2:]:
            expected = f"at least one frame, height and width multiples of {self.config.factor}"
            raise ShapeError("images", expected, tuple(images.shape))
        video = images.unsqueeze(2) if images.ndim == 4 else images
        z = self.quant_conv(self.encoder(video.contiguous(memory_format=torch.channels_last_3d)))
        codes, indices, loss = self.quantize(z)
        return (codes.squeeze(2), indices.squeeze(1), loss) if images.ndim == 4 else (codes, indices, loss)

    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes."""
        check_ndim("codes", codes, 4, 5)
        video = codes.unsqueeze(2) if codes.ndim == 4 else codes
        images = self.decoder(self.post_quant_conv(video.contiguous(memory_format=torch.channels_last_3d)))
        return images.squeeze(2) if codes.ndim == 4 else images

    def decode_tokens(self, indices: Tensor) -> Tensor:
        """Images of tokens [B, (T,) h, w]."""
        if indices.ndim not in (3, 4):
            raise OptionError("indices", "[B, h, w] or [B, T, h, w]", tuple(indices.shape))
        return self.decode(self.quantize.decode(indices))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, tokens, codebook loss."""
        codes, indices, loss = self.encode(images)
        return self.decode(codes), indices, loss
