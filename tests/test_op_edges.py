# SPDX-License-Identifier: Apache-2.0
"""The edge of what ops accept: strided biases, frozen sides, no tokens, one token, tensors that do not fit; and what surrounds a
call: torch's default dtype and device, autocast, fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import vidkernels
from vidkernels import errors, ops

pytestmark = pytest.mark.filterwarnings("ignore::vidkernels.errors.VidkernelsFallbackWarning")

BIASES: dict[str, Callable[[int], Tensor]] = {
    "every second": lambda n: torch.randn(2 * n)[::2],
    "one for all": lambda n: torch.randn(1).expand(n),
    "a column": lambda n: torch.randn(n, 3)[:, 1],
}
CONVOLUTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv3d": ops.causal_conv3d,
    "upsample_conv3d": ops.upsample_conv3d,
    "upsample_conv3d, blended": lambda *args, **kwargs: ops.upsample_conv3d(*args, **kwargs, mix_factor=torch.ones(1)),
    "downsample_conv3d": lambda *args, **kwargs: ops.downsample_conv3d(*args, **kwargs, mix_factor=torch.ones(1)),
}


def check_bias(name: str, kind: str, backend: str, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
    function, x, weight = CONVOLUTIONS[name], torch.randn(1, 8, 2, 5, 5), torch.randn(8, 8, *kernel) / 10
    bias = BIASES[kind](8)
    right = function(x, weight, bias.contiguous(), backend=backend)
    for _ in range(2):  # a repeated call has another stride than the one that was decided
        assert torch.equal(function(x, weight, bias, backend=backend), right)
    leaf = bias.detach().requires_grad_()
    y = function(x, weight, leaf, backend=backend)
    assert torch.equal(y, right)
    y.sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_biases_whose_values_are_no_neighbours(name: str, kind: str, backend: str) -> None:
    """oneDNN and Triton read from the first value on, whatever the stride: a bias cut out of a larger tensor gave others."""
    check_bias(name, kind, backend)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_biases_whose_values_are_no_neighbours_in_triton(name: str) -> None:
    check_bias(name, "every second", "triton", (2, 1, 1))


@pytest.mark.parametrize(
    ("op", "hint"),
    [("downsample_conv3d", "backends of 'causal_conv3d'"), ("lfq_codes_to_indices", "backends of 'lfq_quantize'")],
)
def test_explanations_of_ops_without_backends_name_another(op: str, hint: str) -> None:
    """The hint was the very name that had been given."""
    for target in (op, getattr(ops, op)):
        with pytest.raises(errors.OptionError, match=hint):
            vidkernels.explain(target)


ONE_COLUMN: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "of one channel": ((2, 1, 1, 13, 1), (19, 1, 1, 3, 3), {"stride": (1, 1, 2)}),
    "at borders": ((1, 16, 5, 11, 9), (8, 16, 3, 3, 3), {"stride": (1, 2, 3), "spatial_padding_mode": "replicate"}),
    "between paddings": ((2, 16, 5, 13, 1), (8, 16, 3, 3, 3), {"stride": (2, 1, 3)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ONE_COLUMN)
def test_steps_over_what_gives_one_column(name: str, dtype: torch.dtype) -> None:
    """oneDNN's kernels read beyond it: results of 1e30 where whole frames were right."""
    shape, kernel, options = ONE_COLUMN[name]
    x, weight = torch.randn(shape).to(dtype), (torch.randn(kernel) / 10).to(dtype)
    truth = ops.causal_conv3d(x.double(), weight.double(), **options, backend="reference")
    bounds = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for backend in ("cpp", "torch"):
        y = ops.causal_conv3d(x, weight, **options, backend=backend)
        torch.testing.assert_close(y, truth.to(dtype), **bounds)


