# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of magvit2-pytorch (an independent reading of arXiv 2310.05737), built from a list of layers. Keys and shapes
of the state_dict are that package's, so its checkpoints load; the computation runs on the kernels of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels._conv.geometry import is_channels_last
from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.tokenizers import _foreign
from vidkernels.models.tokenizers._checkpoint import check_keys
from vidkernels.models.tokenizers._cnn_layers import Block, check_counts, depth_to_space, recompute_blocks
from vidkernels.nn import LFQ
from vidkernels.ops._checks import check_floating, check_ndim, check_size

Layer = str | tuple[str, int]
LAYERS = ("residual", "consecutive_residual", "compress_space", "compress_time", "attend_space", "attend_time")


@dataclass(frozen=True)
class MAGVIT2LayersConfig:
    """Architecture of a `MAGVIT2Layers`, by magvit2-pytorch's own names of the layers.

    Attributes:
        layers: "residual", ("consecutive_residual", n), "compress_space", "compress_time" (alone or with the width behind it),
            "attend_space", "attend_time". Its linear attention, gate loops and conditioning are not implemented.
        channels: its `init_dim`.
        max_channels: its `max_dim`.
        kernel, input_kernel, output_kernel: of the residual units, the first and the last convolution.
        codebook_size, num_codebooks, spherical, soft_clamp: of its LFQ.
        heads, head_channels: of the attention.
        latent_norm: apply the LayerNorm in front of the quantizer. magvit2-pytorch 0.5.1 creates it and never calls it, so its
            checkpoints were trained without.
    """

    layers: tuple[Layer, ...] = ("residual", "residual", "residual")
    channels: int = 64
    max_channels: int | None = None
    kernel: int = 3
    input_kernel: tuple[int, int, int] = (7, 7, 7)
    output_kernel: tuple[int, int, int] = (3, 3, 3)
    codebook_size: int = 1024
    num_codebooks: int = 1
    spherical: bool = False
    soft_clamp: float | None = 10.0
    heads: int = 8
    head_channels: int = 32
    latent_norm: bool = False

    def __post_init__(self) -> None:
        check_counts(channels=self.channels, kernel=self.kernel, heads=self.heads, head_channels=self.head_channels)
        check_counts(input_kernel=self.input_kernel, output_kernel=self.output_kernel, num_codebooks=self.num_codebooks)
        for layer in self.layers:
            kind = layer if isinstance(layer, str) else layer[0]
            if kind not in LAYERS or (kind == "consecutive_residual") > (not isinstance(layer, str)):
                remedy = "linear_attend_space, gateloop_time and cond_* layers of magvit2-pytorch have no counterpart."
                raise OptionError("layers", f"layers among {LAYERS}", layer, remedy)

    @property
    def factors(self) -> tuple[int, int]:
        """Frames and pixels per latent position."""
        kinds = [layer if isinstance(layer, str) else layer[0] for layer in self.layers]
        return 2 ** kinds.count("compress_time"), 2 ** kinds.count("compress_space")


def _frames(weight: Tensor) -> Tensor:
    """A 2-D kernel as a 3-D one; a 1-D one as a temporal one; a view."""
    return weight.unsqueeze(2) if weight.ndim == 4 else weight[..., None, None]


