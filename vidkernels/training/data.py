# SPDX-License-Identifier: Apache-2.0
"""Order of the data: a function of the seed and the step, equal for every number of processes, resumed by arithmetic."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vidkernels.errors import OptionError
from vidkernels.training.config import TrainConfig


def mixed_seed(*numbers: int) -> int:
    """Mix integers into one 63-bit seed (splitmix64): close numbers give unrelated seeds."""
    state = 0
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


@dataclass(frozen=True)
class Draw:
    """What the engine passes to `dataset[...]`: a sample's index, and a seed for this draw of it (its crop, its start frame)."""

    index: int
    seed: int
    position: int

    def generator(self, device: torch.device | str = "cpu", purpose: int = 0) -> torch.Generator:
        """Random numbers of this draw; another `purpose` gives independent ones."""
        return torch.Generator(device).manual_seed(mixed_seed(self.seed, purpose))


class ResumableOrder(Sampler[list[Draw]]):
    """The order of the data: micro-batches of one process, from any step on, without stored state.

    Sample p of the run is element p % n of permutation p // n.

    Args:
        length: n, samples of the data set.
        config: batch, accumulate and seed.
        start: first step.
        rank, world: this process, and how many there are. All of them together draw the same samples for every `world`.
    """

    def __init__(self, length: int, config: TrainConfig, start: int = 0, rank: int = 0, world: int = 1) -> None:
        if length < 1:
            raise OptionError("dataset", "at least one sample", length)
        self.length, self.config, self.start, self.rank, self.world = length, config, start, rank, world
        self.share = config.micro_batch(world)

    def __len__(self) -> int:
        return (self.config.steps - self.start) * self.config.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, order = -1, torch.empty(0)
        for micro in range(self.start * self.config.accumulate, self.config.steps * self.config.accumulate):
            first = (micro * self.world + self.rank) * self.share
            draws = []
            for position in range(first, first + self.share):
                if position // self.length != epoch:
                    epoch = position // self.length
                    generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, 1, epoch))
                    order = torch.randperm(self.length, generator=generator)
                seed = mixed_seed(self.config.seed, 2, position)
                draws.append(Draw(int(order[position % self.length]), seed, position))
            yield draws


class _WithDraws(Dataset[Any]):
    """Samples together with how they were drawn: the step's random numbers belong to samples, not to processes."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, draw: Draw) -> tuple[Any, Draw]:
        return self.dataset[draw], draw


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[Any, Draw]]) -> tuple[Any, list[Draw]]:
        return self.collate([sample for sample, _ in items]), [draw for _, draw in items]


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group: a loader that dies of one takes the run with it before
    its checkpoint. Loaders end when the run does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loader(
    dataset: Any, config: TrainConfig, start: int, rank: int, world: int, collate: Callable[[list[Any]], Any] | None
) -> DataLoader[Any]:
    """torch's DataLoader over (micro-batch, draws) from a step on."""
    return DataLoader(
        _WithDraws(dataset),
        batch_sampler=ResumableOrder(len(dataset), config, start, rank, world),
        num_workers=config.workers,
        collate_fn=_Collate(collate or torch.utils.data.default_collate),
        worker_init_fn=_leave_signals_to_the_run,
        pin_memory=torch.cuda.is_available(),
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors of nested lists, tuples, dicts and of objects with `.to`, moved."""
    if isinstance(batch, Tensor) or hasattr(batch, "to"):
        return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        return type(batch)(to_device(value, device) for value in batch)  # type: ignore[call-arg]
    return batch
