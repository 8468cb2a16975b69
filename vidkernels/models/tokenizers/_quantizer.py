# SPDX-License-Identifier: Apache-2.0
"""Vector quantization with a learned codebook (VQ-VAE, arXiv 1711.00937), trained by straight-through or by EMA."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vidkernels.errors import OptionError
from vidkernels.ops._checks import check_integer, check_size


class VectorQuantizer(nn.Module):
    """Nearest code of each position; key `embedding.weight` [K, C].

    Args:
        codes: K. channels: C.
        beta: weight of the commitment term.
        legacy: taming-transformers' order, which its checkpoints were trained with: `beta` weighs the codebook term instead.
        ema: decay of an exponential moving average that trains the codebook; None trains it by gradient.
    """

    ema_count: Tensor
    ema_sum: Tensor

    def __init__(
        self, codes: int, channels: int, *, beta: float = 0.25, legacy: bool = True, ema: float | None = None
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)
        if ema is not None and not 0 < ema < 1:
            raise OptionError("ema", "a decay between 0 and 1", ema)
        self.beta, self.legacy, self.ema = beta, legacy, ema
        if ema is not None:
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("ema_count", torch.ones(codes))
            self.register_buffer("ema_sum", self.embedding.weight.detach().clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [B, C, *] -> codes like z (straight-through gradient), int64 indices [B, *], loss."""
        check_size("z", z, 1, self.embedding.embedding_dim)
        rows = z.movedim(1, -1)
        flat = rows.reshape(-1, rows.shape[-1]).float()
        indices = self.nearest(flat.detach())
        if self.training and self.ema is not None:
            self._update(flat.detach(), indices)
        codes = F.embedding(indices, self.embedding.weight).to(z.dtype).reshape(rows.shape).movedim(-1, 1)
        commitment = (codes.detach() - z).square().mean()
        loss = self.beta * commitment
        if self.ema is None:
            codebook = (codes - z.detach()).square().mean()
            loss = commitment + self.beta * codebook if self.legacy else codebook + self.beta * commitment
        return z + (codes - z).detach(), indices.reshape(rows.shape[:-1]), loss

    def nearest(self, flat: Tensor, chunk: int = 65536) -> Tensor:
        """Index of the nearest code of each row [N, C], in chunks so that memory does not grow with N * K."""
        codes = self.embedding.weight.detach().float()
        offset = codes.square().sum(1)
        return torch.cat(
            [torch.addmm(offset, part, codes.T, alpha=-2).argmin(1) for part in flat.split(chunk)]
            or [flat.new_empty(0).long()]
        )

    def decode(self, indices: Tensor) -> Tensor:
        """indices [B, *] -> codes [B, C, *]."""
        check_integer("indices", indices)
        try:
            return self.embedding(indices).movedim(-1, 1)
        except IndexError as error:  # on a GPU it is torch's own assertion
            raise OptionError("indices", f"codes from 0 to {self.embedding.num_embeddings - 1}", "others") from error

    @torch.no_grad()
    def _update(self, flat: Tensor, indices: Tensor) -> None:
        assert self.ema is not None
        count = torch.bincount(indices, minlength=len(self.ema_count)).to(self.ema_count.dtype)
        total = torch.zeros_like(self.ema_sum).index_add_(0, indices, flat)
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Each rank sees its own part of the batch; without the sum the codebooks of the ranks would drift apart.
            dist.all_reduce(count)
            dist.all_reduce(total)
        # A step without a finite loss is skipped by its trainer; codes that took it in would be NaN for good.
        finite = total.isfinite().all(1)
        count = torch.where(finite, count, self.ema_count)
        total = torch.where(finite[:, None], total, self.ema_sum)
        self.ema_count.lerp_(count, 1 - self.ema)
        self.ema_sum.lerp_(total, 1 - self.ema)
        smoothed = self.ema_count + 1e-5
        smoothed = smoothed / smoothed.sum() * self.ema_count.sum()
        self.embedding.weight.copy_(self.ema_sum / smoothed[:, None])
