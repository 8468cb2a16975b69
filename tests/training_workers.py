# SPDX-License-Identifier: Apache-2.0
"""Programs that the tests of the training engine run in processes of their own."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from vidkernels.training import OptimizerConfig, Processes, Task, TrainConfig, Trainer

SETTINGS = TrainConfig(
    steps=6,
    batch=8,
    seed=3,
    save_every=3,
    log_every=1,
    validate_every=2,
    ema=0.9,
    optimizers={"default": OptimizerConfig(0.02)},
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

    def validate(self, modules: Any, context: Any) -> dict[str, float]:
        x = torch.linspace(-1, 1, 18).view(3, 6)
        return {"error": float((modules["model"](x) - x).square().mean())}


class Clips:
    """Random clips that depend on the draw alone."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, draw: Any) -> torch.Tensor:
        return torch.rand(3, 5, 24, 24, generator=draw.generator()) * 2 - 1


def tokenizer_task(adaptive: bool) -> Task:
    """MAGVIT-v2 at tiny width against a 3-D patch discriminator with R1 and LeCam."""
    from vidkernels.training.tokenizer import LossConfig, TokenizerTask, make_tokenizer

    torch.manual_seed(5)
    values = {"kind": "magvit2", "channels": 8, "channel_multipliers": [1, 2, 2], "residual_blocks": 1}
    game = {
        "discriminator": "patch3d",
        "discriminator_channels": 4,
        "discriminator_layers": 2,
        "adversarial_weight": 0.05,
    }
    loss = LossConfig(
        **game,
        adversarial="nonsaturating",
        r1_weight=0.1,
        lecam_weight=0.1,
        adaptive=adaptive,
        entropy_weight=0.5,
        entropy_temperature=2.0,
    )
    return TokenizerTask(make_tokenizer({**values, "bits": 6, "temporal_down": [False, True]}), loss, (5, 24, 24))


def quantizer_rank(rank: int, world: int, out: str) -> None:
    """One update of a moving-average codebook from a part of the batch."""
    from vidkernels.models.tokenizers._quantizer import VectorQuantizer

    dist.init_process_group("gloo", init_method=f"file://{out}.init", rank=rank, world_size=world)
    torch.manual_seed(3)
    quantizer, z = VectorQuantizer(5, 4, ema=0.5).train(), torch.randn(world * 6, 4)
    quantizer(z[rank * 6 : rank * 6 + 6])
    torch.save(quantizer.state_dict(), f"{out}.{rank}")
    dist.destroy_process_group()


def _rank(rank: int, world: int, folder: str, steps: int, parallel: str, accumulate: int, out: str, kind: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}.init", rank=rank, world_size=world)
    settings = dataclasses.replace(SETTINGS, steps=steps, parallel=parallel, accumulate=accumulate)
    toy = kind == "toy"
    task, data = Autoencoder() if toy else tokenizer_task(kind == "adaptive"), Numbers() if toy else Clips()
    if not toy:
        settings = dataclasses.replace(settings, batch=2, optimizers={"default": OptimizerConfig(0.001)})
    trainer = Trainer(task, settings, data, folder, resume=True, processes=Processes.current("cpu"))
    start = trainer.step
    trainer.run()
    states = {n: trainer.full_state_dict(n, averaged=a) for n in task.modules for a in (False,)}
    averages = {f"{n} averaged": trainer.full_state_dict(n) for n in task.modules}
    if rank == 0:
        torch.save({"start": start, **states, **averages}, out)
    if world > 1:
        dist.destroy_process_group()


def in_processes(rank: Callable[..., None], world: int, arguments: tuple[Any, ...]) -> None:
    """`rank(number, *arguments)` in `world` processes; one alone is this one, whose threads it gets back."""
    if world > 1:
        mp.start_processes(rank, arguments, nprocs=world, start_method="spawn")
        return
    threads = torch.get_num_threads()
    rank(0, *arguments)
    torch.set_num_threads(threads)


def run(
    world: int, folder: Path, steps: int, parallel: str, out: Path, accumulate: int = 1, kind: str = "toy"
) -> dict[str, Any]:
    """Train in `world` processes; returns the first step and the whole weights."""
    in_processes(_rank, world, (world, str(folder), steps, parallel, accumulate, str(out), kind))
    return torch.load(out)


if __name__ == "__main__":
    sys.exit("imported by tests/test_training_distributed.py")
