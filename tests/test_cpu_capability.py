# SPDX-License-Identifier: Apache-2.0
"""The copies of the C++ kernels for lesser instruction sets than this processor's, forward and backward, in both dtypes."""

from __future__ import annotations

import pytest
import torch
from helpers import run_python

from vidkernels import _library
from vidkernels._conv import cpp

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


_BITS = """
import torch
from vidkernels._conv import cpp
from vidkernels.ops import varlen_attention
torch.manual_seed(0)
q, k, v = torch.randn(3, 64, 2, 64).bfloat16()
_, stats = torch.ops.vidkernels.varlen_attention_fwd(q, k, v, *[torch.tensor([0, 64], dtype=torch.int32)] * 2, 64, 64, False, 0.125)
print(cpp.multiplies_tiles(torch.bfloat16), stats.double().sum().item().hex())
"""


@pytest.mark.skipif(not cpp.multiplies_tiles(torch.bfloat16), reason="needs a processor with AMX")
def test_one_variable_takes_amx_from_the_policy_and_from_the_kernels() -> None:
    """Attention's sums tell by which exponential they were made."""
    limits = ({}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, {"DNNL_MAX_CPU_ISA": "avx512_core_bf16"})
    told = [run_python(_BITS, env=env).split() for env in limits]
    assert [policy for policy, _ in told] == ["True", "False", "False"]
    assert told[0][1] != told[1][1] == told[2][1]


def test_every_op_without_amx() -> None:
    run_python(_EXAMINE, env={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"})
