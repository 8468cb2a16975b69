# SPDX-License-Identifier: Apache-2.0
"""One timestep, text or image for all samples of a batch: upstream's sums broadcast it, and so do patched models."""

from __future__ import annotations

import pytest
import test_patching_cogvideox
import test_patching_flux
import test_patching_hunyuan_video
import test_patching_sd3
import torch
from patching_suite import ModelSuite, no_fallback  # noqa: F401

import vidkernels

diffusers = pytest.importorskip("diffusers", minversion="0.42")
CONDITION = ("timestep", "pooled_projections")
CASES: list[tuple[type[ModelSuite], tuple[str, ...]]] = [
    (test_patching_cogvideox.TestCogVideoX, ("timestep",)),
    (test_patching_hunyuan_video.TestTokenReplace, CONDITION),
    (test_patching_hunyuan_video.TestHunyuanVideo, CONDITION),
    (test_patching_flux.TestFlux, ("encoder_hidden_states",)),
    (test_patching_flux.TestFlux, ("hidden_states",)),
    (test_patching_sd3.TestSD35, ("encoder_hidden_states",)),
]


@pytest.mark.parametrize(("suite", "single"), CASES, ids=[f"{s.__name__[4:]}-{'+'.join(k)}" for s, k in CASES])
def test_one_for_all(suite: type[ModelSuite], single: tuple[str, ...]) -> None:
    made = suite()
    model, arguments = made.ready(), made.inputs(batch=3)
    arguments |= {name: arguments[name][:1] for name in single}
    with torch.no_grad():
        expected = model(**arguments).sample
        assert len(expected) == 3
        made.patch(model)
        torch.testing.assert_close(model(**arguments).sample, expected, atol=1e-5, rtol=1e-4)
    assert not vidkernels.status(model).fallbacks


def test_one_clip_in_a_final_layer() -> None:
    from diffusers.models.normalization import AdaLayerNormContinuous

    layer = AdaLayerNormContinuous(8, 6)
    x, condition = torch.randn(1, 5, 8), torch.randn(3, 6)
    expected = layer(x, condition)
    vidkernels.patch(layer)
    torch.testing.assert_close(layer(x, condition), expected)
