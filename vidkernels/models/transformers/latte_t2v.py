# SPDX-License-Identifier: Apache-2.0
"""LatteT2V, the text-to-video Latte: keys and argument names of diffusers' `LatteTransformer3DModel`, also those of the
official text model (which has one more buffer that it never reads). Source: arXiv 2401.03048 and both codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidkernels import ops
from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.transformers._checked import check_counts, check_mapping, check_width
from vidkernels.models.transformers._latte_blocks import NORM_EPS
from vidkernels.models.transformers._parts import (
    PatchEmbed,
    activated,
    attend,
    sincos,
    sincos_2d,
    split_heads,
    timestep_features,
    unpatchify,
)
from vidkernels.ops._checks import check_floating, check_ndim, check_shape, check_size

UNUSED_OFFICIAL_KEY = "caption_projection.y_embedding"


@dataclass(frozen=True)
class LatteT2VConfig:
    """Configuration of a `LatteT2V` by diffusers' keys; the defaults are Latte-1."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int = 8
    num_layers: int = 28
    cross_attention_dim: int = 1152
    attention_bias: bool = True
    sample_size: int = 64
    patch_size: int = 2
    caption_channels: int = 4096
    video_length: int = 16

    def __post_init__(self) -> None:
        check_counts(
            self, "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "sample_size",
            "patch_size", "caption_channels", "video_length",
        )  # fmt: skip
        width = self.num_attention_heads * self.attention_head_dim
        check_width(width, self.num_attention_heads, multiple=4, name="num_attention_heads * attention_head_dim")
        if self.cross_attention_dim != width:
            expected = f"num_attention_heads * attention_head_dim = {width}, the width of the projected caption"
            raise OptionError("cross_attention_dim", expected, self.cross_attention_dim)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatteT2VConfig:
        """From a diffusers config; keys with one supported value are checked, underscored keys ignored."""
        check_mapping(cls, values)
        fixed = {
            "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6,
            "num_embeds_ada_norm": 1000, "dropout": 0.0,
        }  # fmt: skip
        names = {field.name for field in fields(cls)}
        for key, value in values.items():
            if key in fixed and value not in (fixed[key], None):
                raise OptionError(key, repr(fixed[key]), repr(value), "Latte has been trained with no other value.")
            if key not in names and key not in fixed and not key.startswith("_"):
                raise OptionError("config", f"keys among {sorted(names | set(fixed))}", repr(key))
        return cls(**{key: values[key] for key in names if values.get(key) is not None})


class _Attention(nn.Module):
    """Projections of one attention under diffusers' names; `to_k` and `to_v` read the caption in cross-attention."""

    def __init__(self, width: int, heads: int, head_dim: int, context_width: int, bias: bool) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(width, inner, bias=bias)
        self.to_k = nn.Linear(context_width, inner, bias=bias)
        self.to_v = nn.Linear(context_width, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q of x, k and v of the context, each [..., A, d]."""
        parts = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (split_heads(part, self.heads) for part in parts)
        return q, k, v


class _Projection(nn.Module):
    """A Linear under the name `proj`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features)


class _FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear under diffusers' names `net.0.proj` and `net.2`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Projection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.net[2](activated(cast(_Projection, self.net[0]).proj, x))


