# SPDX-License-Identifier: Apache-2.0
"""Numbers on their way from a GPU to the host, for which the GPU's queue is not waited."""

from __future__ import annotations

import torch
from torch import Tensor


class ToHost:
    """A copy into pinned memory and the event behind it."""

    def __init__(self, value: Tensor) -> None:
        self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        self._host.copy_(value, non_blocking=True)
        self._event = torch.cuda.Event()
        # The copy is queued on the value's GPU, which need not be the current one.
        self._event.record(torch.cuda.current_stream(value.device))

    def arrived(self) -> bool:
        return self._event.query()

    def wait(self) -> Tensor:
        self._event.synchronize()
        return self._host
