# SPDX-License-Identifier: Apache-2.0
"""Temporal parallelism for causal VAEs: the ranks of a group take the chunks of a clip in turn.

A causal network needs of earlier frames only what each of its layers carries from chunk to chunk, two frames for a kernel of
three. The next rank gets them while this one still computes: a layer's input is known as soon as the layer is reached, so that
all ranks go through the network side by side, a layer apart (a block of layers, where blocks go in pieces). Nothing is
recomputed, blended or padded, and the result is that of one process, which carries the same frames from call to call.

    parallel = distributed.temporal_parallel(vae, group)    # on every rank, once
    frames = vae.decode(latents)                             # on every rank, of the same latents; each gets the whole clip
    parallel.remove()
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vidkernels.distributed._group import Group, resolve
from vidkernels.errors import OptionError, ShapeError

_NOTE_BYTES = 1024  # of what is told about a layer's carried frames: their sizes, dtype and order
_installed: WeakKeyDictionary[nn.Module, Ring] = WeakKeyDictionary()
_channels: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()


def temporal_parallel(model: nn.Module, group: Group = None) -> TemporalParallel:
    """Let a causal video VAE encode and decode each clip on all ranks of a group together, with the results of one process.

    Every rank of the group calls this once, and then `encode` or `decode` with the same input; every rank gets the whole
    result. Clips are cut by time into at least as many chunks as there are ranks, as far as latent frames go, and each rank
    holds the activations of its chunk alone. What else the model does (sampling from a posterior) is as before: a random
    sample is drawn on each rank, from generators that should be alike.

    Args:
        model: holds a causal `models.tokenizers.VidTok`, or an autoencoder of Wan's kind (diffusers' `AutoencoderKLWan` and
            `AutoencoderKLQwenImage`, the official `WanVAE_`) after `vidkernels.patch`; a pipeline's `vae`.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for the default group. On GPUs NCCL carries frames, and gloo
            their sizes; groups for both are made here. One rank alone changes nothing.

    Returns:
        The handle: `remove()` it, or use it as a context.

    Raises:
        OptionError: the model holds nothing that can be served, or has a group already. While it is installed, a call that
            needs gradients raises OptionError, and ranks with different inputs ShapeError.
    """
    return TemporalParallel(model, group)


class TemporalParallel:
    """What `temporal_parallel` installed: `models`, the autoencoders it serves, and `ranks`."""

    def __init__(self, model: nn.Module, group: Group = None) -> None:
        modules = model.modules() if isinstance(model, nn.Module) else ()
        self.models = [m for m in modules if getattr(m, "_takes_turns", False)]
        if not self.models:
            raise OptionError(
                *("model", "one that holds a causal VidTok, or a patched VAE of Wan's kind", type(model).__name__),
                "Call vidkernels.patch on it first; VAEs whose norms or attention see all frames cannot be cut.",
            )
        if any(m in _installed for m in self.models):
            raise OptionError("model", "one without a group", "one that has one", "Call remove() on its handle first.")
        group, self.ranks, rank = resolve(group)
        self._ring = Ring(group, self.ranks, rank) if self.ranks > 1 else None
        if self._ring is not None:
            for m in self.models:
                _installed[m] = self._ring

    def remove(self) -> None:
        """Let each process work by itself again; every rank calls it."""
        for m in self.models:
            if self._ring is not None and _installed.get(m) is self._ring:
                del _installed[m]
        self._ring = None

    def __enter__(self) -> TemporalParallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Ring:
    """The ranks of a group, each of which gives to the next one, the last one to the first."""

    def __init__(self, group: Any, ranks: int, rank: int) -> None:
        self.group = dist.group.WORLD if group is None else group
        self.members, self.ranks, self.rank = dist.get_process_group_ranks(self.group), ranks, rank
        if self.group not in _channels:
            _channels[self.group] = _open_channels(self.group, is_world=group is None)
        self.notes, self.backwards = _channels[self.group]
        self.backends = _backends(self.group)

    def frames_group(self, sender: int) -> Any:
        """The group for frames that a rank gives to the next one."""
        return self.backwards if sender == self.ranks - 1 else self.group


def _backends(group: Any) -> dict[str, str]:
    """The backend of a group for each kind of device."""
    return dict(item.split(":") for item in dist.get_backend_config(group).split(","))


def _open_channels(group: Any, is_world: bool) -> tuple[Any, Any]:
    """(For notes in the memory of the host, for frames from the last rank to the first) beside a group; or the group itself.

    NCCL delivers the messages between two ranks in order, whatever their direction: in one group, each of two ranks would wait
    for the other to take its frames. They are made once for a group; torch would give a second pair the names of the first.
    """
    options: dict[str, Any] = {} if is_world else {"use_local_synchronization": True}
    members, backends = dist.get_process_group_ranks(group), _backends(group)
    notes = group if backends.get("cpu") == "gloo" else dist.new_group(members, backend="gloo", **options)
    if set(backends.values()) == {"gloo"}:
        return notes, group
    return notes, dist.new_group(members, backend=dist.get_backend_config(group), **options)


def turns_of(model: nn.Module, x: Tensor, lead: int = 0) -> Turns | None:
    """How the ranks share one call of `model` on x; None where there is one process.

    lead: calls at the clip's begin that are cheaper than the others; the last rank begins with them.
    """
    if torch.compiler.is_compiling():
        return None
    ring = _installed.get(model)
    if ring is None:
        return None
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in model.parameters())):
        remedy = "Use torch.no_grad(): frames from other ranks carry no gradients. remove() the handle to train."
        raise OptionError("temporal_parallel", "a call without gradients", "one that needs them", remedy)
    if not x.is_cpu and ring.backends.get(x.device.type, "gloo") == "gloo":
        remedy = "Use init_process_group('cpu:gloo,cuda:nccl'), or a group with that backend."
        raise OptionError("group", f"a backend that sends from {x.device.type}, such as nccl", ring.backends, remedy)
    seen: list[Any] = [None] * ring.ranks
    dist.all_gather_object(seen, (tuple(x.shape), str(x.dtype)), group=ring.notes)
    if any(other != seen[0] for other in seen):
        raise ShapeError("input", "the same shape and dtype on every rank", seen, "Broadcast it first.")
    return Turns(ring, x.device, lead)


class Turns:
    """One clip that goes through a network in several calls, each on the next rank."""

    def __init__(self, ring: Ring, device: torch.device, lead: int) -> None:
        self.ring, self.device, self.lead = ring, device, lead
        self.sent: list[tuple[Any, Tensor]] = []  # what is under way must live until it has arrived

    def calls(self, chunks: int, least: int = 1) -> int:
        """How many calls: at least `least`, and as many for each rank, as far as there are chunks."""
        ranks = self.ring.ranks
        return min(chunks, -(-least // ranks) * ranks)

    def owner(self, call: int) -> int:
        """The rank of a call."""
        return (call - self.lead) % self.ring.ranks

    def is_mine(self, call: int) -> bool:
        """Whether this rank has the call."""
        return self.owner(call) == self.ring.rank

    def carried(self, call: int, last: bool) -> Carried:
        """What layers carry into a call and out of it."""
        return Carried(self, self.owner(call - 1) if call else None, None if last else self.owner(call + 1))

    def shared(self, parts: Iterable[tuple[int, Tensor]], calls: int) -> Iterator[Tensor]:
        """The results of all calls in order, from (call, result) of those of this rank."""
        mine = dict(parts)
        for work, _ in self.sent:
            work.wait()
        self.sent.clear()
        sizes: list[Any] = [None] * self.ring.ranks
        own = {call: (tuple(part.shape), part.dtype) for call, part in mine.items()}
        dist.all_gather_object(sizes, own, group=self.ring.notes)
        for call in range(calls):
            shape, dtype = sizes[self.owner(call)][call]
            part = mine.pop(call).contiguous() if call in mine else torch.empty(shape, dtype=dtype, device=self.device)
            # As bytes: not every backend of torch.distributed knows every dtype.
            source = self.ring.members[self.owner(call)]
            dist.broadcast(part.view(-1).view(torch.uint8), source, group=self.ring.group)
            yield part

    def send(self, x: Tensor, target: int, group: Any) -> None:
        """Start to send; returns at once."""
        self.sent = [(work, held) for work, held in self.sent if not work.is_completed()]
        self.sent.append((dist.isend(x, self.ring.members[target], group=group), x))


class Carried:
    """What the layers of a network take over from the call before and leave for the next one.

    Layers take and leave in the same order in all calls: the n-th that is taken is the n-th that was left.
    """

    def __init__(self, turns: Turns, source: int | None, target: int | None) -> None:
        self.turns, self.source, self.target = turns, source, target

    def take(self) -> Any:
        """What the same layer left in the call before; None in the first call."""
        if self.source is None:
            return None
        ring = self.turns.ring
        note = torch.empty(_NOTE_BYTES, dtype=torch.uint8)
        dist.recv(note, ring.members[self.source], group=ring.notes)
        return self._taken(pickle.loads(bytes(note.tolist())))

    def _taken(self, told: Any) -> Any:
        if isinstance(told, tuple):
            return tuple(self._taken(item) for item in told)
        if not isinstance(told, _Frames):
            return told
        x = torch.empty(told.shape, dtype=told.dtype, device=self.turns.device)
        assert self.source is not None
        ring = self.turns.ring
        dist.recv(x, ring.members[self.source], group=ring.frames_group(self.source))
        return x.permute(0, 4, 1, 2, 3)  # [B, C, T, H, W] in channels-last memory

    def leave(self, value: Any) -> None:
        """Give the next call a tensor [B, C, T, H, W], something small, or a tuple of both."""
        if self.target is None:
            return
        tensors: list[Tensor] = []
        note = pickle.dumps(_told(value, tensors))
        assert len(note) <= _NOTE_BYTES
        padded = torch.zeros(_NOTE_BYTES, dtype=torch.uint8)
        padded[: len(note)] = torch.frombuffer(bytearray(note), dtype=torch.uint8)
        ring = self.turns.ring
        self.turns.send(padded, self.target, ring.notes)
        for x in tensors:
            self.turns.send(x, self.target, ring.frames_group(ring.rank))


class _Frames:
    """Stands in a note for a tensor that follows."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype


