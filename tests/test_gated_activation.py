# SPDX-License-Identifier: Apache-2.0
"""gated_activation: against the reference and torch, both orders of the halves, any rows, extreme values."""

from __future__ import annotations

from typing import Any

import aot
import launches
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_gradients_within_promise, assert_same_nonfinite, assert_within_promise, opcheck

from vidkernels import ops
from vidkernels._reference import gated_activation as reference
from vidkernels.errors import DTypeError, OptionError, ShapeError
from vidkernels.ops.gated_activation import ACTIVATIONS, BACKENDS

CPP_MISSING = BACKENDS.backends["cpp"](torch.zeros(1, 2), 2)
needs_cpp = pytest.mark.skipif(CPP_MISSING is not None, reason=str(CPP_MISSING))
needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
HALVES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", HALVES.values(), ids=list(HALVES))
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
# Shapes of x: whole tiles, columns that no vector divides, several pieces of a row, one row, one column.
SHAPES = {
    "tiles": (2, 5, 2 * 256),
    "odd": (3, 7, 2 * 37),
    "long rows": (3, 2 * 4613),
    "one axis": (2 * 130,),
    "one column": (9, 2),
    "five axes": (2, 1, 3, 2, 2 * 20),
}
SMALL = ("odd", "one column", "one axis")


def check(shape: tuple[int, ...], dtype: torch.dtype, backend: str, activation: str, device: str = "cpu") -> None:
    """Output and gradient keep the promise with the gate behind and in front."""
    torch.manual_seed(0)
    x = (2 * torch.randn(shape)).to(device, dtype)
    for gate_first in (False, True):
        options: dict[str, Any] = {"activation": activation, "gate_first": gate_first}
        assert_gradients_within_promise(
            lambda x, options=options: ops.gated_activation(x, **options, backend=backend),
            lambda x, options=options: reference.gated_activation(x, **options),
            (x,),
            names=("x",),
        )


