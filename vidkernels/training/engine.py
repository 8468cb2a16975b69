# SPDX-License-Identifier: Apache-2.0
"""The loop: micro-batches, autocast, several modules trained in turn, averages, checkpoints, metrics, signals."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vidkernels import _files
from vidkernels.errors import TrainingError
from vidkernels.training.checkpoint import Checkpoints, Trained
from vidkernels.training.config import TrainConfig
from vidkernels.training.data import Draw, loader, mixed_seed, to_device
from vidkernels.training.ema import EMA
from vidkernels.training.metrics import MetricLog
from vidkernels.training.parallel import Processes, accumulating, bare, parallelize, whole

# What may differ between a run and its continuation: nothing that changes which numbers are computed from which samples.
CHANGEABLE = {
    "steps",
    "save_every",
    "keep",
    "log_every",
    "validate_every",
    "workers",
    "accumulate",
    "parallel",
    "max_skipped",
}

# float16: steps that the loss scale may need to come down from GradScaler's initial 65536 to 1.
HALVINGS = 16


@dataclass
class StepContext:
    """What a loss is told about its micro-batch.

    Attributes:
        step: optimizer steps done so far.
        draws: how each sample was drawn; `draws[i].generator(device)` gives random numbers that belong to the sample,
            whichever process computes it.
        memo: results that a module's turn leaves for the turns after it, for example the reconstruction.
        device: of the batch.
    """

    step: int
    draws: list[Draw]
    device: torch.device
    memo: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """Base class of what is trained: its modules and their losses. In each step every module is trained by its own loss, in order.

    Call a trained module only through its `forward`: that is where DDP and FSDP2 do their work.
    """

    modules: dict[str, nn.Module]

    @abstractmethod
    def losses(
        self, name: str, modules: Mapping[str, nn.Module], batch: Any, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Loss of one module over a micro-batch (a mean over its samples), and scalars to log; None skips it in this step.

        `modules` are the wrapped ones. Parameters of the other modules get no gradient.
        """

    def units(self, name: str) -> Iterable[nn.Module] | None:
        """FSDP2: submodules to gather one at a time, inner ones first; their `forward` must be what is called.

        None replicates the module (DDP) next to sharded ones. A module that is differentiated twice needs that, because FSDP2
        frees gathered weights after the first backward.
        """
        return ()

    def validate(self, modules: Mapping[str, nn.Module], context: StepContext) -> dict[str, float]:
        """Numbers to log every `validate_every` steps; weights are the averages where there are any, in eval mode."""
        return {}


@dataclass(frozen=True)
class Result:
    """How a run ended: steps done, whether a signal ended it early, and the last line of metrics."""

    step: int
    stopped: bool
    metrics: dict[str, Any]


