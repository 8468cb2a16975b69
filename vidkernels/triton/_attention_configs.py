# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of the attention kernels, by GPU family and head dimension.

Each is the largest tile of a fixed list that compiles without spills, causal included, and fits shared memory (99 KB on
sm_80's relatives, 64 KB on AMD): found by ahead-of-time compilation, kept by tests/test_varlen_attention_aot.py, not yet
tuned on a device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionConfig:
    """Launch parameters of one kernel: rows of the resident tile, rows of the streamed tile, warps, pipeline stages."""

    resident: int
    streamed: int
    num_warps: int
    num_stages: int


Table = tuple[tuple[int, AttentionConfig], ...]  # up to this head dimension
_C = AttentionConfig
_SM90: dict[str, Table] = {
    "fwd": ((96, _C(128, 128, 8, 2)), (192, _C(128, 64, 8, 2)), (256, _C(128, 32, 8, 1))),
    "bwd_q": ((128, _C(128, 64, 8, 2)), (256, _C(32, 32, 8, 1))),
    "bwd_kv": ((64, _C(128, 64, 8, 2)), (96, _C(128, 32, 8, 2)), (128, _C(128, 32, 8, 1)), (256, _C(32, 32, 8, 1))),
}
_SM80: dict[str, Table] = {
    "fwd": ((64, _C(128, 64, 8, 2)), (96, _C(64, 64, 4, 2)), (128, _C(128, 64, 8, 2)), (256, _C(64, 64, 8, 1))),
    "bwd_q": (
        (64, _C(128, 64, 8, 2)),
        (80, _C(64, 64, 8, 2)),
        (128, _C(128, 32, 8, 2)),
        (256, _C(32, 64, 8, 1)),
    ),
    "bwd_kv": (
        (64, _C(128, 32, 8, 2)),
        (80, _C(64, 32, 4, 2)),
        (96, _C(64, 32, 8, 2)),
        (128, _C(64, 32, 8, 1)),
        (256, _C(32, 32, 8, 1)),
    ),
}
_SM100: dict[str, Table] = {
    "fwd": ((64, _C(128, 128, 8, 2)), (192, _C(128, 64, 8, 2)), (256, _C(128, 32, 8, 1))),
    "bwd_q": _SM90["bwd_q"],
    "bwd_kv": ((96, _C(128, 32, 8, 2)), (128, _C(128, 32, 8, 1)), (256, _C(32, 32, 8, 1))),
}
_AMD: dict[str, Table] = {
    "fwd": ((128, _C(64, 32, 4, 1)), (256, _C(32, 32, 4, 1))),
    "bwd_q": ((128, _C(64, 32, 4, 1)), (256, _C(32, 32, 4, 1))),
    "bwd_kv": ((96, _C(64, 32, 4, 1)), (128, _C(64, 16, 4, 1)), (256, _C(32, 32, 4, 1))),
}
# float32 products run on the plain units, where operands live in registers: small tiles.
_FLOAT32: dict[str, Table] = {
    "fwd": ((128, _C(16, 32, 4, 1)), (256, _C(16, 16, 8, 1))),
    "bwd_q": ((64, _C(16, 16, 4, 1)), (256, _C(16, 16, 8, 1))),
    "bwd_kv": ((64, _C(16, 16, 4, 1)), (256, _C(16, 16, 8, 1))),
}
FAMILIES = {"sm_80": _SM80, "sm_90": _SM90, "sm_100": _SM100, "amd": _AMD}


def attention_config(
    kernel: str, head_dim: int, dtype: torch.dtype, longest: int, device_family: str
) -> AttentionConfig:
    """Configuration of "fwd", "bwd_q" or "bwd_kv".

    Args:
        longest: upper bound on the lengths that the resident tile walks over; short segments take tiles of 64 rows,
            since the rest of a tile is computed for nothing.
    """
    tables = _FLOAT32 if dtype == torch.float32 else FAMILIES[device_family]
    config = next(c for limit, c in tables[kernel] if head_dim <= limit)
    if longest <= 64 and config.resident == 128:
        streamed = min(config.streamed, 32 if kernel == "bwd_kv" else 64)
        return AttentionConfig(64, streamed, 4 if head_dim <= 64 else 8, config.num_stages)
    return config
