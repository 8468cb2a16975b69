# SPDX-License-Identifier: Apache-2.0
"""STDiT3, the transformer of Open-Sora 1.2: keys as published, conditioning frames and their quirks reproduced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.transformers._checked import (
    check_counts,
    check_dropout,
    check_mapping,
    check_numbers,
    check_patch,
    check_width,
    configured,
)
from vidkernels.models.transformers._parts import Mlp, PatchEmbed, TimestepEmbedder, sincos_2d, unpatchify, xavier
from vidkernels.models.transformers._stdit3_blocks import Rows, STDiT3Block, STDiT3FinalLayer
from vidkernels.ops._checks import check_floating, check_ndim, check_shape, check_size

# Keys of the published configuration that do not change what is computed, and those that have one value.
NOT_READ = (
    "architectures", "auto_map", "dtype", "enable_flash_attn", "enable_layernorm_kernel", "enable_sequence_parallelism",
    "freeze_y_embedder", "input_size", "model_type", "only_train_temporal", "torch_dtype", "transformers_version",
)  # fmt: skip
PUBLISHED_VALUES = {"drop_path": 0.0, "skip_y_embedder": False}
NAMED = {"STDiT3-XL/2": (28, 1152, 16), "STDiT3-3B/2": (28, 1872, 26)}


@dataclass(frozen=True)
class STDiT3Config:
    """Configuration of an `STDiT3` by its published keys; the defaults are STDiT3-XL/2."""

    depth: int = 28
    hidden_size: int = 1152
    num_heads: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 4
    caption_channels: int = 4096
    model_max_length: int = 300
    input_sq_size: int = 512
    mlp_ratio: float = 4.0
    pred_sigma: bool = True
    qk_norm: bool = True
    class_dropout_prob: float = 0.1

    def __post_init__(self) -> None:
        check_counts(self, "depth", "hidden_size", "num_heads", "in_channels", "caption_channels", "model_max_length")
        check_patch(self.patch_size)
        check_numbers(self, "mlp_ratio", "input_sq_size")
        check_dropout(self, "class_dropout_prob")
        check_width(self.hidden_size, self.num_heads, multiple=4, even_heads=True)

    @property
    def out_channels(self) -> int:
        """Channels of the prediction; Open-Sora reads the first `in_channels`."""
        return self.in_channels * (2 if self.pred_sigma else 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> STDiT3Config:
        """From the published configuration: keys that decide how it is run are not read, unknown ones are refused."""
        check_mapping(cls, values)
        for key, value in PUBLISHED_VALUES.items():
            if values.get(key, value) != value:
                raise OptionError(key, repr(value), repr(values[key]), "Published checkpoints have no other value.")
        skipped = {*PUBLISHED_VALUES, *NOT_READ}
        return configured(cls, {k: v for k, v in values.items() if k not in skipped and not k.startswith("_")})


class _CaptionEmbedder(nn.Module):
    """`y_proj.fc1`, `y_proj.fc2`, and `y_embedding`, the caption that stands for none, before the projection."""

    y_embedding: Tensor

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.y_proj = Mlp(config.caption_channels, config.hidden_size, config.hidden_size)
        null = torch.randn(config.model_max_length, config.caption_channels) / config.caption_channels**0.5
        self.register_buffer("y_embedding", null)
        self.dropout_prob = config.class_dropout_prob

    def forward(self, y: Tensor) -> Tensor:
        """y [B, 1, L, C] -> [B, L, D]; in training, captions are replaced by the null caption."""
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
            y = torch.where(dropped[:, None, None, None], self.y_embedding[: y.shape[2]].to(y.dtype), y)
        return self.y_proj(y.squeeze(1))


class _Rope(nn.Module):
    """`freqs`, persistent as in the checkpoint; in bfloat16 models they are rounded to bfloat16, as trained."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        self.freqs = nn.Parameter(frequencies, requires_grad=False)


