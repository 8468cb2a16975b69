# SPDX-License-Identifier: Apache-2.0
"""FSQ: codes and indices, the straight-through backward, indices alone, and decoding. Entropy: bench_entropy.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

from benchmarks.registry import Case, Function, Inputs, register
from vidkernels import ops
from vidkernels._reference import fsq as reference

LEVELS = (8, 8, 8, 5, 5, 5)


def _quantize(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return tuple(ops.fsq_quantize(inputs["z"], list(LEVELS)))


def _eager(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return tuple(reference.fsq_quantize(inputs["z"], list(LEVELS)))


def _peers(device: torch.device, tokens: int) -> dict[str, Function]:
    if importlib.util.find_spec("vector_quantize_pytorch") is None:
        return {}
    from vector_quantize_pytorch import FSQ

    module = FSQ(list(LEVELS)).to(device)

    def theirs(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        codes, indices = module(inputs["z"][None])
        return codes[0], indices[0]

    return {"vector-quantize-pytorch": theirs}


def _case(device: torch.device, tokens: int, dtype: torch.dtype, backward: bool, compiled: bool) -> Case:
    moved = 2 * len(LEVELS) * dtype.itemsize + 4
    return Case(
        name=f"fsq {'fwd+bwd' if backward else 'fwd'} {list(LEVELS)} {tokens} tokens {str(dtype)[6:]}",
        make_inputs=lambda: {"z": 2 * torch.randn(tokens, len(LEVELS), device=device, dtype=dtype)},
        ours=_quantize,
        reference=_eager,
        peers=_peers(device, tokens) if dtype == torch.float32 else {},
        # Codes and indices are promised bit for bit in float32.
        check="exact" if dtype == torch.float32 and not backward else "allclose",
        bytes=tokens * (moved + (3 * len(LEVELS) * dtype.itemsize if backward else 0)),  # z, dcodes, dz
        backward=backward,
        compile=compiled,
    )


@register(stem="fsq")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Forward and backward at the token counts of one clip and of a batch."""
    # 24 MB of codes at most on the CPU: larger fresh tensors measure page faults, whoever computes them.
    small, large = (8192, 262144) if quick or device.type == "cpu" else (262144, 8388608)
    yield _case(device, large, torch.float32, False, True)
    yield _case(device, large, torch.float32, True, not quick)
    if quick:
        return
    yield _case(device, small, torch.float32, False, False)
    yield _case(device, large, torch.bfloat16, False, True)
    yield Case(
        name=f"fsq indices only {list(LEVELS)} {large} tokens float32, channels second",
        make_inputs=lambda: {"z": 2 * torch.randn(1, len(LEVELS), large, device=device)},
        ours=lambda i: ops.fsq_quantize(i["z"], LEVELS, dim=1, return_codes=False)[1],
        reference=lambda i: reference.fsq_quantize(i["z"], LEVELS, dim=1, return_codes=False)[1],
        check="exact",
        bytes=large * (len(LEVELS) * 4 + 4),
    )
    yield Case(
        name=f"fsq codes from indices {list(LEVELS)} {large} tokens float32, channels second",
        make_inputs=lambda: {"indices": torch.randint(64000, (1, large), device=device, dtype=torch.int32)},
        ours=lambda i: ops.fsq_indices_to_codes(i["indices"], LEVELS, dim=1),
        reference=lambda i: reference.fsq_indices_to_codes(i["indices"], LEVELS, dim=1),
        check="exact",
        bytes=large * (len(LEVELS) * 4 + 4),
    )