class _CausalConv(nn.Module):
    def __init__(self, cin: int, cout: int, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv3d(cin, cout, size)

    def forward(self, x: Tensor) -> Tensor:
        return ops.causal_conv3d(x, self.conv.weight, self.conv.bias, time_padding="zeros")


class _SqueezeExcite(nn.Module):
    """Gates of each frame's channels, from a softmax-weighted mean of its positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(16, channels // 2)
        self.to_k = nn.Conv2d(channels, 1, 1)
        squeeze, excite = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.net = nn.Sequential(squeeze, nn.LeakyReLU(0.1), excite, nn.Sigmoid())
        nn.init.zeros_(excite.weight)
        assert excite.bias is not None
        nn.init.constant_(excite.bias, -10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 4, 1).flatten(2, 3)  # [B, T, H*W, C]
        share = F.linear(rows, self.to_k.weight.flatten(1), self.to_k.bias).softmax(2)
        mean = (share.transpose(2, 3) @ rows).squeeze(2)  # [B, T, C]
        squeeze, excite = cast(nn.Conv2d, self.net[0]), cast(nn.Conv2d, self.net[2])
        hidden = F.leaky_relu(F.linear(mean, squeeze.weight.flatten(1), squeeze.bias), 0.1)
        gates = F.linear(hidden, excite.weight.flatten(1), excite.bias).sigmoid()
        return x * gates.transpose(1, 2)[..., None, None]


class _Residual(Block):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def compute(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class _Pointwise(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return ops.causal_conv3d(x, self.weight, self.bias, time_padding="none")


def _unit(channels: int, kernel: int) -> nn.Module:
    conv = _CausalConv(channels, channels, (kernel,) * 3)
    return _Residual(
        nn.Sequential(conv, nn.ELU(), _Pointwise(channels, channels, 1), nn.ELU(), _SqueezeExcite(channels))
    )


class _Down(nn.Module):
    """Half the size of each frame (3x3, stride 2), or half the frames (causal, 3, stride 2)."""

    def __init__(self, cin: int, cout: int, temporal: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(cin, cout, 3, 2) if temporal else nn.Conv2d(cin, cout, 3, 2, 1)
        self.options = {"stride": (2, 1, 1), "time_padding": "zeros", "pad_frames": 2} if temporal else {}

    def forward(self, x: Tensor) -> Tensor:
        options: dict[str, Any] = self.options or {"stride": (1, 2, 2), "time_padding": "none"}
        return ops.causal_conv3d(x, _frames(self.conv.weight), self.conv.bias, **options)


class _Up(nn.Module):
    """1x1 convolution, SiLU, depth to space or to time."""

    def __init__(self, cin: int, cout: int, temporal: bool) -> None:
        super().__init__()
        self.block = (2, 1, 1) if temporal else (1, 2, 2)
        self.net = nn.Sequential(nn.Conv1d(cin, cout * 2, 1) if temporal else nn.Conv2d(cin, cout * 4, 1), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        conv = cast(nn.Conv1d | nn.Conv2d, self.net[0])
        x = ops.causal_conv3d(x, _frames(conv.weight), conv.bias, time_padding="none")
        return depth_to_space(F.silu(x), self.block, "channel_first")


class _RMSNorm(nn.Module):
    """x / ||x|| * sqrt(C) * gamma over the channel axis."""

    def __init__(self, channels: int, first: bool = False) -> None:
        super().__init__()
        self.gamma, self.axis = nn.Parameter(torch.ones(channels, *(1, 1, 1) if first else ())), 1 if first else -1

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=self.axis) * x.shape[self.axis] ** 0.5 * self.gamma


class _Attention(nn.Module):
    """Over the positions of each frame, or causal over the frames of each position, with four learned keys and values."""

    def __init__(self, channels: int, config: MAGVIT2LayersConfig, over_time: bool) -> None:
        super().__init__()
        self.heads, self.over_time = config.heads, over_time
        inner = config.heads * config.head_channels
        self.norm = _RMSNorm(channels)
        self.to_qkv = nn.Sequential(nn.Linear(channels, 3 * inner, bias=False))
        self.mem_kv = nn.Parameter(torch.randn(2, config.heads, 4, config.head_channels))
        self.to_out = nn.Sequential(nn.Identity(), nn.Linear(inner, channels, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 3, 4, 2, 1) if self.over_time else x.permute(0, 2, 3, 4, 1)
        shape = rows.shape
        rows = rows.flatten(0, 2) if self.over_time else rows.flatten(2, 3).flatten(0, 1)  # [groups, n, C]
        q, k, v = self.to_qkv(self.norm(rows)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        k, v = (torch.cat([m.expand(len(q), -1, -1, -1), t], 2) for m, t in zip(self.mem_kv, (k, v), strict=True))
        mask = None
        if self.over_time:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        out = self.to_out(mixed).reshape(shape)
        return out.permute(0, 4, 3, 1, 2) if self.over_time else out.permute(0, 4, 1, 2, 3)


class _FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = int(channels * 4 * 2 / 3)
        self.norm = _RMSNorm(channels, first=True)
        self.net = nn.Sequential(_Pointwise(channels, hidden * 2, 1), nn.Identity(), _Pointwise(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        halves = self.net[0](self.norm(x))
        if is_channels_last(halves):
            return self.net[2](ops.gated_activation(halves.movedim(1, -1)).movedim(-1, 1))
        # a clip whose channels lie one after the other is one row
        batch, channels, *space = halves.shape
        return self.net[2](ops.gated_activation(halves.flatten(1)).reshape(batch, channels // 2, *space))


class _TokenShift(nn.Module):
    """The second half of the channels comes from the frame before."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        stay, move = x.chunk(2, 1)
        return self.fn(torch.cat([stay, F.pad(move, (0, 0, 0, 0, 1, -1))], 1))


class _LatentNorm(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(nn.Identity(), nn.LayerNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        norm = cast(nn.LayerNorm, self[1])
        return ops.channel_norm(x, norm.weight, norm.bias, eps=norm.eps)


def _pair(layer: Layer, width: int, config: MAGVIT2LayersConfig) -> tuple[nn.Module, nn.Module, int]:
    """A layer of the encoder, its counterpart in the decoder, and the width behind the first."""
    kind, *given = (layer,) if isinstance(layer, str) else layer
    if kind == "residual":
        return _unit(width, config.kernel), _unit(width, config.kernel), width
    if kind == "consecutive_residual":
        both = (nn.Sequential(*(_unit(width, config.kernel) for _ in range(given[0]))) for _ in range(2))
        return next(both), next(both), width
    if kind.startswith("compress"):
        out = given[0] if given else 2 * width
        out = out if config.max_channels is None else min(out, config.max_channels)
        temporal = kind == "compress_time"
        return _Down(width, out, temporal), _Up(out, width, temporal), out
    over_time = kind == "attend_time"

    def attend() -> nn.Module:
        parts = (_Attention(width, config, over_time), _FeedForward(width))
        return nn.Sequential(*(_Residual(_TokenShift(p) if over_time else p) for p in parts))

    return attend(), attend(), width


class MAGVIT2Layers(nn.Module):
    """magvit2-pytorch's tokenizer: video [B, 3, 1 + f k, H, W] to codes; strictly causal. An image is a clip of one frame."""

    def __init__(self, config: MAGVIT2LayersConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MAGVIT2LayersConfig()
        self.conv_in = _CausalConv(3, config.channels, config.input_kernel)
        self.conv_out = _CausalConv(config.channels, 3, config.output_kernel)
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        width = config.channels
        for layer in config.layers:
            down, up, width = _pair(layer, width, config)
            encoder.append(down)
            decoder.insert(0, up)
        self.encoder_layers = nn.ModuleList([*encoder, _LatentNorm(width)])
        self.encoder_layers[-1].requires_grad_(config.latent_norm)
        self.decoder_layers = nn.ModuleList(decoder)
        self.quantizers = LFQ(
            dim=width,
            codebook_size=config.codebook_size,
            num_codebooks=config.num_codebooks,
            entropy_loss_weight=0.1,
            commitment_loss_weight=1.0,
            diversity_gamma=2.5,
            soft_clamp_input_value=config.soft_clamp,
            spherical=config.spherical,
        )

    @classmethod
    def from_checkpoint(cls, source: _foreign.Source, config: MAGVIT2LayersConfig) -> MAGVIT2Layers:
        """magvit2-pytorch's `tokenizer.save` file, or its state dict; discriminators are left out.

        The file also holds its configuration as a pickle, which is not read: name it.

        Raises:
            ShapeError: other keys or shapes; names the first.
        """
        tensors, where = _foreign.tensors_of(source, "model_state_dict")
        model = cls(config)
        own = {k: v for k, v in tensors.items() if not k.startswith(("discr.", "multiscale_discrs.", "vgg."))}
        check_keys(model.state_dict(), own, where, "magvit2-pytorch's tokenizer")
        model.load_state_dict(own)
        return model

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute every residual unit, attention and feed-forward in the backward pass instead of keeping its activations."""
        recompute_blocks(self, enabled)

    def features(self, video: Tensor) -> Tensor:
        """Encoder output before the quantizer [B, C, 1 + k, h, w]."""
        check_floating("video", video)
        check_ndim("video", video, 5)
        check_size("video", video, 1, 3)
        frames, pixels = self.config.factors
        if (video.shape[2] - 1) % frames or video.shape[3] % pixels or video.shape[4] % pixels or 0 in video.shape[2:]:
            expected = f"1 + {frames} k frames, height and width multiples of {pixels}"
            raise ShapeError("video", expected, tuple(video.shape), "Repeat the last frame to fill up.")
        x = F.pad(video, (0, 0, 0, 0, frames - 1, 0)).contiguous(memory_format=torch.channels_last_3d)
        x = self.conv_in(x)
        for layer in self.encoder_layers if self.config.latent_norm else self.encoder_layers[:-1]:
            x = layer(x)
        return x

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized features, int64 tokens [B, t, h, w] (a last axis of codebooks for several), auxiliary loss."""
        return tuple(self.quantizers(self.features(video)))

    def decode(self, quantized: Tensor) -> Tensor:
        """Video of quantized features."""
        check_ndim("quantized", quantized, 5)
        x = quantized.contiguous(memory_format=torch.channels_last_3d)
        for layer in self.decoder_layers:
            x = layer(x)
        return self.conv_out(x)[:, :, self.config.factors[0] - 1 :]

    def decode_tokens(self, indices: Tensor) -> Tensor:
        """Video of tokens."""
        return self.decode(self.quantizers.indices_to_codes(indices))

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, tokens, auxiliary loss."""
        quantized, indices, loss = self.encode(video)
        return self.decode(quantized), indices, loss
