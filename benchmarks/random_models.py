# SPDX-License-Identifier: Apache-2.0
"""Models with random weights for whole-model cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


def build(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """`make()` with seed 0, made on the device and in the dtype (fake parameters cannot be converted afterwards), in eval mode.

    Parameters that start at zero (gates, ends of residual branches) would leave most of a model out of its result: they
    get small random values.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make()
    finally:
        torch.set_default_dtype(before)
    model = model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if not isinstance(parameter, FakeTensor) and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model
