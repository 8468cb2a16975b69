# SPDX-License-Identifier: Apache-2.0
"""What launchers ask about a device, asked once. Needs no Triton: ops choose by it as well."""

from __future__ import annotations

from functools import lru_cache

import torch

from vidkernels._tracing import constant_while_tracing


@constant_while_tracing
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; (0, 0) where there is none to ask, as for fake CUDA tensors on a machine without a driver."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


@constant_while_tracing
@lru_cache
def family(device: torch.device) -> str:
    """ "sm_80", "sm_90", "sm_100" or "amd": what tables of launch configurations tell apart. NVIDIA GPUs after sm_100 take its
    rows; the interpreter, which takes any tile, those of sm_90."""
    if torch.version.hip is not None:
        return "amd"
    if device.type != "cuda":
        return "sm_90"
    major = capability(device)[0]
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; 4 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
