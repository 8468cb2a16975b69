# SPDX-License-Identifier: Apache-2.0
"""Temporal attention with query/key norm and rotation: 16 and 32 frames, and packed segments of 16 to 32 tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from benchmarks.registry import Case, Function, Inputs, register
from vidkernels import ops

WIDTH = 72
EPS = 1e-6


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * weight.to(wide)).to(x.dtype)


def _turned(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Neighbouring channels turned in the wide dtype; `angle` [tokens, 1, D / 2]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angle.cos().to(wide), angle.sin().to(wide)
    return torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1).flatten(-2).to(x.dtype)


def _angles(places: torch.Tensor) -> torch.Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, WIDTH, 2, device=places.device, dtype=torch.float64) / WIDTH)
    return (places[:, None].double() * frequencies)[:, None]


def _rearranged(shape: tuple[int, ...]) -> Function:
    """What STDiT3 does: time next to the channels, norm, rotation, SDPA, and back."""
    batch, frames, positions = shape[:3]

    def run(i: Inputs) -> torch.Tensor:
        q, k, v = i["qkv"].view(*shape[:3], 3, *shape[3:]).permute(3, 0, 2, 1, 4, 5).flatten(1, 2).unbind(0)
        angle = _angles(torch.arange(frames, device=q.device))
        q, k = (_turned(_normed(x, i[name]), angle) for x, name in ((q, "q_weight"), (k, "k_weight")))
        mixed = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return mixed.unflatten(0, (batch, positions)).transpose(1, 2).contiguous()

    return run


def _video(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> Case:
    frames, heads = shape[1], shape[3]
    places = torch.arange(frames, dtype=torch.int32, device=device)[:, None]
    tokens = shape[0] * frames * shape[2]

    def make() -> Inputs:
        qkv = torch.randn(*shape[:3], 3 * heads * WIDTH, device=device, dtype=dtype)
        weights = {f"{name}_weight": torch.rand(WIDTH, device=device, dtype=dtype) + 0.5 for name in ("q", "k")}
        return {"qkv": qkv, **weights}

    def ours(i: Inputs) -> torch.Tensor:
        q, k, v = i["qkv"].view(*shape[:3], 3, heads, WIDTH).unbind(3)
        sides = {"q_weight": i["q_weight"], "k_weight": i["k_weight"], "positions": places, "axes": (WIDTH,)}
        return ops.axial_attention(q, k, v, 1, norm="head", eps=EPS, **sides)

    return Case(
        name=f"over time {'x'.join(map(str, shape))} {str(dtype)[6:]}{' fwd+bwd' if backward else ''}",
        make_inputs=make,
        ours=ours,
        reference=_rearranged(shape),
        bytes=(11 if backward else 4) * tokens * heads * WIDTH * dtype.itemsize,
        flops=4 * tokens * frames * heads * WIDTH * (3 if backward else 1),
        backward=backward,
        compile=not backward,
        note="norm and rotation of q and k included; reference: time moved next to the channels",
    )


def _padded(lengths: Sequence[int]) -> Function:
    """Norm, rotation, every segment padded to the longest, SDPA under a mask."""
    longest = max(lengths)

    def run(i: Inputs) -> torch.Tensor:
        sizes = torch.tensor(lengths, device=i["q"].device)
        keep = torch.arange(longest, device=sizes.device)[None] < sizes[:, None]
        angle = _angles(keep.nonzero()[:, 1])
        rows = [_turned(_normed(i[name], i[f"{name}_weight"]), angle) for name in ("q", "k")]
        full = [x.new_zeros(len(lengths), longest, *x.shape[1:]) for x in (*rows, i["v"])]
        parts = [y.masked_scatter(keep[..., None, None], x) for x, y in zip((*rows, i["v"]), full, strict=True)]
        mask = keep[:, None, None]
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in parts), attn_mask=mask).transpose(1, 2)[keep]

    return run


def _pack(device: torch.device, lengths: Sequence[int], heads: int, dtype: torch.dtype) -> Case:
    total, longest = sum(lengths), max(lengths)
    offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)
    places = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])[:, None].to(device)

    def make() -> Inputs:
        parts = {name: torch.randn(total, heads, WIDTH, device=device, dtype=dtype) for name in ("q", "k", "v")}
        weights = {f"{name}_weight": torch.rand(WIDTH, device=device, dtype=dtype) + 0.5 for name in ("q", "k")}
        return {**parts, **weights}

    def ours(i: Inputs) -> torch.Tensor:
        sides = {"q_weight": i["q_weight"], "k_weight": i["k_weight"], "positions": places, "axes": (WIDTH,)}
        return ops.norm_rope_attention(i["q"], i["k"], i["v"], offsets, longest, eps=EPS, **sides)

    return Case(
        name=f"packed {len(lengths)} segments {total} tokens {heads}x{WIDTH} {str(dtype)[6:]}",
        make_inputs=make,
        ours=ours,
        reference=_padded(lengths),
        bytes=4 * total * heads * WIDTH * dtype.itemsize,
        flops=4 * heads * WIDTH * sum(length**2 for length in lengths),
        compile=False,
        note="norm and rotation of q and k included; reference: padded batch with a mask",
    )


@register(stem="axial_attention")
def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Latte's and STDiT3's heads (16 x 72) over 16 and 32 frames, and a pack of short segments."""
    cpu = device.type == "cpu"
    dtype = torch.float32 if cpu else torch.bfloat16
    positions = 64 if cpu else 1024
    yield _video(device, (1, 16, positions, 16, WIDTH), dtype, False)
    yield _pack(device, [16 + 4 * (i % 5) for i in range(60 if quick else 240)], 16, dtype)
    if not quick:
        yield _video(device, (1, 32, positions // 2, 16, WIDTH), dtype, False)
        yield _video(device, (1, 16, positions, 16, WIDTH), dtype, True)
        yield _video(device, (1, 16, positions, 16, WIDTH), torch.bfloat16 if cpu else torch.float16, False)
