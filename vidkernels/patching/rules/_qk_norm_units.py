# SPDX-License-Identifier: Apache-2.0
"""Query and key norms of diffusers' attentions in one launch, with the rotation where positions are known.

Projections are called as modules; the attention itself stays with diffusers' processor or its dispatch function.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vidkernels import ops
from vidkernels.patching._guard import child_reason

_NORMS = "diffusers.models.normalization"


class Rotary(tuple[Tensor, Tensor]):
    """The tables (cos, sin) that a model hands to its attentions, and the positions that they were made from.

    To everybody else it is the pair that it was, and a copy that somebody makes of the pair is one without positions.
    """

    positions: Tensor | None = None
    options: Mapping[str, Any] = {}


def rotary(tables: tuple[Tensor, Tensor], positions: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Tables with their positions `[tokens, axes]`; `options`, for `ops.qk_norm_rope`, are layout, axes and theta or
    frequencies."""
    found = Rotary(tables)
    found.positions, found.options = positions, options
    return found


_Context = tuple[torch.dtype | None, tuple[str, ...], tuple[tuple[str, Any], ...]]


def _flatten(tables: Rotary) -> tuple[list[Any], _Context]:
    named = tuple(name for name, value in tables.options.items() if isinstance(value, Tensor))
    others = tuple((name, value) for name, value in tables.options.items() if name not in named)
    dtype = None if tables.positions is None else tables.positions.dtype
    return [*tables, tables.positions, *(tables.options[name] for name in named)], (dtype, named, others)


def _unflatten(leaves: Iterable[Any], context: _Context) -> tuple[Tensor, Tensor]:
    dtype, named, others = context
    cos, sin, positions, *tensors = leaves
    if isinstance(positions, Tensor) and positions.dtype != dtype:
        return cos, sin  # cast with the tables, as FSDP2 does with all arguments: bfloat16 counts to 256 only
    return rotary((cos, sin), positions, **dict(zip(named, tensors, strict=True)), **dict(others))


# Whoever maps over the tensors of a module's arguments (`verify`, checkpointing) finds these, too.
pytree.register_pytree_node(Rotary, _flatten, _unflatten)


def rotation(tables: Any, start: int = 0, stop: int | None = None) -> dict[str, Any]:
    """Arguments of `ops.qk_norm_rope` for the tokens `start:stop`; empty where the positions are not known."""
    if not isinstance(tables, Rotary) or tables.positions is None:
        return {}
    return {"positions": tables.positions[start:stop], **tables.options}


def rounds_angles(dtype: torch.dtype) -> bool:
    """Whether a result's rounding hides that a model's angles are float32: their error, 1e-5, shows in float32 alone."""
    return dtype in (torch.bfloat16, torch.float16)


def norm_reason(norm: Any) -> str | None:
    """Why a query or key norm must be called instead of read."""
    home: Any = sys.modules[_NORMS]
    reason = child_reason(norm, nn.RMSNorm, home.RMSNorm, home.MochiRMSNorm)
    if reason is None and (norm.eps is None or getattr(norm, "bias", None) is not None):
        reason = "a query or key norm has a bias or no eps"
    return reason


def norms_reason(norms: Sequence[Any]) -> str | None:
    """Why the norms of an attention, in pairs of query and key, must be called."""
    for norm in norms:
        reason = norm_reason(norm)
        if reason is not None:
            return reason
    if any(norm.eps != norms[0].eps for norm in norms):
        return "the query and key norms differ"
    return None


def norms_check(attention: Any) -> str | None:
    """Why an attention's norms can never be served, for a rule's `check`: another kind than RMSNorm, or none at all."""
    home: Any = sys.modules[_NORMS]
    added = ("norm_added_q", "norm_added_k") if getattr(attention, "add_q_proj", None) is not None else ()
    for name in ("norm_q", "norm_k", *added):
        norm = getattr(attention, name)
        if not isinstance(norm, nn.RMSNorm | home.RMSNorm | home.MochiRMSNorm):
            return (
                f"its attention's {name} is {'missing' if norm is None else 'a ' + type(norm).__name__}, not an RMSNorm"
            )
    return None


def heads(x: Tensor, count: int = -1, width: int = -1) -> Tensor:
    """[B, N, H * D] -> [B, N, H, D], by the number of heads or by their width."""
    return x.unflatten(-1, (count, width))


def join(first: Tensor, second: Tensor) -> Tensor:
    """The tokens of two streams [B, N, H, D] in one, laid out as `by_head` does."""
    if first.device.type != "cpu":
        return torch.cat([first, second], dim=1)
    return torch.cat([first.transpose(1, 2), second.transpose(1, 2)], dim=2).transpose(1, 2)


def by_head(x: Tensor) -> Tensor:
    """Keys or values [B, N, H, D], on a CPU laid out head by head: torch's attention there reads them 12 to 20 % faster (2048
    tokens), and the copy costs 0.5 % of it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.device.type == "cpu" else x


def normalise(q: Tensor, k: Tensor, norm_q: Any, norm_k: Any, backend: str, **rotated: Any) -> tuple[Tensor, Tensor]:
    """RMSNorm of q and k [B, N, H, D] over D, then the rotation, if one is given."""
    weights = (norm_q.weight, norm_k.weight)
    q, k = ops.qk_norm_rope(q, k, *weights, eps=norm_q.eps, backend=backend, **rotated)
    return q, k
