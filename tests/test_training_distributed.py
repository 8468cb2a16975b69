# SPDX-License-Identifier: Apache-2.0
"""The training engine on several processes: DDP and FSDP2 equal one process, checkpoints reshard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training_workers as workers

from vidkernels.training.metrics import read_lines


def assert_close(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Weights after a few steps: sums over the batch are taken in another order, and Adam divides by their square root."""
    for name in ("model", "critic", "model averaged", "critic averaged"):
        for key, value in a[name].items():
            torch.testing.assert_close(value, b[name][key], rtol=1e-4, atol=1e-5)


def losses(folder: Path) -> list[float]:
    return [line["model_loss"] for line in read_lines(folder / "metrics.jsonl")]


def test_fsdp_saved_on_two_resumes_on_one(tmp_path: Path) -> None:
    whole = workers.run(1, tmp_path / "one", 6, "none", tmp_path / "one.pt")
    workers.run(2, tmp_path / "two", 3, "fsdp", tmp_path / "half.pt")
    rest = workers.run(1, tmp_path / "two", 6, "none", tmp_path / "rest.pt")
    assert rest["start"] == 3
    assert_close(whole, rest)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_saved_on_four_resumes_on_two(parallel: str, tmp_path: Path) -> None:
    whole = workers.run(1, tmp_path / "one", 6, "none", tmp_path / "one.pt")
    workers.run(4, tmp_path / "four", 3, parallel, tmp_path / "half.pt")
    rest = workers.run(2, tmp_path / "four", 6, parallel, tmp_path / "rest.pt", accumulate=2)
    assert rest["start"] == 3
    assert_close(whole, rest)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
