# SPDX-License-Identifier: Apache-2.0
"""Launchers of the group norm's Triton kernels: how a clip is cut into slabs and tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vidkernels.triton import _group_norm_kernels as kernels
from vidkernels.triton._sizes import cdiv, next_power_of_2

# Programs of a pass, about 8 for every slot of an H100, and slabs that one program merges.
_PROGRAMS = 4096
_MAX_SLABS = 2048
_TILE = 4096


@dataclass(frozen=True)
class GroupConfig:
    """Positions and channels of a tile, and the warps that hold it: 16 values a thread, three to four such tiles."""

    block_p: int
    block_c: int
    num_warps: int


def group_config(channels: int, positions: int, rows: bool) -> GroupConfig:
    """The tile: 16 to 256 channels of whole rows, or up to 1024 adjacent positions of a few channels."""
    wide = next_power_of_2(channels)
    length = next_power_of_2(positions)
    if rows:
        divisor = channels & -channels
        block_c = min(256, divisor if divisor >= 64 else wide)
        block_p = min(length, _TILE // block_c)
    else:
        block_p = min(length, _TILE // 4)
        block_c = min(wide, _TILE // block_p)
    return GroupConfig(block_p, block_c, max(1, min(8, block_p * block_c // 512)))


def _merge_blocks(width: int, slabs: int) -> dict[str, int]:
    block_k = next_power_of_2(width)
    block_s = min(next_power_of_2(slabs), max(1, 1024 // block_k))
    return {"BLOCK_S": block_s, "BLOCK_K": block_k, "num_warps": max(1, min(8, block_s * block_k // 256))}


@dataclass(frozen=True)
class _Plan:
    """How a tensor is cut: samples of `positions` each, in `slabs` of `tiles` tiles, and the strides of all axes."""

    samples: int
    positions: int
    slabs: int
    tiles: int
    programs: int
    sizes: tuple[int, ...]  # frames, slabs, tiles, and strides, as the kernels take them
    config: GroupConfig

    def blocks(self) -> dict[str, int]:
        return {
            "BLOCK_P": self.config.block_p,
            "BLOCK_C": self.config.block_c,
            "num_warps": self.config.num_warps,
        }


def _plan(x: torch.Tensor, per_frame: bool) -> _Plan:
    batch, channels = x.shape[:2]
    rows = x.ndim >= 4 and channels > 1 and x.stride(1) == 1
    layout = torch.contiguous_format
    if rows:
        layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    if not x.is_contiguous(memory_format=layout):
        raise ValueError("group_norm: x must be contiguous or channels last")
    frames = x.shape[2] if per_frame else 1
    everything = x.numel() // (batch * channels)
    positions = everything // frames
    if rows:
        strides = (everything * channels, positions * channels, channels, 1)
    else:
        strides = (everything * channels, positions, 1, everything)
    config = group_config(channels, positions, rows)
    samples, chunks = batch * frames, cdiv(channels, config.block_c)
    all_tiles = cdiv(positions, config.block_p)
    tiles = max(cdiv(all_tiles * samples * chunks, _PROGRAMS), cdiv(all_tiles, _MAX_SLABS))
    slabs = cdiv(all_tiles, tiles)
    sizes = (frames, slabs, tiles, *strides)
    return _Plan(samples, positions, slabs, tiles, samples * chunks * slabs, sizes, config)


def group_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    per_frame: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launcher of `vidkernels::group_norm_fwd_triton`."""
    plan = _plan(x, per_frame)
    channels = x.shape[1]
    y = torch.empty_like(x)
    mean, rstd = x.new_empty((2, plan.samples, groups), dtype=torch.float64)
    partial = x.new_empty((plan.samples, plan.slabs, 2, channels), dtype=torch.float64)
    kernels._group_norm_sums_kernel[(plan.programs,)](
        x, partial, plan.positions, channels, *plan.sizes, **plan.blocks()
    )
    kernels._group_norm_merge_kernel[(plan.samples * groups,)](
        partial, mean, rstd, plan.positions, channels, groups, plan.slabs, plan.tiles * plan.config.block_p, eps,
        **_merge_blocks(channels // groups, plan.slabs),
    )  # fmt: skip
    kernels._group_norm_apply_kernel[(plan.programs,)](
        x, weight, bias, mean, rstd, y, plan.positions, channels, groups, *plan.sizes, SILU=silu,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **plan.blocks(),
    )  # fmt: skip
    return y, mean, rstd


def _affine_grad(affine: torch.Tensor | None, x: torch.Tensor, wanted: bool, terms: torch.Tensor) -> torch.Tensor:
    if affine is None or not wanted:
        return (x if affine is None else affine).new_empty(0)
    return terms.sum(dim=0).to(affine.dtype)


def group_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
    silu: bool,
    per_frame: bool,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launcher of `vidkernels::group_norm_bwd_triton`."""
    plan = _plan(x, per_frame)
    channels = x.shape[1]
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    options: dict[str, Any] = {"SILU": silu, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    partial = x.new_empty((plan.samples, plan.slabs, 2, channels), dtype=torch.float64)
    kernels._group_norm_bwd_sums_kernel[(plan.programs,)](
        dy, x, weight, bias, mean, rstd, partial, plan.positions, channels, groups, *plan.sizes, **options,
        **plan.blocks(),
    )  # fmt: skip
    affine = x.new_empty((plan.samples, 2, channels), dtype=torch.float64)
    lines = x.new_empty((plan.samples, groups, 2), dtype=torch.float32)
    kernels._group_norm_bwd_merge_kernel[(plan.samples * groups,)](
        partial, weight, mean, rstd, affine, lines, plan.positions, channels, groups, plan.slabs,
        HAS_WEIGHT=weight is not None, **_merge_blocks(channels // groups, plan.slabs),
    )  # fmt: skip
    dx = x.new_empty(0)
    if want_x:
        dx = torch.empty_like(x)
        kernels._group_norm_dx_kernel[(plan.programs,)](
            dy, x, weight, bias, mean, rstd, lines, dx, plan.positions, channels, groups, *plan.sizes, **options,
            **plan.blocks(),
        )  # fmt: skip
    dweight = _affine_grad(weight, x, want_weight, affine[:, 0])
    return dx, dweight, _affine_grad(bias, x, want_bias, affine[:, 1])