def _normed(q: Tensor, k: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    return ops.qk_norm_rope(q, k, None, weight)


def test_what_depends_on_nothing_learned_asks_for_no_gradient() -> None:
    """Attention behind a frozen side computed its gradient for nothing; the reference never asked."""
    q, k, weight = torch.randn(6, 2, 8), torch.randn(6, 2, 8), torch.ones(8)
    for learned, wanted in ((0, (True, False)), (1, (False, True)), (2, (False, True))):
        inputs = [x.detach().requires_grad_(place == learned) for place, x in enumerate((q, k, weight))]
        outputs = _normed(*inputs)
        assert tuple(y.requires_grad for y in outputs if y is not None) == wanted
        (gradient,) = torch.autograd.grad(outputs[wanted.index(True)].square().sum(), inputs[learned])  # type: ignore[union-attr]
        assert gradient.isfinite().all()
    rows = torch.randn(2, 8, requires_grad=True)
    x = torch.randn(2, 5, 8)
    hidden, y = ops.adaln_zero(x, x, rows.detach(), rows, None)
    assert not hidden.requires_grad and y.requires_grad
    (gradient,) = torch.autograd.grad(y.sum(), rows)
    torch.testing.assert_close(gradient, torch.full((2, 8), 5.0))
    assert ops.adaln_zero(x, x, rows, None, None)[0].requires_grad


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (2, 3, 0, 8)], ids=str)
def test_rows_of_no_tokens(shape: tuple[int, ...], backend: str) -> None:
    """Groups of nothing: the backward counted a token each, and refused its own index."""
    x, table = torch.randn(shape, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    rows = torch.tensor([1, 2]) if len(shape) == 2 else torch.tensor([[1, 2], [0, 0]])
    y = ops.adaln_modulate(x, table, table, rows=rows, backend=backend)
    h = ops.gate_residual(x, x, table, rows=rows, backend=backend)
    assert y.shape == h.shape == shape
    (y.sum() + h.sum()).backward()
    assert x.grad is not None and table.grad is not None and not table.grad.any()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_rows_of_no_channels(backend: str) -> None:
    x, table = torch.randn(2, 3, 0), torch.randn(2, 0)
    assert ops.adaln_modulate(x, table, table, backend=backend).shape == x.shape
    assert ops.gate_residual(x, x, table, backend=backend).shape == x.shape


@pytest.mark.parametrize("backend", ["composed", "reference"])
def test_attention_over_an_axis_of_nothing_stays_in_the_graph(backend: str) -> None:
    q, k, v = (torch.randn(2, 0, 3, 4, 8, requires_grad=True) for _ in range(3))
    for dim in (0, 1, 2):
        y = ops.axial_attention(q, k, v, dim, backend=backend)
        assert y.shape == q.shape and y.requires_grad
        y.sum().backward()
    assert q.grad is not None


Refused = tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...], str]
MISFITS: dict[str, Refused] = {
    "a pack with fewer values": (ops.norm_rope_attention, (6, 4, 8), (5, 4, 8), "v"),
    "a pack with other heads of values": (ops.norm_rope_attention, (6, 4, 8), (6, 2, 8), "v"),
    "a pack with more keys": (ops.norm_rope_attention, (7, 4, 8), (7, 4, 8), "k"),
    "a pack without key heads": (ops.norm_rope_attention, (6, 0, 8), (6, 0, 8), "k"),
    "a pack with key heads that do not divide": (ops.norm_rope_attention, (6, 3, 8), (6, 3, 8), "k"),
    "an axis without key heads": (ops.axial_attention, (6, 0, 8), (6, 0, 8), "k"),
    "an axis with other heads of values": (ops.axial_attention, (6, 4, 8), (6, 2, 8), "v"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", MISFITS)
def test_attention_refuses_what_does_not_fit(case: str, backend: str) -> None:
    """By every backend: Triton's kernel takes the sizes of q for those of k and v, and would read beyond them."""
    function, keys, values, argument = MISFITS[case]
    q, k, v = torch.randn(6, 4, 8), torch.randn(keys), torch.randn(values)
    rest = (torch.tensor([0, 2, 6], dtype=torch.int32),) if function is ops.norm_rope_attention else (0,)
    with pytest.raises(errors.ShapeError, match=f"^{argument}: expected"):
        function(q, k, v, *rest, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_entropy_of_one_token(backend: str) -> None:
    """Without an axis of tokens, and with the mask of one."""
    x = torch.randn(3)
    options: dict[str, Any] = {"inv_temperature": 1.0, "backend": backend}
    right = ops.lfq_entropy(x[None], **options)
    for found in (ops.lfq_entropy(x, **options), ops.lfq_entropy(x, mask=torch.tensor(True), **options)):
        assert found[0].shape == () and all(map(torch.allclose, found, right))
    assert not any(ops.lfq_entropy(x, mask=torch.tensor(False), **options))
    right = ops.fsq_entropy(x[None], [3, 4, 5], **options)
    assert all(map(torch.allclose, ops.fsq_entropy(x, [3, 4, 5], mask=torch.tensor(1), **options), right))


@pytest.mark.parametrize("shape", [(1, 2, 0, 4, 4), (1, 2, 3, 4, 0), (0, 2, 3, 4, 4)], ids=str)
def test_upsampling_of_nothing_by_the_reference(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(2, 2, 3, 3, 3)
    found, past = ops.upsample_conv3d(x, weight, return_history=True, backend="reference")
    right, right_past = ops.upsample_conv3d(x, weight, return_history=True)
    assert found.shape == right.shape and past.shape == right_past.shape


BEYOND: list[tuple[int, dict[str, Any]]] = [
    (1, {"scale": (3, 2, 2), "first_frame": "single", "pad_frames": (1, 1)}),
    (2, {"scale": (2, 1, 1), "mode": "linear_time", "split": 2, "pad_frames": (1, 1)}),
    (1, {"scale": (2, 2, 2), "mode": "linear_time", "split": 1, "pad_frames": (3, 0)}),
]


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize(("frames", "options"), BEYOND, ids=str)
def test_frames_made_of_repeated_ones_alone(frames: int, options: dict[str, Any], taps: int, backend: str) -> None:
    """Phases that lie before or behind the clip as a whole had no frame to repeat: a crash, or an error of torch's."""
    x, weight = torch.randn(1, 8, frames, 2, 3).double(), torch.randn(8, 8, taps, 3, 3).double()
    inputs = [value.requires_grad_() for value in (x, weight)]
    found, right = (
        ops.upsample_conv3d(*inputs, time_padding="replicate", backend=name, **options)
        for name in (backend, "reference")
    )
    torch.testing.assert_close(found, right)
    for pair in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (found, right)), strict=True):
        torch.testing.assert_close(*pair)


def _quantized(z: Tensor, levels: list[int], bound: str, backend: str) -> list[Tensor]:
    leaf = z.clone().requires_grad_()
    codes, indices = ops.fsq_quantize(leaf, levels, bound=bound, backend=backend)
    assert codes is not None and indices is not None
    (gradient,) = torch.autograd.grad(codes.sum(), leaf)
    options: dict[str, Any] = {"bound": bound, "backend": backend}
    back = ops.fsq_indices_to_codes(indices, levels, **options)
    again = ops.fsq_codes_to_indices(codes, levels, **options)
    entropy = ops.fsq_entropy(z, levels, bound=bound, backend="reference" if backend == "reference" else "auto")
    return [codes.detach(), indices, gradient, back, again, *entropy]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 37), (torch.float64, 38), (torch.float16, 39)], ids=str)
