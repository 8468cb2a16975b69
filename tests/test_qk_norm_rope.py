# SPDX-License-Identifier: Apache-2.0
"""ops.qk_norm_rope: values, gradients, memory layouts, limits and errors, on every backend of the device at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import EPS, assert_gradients_within_promise, assert_same_nonfinite, assert_within_promise, opcheck
from torch._dynamo.testing import CompileCounterWithBackend

from vidkernels import dispatch, errors, explain, ops
from vidkernels._reference import qk_norm_rope as reference


@dataclass(frozen=True)
class Setup:
    """One combination of shapes and options."""

    name: str
    leading: tuple[int, ...]
    heads: tuple[int, int]
    head_dim: int
    norm: str | None = "head"
    layout: str = "interleaved"
    axes: tuple[int, ...] | None = None
    weights: bool = True
    position_dtype: torch.dtype = torch.int64
    batched_positions: bool = False
    table: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    def options(self, device: torch.device) -> dict[str, Any]:
        options: dict[str, Any] = {"norm": self.norm, "layout": self.layout, **self.more}
        if self.axes is not None:
            options["axes"] = self.axes
        if self.table:
            size = (3, self.heads[0], 5) if self.table == "per head" else (3, 5)
            table = torch.rand(size, generator=torch.Generator().manual_seed(3))
            table[1, ..., 2] = 0
            options["frequencies"] = table.to(device)
        return options

    def inputs(self, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """q, k and the weights that there are."""
        sides = [torch.randn(*self.leading, h, self.head_dim, dtype=torch.float64) for h in self.heads]
        if self.weights and self.norm is not None:
            sizes = [self.head_dim * (h if self.norm == "full" else 1) for h in self.heads]
            sides += [1 + 0.3 * torch.randn(size, dtype=torch.float64) for size in sizes]
        return [x.to(device, dtype) for x in sides]

    def positions(self, device: torch.device) -> torch.Tensor:
        count = 3 if self.axes is None else len(self.axes)
        size = (*self.leading, count) if self.batched_positions else (self.leading[-1], count)
        if self.position_dtype.is_floating_point:
            return (200 * torch.rand(size, dtype=torch.float64) - 50).to(device, self.position_dtype)
        return torch.randint(0, 400, size, device=device, dtype=self.position_dtype)


SETUPS = [
    Setup("head 64", (37,), (3, 3), 64),
    Setup("head 72 grouped", (19,), (6, 2), 72, axes=(24, 24, 24)),
    Setup("full 64 batch", (2, 13), (5, 5), 64, norm="full", axes=(16, 24, 24)),
    Setup("full 72 grouped half", (11,), (4, 2), 72, norm="full", layout="half"),
    Setup("no norm half", (2, 9), (3, 1), 40, norm=None, layout="half", axes=(8, 8, 8)),
    Setup("axis_half", (21,), (2, 2), 96, layout="axis_half", axes=(32, 32, 32), position_dtype=torch.int32),
    Setup("odd head, some rotated", (17,), (2, 3), 15, axes=(4, 2, 6)),
    Setup("one axis, one token", (1,), (2, 2), 6, axes=(6,), position_dtype=torch.float64),
    Setup("two axes, batched, no weight", (3, 5), (2, 2), 128, axes=(64, 64), weights=False, batched_positions=True),
    Setup("table", (2, 7), (3, 3), 16, table="shared", position_dtype=torch.float32, batched_positions=True),
    Setup(
        "table per head, full",
        (15,),
        (4, 4),
        12,
        norm="full",
        table="per head",
        layout="half",
        position_dtype=torch.float32,
    ),
    Setup(
        "theta and scale per axis",
        (30,),
        (2, 2),
        32,
        more={"theta": (256.0, 1e4, 33.5), "position_scale": (0.75, 1.0, -2.0), "eps": 0.25},
    ),
]
IDS = [setup.name for setup in SETUPS]


def run(function: Any, positions: torch.Tensor | None, options: dict[str, Any]) -> Any:
    """`function` with q, k and weights as its only arguments."""
    return lambda q, k, *weights: function(q, k, *(weights or (None, None)), positions, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("setup", SETUPS, ids=IDS)
def test_values_and_gradients(setup: Setup, dtype: torch.dtype, device: torch.device) -> None:
    """Outputs and all gradients keep the promise of error."""
    positions, options = setup.positions(device), setup.options(device)
    names = ["q", "k", "q_weight", "k_weight"]
    inputs = setup.inputs(dtype, device)
    assert_gradients_within_promise(
        run(ops.qk_norm_rope, positions, options),
        run(reference.qk_norm_rope, positions, options),
        inputs,
        names=names[: len(inputs)],
    )


@pytest.mark.parametrize("setup", SETUPS[:10:2], ids=IDS[:10:2])
def test_float64(setup: Setup, device: torch.device) -> None:
    """float64 differs from the reference by the rounding of angles of up to `position` radians."""
    positions, options = setup.positions(device), setup.options(device)
    inputs = [x.requires_grad_() for x in setup.inputs(torch.float64, device)]
    bound = 16 * EPS[torch.float64] * positions.abs().max().item()
    outputs = [run(f, positions, options)(*inputs) for f in (ops.qk_norm_rope, reference.qk_norm_rope)]
    cotangents = [torch.randn_like(y) for y in outputs[0]]
    actual, expected = ([*y, *torch.autograd.grad(y, inputs, cotangents)] for y in outputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=bound * e.abs().max().item())


def test_gradcheck() -> None:
    """Numerical derivatives of the float64 kernel."""
    q, k = (torch.randn(3, h, 6, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    weights = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (12, 6)]
    positions = torch.randint(0, 9, (3, 3))
    assert torch.autograd.gradcheck(
        lambda *x: ops.qk_norm_rope(*x, positions, norm="full", axes=(2, 2, 2)), (q, k, *weights)
    )


@pytest.mark.parametrize("layout", ["qkv slice", "heads first", "channels strided", "expanded cotangent"])
def test_memory_layouts(layout: str, device: torch.device) -> None:
    """Views of a fused projection, transposed heads and strided channels give the values of contiguous tensors."""
    fused = torch.randn(2, 9, 3, 4, 16, device=device)
    q, k = {
        "qkv slice": lambda: fused.unbind(2)[:2],
        "heads first": lambda: (fused[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2), fused[:, :, 1]),
        "channels strided": lambda: (torch.randn(2, 9, 4, 32, device=device)[..., ::2], fused[:, :, 1]),
        "expanded cotangent": lambda: fused.unbind(2)[:2],
    }[layout]()
    positions = torch.randint(0, 50, (9, 3), device=device)
    strided = [x.detach().requires_grad_() for x in (q, k)]
    plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k)]
    results = []
    for sides in (strided, plain):
        y = ops.qk_norm_rope(*sides, positions=positions)
        cotangents = [
            torch.ones((), device=device).expand_as(t)
            if "cotangent" in layout
            else torch.linspace(-1, 1, t.numel(), device=device).view(t.shape)
            for t in y
        ]
        results.append([*y, *torch.autograd.grad(y, sides, cotangents)])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    if layout == "heads first":
        assert results[0][0].stride() == q.stride()


@pytest.mark.parametrize("setup", SETUPS[:4], ids=IDS[:4])
def test_inplace(setup: Setup, device: torch.device) -> None:
    """In place gives the same bits, writes nothing else, and returns the arguments themselves."""
    positions, options = setup.positions(device), setup.options(device)
    q, k, *weights = setup.inputs(torch.bfloat16, device)
    fused = torch.stack((torch.cat((q, k), -2), torch.full_like(torch.cat((q, k), -2), 7)), -3)
    views = fused[..., 0, : q.shape[-2], :], fused[..., 0, q.shape[-2] :, :]
    expected = ops.qk_norm_rope(*views, *weights, positions, **options)
    actual = ops.qk_norm_rope(*views, *weights, positions, inplace=True, **options)
    assert all(a is v and torch.equal(a, e) for a, v, e in zip(actual, views, expected, strict=True))
    assert (fused[..., 1, :, :] == 7).all()


def test_inplace_strided_channels(device: torch.device) -> None:
    """In place reaches channels that are not neighbours in memory."""
    q = torch.randn(5, 2, 16, device=device)[..., ::2]
    k = torch.randn(5, 2, 8, device=device)
    expected = ops.qk_norm_rope(q, k)
    ops.qk_norm_rope(q, k, inplace=True)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


def test_one_side_and_no_rotation(device: torch.device) -> None:
    """k may be missing (cross-attention turns queries only); without positions the op is the norm alone."""
    q, k, q_weight, _ = SETUPS[0].inputs(torch.float32, device)
    positions = SETUPS[0].positions(device)
    both = ops.qk_norm_rope(q, k, q_weight, None, positions)
    alone, nothing = ops.qk_norm_rope(q, None, q_weight, None, positions)
    assert nothing is None and torch.equal(alone, both[0])
    normed = ops.qk_norm_rope(q, None, q_weight)[0]
    expected, truth = (
        torch.nn.functional.rms_norm(x, (64,), w, 1e-6) for x, w in ((q, q_weight), (q.double(), q_weight.double()))
    )
    assert_within_promise(normed, expected, truth)


def test_needs_input_grad(device: torch.device) -> None:
    """Only the asked gradients are made, each equal to the one made together with the others."""
    positions = torch.randint(0, 50, (6, 3), device=device)
    values = [
        torch.randn(6, 2, 18, device=device),
        torch.randn(6, 2, 18, device=device),
        torch.rand(18, device=device),
        torch.rand(18, device=device),
    ]
    leaves = [v.clone().requires_grad_() for v in values]
    everything = torch.autograd.grad([y.sum() for y in ops.qk_norm_rope(*leaves, positions)], leaves)
    for i, expected in enumerate(everything):
        single = [v.clone().requires_grad_(i == j) for j, v in enumerate(values)]
        (gradient,) = torch.autograd.grad(sum(y.sum() for y in ops.qk_norm_rope(*single, positions)), [single[i]])
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("shape", [(0, 2, 8), (2, 0, 2, 8), (4, 0, 8)], ids=str)
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    """No tokens or no heads: empty results, zero gradients of the weights."""
    q, k = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    weight = torch.ones(8, device=device, requires_grad=True)
    y = ops.qk_norm_rope(q, k, weight, weight, torch.zeros(shape[-3], 3, dtype=torch.int32, device=device))
    assert [t.shape for t in y] == [q.shape, k.shape]
    (gradient,) = torch.autograd.grad(y[0].sum() + y[1].sum(), weight)
    assert (gradient == 0).all()


def test_nonfinite_values_stay_in_their_row(device: torch.device) -> None:
    """NaN and Inf in a head poison that head (norm="head") and nothing else; the reference agrees element by element."""
    q, k, *weights = SETUPS[0].inputs(torch.float32, device)
    q[3, 1, 5], k[7, 0, 0] = math.nan, math.inf
    positions = SETUPS[0].positions(device)
    actual = ops.qk_norm_rope(q, k, *weights, positions)
    expected = reference.qk_norm_rope(q, k, *weights, positions)
    for a, e in zip(actual, expected, strict=True):
        assert_same_nonfinite(a, e)
    assert actual[0].isnan().any(-1).nonzero().tolist() == [[3, 1]]


def test_channels_that_pass_do_not_meet_their_neighbours(device: torch.device) -> None:
    """Unrotated channels are not multiplied by a zero sine: Inf beside them does not become NaN."""
    q = torch.ones(1, 1, 8, device=device)
    q[..., 6] = math.inf
    y, _ = ops.qk_norm_rope(
        q, None, positions=torch.ones(1, 3, dtype=torch.int32, device=device), axes=(2, 2, 2), norm=None
    )
    assert y[0, 0, 6:].tolist() == [math.inf, 1.0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32], ids=str)
def test_large_positions_keep_float32_accuracy(dtype: torch.dtype, device: torch.device) -> None:
    """Angles of millions of radians are reduced without loss: the usual float32 product would be wrong by 0.1 rad."""
    q = torch.randn(64, 1, 12, device=device)
    positions = torch.randint(2**23, 2**24, (64, 3), device=device).to(dtype)
    actual = ops.qk_norm_rope(q, None, positions=positions, norm=None)[0]
    same = reference.qk_norm_rope(q, None, positions=positions, norm=None)[0]
    truth = reference.qk_norm_rope(q.double(), None, positions=positions, norm=None)[0]
    assert_within_promise(actual, same, truth)


def test_position_zero_is_the_identity(device: torch.device) -> None:
    """Tokens at position 0, such as text beside video, pass bit for bit."""
    q = torch.randn(5, 2, 24, device=device, dtype=torch.bfloat16)
    y, _ = ops.qk_norm_rope(q, None, positions=torch.zeros(5, 3, dtype=torch.int64, device=device), norm=None)
    assert torch.equal(y, q)


def test_deterministic_over_threads() -> None:
    """The weights' gradients do not depend on the number of threads."""
    leaves = [
        torch.randn(700, 3, 24, requires_grad=True),
        torch.randn(700, 3, 24),
        torch.randn(24, requires_grad=True),
        torch.randn(24),
    ]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, _ = ops.qk_norm_rope(*leaves, torch.arange(2100).view(700, 3))
            results.append(torch.autograd.grad(y.square().sum(), [leaves[0], leaves[2]]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_learned_frequencies_go_to_the_reference() -> None:
    """Gradients of a learned table (Mochi) exist; the fast backends say why they step back."""
    q = torch.randn(4, 2, 8)
    table = torch.rand(3, 2, 4, requires_grad=True)
    positions = torch.randint(0, 5, (4, 3))
    with pytest.warns(errors.VidkernelsFallbackWarning, match="gradients of positions and frequencies"):
        y, _ = ops.qk_norm_rope(q, None, positions=positions, frequencies=table)
    assert torch.autograd.grad(y.square().sum() + y.sum(), table)[0].abs().max() > 0
    with torch.no_grad():
        assert explain("qk_norm_rope", q, None, positions=positions, frequencies=table).chosen != "reference"


def _op_args(dtype: torch.dtype) -> tuple[Any, ...]:
    q, k, *weights = SETUPS[2].inputs(dtype, torch.device("cpu"))
    return (
        q,
        k,
        *weights,
        SETUPS[2].positions(torch.device("cpu")),
        None,
        [16, 24, 24],
        [1e4] * 3,
        [1.0] * 3,
        2,
        1e-6,
        0,
    )


def test_opcheck() -> None:
    """Schema, aliasing and fakes of the three bare ops."""
    args = _op_args(torch.float32)
    opcheck(dispatch.op("qk_norm_rope_fwd", "cpp"), args)
    opcheck(dispatch.op("qk_norm_rope_", "cpp"), args)
    opcheck(dispatch.op("qk_norm_rope_bwd", "cpp"), (torch.randn_like(args[0]), torch.randn_like(args[1]), *args, True))


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_compiles_without_breaks(inplace: bool) -> None:
    """fullgraph, values and gradients equal to eager, one graph for changing numbers of tokens."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weight = torch.rand(24)

    def call(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = q * 1, k * 1
        return ops.qk_norm_rope(q, k, weight, None, positions, axes=(8, 8, 8), inplace=inplace)

    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for tokens in (5, 9, 14):
        leaves = [torch.randn(2, tokens, 2, 24, requires_grad=not inplace) for _ in range(2)]
        positions = torch.randint(0, 30, (tokens, 3))
        results = []
        for function in (call, compiled):
            y = function(*leaves, positions)
            results.append([*y] if inplace else [*y, *torch.autograd.grad(y[0].sum() + y[1].square().sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


def test_explain_names_every_backend() -> None:
    """One line per backend; the C++ kernel serves CPU tensors."""
    q = torch.randn(4, 2, 8)
    explanation = explain("qk_norm_rope", q, q)
    assert [choice.backend for choice in explanation.choices] == ["cpp", "cuda", "triton", "reference"]
    assert explanation.chosen == "cpp"
