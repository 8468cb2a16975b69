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

from vidkernels._exports import lazy

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
__getattr__, __dir__ = lazy(__name__, _EXPORTS)