@needs_cpp
@every_activation
@every_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_cpp_keeps_the_promise(shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
    check(shape, dtype, "cpp", activation)


@every_activation
@every_dtype
def test_torch_keeps_the_promise(dtype: torch.dtype, activation: str) -> None:
    check(SHAPES["odd"], dtype, "torch", activation)


@pytest.mark.gpu
@every_activation
@every_dtype
@pytest.mark.parametrize("shape", [*SHAPES.values(), (2, 300, 9216)], ids=[*SHAPES, "Latte"])
def test_triton_on_a_device(shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
    check(shape, dtype, "triton", activation, "cuda")


@pytest.mark.gpu
@every_activation
def test_extremes_on_a_device(activation: str) -> None:
    check_extremes(activation, "triton", "cuda")


@pytest.mark.gpu
def test_repeated_launches_on_a_device() -> None:
    """The second call of a kind is a look-up and other addresses; options and rows with gaps are kinds of their own."""
    for seed in range(3):
        torch.manual_seed(seed)
        wide = torch.randn(3, 5, 600, device="cuda")
        for x in (wide, wide[:, :, :320]):
            for options in ({}, {"gate_first": True}, {"activation": "silu"}):
                leaf = x.detach().requires_grad_()
                y, right = (f.gated_activation(leaf, **options) for f in (ops, reference))
                torch.testing.assert_close(y, right)
                found = [torch.autograd.grad(t.square().sum(), leaf)[0] for t in (y, right)]
                torch.testing.assert_close(*found)


@pytest.mark.interpreter
@every_activation
@pytest.mark.parametrize("name", SMALL)
def test_triton_interpreted(name: str, activation: str) -> None:
    check(SHAPES[name], torch.float32, "triton", activation)


@pytest.mark.interpreter
@every_activation
def test_triton_interpreted_extremes_and_rows(activation: str) -> None:
    check_extremes(activation, "triton")
    check_rows("triton")


@needs_cpp
@every_activation
def test_extremes(activation: str) -> None:
    check_extremes(activation, "cpp")


def check_extremes(activation: str, backend: str, device: str = "cpu") -> None:
    """Saturated, huge, infinite and missing gates: as in float64, and the negative side keeps its digits."""
    gates = [0.0, -0.0, 1e-30, 20.0, -20.0, 1e4, -1e4, 1e19, -1e19, 1e30, -1e30, float("inf"), -float("inf")]
    gate = torch.tensor([*gates, float("nan"), 1.0, -1.0], device=device)
    x = torch.stack([torch.full_like(gate, 0.5), gate], -1).reshape(-1, 2)
    x = torch.cat([x, torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]], device=device)]).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, truth = ops.gated_activation(x, activation, backend=backend), reference.gated_activation(wide, activation)
    (dx,), (exact,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(truth.sum(), wide)
    assert_same_nonfinite(y, truth)
    assert_same_nonfinite(dx, exact, "gradient")
    finite = torch.isfinite(truth) & torch.isfinite(exact).all(-1, keepdim=True)
    torch.testing.assert_close(y[finite].double(), truth[finite], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dx[finite[:, 0]].double(), exact[finite[:, 0]], rtol=1e-6, atol=1e-7)


@needs_cpp
@every_activation
def test_digits_of_negative_gates(activation: str) -> None:
    """Where torch's gelu has no digit left (1 + erf, 1 + tanh), ours keeps three, and silu five."""
    gate = -torch.linspace(0.0, 9.0 if activation != "silu" else 80.0, 4001)
    y = ops.gated_activation(torch.stack([torch.ones_like(gate), gate], -1), activation, backend="cpp")[:, 0].double()
    z = gate.double()
    share = torch.sigmoid(z if activation == "silu" else (8 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))
    truth = z * (0.5 * torch.special.erfc(-z / 2**0.5) if activation == "gelu" else share)
    torch.testing.assert_close(y, truth, rtol={"gelu": 2e-3, "gelu_tanh": 2e-4, "silu": 1e-5}[activation], atol=0)


@needs_cpp
@every_activation
def test_float64(activation: str) -> None:
    check_float64(activation, "cpp")


def check_float64(activation: str, backend: str) -> None:
    """Against the reference in the same dtype, with rounding errors of both, and against differences."""
    x = torch.randn(3, 2 * 37, dtype=torch.float64, requires_grad=True)
    y, right = ops.gated_activation(x, activation, backend=backend), reference.gated_activation(x, activation)
    torch.testing.assert_close(y, right, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, right)), rtol=1e-13, atol=1e-15)
    torch.autograd.gradcheck(lambda x: ops.gated_activation(x, activation, backend=backend), (x[:, :10],))


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_cpp), "torch"])
def test_rows_of_any_strides(backend: str) -> None:
    check_rows(backend)


