# SPDX-License-Identifier: Apache-2.0
"""MAGVIT's 3D-VQ tokenizer (arXiv 2212.05199): non-causal 3-D convolutions, pooling, a learned codebook; and the inflation of
a 2-D tokenizer's weights into it. Key tree as VQGAN's, with 3-D kernels."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.tokenizers import _foreign
from vidkernels.models.tokenizers._cnn_layers import Block, GroupNorm, check_counts, check_widths, recompute_blocks
from vidkernels.models.tokenizers._quantizer import VectorQuantizer
from vidkernels.ops._checks import check_floating, check_ndim, check_option, check_size

INFLATIONS = ("central", "average", "last")


@dataclass(frozen=True)
class MAGVITConfig:
    """Architecture of a `MAGVIT`; the defaults are MAGVIT-B for 128x128.

    Attributes:
        temporal_down: whether each resampling step also halves the frames, shallow to deep.
        padding: "zeros" as in the released configuration, or "reflect" as in the paper.
        downsample: "pool" (MAGVIT) or "conv" (VQGAN's strided convolution, for inflated weights).
        ema: decay of the codebook's moving average; None trains it by gradient.
        bias: biases in the residual blocks and the first convolution, which VQGAN has and MAGVIT leaves out.
    """

    channels: int = 64
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    residual_blocks: int = 2
    temporal_down: tuple[bool, ...] = (True, True, False)
    embedding_channels: int = 256
    codes: int = 1024
    padding: str = "zeros"
    downsample: str = "pool"
    ema: float | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        check_counts(residual_blocks=self.residual_blocks, embedding_channels=self.embedding_channels, codes=self.codes)
        check_widths(self.channels, self.channel_multipliers)
        check_option("padding", self.padding, ("zeros", "reflect"))
        check_option("downsample", self.downsample, ("pool", "conv"))
        if len(self.temporal_down) != len(self.channel_multipliers) - 1:
            raise OptionError(
                "temporal_down",
                f"{len(self.channel_multipliers) - 1} flags, one per resampling step",
                self.temporal_down,
            )

    @property
    def factors(self) -> tuple[int, int]:
        """Frames and pixels per latent position."""
        return 2 ** sum(self.temporal_down), 2 ** len(self.temporal_down)


class VolumeConv(nn.Module):
    """3-D convolution of odd size that keeps the size at stride 1; keys `weight`, `bias`."""

    def __init__(
        self, in_channels: int, out_channels: int, size: int = 3, *, bias: bool = True, padding: str = "zeros"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, size, size, size))
        bound = 1 / math.sqrt(in_channels * size**3)
        nn.init.uniform_(self.weight, -bound, bound)
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound)) if bias else None
        self.side, self.padding = size // 2, padding

    def forward(self, x: Tensor, residual: Tensor | None = None, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
        """x [B, C, T, H, W] -> [B, K, T', H', W'] (+ residual)."""
        if self.padding == "reflect" and self.side:
            # Reflection has no form without a padded copy: its source lies on the far side of the border.
            side = [min(self.side, size - 1) for size in reversed(x.shape[2:]) for _ in range(2)]
            x = F.pad(x, side, mode="reflect")
            rest = [self.side - s for s in side]
            x = F.pad(x, rest, mode="replicate").contiguous(memory_format=torch.channels_last_3d)
            return ops.causal_conv3d(
                x, self.weight, self.bias, stride=stride, time_padding="none", spatial_padding=0, residual=residual
            )
        return ops.causal_conv3d(
            x,
            self.weight,
            self.bias,
            stride=stride,
            time_padding="zeros",
            pad_frames=(self.side, self.side),
            residual=residual,
        )


class VolumeBlock(Block):
    """GroupNorm, swish, 3x3x3, twice; 1x1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, padding: str, bias: bool = False) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels, per_frame=False)
        self.conv1 = VolumeConv(in_channels, out_channels, bias=bias, padding=padding)
        self.norm2 = GroupNorm(out_channels, per_frame=False)
        self.conv2 = VolumeConv(out_channels, out_channels, bias=bias, padding=padding)
        if in_channels != out_channels:
            self.nin_shortcut = VolumeConv(in_channels, out_channels, 1, bias=bias)

    def compute(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, K, T, H, W]."""
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return self.conv2(self.norm2(self.conv1(self.norm1(x))), residual=shortcut)


class _Down(nn.Module):
    def __init__(self, channels: int, temporal: bool, config: MAGVITConfig) -> None:
        super().__init__()
        self.scale = (2 if temporal else 1, 2, 2)
        if config.downsample == "conv":
            self.conv = VolumeConv(channels, channels, padding=config.padding)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "conv"):
            return self.conv(x, stride=self.scale)
        if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):  # torch has no such kernels there
            return F.avg_pool3d(x.float(), self.scale).to(x.dtype)
        return F.avg_pool3d(x, self.scale)


