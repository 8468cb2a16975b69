# SPDX-License-Identifier: Apache-2.0
"""Goku (arXiv 2502.04896): full attention over packed images and videos, 3-D RoPE, full-width QK RMSNorm, one adaLN-Zero row
per sample, packed cross-attention to text states. Keys of the block are the released file's; what the paper leaves open is an
argument whose default docs/models.md states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vidkernels import ops
from vidkernels.errors import OptionError
from vidkernels.models.transformers._checked import (
    check_counts,
    check_labels,
    check_numbers,
    check_optional_counts,
    check_patch,
    check_width,
    configured,
)
from vidkernels.models.transformers._parts import Mlp, StepRows, TimestepEmbedder, split_heads, xavier, zero
from vidkernels.nn.adaln_zero import BatchedProjection
from vidkernels.ops._checks import check_floating, check_ndim, check_option, check_shape, check_size
from vidkernels.ops.varlen_attention import longest_segment

NORM_EPS = 1e-6
# name -> (layers, width, heads); the 1B pilot is class-conditional.
SIZES = {"goku-1b": (28, 1152, 16), "goku-2b": (28, 1792, 28), "goku-8b": (40, 3072, 48)}


@dataclass(frozen=True)
class GokuConfig:
    """Architecture of a Goku.

    Attributes:
        text_channels: width of the text states (FLAN-T5-XL: 2048); None leaves cross-attention out.
        num_classes: class-conditional instead; `num_classes` is the null label.
        patch_size: (t, h, w) of one token.
        axes: rotary dimensions of (t, h, w); None: (d/4, 3d/8, 3d/8) where these are even, else thirds.
        qk_norm: "full": over all heads together, as released; "head": per head.
        rotate_cross_query: the released block also rotates the query of the cross-attention.
        image_condition: tokens carry a second latent on the channels, merged by one Linear (image-to-video).
    """

    depth: int = 28
    hidden_size: int = 1792
    num_heads: int = 28
    in_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    mlp_ratio: float = 4.0
    text_channels: int | None = 2048
    num_classes: int | None = None
    axes: tuple[int, int, int] | None = None
    theta: float = 10000.0
    qk_norm: str = "full"
    rotate_cross_query: bool = True
    image_condition: bool = False

    def __post_init__(self) -> None:
        check_option("qk_norm", self.qk_norm, ("full", "head"))
        check_counts(self, "depth", "hidden_size", "num_heads", "in_channels")
        check_optional_counts(self, "text_channels", "num_classes")
        check_numbers(self, "mlp_ratio", "theta")
        check_patch(self.patch_size)
        check_width(self.hidden_size, self.num_heads, multiple=2, even_heads=True)
        axes = self.rotary_axes
        even = isinstance(axes, tuple) and all(isinstance(axis, int) and axis >= 0 and axis % 2 == 0 for axis in axes)
        if not even or len(axes) != 3 or sum(axes) > self.head_dim:
            raise OptionError("axes", f"three even numbers, together at most {self.head_dim}", self.axes)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_axes(self) -> tuple[int, int, int]:
        """Rotary dimensions of (t, h, w)."""
        if self.axes is not None:
            return self.axes
        width = self.head_dim
        if width % 16 == 0:
            return width // 4, 3 * width // 8, 3 * width // 8
        third = width // 6 * 2
        return width - 2 * third, third, third

    @property
    def token_channels(self) -> int:
        """Numbers in one token."""
        return self.in_channels * self.patch_size[0] * self.patch_size[1] * self.patch_size[2]


class _Norm(nn.Module):
    """The weight of an RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class _Attention(nn.Module):
    """Projections without bias and RMSNorm of q and k; keys `q_proj`, `k_proj`, `v_proj`, `o_proj`, `q_norm`, `k_norm`."""

    def __init__(self, config: GokuConfig, context_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.norm, self.axes, self.theta = (
            config.num_heads,
            config.qk_norm,
            config.rotary_axes,
            config.theta,
        )
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(context_width, width, bias=False)
        self.v_proj = nn.Linear(context_width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        normed = width if config.qk_norm == "full" else config.head_dim
        self.q_norm, self.k_norm = _Norm(normed), _Norm(normed)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q of x, k and v of the context: [N, A, d]."""
        q, k, v = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)

    def normalise(self, x: Tensor, weight: Tensor, positions: Tensor | None, other: Tensor | None = None) -> Any:
        """RMSNorm of x [N, A, d] by `weight`, rotated where positions are given."""
        axes = self.axes if positions is not None else None
        options: dict[str, Any] = {"axes": axes, "theta": self.theta, "norm": self.norm, "eps": NORM_EPS}
        return ops.qk_norm_rope(x, other, weight, None if other is None else self.k_norm.weight, positions, **options)


class _Modulation(nn.Module):
    """`linear`: from a time embedding to the shifts, scales and gates of a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)


class _FinalLayer(nn.Module):
    """Keys `adaLN_modulation.1`, `linear`."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, channels)


class GokuBlock(nn.Module):
    """x += gate * SelfAttn(mod(LN x)); x += CrossAttn(RMS x, text); x += gate * MLP(mod(RMS x)); rows per sample."""

    def __init__(self, config: GokuConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.rotate_cross_query = config.rotate_cross_query
        self.norm1 = _Modulation(width)
        self.attn1 = _Attention(config, width)
        if config.text_channels is not None:
            self.norm2 = _Norm(width)
            self.attn2 = _Attention(config, config.text_channels)
        self.norm3 = _Norm(width)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))

    def forward(
        self, x: Tensor, e: Tensor, pack: _Pack, text: _Text | None, rows: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """x [N, D]; e [B, D], the time embedding of each sample; rows: its projection, where all blocks' were made together."""
        projected = self.norm1.linear(F.silu(e)) if rows is None else rows()
        shift1, scale1, gate1, shift2, scale2, gate2 = _wide(projected).chunk(6, dim=-1)
        ends = pack.cu_seqlens
        rms: dict[str, Any] = {"norm": "rms", "eps": NORM_EPS, "cu_seqlens": ends}
        normed = ops.adaln_modulate(x, shift1, scale1, eps=NORM_EPS, cu_seqlens=ends)
        q, k, v = self.attn1.project(normed, normed)
        q, k = self.attn1.normalise(q, self.attn1.q_norm.weight, pack.positions, k)
        branch = self.attn1.o_proj(self.attend(q, k, v, pack).flatten(1))
        gate: Tensor | None = gate1
        if text is not None:
            x, normed = ops.adaln_zero(x, branch, gate, None, None, weight=self.norm2.weight, **rms)
            branch, gate = self._cross(normed, pack, text), None
        x, normed = ops.adaln_zero(x, branch, gate, shift2, scale2, weight=self.norm3.weight, **rms)
        return ops.gate_residual(x, self.mlp(normed), gate2, cu_seqlens=ends)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pack: _Pack) -> Tensor:
        """Self-attention of every sample, [N, A, d]; replaced where the tokens are spread over processes."""
        return ops.varlen_attention(q, k, v, pack.cu_seqlens, pack.cu_seqlens, pack.max_seqlen, pack.max_seqlen)

    def _cross(self, normed: Tensor, pack: _Pack, text: _Text) -> Tensor:
        q, k, v = self.attn2.project(normed, text.tokens)
        attention = self.attn2
        q, _ = attention.normalise(q, attention.q_norm.weight, pack.positions if self.rotate_cross_query else None)
        k, _ = attention.normalise(k, attention.k_norm.weight, None)
        mixed = ops.varlen_attention(q, k, v, pack.cu_seqlens, text.cu_seqlens, pack.max_seqlen, text.max_seqlen)
        return attention.o_proj(mixed.flatten(1))