def _told(value: Any, tensors: list[Tensor]) -> Any:
    """`value` with notes in place of its tensors, which go to `tensors` as rows."""
    if isinstance(value, tuple):
        return tuple(_told(item, tensors) for item in value)
    if not isinstance(value, Tensor):
        return value
    rows = value.permute(0, 2, 3, 4, 1).contiguous()  # [B, T, H, W, C]: no copy in channels-last memory
    tensors.append(rows)
    return _Frames(tuple(rows.shape), rows.dtype)


class CarriedDict(dict[Any, Any]):
    """What layers carry, by layer, for a network that keeps it in a dict: `get` takes, an assignment leaves."""

    def __init__(self, carried: Carried) -> None:
        super().__init__()
        self.carried = carried

    def get(self, key: Any, default: Any = None) -> Any:
        """What the layer left in the call before."""
        value = self.carried.take()
        return default if value is None else value

    def __setitem__(self, key: Any, value: Any) -> None:
        self.carried.leave(value)


class CarriedList(list[Any]):
    """The same for a network that keeps it in a list of slots; a slot may be read again before it is written."""

    def __init__(self, carried: Carried, slots: int) -> None:
        super().__init__([None] * slots)
        self.carried, self.waiting = carried, [carried.source is not None] * slots

    def __getitem__(self, slot: Any) -> Any:
        if isinstance(slot, slice):
            return [self[i] for i in range(*slot.indices(len(self)))]
        if self.waiting[slot]:
            self.waiting[slot] = False
            super().__setitem__(slot, self.carried.take())
        return super().__getitem__(slot)

    def __setitem__(self, slot: Any, value: Any) -> None:
        if isinstance(slot, slice):
            for i, item in zip(range(*slot.indices(len(self))), value, strict=True):
                self[i] = item
            return
        super().__setitem__(slot, None if self.carried.target is None else value)
        self.carried.leave(value)
