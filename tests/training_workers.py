# SPDX-License-Identifier: Apache-2.0
"""Programs that the tests of the training engine run in processes of their own."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from vidkernels.training import OptimizerConfig, Processes, Task, TrainConfig, Trainer

SETTINGS = TrainConfig(
    steps=6, batch=8, seed=3, save_every=3, log_every=1, ema=0.9, optimizers={"default": OptimizerConfig(0.02)}
)


class Numbers:
    """Samples that depend on the draw alone."""

    def __len__(self) -> int:
        return 21

    def __getitem__(self, draw: Any) -> torch.Tensor:
        return torch.randn(6, generator=draw.generator())


class Autoencoder(Task):
    """Two blocks that FSDP2 gathers one at a time, and a critic of another name."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        blocks = [nn.Sequential(nn.Linear(6, 10), nn.Tanh()), nn.Sequential(nn.Linear(10, 6))]
        self.modules: dict[str, nn.Module] = {"model": nn.Sequential(*blocks), "critic": nn.Linear(6, 1)}

    def units(self, name: str) -> list[nn.Module]:
        return list(self.modules["model"]) if name == "model" else []

    def losses(self, name: str, modules: Any, batch: Any, context: Any) -> Any:
        noise = torch.stack([torch.randn(6, generator=d.generator(purpose=4)) for d in context.draws])
        if name == "critic":
            return (modules["critic"](context.memo["out"]) - batch.mean(1, keepdim=True)).square().mean(), {}
        out = modules["model"](batch + 0.1 * noise)
        context.memo["out"] = out.detach()
        return (out - batch).square().mean() + 0.1 * modules["critic"](out).square().mean(), {}


def _rank(rank: int, world: int, folder: str, steps: int, parallel: str, accumulate: int, out: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}.init", rank=rank, world_size=world)
    settings = dataclasses.replace(SETTINGS, steps=steps, parallel=parallel, accumulate=accumulate)
    trainer = Trainer(Autoencoder(), settings, Numbers(), folder, resume=True, processes=Processes.current("cpu"))
    start = trainer.step
    trainer.run()
    states = {n: trainer.full_state_dict(n, averaged=a) for n in ("model", "critic") for a in (False,)}
    averages = {f"{n} averaged": trainer.full_state_dict(n) for n in ("model", "critic")}
    if rank == 0:
        torch.save({"start": start, **states, **averages}, out)
    if world > 1:
        dist.destroy_process_group()


def run(world: int, folder: Path, steps: int, parallel: str, out: Path, accumulate: int = 1) -> dict[str, Any]:
    """Train in `world` processes; returns the first step and the whole weights."""
    mp.start_processes(
        _rank, (world, str(folder), steps, parallel, accumulate, str(out)), nprocs=world, start_method="spawn"
    )
    return torch.load(out)


if __name__ == "__main__":
    sys.exit("imported by tests/test_training_distributed.py")