@dataclass(frozen=True)
class _Pack:
    cu_seqlens: Tensor
    max_seqlen: int
    positions: Tensor


@dataclass(frozen=True)
class _Text:
    tokens: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def _wide(rows: Tensor) -> Tensor:
    """Modulation rows in float32, as the released block uses them; float64 stays."""
    return rows if rows.dtype == torch.float64 else rows.float()


def _keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """From 90 thousand tokens on attention is 81 to 95 % of the work and its output 1/20 of a block's activations."""
    keep = "attention" in str(op)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class Goku(nn.Module):
    """Goku, a diffusion transformer for images and videos, over a pack of any sizes; see `vidkernels.packing.pack`.

    `gradient_checkpointing`: False; True recomputes whole blocks in the backward pass; "selective" keeps what attention
    returned and recomputes the rest.
    """

    gradient_checkpointing: bool | str = False

    def __init__(self, config: GokuConfig) -> None:
        super().__init__()
        self.config = config
        self._projection: BatchedProjection | None = None
        width = config.hidden_size
        self.patch_embed = nn.Linear(config.token_channels, width)
        if config.image_condition:
            self.condition_proj = nn.Linear(2 * config.token_channels, config.token_channels)
        self.t_embedder = TimestepEmbedder(width)
        if config.num_classes is not None:
            self.y_embedder = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(GokuBlock(config) for _ in range(config.depth))
        self.final_layer = _FinalLayer(width, config.token_channels)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: str | dict[str, Any] | GokuConfig, **changes: Any) -> Goku:
        """By name (`"goku-1b"`, `"goku-2b"`, `"goku-8b"`) with changes, or from a config."""
        if isinstance(config, str):
            if config not in SIZES:
                raise OptionError("config", f"one of {', '.join(SIZES)} or a GokuConfig", repr(config))
            depth, width, heads = SIZES[config]
            made = GokuConfig(depth=depth, hidden_size=width, num_heads=heads)
            config = replace(made, text_channels=None, num_classes=1000) if config == "goku-1b" else made
        values = asdict(config) if isinstance(config, GokuConfig) else config
        return cls(configured(GokuConfig, values, **changes))

    def reset_parameters(self) -> None:
        """adaLN-Zero: modulation and the final layer start at zero, everything else Xavier."""
        xavier(self)
        for block in self.blocks:
            assert isinstance(block, GokuBlock)
            zero(block.norm1.linear)
        zero(self.final_layer.linear, self.final_layer.adaLN_modulation[1])

    def batch_modulation(self) -> None:
        """Project the time embedding for all blocks in one product per step, see `nn.BatchedProjection`: their layers' weights move
        into one storage. Call it after the weights are loaded, cast and moved; where they no longer lie there each block
        projects for itself."""
        layers = [block.get_submodule("norm1.linear") for block in self.blocks]
        self._projection = BatchedProjection(cast(list[nn.Linear], layers))

    def _recomputation(self) -> dict[str, Any]:
        check_option("gradient_checkpointing", self.gradient_checkpointing, (True, "selective"))
        if self.gradient_checkpointing is True:
            return {}
        return {"context_fn": partial(create_selective_checkpoint_contexts, _keep_attention)}

    def _check(
        self,
        tokens: Tensor,
        t: Tensor,
        cu_seqlens: Tensor,
        positions: Tensor,
        labels: Tensor | None,
        condition: Tensor | None,
    ) -> None:
        check_ndim("t", t, 1)
        config, samples = self.config, t.shape[0]
        check_floating("tokens", tokens)
        check_ndim("tokens", tokens, 2)
        check_size("tokens", tokens, 1, config.token_channels)
        check_shape("positions", positions, (tokens.shape[0], 3), "[N, 3]")
        check_shape("cu_seqlens", cu_seqlens, (samples + 1,), "[B + 1]")
        if config.image_condition != (condition is not None):
            wanted = "the first frame's tokens" if config.image_condition else "None"
            built = f"This model was built with image_condition={config.image_condition}."
            raise OptionError("condition", wanted, None if condition is None else tuple(condition.shape), built)
        if condition is not None:
            check_shape("condition", condition, tuple(tokens.shape), "that of tokens")
        if (config.num_classes is not None) != (labels is not None):
            wanted = (
                "None: no classes" if config.num_classes is None else f"[B]; {config.num_classes} is the null label"
            )
            raise OptionError("labels", wanted, None if labels is None else tuple(labels.shape))
        if labels is not None:
            check_labels("labels", labels, (samples,), self.y_embedder.num_embeddings)

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        positions: Tensor,
        *,
        text: Tensor | None = None,
        text_cu_seqlens: Tensor | None = None,
        text_max_seqlen: int | None = None,
        labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Velocity (data - noise) of every token, [N, token_channels].

        Args:
            tokens: patches of all samples, one behind the other, [N, token_channels].
            t: time of each sample [B], 0 noise to 1 data.
            cu_seqlens: int32 [B + 1], where each sample's tokens begin.
            max_seqlen: tokens of the longest sample.
            positions: (t, h, w) of each token, [N, 3].
            text: text states of all samples, [M, text_channels]; to a sample without any the cross-attention adds nothing.
            text_cu_seqlens, text_max_seqlen: as above, of the text.
            labels: [B], of a class-conditional model.
            condition: image-to-video: the clean first frame's tokens, repeated over time, [N, token_channels].
        """
        self._check(tokens, t, cu_seqlens, positions, labels, condition)
        longest_segment("max_seqlen", max_seqlen, cu_seqlens, tokens.shape[0])
        if condition is not None:
            tokens = self.condition_proj(torch.cat([tokens, condition], dim=-1))
        e = self.t_embedder(t.to(torch.promote_types(t.dtype, torch.float32)) * 1000)  # in bfloat16 steps of 4
        if labels is not None:
            e = e + self.y_embedder(labels)
        states = None
        if self.config.text_channels is not None:
            if text is None or text_cu_seqlens is None or text_max_seqlen is None:
                raise OptionError("text", "text, text_cu_seqlens and text_max_seqlen", None)
            check_shape("text", text, (text.shape[0], self.config.text_channels), "[M, text_channels]")
            check_shape("text_cu_seqlens", text_cu_seqlens, tuple(cu_seqlens.shape), "[B + 1], as cu_seqlens")
            longest_segment("text_max_seqlen", text_max_seqlen, text_cu_seqlens, text.shape[0])
            states = _Text(text, text_cu_seqlens, text_max_seqlen)
        elif text is not None:
            raise OptionError("text", "None: this model was built without text_channels", tuple(text.shape))
        pack = _Pack(cu_seqlens, max_seqlen, positions)
        x = self.patch_embed(tokens)
        step = None if self._projection is None else StepRows(self._projection, e)
        for index, block in enumerate(self.blocks):
            rows = None if step is None else partial(step.of, index)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, e, pack, states, rows, use_reentrant=False, **self._recomputation())
            else:
                x = block(x, e, pack, states, rows)
        shift, scale = _wide(self.final_layer.adaLN_modulation(e)).chunk(2, dim=-1)
        return self.final_layer.linear(ops.adaln_modulate(x, shift, scale, eps=NORM_EPS, cu_seqlens=cu_seqlens))
