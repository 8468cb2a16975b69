# SPDX-License-Identifier: Apache-2.0
"""diffusers' AutoencoderVidTok trained by the engine, patched and unpatched: the same loss curve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vidkernels
from vidkernels.training import OptimizerConfig, Task, TrainConfig, Trainer
from vidkernels.training.metrics import read_lines

diffusers = pytest.importorskip("diffusers", minversion="0.42")


class Waves:
    """Clips of a moving wave, chosen by the draw's seed."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, draw) -> torch.Tensor:
        phase = torch.rand(3, 1, 1, 1, generator=draw.generator()) * 6
        t, y, x = (torch.arange(n).float() for n in (5, 16, 16))
        return torch.sin(phase + t.view(1, -1, 1, 1) + x.view(1, 1, 1, -1) / 3 + y.view(1, 1, -1, 1) / 5)


class Reconstruct(Task):
    """Mean squared error of the reconstruction."""

    def __init__(self, patched: bool) -> None:
        torch.manual_seed(1)
        model = diffusers.AutoencoderVidTok(
            ch=16,
            ch_mult=[1, 1, 2],
            num_res_blocks=1,
            regularizer="fsq",
            z_channels=3,
            double_z=False,
            codebook_size=512,
        )
        if patched:
            assert vidkernels.patch(model).patched
        self.modules = {"model": model}

    def losses(self, name, modules, batch, context):
        return (modules["model"](batch).sample - batch).square().mean(), {}


def test_patched_and_unpatched_models_have_one_loss_curve(tmp_path: Path) -> None:
    optimizers = {"default": OptimizerConfig(learning_rate=0.002)}
    config = TrainConfig(steps=5, batch=2, log_every=1, save_every=5, optimizers=optimizers)
    curves = []
    for patched in (False, True):
        folder = tmp_path / str(patched)
        Trainer(Reconstruct(patched), config, Waves(), folder).run()
        curves.append([line["model_loss"] for line in read_lines(folder / "metrics.jsonl")])
    assert curves[0][-1] < curves[0][0]
    # Float32 rounding, four Adam updates apart; a token that changes its code moves the loss by more than rounding.
    assert curves[1] == pytest.approx(curves[0], rel=5e-3)
    assert curves[1][:2] == pytest.approx(curves[0][:2], rel=1e-4)
