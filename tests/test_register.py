# SPDX-License-Identifier: Apache-2.0
"""Launchers run on the device of their tensors, not on the current one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from vidkernels import ops
from vidkernels.ops import _register


@pytest.mark.parametrize("index", [0, 1])
def test_launchers_make_the_device_of_their_tensor_current(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    class OnDevice(torch.Tensor):
        def get_device(self) -> int:
            return index

    @contextlib.contextmanager
    def device(wanted: int) -> Iterator[None]:
        before, current[0] = current[0], wanted
        yield
        current[0] = before

    monkeypatch.setattr(_register, "_current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    x = torch.empty(1).as_subclass(OnDevice)
    launch = _register._on_its_device(lambda *args, z: (current[0], args[-1], z))
    assert launch(x, 2, z=3) == (index, 2, 3)
    # the gradient of adaln_zero's hidden state, where only the other output was used
    assert launch(None, x, 2, z=3) == (index, 2, 3)
    assert current == [0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_call_on_the_second_device() -> None:
    z = torch.randn(64, 6, device="cuda:1")
    codes, indices = ops.fsq_quantize(z, [8, 8, 8, 5, 5, 5], backend="triton")
    right, places = ops.fsq_quantize(z.cpu(), [8, 8, 8, 5, 5, 5], backend="reference")
    assert torch.equal(codes.cpu(), right) and torch.equal(indices.cpu(), places)
