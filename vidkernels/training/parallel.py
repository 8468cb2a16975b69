# SPDX-License-Identifier: Apache-2.0
"""Processes of a run: who there is, DDP and FSDP2 around modules, one answer of all ranks."""

from __future__ import annotations

import inspect
import time
import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vidkernels.errors import OptionError, TrainingError
from vidkernels.training.config import TrainConfig


@dataclass(frozen=True)
class Processes:
    """This process's rank, how many processes there are, and what they tell each other.

    `control` is a gloo group for flags on the CPU: it never waits for a GPU.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    control: Any = None

    @classmethod
    def current(cls, device: torch.device | str | None = None) -> Processes:
        """From torch.distributed if it is initialised; under torchrun it is initialised here."""
        if dist.is_torchelastic_launched() and not dist.is_initialized():
            store, rank, world = next(dist.rendezvous("env://"))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=attempt_store(store, rank, world), rank=rank, world_size=world)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(device)
            torch.empty(1, device=device)
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
            raise OptionError("--device", "a device of this machine", str(device), f"{reason}.") from error
        if not dist.is_initialized():
            return cls(device=device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
            torch.cuda.set_device(device)
        return cls(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.world == 1:
            return flag
        answer = torch.tensor([int(flag)])
        dist.all_reduce(answer, dist.ReduceOp.MAX, group=self.control)
        return bool(answer)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Mean over the ranks of equally named numbers."""
        if self.world == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return dict(zip(values, (total / self.world).tolist(), strict=True))

    def of_first(self, value: Any) -> Any:
        """The first process's value, on all: what they read of a shared disk may differ for seconds."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, 0, self.control, device=torch.device("cpu"))
        return held[0]

    def barrier(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            dist.barrier(group=self.control)


def attempt_store(store: dist.Store, rank: int, world: int) -> dist.Store:
    """The part of torchrun's store that only the processes of this start use.

    torchrun (torch 2.13) keeps its store over restarts, with the addresses of the killed processes in it: a process that reads
    before the others have written connects to the dead. The first process therefore names each start at random and tells
    the name to those that greet it with a number of their own; old greetings are answered too, and nobody listens. The
    count of restarts would not do: machines count their own.
    """
    if rank:
        mine = uuid.uuid4().hex
        store.set(f"vidkernels/greeting/{rank}", mine)
        name = store.get(f"vidkernels/answer/{mine}").decode()
        store.set(f"vidkernels/{name}/{rank}", "here")
        return dist.PrefixStore(f"vidkernels/{name}", store)
    name, absent = uuid.uuid4().hex, list(range(1, world))
    timeout = cast(Any, store).timeout  # not in torch's stubs
    deadline = time.monotonic() + timeout.total_seconds()
    while absent:
        for other in absent:
            greeting = f"vidkernels/greeting/{other}"
            if store.check([greeting]):
                store.set(f"vidkernels/answer/{store.get(greeting).decode()}", name)
        absent = [other for other in absent if not store.check([f"vidkernels/{name}/{other}"])]
        if absent and time.monotonic() > deadline:
            raise TrainingError(f"processes {absent} of {world} did not start within {timeout}")
        time.sleep(0.01 if absent else 0)
    return dist.PrefixStore(f"vidkernels/{name}", store)


def parallelize(
    module: nn.Module, config: TrainConfig, processes: Processes, units: Iterable[nn.Module] | None
) -> nn.Module:
    """The module on its device and in DDP or FSDP2, as the configuration says.

    Args:
        units: FSDP2: submodules that are gathered one at a time in their own `forward`; inner ones first. None: DDP instead.
    """
    module.to(processes.device)
    if config.parallel == "none":
        if processes.world > 1:
            raise OptionError("parallel", "'ddp' or 'fsdp' with several processes", config.parallel)
        return module
    if not dist.is_initialized():
        raise OptionError("parallel", "'none' without torch.distributed", config.parallel, "Start with torchrun.")
    if config.parallel == "ddp" or units is None:
        ids = [processes.device.index] if processes.device.type == "cuda" else None
        # The option's name from torch 2.13 on, and before.
        names = inspect.signature(DistributedDataParallel.__init__).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {"device_ids": ids, option: False}
        return DistributedDataParallel(module, **options)
    # Autocast casts weights at their use; gathering them in the lower precision moves half the bytes, and the sum of
    # gradients stays in float32.
    low = None if config.precision == "float32" else config.dtype
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(processes.device.type, (processes.world,))
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    return module


def bare(module: nn.Module) -> nn.Module:
    """The module inside DDP; FSDP2 changes a module in place."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Gradients are summed over the ranks in the last micro-batch only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
