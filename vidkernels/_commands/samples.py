# SPDX-License-Identifier: Apache-2.0
"""One small call of every public op with backends: what `info` explains and `doctor` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Arguments of one call. Floating tensors among them get gradients in `doctor`."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


Draw = Callable[..., Tensor]


def _quantizers(draw: Draw, device: torch.device) -> Iterator[Sample]:
    levels, indices = [8, 5, 5, 3], torch.arange(600, dtype=torch.int32, device=device).reshape(2, 300)
    digits = torch.cartesian_prod(*(torch.arange(n, device=device) - n // 2 for n in levels))  # [600, 4]
    yield Sample("fsq_quantize", (draw(2, 33, 4), levels))
    yield Sample("fsq_codes_to_indices", (digits / torch.tensor([4, 2, 2, 1], device=device), levels))
    yield Sample("fsq_indices_to_codes", (indices, levels))
    yield Sample("fsq_entropy", (draw(2, 33, 4), levels), {"inv_temperature": 1.0})
    yield Sample("lfq_quantize", (draw(2, 33, 10),))
    yield Sample("lfq_indices_to_codes", (indices.long(), 10))
    yield Sample("lfq_entropy", (draw(2, 33, 10),), {"inv_temperature": 1.0})


def _tokenizer(draw: Draw) -> Iterator[Sample]:
    x = draw(1, 16, 5, 6, 7).contiguous(memory_format=torch.channels_last_3d)
    yield Sample("causal_conv3d", (x, 0.1 * draw(16, 16, 3, 3, 3), draw(16)))
    yield Sample("upsample_conv3d", (x, 0.1 * draw(16, 16, 3, 3, 3), draw(16)), {"mix_factor": draw(1)})
    yield Sample("channel_norm", (x, draw(16), draw(16)), {"activation": "silu"})
    yield Sample("group_norm", (x, 4, draw(16), draw(16)), {"activation": "silu"})
    yield Sample("alpha_blend", (x, draw(*x.shape), draw(1)))
    yield Sample("alpha_blend_down", (x, draw(1, 16, 2, 6, 7), draw(1)))
    yield Sample("alpha_blend_up", (x, draw(1, 16, 10, 6, 7), draw(1)))


def _transformer(draw: Draw, device: torch.device) -> Iterator[Sample]:
    x, shift, scale, gate = draw(2, 20, 64), draw(2, 64), draw(2, 64), draw(2, 64)
    yield Sample("adaln_modulate", (x, shift, scale))
    yield Sample("gate_residual", (x, draw(2, 20, 64), gate))
    yield Sample("adaln_zero", (x, draw(2, 20, 64), gate, shift, scale))
    yield Sample("gated_activation", (x,))
    axes = [torch.arange(n, device=device) for n in (2, 3, 4)]
    positions = torch.cartesian_prod(*axes)  # [24, 3]
    q, k, v = (draw(24, 2, 32) for _ in range(3))
    yield Sample("qk_norm_rope", (q, k, draw(32), draw(32), positions), {"axes": (8, 12, 12)})
    lengths = torch.tensor([0, 9, 10, 24], dtype=torch.int32, device=device)
    yield Sample("varlen_attention", (q, k, v, lengths, lengths, 14, 14))
    inside = {"q_weight": draw(32), "k_weight": draw(32), "positions": positions, "axes": (8, 12, 12)}
    yield Sample("norm_rope_attention", (q, k, v, lengths, 14), inside)
    video = [draw(1, 4, 6, 2, 32) for _ in range(3)]
    yield Sample("axial_attention", (*video, 1), {"positions": positions[:4, 2:]})


def samples(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Sample]:
    """All samples on a device, the same numbers at every call."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    return [*_quantizers(draw, device), *_tokenizer(draw), *_transformer(draw, device)]