def test_quantizers_do_not_read_the_default_dtype(dtype: torch.dtype, count: int, backend: str) -> None:
    """Models are made under `torch.set_default_dtype(torch.bfloat16)`: the bound's constants were rounded to it, so that
    codes differed, and kept. Counts of levels that no other test keeps constants of."""
    z = 2 * torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
    for bound in ("atanh", "tan", "symmetric"):
        levels = [count, count + 4]
        torch.set_default_dtype(dtype)
        try:
            found = _quantized(z, levels, bound, backend)
        finally:
            torch.set_default_dtype(torch.float32)
        for x, right in zip(found, _quantized(z, levels, bound, "reference"), strict=True):
            assert x.dtype == right.dtype
            torch.testing.assert_close(x, right, rtol=1e-6, atol=1e-6)
        assert all(map(torch.equal, found[:2], _quantized(z, levels, bound, "reference")[:2]))


def _forward_and_back(z: Tensor, levels: list[int]) -> list[Tensor]:
    leaf = z.detach().requires_grad_()
    codes, _ = ops.fsq_quantize(leaf, levels)
    assert codes is not None
    return [
        *torch.autograd.grad(codes.sum(), leaf), ops.fsq_codes_to_indices(codes.detach(), levels),
        *ops.fsq_entropy(z, levels),
    ]  # fmt: skip


