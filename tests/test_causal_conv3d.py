# SPDX-License-Identifier: Apache-2.0
"""ops.causal_conv3d against its reference: values, gradients, layouts, extremes, errors, compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_gradients_within_promise, assert_same_nonfinite, assert_within_promise, opcheck, run_python

import vidkernels
from vidkernels import dispatch, ops
from vidkernels._reference import causal_conv3d as reference
from vidkernels.errors import BackendUnavailable, DTypeError, OptionError, ShapeError

CPU_BACKENDS = ["cpp", "torch"]
Case = tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]

# (B, C, T, H, W), (K, kt, kh, kw), options
CASES: dict[str, Case] = {
    "vidtok-3d": ((1, 16, 5, 9, 7), (24, 3, 3, 3), {}),
    "vidtok-1.1-3d": ((2, 16, 4, 8, 8), (16, 3, 3, 3), {"time_padding": "replicate"}),
    "one-frame": ((1, 32, 1, 8, 8), (32, 3, 3, 3), {"time_padding": "replicate"}),
    "two-frames": ((1, 8, 2, 5, 6), (8, 3, 3, 3), {}),
    "history": ((2, 16, 3, 6, 10), (16, 3, 3, 3), {"time_padding": "history", "P": 2}),
    "short-history": ((1, 8, 3, 6, 6), (8, 3, 3, 3), {"P": 1}),
    "short-history-replicate": ((1, 8, 3, 6, 6), (8, 3, 3, 3), {"P": 1, "time_padding": "replicate"}),
    "long-history": ((1, 8, 2, 6, 6), (8, 3, 1, 1), {"P": 5}),
    "per-frame": ((2, 64, 3, 12, 10), (64, 1, 3, 3), {}),
    "per-frame-odd": ((1, 65, 2, 7, 13), (33, 1, 3, 3), {}),
    "temporal": ((2, 64, 5, 4, 9), (64, 3, 1, 1), {"time_padding": "replicate"}),
    "pointwise": ((2, 48, 3, 5, 7), (20, 1, 1, 1), {}),
    "rgb-in": ((1, 3, 5, 10, 11), (32, 3, 3, 3), {}),
    "rgb-out": ((1, 32, 5, 10, 11), (3, 3, 3, 3), {}),
    "spatial-down": ((2, 32, 3, 8, 10), (32, 1, 3, 3), {"stride": (1, 2, 2), "spatial_padding": (0, 1, 0, 1)}),
    "spatial-down-odd": ((1, 16, 2, 9, 11), (16, 1, 3, 3), {"stride": (1, 2, 2), "spatial_padding": (0, 1, 0, 1)}),
    "temporal-down": ((2, 32, 6, 6, 6), (32, 3, 3, 3), {"stride": (2, 1, 1), "time_padding": "replicate"}),
    "down-2x2x2": ((1, 16, 5, 9, 9), (16, 3, 3, 3), {"stride": 2, "pad_frames": 2, "time_padding": "replicate"}),
    "non-causal": ((1, 16, 5, 7, 7), (16, 3, 3, 3), {"pad_frames": (1, 1)}),
    "non-causal-replicate": ((1, 8, 5, 7, 7), (8, 3, 3, 3), {"pad_frames": (1, 1), "time_padding": "replicate"}),
    "hunyuan": ((2, 32, 4, 6, 8), (32, 3, 3, 3), {"time_padding": "replicate", "spatial_padding_mode": "replicate"}),
    "dilated": ((1, 8, 7, 11, 9), (8, 3, 3, 3), {"dilation": 2, "time_padding": "replicate"}),
    "dilated-time": ((2, 8, 6, 5, 5), (8, 3, 1, 1), {"dilation": (3, 1, 1), "P": 4}),
    "even-kernel": ((1, 8, 5, 8, 7), (8, 2, 4, 2), {}),
    "five-taps": ((1, 8, 6, 9, 9), (8, 5, 5, 5), {"spatial_padding_mode": "replicate"}),
    "valid": ((1, 8, 5, 9, 9), (8, 3, 3, 3), {"time_padding": "none", "spatial_padding": 0}),
    "stride-3": ((1, 8, 8, 10, 11), (8, 2, 3, 3), {"stride": 3, "spatial_padding": (2, 0, 1, 3)}),
    "wide-padding": ((1, 8, 2, 4, 4), (8, 3, 3, 3), {"pad_frames": 4, "spatial_padding": 3}),
    "silu-residual": ((2, 32, 4, 8, 8), (32, 3, 3, 3), {"activation": "silu", "residual": True}),
    "residual": ((2, 32, 3, 8, 8), (32, 1, 3, 3), {"residual": True}),
    "silu-history": ((1, 16, 3, 5, 5), (16, 3, 1, 1), {"activation": "silu", "P": 2, "time_padding": "history"}),
}


def make(
    case: Case, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[list[torch.Tensor], list[str], dict[str, Any]]:
    """Inputs in channels_last_3d, their names, and the plain options."""
    shape, (filters, *kernel), given = case
    options = dict(given)
    past, with_residual = options.pop("P", None), options.pop("residual", False)
    x = torch.randn(shape, dtype=dtype, device=device)
    scale = (shape[1] * kernel[0] * kernel[1] * kernel[2]) ** -0.5
    weight = torch.randn(filters, shape[1], *kernel, dtype=dtype, device=device) * scale
    tensors, names = [x, weight, torch.randn(filters, dtype=dtype, device=device)], ["x", "weight", "bias"]
    if past is not None:
        tensors.append(torch.randn(*shape[:2], past, *shape[3:], dtype=dtype, device=device))
        names.append("history")
    if with_residual:
        tensors.append(torch.randn(filtered(shape, filters, kernel, options, past), dtype=dtype, device=device))
        names.append("residual")
    tensors = [
        t.contiguous(memory_format=torch.channels_last_3d) if t.ndim == 5 and n != "weight" else t
        for t, n in zip(tensors, names, strict=True)
    ]
    return tensors, names, options


def filtered(
    shape: tuple[int, ...], filters: int, kernel: list[int], options: dict[str, Any], past: int | None
) -> torch.Size:
    history = None if past is None else torch.zeros(1, 1, past, *shape[3:])
    return (
        reference.causal_conv3d(
            torch.zeros(1, 1, *shape[2:]), torch.zeros(filters, 1, *kernel), history=history, **options
        )
        .expand(shape[0], -1, -1, -1, -1)
        .shape
    )


def call(function: Any, names: list[str], options: dict[str, Any], **more: Any) -> Any:
    def run(*tensors: torch.Tensor) -> Any:
        return function(**dict(zip(names, tensors, strict=True)), **options, **more)

    return run


def available(backend: str, case: Case, dtype: torch.dtype) -> None:
    tensors, names, options = make(case, dtype)
    inputs = dict(zip(names, tensors, strict=True))
    reasons = {c.backend: c.reason for c in vidkernels.explain("causal_conv3d", **inputs, **options).choices}
    if backend not in reasons or reasons[backend]:
        pytest.skip(f"{backend}: {reasons.get(backend, 'not in the table')}")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_value_and_gradients_f64(case: Case, backend: str) -> None:
    """Float64 leaves only rounding: any wrong tap, frame or edge shows."""
    available(backend, case, torch.float64)
    tensors, names, options = make(case, torch.float64)
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = call(ops.causal_conv3d, names, options, backend=backend)(*leaves)
    expected = call(reference.causal_conv3d, names, options)(*leaves)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    cotangent = torch.randn_like(expected)
    for name, a, b in zip(
        names, torch.autograd.grad(y, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    "name", ["vidtok-1.1-3d", "per-frame", "temporal", "history", "hunyuan", "temporal-down", "silu-residual"]
)
def test_promise(name: str, dtype: torch.dtype, backend: str) -> None:
    """Error against float64 at most twice the same-dtype reference's own, plus one rounding; forward and backward."""
    available(backend, CASES[name], dtype)
    tensors, names, options = make(CASES[name], dtype)
    assert_gradients_within_promise(
        call(ops.causal_conv3d, names, options, backend=backend),
        call(reference.causal_conv3d, names, options),
        tensors,
        names=names,
    )


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2)], ids=["stride 1", "stride 2"])
def test_long_sums_in_float32(stride: tuple[int, int, int], backend: str) -> None:
    """128 channels times 27 taps. oneDNN's channels-last kernel adds them in one chain, so `torch`, which runs it, is held
    to that kernel's own error; `cpp` to that of the contiguous convolution, which is 3 to 4 times smaller."""
    shape, kernel = (1, 128, 2, 16, 16), (128, 3, 3, 3)
    available(backend, (shape, kernel, {}), torch.float32)
    layout = torch.channels_last_3d if backend == "torch" else torch.contiguous_format
    x, weight, bias = (
        torch.nn.functional.silu(torch.randn(shape)),
        torch.randn(128, 128, 3, 3, 3) / 58.8,
        torch.randn(128),
    )
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 2, 0)).contiguous(memory_format=layout)
    geometry = [0, 1, 1], list(stride), [1, 1, 1], 1
    other = torch.ops.aten.mkldnn_convolution(padded, weight.contiguous(memory_format=layout), bias, *geometry)
    truth = torch.nn.functional.conv3d(padded.double(), weight.double(), bias.double(), stride, (0, 1, 1))
    y = ops.causal_conv3d(
        *(x.contiguous(memory_format=torch.channels_last_3d), weight, bias),
        stride=stride,
        pad_frames=2,
        spatial_padding=1,
        backend=backend,
    )
    assert_within_promise(y, other, truth)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "expanded", "sliced"])
