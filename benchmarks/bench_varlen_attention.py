# SPDX-License-Identifier: Apache-2.0
"""Attention over packed segments: a mixture of images and clips against a padded batch, and many short segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from benchmarks.registry import Case, Function, Inputs, register
from vidkernels import ops


def _padded(lengths: Sequence[int]) -> Function:
    """The usual way: pad every sample to the longest, attend under a mask, take the rows back out."""
    longest = max(lengths)

    def run(i: Inputs) -> torch.Tensor:
        keep = torch.arange(longest, device=i["q"].device)[None] < torch.tensor(lengths, device=i["q"].device)[:, None]
        padded = []
        for name in ("q", "k", "v"):
            full = i[name].new_zeros(len(lengths), longest, *i[name].shape[1:])
            full[keep] = i[name]
            padded.append(full.transpose(1, 2))
        mixed = F.scaled_dot_product_attention(*padded, attn_mask=keep[:, None, None])
        return mixed.transpose(1, 2)[keep]

    return run


def _one_by_one(lengths: Sequence[int]) -> Function:
    def run(i: Inputs) -> torch.Tensor:
        parts = [i[name].split(list(lengths)) for name in ("q", "k", "v")]
        mixed = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in group))[0]
            for group in zip(*parts, strict=True)
        ]
        return torch.cat([x.transpose(0, 1) for x in mixed])

    return run


def _case(
    device: torch.device, name: str, lengths: Sequence[int], heads: int, width: int, dtype: torch.dtype, backward: bool
) -> Case:
    total, longest = sum(lengths), max(lengths)
    offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)

    def make() -> Inputs:
        return {part: torch.randn(total, heads, width, device=device, dtype=dtype) for part in ("q", "k", "v")}

    flops = 4 * heads * width * sum(length**2 for length in lengths)
    return Case(
        name=f"{name} {len(lengths)} segments {total} tokens {heads}x{width} {str(dtype)[6:]}{' fwd+bwd' if backward else ''}",
        make_inputs=make,
        ours=lambda i: ops.varlen_attention(i["q"], i["k"], i["v"], offsets, offsets, longest, longest),
        reference=_padded(lengths),
        peers={"one by one": _one_by_one(lengths)},
        bytes=4 * total * heads * width * dtype.itemsize,
        flops=flops * (3 if backward else 1),
        backward=backward,
        compile=False,
        note="reference: padded batch with a mask",
    )


@register(stem="varlen_attention")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """A mixture of sizes, temporal attention over 16 frames, and head width 72."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    mixture = (
        [64, 128, 64, 1024]
        if quick
        else [64, 64, 96, 128, 128, 192, 256, 256, 384, 512, 576, 768, 1024, 1536, 2048, 4096]
    )
    yield _case(device, "mixture", mixture, 4, 64, dtype, False)
    yield _case(device, "temporal", [16] * (64 if quick else 1024), 16, 72, dtype, False)
    if not quick:
        yield _case(device, "mixture", [64, 128, 256, 576, 1024], 8, 64, dtype, True)
        yield _case(device, "long", [2048], 4, 72, dtype, False)
