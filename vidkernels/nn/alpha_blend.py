# SPDX-License-Identifier: Apache-2.0
"""VidTok's learned blend of two branches as a module. Its samplers are `nn.TemporalDownsample` and `TemporalUpsample`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import ops
from vidkernels.ops._checks import check_number


class AlphaBlender(nn.Module):
    """`sigmoid(mix_factor) * a + (1 - sigmoid(mix_factor)) * b`: `ops.alpha_blend` with its parameter, [1].

    Args:
        mix_factor: initial value; 2.0 as in VidTok gives `a` a share of 0.88.
        backend: as in `ops.alpha_blend`.
        device, dtype: of the parameter.
    """

    def __init__(self, mix_factor: float = 2.0, *, backend: str = "auto", **factory: Any) -> None:
        super().__init__()
        check_number("mix_factor", mix_factor)
        self.backend = backend
        self.mix_factor = nn.Parameter(torch.full((1,), float(mix_factor), **factory))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two tensors of one shape and dtype to a tensor like `b`."""
        return ops.alpha_blend(a, b, self.mix_factor, backend=self.backend)
