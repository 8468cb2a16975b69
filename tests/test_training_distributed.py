# SPDX-License-Identifier: Apache-2.0
"""The training engine on several processes: DDP and FSDP2 equal one process, checkpoints reshard."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import training_workers as workers

from vidkernels.errors import TrainingError
from vidkernels.training.metrics import read_lines
from vidkernels.training.parallel import attempt_store


def assert_close(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Weights after a few steps: sums over the batch are taken in another order, and Adam divides by their square root."""
    for name in a.keys() - {"start"}:
        for key, value in a[name].items():
            torch.testing.assert_close(value, b[name][key], rtol=1e-4, atol=1e-5)


def losses(folder: Path, key: str = "model_loss") -> list[float]:
    return [line[key] for line in read_lines(folder / "metrics.jsonl") if key in line]


def test_fsdp_saved_on_two_resumes_on_one(tmp_path: Path) -> None:
    whole = workers.run(1, tmp_path / "one", 6, "none", tmp_path / "one.pt")
    workers.run(2, tmp_path / "two", 3, "fsdp", tmp_path / "half.pt")
    rest = workers.run(1, tmp_path / "two", 6, "none", tmp_path / "rest.pt")
    assert rest["start"] == 3
    assert_close(whole, rest)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    # Validation computes with the averages, and leaves the weights to train on.
    errors = losses(tmp_path / "two", "error")
    assert errors[0] == pytest.approx(losses(tmp_path / "one", "error")[0], rel=1e-5)
    assert errors[-1] == pytest.approx(losses(tmp_path / "one", "error")[-1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_saved_on_four_resumes_on_two(parallel: str, tmp_path: Path) -> None:
    whole = workers.run(1, tmp_path / "one", 6, "none", tmp_path / "one.pt")
    workers.run(4, tmp_path / "four", 3, parallel, tmp_path / "half.pt")
    rest = workers.run(2, tmp_path / "four", 6, parallel, tmp_path / "rest.pt", accumulate=2)
    assert rest["start"] == 3
    assert_close(whole, rest)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_a_tokenizer_and_its_discriminator_train_on_two_processes_as_on_one(parallel: str, tmp_path: Path) -> None:
    kind = "adaptive" if parallel == "ddp" else "tokenizer"
    one = workers.run(1, tmp_path / "one", 3, "none", tmp_path / "one.pt", kind=kind)
    two = workers.run(2, tmp_path / "two", 3, parallel, tmp_path / "two.pt", kind=kind)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    for name in ("model", "discriminator"):
        # At 8 channels a norm's groups are single channels, which cancel the bias of the convolution before them: its
        # gradient is rounding noise, and Adam gives noise the size of the rate. Kernels have gradients of their own.
        for key, value in one[name].items():
            if value.ndim > 2:
                assert (value - two[name][key]).abs().mean() < 1e-5, key


@pytest.mark.slow
def test_moving_average_codebook_is_one_on_all_ranks(tmp_path: Path) -> None:
    from vidkernels.models.tokenizers._quantizer import VectorQuantizer

    out = str(tmp_path / "quantizer")
    torch.multiprocessing.start_processes(workers.quantizer_rank, (2, out), nprocs=2, start_method="spawn")
    torch.manual_seed(3)
    whole, z = VectorQuantizer(5, 4, ema=0.5).train(), torch.randn(12, 4)
    whole(z)
    for rank in range(2):
        for key, value in torch.load(f"{out}.{rank}").items():
            torch.testing.assert_close(value, whole.state_dict()[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("late", [0, 2])
def test_a_restart_does_not_read_what_the_killed_processes_wrote(late: int) -> None:
    """torchrun's store outlives them; whoever comes first finds an old address in it, and must wait for the new one."""
    server = dist.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=20))

    def start(rank: int, attempt: int) -> str:
        client = dist.TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=20))
        time.sleep(0.1 * (rank == late))
        own = attempt_store(client, rank, 3)
        if rank == late:
            time.sleep(0.1)
            own.set("address", f"of attempt {attempt}")
        return own.get("address").decode()

    with ThreadPoolExecutor(3) as pool:
        for attempt in range(3):
            found = [task.result(30) for task in [pool.submit(start, rank, attempt) for rank in range(3)]]
            assert found == [f"of attempt {attempt}"] * 3


def test_a_process_that_never_starts_is_named() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(TrainingError, match=r"processes \[1\] of 2 did not start within"):
        attempt_store(store, 0, 2)
