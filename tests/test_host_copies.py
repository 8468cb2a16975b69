# SPDX-License-Identifier: Apache-2.0
"""Steps that copy nothing to the device: a copy from ordinary memory makes the host wait for all that was launched before.

The device is "meta" here: what would be copied is created on the CPU and moved, and every op is looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidkernels.caching._requests import Members, merge, select
from vidkernels.ops import _entropy_sums
from vidkernels.sampling import GaussianDiffusion

META = torch.device("meta")


_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


class _FromNumbers(TorchFunctionMode):
    """Tensors on the device made of Python's numbers; no op of such a call reaches `_Copies`."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FROM_NUMBERS and result.device == META:
            self.found.append(func.__name__)
        return result


class _Moved(TorchDispatchMode):
    """Ops with a result on the device and an argument on the host."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t.device for t in tree_leaves(result) if isinstance(t, Tensor)]
        if META in made and torch.device("cpu") in given:
            self.found.append(str(func))
        return result


@contextlib.contextmanager
def copies() -> Iterator[list[str]]:
    """Names of what copies something to the device within the block."""
    found: list[str] = []
    with _Moved(found), _FromNumbers(found):
        yield found


def test_copies_are_seen() -> None:
    with copies() as found:
        torch.tensor([1, 2], device=META)
        torch.empty(3, device=META)[torch.tensor([0])]
        torch.ones(2).to(META)
    assert found == ["tensor", "aten.index.Tensor", "aten._to_copy.default"]


def test_requests_are_picked_without_an_index() -> None:
    groups = [Members((0, 2, 3), 2, 4), Members((1,), 2, 4)]
    batch, requests = torch.empty(8, 3, device=META), torch.empty(4, device=META)
    with copies() as found:
        parts = [(select(batch, members), select(requests, members)) for members in groups]
        joined = merge([part for part, _ in parts], groups)
    assert joined.shape == batch.shape and parts[0][1].shape == (3,)
    assert not found


def test_training_losses_copy_their_schedules_once() -> None:
    diffusion = GaussianDiffusion()
    x0, t = torch.empty(3, 2, 4, 3, 3, device=META), torch.empty(3, dtype=torch.int64, device=META)

    def step() -> Tensor:
        return diffusion.training_losses(lambda x, _: torch.cat([x, x], 2), x0, t, x0)["loss"]

    step()
    with copies() as found:
        assert step().shape == (3,)
    assert not found
    other = GaussianDiffusion("10")
    assert other.training_losses(lambda x, _: torch.cat([x, x], 2), x0, t, x0)["vb"].shape == (3,)
    assert other._schedule("steps", META).shape == (10,)


def test_grids_are_copied_once() -> None:
    plan = _entropy_sums.Plan((3, 2), (-1.0, 0.0, 1.0, -1.0, 1.0), 2, 1.0, 0.0)
    with torch.inference_mode():
        plan.grid(torch.empty(1, device=META))
    with copies() as found:
        grid, real = plan.grid(torch.empty(5, device=META))
    assert grid.shape == real.shape == (2, 3) and not found and not grid.is_inference()
    assert plan.grid(torch.empty(1))[0].tolist() == [[-1.0, 0.0, 1.0], [-1.0, 1.0, 0.0]]
    assert plan.grid(torch.empty(1, dtype=torch.float64))[0].dtype == torch.float64
