# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism of a packed transformer: the processes of a group join their samples to one pack and share its tokens
evenly (DeepSpeed-Ulysses, arXiv 2309.14509). The data order of the run does not change with the group's size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels import distributed
from vidkernels.errors import OptionError
from vidkernels.models.transformers.goku import Goku, GokuBlock
from vidkernels.training.parallel import Processes


class UlyssesBlock(GokuBlock):
    """A Goku block whose tokens are one process's slice; `sequence` knows the whole pack."""

    sequence: Sequence

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pack: Any) -> Tensor:
        """Heads instead of tokens are spread during attention."""
        whole = self.sequence
        return distributed.ulysses_attention(q, k, v, whole.cu_seqlens, whole.max_seqlen, group=whole.group)


@dataclass
class Sequence:
    """One group of processes and the pack that it works on.

    Attributes:
        degree: processes of the group. group: its process group. control: a gloo group of the same processes.
        cu_seqlens, max_seqlen: of the whole pack that the next forward computes.
    """

    degree: int = 1
    group: Any = None
    control: Any = None
    cu_seqlens: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int32))
    max_seqlen: int = 0

    @classmethod
    def of(cls, degree: int, processes: Processes) -> Sequence:
        """Neighbouring processes in groups of `degree`; every process must call it."""
        if degree == 1 and not isinstance(degree, bool):
            return cls()
        if not isinstance(degree, int) or degree < 1 or processes.world % degree:
            raise OptionError("sequence", f"a divisor of {processes.world} processes", degree)
        found = cls(degree)
        for first in range(0, processes.world, degree):
            ranks = list(range(first, first + degree))
            group, control = dist.new_group(ranks), dist.new_group(ranks, backend="gloo")
            if processes.rank in ranks:
                found.group, found.control = group, control
        return found

    def install(self, model: Goku) -> None:
        """Let a model's blocks attend over the group. Before FSDP2, which re-classes them."""
        if self.degree == 1:
            return
        heads = model.config.num_heads
        if heads % self.degree:
            allowed = ", ".join(map(str, distributed.allowed_degrees(heads, heads)))
            raise OptionError("sequence", f"a degree that divides {heads} heads: {allowed}", self.degree)
        for block in model.blocks:
            block.__class__ = UlyssesBlock
            block.__dict__["sequence"] = self

    def gather(self, items: list[Any]) -> list[Any]:
        """The samples of all processes of the group, in rank order."""
        found: list[Any] = [None] * self.degree
        dist.all_gather_object(found, items, group=self.control)
        return [item for part in found for item in part]

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """This process's slice of the prediction [n, C], and the slice's offsets, int32 [B + 2] (alone: [B + 1]).

        Args:
            model: Goku, wrapped or not. inputs: of the whole pack, `Goku.forward`'s arguments by name.
        """
        if self.degree == 1:
            return model(**inputs), inputs["cu_seqlens"]
        self.cu_seqlens, self.max_seqlen = inputs["cu_seqlens"], inputs["max_seqlen"]
        tokens = distributed.shard_sequence(inputs["tokens"], self.group)
        count = tokens.shape[0]
        offsets = distributed.local_offsets(self.cu_seqlens, count, self.group)
        local = {
            **inputs,
            "tokens": tokens,
            "positions": distributed.shard_sequence(inputs["positions"], self.group),
            # The padded tail is one more sample.
            "t": F.pad(inputs["t"], (0, 1)),
            "cu_seqlens": offsets,
            "max_seqlen": count,
        }
        if inputs.get("labels") is not None:
            local["labels"] = F.pad(inputs["labels"], (0, 1))
        if inputs.get("text_cu_seqlens") is not None:
            local["text_cu_seqlens"] = distributed.local_text_offsets(inputs["text_cu_seqlens"])
        return model(**local), offsets

    def slice(self, x: Tensor) -> Tensor:
        """This process's slice of a sequence that all of the group hold."""
        return x if self.degree == 1 else distributed.shard_sequence(x, self.group)


def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each segment of [n], in token order: [B]."""
    lengths = (offsets[1:] - offsets[:-1]).long()
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0)
