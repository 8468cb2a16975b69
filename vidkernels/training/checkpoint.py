# SPDX-License-Identifier: Apache-2.0
"""Checkpoints through torch.distributed.checkpoint: written by all ranks, complete or absent, read by any number of ranks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from vidkernels.errors import TrainingError
from vidkernels.training.ema import EMA
from vidkernels.training.parallel import Processes, whole

FACTS = "trainer.json"
DAMAGED = "{}: is damaged; remove it, and the run resumes from the one before ({})"


@dataclass
class Trained:
    """One trained module with its optimizer and averages."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None = None

    def __post_init__(self) -> None:
        """Make the optimizer's state now, so that its tensors exist to be loaded into, and count from 0."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for state in self.optimizer.state.values():
            state["step"].zero_()

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds of it, keyed by parameter names, without wrappers' prefixes."""
        found = {
            "model": get_model_state_dict(self.module),
            "optimizer": get_optimizer_state_dict(self.module, self.optimizer),
        }
        return found if self.ema is None else {**found, "ema": self.ema.averages}

    def restore(self, loaded: dict[str, Any]) -> None:
        """Take over tensors that `dcp.load` filled. The averages were filled in place."""
        set_model_state_dict(self.module, loaded["model"])
        set_optimizer_state_dict(self.module, self.optimizer, loaded["optimizer"])

    def full_state_dict(self, averaged: bool = True) -> dict[str, Tensor]:
        """Every tensor whole and on the CPU, of the averages where there are any; all ranks must call it, and get it."""
        state: dict[str, Any] = dict(get_model_state_dict(self.module))
        averages = {} if self.ema is None or not averaged else self.ema.averages
        first: dict[nn.Parameter, str] = {}  # a tied weight has several names, and its average the first of them
        names = {name: first.setdefault(p, name) for name, p in self.module.named_parameters(remove_duplicate=False)}
        return {
            name: whole(averages.get(names.get(name, name), value)).detach().to("cpu", value.dtype, copy=True)
            for name, value in state.items()
        }


class Checkpoints:
    """The checkpoints of a run: folders `step-00000100` and so on in one folder.

    A checkpoint is written under another name and renamed when complete, so a killed run leaves either the whole of it
    or a `.partial` folder, which the next run removes. Only tensors and numbers are stored, but torch's metadata file is a
    pickle: load checkpoints from runs that you trust.
    """

    def __init__(self, folder: Path, processes: Processes, keep: int) -> None:
        self.folder, self.processes, self.keep = folder, processes, keep
        if processes.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for partial in folder.glob("*.partial"):
                _remove(partial)
        processes.barrier()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        """Folder of a step."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, parts: dict[str, Trained], facts: dict[str, Any]) -> None:
        """Write a checkpoint and remove the oldest beyond `keep`.

        Raises:
            TrainingError: the disk is full, or the folder cannot be written; the checkpoints before are whole.
        """
        final = self.path(step)
        partial = final.with_suffix(".partial")
        tensors = {name: part.tensors() for name, part in parts.items()}
        try:
            with _one_process_is_meant():
                dcp.save(tensors, checkpoint_id=partial, no_dist=not dist.is_initialized())
        except CheckpointException as error:
            if self.processes.rank == 0:
                _remove(partial)
            raise TrainingError(f"{final}: cannot be written: {_cause(error)}") from error
        failure: OSError | None = None
        if self.processes.rank == 0:
            try:
                self._complete(partial, final, {**facts, "step": step})
            except OSError as error:
                failure = error
                _remove(partial)
        if self.processes.any(failure is not None):  # all end together: nobody waits for the first process
            cause = "the first process could not" if failure is None else failure.strerror
            raise TrainingError(f"{final}: cannot be written: {cause}") from failure

    def _complete(self, partial: Path, final: Path, facts: dict[str, Any]) -> None:
        """Give a folder with all tensors its final name, with the numbers inside; remove what is too old."""
        with (partial / FACTS).open("w") as file:
            file.write(json.dumps(facts, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(partial)
        _remove(final)
        partial.rename(final)
        _sync_folder(self.folder)
        for old in self.steps()[: -self.keep] if self.keep else []:
            shutil.rmtree(self.path(old))

    def facts(self, step: int) -> dict[str, Any]:
        """The numbers beside the tensors: step, configuration, loss scale."""
        path = self.path(step) / FACTS
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise TrainingError(DAMAGED.format(self.path(step), f"{FACTS}: {error}")) from error
        if not isinstance(found, dict) or not {"train", "facts", "scaler", "skipped"} <= set(found):
            raise TrainingError(DAMAGED.format(self.path(step), f"{FACTS} lacks settings of the run"))
        return found

    def load(self, step: int, parts: dict[str, Trained]) -> None:
        """Read a checkpoint, written by any number of ranks, into modules, optimizers and averages."""
        try:  # torch tells of a damaged index by a traceback of its own
            dcp.FileSystemReader(self.path(step)).read_metadata()
        except Exception as error:  # whatever unpickling random bytes raises
            raise TrainingError(DAMAGED.format(self.path(step), f".metadata: {_line(error)}")) from error
        tensors = {name: part.tensors() for name, part in parts.items()}
        try:
            with _one_process_is_meant():
                dcp.load(tensors, checkpoint_id=self.path(step), no_dist=not dist.is_initialized())
        except (CheckpointException, RuntimeError) as error:
            raise TrainingError(f"{self.path(step)}: not a checkpoint of this model: {_line(error)}") from error
        for name, part in parts.items():
            part.restore(tensors[name])


@contextlib.contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without torch's warning, at every checkpoint of a single process, that it assumes one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _remove(path: Path) -> None:
    """A folder or a file, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _line(error: BaseException) -> str:
    """The last line of an error's text, its kind where there is none."""
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else type(error).__name__


def _cause(error: CheckpointException) -> str:
    """What the machine said first: torch tells the last of the errors that follow from it."""
    link: BaseException | None = next(iter(error.failures.values()))[0]
    text = _line(error)
    while link is not None:
        text = link.strerror or text if isinstance(link, OSError) else text
        link = link.__cause__ or link.__context__
    return text


def _sync_folder(folder: Path) -> None:
    """The renamed entry reaches the disk before anything older is removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