def test_layouts(layout: str, backend: str) -> None:
    """Any strides are read correctly; contiguous input gives contiguous output."""
    available(backend, CASES["vidtok-3d"], torch.float64)
    weight = torch.randn(4, 6, 3, 3, 3, dtype=torch.float64)
    x = {
        "contiguous": torch.randn(2, 6, 4, 5, 7, dtype=torch.float64),
        "strided": torch.randn(5, 4, 7, 2, 6, dtype=torch.float64).permute(3, 4, 1, 0, 2),
        "expanded": torch.randn(2, 6, 1, 5, 7, dtype=torch.float64).expand(-1, -1, 4, -1, -1),
        "sliced": torch.randn(2, 6, 9, 5, 14, dtype=torch.float64).to(memory_format=torch.channels_last_3d)[
            :, :, 1::2, :, ::2
        ],
    }[layout]
    y = ops.causal_conv3d(x, weight.transpose(0, 1).contiguous().transpose(0, 1), backend=backend)
    torch.testing.assert_close(y, reference.causal_conv3d(x, weight), rtol=0, atol=1e-13)
    if layout == "contiguous":
        assert y.is_contiguous()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 3, 5, 5), (1, 0, 3, 5, 5), (1, 4, 0, 5, 5), (1, 4, 3, 0, 5)], ids=str)
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    available(backend, CASES["vidtok-3d"], torch.float32)
    x, weight, bias = torch.randn(shape), torch.randn(6, shape[1], 3, 3, 3), torch.randn(6)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = ops.causal_conv3d(*leaves, backend=backend)
    frames = 3 if shape[2] else 0
    assert y.shape == (shape[0], 6, frames, shape[3], shape[4])
    if shape[1] == 0:  # a sum over nothing: the bias alone
        assert torch.equal(y, bias.detach()[:, None, None, None].expand_as(y))
    dx, dweight, dbias = torch.autograd.grad(y.sum(), leaves)
    assert not dx.any() and not dweight.any() and dbias.tolist() == [y[:, 0].numel()] * 6


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["per-frame", "vidtok-3d", "temporal"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=["nan", "inf", "huge"])
def test_nonfinite_reaches_its_taps_only(value: float, name: str, backend: str) -> None:
    """NaN and Inf reach every output whose taps touch them, and no other."""
    available(backend, CASES[name], torch.float32)
    tensors, names, options = make(CASES[name], torch.float32)
    clean = call(ops.causal_conv3d, names, options, backend=backend)(*tensors)
    tensors[0][0, 2, -1, 3, 3] = value
    y = call(ops.causal_conv3d, names, options, backend=backend)(*tensors)
    marks = torch.zeros_like(tensors[0][:, :1])
    marks[0, 0, -1, 3, 3] = 1
    touched = reference.causal_conv3d(marks, torch.ones_like(tensors[1][:1, :1]), **options) > 0
    touched = touched.expand_as(y)
    assert torch.equal(y[~touched], clean[~touched])
    if value != 3e38:
        assert not torch.isfinite(y[touched]).any()


