# SPDX-License-Identifier: Apache-2.0
"""Latte (arXiv 2401.03048): the four variants of the paper, class-conditional, unconditional or CLIP-text, with joint
image-video training. Keys and shapes of Variant 1 are the official checkpoints'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.transformers._checked import (
    check_counts,
    check_dropout,
    check_labels,
    check_numbers,
    check_optional_counts,
    check_width,
    configured,
)
from vidkernels.models.transformers._latte_blocks import FinalLayer, LatteBlock, SerialBlock, TokenBlock
from vidkernels.models.transformers._parts import (
    PatchEmbed,
    StepRows,
    TimestepEmbedder,
    guide,
    sincos,
    sincos_2d,
    unpatchify,
    xavier,
    zero,
)
from vidkernels.nn.adaln_zero import BatchedProjection
from vidkernels.ops._checks import check_floating, check_ndim, check_option, check_size

# name -> (depth, hidden size, heads)
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCHES = (2, 4, 8)
CLIP_TEXT = 77 * 768


@dataclass(frozen=True)
class LatteConfig:
    """Architecture of a Latte.

    Attributes:
        input_size: latent height and width; square.
        num_frames: frames of a video.
        num_classes: None is unconditional; otherwise labels 0..num_classes-1, and num_classes is the null label.
        text: conditioned on flattened CLIP text states (77 x 768) instead of labels.
        learn_sigma: the output has twice the channels, the second half for the variance.
        variant: 1 interleaved, 2 late fusion, 3 spatial then temporal attention in a block, 4 heads split between them.
        conditioning: "s_adaln" (adaLN-Zero rows) or "all_tokens" (the condition is one more token of every sequence).
    """

    depth: int = 28
    hidden_size: int = 1152
    num_heads: int = 16
    patch_size: int = 2
    input_size: int = 32
    in_channels: int = 4
    num_frames: int = 16
    mlp_ratio: float = 4.0
    num_classes: int | None = None
    class_dropout_prob: float = 0.1
    text: bool = False
    learn_sigma: bool = True
    variant: int = 1
    conditioning: str = "s_adaln"

    def __post_init__(self) -> None:
        check_counts(self, "depth", "hidden_size", "num_heads", "patch_size", "input_size", "in_channels", "num_frames")
        check_optional_counts(self, "num_classes")
        check_numbers(self, "mlp_ratio")
        check_dropout(self, "class_dropout_prob")
        check_width(self.hidden_size, self.num_heads, multiple=4)
        check_option("variant", self.variant, (1, 2, 3, 4))
        check_option("conditioning", self.conditioning, ("s_adaln", "all_tokens"))
        if self.input_size % self.patch_size:
            raise OptionError("input_size", f"a multiple of patch_size={self.patch_size}", self.input_size)
        if self.variant == 4 and self.num_heads % 2:
            raise OptionError("num_heads", "an even number for variant 4", self.num_heads)
        if self.conditioning == "all_tokens" and self.variant not in (1, 2):
            raise OptionError("conditioning", "'s_adaln' for variants 3 and 4", repr(self.conditioning))

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @classmethod
    def named(cls, name: str) -> LatteConfig:
        """`Latte-S/2` to `Latte-XL/8`."""
        size, _, patch = name.removeprefix("Latte-").removeprefix("LatteIMG-").partition("/")
        if size not in SIZES or patch not in map(str, PATCHES):
            raise OptionError("name", "Latte-{S,B,L,XL}/{2,4,8}", repr(name))
        depth, hidden_size, heads = SIZES[size]
        return cls(depth=depth, hidden_size=hidden_size, num_heads=heads, patch_size=int(patch))


class LabelEmbedder(nn.Module):
    """Class table with one more row for the null label; labels are dropped to it in training."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def forward(self, labels: Tensor) -> Tensor:
        """labels [B, ...] -> [B, ..., D]; one coin a row."""
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
            labels = torch.where(dropped.reshape(-1, *[1] * (labels.ndim - 1)), self.num_classes, labels)
        return self.embedding_table(labels)


