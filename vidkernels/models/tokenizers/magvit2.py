# SPDX-License-Identifier: Apache-2.0
"""MAGVIT-v2 (arXiv 2310.05737): causal 3-D CNN with lookup-free quantization, 1 + 4k frames to 1 + k latent frames.

The paper fixes the blocks, not every detail: group count, blur and exact placement follow section 3.1 and its figure, and
are arguments. No weights were ever published."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.tokenizers import _foreign
from vidkernels.models.tokenizers._cnn_layers import (
    NORM_EPS,
    Block,
    GroupNorm,
    check_counts,
    check_widths,
    depth_to_space,
    recompute_blocks,
)
from vidkernels.models.tokenizers._vidtok_layers import TimeConv
from vidkernels.ops._checks import check_floating, check_ndim, check_option, check_size


@dataclass(frozen=True)
class MAGVIT2Config:
    """Architecture of a `MAGVIT2`; the defaults are the paper's 17x128x128 -> 5x16x16 tokenizer with 2^18 codes.

    Attributes:
        bits: log2 of the codebook size.
        temporal_down: whether each resampling step also halves the frames; the paper moved this to the later ones.
        norm: "frame": GroupNorm per frame, which keeps the model causal; "group": over the whole clip, as Open-MAGVIT2.
        shuffle_order: channel order of depth-to-space, see `depth_to_space`.
        dropped_frame: frame left out after a temporal doubling: 0 (paper) or 1 (Open-MAGVIT2).
        bit_order: "lsb_first" (paper, Open-MAGVIT2) or "msb_first" (vector-quantize-pytorch).
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    residual_blocks: int = 4
    temporal_down: tuple[bool, ...] = (False, True, True)
    bits: int = 18
    norm: str = "frame"
    shuffle_order: str = "block_first"
    dropped_frame: int = 0
    bit_order: str = "lsb_first"

    def __post_init__(self) -> None:
        check_counts(residual_blocks=self.residual_blocks, bits=self.bits)
        check_widths(self.channels, self.channel_multipliers)
        check_option("bit_order", self.bit_order, ("lsb_first", "msb_first"))
        check_option("norm", self.norm, ("frame", "group"))
        check_option("shuffle_order", self.shuffle_order, ("block_first", "channel_first"))
        check_option("dropped_frame", self.dropped_frame, (0, 1))
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

    @property
    def streams(self) -> bool:
        """Whether no output depends on a later frame."""
        return self.norm == "frame"


class CausalBlock(Block):
    """GroupNorm, swish, causal 3x3x3, twice; 1x1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, per_frame: bool) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels, per_frame=per_frame)
        self.conv1 = TimeConv(in_channels, out_channels, (3, 3, 3), "zeros")
        self.norm2 = GroupNorm(out_channels, per_frame=per_frame)
        self.conv2 = TimeConv(out_channels, out_channels, (3, 3, 3), "zeros")
        if in_channels != out_channels:
            self.nin_shortcut = TimeConv(in_channels, out_channels, (1, 1, 1), "zeros")

    def compute(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, K, T, H, W]."""
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return self.conv2(self.norm2(self.conv1(self.norm1(x))), residual=shortcut)


class CausalDown(nn.Module):
    """Causal 3x3x3 convolution of stride (1 or 2, 2, 2): 1 + 2n frames to 1 + n."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.conv = TimeConv(channels, channels, (3, 3, 3), "zeros")
        self.stride = (2 if temporal else 1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W]; the first frame is a window's last, so that it stands for itself."""
        return ops.causal_conv3d(
            x, self.conv.volume(), self.conv.kernel.bias, stride=self.stride, time_padding="zeros", pad_frames=2
        )


