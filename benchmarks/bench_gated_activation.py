# SPDX-License-Identifier: Apache-2.0
"""Gated activations of feed-forwards: GEGLU of Latte, SwiGLU of Mochi."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.registry import Case, Inputs, register
from vidkernels import ops

# Tokens and hidden width: Latte-XL/2 at 512 x 512, Mochi at 480p.
SIZES = {"gelu": (32768, 4608), "silu": (44520, 8192)}


def _case(device: torch.device, activation: str, dtype: torch.dtype, backward: bool) -> Case:
    tokens, width = (128, 2304) if device.type == "cpu" else SIZES[activation]

    def make() -> Inputs:
        return {"x": torch.randn(1, tokens, 2 * width, device=device, dtype=dtype)}

    def reference(inputs: Inputs) -> torch.Tensor:
        """What diffusers' GEGLU and SwiGLU run."""
        hidden, gate = inputs["x"].chunk(2, dim=-1)
        return hidden * (F.silu(gate) if activation == "silu" else F.gelu(gate))

    return Case(
        name=f"{'SwiGLU' if activation == 'silu' else 'GEGLU'} {tokens}x{width} {str(dtype)[6:]}"
        f"{' fwd+bwd' if backward else ''}",
        make_inputs=make,
        ours=lambda i: ops.gated_activation(i["x"], activation),
        reference=reference,
        bytes=tokens * width * dtype.itemsize * (8 if backward else 3),
        backward=backward,
        compile=True,
    )


@register(stem="gated_activation")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Both activations; bytes: x read and y written, then x and dy read and dx written."""
    narrow = torch.float32 if device.type == "cpu" else torch.bfloat16
    yield _case(device, "gelu", narrow, False)
    if not quick:
        yield _case(device, "silu", narrow, False)
        yield _case(device, "gelu", narrow, True)
        yield _case(device, "gelu", torch.bfloat16 if device.type == "cpu" else torch.float32, False)
