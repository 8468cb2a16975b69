# SPDX-License-Identifier: Apache-2.0
"""LFQ: signs and indices, and decoding. The entropy loss: bench_entropy.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

from benchmarks.registry import Case, Function, Inputs, register
from vidkernels import ops
from vidkernels._reference import lfq as reference

BITS = 18


def _peers(device: torch.device) -> dict[str, Function]:
    if importlib.util.find_spec("vector_quantize_pytorch") is None:
        return {}
    from vector_quantize_pytorch import LFQ

    module = LFQ(dim=BITS).to(device).eval()

    def theirs(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        codes, indices, _ = module(inputs["x"])
        return codes, indices

    return {"vector-quantize-pytorch": theirs}


def _case(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, *, dim: int, spherical: bool, compiled: bool
) -> Case:
    tokens = torch.Size(shape).numel() // BITS
    kind = "bsq" if spherical else "lfq"
    return Case(
        name=f"{kind} fwd {BITS} bits {list(shape)} {str(dtype)[6:]}",
        make_inputs=lambda: {"x": torch.randn(shape, device=device, dtype=dtype)},
        ours=lambda i: tuple(ops.lfq_quantize(i["x"], dim=dim, spherical=spherical)),
        reference=lambda i: tuple(reference.lfq_quantize(i["x"], dim=dim, spherical=spherical)),
        peers={} if spherical else _peers(device),
        check="exact",
        bytes=tokens * (2 * BITS * dtype.itemsize + 8),
        compile=compiled,
    )


def _decode_case(device: torch.device, clips: int, dim: int) -> Case:
    tokens = clips * 20480
    shape = (clips, 5, 64, 64) if dim == 1 else (1, tokens)
    place = "channels second" if dim == 1 else "channels last"
    return Case(
        name=f"lfq codes from indices {BITS} bits {tokens} tokens float32, {place}",
        make_inputs=lambda: {"indices": torch.randint(2**BITS, shape, device=device)},
        ours=lambda i: ops.lfq_indices_to_codes(i["indices"], BITS, dim=dim),
        reference=lambda i: reference.lfq_indices_to_codes(i["indices"], BITS, dim=dim),
        check="exact",
        bytes=tokens * (BITS * 4 + 8),
    )


@register(stem="lfq")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """A clip of a video tokenizer (channels second), then a batch of token sequences."""
    clips = 3 if device.type == "cpu" else 256
    yield _case(device, (clips, BITS, 5, 64, 64), torch.float32, dim=1, spherical=False, compiled=True)
    if quick:
        return
    yield _case(device, (1, clips * 20480, BITS), torch.float32, dim=-1, spherical=False, compiled=True)
    yield _case(device, (clips, BITS, 5, 64, 64), torch.bfloat16, dim=1, spherical=False, compiled=False)
    yield _case(device, (1, clips * 20480, BITS), torch.float32, dim=-1, spherical=True, compiled=False)
    for dim in (1, -1):
        yield _decode_case(device, clips, dim)
