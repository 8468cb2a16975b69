# SPDX-License-Identifier: Apache-2.0
"""Rules for Open-Sora 2.0's DC-AE, on networks of our own with the same structure and the same results."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import official_opensora2_dc_ae_toys as toys
import pytest
import torch
from official_vae_suite import OfficialVaeSuite, busy, knowing
from patching_suite import no_fallback  # noqa: F401
from torch import Tensor, nn
from vae_cases import check_call

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import digest
from vidkernels.patching.rules import official_opensora2_dc_ae as rules


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rules, "NORMS", {digest(toys.RMSNorm3d.forward)})
    yield from knowing(rules.RULES, toys)


class TestDCAE(OfficialVaeSuite):
    rules = {  # noqa: RUF012
        "opensora2_dc_ae.encoder": 1,
        "opensora2_dc_ae.decoder": 1,
        "opensora2_dc_ae.glu": 4,
        "opensora2_dc_ae.upsample": 2,
        "opensora2_dc_ae.conv": 32,
        "opensora2_dc_ae.norm": 11,
    }
    sizes = ((1, 4, 8, 16), (2, 2, 8, 12), (1, 1, 8, 8))
    wrapped = "decoder.stages.0.op_list.1.main.0.conv"
    hooked = (
        *("encoder.project_in", "encoder.stages.0.op_list.0.main.1.norm", "encoder.stages.1.op_list.1.main.depth_conv"),
        *("decoder.stages.1.op_list.0.main", "decoder.project_out.op_list.0", "decoder.stages.0.op_list.0.main.conv"),
        "decoder.stages.0.op_list.1.main.0.act",
    )

    def build(self) -> Any:
        return toys.DCAE()

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return model.encoder(x)

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return model.decoder(z)

    def latents(self, model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.encode(model, x)


LAYERS = {
    "both": {"norm": True, "act": nn.SiLU},
    "other activation": {"act": nn.ReLU, "norm": True},
    "strided": {"stride": (2, 1, 2)},
    "grouped": {"groups": 4},
    "grouped and strided": {"groups": 8, "stride": (1, 2, 2), "act": nn.SiLU},
    "one tap": {"size": 1, "bias": False},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_layers(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, x = busy(toys.ConvLayer(8, 16, **options)), torch.randn(2, 8, 3, 5, 6)
    models = copy.deepcopy(layer), layer, copy.deepcopy(layer).double()
    vidkernels.patch(layer)
    with torch.no_grad():
        check_call(lambda m, x: m(x), models, x, "layer")
        last = x.contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(layer(last), models[0](last), atol=1e-5, rtol=1e-4)
    assert not vidkernels.status(layer).fallbacks


def test_dropout_drops() -> None:
    layer, x = toys.ConvLayer(8, 8, dropout=0.5).train(), torch.randn(1, 8, 3, 4, 4)
    vidkernels.patch(layer, mode="training")
    assert not torch.equal(layer(x), layer(x))


def test_what_is_left_to_the_original() -> None:
    assert "it is a layer for images" in vidkernels.explain(toys.ConvLayer(4, 4, is_video=False)).details()
    assert "its gate is GELU" in vidkernels.explain(toys.GLUMBConv(8, nn.GELU)).details()
    layer = toys.ConvLayer(8, 8)
    layer.norm = nn.BatchNorm3d(8)
    assert "its norm is a BatchNorm3d" in vidkernels.explain(layer).details()
    assert "more than a nearest" in vidkernels.explain(toys.InterpolateConvUpSampleLayer(4, 4, mode="area")).details()
    network = toys.Encoder((8, 16), 8)
    network.cfg.is_video = False
    assert "a network for images" in vidkernels.explain(network).details()


@pytest.mark.parametrize(
    ("path", "attribute", "value"),
    [
        ("project_in", "pad_mode_3d", "replicate"),
        ("project_in", "padding", (1, 1, 1, 1, 2, 0)),
        ("project_in", "act", nn.GELU()),
        ("project_in.conv", "padding_mode", "reflect"),
        ("stages.0.op_list.0.main.1.norm", "eps", 1.0),
        ("stages.1.op_list.1.main", "glu_act", nn.ReLU()),
        ("stages.1.op_list.1.main.depth_conv", "padding", (1, 1, 1, 1, 2, 0)),
        ("stages.1.op_list.1.main.depth_conv", "pad", lambda x, sides, mode: nn.functional.pad(2 * x, sides, mode)),
    ],
)
def test_changes_on_a_patched_model(path: str, attribute: str, value: Any) -> None:
    torch.manual_seed(0)
    network, x = busy(toys.Encoder((8, 16), 8)), torch.randn(1, 3, 4, 8, 8)
    patched = copy.deepcopy(network)
    vidkernels.patch(patched)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", VidkernelsFallbackWarning)
        before = patched(x)
        for model in (network, patched):
            setattr(model.get_submodule(path), attribute, value)
        torch.testing.assert_close(patched(x), network(x), atol=2e-5, rtol=1e-4)
        assert attribute == "padding_mode" or not torch.allclose(network(x), before, atol=1e-4)