def test_constants_of_quantizers_are_numbers_in_every_mode() -> None:
    """First calls under fake tensors, in a graph of `make_fx` and where another device is the default: none of them leaves
    what the next one cannot use. Counts of levels as in the test before."""
    z = torch.randn(20, 2)
    with FakeTensorMode() as mode:
        shapes = [x.shape for x in _forward_and_back(mode.from_tensor(z), [47, 51])]
    graph = make_fx(lambda z: _forward_and_back(z, [48, 52]), tracing_mode="symbolic")(z)
    with torch.device("meta"):
        there = _forward_and_back(z, [49, 53])
    right = [_forward_and_back(z, [count, count + 4]) for count in (47, 48, 49)]
    assert shapes == [x.shape for x in right[0]]
    for found, expected in ((graph(z), right[1]), (there, right[2])):
        assert all(map(torch.equal, found, expected))


def test_default_axes_in_a_graph_of_symbolic_sizes() -> None:
    q, positions = torch.randn(6, 2, 20), torch.randint(0, 9, (6, 2))
    graph = make_fx(lambda q, p: ops.qk_norm_rope(q, q, positions=p)[0], tracing_mode="symbolic")(q, positions)
    assert torch.equal(graph(q, positions), ops.qk_norm_rope(q, q, positions=positions)[0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_changes_nothing_but_convolutions(backend: str) -> None:
    """Attention over slices of one projection went through torch's kernel, and came back in bfloat16; so did references."""
    q, k, v = torch.randn(2, 5, 3, 6, 16).split(2, -2)
    rows, offsets = (x.flatten(0, 2) for x in (q, k, v)), torch.tensor([0, 9, 30], dtype=torch.int32)
    x, packed = torch.randn(20, 4), tuple(rows)
    calls: list[Callable[[], Any]] = [
        lambda: ops.axial_attention(q, k, v, backend=backend),
        lambda: ops.varlen_attention(*packed, offsets, causal=True, backend=backend),
        lambda: ops.lfq_entropy(x, backend=backend),
        lambda: ops.fsq_entropy(x, [3, 4, 5, 6], backend=backend),
    ]
    for call in calls:
        right = call()
        with torch.autocast("cpu", torch.bfloat16):
            found = call()
        found, right = (x if isinstance(x, tuple) else (x,) for x in (found, right))
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("options", [{}, {"log_floor": 1e-3}], ids=["exact", "clamped"])
def test_a_backward_pass_inside_autocast(options: dict[str, Any]) -> None:
    """The entropy's backward multiplied matrices in bfloat16 there."""
    x = torch.randn(40, 6, requires_grad=True)

    def gradient() -> Tensor:
        per_sample, batch = ops.lfq_entropy(x, inv_temperature=1.0, **options)
        return torch.autograd.grad(per_sample - batch, x)[0]

    right = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient(), right)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("op", ["causal_conv3d", "upsample_conv3d", "downsample_conv3d", "group_norm"])
def test_several_gradients_at_once(op: str, channels_last: bool) -> None:
    """`is_grads_batched`, as of vectorized Jacobians: served, or refused by name. vmap knows one memory format, and no lists."""
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    x = torch.randn(1, 8, 2, 5, 5).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(8, 8, 3, 3, 3, requires_grad=True)
    if op == "group_norm":
        weight = torch.randn(8, requires_grad=True)
        y = ops.group_norm(x, 2, weight)
    else:
        y = CONVOLUTIONS[op](x, weight)
    cotangents = torch.randn(3, *y.shape).transpose(0, 1).contiguous().transpose(0, 1)
    if op in ("causal_conv3d", "downsample_conv3d"):
        with pytest.raises(errors.BackendUnavailable, match=f'^{op}: .*is_grads_batched.*backend="reference"'):
            torch.autograd.grad(y, (x, weight), cotangents, is_grads_batched=True, retain_graph=True)
        y = CONVOLUTIONS[op](x, weight, backend="reference")
    several = torch.autograd.grad(y, (x, weight), cotangents, is_grads_batched=True, retain_graph=True)
    for place in range(3):
        one = torch.autograd.grad(y, (x, weight), cotangents[place], retain_graph=True)
        for found, right in zip(several, one, strict=True):
            torch.testing.assert_close(found[place], right)


@pytest.mark.interpreter
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_blends_in_an_order_of_axes_of_their_own_in_triton(mode: str) -> None:
    """Dense, neighbouring channels, but in neither memory format: the result was written into a copy of it."""
    x = torch.randn(4, 2, 4, 2, 2).permute(1, 4, 3, 2, 0).requires_grad_()  # [2, 2, 2, 4, 4]
    b = torch.randn(4, 2, 4, 4, 2).permute(1, 4, 3, 2, 0).requires_grad_()  # [2, 2, 4, 4, 4]
    m = torch.randn(1, requires_grad=True)
    for function, inputs, options in (
        (ops.alpha_blend_up, (x, b, m), {"mode": mode}),
        (ops.alpha_blend_down, (b, x, m), {}),
        (ops.alpha_blend, (b, b.detach().flip(0).requires_grad_(), m), {}),
    ):
        found, right = (function(*inputs, backend=name, **options) for name in ("triton", "reference"))
        torch.testing.assert_close(found, right)
        for pair in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (found, right)), strict=True):
            torch.testing.assert_close(*pair)


