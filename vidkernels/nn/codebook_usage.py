# SPDX-License-Identifier: Apache-2.0
"""`CodebookUsage`: how much of a codebook a stream of indices uses."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vidkernels.errors import OptionError
from vidkernels.ops._checks import check_integer, check_same_device, is_whole

# Above this many codes (128 MiB of counts) only codes that occurred are counted, in sorted lists.
DENSE_CODES = 1 << 24


class CodebookUsage(nn.Module):
    """Exact counts of codes over any number of batches, in memory that does not grow with the batches.

    Up to 2^24 codes one int64 counter a code; beyond, one entry for each code that occurred. Indices outside the
    codebook (the NaN index of `ops.fsq_quantize`, dropped layers) are counted apart, in `outside`.

    Args:
        codebook_size: number of codes K.
    """

    counts: Tensor
    codes: Tensor
    outside: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        if not is_whole(codebook_size):
            raise OptionError("codebook_size", "an int of at least 1", repr(codebook_size))
        self.codebook_size = codebook_size
        self.dense = codebook_size <= DENSE_CODES
        # One more for everything outside: an update then needs no look at the values, hence no synchronisation.
        size = codebook_size + 1 if self.dense else 0
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int64), persistent=False)
        self.register_buffer("codes", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("outside", torch.zeros((), dtype=torch.int64), persistent=False)

    def extra_repr(self) -> str:
        return f"codebook_size={self.codebook_size}"

    def reset(self) -> None:
        """Forget everything counted."""
        self.counts = self.counts.new_zeros(self.codebook_size + 1 if self.dense else 0)
        self.codes = self.codes.new_zeros(0)
        self.outside = self.outside.new_zeros(())

    @torch.no_grad()
    def update(self, indices: Tensor) -> None:
        """Count integer indices of any shape on the module's device."""
        check_integer("indices", indices)
        check_same_device("indices", indices, "counts", self.counts)
        flat = indices.reshape(-1).long()
        valid = (flat >= 0) & (flat < self.codebook_size)
        if self.dense:
            flat = torch.where(valid, flat, self.codebook_size)
            self.counts.index_add_(0, flat, torch.ones_like(flat))
        else:
            self._merge(*torch.unique(flat[valid], return_counts=True))
        self.outside += (~valid).sum()

    def forward(self, indices: Tensor) -> Tensor:
        """Count and hand the indices on."""
        self.update(indices)
        return indices

    def _merge(self, codes: Tensor, counts: Tensor) -> None:
        self.codes, places = torch.unique(torch.cat([self.codes, codes]), return_inverse=True)
        both = torch.cat([self.counts, counts])
        self.counts = both.new_zeros(len(self.codes)).index_add_(0, places, both)

    @torch.no_grad()
    def all_reduce(self, process_group: Any = None) -> None:
        """Add up the counts of all ranks, each of which then holds the total. Call once, after the last update."""
        if self.dense:
            dist.all_reduce(self.counts, group=process_group)
        else:
            parts: list[Any] = [None] * dist.get_world_size(process_group)
            dist.all_gather_object(parts, (self.codes.cpu(), self.counts.cpu()), group=process_group)
            device = self.codes.device
            self.codes, self.counts = self.codes.new_zeros(0), self.counts.new_zeros(0)
            for codes, counts in parts:
                self._merge(codes.to(device), counts.to(device))
        dist.all_reduce(self.outside, group=process_group)

    def _valid_counts(self) -> Tensor:
        return self.counts[: self.codebook_size] if self.dense else self.counts

    @property
    def total(self) -> int:
        """Indices counted, without those outside."""
        return int(self._valid_counts().sum())

    @property
    def used(self) -> int:
        """Codes that occurred at least once."""
        return int((self._valid_counts() > 0).sum())

    @property
    def usage(self) -> float:
        """used / K."""
        return self.used / self.codebook_size

    @property
    def entropy(self) -> float:
        """-sum p log p of the codes' frequencies, in nats; 0 before the first update."""
        counts = self._valid_counts()
        counts = counts[counts > 0].double()
        total = counts.sum()
        return float((counts / total * (total / counts).log()).sum()) if len(counts) else 0.0

    @property
    def perplexity(self) -> float:
        """exp(entropy): the number of equally frequent codes with the same entropy."""
        return math.exp(self.entropy)
