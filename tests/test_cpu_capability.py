# SPDX-License-Identifier: Apache-2.0
"""The copies of the C++ kernels for lesser instruction sets than this processor's, forward and backward, in both dtypes."""

from __future__ import annotations

import pytest
from helpers import run_python

from vidkernels import _library

pytestmark = pytest.mark.skipif(_library.cpu_missing is not None, reason=str(_library.cpu_missing))

_EXAMINE = """
import torch
from vidkernels._commands import doctor
for dtype in (torch.float32, torch.bfloat16):
    verdicts = [verdict for verdict in doctor.examine(torch.device("cpu"), dtype) if verdict.backend == "cpp"]
    served = [verdict for verdict in verdicts if verdict.verdict == "ok"]
    assert len(served) >= 10 and not any(verdict.bad for verdict in verdicts), verdicts
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_op(capability: str) -> None:
    run_python(_EXAMINE, env={"ATEN_CPU_CAPABILITY": capability})


def test_without_tiles_of_amx() -> None:
    """oneDNN's own variable takes them from the policy and from the kernels alike."""
    check = "from vidkernels._conv import cpp; assert not cpp.multiplies_tiles(torch.bfloat16)"
    run_python(_EXAMINE + check, env={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"})
