# SPDX-License-Identifier: Apache-2.0
"""RMSNorm of q and k with 3-D rotary positions, per head and over the full width."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.registry import Case, Function, Inputs, register
from vidkernels import ops


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "half":
        a, b = x.chunk(2, -1)
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1).flatten(-2)


def _angle(positions: torch.Tensor, axes: tuple[int, int, int], wide: torch.dtype) -> torch.Tensor:
    """`[tokens, pairs]`, the axes' pairs one after the other."""
    angles = [
        positions[:, axis, None].to(wide)
        * 10000.0 ** (-torch.arange(0, width, 2, device=positions.device, dtype=wide) / width)
        for axis, width in enumerate(axes)
    ]
    return torch.cat(angles, -1)


def _rms(x: torch.Tensor, weight: torch.Tensor, norm: str) -> torch.Tensor:
    wide = x if norm == "head" else x.flatten(-2)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight
    return normed.reshape(x.shape)


def _eager(norm: str, axes: tuple[int, int, int], layout: str) -> Function:
    """What models do: norm, tables of angles made beforehand, rotation in float32, cast back."""

    def run(i: Inputs) -> tuple[torch.Tensor, ...]:
        wide = torch.float64 if i["q"].dtype == torch.float64 else torch.float32
        angle = _angle(i["positions"], axes, wide)[:, None]
        outputs = []
        for name in ("q", "k"):
            normed = _rms(i[name].to(wide), i[f"{name}_weight"].to(wide), norm)
            outputs.append(_rotate(normed, angle.cos(), angle.sin(), layout).to(i[name].dtype))
        return tuple(outputs)

    return run


class _Tables:
    """Cosines and sines as a model keeps them for all its blocks: made at the first call, outside the time."""

    def __init__(self, axes: tuple[int, int, int]) -> None:
        self.axes = axes
        self.made: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        if self.made is None:
            angle = _angle(i["positions"], self.axes, torch.float32)
            self.made = angle.cos(), angle.sin()
        return self.made


def _torch_rms_norm(norm: str, tables: _Tables, layout: str) -> Function:
    """torch's fused RMSNorm, which rounds to the dtype of q, then the rotation in float32."""

    def run(i: Inputs) -> tuple[torch.Tensor, ...]:
        cosine, sine = (table[:, None] for table in tables(i))
        outputs = []
        for name in ("q", "k"):
            x = i[name] if norm == "head" else i[name].flatten(-2)
            normed = F.rms_norm(x, x.shape[-1:], i[f"{name}_weight"], 1e-6).reshape(i[name].shape)
            outputs.append(_rotate(normed.float(), cosine, sine, layout).to(normed.dtype))
        return tuple(outputs)

    return run


def _liger(norm: str, tables: _Tables) -> Function:
    """Liger's RMSNorm of q and of k, then its rotation of both in place: three launches, halves for pairs."""

    def run(i: Inputs) -> tuple[torch.Tensor, ...]:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction

        cosine, sine = (torch.cat([table, table], -1)[None] for table in tables(i))
        normed = []
        for name in ("q", "k"):
            x = i[name] if norm == "head" else i[name].flatten(-2)
            y = LigerRMSNormFunction.apply(x, i[f"{name}_weight"], 1e-6, 0.0, "gemma")
            normed.append(y.reshape(i[name].shape)[None].transpose(1, 2))
        return tuple(y.transpose(1, 2)[0] for y in LigerRopeFunction.apply(*normed, cosine, sine))

    return run


def _rivals(device: torch.device, norm: str, axes: tuple[int, int, int], layout: str) -> dict[str, Function]:
    tables = _Tables(axes)
    found = {"F.rms_norm + rotation in torch": _torch_rms_norm(norm, tables, layout)}
    if device.type == "cuda" and layout == "half" and peers.find("liger_kernel.ops.rope"):
        found["Liger RMSNorm + RoPE"] = _liger(norm, tables)
    return found


def _case(
    device: torch.device,
    tokens: int,
    heads: int,
    dtype: torch.dtype,
    norm: str,
    backward: bool,
    compiled: bool,
    layout: str = "interleaved",
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
        name=f"qk_norm_rope {norm} {count}x{heads}x{width} {str(dtype)[6:]}"
        f"{'' if layout == 'interleaved' else ', pairs of halves'}{' fwd+bwd' if backward else ''}",
        make_inputs=make,
        ours=lambda i: tuple(
            ops.qk_norm_rope(
                i["q"], i["k"], i["q_weight"], i["k_weight"], i["positions"], axes=axes, norm=norm, layout=layout
            )
        ),
        reference=_eager(norm, axes, layout),
        peers=_rivals(device, norm, axes, layout),
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
        if device.type != "cpu":  # the pairs that other libraries' rotations know
            for backward in (False, True):
                yield _case(device, tokens, 16, dtype, "head", backward, True, "half")
