# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend by itself: `vidkernels.dispatch` with backends and devices that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vidkernels import _library, dispatch, ops
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


@pytest.mark.parametrize(
    ("built", "serves", "refuses"),
    [
        ("8.0;9.0a;10.0a+PTX", "8.0 8.6 8.9 9.0 10.0", "7.5 10.3 12.0"),
        ("9.0a", "9.0", "8.0 9.1 10.0"),
        ("8.0+PTX", "8.0 8.6 9.0 10.0 12.0", "7.5"),
        ("8.6, 10.0f", "8.6 8.9 10.0 10.3", "8.0 9.0 12.0"),
        ("90", "9.0", "8.0 10.0"),
        ("", "7.5 9.0 12.0", ""),  # not known: a call says it
    ],
)
def test_architectures_of_the_cuda_library(
    built: str, serves: str, refuses: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A library built for other GPUs is passed over, not asked for a kernel that it has not."""
    (tmp_path / "_build_info.json").write_text(json.dumps({"arch_list": built}))
    monkeypatch.setattr(_library, "folder", lambda: tmp_path)
    monkeypatch.setattr(_library, "CUDA_ARCHITECTURES", _library._built_architectures())
    for number in serves.split():
        assert _library.cuda_serves(tuple(map(int, number.split(".")))), number
    for number in refuses.split():
        assert not _library.cuda_serves(tuple(map(int, number.split(".")))), number


def test_a_gpu_that_the_library_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "cuda_missing", None)
    monkeypatch.setattr(_library, "CUDA_ARCHITECTURES", ("9.0a",))
    monkeypatch.setattr(dispatch, "capability", lambda device: (8, 0))
    dispatch._no_code_for.cache_clear()
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.float32)
    reason = dispatch.cuda()(x)
    dispatch._no_code_for.cache_clear()
    assert reason == (
        "the CUDA library was built for compute capability 9.0a, this GPU has 8.0; build it with TORCH_CUDA_ARCH_LIST=8.0"
    )
