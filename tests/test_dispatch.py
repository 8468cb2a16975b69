# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend by itself: `vidkernels.dispatch` with backends and devices that are not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vidkernels import dispatch, ops
from vidkernels.errors import VidkernelsFallbackWarning


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, dispatch.Predicate]:
    """Backends of an op; it leaves no trace."""
    monkeypatch.setattr(dispatch, "_DISPATCHERS", {})
    return {
        "asleep": lambda x, *facts: "it sleeps",
        "by_name": dispatch.always,
        "reference": dispatch.always,
    }


def test_a_fallback_gives_reasons_only(table: dict[str, dispatch.Predicate]) -> None:
    """A backend that could serve, behind the reference in a call's rank, has none."""
    op = dispatch.Dispatcher("toy", facts=lambda x: (x,), backends=table, rank=lambda x: ("asleep", "reference"))
    with pytest.warns(VidkernelsFallbackWarning) as caught:
        assert op.select("auto", torch.zeros(1)) == "reference"
    assert str(caught[0].message) == "toy runs on the reference backend. asleep: it sleeps."


def test_ranks(table: dict[str, dispatch.Predicate]) -> None:
    """Names that no table knows are left out, those that a rank leaves out come after it."""
    plain = dispatch.Dispatcher("plain", facts=lambda x: (x,), backends=table)
    ranked = dispatch.Dispatcher("ranked", facts=lambda x: (x,), backends=table, rank=lambda x: ("gone", "by_name"))
    assert list(plain.order(1)) == list(table)
    assert list(dict.fromkeys(ranked.order(1))) == ["by_name", "asleep", "reference"]


@pytest.mark.parametrize("op", [ops.causal_conv3d, ops.upsample_conv3d, ops.lfq_entropy, ops.fsq_entropy])
def test_ops_of_pytorch_where_they_are_not_registered(op: Any) -> None:
    """Bare ops made of PyTorch's have kernels for CPU and CUDA; on other devices the reference serves."""
    serves = dispatch.dispatchers()[op.__name__].backends["torch"]
    for name, reason in {
        "mps": "it runs on cpu and cuda tensors, got mps",
        "cpu": None,
        "cuda": None,
        "meta": None,
    }.items():
        assert serves(SimpleNamespace(device=torch.device(name))) == reason
