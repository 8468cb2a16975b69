# SPDX-License-Identifier: Apache-2.0
"""What the tokenizer's task does beside its losses: parts that stay, forwards that are not finite, settings, low precision."""

from __future__ import annotations

import math
import re

import pytest
import torch

from vidkernels.errors import OptionError
from vidkernels.models.tokenizers._quantizer import VectorQuantizer
from vidkernels.training.tokenizer import Judge, LossConfig, TokenizerTask, make_tokenizer
from vidkernels.training.tokenizer_run import read_recipe


def test_a_stage_for_the_decoder_leaves_a_codebook_of_moving_averages() -> None:
    """Nothing of it has a gradient to freeze: it moves in training mode, and no other mode may be left by a validation."""
    values = {"kind": "magvit", "codes": 9, "embedding_channels": 4, "channels": 8, "channel_multipliers": [1, 2]}
    model = make_tokenizer({**values, "residual_blocks": 1, "temporal_down": [True], "ema": 0.5})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for trained in ("decoder", "all"):
        task = TokenizerTask(model, LossConfig(), (4, 16, 16), trained=trained)
        task.modules["model"].eval().train()
        task.modules["model"](torch.randn(1, 3, 4, 16, 16))
        same = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert same == (trained == "decoder") and model.decoder.training
        wanted = {key.split(".")[0] for key, p in model.named_parameters() if p.requires_grad}
        assert wanted == ({"decoder"} if trained == "decoder" else {"encoder", "decoder"})
        model.requires_grad_(True).quantize.requires_grad_(False)


def test_a_batch_that_is_not_finite_leaves_the_moving_averages() -> None:
    """Its step is skipped by the trainer, which cannot take back what a forward wrote."""
    quantizer = VectorQuantizer(4, 2, ema=0.5).train()
    z = torch.randn(1, 2, 30)
    z[0, 0, 7] = float("nan")
    quantizer(z)
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"r1_every": 0},
        {"kl_reduction": "mean"},
        {"lecam_weight": -1.0},
        {"adversarial_start": -1},
        {"entropy_gamma": math.inf},
    ]
    + [{"discriminator_layers": 0}, {"entropy_temperature": 0.0}, {"perceptual_net": "resnet"}],
    ids=str,
)
def test_losses_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        LossConfig(**wrong)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages=5", "stages: expected a list with an object for each stage, got 5"),
        ("stages.1=null", "stages: expected a list with an object for each stage"),
        ("model=[1]", "model: expected an object with its settings"),
        ("loss=3", "loss: expected an object with its settings, got 3"),
        ('gradient_checkpointing="no"', "gradient_checkpointing: expected true or false, got 'no'"),
        ('stages.0.loss="l2"', "loss: expected an object with its settings, got l2"),
    ],
)
def test_parts_of_a_recipe_that_are_no_objects_are_refused(override: str, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        read_recipe("tokenizer_tiny", [override])


@pytest.mark.parametrize("kind", ["patch3d", "style"])
def test_a_discriminator_in_bfloat16_on_a_cpu_has_its_gradients(kind: str) -> None:
    """oneDNN's weight gradient over 2 frames is what lay in memory, which the suite fills with NaN."""
    judge = Judge(
        LossConfig(discriminator=kind, discriminator_channels=8, discriminator_layers=2, r1_weight=1.0), (5, 24, 24)
    )
    video = torch.randn(2, 3, 5, 24, 24)
    gradients = []
    for enabled in (True, False):
        judge.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = judge(video)[0].float().mean()
        loss.backward()
        gradients.append([p.grad for p in judge.net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and len(gradients[0]) > 4
