# SPDX-License-Identifier: Apache-2.0
"""Programs that the tests of transformer training run in processes of their own."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training_workers import in_processes

from vidkernels.models.transformers.goku import Goku, GokuConfig
from vidkernels.training import OptimizerConfig, Processes, TrainConfig, Trainer
from vidkernels.training.dit import DiTTask, FlowConfig
from vidkernels.training.dit_data import LatentDataset, Sample
from vidkernels.training.dit_sequence import Sequence

SETTINGS = TrainConfig(
    steps=6, batch=8, seed=3, save_every=3, log_every=1, ema=0.9, validate_every=6,
    optimizers={"default": OptimizerConfig(0.003, betas=(0.9, 0.9))},
)  # fmt: skip
# (T, H, W) of the latents: images and videos of several sizes, odd totals, so that slices are padded.
SIZES = ((1, 4, 4), (3, 4, 6), (2, 6, 4), (1, 2, 6), (2, 2, 2), (1, 6, 6), (5, 2, 2))
FLOW = FlowConfig(shift=2.0, dropout=0.3)


def dataset() -> LatentDataset:
    """Random latents of three classes."""
    generator = torch.Generator().manual_seed(11)
    samples = [Sample(torch.randn(4, *size, generator=generator), i % 3) for i, size in enumerate(SIZES)]
    return LatentDataset(samples, samples[:3], ("a", "b", "c"))


def model(**changes: Any) -> Goku:
    """Two blocks; nothing is left at zero, so that every gradient flows."""
    torch.manual_seed(5)
    config = {"depth": 2, "hidden_size": 32, "num_heads": 4, "in_channels": 4, "text_channels": None, "num_classes": 3}
    made = Goku(GokuConfig(**{**config, **changes}))
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    return made


def _rank(
    rank: int,
    world: int,
    folder: str,
    steps: int,
    parallel: str,
    degree: int,
    checkpointing: Any,
    accumulate: int,
    out: str,
) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}.init", rank=rank, world_size=world)
    settings = dataclasses.replace(SETTINGS, steps=steps, parallel=parallel, accumulate=accumulate)
    processes = Processes.current("cpu")
    data, transformer = dataset(), model()
    transformer.gradient_checkpointing = checkpointing
    task = DiTTask(transformer, FLOW, data.validation, Sequence.of(degree, processes))
    trainer = Trainer(task, settings, data, folder, resume=True, processes=processes, collate=list)
    start = trainer.step
    trainer.run()
    states = {"model": trainer.full_state_dict("model", averaged=False), "averaged": trainer.full_state_dict("model")}
    if rank == 0:
        torch.save({"start": start, **states}, out)
    if world > 1:
        dist.destroy_process_group()


def run(
    world: int, folder: Path, steps: int, out: Path, parallel: str = "none", degree: int = 1, checkpointing: Any = False,
    accumulate: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Train in `world` processes; returns the first step and the whole weights."""
    in_processes(_rank, world, (world, str(folder), steps, parallel, degree, checkpointing, accumulate, str(out)))
    return torch.load(out)


if __name__ == "__main__":
    sys.exit("imported by tests/test_training_dit.py")
