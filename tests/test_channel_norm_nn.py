# SPDX-License-Identifier: Apache-2.0
"""nn.ChannelNorm, nn.GroupNorm and nn.AlphaBlender: parameters, results, and checkpoints of the modules they replace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vidkernels import nn


def test_channel_norm_takes_the_weights_of_layer_norm() -> None:
    theirs, ours = torch.nn.LayerNorm(12, eps=1e-6), nn.ChannelNorm(12, activation="silu")
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 12, 3, 4, 5)
    torch.testing.assert_close(ours(x), F.silu(theirs(x.movedim(1, -1)).movedim(-1, 1)))


@pytest.mark.parametrize("kind", ["rms", "l2"])
def test_channel_norm_without_bias(kind: str) -> None:
    norm = nn.ChannelNorm(8, kind=kind, bias=False, dtype=torch.float64)
    assert list(norm.state_dict()) == ["weight"] and norm.weight.dtype == torch.float64
    y = norm(torch.randn(2, 8, 9, dtype=torch.float64))
    torch.testing.assert_close(y.square().mean(1), torch.ones(2, 9, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    assert repr(norm) == f"ChannelNorm(8, kind='{kind}', eps=None, activation=None)"


@pytest.mark.parametrize("per_frame", [True, False], ids=["per frame", "whole clip"])
def test_group_norm_takes_the_weights_of_torch(per_frame: bool) -> None:
    theirs, ours = torch.nn.GroupNorm(4, 8, eps=1e-6), nn.GroupNorm(4, 8, per_frame=per_frame)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 3, 4, 5)
    frames = x.transpose(1, 2)
    expected = theirs(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2) if per_frame else theirs(x)
    torch.testing.assert_close(ours(x), expected)


def test_alpha_blender_learns() -> None:
    blender = nn.AlphaBlender()
    assert blender.mix_factor.shape == (1,) and blender.mix_factor.item() == 2.0
    a, b = torch.randn(1, 3, 2, 4, 4), torch.randn(1, 3, 2, 4, 4)
    share = torch.sigmoid(blender.mix_factor)
    y = blender(a, b)
    torch.testing.assert_close(y, share * a + (1 - share) * b)
    y.sum().backward()
    torch.testing.assert_close(blender.mix_factor.grad, ((share - share.square()) * (a - b).sum()).detach())
