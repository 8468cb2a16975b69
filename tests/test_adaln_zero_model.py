# SPDX-License-Identifier: Apache-2.0
"""A whole Latte of diffusers, random weights, trains one step patched and unpatched: same loss, gradients and weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_within_promise
from torch import nn

import vidkernels

diffusers = pytest.importorskip("diffusers")

SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 4, "video_length": 3}
# Latte-XL/2's width, heads and resolution; 2 of its 28 layers of each kind and 4 of its 16 frames, to fit this test
WIDE = {"num_layers": 2, "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32, "video_length": 4}


def build(size: dict[str, int]) -> nn.Module:
    model = diffusers.LatteTransformer3DModel(
        in_channels=4, out_channels=8, patch_size=2, caption_channels=24, norm_type="ada_norm_single",
        cross_attention_dim=size["num_attention_heads"] * size["attention_head_dim"], activation_fn="gelu-approximate",
        attention_bias=True, norm_elementwise_affine=False, norm_eps=1e-6, **size,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():  # zero-initialised parts would hide the gates
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def step(model: nn.Module, inputs: dict[str, torch.Tensor], target: torch.Tensor) -> dict[str, torch.Tensor]:
    """One step of gradient descent: the loss, every gradient, every new weight."""
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    loss = (model(**cast, return_dict=False)[0] - target.to(dtype)).square().mean()
    loss.backward()
    found = {"loss": loss.detach().reshape(1)}
    found |= {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return found | {f"new {n}": p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("size", [SMALL, pytest.param(WIDE, marks=pytest.mark.slow)], ids=["small", "XL/2 width"])
def test_one_training_step_of_latte(size: dict[str, Any]) -> None:
    model = build(size)
    side, frames = size["sample_size"], size["video_length"]
    inputs = {
        "hidden_states": torch.randn(2, 4, frames, side, side),
        "timestep": torch.tensor([17, 803]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
    }
    target = torch.randn(2, 8, frames, side, side)
    unpatched, truth, patched = copy.deepcopy(model), copy.deepcopy(model).double(), model
    report = vidkernels.patch(patched)
    assert any(entry.op == "adaln_zero" and entry.state == "patched" for entry in report.entries), str(report)
    results = [step(m, inputs, target) for m in (patched, unpatched, truth)]
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        values = [result[name] for result in results]
        if name.startswith("gradient") and name.endswith("to_k.bias"):
            # Zero but for rounding, as attention ignores what all keys share: judged together with that of the weight.
            beside = name.replace("bias", "weight")
            values = [torch.cat([result[name].flatten(), result[beside].flatten()]) for result in results]
        assert_within_promise(*values, name=name)
