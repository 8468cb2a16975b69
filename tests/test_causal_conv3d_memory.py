# SPDX-License-Identifier: Apache-2.0
"""No backend makes a padded or concatenated copy of the activation: allocations are counted, not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vidkernels
from vidkernels import ops
from vidkernels._conv import aten as torch_conv


class _Allocations(TorchDispatchMode):
    """Elements of every new storage that an aten call returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.sizes.append((str(func), t.untyped_storage().nbytes() // t.element_size()))
        return result


GEOMETRIES = {
    "zeros": ((3, 3, 3), [2, 0, 1, 1, 1, 1], 0, 0, 0),
    "replicate": ((3, 3, 3), [2, 0, 1, 1, 1, 1], 1, 0, 0),
    "history": ((3, 3, 3), [2, 0, 1, 1, 1, 1], 0, 0, 2),
    "replicate-space": ((3, 3, 3), [2, 0, 1, 1, 1, 1], 1, 1, 0),
    "temporal": ((3, 1, 1), [2, 0, 0, 0, 0, 0], 1, 0, 0),
    "asymmetric": ((1, 3, 3), [0, 0, 0, 1, 0, 1], 0, 0, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_torch_backend_never_exceeds_the_activation(geometry: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Every allocation of forward, dgrad and wgrad is at most one activation; a padded copy would be 1.1-1.6 of it.

    float16 (no CPU units anywhere): the widened slices are smaller than the tensor.
    """
    kernel, padding, time_mode, space_mode, past = geometry
    x = torch.randn(1, 16, 9, 24, 24).to(dtype).to(memory_format=torch.channels_last_3d)
    weight = torch.randn(16, 16, *kernel).to(dtype)
    history = torch.randn(1, 16, past, 24, 24).to(dtype) if past else None
    args = [1, 1, 1], [1, 1, 1], padding, time_mode, space_mode
    largest = max(x.numel(), weight.numel())
    y = torch_conv.causal_conv3d_fwd(x, weight, None, history, None, *args, 0)
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: torch_conv.causal_conv3d_fwd(x, weight, None, history, None, *args, 0),
        "dgrad": lambda: torch_conv.causal_conv3d_dgrad(y, weight, list(x.shape), past, *args),
        "wgrad": lambda: torch_conv.causal_conv3d_wgrad(y, x, history, list(kernel), *args),
    }
    for name, run in runs.items():
        with _Allocations() as allocations:
            run()
        too_large = [entry for entry in allocations.sizes if entry[1] > largest]
        assert allocations.sizes and not too_large, f"{name}: {too_large}, the activation has {largest} elements"


def test_the_counter_sees_a_padded_copy() -> None:
    x, weight = torch.randn(1, 16, 9, 24, 24), torch.randn(16, 16, 3, 3, 3)
    with _Allocations() as allocations:
        torch.nn.functional.conv3d(torch.nn.functional.pad(x, (1, 1, 1, 1, 2, 0)), weight)
    assert any(size > x.numel() for _, size in allocations.sizes)


def profiled_allocations(run: Callable[[], Any]) -> list[int]:
    """Bytes of every allocation from torch's CPU allocator, C++ code included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


@pytest.mark.parametrize("time_padding", ["zeros", "replicate", "history"])
def test_public_op_allocates_its_result_and_little_else(time_padding: str) -> None:
    """Whatever backend serves the call: one tensor of the result's size, nothing larger, from torch's allocator."""
    x = torch.randn(1, 32, 9, 32, 32).to(memory_format=torch.channels_last_3d)
    weight, bias = torch.randn(32, 32, 3, 3, 3), torch.randn(32)
    history = torch.randn(1, 32, 2, 32, 32) if time_padding == "history" else None
    run = lambda: ops.causal_conv3d(x, weight, bias, time_padding=time_padding, history=history)  # noqa: E731
    run()
    sizes = profiled_allocations(run)
    bytes_of_result = x.numel() * 4
    assert sizes and max(sizes) <= bytes_of_result + 4096
    chosen = vidkernels.explain("causal_conv3d", x, weight, bias, time_padding=time_padding, history=history).chosen
    limit = 1 if chosen == "cpp" else 2  # the torch backend computes the interior, then copies it into the result
    assert sum(size > bytes_of_result // 2 for size in sizes) <= limit, (chosen, sizes)
