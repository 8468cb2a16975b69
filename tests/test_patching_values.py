# SPDX-License-Identifier: Apache-2.0
"""What patched models read from a table once is read again after a write to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_patching_allegro
import test_patching_skyreels
import test_patching_wan
import torch
from patching_suite import ModelSuite, cast, no_fallback  # noqa: F401

from vidkernels.patching._values import ReadOnce


def test_read_again_after_a_write() -> None:
    read: list[list[float]] = []
    total = ReadOnce(lambda *parts: read.append([float(part) for part in parts]) or sum(read[-1]))
    a, b = torch.tensor(1.0), torch.tensor(2.0)
    assert [total(a, b), total(a, b)] == [3, 3] and len(read) == 1
    b.add_(1)
    assert total(a, b) == 4
    a.data = torch.tensor(5.0)
    assert total(a, b) == 8 and total(a, 1.0) == 6
    with torch.inference_mode():
        assert total(torch.tensor(7.0), b) == 10


def halve(table: torch.Tensor) -> None:
    table.mul_(0.5)


def replace(table: torch.Tensor) -> None:
    table.data = table.data * 0.5


@pytest.mark.parametrize("change", [halve, replace])
@pytest.mark.parametrize("suite", [test_patching_wan.TestWan, test_patching_skyreels.TestSkyReels])
def test_tables_of_a_model(suite: type[ModelSuite], change: Callable[[torch.Tensor], Any]) -> None:
    """Those who stretch a rotation write into its buffers; the patched model went on rotating by positions."""
    made = suite()
    model, plain, arguments = made.ready(), made.ready(), made.inputs()
    made.patch(model)
    with torch.no_grad():
        before = model(**arguments).sample
        for rope in (model.rope, plain.rope):
            change(rope.freqs_cos)
            change(rope.freqs_sin)
        expected = plain(**arguments).sample
        assert not torch.allclose(before, expected, atol=1e-4)
        torch.testing.assert_close(model(**arguments).sample, expected, atol=1e-5, rtol=1e-4)


def test_tables_among_the_inputs() -> None:
    made = test_patching_allegro.TestAllegro()
    model, plain = made.ready().bfloat16(), made.ready().bfloat16()
    arguments = cast(made.inputs(), torch.bfloat16)
    arguments["image_rotary_emb"] = made.inputs()["image_rotary_emb"]
    made.patch(model)
    with torch.no_grad():
        before = model(**arguments).sample
        for cos, sin in arguments["image_rotary_emb"][0]:
            cos.mul_(0.2)
            sin.mul_(0.2)
        expected, actual = plain(**arguments).sample, model(**arguments).sample
        assert (before - expected).abs().max() > 4 * (actual - expected).abs().max()