def test_a_result_may_replace_the_residual_alone() -> None:
    """Written over its own input, a 1x1x1 convolution read what it had just written."""
    x, weight, bias = torch.randn(1, 8, 3, 4, 4), torch.randn(8, 8, 1, 1, 1), torch.randn(8)
    past, large = torch.randn(1, 8, 2, 4, 4), torch.randn(1, 8, 6, 4, 4)
    right = ops.causal_conv3d(x, weight, bias)
    for name, arguments in (
        ("x", {"x": past}),
        ("history", {"x": torch.randn(1, 8, 2, 4, 4), "history": past, "pad_frames": 2}),
    ):
        kernel = weight if name == "x" else torch.randn(8, 8, 3, 1, 1)
        for backend in ("auto", "torch"):
            before = past.clone()
            with pytest.raises(errors.OptionError, match=f"^out: expected other memory than that of {name}"):
                ops.causal_conv3d(**arguments, weight=kernel, out=past, backend=backend)
            assert torch.equal(past, before)
    total = torch.randn(1, 8, 3, 4, 4)
    expected = total + right
    assert ops.causal_conv3d(x, weight, bias, residual=total, out=total) is total
    torch.testing.assert_close(total, expected)
    front, back = large[:, :, :3], large[:, :, 3:]  # one memory, two places
    expected = ops.causal_conv3d(front.clone(), weight, bias)
    torch.testing.assert_close(ops.causal_conv3d(front, weight, bias, out=back), expected)