class STDiT3(nn.Module):
    """STDiT3, Open-Sora 1.2's video diffusion transformer, over latents [B, C, T, H, W] and caption states [B, 1, L, 4096]."""

    gradient_checkpointing = False

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.config = config
        width, head_dim = config.hidden_size, config.hidden_size // config.num_heads
        self.rope = _Rope(head_dim)
        self.x_embedder = PatchEmbed(nn.Conv3d(config.in_channels, width, config.patch_size, config.patch_size))
        self.t_embedder = TimestepEmbedder(width)
        self.fps_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = _CaptionEmbedder(config)
        self.spatial_blocks = nn.ModuleList(STDiT3Block(config, temporal=False) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(config, temporal=True) for _ in range(config.depth))
        self.final_layer = STDiT3FinalLayer(width, config.patch_size, config.out_channels)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: str | Mapping[str, Any] | STDiT3Config) -> STDiT3:
        """By name (`"STDiT3-XL/2"`), or from the published configuration keys."""
        if isinstance(config, str):
            if config not in NAMED:
                raise OptionError("config", f"one of {', '.join(NAMED)} or a dict", repr(config))
            depth, width, heads = NAMED[config]
            config = STDiT3Config(depth=depth, hidden_size=width, num_heads=heads)
        return cls(config if isinstance(config, STDiT3Config) else STDiT3Config.from_dict(config))

    def reset_parameters(self) -> None:
        """Xavier; the temporal blocks start as the identity."""
        xavier(self)
        first, last = self.fps_embedder.linears
        nn.init.normal_(first.weight, std=0.02)
        nn.init.zeros_(last.weight)
        for block in self.temporal_blocks:
            assert isinstance(block, STDiT3Block)
            for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        """Prediction [B, out_channels, T, H, W] in float32.

        Args:
            x: latents [B, C, T, H, W].
            timestep: [B] in 0..1000; a bfloat16 model rounds it to bfloat16, as trained.
            y: captions [B, 1, L, caption_channels].
            mask: [B, L] or fewer rows, 0 hides a caption token; fewer rows are tiled over the batch, as in the official code.
            x_mask: [B, T] bool, False marks clean conditioning frames (time 0).
            fps, height, width: [B] or [1]; pixels. The first entry's size sets the position scale.
            ignored: `num_frames` and `ar`, which the official model takes and does not read.
        """
        fps, height, width = self._check(x, timestep, y, fps, height, width)
        self._check_masks(x, y, mask, x_mask)
        dtype = self.x_embedder.proj.weight.dtype
        batch, _, frames, rows, columns = x.shape
        patch = self.config.patch_size
        x = F.pad(x.to(dtype), (0, -columns % patch[2], 0, -rows % patch[1], 0, -frames % patch[0]))
        grid = (x.shape[2] // patch[0], x.shape[3] // patch[1], x.shape[4] // patch[2])
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2).unflatten(1, (grid[0], -1))  # [B, T, S, D]
        tokens = tokens + self._positions(grid, height, width, tokens)
        fps_rows = self.fps_embedder(fps.expand(batch)).to(dtype)
        timestep = timestep.to(dtype)
        noisy, clean = self._rows(timestep, fps_rows), None
        if x_mask is not None:
            clean = self._rows(torch.zeros_like(timestep), fps_rows)
        captions = self._captions(y, mask, dtype, tokens.shape[1] * tokens.shape[2])
        selector = None if x_mask is None else (~x_mask.bool()).int()
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            for block in (spatial, temporal):
                tokens = self._call(
                    block, tokens, captions, noisy[1], None if clean is None else clean[1], selector, self.rope.freqs
                )
        output = self.final_layer(tokens, noisy[0], None if clean is None else clean[0], selector)
        output = unpatchify(output.flatten(1, 2), grid, patch, self.config.out_channels)
        return output[:, :, :frames, :rows, :columns].float()

    def _check(self, x: Tensor, timestep: Tensor, y: Tensor, *sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns fps, height and width, which must be there."""
        check_floating("x", x)
        check_ndim("x", x, 5)
        check_size("x", x, 1, self.config.in_channels)
        if not x.numel():
            raise ShapeError("x", "[B, C, T, H, W] with something in it", tuple(x.shape))
        check_shape("timestep", timestep, (x.shape[0],), "[B]")
        check_ndim("y", y, 4)
        check_shape("y", y, (x.shape[0], 1, y.shape[2], self.config.caption_channels), "[B, 1, L, caption_channels]")
        found = []
        for name, value in zip(("fps", "height", "width"), sizes, strict=True):
            if not isinstance(value, Tensor):
                raise OptionError(
                    name, "a tensor [B] or [1]", value, "Frames per second and pixel size condition the model."
                )
            if value.ndim != 1 or value.shape[0] not in (1, x.shape[0]):
                raise ShapeError(name, f"[1] or [B] = [{x.shape[0]}]", tuple(value.shape))
            found.append(value)
        return found[0], found[1], found[2]

    def _check_masks(self, x: Tensor, y: Tensor, mask: Tensor | None, x_mask: Tensor | None) -> None:
        batch, length = y.shape[0], y.shape[2]
        rows = 1 if mask is None or mask.ndim != 2 else mask.shape[0]
        if mask is not None and (mask.ndim != 2 or mask.shape[1] != length or not rows or batch % rows):
            raise ShapeError("mask", f"[B or a divisor of it, L] = [{batch}, {length}]", tuple(mask.shape))
        if x_mask is not None:
            check_shape("x_mask", x_mask, (batch, -(-x.shape[2] // self.config.patch_size[0])), "[B, T]")

    def _positions(self, grid: tuple[int, ...], height: Tensor, width: Tensor, like: Tensor) -> Tensor:
        """[S, D] table; positions are scaled by the pixel area against `input_sq_size`, entry 0 of the batch."""
        _, rows, columns = grid
        base = round((rows * columns) ** 0.5)
        scale = (height.reshape(-1)[0].double() * width.reshape(-1)[0].double()).sqrt() / self.config.input_sq_size
        row = torch.arange(rows, device=like.device) / scale.to(like.device) * (base / rows)
        column = torch.arange(columns, device=like.device) / scale.to(like.device) * (base / columns)
        return sincos_2d(row, column, like.shape[-1]).to(like.dtype)

    def _rows(self, timestep: Tensor, fps: Tensor) -> tuple[Tensor, Tensor]:
        """e [B, D] and the six shared modulation rows [B, 6, D]."""
        e = self.t_embedder(timestep) + fps
        return e, self.t_block(e).unflatten(-1, (6, -1))

    def _captions(self, y: Tensor, mask: Tensor | None, dtype: torch.dtype, count: int) -> Rows:
        """Caption tokens of the batch in one sequence, for samples of `count` video tokens."""
        states = self.y_embedder(y.to(dtype))
        batch, length, width = states.shape
        steps = torch.arange(batch + 1, dtype=torch.int32, device=y.device)
        if mask is None:
            return Rows(states.reshape(-1, width), steps * length, length, steps * count)
        if mask.shape[0] != batch:
            mask = mask.repeat(batch // mask.shape[0], 1)
        keep = mask.bool()
        lengths = keep.sum(1, dtype=torch.int32)
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            return Rows(states[keep], F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), length, steps * count)
        # How many tokens are kept is known to the device alone. Waiting for it would cost every step its head start: hidden
        # tokens stay, behind the others of their sample, as a caption that no video token reads.
        order = (~keep).int().argsort(dim=1, stable=True)
        tokens = states.gather(1, order[:, :, None].expand_as(states)).reshape(-1, width)
        begins, reads = steps[:-1] * length, steps[:-1] * count
        offsets = F.pad(torch.stack([begins + lengths, begins + length], 1).flatten(), (1, 0))
        return Rows(tokens, offsets, length, F.pad(torch.stack([reads + count, reads + count], 1).flatten(), (1, 0)))

    def _call(self, block: nn.Module, *args: Any) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)
