# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a causal convolution. One predicate per backend: None, or the reason why it cannot.

Facts, after the leading tensor x: output channels, then kernel, stride, dilation, padding, time_mode, space_mode as in
the bare ops, frames of history (0: none) and activation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vidkernels import dispatch

_SUFFIX = {"cpp": "", "cudnn": "_cudnn", "triton": "_triton", "torch": "_torch"}


def bare_op(name: str, backend: str) -> Callable[..., Any]:
    """The bare op of one backend, e.g. `vidkernels::causal_conv3d_fwd_torch`."""
    return getattr(torch.ops.vidkernels, name + _SUFFIX[backend]).default


def _cudnn(
    x: torch.Tensor,
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_mode: int,
    space_mode: int,
    history_frames: int,
    activation: int,
) -> str | None:
    if x.device.type != "cuda":
        return f"it runs on cuda tensors, got {x.device.type}"
    return "the cuDNN graph backend is not part of this version"


def _torch(x: torch.Tensor, *facts: object) -> str | None:
    return None


def _no_triton(x: torch.Tensor, *facts: object) -> str | None:
    return "the Triton kernels are not part of this version"


def table() -> dict[str, dispatch.Predicate]:
    """Backends of causal_conv3d in order of preference. Call it after the bare ops are defined."""
    # A library built for some stems only (VIDKERNELS_OPS) may lack this one.
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key("vidkernels::causal_conv3d_out", "CPU")

    def has_kernel(x: torch.Tensor, *facts: object) -> str | None:
        return None if compiled else "the loaded library was built without causal_conv3d"

    return {
        "cpp": dispatch.cpp(check=has_kernel),
        "cudnn": _cudnn,
        "triton": dispatch.triton(check=_no_triton),
        "torch": _torch,
        "reference": dispatch.always,
    }
