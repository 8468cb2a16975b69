# SPDX-License-Identifier: Apache-2.0
"""No backend makes a padded or concatenated copy of the activation: allocations are counted, not timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_causal_conv3d import CASES, call, make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vidkernels
from vidkernels import ops
from vidkernels._conv import aten as torch_conv
from vidkernels._reference import causal_conv3d as reference

torch_backend = partial(ops.causal_conv3d, backend="torch")


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


@pytest.mark.parametrize("name", CASES)
def test_padded_copy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the torch backend does with small clips on a GPU, in float64: one convolution each way, the results and gradients
    that the pieces give; nothing is copied where there is one piece."""
    tensors, names, options = make(CASES[name], torch.float64)
    run = call(ops.causal_conv3d, names, options, backend="torch")
    leaves = [t.requires_grad_() for t in tensors]
    y = run(*leaves)
    grad = torch.randn_like(y)
    expected = y, *torch.autograd.grad(y, leaves, grad)
    copies, calls = [], []
    written_out, planned = torch_conv._written_out, torch_conv.pieces_of
    monkeypatch.setattr(torch_conv, "_writes_out", lambda *args: True)
    monkeypatch.setattr(torch_conv, "_written_out", lambda *args: copies.append(1) or written_out(*args))
    monkeypatch.setattr(torch_conv, "pieces_of", lambda *args: calls.append(len(planned(*args))) or planned(*args))
    y = run(*leaves)
    actual = y, *torch.autograd.grad(y, leaves, grad)
    assert len(copies) == (2 if calls[0] > 1 else 0)
    for one, other in zip(actual, expected, strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_only_small_clips_on_a_gpu_are_padded() -> None:
    x = torch.empty(1, 8, 7, 11, 9)
    assert not torch_conv._writes_out(x, [4, 0, 2, 2, 2, 2])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert torch_conv._writes_out(torch.empty(1, 8, 7, 11, 9, device="cuda"), [4, 0, 2, 2, 2, 2])
        assert not torch_conv._writes_out(torch.empty(1, 128, 3, 24, 40, device="cuda"), [2, 0, 1, 1, 1, 1])


def test_pieces_are_added_before_they_are_rounded() -> None:
    """5x5x5 taps with repeated pixels are 125 pieces: one rounding of x's gradient, as if it were one convolution; and a
    weight's gradient of 2^24, 1 and 1 from three pieces loses none of them."""
    tensors, names, options = make(CASES["five-taps"], torch.float16)
    run = call(torch_backend, names, options)
    leaves = [t.requires_grad_() for t in tensors]
    y = run(*leaves)
    grad = torch.randn_like(y)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    truth = torch.autograd.grad(call(reference.causal_conv3d, names, options)(*wide), wide[0], grad.double())[0]
    actual = torch.autograd.grad(y, leaves[0], grad)[0]
    assert (actual - truth).abs().max() <= 1.01 * 2.0**-11 * truth.abs().max()
    x, weight = torch.tensor([2.0**24, 1, 1]).reshape(1, 1, 3, 1, 1), torch.zeros(1, 1, 3, 1, 1, requires_grad=True)
    y = torch_backend(x, weight, time_padding="replicate")
    assert torch.autograd.grad(y, weight, torch.ones_like(y))[0][0, 0, 2] == 2.0**24 + 2


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
