# SPDX-License-Identifier: Apache-2.0
"""What the rules for Wan, HunyuanVideo, CogVideoX and LTX share beside `_adaln_zero_units` and `_qk_norm_units`.

* `Turn` rotates queries and keys by the tables (cos, sin) that a model hands to its attentions. They are taken as they
  are: HunyuanVideo's and LTX's come from float32 angles, 1e-5 and 1e-3 away from what `ops.qk_norm_rope` computes.
  `known_positions` gives that op the positions where the tables are exact to float32's rounding (Wan).
* `norm_across_heads` is the RMSNorm over all heads together (Wan, LTX), with the rotation where positions are known.
* `RmsStream` and `JoinedStream` are residual streams with RMSNorms, and with two kinds of tokens in one tensor.
* `processor_reason` and `may_overwrite` are guards of attentions.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import child_reason, is_autocast, parameter_of
from vidkernels.patching.rules import _adaln_zero_units as adaln
from vidkernels.patching.rules import _qk_norm_units as qk

# Values turned at a time on the CPU: the float32 copy of a bfloat16 part (4 MB) stays in the cache.
_PART = 2**20


def processor_reason(attention: Any, cls: type, processor: type) -> str | None:
    """Why an attention must be called instead of run from its projections and norms."""
    reason = child_reason(attention, cls)
    if reason is None and type(attention.processor) is not processor:
        reason = f"an attention uses {type(attention.processor).__name__}"
    return reason


def may_overwrite(*layers: nn.Module | None) -> bool:
    """Whether the outputs of these layers are nobody else's: no gradient wanted, no adapter, no hook that kept one. Callers are
    behind `call_reason`, which asks for global hooks."""
    return not torch.is_grad_enabled() and all(child_reason(layer, nn.Linear, nn.LayerNorm) is None for layer in layers)


def known_positions(tables: Any, x: Tensor) -> dict[str, Any]:
    """The rotation of x as arguments of `ops.qk_norm_rope`, where it is the model's: positions are known, x is not float64
    (the tables are float32, and their rounding would show), and no gradient of the tables is wanted."""
    known = qk.rotation(tables)
    learned = torch.is_grad_enabled() and known and any(table.requires_grad for table in tables)
    return {} if learned or x.dtype == torch.float64 else known


class Turn:
    """Rotation of the pairs (2p, 2p + 1) of queries and keys: `(a cos - b sin, a sin + b cos)`, wide, rounded once.

    Args:
        cos, sin: tables broadcastable to `[B, S, H, D]`, in which every value stands twice, or once, `[B, S, H, D / 2]`.
        like: a tensor that will be turned; the tables go to its device, in float32 (float64 for float64).
        times: how often a value stands in the tables.
    """

    def __init__(self, cos: Tensor, sin: Tensor, like: Tensor, times: int = 2) -> None:
        wide = torch.promote_types(like.dtype, torch.float32)
        cos, sin = cos.to(like.device, wide), sin.to(like.device, wide)
        learned = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
        # Inductor has no complex numbers, and fuses the rotation with its neighbours.
        self.pairs = None
        if learned or torch.compiler.is_compiling():
            self.cos, self.sin = (x if times == 2 else x.repeat_interleave(2, -1) for x in (cos, sin))
        else:
            self.pairs = torch.complex(cos[..., ::times], sin[..., ::times])

    def __call__(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Turn x `[B, S, H, D]`, in place with `overwrite`, which is for calls without gradients only."""
        if self.pairs is None:
            wide = x.to(self.cos.dtype)
            a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
            return (wide * self.cos + torch.stack((-b, a), -1).flatten(-2) * self.sin).to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            turned: Tensor = _Turn.apply(x, self.pairs)
            return turned
        return _turn_(x if overwrite and x.stride(-1) == 1 else x.clone(), self.pairs)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: Tensor) -> Tensor:
        ctx.save_for_backward(pairs)
        return _turn_(x.clone(memory_format=torch.contiguous_format), pairs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (pairs,) = ctx.saved_tensors
        return _turn_(gradient.clone(memory_format=torch.contiguous_format), pairs.conj().resolve_conj()), None


def parts(x: Tensor) -> list[tuple[int, int]]:
    """(first, behind the last) of the tokens of x [B, S, H, D] that are turned at a time."""
    tokens = x.shape[1]
    step = max(1, _PART // max(1, x.shape[0] * prod(x.shape[2:]))) if x.device.type == "cpu" else max(1, tokens)
    return [(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _turn_(x: Tensor, pairs: Tensor) -> Tensor:
    """x [B, S, H, D] with unit stride in D, multiplied in place by `pairs [B or 1, S, 1, D / 2]`."""
    for start, stop in parts(x):
        part = x[:, start:stop]
        wide = part.to(pairs.real.dtype)
        torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(pairs[:, start:stop])
        if wide is not part:
            part.copy_(wide)
    return x


def norm_across_heads(
    q: Tensor, k: Tensor | None, norms: tuple[Any, Any], count: int, backend: str, overwrite: bool, **rotated: Any
) -> tuple[Tensor, Any]:
    """torch's RMSNorm over all heads of q and, if given, k, `[B, N, H * D]` -> `[B, N, H, D]`; then the rotation."""
    options = {**rotated, "norm": "full", "inplace": overwrite, "backend": backend}
    width = q.shape[-1] // count
    # torch's rms_norm keeps its input's dtype, except under autocast on a GPU, where it returns float32.
    wide = q.device.type != "cpu" and is_autocast(q)
    norm_q, norm_k = norms
    q = (q.float() if wide else q).unflatten(2, (-1, width))
    if k is not None:
        k = (k.float() if wide else k).unflatten(2, (-1, width))
    weight = parameter_of(norm_q, "weight")
    if k is not None and q.shape[:2] == k.shape[:2] and norm_q.eps == norm_k.eps:
        return ops.qk_norm_rope(q, k, weight, parameter_of(norm_k, "weight"), eps=norm_q.eps, **options)
    q, _ = ops.qk_norm_rope(q, None, weight, eps=norm_q.eps, **options)
    if k is not None:
        k, _ = ops.qk_norm_rope(k, None, parameter_of(norm_k, "weight"), eps=norm_k.eps, **options)
    return q, k


class RmsStream(adaln.Stream):
    """A residual stream whose norms are RMSNorms without bias."""

    def _norm(self, layer: Any) -> dict[str, Any]:
        return {"norm": "rms", "weight": layer.weight, "eps": layer.eps, "backend": self.backend}


class JoinedStream(adaln.Stream):
    """A residual stream `[B, N, C]` with two kinds of tokens: token n of sample b takes row `rows[b, n]` of each table.

    Norms, attention and MLP then run once on all tokens, where the original splits and joins them around each.
    """

    def __init__(self, x: Tensor, row: Tensor, rows: Tensor, backend: str) -> None:
        super().__init__(x, row[: x.shape[0]], backend)
        self.rows = rows

    def _norm(self, layer: Any) -> dict[str, Any]:
        return {**super()._norm(layer), "rows": self.rows}

    def add(self, branch: Tensor, gate: Tensor | None) -> Tensor:
        """Add `gate * branch` to the stream and return it."""
        branch = self._take(branch)
        self.x = ops.gate_residual(self.x, branch, self._row(gate), rows=self.rows, backend=self.backend)
        return self.x


def alternate(first: int, x: Tensor, table: Tensor) -> Tensor:
    """Rows [B, N] of x [B, N, C] in tables [2 B, C], or [2, C] for all samples, of alternating kinds: `2 b` for the first
    `first` tokens, `2 b + 1` for the rest."""
    batch, tokens, _ = x.shape
    kind = (torch.arange(tokens, device=x.device, dtype=torch.int32) >= first).to(torch.int32)
    if table.shape[0] == 2:
        return kind.repeat(batch, 1)
    return 2 * torch.arange(batch, device=x.device, dtype=torch.int32)[:, None] + kind


def sample_tables(
    tokens: int, width: int, device: torch.device, before: tuple[int, ...] = (), after: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Tables (cos, sin) `[*before, tokens, *after, width]` in which every value stands twice, for a rule's `sample`."""
    angles = torch.arange(tokens)[:, None] * 10.0 ** -torch.arange(width // 2).remainder(4)
    angles = angles.repeat_interleave(2, -1).view(*[1] * len(before), tokens, *after, width)
    angles = angles.expand(*before, tokens, *after, width).contiguous().to(device)
    return angles.cos(), angles.sin()
