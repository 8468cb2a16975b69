# SPDX-License-Identifier: Apache-2.0
"""LFQ: signs and indices, with the straight-through backward. The entropy loss: bench_entropy.py."""

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