def check_rows(backend: str) -> None:
    wide = torch.randn(3, 4, 60)
    for x in (
        wide[:, :, 10:30],
        wide[:, 1:3, :40],
        wide[..., ::2],
        wide.transpose(0, 1),
        wide[0, :, 7:27],
        wide[:1, :1],
    ):
        y = ops.gated_activation(x, "silu", backend=backend)
        assert y.shape == (*x.shape[:-1], x.shape[-1] // 2)
        torch.testing.assert_close(y, reference.gated_activation(x, "silu"))
    leaf = wide.requires_grad_()
    y = ops.gated_activation(leaf[:, :, 10:30], "silu", backend=backend)
    (mine,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)  # a gradient of stride 0
    (right,) = torch.autograd.grad(reference.gated_activation(leaf[:, :, 10:30], "silu").sum(), leaf)
    torch.testing.assert_close(mine, right)


def test_the_forms_of_diffusers() -> None:
    activations = pytest.importorskip("diffusers.models.activations")
    for cls, name in ((activations.GEGLU, "gelu"), (activations.SwiGLU, "silu")):
        module, x = cls(6, 10), torch.randn(2, 3, 6)
        torch.testing.assert_close(ops.gated_activation(module.proj(x), name), module(x))


def test_gate_in_front() -> None:
    x = torch.randn(4, 12)
    gate, hidden = x.chunk(2, -1)
    torch.testing.assert_close(ops.gated_activation(x, "silu", gate_first=True), F.silu(gate) * hidden)


@needs_cpp
def test_same_bits_for_any_number_of_threads() -> None:
    x, before, results = torch.randn(40, 2 * 4613), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        y = ops.gated_activation(leaf, backend="cpp")
        results.append((y, *torch.autograd.grad(y.sum(), leaf)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_cpp
def test_bare_ops() -> None:
    x = torch.randn(2, 3, 8)
    opcheck(torch.ops.vidkernels.gated_activation_fwd.default, (x, 0, False))
    opcheck(torch.ops.vidkernels.gated_activation_bwd.default, (torch.randn(2, 3, 4), x, 1, True))
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        torch.ops.vidkernels.gated_activation_fwd(x.transpose(0, 1), 0, False)
    with pytest.raises(RuntimeError, match="dy must be"):
        torch.ops.vidkernels.gated_activation_bwd(x, x, 0, False)


def test_compile_with_any_number_of_rows() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * ops.gated_activation(x, "gelu_tanh")

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 4, 12, requires_grad=True)
        torch.testing.assert_close(compiled(x), double(x))
        found = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, double)]
        torch.testing.assert_close(*found)


def test_empty_and_errors() -> None:
    assert ops.gated_activation(torch.zeros(0, 4)).shape == (0, 2)
    assert ops.gated_activation(torch.zeros(3, 0)).shape == (3, 0)
    with pytest.raises(ShapeError, match="x: expected an even number of channels"):
        ops.gated_activation(torch.zeros(3, 5))
    with pytest.raises(ShapeError, match="x: expected an even number of channels"):
        ops.gated_activation(torch.zeros(()))
    with pytest.raises(DTypeError, match="x: expected float32"):
        ops.gated_activation(torch.zeros(3, 4, dtype=torch.int32))
    with pytest.raises(OptionError, match="activation: expected one of 'gelu'"):
        ops.gated_activation(torch.zeros(3, 4), "relu")
    with pytest.raises(OptionError, match="gate_first: expected True or False"):
        ops.gated_activation(torch.zeros(3, 4), gate_first=1)  # type: ignore[arg-type]


def test_torch_rounds_more_often_than_kernels_but_keeps_the_promise() -> None:
    x = torch.randn(64, 256, dtype=torch.bfloat16)
    same, truth = reference.gated_activation(x), reference.gated_activation(x.double())
    assert_within_promise(ops.gated_activation(x, backend="torch"), same, truth)


@needs_compiler
@pytest.mark.parametrize(
    ("activation", "dtype", "target"),
    [
        ("gelu", torch.bfloat16, "sm_90"),
        ("gelu", torch.float32, "sm_90"),
        ("gelu", torch.bfloat16, "sm_80"),
        ("gelu_tanh", torch.bfloat16, "sm_90"),
        ("silu", torch.bfloat16, "sm_90"),
    ],
    ids=str,
)
def test_machine_code(activation: str, dtype: torch.dtype, target: str) -> None:
    """No spills, 16 bytes an access, and few enough instructions that memory is the limit (docs/performance.md)."""
    x = torch.empty(2, 16384, 9216, device="meta", dtype=dtype, requires_grad=True)
    with launches.record(target) as found:
        ops.gated_activation(x, activation, backend="triton").sum().backward()
    assert len(found) == 2
    for launch, tensors in zip(found, (3, 5), strict=True):
        assert launch.report.spills == 0 and launch.report.registers <= 64, launch
        per_thread = 16 * dtype.itemsize * tensors
        wide = launch.report.wide_loads + launch.report.wide_stores
        assert 16 * wide == per_thread, launch
        instructions = sum(launch.report.instructions.values()) - launch.report.count("NOP", "BRA")
        assert instructions * 1024 / (32 * per_thread) < 200, launch
        assert launch.grid[0] * 2048 == x.numel() // 2