def test_nonfinite_matches_the_reference() -> None:
    x, weight = torch.randn(1, 8, 3, 6, 6), torch.randn(8, 8, 3, 3, 3)
    x[0, 0, 1, 2, 2], x[0, 1, 0, 5, 5] = float("inf"), float("nan")
    assert_same_nonfinite(ops.causal_conv3d(x, weight), reference.causal_conv3d(x, weight))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e15], ids=["tiny", "large"])
def test_extreme_magnitudes(scale: float, backend: str) -> None:
    available(backend, CASES["per-frame"], torch.float32)
    (x, weight, bias), names, options = make(CASES["per-frame"], torch.float32)
    tensors = [x * scale, weight, bias * scale]
    run, ref = call(ops.causal_conv3d, names, options, backend=backend), call(reference.causal_conv3d, names, options)
    assert_within_promise(run(*tensors), ref(*tensors), ref(*(t.double() for t in tensors)))


def test_gradcheck() -> None:
    x, history = torch.randn(1, 2, 3, 4, 3, dtype=torch.float64), torch.randn(1, 2, 1, 4, 3, dtype=torch.float64)
    weight, bias = torch.randn(2, 2, 3, 2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    residual = torch.randn(1, 2, 3, 4, 3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, weight, bias, history, residual)]
    torch.autograd.gradcheck(
        lambda x, w, b, h, r: ops.causal_conv3d(
            x, w, b, history=h, residual=r, activation="silu", time_padding="replicate", return_history=True
        ),
        inputs,
        fast_mode=True,
    )


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "history", "residual"])
def test_only_needed_gradients(needed: str) -> None:
    names = ["x", "weight", "bias", "history", "residual"]
    shapes = [(1, 4, 3, 4, 4), (4, 4, 3, 3, 3), (4,), (1, 4, 2, 4, 4), (1, 4, 3, 4, 4)]
    inputs = {n: torch.randn(s, requires_grad=n == needed) for n, s in zip(names, shapes, strict=True)}
    y = ops.causal_conv3d(**inputs)
    y.sum().backward()
    assert inputs[needed].grad is not None
    assert all(inputs[n].grad is None for n in names if n != needed)


