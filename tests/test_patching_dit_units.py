# SPDX-License-Identifier: Apache-2.0
"""What the rules for video transformers share: rotation by given tables, norms over all heads, two kinds of tokens."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_gradients_within_promise, assert_within_promise
from torch import Tensor, nn

from vidkernels.patching.rules import _dit_units as units

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tables(tokens: int, width: int, heads: int = 1) -> tuple[Tensor, Tensor]:
    angles = (torch.rand(tokens, heads, width // 2) * 20).repeat_interleave(2, -1)
    return angles.cos()[None], angles.sin()[None]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
    return (wide * cos + torch.stack((-b, a), -1).flatten(-2) * sin).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [2**20, 100, 1], ids=["whole", "parts", "tokens"])
def test_turn(dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_PART", part)
    cos, sin = tables(11, 6)
    strided = torch.randn(2, 3, 11, 12).to(dtype).transpose(1, 2)[..., ::2]  # heads outside tokens, a gap in channels
    for x in (torch.randn(2, 11, 3, 6).to(dtype), strided[..., :6], torch.randn(2, 3, 11, 6).to(dtype).transpose(1, 2)):
        before, turn = x.clone(), units.Turn(cos, sin, x)
        expected, truth = rotated(x, cos, sin), rotated(x.double(), cos.double(), sin.double())
        actual = turn(x)
        assert_within_promise(actual, expected, truth)
        assert torch.equal(x, before) and torch.equal(turn(x, overwrite=True), actual)
        assert torch.equal(x, actual) or x.stride(-1) != 1


def test_turn_gradients() -> None:
    cos, sin = tables(5, 8, heads=2)
    x = torch.randn(2, 5, 2, 8)

    def reference(x: Tensor) -> Tensor:
        return rotated(x, cos.to(x.dtype), sin.to(x.dtype))

    assert_gradients_within_promise(lambda x: units.Turn(cos, sin, x)(x), reference, [x], names=["x"])
    assert_gradients_within_promise(
        lambda x, c, s: units.Turn(c, s, x)(x), rotated, [x, cos.clone(), sin.clone()], names=["x", "cos", "sin"]
    )


@pytest.mark.parametrize("keys", [7, 4], ids=["one-call", "two-calls"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_norm_across_heads(keys: int, overwrite: bool) -> None:
    norms = (nn.RMSNorm(24, eps=1e-5), nn.RMSNorm(24, eps=1e-5))
    q, k = torch.randn(2, 7, 24), torch.randn(2, keys, 24)
    with torch.no_grad():
        for norm in norms:
            norm.weight.normal_()
        expected = [norm(x) for norm, x in zip(norms, (q, k), strict=True)]
        truth = [norm.double()(x.double()) for norm, x in zip(norms, (q, k), strict=True)]
        pair = (norms[0].float(), norms[1].float())
        actual = units.norm_across_heads(q.clone(), k.clone(), pair, 3, "auto", overwrite)
    for found, same, exact in zip(actual, expected, truth, strict=True):
        assert found.shape[2:] == (3, 8)
        assert_within_promise(found.flatten(2), same, exact)


def test_alternate_rows() -> None:
    x, tables = torch.zeros(3, 5, 1), torch.zeros(6, 1)
    rows = units.alternate(2, x, tables)
    assert rows.tolist() == [[0, 0, 1, 1, 1], [2, 2, 3, 3, 3], [4, 4, 5, 5, 5]] and rows.dtype == torch.int32
    assert units.alternate(2, x, tables[:2]).tolist() == [[0, 0, 1, 1, 1]] * 3


def test_may_overwrite() -> None:
    layer, hooked = nn.Linear(2, 2), nn.Linear(2, 2)
    hooked.register_forward_hook(lambda m, i, o: None)
    assert not units.may_overwrite(layer)
    with torch.no_grad():
        assert units.may_overwrite(layer, nn.LayerNorm(2))
        assert not units.may_overwrite(layer, hooked) and not units.may_overwrite(layer, nn.Identity())
