# SPDX-License-Identifier: Apache-2.0
"""Rules for Open-Sora 1.2's temporal VAE, on networks of our own with the same structure and the same results."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import official_opensora_vae_toys as toys
import pytest
import torch
from official_vae_suite import OfficialVaeSuite, busy, knowing
from patching_suite import no_fallback  # noqa: F401
from torch import Tensor, nn
from vae_cases import check_call

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import _rule as table
from vidkernels.patching.rules import official_opensora_vae as rules


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    yield from knowing(rules.RULES, toys)


class TestTemporalVae(OfficialVaeSuite):
    rules = {
        "opensora_vae.encoder": 1,
        "opensora_vae.decoder": 1,
        "opensora_vae.resblock": 20,
        "opensora_vae.causal_conv": 54,
    }
    sizes = ((1, 9, 8, 10), (2, 4, 5, 7), (1, 1, 4, 4), (2, 6, 4, 4))
    hooked = (
        *("encoder", "encoder.block_res_blocks.1.0", "encoder.res_blocks.1.conv2", "encoder.conv_blocks.1"),
        *("encoder.norm1", "decoder.block_res_blocks.2.1", "decoder.conv_blocks.2", "decoder.res_blocks.0.norm2"),
        "decoder.conv_out",
    )
    wrapped = "decoder.res_blocks.0.conv1.conv"
    channels = 4

    def build(self) -> Any:
        return toys.VAE_Temporal()

    def smallest(self) -> Any:
        return busy(toys.VAE_Temporal(blocks=1))

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encode(x)

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return model.decode(z, 4 * z.shape[2] - 1)


def test_blocks_that_pad_by_repetition() -> None:
    for cin in (8, 16):
        block, x = toys.ResBlock(cin, 16, 4, pad_mode="replicate").eval(), torch.randn(2, cin, 4, 5, 6)
        original, double = (
            toys.ResBlock(cin, 16, 4, pad_mode="replicate"),
            toys.ResBlock(cin, 16, 4, pad_mode="replicate"),
        )
        for other in (original, double):
            other.load_state_dict(block.state_dict())
        vidkernels.patch(block)
        with torch.no_grad():
            check_call(lambda m, x: m(x), (original, block, double.double()), x, "block")


def test_what_is_left_to_the_original() -> None:
    relu = toys.ResBlock(8, 8, 4, nn.ReLU)
    report = vidkernels.explain(relu)
    assert "its activation is ReLU, not SiLU" in report.details()
    assert "pads by mode reflect" in vidkernels.explain(toys.CausalConv3d(4, 4, pad_mode="reflect")).details()
    block, x = toys.ResBlock(8, 8, 4), torch.randn(1, 8, 3, 4, 4)
    with torch.no_grad():
        expected = block(x)
        vidkernels.patch(block)
        block.activate = nn.SiLU()
        block.activate.register_forward_hook(lambda *call: None)
        with pytest.warns(VidkernelsFallbackWarning, match="SiLU has hooks"):
            torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-4)


def test_the_official_file() -> None:
    """Where a checkout of Open-Sora is on the path, which no package holds."""
    pytest.importorskip("opensora.models.vae.vae_temporal", reason="Open-Sora is not on the path")
    upstream = importlib.import_module("opensora.models.vae.vae_temporal")
    table._USER.clear()
    model = upstream.VAE_Temporal(filters=32, num_res_blocks=1, temporal_downsample=(False, True, True)).eval()
    report = vidkernels.explain(model)
    assert not report.near_misses and len(report.patched) == 2 + 10 + 34
