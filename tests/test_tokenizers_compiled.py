# SPDX-License-Identifier: Apache-2.0
"""Tokenizers with a codebook as one graph of symbolic sizes."""

from __future__ import annotations

import pytest
import torch

from vidkernels.models.tokenizers import MAGVIT2
from vidkernels.models.tokenizers.magvit2 import MAGVIT2Config


@pytest.mark.parametrize("norm", ["frame", "group"])
def test_magvit2_of_any_size(norm: str) -> None:
    """The norm counted the latent's positions by what Dynamo cannot trace where sizes are symbolic."""
    config = MAGVIT2Config(
        channels=32, channel_multipliers=(1, 1), residual_blocks=1, temporal_down=(True,), bits=4, norm=norm
    )
    torch.manual_seed(0)
    model = MAGVIT2(config).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for size in ((3, 8, 6), (5, 4, 12)):
        video = torch.rand(1, 3, *size)
        found, right = compiled(video), model(video)
        assert torch.equal(found[1], right[1])
        torch.testing.assert_close(found[0], right[0])