def test_autocast_uses_the_lower_precision() -> None:
    x, weight, bias = torch.randn(1, 8, 3, 6, 6), torch.randn(8, 8, 3, 3, 3), torch.randn(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.causal_conv3d(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.causal_conv3d(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


X, W = torch.zeros(1, 4, 3, 5, 5), torch.zeros(6, 4, 3, 3, 3)
BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "x-ndim": (ShapeError, "x: expected 5 dimensions", {"x": X[0]}),
    "x-int": (DTypeError, "x: expected float", {"x": X.long()}),
    "weight-channels": (ShapeError, "weight: expected size 4 at axis 1", {"weight": W[:, :3]}),
    "weight-dtype": (DTypeError, "weight: expected the dtype of x", {"weight": W.double()}),
    "bias-shape": (ShapeError, "bias: expected shape", {"bias": torch.zeros(4)}),
    "history-missing": (OptionError, "history: expected", {"time_padding": "history"}),
    "history-shape": (ShapeError, "history: expected shape", {"history": X[:, :2]}),
    "history-short": (
        ShapeError,
        "at least 2 frames",
        {"history": X[:, :, :1], "time_padding": "history", "pad_frames": 2},
    ),
    "none-history": (OptionError, "time_padding", {"history": X, "time_padding": "none"}),
    "time-padding": (OptionError, "time_padding: expected one of 'zeros'", {"time_padding": "reflect"}),
    "space-mode": (OptionError, "spatial_padding_mode", {"spatial_padding_mode": "circular"}),
    "space": (OptionError, "spatial_padding: expected", {"spatial_padding": (1, 1, 1)}),
    "space-negative": (OptionError, "spatial_padding: expected", {"spatial_padding": -1}),
    "frames-negative": (OptionError, "pad_frames: expected", {"pad_frames": -1}),
    "stride": (OptionError, "stride: expected a positive int", {"stride": 0}),
    "dilation": (OptionError, "dilation: expected a positive int", {"dilation": (1, 1)}),
    "activation": (OptionError, "activation: expected one of None, 'silu'", {"activation": "relu"}),
    "residual": (ShapeError, "residual: expected shape", {"residual": X}),
    "too-small": (ShapeError, "padded height", {"spatial_padding": 0, "x": X[:, :, :, :2]}),
    "no-frame-to-replicate": (ShapeError, "at least one frame", {"x": X[:, :, :0], "time_padding": "replicate"}),
    "history-of-noncausal": (OptionError, "return_history", {"pad_frames": (1, 1), "return_history": True}),
    "backend": (OptionError, "backend: expected one of auto", {"backend": "cutlass"}),
    "backend-device": (
        BackendUnavailable,
        "causal_conv3d: backend 'cudnn' cannot serve this call",
        {"backend": "cudnn"},
    ),
}


@pytest.mark.parametrize(("error", "text", "options"), BAD.values(), ids=BAD.keys())
def test_errors(error: type[Exception], text: str, options: dict[str, Any]) -> None:
    with pytest.raises(error) as caught:
        ops.causal_conv3d(**{"x": X, "weight": W, **options})
    assert text in str(caught.value)


def test_explain_lists_every_backend() -> None:
    text = str(vidkernels.explain("causal_conv3d", X, W))
    assert all(name in text for name in dispatch.dispatchers()["causal_conv3d"].names)


@pytest.mark.parametrize("suffix", ["_torch", ""], ids=["torch", "cpp"])
def test_opcheck(suffix: str) -> None:
    if suffix == "":
        available("cpp", CASES["history"], torch.float32)
    (x, weight, bias, history), _, _ = make(CASES["history"], torch.float32)
    geometry = [1, 1, 1], [1, 1, 1], [2, 0, 1, 1, 1, 1], 0, 0
    library = torch.ops.vidkernels
    y = getattr(library, f"causal_conv3d_fwd{suffix}").default(x, weight, bias, history, None, *geometry, 0)
    opcheck(getattr(library, f"causal_conv3d_fwd{suffix}").default, (x, weight, bias, history, y, *geometry, 1))
    grad = torch.randn_like(y)
    bwd, flat = getattr(library, f"causal_conv3d_bwd{suffix}").default, [*sum(geometry[:3], []), 0, 0]
    opcheck(bwd, (grad, x, weight, history, flat, [True] * 4))
    opcheck(
        bwd, (grad, x, weight.contiguous(memory_format=torch.channels_last_3d), None, flat, [False, False, True, False])
    )


def test_compile_full_graph_without_recompiling() -> None:
    """One graph serves forward and backward; new lengths and sizes compile once more, with dynamic shapes."""
    compilations = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    def step(x: torch.Tensor, weight: torch.Tensor, history: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.causal_conv3d(x, weight, history=history, activation="silu", return_history=True)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    weight = torch.randn(8, 8, 3, 3, 3, requires_grad=True)
    for frames, width in ((3, 6), (4, 7), (5, 8), (9, 6), (7, 11)):
        x, history = torch.randn(1, 8, frames, 6, width), torch.randn(1, 8, 2, 6, width)
        y, state = compiled(x, weight, history)
        expected, expected_state = step(x, weight, history)
        assert torch.equal(y, expected) and torch.equal(state, expected_state)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), weight), torch.autograd.grad(expected.sum(), weight))
    assert compilations <= 2


