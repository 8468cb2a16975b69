# SPDX-License-Identifier: Apache-2.0
"""qk_norm_rope's bare ops in every layout: memory accesses under sanitizers, values and gradients against the law."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import assert_gradients_within_promise
from test_qk_norm_rope import SETUPS, Setup, run

from vidkernels import ops
from vidkernels._reference import qk_norm_rope as reference

CPU = torch.device("cpu")
CHOSEN = [
    *[setup for setup in SETUPS if setup.head_dim % 2 == 0],
    Setup("wide, one launch a side", (3,), (44, 43), 128, norm="full"),
    Setup("wide heads", (2,), (33, 33), 128, layout="half"),
    Setup("many tokens", (150,), (2, 1), 16, axes=(4, 6, 6)),
    Setup("chunks of four", (6,), (3, 1), 72, layout="half"),
    Setup("chunks of one", (6,), (2, 2), 18, layout="axis_half", axes=(6, 6, 4)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("setup", CHOSEN, ids=[setup.name for setup in CHOSEN])
def test_values_and_gradients(setup: Setup, dtype: torch.dtype) -> None:
    positions, options = setup.positions(CPU), setup.options(CPU)
    inputs = setup.inputs(dtype, CPU)
    names = ["q", "k", "q_weight", "k_weight"][: len(inputs)]
    actual = run(ops.qk_norm_rope, positions, {**options, "backend": "cpp"})
    assert_gradients_within_promise(actual, run(reference.qk_norm_rope, positions, options), inputs, names=names)


def test_strided_and_misaligned() -> None:
    """Slices of a fused projection, and channels that begin at an odd element: smaller chunks, the same values."""
    for offset in (0, 1, 4):
        memory = torch.randn(2 * 3 * 3 * 4 * 16 + offset)[offset:]
        q, k, _ = memory.view(2, 3, 3, 4, 16).unbind(2)
        positions = torch.randint(0, 60, (3, 3))
        expected = reference.qk_norm_rope(q, k, positions=positions)
        for a, e in zip(ops.qk_norm_rope(q, k, positions=positions, backend="cpp"), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
        ops.qk_norm_rope(q, k, positions=positions, inplace=True, backend="cpp")
        torch.testing.assert_close(q, expected[0], rtol=1e-5, atol=1e-6)
