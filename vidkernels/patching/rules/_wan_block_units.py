# SPDX-License-Identifier: Apache-2.0
"""The chain of a block of Wan's kind: self-attention, cross-attention behind a norm without modulation, MLP, on rows in
float32. Wan's own blocks and those of the models made from them (SkyReels, AnyFlow, Helios) differ in what they hand over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vidkernels.patching._guard import child_reason
from vidkernels.patching.rules import _adaln_zero_units as adaln
from vidkernels.patching.rules._latte_units import feed_forward


def norms_reason(block: Any) -> str | None:
    """Why the norms of a block must be called."""
    norm, parts = block._vidkernels_home.FP32LayerNorm, block._modules
    reason = child_reason(parts["norm1"], norm) or child_reason(parts["norm3"], norm)
    return reason or child_reason(parts["norm2"], norm, nn.Identity)


def rows_of(block: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """Six rows of modulation, [B, 1 or N, D] or [B, D], of temb [B, 6, D] or [B, N, 6, D]."""
    table = block.scale_shift_table.unsqueeze(0) if temb.ndim == 4 else block.scale_shift_table
    return (table.to(temb.device) + temb.float()).unbind(-2)


def chain(
    block: Any,
    x: Tensor,
    rows: tuple[Tensor, ...],
    attend: Callable[[Tensor], Tensor],
    look: Callable[[Tensor], Tensor],
) -> Tensor:
    """The block on its residual stream x [B, N, D]; `attend` is its attention over x, `look` the one over its context."""
    shift1, scale1, gate1, shift3, scale3, gate3 = rows
    # The originals compute in float32 and return to the dtype of their input, so the rows widen nothing here.
    stream, parts = adaln.Stream(x, x, block._vidkernels_backend("adaln_zero")), block._modules
    branch = attend(stream.open(parts["norm1"], shift1, scale1))
    norm2 = parts["norm2"]
    if isinstance(norm2, nn.LayerNorm):
        normed = stream.seam(branch, gate1, norm2, None, None)
    else:
        normed = stream.add(branch, gate1)
    normed = stream.seam(look(normed), None, parts["norm3"], shift3, scale3)
    return stream.add(feed_forward(parts["ffn"], normed), gate3)