class AdaptiveNorm(nn.Module):
    """GroupNorm without affine whose scale and shift come from the latents' mean and deviation over each latent frame.

    The paper takes the statistics over the whole clip, which lets every frame see the future; per latent frame it does not.
    """

    def __init__(self, channels: int, latent_channels: int, per_frame: bool) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, activation=None, per_frame=per_frame, affine=False)
        self.modulation = nn.Linear(2 * latent_channels, 2 * channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.per_frame = per_frame

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x [B, C, T, H, W], z [B, bits, t, h, w] with T = 1 + (t - 1) * factor."""
        axes = (3, 4) if self.per_frame else (2, 3, 4)
        # As Open-MAGVIT2: unbiased, and with an epsilon below the root, whose slope stays finite for a constant latent.
        correction = 0 if all(z.shape[axis] == 1 for axis in axes) else 1
        variance, mean = torch.var_mean(z, axes, correction=correction)
        deviation = (variance + NORM_EPS).sqrt()
        rows = torch.cat([mean, deviation], 1)
        rows = rows if self.per_frame else rows.unsqueeze(2)
        scale, shift = self.modulation(rows.movedim(1, -1)).movedim(-1, 1).chunk(2, dim=1)  # [B, C, t]
        if self.per_frame and z.shape[2] > 1:
            factor = (x.shape[2] - 1) // (z.shape[2] - 1)
            source = (torch.arange(x.shape[2], device=x.device) + factor - 1) // factor
            scale, shift = scale[:, :, source], shift[:, :, source]
        return self.norm(x) * (1 + scale[..., None, None]) + shift[..., None, None]


class _Encoder(nn.Module):
    def __init__(self, config: MAGVIT2Config) -> None:
        super().__init__()
        width, per_frame = config.channels, config.streams
        self.conv_in = TimeConv(3, width, (3, 3, 3), "zeros")
        self.stages = nn.ModuleList()
        for level, multiplier in enumerate(config.channel_multipliers):
            previous, width = width, config.channels * multiplier
            stage: list[nn.Module] = [
                CausalBlock(previous if i == 0 else width, width, per_frame) for i in range(config.residual_blocks)
            ]
            if level < len(config.temporal_down):
                stage.append(CausalDown(width, config.temporal_down[level]))
            self.stages.append(nn.Sequential(*stage))
        self.mid = nn.Sequential(*(CausalBlock(width, width, per_frame) for _ in range(config.residual_blocks)))
        self.norm_out = GroupNorm(width, per_frame=per_frame)
        self.conv_out = TimeConv(width, config.bits, (1, 1, 1), "zeros")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.stages:
            x = stage(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class _UpStage(nn.Module):
    """Adaptive norm, residual blocks, and a doubling by depth-to-space."""

    def __init__(self, config: MAGVIT2Config, width_in: int, width: int, block: tuple[int, int, int] | None) -> None:
        super().__init__()
        self.adaptive = AdaptiveNorm(width_in, config.bits, config.streams)
        self.blocks = nn.Sequential(
            *(CausalBlock(width_in if i == 0 else width, width, config.streams) for i in range(config.residual_blocks))
        )
        self.block, self.order, self.drop = block, config.shuffle_order, config.dropped_frame
        if block is not None:
            self.upsample = TimeConv(width, width * block[0] * block[1] * block[2], (3, 3, 3), "zeros")

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        x = self.blocks(self.adaptive(x, z))
        return x if self.block is None else depth_to_space(self.upsample(x), self.block, self.order, self.drop)


class _Decoder(nn.Module):
    def __init__(self, config: MAGVIT2Config) -> None:
        super().__init__()
        width = config.channels * config.channel_multipliers[-1]
        self.conv_in = TimeConv(config.bits, width, (3, 3, 3), "zeros")
        self.mid = nn.Sequential(*(CausalBlock(width, width, config.streams) for _ in range(config.residual_blocks)))
        self.stages = nn.ModuleList()
        for level in reversed(range(len(config.channel_multipliers))):
            previous, width = width, config.channels * config.channel_multipliers[level]
            block = (2 if config.temporal_down[level - 1] else 1, 2, 2) if level else None
            self.stages.append(_UpStage(config, previous, width, block))
        self.norm_out = GroupNorm(width, per_frame=config.streams)
        self.conv_out = TimeConv(width, 3, (3, 3, 3), "zeros")

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for stage in self.stages:
            x = stage(x, z)
        return self.conv_out(self.norm_out(x))


class MAGVIT2(nn.Module):
    """MAGVIT-v2 tokenizer: video [B, 3, 1 + 4k, H, W] in -1..1 to tokens [B, 1 + k, H/8, W/8]; an image is one frame."""

    def __init__(self, config: MAGVIT2Config | None = None) -> None:
        super().__init__()
        self.config = config = config or MAGVIT2Config()
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)

    @classmethod
    def from_open_magvit2(
        cls, source: _foreign.Source, config: MAGVIT2Config | None = None, *, averaged: bool = True
    ) -> MAGVIT2:
        """Open-MAGVIT2's video tokenizer (TencentARC/SEED-Voken): a Lightning `.ckpt`, a file of tensors or a state dict.

        Args:
            source: its keys are `encoder.down.0.block.0.conv1.conv_1.weight` and the like; losses are left out.
            config: default: the published 2^18-code tokenizer. The norm, dropped frame, channel and bit order must be
                theirs: "group", 1, "block_first", "lsb_first". Its norms see the whole clip: it does not stream.
            averaged: take the moving averages (`model_ema.*`), as the official evaluation does.

        Raises:
            ShapeError: other keys or shapes; names the first. OptionError: no averages, or a config of another kind.
        """
        config = config or MAGVIT2Config(norm="group", dropped_frame=1)
        found = (config.norm, config.dropped_frame, config.shuffle_order, config.bit_order)
        if found != ("group", 1, "block_first", "lsb_first"):
            raise OptionError("config", "norm='group', dropped_frame=1, 'block_first', 'lsb_first'", found)
        model = cls(config)
        _foreign.load_open_magvit2(model, source, averaged)
        return model

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute every residual block in the backward pass instead of keeping its activations."""
        recompute_blocks(self, enabled)

    def features(self, video: Tensor) -> Tensor:
        """Encoder output before the quantizer [B, bits, t, h, w]; lengths other than 1 + 4k repeat the last frame."""
        check_floating("video", video)
        check_ndim("video", video, 5)
        check_size("video", video, 1, 3)
        frames, pixels = self.config.factors
        if video.shape[3] % pixels or video.shape[4] % pixels or 0 in video.shape[2:]:
            raise ShapeError("video", f"at least one frame, height and width multiples of {pixels}", tuple(video.shape))
        missing = (1 - video.shape[2]) % frames
        if missing:
            video = torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2)
        return self.encoder(video.contiguous(memory_format=torch.channels_last_3d))

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Codes +-1 [B, bits, t, h, w] with straight-through gradient, and int64 tokens [B, t, h, w]."""
        return ops.lfq_quantize(self.features(video), dim=1, bit_order=self.config.bit_order)

    def decode(self, codes: Tensor, *, num_frames: int | None = None) -> Tensor:
        """Video of codes, cropped to `num_frames`."""
        check_ndim("codes", codes, 5)
        check_size("codes", codes, 1, self.config.bits)
        video = self.decoder(codes.contiguous(memory_format=torch.channels_last_3d))
        if num_frames is None:
            return video
        if not 0 < num_frames <= video.shape[2]:
            raise OptionError("num_frames", f"1 to {video.shape[2]}, what these codes hold", num_frames)
        return video[:, :, :num_frames]

    def decode_tokens(self, indices: Tensor, *, num_frames: int | None = None) -> Tensor:
        """Video of tokens [B, t, h, w]."""
        check_ndim("indices", indices, 4)
        codes = ops.lfq_indices_to_codes(indices, self.config.bits, dim=1, bit_order=self.config.bit_order)
        return self.decode(codes.to(self.decoder.conv_in.kernel.bias.dtype), num_frames=num_frames)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstruction of the video's length, tokens, and {"commitment"}: mean squared distance of features and codes."""
        features = self.features(video)
        codes, indices = ops.lfq_quantize(features, dim=1, bit_order=self.config.bit_order)
        commitment = F.mse_loss(features, codes.detach())
        return self.decode(codes, num_frames=video.shape[2]), indices, {"commitment": commitment}
