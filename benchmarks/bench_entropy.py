# SPDX-License-Identifier: Apache-2.0
"""Entropy losses over 2^18 codes: the matrix product against the softmax over every code, forward and backward."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

from benchmarks.registry import Case, Function, Inputs, register
from vidkernels import ops
from vidkernels._reference import entropy as reference

FSQ_LEVELS = (8, 8, 8, 5, 5, 5)


def _upstream(device: torch.device, bits: int) -> dict[str, Function]:
    if importlib.util.find_spec("vector_quantize_pytorch") is None:
        return {}
    from vector_quantize_pytorch import LFQ

    module = LFQ(codebook_size=2**bits).to(device).train()

    def theirs(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        losses = module(inputs["x"][None], return_loss_breakdown=True)[1]
        return losses.per_sample_entropy, losses.batch_entropy

    return {"vector-quantize-pytorch": theirs}


def _lfq(device: torch.device, tokens: int, bits: int, *, floor: float = 0.0, compiled: bool = False) -> Case:
    """``floor``: upstream's clamp, so that upstream itself can take part with equal values."""
    kind = "exact" if floor == 0.0 else f"clamp {floor:g}"
    return Case(
        name=f"lfq entropy {kind} fwd+bwd 2^{bits} codes {tokens} tokens float32",
        make_inputs=lambda: {"x": torch.randn(tokens, bits, device=device)},
        ours=lambda i: ops.lfq_entropy(i["x"], log_floor=floor),
        reference=lambda i: reference.lfq_entropy(i["x"], log_floor=floor),
        peers=_upstream(device, bits) if floor else {},
        flops=6 * tokens * 2**bits,
        backward=True,
        compile=compiled,
        note="eager and upstream hold several tensors of tokens x codes",
    )


def _fsq(device: torch.device, tokens: int) -> Case:
    return Case(
        name=f"fsq entropy exact fwd+bwd {list(FSQ_LEVELS)} {tokens} tokens float32",
        make_inputs=lambda: {"z": torch.randn(tokens, len(FSQ_LEVELS), device=device)},
        ours=lambda i: ops.fsq_entropy(i["z"], FSQ_LEVELS),
        reference=lambda i: reference.fsq_entropy(i["z"], FSQ_LEVELS),
        flops=6 * tokens * 64000,
        backward=True,
        compile=False,
    )


def _alone(device: torch.device, tokens: int, bits: int) -> Case:
    """Where a table of tokens x codes fits nowhere: ours against its own float64, to which smaller cases tie it."""

    def check(
        actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], truth: tuple[torch.Tensor, ...]
    ) -> str | None:
        for name, x, exact in zip(("per-sample", "batch", "gradient"), actual, truth, strict=True):
            error = (x.double() - exact).abs().max().item() / exact.abs().max().item()
            if not error < 1e-3:
                return f"{name}: relative error {error:.1e}"
        return None

    return Case(
        name=f"lfq entropy exact fwd+bwd 2^{bits} codes {tokens} tokens float32, no peer fits",
        make_inputs=lambda: {"x": torch.randn(tokens, bits, device=device)},
        ours=lambda i: ops.lfq_entropy(i["x"]),
        reference=lambda i: ops.lfq_entropy(i["x"], estimator="exact"),
        check=check,
        flops=6 * tokens * 2**bits,
        backward=True,
        eager=False,
        compile=False,
        note="no rival where the softmax over every code would need more than 400 GB",
    )


@register(stem="entropy")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """A size where the softmax over every code fits, upstream's own loss, and one where only the product fits."""
    if quick:
        yield _lfq(device, 256, 14, compiled=True)
        yield _fsq(device, 128)
        return
    tokens = 1024 if device.type == "cpu" else 8192
    yield _lfq(device, tokens, 18, compiled=True)
    yield _lfq(device, 256 if device.type == "cpu" else 2048, 16, floor=1e-5)
    yield _fsq(device, tokens)
    yield _alone(device, 65536, 18)
