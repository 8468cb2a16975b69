# SPDX-License-Identifier: Apache-2.0
"""Parts of tokenizers as graphs of symbolic sizes."""

from __future__ import annotations

import pytest
import torch

from vidkernels.models.tokenizers.magvit2 import AdaptiveNorm


@pytest.mark.parametrize("per_frame", [True, False])
def test_adaptive_norm_of_any_size(per_frame: bool) -> None:
    """It counted the latent's positions by what Dynamo cannot trace where sizes are symbolic."""
    torch.manual_seed(0)
    norm = AdaptiveNorm(32, 4, per_frame)
    torch.nn.init.normal_(norm.modulation.weight)
    torch._dynamo.reset()
    compiled = torch.compile(norm, fullgraph=True, dynamic=True, backend="eager")
    for frames, height, width in ((3, 4, 6), (5, 8, 2)):
        x, z = torch.randn(1, 32, frames, 2 * height, width), torch.randn(1, 4, 1 + frames // 2, height, width)
        torch.testing.assert_close(compiled(x, z), norm(x, z))
