# SPDX-License-Identifier: Apache-2.0
"""The residual stream of an adaLN-Zero block on `ops.adaln_*`, shared by the rules for DiT, SD3, Flux and their like.

Attentions, MLPs and projections are called as modules, so masks, attention backends, IP-adapters, LoRA and quantized
weights are honoured. Only the norms are bypassed, and they are guarded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.patching._guard import child_reason, parameter_of
from vidkernels.patching._modulation import project


def spread(x: Tensor, row: Tensor) -> Tensor:
    """One sample's tokens for several conditions: upstream's sums broadcast them."""
    return x.expand(row.shape[0], *x.shape[1:]) if x.shape[0] == 1 != row.shape[0] else x


class Stream:
    """One residual stream through a block: `open`, then `seam` once per further sub-block, then `close`.

    `x` [B, N, C] is the stream so far. It takes the wider dtype of tokens and rows, as in the original once the first
    gate is applied: float32 under autocast, where the projections of the rows return bfloat16.
    """

    def __init__(self, x: Tensor, row: Tensor, backend: str) -> None:
        self.x = spread(x, row).to(torch.promote_types(x.dtype, row.dtype))
        self.backend = backend

    def _row(self, row: Tensor | None) -> Tensor | None:
        """A row of modulation in a dtype that kernels read: the stream's or float32."""
        return row if row is None or row.dtype == torch.float32 else row.to(self.x.dtype)

    def _take(self, branch: Tensor) -> Tensor:
        """The branch in the stream's dtype; a wider branch widens the stream."""
        if branch.dtype == self.x.dtype:
            return branch
        dtype = torch.promote_types(self.x.dtype, branch.dtype)
        self.x = self.x.to(dtype)
        return branch.to(dtype)

    def _norm(self, layer: Any) -> dict[str, Any]:
        weight, bias = parameter_of(layer, "weight"), parameter_of(layer, "bias")
        return {"weight": weight, "bias": bias, "eps": layer.eps, "backend": self.backend}

    def open(self, layer: Any, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        """`layer(x) * (1 + scale) + shift`: the input of a sub-block."""
        return ops.adaln_modulate(self.x, self._row(shift), self._row(scale), **self._norm(layer))

    def seam(
        self, branch: Tensor, gate: Tensor | None, layer: Any, shift: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        """Add `gate * branch` to the stream and return the input of the next sub-block, in one pass."""
        branch = self._take(branch)
        rows = (self._row(gate), self._row(shift), self._row(scale))
        self.x, modulated = ops.adaln_zero(self.x, branch, *rows, **self._norm(layer))
        return modulated

    def normed(self, branch: Tensor, layer: Any) -> Tensor:
        """The branch behind a norm of its own, before its gate."""
        return ops.adaln_modulate(branch, None, None, **self._norm(layer))

    def add(self, branch: Tensor, gate: Tensor | None) -> Tensor:
        """Add `gate * branch` to the stream and return it."""
        branch = self._take(branch)
        self.x = (
            self.x + branch
            if gate is None
            else ops.gate_residual(self.x, branch, self._row(gate), backend=self.backend, **self._gate_options())
        )
        return self.x

    def _gate_options(self) -> dict[str, Any]:
        """What says which row a token takes, where they are not a sample's own."""
        return {}


def rows_reason(norm: Any, *classes: type) -> str | None:
    """Why an adaptive norm (`AdaLayerNormZero` and its like) must be called instead of taken apart."""
    reason = child_reason(norm, *classes)
    return reason or child_reason(norm.norm, nn.LayerNorm) or child_reason(norm.silu, nn.SiLU)


def rows_of(norm: Any, embedding: Tensor, count: int) -> tuple[Tensor, ...]:
    """The rows [B, C] that an adaptive norm projects from its condition."""
    return project(norm.linear, norm.silu, embedding).chunk(count, dim=1)
