# SPDX-License-Identifier: Apache-2.0
"""The tests of `official_vae_suite` for networks of images [N, C, H, W]."""

from __future__ import annotations

import pytest
import torch
from official_vae_suite import OfficialVaeSuite
from torch import Tensor, nn

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning


class OwnConv2d(nn.Conv2d):
    """What a LoRA wrapper is for the guards: a convolution of another class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.25


class OfficialImageSuite(OfficialVaeSuite):
    """`sizes` are images [N, H, W]."""

    def test_channels_last_input(self) -> None:
        model, x = self.ready(), self.clip(self.sizes[-1])
        with torch.no_grad():
            expected = self.encode(model, x)
            vidkernels.patch(model)
            actual = self.encode(model, x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)

    def test_a_wrapped_convolution_is_called(self) -> None:
        model, x = self.ready(), self.clip()
        vidkernels.patch(model)
        z = self.latents(model, x)
        model.get_submodule(self.wrapped).__class__ = OwnConv2d
        with torch.no_grad():
            with pytest.warns(VidkernelsFallbackWarning, match="OwnConv2d"):
                actual = self.decode(model, z)
            vidkernels.unpatch(model)
            torch.testing.assert_close(actual, self.decode(model, z), atol=5e-5, rtol=1e-4)