class _Up(nn.Module):
    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.scale = (2 if temporal else 1, 2, 2)
        self.conv = VolumeConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return ops.upsample_conv3d(x, self.conv.weight, self.conv.bias, scale=self.scale, pad_frames=(1, 1))


class _Level(nn.Module):
    downsample: nn.Module
    upsample: nn.Module

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


def _blocks(config: MAGVITConfig, width_in: int, width: int) -> _Level:
    return _Level(
        [
            VolumeBlock(width_in if i == 0 else width, width, config.padding, config.bias)
            for i in range(config.residual_blocks)
        ]
    )


class _Encoder(nn.Module):
    def __init__(self, config: MAGVITConfig) -> None:
        super().__init__()
        width = config.channels * config.channel_multipliers[0]
        self.conv_in = VolumeConv(3, width, bias=config.bias, padding=config.padding)
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(config.channel_multipliers):
            previous, width = width, config.channels * multiplier
            made = _blocks(config, previous, width)
            if level < len(config.temporal_down):
                made.downsample = _Down(width, config.temporal_down[level], config)
            self.down.append(made)
        self.mid = _blocks(config, width, width)
        self.norm_out = GroupNorm(width, per_frame=False)
        self.conv_out = VolumeConv(width, config.embedding_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            assert isinstance(level, _Level)
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class _Decoder(nn.Module):
    def __init__(self, config: MAGVITConfig) -> None:
        super().__init__()
        width = config.channels * config.channel_multipliers[-1]
        self.conv_in = VolumeConv(config.embedding_channels, width, padding=config.padding)
        self.mid = _blocks(config, width, width)
        up: list[nn.Module] = []
        for level in reversed(range(len(config.channel_multipliers))):
            previous, width = width, config.channels * config.channel_multipliers[level]
            made = _blocks(config, previous, width)
            if level:
                made.upsample = _Up(width, config.temporal_down[level - 1])
            up.insert(0, made)
        self.up = nn.ModuleList(up)
        self.norm_out = GroupNorm(width, per_frame=False)
        self.conv_out = VolumeConv(width, 3, padding=config.padding)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            assert isinstance(level, _Level)
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(self.norm_out(x))


class MAGVIT(nn.Module):
    """MAGVIT's 3D-VQ tokenizer: video [B, 3, T, H, W] in -1..1 to tokens [B, T/4, H/8, W/8]."""

    def __init__(self, config: MAGVITConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MAGVITConfig()
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)
        self.quantize = VectorQuantizer(config.codes, config.embedding_channels, legacy=False, ema=config.ema)

    @classmethod
    def from_vqgan(
        cls, source: _foreign.Source, config: MAGVITConfig, mode: str = "central"
    ) -> tuple[MAGVIT, list[str]]:
        """A 3-D tokenizer from taming-transformers' 2-D weights: a Lightning `.ckpt`, a file of tensors or a state dict.

        Residual blocks, norms, resampling kernels and the codebook are taken over. VQGAN has no counterpart for its
        attention here, and another last convolution before the codebook.

        Args:
            config: with VQGAN's widths and blocks; `downsample="conv"` takes its strided convolutions too, `bias=True` the
                biases of its residual blocks.
            mode: "central", "average" or "last", see `inflate_kernel`.

        Returns:
            The model, and its keys that kept their random values.

        Raises:
            ShapeError: a kernel does not inflate to the model's, or nothing of the source fits.
        """
        tensors, where = _foreign.tensors_of(source)
        model = cls(config)
        expected = model.state_dict()
        image: dict[str, Tensor] = {}
        for key, value in tensors.items():
            key = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid.block.{int(m[1]) - 1}.", key)
            if key in expected and not (key.startswith("encoder.conv_out") or key.startswith("decoder.conv_in")):
                image[key] = value
        if "quantize.embedding.weight" not in image or "encoder.down.0.block.0.conv1.weight" not in image:
            raise ShapeError(where, "the keys of VQGAN", sorted(tensors)[:3])
        return model, inflate(model, image, mode)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute every residual block in the backward pass instead of keeping its activations."""
        recompute_blocks(self, enabled)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, C, t, h, w], int64 tokens [B, t, h, w], codebook loss."""
        check_floating("video", video)
        check_ndim("video", video, 5)
        check_size("video", video, 1, 3)
        frames, pixels = self.config.factors
        if video.shape[2] % frames or video.shape[3] % pixels or video.shape[4] % pixels or 0 in video.shape[2:]:
            expected = f"frames a multiple of {frames}, height and width of {pixels}"
            raise ShapeError(
                "video", expected, tuple(video.shape), "The tokenizer is not causal: repeat the last frame to fill up."
            )
        return self.quantize(self.encoder(video.contiguous(memory_format=torch.channels_last_3d)))

    def decode(self, codes: Tensor) -> Tensor:
        """Video of codes."""
        check_ndim("codes", codes, 5)
        return self.decoder(codes.contiguous(memory_format=torch.channels_last_3d))

    def decode_tokens(self, indices: Tensor) -> Tensor:
        """Video of tokens [B, t, h, w]."""
        check_ndim("indices", indices, 4)
        return self.decode(self.quantize.decode(indices))

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, tokens, codebook loss."""
        codes, indices, loss = self.encode(video)
        return self.decode(codes), indices, loss


def inflate_kernel(kernel: Tensor, frames: int, mode: str = "central") -> Tensor:
    """A 2-D kernel [K, C, h, w] as a 3-D one [K, C, frames, h, w].

    "central": the kernel at time index frames // 2, zeros elsewhere (MAGVIT's choice); "average": kernel / frames at every
    index; "last": at the last index, the causal form of central (MAGVIT-v2).
    """
    check_option("mode", mode, INFLATIONS)
    check_ndim("kernel", kernel, 4)
    if mode == "average":
        return (kernel / frames).unsqueeze(2).repeat(1, 1, frames, 1, 1)
    volume = kernel.new_zeros(*kernel.shape[:2], frames, *kernel.shape[2:])
    volume[:, :, frames // 2 if mode == "central" else frames - 1] = kernel
    return volume


def inflate(model: nn.Module, image_state: Mapping[str, Tensor], mode: str = "central") -> list[str]:
    """Load a 2-D tokenizer's weights into a 3-D model with the same key tree.

    Biases, norms and the codebook are copied, kernels inflated. Keys that only one side has (attention, biases of
    convolutions without) are left alone.

    Returns:
        The keys of the model that were not set.

    Raises:
        ShapeError: a key of both sides does not fit; nothing was changed.
    """
    check_option("mode", mode, INFLATIONS)
    staged = {}
    for key, value in model.state_dict().items():
        # A causal convolution keeps its kernel one level deeper.
        source = image_state.get(
            key, image_state.get(key.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias"))
        )
        if source is None:
            continue
        made = inflate_kernel(source, value.shape[2], mode) if value.ndim == 5 and source.ndim == 4 else source
        if made.shape != value.shape:
            raise ShapeError(key, f"a kernel that inflates to {tuple(value.shape)}", tuple(source.shape))
        staged[key] = made
    model.load_state_dict(staged, strict=False)
    return [key for key in model.state_dict() if key not in staged]
