# SPDX-License-Identifier: Apache-2.0
"""adaLN-single transformer blocks of diffusers (Latte, PixArt) on `ops.adaln_*`.

Tokens of a video stay [B, F, S, D] through spatial and temporal blocks alike. A modulation is one row per sample: the
original repeats it for every frame, and for every token in temporal blocks. Projections are called as modules, so LoRA,
quantized weights and hooks on them are honoured; what is bypassed (norms, the attention's own forward) is guarded.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import child_reason, parameter_of

_ATTENTION = "diffusers.models.attention_processor"


def block_reason(block: Any, cls: type) -> str | None:
    """Why the forward of a block has to be called instead of rebuilt from its parts."""
    parts = block._modules
    reason = child_reason(block, cls)
    reason = reason or child_reason(parts["norm1"], nn.LayerNorm) or child_reason(parts["norm2"], nn.LayerNorm)
    return reason or unusual(block)


def unusual(block: Any) -> str | None:
    """An option of a block that the fused chain does not serve."""
    if block.norm_type != "ada_norm_single":
        return f"norm_type {block.norm_type} is not ada_norm_single"
    if block.pos_embed is not None or block.only_cross_attention:
        return "the block has positional embeddings or cross attention only"
    if block._chunk_size is not None:
        return "its feed-forward is chunked"
    return None


def attention_reason(attention: Any, processor: type | None = None) -> str | None:
    """Why the projections of an attention must not be used without its own forward; `processor`: `AttnProcessor2_0`."""
    home: Any = sys.modules[_ATTENTION]
    reason = child_reason(attention, home.Attention)
    if reason is None and type(attention.processor) is not (processor or home.AttnProcessor2_0):
        reason = f"an attention uses {type(attention.processor).__name__}"
    extras = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross")
    if reason is None and any(getattr(attention, name, None) is not None for name in extras):
        reason = "an attention has norms of its own"
    if reason is None and (attention.residual_connection or attention.rescale_output_factor != 1):
        reason = "an attention rescales or adds its input"
    return reason


def rows_of(table: Tensor, timestep: Tensor, count: int) -> tuple[Tensor, ...]:
    """`table [count, D] + timestep [B, count * D]`, as `count` rows of modulation [B, D]."""
    return (table[None] + timestep.reshape(timestep.shape[0], count, -1)).unbind(1)


def _heads(x: Tensor, attention: Any) -> Tensor:
    return x.unflatten(-1, (attention.heads, -1))


def _project_out(attention: Any, mixed: Tensor) -> Tensor:
    project, dropout, *_ = attention.to_out  # an index of a ModuleList takes 2 us
    result: Tensor = dropout(project(mixed))
    return result


def attend_in_frames(attention: Any, x: Tensor) -> Tensor:
    """Self-attention of sequences [N, S, D], without the call of diffusers that looks up its processor's signature (0.1 ms)."""
    q, k, v = (
        _heads(project(x), attention).transpose(1, 2) for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    return _project_out(attention, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def attend_over_time(attention: Any, x: Tensor, backend: str) -> Tensor:
    """Self-attention of every position over the frames, [B, F, S, D]: tokens stay where they are."""
    q, k, v = (_heads(project(x), attention) for project in (attention.to_q, attention.to_k, attention.to_v))
    return _project_out(attention, ops.axial_attention(q, k, v, 1, backend=backend).flatten(3))


def attend_to_caption(attention: Any, x: Tensor, caption: Tensor) -> Tensor:
    """Cross-attention of all tokens of a video to its caption, [B, N, D]: keys and values once per sample, where the
    original projects them for every frame."""
    q = _heads(attention.to_q(x), attention).transpose(1, 2)
    k = _heads(attention.to_k(caption), attention).transpose(1, 2)
    v = _heads(attention.to_v(caption), attention).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return _project_out(attention, mixed)


def feed_forward(ff: Any, x: Tensor) -> Tensor:
    """The block's MLP; without gradients the activation overwrites its input, the widest tensor of the block."""
    activations: Any = sys.modules["diffusers.models.activations"]
    act: Any = None
    layers: list[Any] = []
    reason = child_reason(ff, sys.modules["diffusers.models.attention"].FeedForward)
    if reason is None:  # another class, put in its place, may have no such layers
        act, *layers = ff.net  # a slice is a new ModuleList, 10 us
        reason = child_reason(act, activations.GELU)
    # a hook may keep the projection's output, an adapter return another's
    reason = reason or child_reason(act._modules["proj"], nn.Linear)
    if reason is not None or torch.is_grad_enabled():
        result: Tensor = ff(x)
        return result
    hidden = torch.ops.aten.gelu_(act.proj(x), approximate=act.approximate)
    for layer in layers:
        hidden = layer(hidden)
    return hidden


class Chain:
    """Norm, modulation, gate and residual of one block on flattened tokens [B, N, D] with rows [B, D]."""

    def __init__(self, block: Any, timestep: Tensor, backend: str) -> None:
        self.block, self.backend = block, backend
        rows = rows_of(block.scale_shift_table, timestep, 6)
        self.shift1, self.scale1, self.gate1, self.shift2, self.scale2, self.gate2 = rows

    def _norm(self, layer: Any) -> dict[str, Any]:
        weight, bias = parameter_of(layer, "weight"), parameter_of(layer, "bias")
        return {"weight": weight, "bias": bias, "eps": layer.eps, "backend": self.backend}

    def start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(stream, input of the self-attention). The stream takes the wider dtype of tokens and rows, as in the original
        once the first gate is applied (it is float32 under autocast)."""
        x = x.to(torch.promote_types(x.dtype, self.gate1.dtype))
        return x, ops.adaln_modulate(x, self.shift1, self.scale1, **self._norm(self.block.norm1))

    def between(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """(stream after the self-attention, input of the MLP), without cross-attention."""
        options = self._norm(self.block.norm2)
        return ops.adaln_zero(x, branch.to(x.dtype), self.gate1, self.shift2, self.scale2, **options)

    def before_cross(self, x: Tensor, branch: Tensor) -> Tensor:
        """The stream after the self-attention; it enters the cross-attention as it is, without a norm."""
        return ops.gate_residual(x, branch.to(x.dtype), self.gate1, backend=self.backend)

    def after_cross(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """(stream after the cross-attention, which has no gate; input of the MLP)."""
        options = self._norm(self.block.norm2)
        return ops.adaln_zero(x, branch.to(x.dtype), None, self.shift2, self.scale2, **options)

    def end(self, x: Tensor, branch: Tensor) -> Tensor:
        """The stream after the MLP."""
        return ops.gate_residual(x, branch.to(x.dtype), self.gate2, backend=self.backend)
