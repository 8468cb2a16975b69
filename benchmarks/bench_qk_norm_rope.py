# SPDX-License-Identifier: Apache-2.0
"""RMSNorm of q and k with 3-D rotary positions, per head and over the full width."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.registry import Case, Inputs, register
from vidkernels import ops


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1).flatten(-2)


def _rms(x: torch.Tensor, weight: torch.Tensor, norm: str) -> torch.Tensor:
    wide = x if norm == "head" else x.flatten(-2)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight
    return normed.reshape(x.shape)


def _eager(norm: str, axes: tuple[int, int, int]):
    """What models do: norm, tables of angles made beforehand, rotation in float32, cast back."""

    def run(i: Inputs) -> tuple[torch.Tensor, ...]:
        wide = torch.float64 if i["q"].dtype == torch.float64 else torch.float32
        angles = [
            i["positions"][:, axis, None].to(wide)
            * 10000.0 ** (-torch.arange(0, width, 2, device=i["q"].device, dtype=wide) / width)
            for axis, width in enumerate(axes)
        ]
        angle = torch.cat(angles, -1)[:, None]
        outputs = []
        for name in ("q", "k"):
            normed = _rms(i[name].to(wide), i[f"{name}_weight"].to(wide), norm)
            outputs.append(_rotate(normed, angle.cos(), angle.sin()).to(i[name].dtype))
        return tuple(outputs)

    return run


def _case(
    device: torch.device, tokens: int, heads: int, dtype: torch.dtype, norm: str, backward: bool, compiled: bool
) -> Case:
    width, axes = 64, (16, 24, 24)
    frames = 16
    side = int((tokens // frames) ** 0.5)
    count = frames * side * side

    def make() -> Inputs:
        grid = torch.cartesian_prod(*(torch.arange(n, device=device) for n in (frames, side, side)))
        size = width if norm == "head" else heads * width
        tensors = {name: torch.randn(count, heads, width, device=device, dtype=dtype) for name in ("q", "k")}
        weights = {f"{name}_weight": torch.randn(size, device=device, dtype=dtype) for name in ("q", "k")}
        return {**tensors, **weights, "positions": grid}

    return Case(
        name=f"qk_norm_rope {norm} {count}x{heads}x{width} {str(dtype)[6:]}{' fwd+bwd' if backward else ''}",
        make_inputs=make,
        ours=lambda i: tuple(
            ops.qk_norm_rope(i["q"], i["k"], i["q_weight"], i["k_weight"], i["positions"], axes=axes, norm=norm)
        ),
        reference=_eager(norm, axes),
        bytes=count * heads * width * dtype.itemsize * (10 if backward else 4),
        backward=backward,
        compile=compiled,
    )


@register(stem="qk_norm_rope")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Goku-2B's heads."""
    tokens = 4096 if device.type == "cpu" else 65536
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    yield _case(device, tokens, 16, dtype, "head", False, True)
    if not quick:
        yield _case(device, tokens, 28, dtype, "full", False, True)
        yield _case(device, tokens, 16, dtype, "head", True, True)
        yield _case(device, tokens, 16, torch.bfloat16 if device.type == "cpu" else torch.float16, "head", False, True)