class Trainer:
    """Runs a task to `config.steps`, from its newest checkpoint if there is one.

    Args:
        task: modules and losses. dataset: `dataset[Draw]` gives a sample, `len(dataset)` their number.
        folder: of the run: `config.json`, `metrics.jsonl`, `checkpoints/`.
        resume: continue from the folder's newest checkpoint; without it a folder with checkpoints is refused.
        collate: list of samples -> micro-batch. Default: torch's.
        processes: default: those of torch.distributed or torchrun.
        facts: stored in `config.json` and every checkpoint (the model's configuration, for instance).

    Raises:
        TrainingError: the folder holds another run, a checkpoint does not fit, or gradients stay not finite.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        dataset: Any,
        folder: str | Path,
        *,
        resume: bool = False,
        collate: Callable[[list[Any]], Any] | None = None,
        processes: Processes | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.task, self.config, self.dataset, self.collate = task, config, dataset, collate
        self.processes = processes or Processes.current()
        self.folder = Path(folder)
        config.micro_batch(self.processes.world)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.processes, config.keep)
        steps = self.processes.of_first(self.checkpoints.steps())
        if steps and not resume:
            raise TrainingError(f"{self.folder}: holds a run at step {steps[-1]}; resume it or name another folder")
        self.facts = json.loads(json.dumps(facts or {}))
        # Nothing is wrapped or changed before the folder is known to fit.
        saved = self.checkpoints.facts(steps[-1]) if steps else None
        if saved is not None:
            self._check_same_run(saved)
        device_type = self.processes.device.type
        self.scaler = torch.amp.GradScaler(device_type, enabled=config.precision == "float16")
        self.modules = {
            name: parallelize(module, config, self.processes, task.units(name)) for name, module in task.modules.items()
        }
        self.parts = {name: self._trained(name, bare(module)) for name, module in self.modules.items()}
        self.step, self.skipped = 0, 0
        if saved is not None:
            self.checkpoints.load(steps[-1], self.parts)
            self.step, self.skipped = saved["step"], saved["skipped"]
            self.scaler.load_state_dict(saved["scaler"])

    def _trained(self, name: str, module: nn.Module) -> Trained:
        settings = self.config.optimizer(name)
        trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
        if not trained:
            raise TrainingError(f"module {name!r} has no parameter that requires a gradient")
        optimizer = torch.optim.AdamW(
            trained.values(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        return Trained(module, optimizer, None if self.config.ema is None else EMA(trained, self.config.ema))

    def _check_same_run(self, saved: dict[str, Any]) -> None:
        before, now = {**saved["train"], **saved["facts"]}, {**self.config.to_dict(), **self.facts}
        differing = sorted(k for k in {*before, *now} - CHANGEABLE if before.get(k) != now.get(k))
        if differing:
            key = differing[0]
            raise TrainingError(
                f"{self.folder}: was begun with {key} = {before.get(key)!r}, not {now.get(key)!r}"
                f" ({len(differing)} settings differ: {', '.join(differing)})"
            )

    def save(self) -> None:
        """A checkpoint of this step, unless there is one."""
        # The first process looks for all: on a shared disk one may not see yet what another has written, and saving is collective.
        if self.step in self.processes.of_first(self.checkpoints.steps()):
            return
        numbers = {"scaler": self.scaler.state_dict(), "skipped": self.skipped}
        self.checkpoints.save(self.step, self.parts, {"train": self.config.to_dict(), "facts": self.facts, **numbers})

    def full_state_dict(self, name: str, *, averaged: bool = True) -> dict[str, Tensor]:
        """Whole tensors of a trained module on the CPU; all ranks must call it."""
        return self.parts[name].full_state_dict(averaged)

    def run(self) -> Result:
        """Train; returns at the last step, or after a checkpoint when SIGTERM or SIGINT came."""
        main, stopped, line = self.processes.rank == 0, False, {}
        if main:
            settings = {"train": self.config.to_dict(), **self.facts}
            _files.write_text(self.folder / "config.json", json.dumps(settings, indent=1) + "\n")
            log = MetricLog(self.folder / "metrics.jsonl", self.step)
        batches = iter(
            loader(self.dataset, self.config, self.step, self.processes.rank, self.processes.world, self.collate)
        )
        with signals() as asked, _progress(self.config.steps, self.step, main) as show:
            begin = time.perf_counter()
            while self.step < self.config.steps and not stopped:
                values = self._one_step(batches)
                self.step += 1
                final = self.step == self.config.steps
                every = self.config.validate_every
                validating = bool(every) and (self.step % every == 0 or final)
                if self.step % self.config.log_every == 0 or final or validating or self.step == 1:
                    line = self.processes.mean({key: float(value) for key, value in values.items()})
                    line |= {"seconds": round(time.perf_counter() - begin, 3)}
                    line |= self.validate() if validating else {}
                    if main:
                        log.write(self.step, line)
                    begin = time.perf_counter()
                show(self.step, line)
                stopped = self.processes.any(bool(asked))
                if self.step % self.config.save_every == 0 or final or stopped:
                    self.save()
        return Result(self.step, stopped and self.step < self.config.steps, line)

    def validate(self) -> dict[str, float]:
        """The task's own measures, with the averaged weights."""
        context = StepContext(self.step, [], self.processes.device)
        with ExitStack() as stack, torch.no_grad(), self._autocast():
            for part in self.parts.values():
                if part.ema is not None:
                    stack.enter_context(part.ema.swapped())
            modes = {name: module.training for name, module in self.modules.items()}
            try:
                for module in self.modules.values():
                    module.eval()
                return self.processes.mean(self.task.validate(self.modules, context))
            finally:
                for name, module in self.modules.items():
                    module.train(modes[name])
                    if isinstance(module, FSDPModule):
                        # Without a backward pass the root keeps its gathered weights: the averages would be trained on.
                        module.reshard()

    def _one_step(self, batches: Iterator[Any]) -> dict[str, Tensor | float]:
        # A function of the step: a resumed run continues with the same numbers without any stored generator.
        torch.manual_seed(mixed_seed(self.config.seed, 3, self.step, self.processes.rank))
        device = self.processes.device
        work = []
        for _ in range(self.config.accumulate):
            batch, draws = next(batches)
            work.append((to_device(batch, device), StepContext(self.step, draws, device)))
        values: dict[str, Tensor | float] = {}
        turns = [self._turn(name, work, values) for name in self.modules]
        moved = [finite for finite in turns if finite is not None]
        if moved:
            self.skipped = 0 if all(moved) else self.skipped + 1
            if self.scaler.is_enabled():
                self.scaler.update()
        if self.skipped >= self.config.max_skipped + (HALVINGS if self.scaler.is_enabled() else 0):
            raise TrainingError(f"step {self.step}: {self.skipped} steps in a row without a finite gradient")
        return values

    def _autocast(self) -> torch.autocast:
        device, precision = self.processes.device.type, self.config.precision
        return torch.autocast(device, self.config.dtype, enabled=precision != "float32")

    def _turn(self, name: str, work: list[tuple[Any, StepContext]], values: dict[str, Any]) -> bool | None:
        """One optimizer step of one module. False: its gradient was not finite and nothing moved. None: it has no loss now."""
        part, settings = self.parts[name], self.config.optimizer(name)
        with frozen(p.module for other, p in self.parts.items() if other != name):
            for index, (batch, context) in enumerate(work):
                with accumulating(self.modules[name], index + 1 == len(work)):
                    with self._autocast():
                        found = self.task.losses(name, self.modules, batch, context)
                    if found is None:
                        return None
                    loss, scalars = found
                    self.scaler.scale(loss / len(work)).backward()
                for key, value in {f"{name}_loss": loss, **scalars}.items():
                    values[key] = values.get(key, 0.0) + value.detach().float() / len(work)
        rate = settings.rate(self.step, self.config.steps)
        for group in part.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(part.optimizer)
        limit = math.inf if settings.clip is None else settings.clip
        norm = whole(torch.nn.utils.clip_grad_norm_([p for p in part.module.parameters() if p.grad is not None], limit))
        finite = bool(torch.isfinite(norm))
        if finite:
            self.scaler.step(part.optimizer)
            if part.ema is not None:
                part.ema.update(self.step)
        for other in self.parts.values():
            other.optimizer.zero_grad(set_to_none=True)
        values |= {f"{name}_grad_norm": norm, f"{name}_learning_rate": rate}
        return finite


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """No gradients for these modules' parameters inside the block. FSDP2 fixes the flag at its first gathering, so there it
    is left alone and the superfluous gradients are dropped with the step."""
    whole_ones = [module for module in modules if not isinstance(module, FSDPModule)]
    parameters = [p for module in whole_ones for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@contextmanager
def signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT inside the block are only noted; a second one acts as usual."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(steps: int, done: int, main: bool) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """A bar on a terminal, nothing elsewhere: `metrics.jsonl` is the record."""
    if not main or not sys.stderr.isatty():
        yield lambda step, line: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task("", total=steps, completed=done)

        def show(step: int, line: Mapping[str, Any]) -> None:
            numbers = {k: v for k, v in line.items() if isinstance(v, float) and k.endswith(("loss", "psnr"))}
            bar.update(row, completed=step, description="  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))

        yield show
