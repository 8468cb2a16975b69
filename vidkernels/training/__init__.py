# SPDX-License-Identifier: Apache-2.0
"""Training of tokenizers and transformers: one small engine over torch's own pieces.

    from vidkernels.training import Task, Trainer, TrainConfig

    class MyTask(Task):
        def __init__(self, model):
            self.modules = {"model": model}              # trained in this order, each by its own loss and optimizer

        def losses(self, name, modules, batch, context):
            noise = [draw.generator(context.device) for draw in context.draws]     # belong to the samples
            loss = modules["model"](batch).square().mean()                         # through forward: DDP and FSDP2 work there
            return loss, {"mean_square": loss.detach()}                            # scalars for metrics.jsonl

        def units(self, name):                           # optional: what FSDP2 gathers one at a time
            return self.modules[name].blocks

        def validate(self, modules, context):            # optional: numbers every `validate_every` steps, averaged weights
            return {"psnr": ...}

    config = TrainConfig(steps=1000, batch=8, precision="bfloat16", parallel="fsdp", save_every=100)
    trainer = Trainer(MyTask(model), config, dataset, "runs/first", resume=True, collate=None, facts={"model": {...}})
    result = trainer.run()                               # Result(step, stopped, metrics)
    weights = trainer.full_state_dict("model")           # whole, on the CPU, averaged

* `dataset[draw]` gets a `Draw(index, seed, position)`: `draw.generator()` decides crops and start frames.
* `config.batch` counts the samples of all processes. Order of the data and random numbers follow from (seed, step) and
  (seed, sample), so that a run killed at any point and resumed from its newest checkpoint repeats the same numbers, and a
  run resumed on another number of processes sees the same samples.
* Under torchrun processes are found by themselves; `parallel` chooses DDP or FSDP2. Checkpoints reshard.
* A checkpoint is the modules, optimizers, averages (torch.distributed.checkpoint), and step, settings and loss scale (JSON).
* SIGTERM and SIGINT end the run after the current step, with a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vidkernels._exports import lazy

if TYPE_CHECKING:
    from vidkernels.training.checkpoint import Checkpoints as Checkpoints
    from vidkernels.training.config import OptimizerConfig as OptimizerConfig
    from vidkernels.training.config import TrainConfig as TrainConfig
    from vidkernels.training.data import Draw as Draw
    from vidkernels.training.data import ResumableOrder as ResumableOrder
    from vidkernels.training.data import mixed_seed as mixed_seed
    from vidkernels.training.ema import EMA as EMA
    from vidkernels.training.engine import Result as Result
    from vidkernels.training.engine import StepContext as StepContext
    from vidkernels.training.engine import Task as Task
    from vidkernels.training.engine import Trainer as Trainer
    from vidkernels.training.metrics import psnr as psnr
    from vidkernels.training.metrics import ssim as ssim
    from vidkernels.training.parallel import Processes as Processes

_EXPORTS: dict[str, str] = {
    "Checkpoints": "vidkernels.training.checkpoint",
    "Draw": "vidkernels.training.data",
    "EMA": "vidkernels.training.ema",
    "OptimizerConfig": "vidkernels.training.config",
    "Processes": "vidkernels.training.parallel",
    "ResumableOrder": "vidkernels.training.data",
    "Result": "vidkernels.training.engine",
    "StepContext": "vidkernels.training.engine",
    "Task": "vidkernels.training.engine",
    "TrainConfig": "vidkernels.training.config",
    "Trainer": "vidkernels.training.engine",
    "mixed_seed": "vidkernels.training.data",
    "psnr": "vidkernels.training.metrics",
    "ssim": "vidkernels.training.metrics",
}

__all__ = sorted(_EXPORTS)
if not TYPE_CHECKING:  # type checkers know the names above, and no others
    __getattr__, __dir__ = lazy(__name__, _EXPORTS)