class _Block(nn.Module):
    """Self-attention over one axis, cross-attention in spatial blocks, MLP; the two gated branches are modulated."""

    def __init__(self, config: LatteT2VConfig, axis: str) -> None:
        super().__init__()
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        width = heads * head_dim
        self.axis = axis
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn1 = _Attention(width, heads, head_dim, width, config.attention_bias)
        if axis == "space":
            self.attn2 = _Attention(width, heads, head_dim, config.cross_attention_dim, config.attention_bias)
        self.ff = _FeedForward(width)

    def forward(self, x: Tensor, six: Tensor, caption: Tensor | None, bias: Tensor | None) -> Tensor:
        """x [B, F, S, D]; six [B, 6D]; caption [B, L, D] or [B, F, L, D]; bias [B, F, 1, L] or None."""
        rows = self.scale_shift_table + six.unflatten(-1, (6, -1))  # [B, 6, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(1)
        grid, tokens = x.shape[1:3], x.flatten(1, 2)
        normed = ops.adaln_modulate(tokens, shift1, scale1, eps=NORM_EPS).unflatten(1, grid)
        branch = self.attn1.to_out[0](attend(*self.attn1.project(normed, normed), self.axis)).flatten(1, 2)
        if self.axis == "time":
            tokens, normed = ops.adaln_zero(tokens, branch, gate1, shift2, scale2, eps=NORM_EPS)
        else:
            assert caption is not None
            tokens = ops.gate_residual(tokens, branch, gate1)
            cross = self._cross(tokens.unflatten(1, grid), caption, bias).flatten(1, 2)
            tokens, normed = ops.adaln_zero(tokens, cross, None, shift2, scale2, eps=NORM_EPS)
        return ops.gate_residual(tokens, self.ff(normed), gate2).unflatten(1, grid)

    def _cross(self, x: Tensor, caption: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = self.attn2.project(x, caption)  # q [B, F, S, A, d]
        if bias is None and k.ndim == 4:
            q, k, v = (part.transpose(1, 2) for part in (q.flatten(1, 2), k, v))
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, x.shape[1:3])
        else:
            k, v = (part[:, None] if part.ndim == 4 else part for part in (k, v))  # [B, 1 or F, L, A, d]
            q, k, v = (part.transpose(2, 3) for part in (q, k, v))
            mask = None if bias is None else bias[:, :, None].to(q.dtype)
            k, v = (part.expand(-1, q.shape[1], -1, -1, -1) for part in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(2, 3)
        return self.attn2.to_out[0](mixed.flatten(-2))


def _per_frame(x: Tensor, frames: int) -> Tensor:
    """[B, 1 + I, ...], a video's and its images' -> [B, F + I, ...]."""
    return torch.cat([x[:, :1].expand(-1, frames, *x.shape[2:]), x[:, 1:]], dim=1)


class _Embedder(nn.Module):
    """Linear, activation, Linear under the names `linear_1` and `linear_2`."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, width)
        self.linear_2 = nn.Linear(width, width)


class _TimeEmbedding(nn.Module):
    """An `_Embedder` under the name `timestep_embedder`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = _Embedder(256, width)


class _TimeRows(nn.Module):
    """From sinusoid features to the six modulation rows of all blocks; keys `emb.timestep_embedder`, `linear`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = _TimeEmbedding(width)
        self.linear = nn.Linear(width, 6 * width)


class LatteT2V(nn.Module):
    """Latte-1, the text-to-video Latte of diffusers, over latents [B, C, F, H, W] and caption states [B, L, 4096]."""

    gradient_checkpointing = False

    def __init__(self, config: LatteT2VConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_attention_heads * config.attention_head_dim
        patch = config.patch_size
        self.pos_embed = PatchEmbed(nn.Conv2d(config.in_channels, width, patch, patch))
        self.transformer_blocks = nn.ModuleList(_Block(config, "space") for _ in range(config.num_layers))
        self.temporal_transformer_blocks = nn.ModuleList(_Block(config, "time") for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch * patch * config.out_channels)
        self.adaln_single = _TimeRows(width)
        self.caption_projection = _Embedder(config.caption_channels, width)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | LatteT2VConfig) -> LatteT2V:
        """From diffusers' configuration keys."""
        return cls(config if isinstance(config, LatteT2VConfig) else LatteT2VConfig.from_dict(config))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Also accepts the official text model's file, whose `caption_projection.y_embedding` nothing reads."""
        state_dict = {key: value for key, value in state_dict.items() if key != UNUSED_OFFICIAL_KEY}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
        use_image_num: int = 0,
    ) -> Tensor:
        """Prediction [B, out_channels, F, H, W].

        Args:
            hidden_states: latents [B, C, F, H, W]; with `use_image_num` the last I of the F + I frames are independent images.
            timestep: [B].
            encoder_hidden_states: caption [B, L, caption_channels]; with images [B, 1 + I, L, caption_channels], the video's first.
            encoder_attention_mask: [B, L], 1 keeps and 0 hides (a -10000 bias, as the official code), or a bias [B*F, 1, L]; with
                images [B, 1 + I, L] of 1 and 0.
            enable_temporal_attentions: False skips the whole temporal blocks.
            use_image_num: I. Images skip the temporal blocks.
        """
        grid = self._check(hidden_states, timestep, encoder_hidden_states, use_image_num)
        batch, frames = hidden_states.shape[0], hidden_states.shape[2] - use_image_num
        tokens = self._embed(hidden_states, grid)
        features = timestep_features(timestep.expand(batch)).to(tokens.dtype)
        embedder = self.adaln_single.emb.timestep_embedder
        time = embedder.linear_2(F.silu(embedder.linear_1(features)))  # [B, D]
        six = self.adaln_single.linear(F.silu(time))
        project = self.caption_projection
        caption = project.linear_2(F.gelu(project.linear_1(encoder_hidden_states), approximate="tanh"))
        bias = self._bias(encoder_attention_mask, batch, frames, use_image_num, caption.shape[-2])
        if use_image_num:
            caption = _per_frame(caption, frames)
        for index, (space, temporal) in enumerate(
            zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        ):
            tokens = self._call(space, tokens, six, caption, bias)
            if enable_temporal_attentions:
                video = tokens[:, :frames] if use_image_num else tokens
                if index == 0 and frames > 1:
                    table = sincos(torch.arange(frames, device=tokens.device), tokens.shape[-1])
                    video = video + table.to(tokens.dtype)[:, None]
                video = self._call(temporal, video, six, None, None)
                tokens = torch.cat([video, tokens[:, frames:]], 1) if use_image_num else video
        shift, scale = (self.scale_shift_table + time[:, None]).unbind(1)
        output = self.proj_out(ops.adaln_modulate(tokens.flatten(1, 2), shift, scale, eps=NORM_EPS))
        patch = self.config.patch_size
        return unpatchify(output, (frames + use_image_num, *grid), (1, patch, patch), self.config.out_channels)

    def _check(self, x: Tensor, timestep: Tensor, caption: Tensor, images: int) -> tuple[int, int]:
        if images < 0:
            raise OptionError("use_image_num", "at least 0 images", images)
        if not isinstance(timestep, Tensor) or timestep.shape not in ((), (1,), x.shape[:1]):
            found = tuple(timestep.shape) if isinstance(timestep, Tensor) else timestep
            raise ShapeError("timestep", f"a tensor [B] = [{x.shape[0]}], [1] or a scalar one", found)
        check_floating("hidden_states", x)
        check_ndim("hidden_states", x, 5)
        check_size("hidden_states", x, 1, self.config.in_channels)
        check_ndim("encoder_hidden_states", caption, 4 if images else 3)
        check_size("encoder_hidden_states", caption, 0, x.shape[0])
        check_size("encoder_hidden_states", caption, caption.ndim - 1, self.config.caption_channels)
        if images:
            check_size("encoder_hidden_states", caption, 1, 1 + images)
        patch = self.config.patch_size
        if x.shape[2] - images not in (1, self.config.video_length) or x.shape[3] % patch or x.shape[4] % patch:
            frames = f"1 or {self.config.video_length} frames" + (f" and {images} images" if images else "")
            expected = f"{frames}, height and width multiples of {patch}"
            raise ShapeError("hidden_states", expected, tuple(x.shape), "The temporal table has video_length rows.")
        return x.shape[3] // patch, x.shape[4] // patch

    def _embed(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, C, F, H, W] -> tokens [B, F, S, D] with the 2-D table, stretched to the trained extent at other sizes."""
        frames = x.transpose(1, 2)
        tokens = self.pos_embed.proj(frames.flatten(0, 1)).flatten(2).transpose(1, 2)
        base = self.config.sample_size // self.config.patch_size
        interpolation = max(self.config.sample_size // 64, 1)
        rows, columns = (
            torch.arange(n, dtype=torch.float64, device=x.device) * (base / n) / interpolation for n in grid
        )
        table = sincos_2d(rows, columns, tokens.shape[-1]).to(tokens.dtype)
        return (tokens + table).unflatten(0, frames.shape[:2])

    @staticmethod
    def _bias(mask: Tensor | None, batch: int, frames: int, images: int, length: int) -> Tensor | None:
        """Additive bias [B, 1 or F + I, 1, L] of a caption mask."""
        if mask is None:
            return None
        check_size("encoder_attention_mask", mask, mask.ndim - 1, length)
        if images:
            check_ndim("encoder_attention_mask", mask, 3)
            check_size("encoder_attention_mask", mask, 0, batch)
            check_size("encoder_attention_mask", mask, 1, 1 + images)
            return _per_frame((1 - mask.float()) * -10000.0, frames)[:, :, None]
        if mask.ndim == 2:
            check_size("encoder_attention_mask", mask, 0, batch)
            return ((1 - mask.float()) * -10000.0)[:, None, None]
        check_ndim("encoder_attention_mask", mask, 3)
        check_shape("encoder_attention_mask", mask, (batch * frames, 1, length), "a bias [B * F, 1, L]")
        return mask.unflatten(0, (batch, frames))

    def _call(self, block: nn.Module, *args: Any) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)
