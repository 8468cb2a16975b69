# SPDX-License-Identifier: Apache-2.0
"""The group norm's Triton kernels as launched, compiled ahead of time: no spills, 16 bytes a load and store."""

from __future__ import annotations

import aot
import launches
import pytest
import torch

from vidkernels import ops

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


@pytest.mark.parametrize(
    ("dtype", "last", "target"),
    [(torch.float32, True, "sm_90"), (torch.bfloat16, False, "sm_90"), (torch.bfloat16, True, "sm_80")],
    ids=str,
)
def test_wide_accesses_and_no_spills(dtype: torch.dtype, last: bool, target: str) -> None:
    x = torch.empty(1, 128, 20, 256, 256, device="meta", dtype=dtype)
    x = (x.to(memory_format=torch.channels_last_3d) if last else x).requires_grad_()
    weight = torch.empty(128, device="meta", dtype=dtype)
    with launches.record(target) as found:
        y = ops.group_norm(x, 32, weight, weight, activation="silu", per_frame=True, backend="triton")
        y.sum().backward()
    assert len(found) == 6
    for launch in found:
        # on sm_80 the short merging kernel of the backward keeps one value for its last lines in memory
        assert launch.report.spills <= (8 if "bwd_merge" in launch.kernel and target == "sm_80" else 0), launch
        if "merge" not in launch.kernel:
            assert launch.report.wide_loads > 0, launch
        if "apply" in launch.kernel or "dx" in launch.kernel:
            assert launch.report.wide_stores > 0, launch