class Latte(nn.Module):
    """Latte, a video diffusion transformer (arXiv 2401.03048), over latents [B, F, C, H, W]; see `LatteConfig`."""

    gradient_checkpointing = False

    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.config = config
        self._projection: BatchedProjection | None = None
        width, grid = config.hidden_size, config.input_size // config.patch_size
        self.pos_embed = nn.Parameter(torch.empty(1, grid * grid, width), requires_grad=False)
        self.temp_embed = nn.Parameter(torch.empty(1, config.num_frames, width), requires_grad=False)
        self.x_embedder = PatchEmbed(nn.Conv2d(config.in_channels, width, config.patch_size, config.patch_size))
        self.t_embedder = TimestepEmbedder(width)
        if config.text:
            self.text_embedding_projection = nn.Sequential(nn.SiLU(), nn.Linear(CLIP_TEXT, width))
        elif config.num_classes is not None:
            self.y_embedder = LabelEmbedder(config.num_classes, width, config.class_dropout_prob)
        self.blocks = nn.ModuleList(self._block(index) for index in range(config.depth))
        self.final_layer = FinalLayer(width, config.patch_size, config.out_channels)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: str | dict[str, Any] | LatteConfig, **changes: Any) -> Latte:
        """By name (`"Latte-XL/2"`) with changes (`input_size=16, num_classes=101`), or from a config."""
        if isinstance(config, str):
            config = LatteConfig.named(config)
        values = asdict(config) if isinstance(config, LatteConfig) else config
        return cls(configured(LatteConfig, values, **changes))

    def _block(self, index: int) -> nn.Module:
        config = self.config
        size = (config.hidden_size, config.num_heads, config.mlp_ratio)
        if config.variant == 3:
            return SerialBlock(*size)
        if config.variant == 4:
            return LatteBlock(*size, axis="both")
        temporal = index % 2 if config.variant == 1 else index >= config.depth // 2
        block = TokenBlock if config.conditioning == "all_tokens" else LatteBlock
        return block(*size, axis="time" if temporal else "space")

    def reset_parameters(self) -> None:
        """The official initialisation: adaLN-Zero, frozen sin-cos tables."""
        xavier(self)
        grid = torch.arange(self.config.input_size // self.config.patch_size)
        width = self.config.hidden_size
        with torch.no_grad():
            self.pos_embed.copy_(sincos_2d(grid, grid, width)[None].to(self.pos_embed.device))
            self.temp_embed.copy_(sincos(torch.arange(self.config.num_frames), width)[None].to(self.temp_embed.device))
        proj = self.x_embedder.proj
        assert proj.bias is not None
        nn.init.xavier_uniform_(proj.weight.view(width, -1))
        nn.init.zeros_(proj.bias)
        for layer in self.t_embedder.linears:
            nn.init.normal_(layer.weight, std=0.02)
        if hasattr(self, "y_embedder"):
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, LatteBlock | SerialBlock | TokenBlock)
            block.zero_gates()
        zero(self.final_layer.linear, self.final_layer.adaLN_modulation[1])

    def batch_modulation(self) -> None:
        """Project the condition for all blocks in one product per step, see `nn.BatchedProjection`: their layers' weights move into
        one storage. Call it after the weights are loaded, cast and moved; where they no longer lie there each block projects
        for itself.

        Raises:
            OptionError: the model's blocks have no projections.
        """
        if self.config.conditioning == "all_tokens":
            raise OptionError("conditioning", "'s_adaln' to batch modulation", "'all_tokens'")
        layers = [block.get_submodule("adaLN_modulation.1") for block in self.blocks]
        self._projection = BatchedProjection(cast(list[nn.Linear], layers))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        text_embedding: Tensor | None = None,
        use_image_num: int = 0,
        y_image: Sequence[Tensor] | Tensor | None = None,
    ) -> Tensor:
        """Prediction [B, F, out_channels, H, W].

        Args:
            x: latents [B, F, C, H, W]; with `use_image_num` the last I of the F + I frames are independent images.
            t: diffusion steps [B], 0..999.
            y: labels [B] of a class-conditional model; `num_classes` is the null label.
            text_embedding: [B, 77, 768] or flattened, of a text model.
            use_image_num: I. Images skip the temporal attention.
            y_image: labels of the images [B, I].
        """
        frames = self._check(x, t, y, use_image_num)
        batch, total = x.shape[:2]
        time = self.t_embedder(t)
        condition, final = self._conditions(time, y, text_embedding, total, use_image_num, y_image)
        tokens = self._embed(x)  # [B, F + I, S, D]
        tokens = self._run(tokens, condition, frames)
        output = self.final_layer(tokens.flatten(1, 2), final)  # [B, (F + I) * S, p*p*C]
        grid, patch = self.config.input_size // self.config.patch_size, self.config.patch_size
        output = unpatchify(
            output.reshape(batch * total, grid * grid, -1), (1, grid, grid), (1, patch, patch), self.config.out_channels
        )
        return output.reshape(batch, total, *output.shape[1:2], *output.shape[3:])

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, cfg_scale: float = 1.0, **options: Any
    ) -> Tensor:
        """Guided prediction: the first half of x stands for both halves, labels are [cond, null].

        The noise channels are guided in both halves; the variance channels are each half's own, as in the official code.
        """
        if len(x) % 2:
            raise ShapeError("x", "an even batch, the conditional half and the null half", tuple(x.shape))
        half = x[: len(x) // 2]
        output = self.forward(torch.cat([half, half]), t, y, **options)
        return guide(output, cfg_scale, self.config.in_channels, dim=2)

    def _check(self, x: Tensor, t: Tensor, y: Tensor | None, images: int) -> int:
        config = self.config
        check_floating("x", x)
        check_ndim("x", x, 5)
        if images < 0:
            raise OptionError("use_image_num", "at least 0 images", images)
        frames = x.shape[1] - images
        expected = (x.shape[0], config.num_frames + images, config.in_channels, config.input_size, config.input_size)
        if tuple(x.shape) != expected:
            raise ShapeError(
                "x", f"[B, F, C, H, W] = {expected}", tuple(x.shape), "The position tables fix frames and size."
            )
        check_ndim("t", t, 1)
        check_size("t", t, 0, x.shape[0])
        if config.num_classes is not None and y is None:
            raise OptionError(
                "y", "labels [B] of a class-conditional model", None, f"Use {config.num_classes} for the null label."
            )
        if config.num_classes is not None and y is not None:
            check_labels("y", y, (x.shape[0],), self.y_embedder.embedding_table.num_embeddings)
        return frames

    def _conditions(
        self, time: Tensor, y: Tensor | None, text: Tensor | None, total: int, images: int, y_image: Any
    ) -> tuple[Tensor, Tensor]:
        """Condition of the blocks and of the final layer: [B, D], or [B, F + I, D] where images have their own labels."""
        if self.config.text:
            if text is None:
                raise OptionError("text_embedding", "[B, 77, 768]", None)
            flat, expected = text.flatten(1), (time.shape[0], CLIP_TEXT)
            if tuple(flat.shape) != expected:
                raise ShapeError("text_embedding", f"[B, 77, 768], flattened {expected}", tuple(text.shape))
            return time + self.text_embedding_projection(flat.to(time.dtype)), time
        if self.config.num_classes is None:
            return time, time
        video = time + self.y_embedder(y)
        if not images:
            return video, video
        if y_image is None:
            raise OptionError("y_image", f"labels [B, {images}] of the images", None)
        labels = y_image if isinstance(y_image, Tensor) else torch.stack(list(y_image))
        check_labels("y_image", labels, (len(time), images), self.y_embedder.embedding_table.num_embeddings)
        rows = torch.cat(
            [video[:, None].expand(-1, total - images, -1), time[:, None] + self.y_embedder(labels)], dim=1
        )
        return rows, rows

    def _embed(self, x: Tensor) -> Tensor:
        tokens = self.x_embedder.proj(x.flatten(0, 1)).flatten(2).transpose(1, 2)
        # Under autocast the tokens are bfloat16 and the table is not: the residual stream keeps one dtype.
        return (tokens + self.pos_embed.to(tokens.dtype)).unflatten(0, x.shape[:2])

    def _call(self, block: nn.Module, *args: Any) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _run(self, tokens: Tensor, condition: Tensor, frames: int) -> Tensor:
        """Blocks over [B, F + I, S, D]; the images are set aside in temporal blocks, and in the temporal part of others."""
        images = tokens.shape[1] > frames
        video_condition = condition if condition.ndim == 2 else condition[:, 0]
        step = None if self._projection is None else StepRows(self._projection, condition)
        added = False
        for index, block in enumerate(self.blocks):
            temporal = getattr(block, "axis", "both") == "time"
            if not added and (temporal or self.config.variant in (3, 4)):
                video = tokens[:, :frames] + self.temp_embed[:, :, None].to(tokens.dtype)
                tokens = torch.cat([video, tokens[:, frames:]], 1) if images else video
                added = True
            rows = None if step is None else partial(step.of, index, temporal and condition.ndim == 3)
            own = video_condition if temporal else condition
            if temporal and images:
                video = self._call(block, tokens[:, :frames], own, None, rows)
                tokens = torch.cat([video, tokens[:, frames:]], 1)
            else:
                tokens = self._call(block, tokens, own, frames if images else None, rows)
        return tokens
