# SPDX-License-Identifier: Apache-2.0
"""LFQ: signs and indices, and the entropy loss over 2^18 codes with its gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.registry import Case, Inputs, register
from vidkernels import ops
from vidkernels._reference import lfq as reference


def _naive_entropy(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """What everybody does: the softmax of every token over every code, [N, 2^K]."""
    x = inputs["x"]
    bits = x.shape[-1]
    codes = (
        2.0 * ((torch.arange(2**bits, device=x.device)[:, None] >> torch.arange(bits - 1, -1, -1, device=x.device)) & 1)
        - 1
    )
    logits = 2 * 100.0 * x @ codes.to(x.dtype).T
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    average = p.mean(0)
    return -(p * log_p).sum(-1).mean(), -(average * average.clamp(min=1e-30).log()).sum()


def _entropy_case(device: torch.device, tokens: int, bits: int, compiled: bool) -> Case:
    return Case(
        name=f"lfq entropy fwd+bwd 2^{bits} codes {tokens} tokens float32",
        make_inputs=lambda: {"x": 0.05 * torch.randn(tokens, bits, device=device)},
        ours=lambda i: tuple(ops.lfq_entropy(i["x"], inv_temperature=100.0)),
        reference=_naive_entropy,
        flops=6 * tokens * 2**bits,
        backward=True,
        compile=compiled,
        note="eager holds several [tokens, codes] tensors; ours one [tokens, 2^(bits/2)] pair a chunk",
    )


@register(stem="lfq")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Quantization at one size; the entropy where the naive form still fits."""
    tokens = 65536 if device.type == "cpu" else 4194304
    yield Case(
        name=f"lfq fwd 18 bits {tokens} tokens float32",
        make_inputs=lambda: {"x": torch.randn(tokens, 18, device=device)},
        ours=lambda i: tuple(ops.lfq_quantize(i["x"])),
        reference=lambda i: tuple(reference.lfq_quantize(i["x"])),
        check="exact",
        bytes=tokens * (2 * 18 * 4 + 8),
        compile=not quick,
    )
    yield _entropy_case(device, 256 if quick else 1024, 12 if quick else 18, False)
