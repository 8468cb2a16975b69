# SPDX-License-Identifier: Apache-2.0
"""Attention over packed segments: a mixture of images and clips against a padded batch, and many short segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers
from benchmarks.registry import Case, Function, Inputs, Outputs, register
from vidkernels import ops
from vidkernels._conv.aten import native_on_cpu


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


def _batched(count: int) -> Function:
    """Segments of one length are a batch, without a copy."""

    def run(i: Inputs) -> torch.Tensor:
        q, k, v = (i[name].unflatten(0, (count, -1)).transpose(1, 2) for name in ("q", "k", "v"))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    return run


def _on(backend: SDPBackend, function: Function) -> Function:
    def run(i: Inputs) -> Outputs:
        if not i["q"].is_cuda:  # traced without a GPU (`python -m benchmarks check`): it has no such backend
            return function(i)
        with sdpa_kernel(backend):
            return function(i)

    return run


def _varlen(offsets: torch.Tensor, longest: int) -> Function:
    def run(i: Inputs) -> Outputs:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(i["q"], i["k"], i["v"], offsets, offsets, longest, longest)

    return run


def _flash4(offsets: torch.Tensor) -> Function:
    def run(i: Inputs) -> torch.Tensor:
        from flash_attn.cute import flash_attn_varlen_func

        found = flash_attn_varlen_func(i["q"], i["k"], i["v"], cu_seqlens_q=offsets, cu_seqlens_k=offsets)
        return found[0] if isinstance(found, tuple) else found

    return run


_MANY = 64  # segments beyond which one launch each is no way that anybody takes, on any backend


def _rivals(device: torch.device, lengths: Sequence[int], offsets: torch.Tensor) -> dict[str, Function]:
    """torch's attention on packed segments, on each segment and, where all have one length, on a batch of them."""
    one_by_one = _one_by_one(lengths)
    found: dict[str, Function] = {"one by one": one_by_one}
    equal = len(set(lengths)) == 1 and len(lengths) > 1
    if equal:
        found["SDPA of a batch"] = _batched(len(lengths))
    if device.type != "cuda":
        return found
    if peers.find("torch.nn.attention.varlen"):
        found["torch varlen_attn"] = _varlen(offsets, max(lengths))
    if peers.find("flash_attn.cute"):
        found["FlashAttention 4"] = _flash4(offsets)
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FlashAttention", SDPBackend.FLASH_ATTENTION)):
        if equal:
            found[f"SDPA of a batch, {name}"] = _on(backend, _batched(len(lengths)))
        elif len(lengths) <= _MANY:
            found[f"one by one, {name}"] = _on(backend, one_by_one)
    return found


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
        peers=_rivals(device, lengths, offsets),
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
    if not quick and device.type == "cpu" and native_on_cpu(torch.bfloat16):
        yield _case(device, "mixture", mixture, 4, 64, torch.bfloat16, False)
        yield _case(device, "temporal", [16] * 1024, 16, 72, torch.bfloat16, False)
        yield _case(device, "long", [2048], 4, 72, torch.bfloat16, False)