def test_compile_aot() -> None:
    """AOTAutograd traces forward and backward through the fakes."""
    compiled = torch.compile(ops.causal_conv3d, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 8, 3, 6, 6).to(memory_format=torch.channels_last_3d).requires_grad_()
    weight = torch.randn(8, 8, 3, 3, 3, requires_grad=True)
    y = compiled(x, weight, time_padding="replicate")
    expected = ops.causal_conv3d(x, weight, time_padding="replicate")
    assert torch.equal(y, expected)
    for a, b in zip(
        torch.autograd.grad(y.sum(), (x, weight)), torch.autograd.grad(expected.sum(), (x, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_importing_the_op_imports_no_triton() -> None:
    run_python("import sys, vidkernels; vidkernels.ops.causal_conv3d; assert 'triton' not in sys.modules")


def test_a_stride_that_a_graph_takes_for_a_size() -> None:
    """With `dynamic=True` Dynamo makes numbers from around a function symbolic, as it does sizes."""
    x, weight, options = torch.randn(1, 4, 5, 6, 6), torch.randn(4, 4, 3, 3, 3), {"stride": (2, 1, 2)}
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: ops.causal_conv3d(x, weight, **options), fullgraph=True, dynamic=True, backend="eager"
    )
    torch.testing.assert_close(compiled(x), ops.causal_conv3d(x, weight, **options))
