# SPDX-License-Identifier: Apache-2.0
"""adaln_modulate, gate_residual and adaln_zero: every form of modulation, forward and backward, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adaln_zero_cases import CALLS, FORMS, Form, check, draw, reference_of
from helpers import assert_same_nonfinite, opcheck

import vidkernels
from vidkernels import ops
from vidkernels.errors import BackendUnavailable, DTypeError, OptionError, ShapeError, VidkernelsError

BACKENDS = ["cpp", pytest.param("triton", marks=pytest.mark.interpreter)]
GPU_BACKENDS = ["cuda", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("op", CALLS)
def test_every_form_of_rows(op: str, form: Form, backend: str) -> None:
    check(op, form, 200, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "table_dtype", "norm", "channels"),
    [
        (torch.float32, torch.float32, "rms", 64),
        (torch.float32, torch.float32, "none", 65),
        (torch.bfloat16, torch.bfloat16, "layer", 1152),
        (torch.bfloat16, torch.float32, "layer", 101),
        (torch.bfloat16, torch.float32, "rms", 2240),
        (torch.float16, torch.float16, "layer", 100),
        (torch.float16, torch.float32, "none", 7),
        (torch.float32, torch.bfloat16, "rms", 1),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_dtypes_norms_and_widths(
    dtype: torch.dtype, table_dtype: torch.dtype, norm: str, channels: int, backend: str
) -> None:
    form = FORMS["packed" if channels < 1000 and backend == "cpp" else "per_token"]
    check("adaln_zero", form, channels, dtype, backend, table_dtype=table_dtype, norm=norm)


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_float64_on_the_cpu(norm: str) -> None:
    """The law runs in the same precision here, so both are the truth up to the rounding of sums of 75 terms."""
    wrap, names = CALLS["adaln_zero"]
    tensors = draw(FORMS["packed"], 33, torch.float64)
    options = {"norm": norm, **FORMS["packed"].options()}
    results = []
    for function, extra in ((ops.adaln_zero, {"backend": "cpp"}), (reference_of("adaln_zero"), {})):
        leaves = [tensors[name].clone().requires_grad_() for name in names]
        hidden, y = wrap(function, names, **options, **extra)(*leaves)
        results.append([hidden, y, *torch.autograd.grad((hidden.sin() * y).sum(), leaves)])
    for name, actual, law in zip(("hidden", "y", *names), *results, strict=True):
        assert (actual - law).abs().max() <= 75 * 2**-53 * law.abs().max(), name


MISSING = ("gate", "shift", "scale", "shift scale", "weight", "bias", "gate shift scale weight bias")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing", [tuple(names.split()) for names in MISSING], ids="+".join)
def test_missing_operands(missing: tuple[str, ...], backend: str) -> None:
    check("adaln_zero", FORMS["per_sample"], 40, torch.float32, backend, missing=missing)
    if missing != ("gate",):
        check("adaln_modulate", FORMS["packed"], 40, torch.float32, backend, missing=missing)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [64, 100, 257, 1152, 1536, 1792, 2240, 3072, 5120, 8192])
def test_widths_on_a_gpu(channels: int, dtype: torch.dtype, backend: str) -> None:
    for op in CALLS:
        check(op, FORMS["per_sample"], channels, dtype, backend, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("op", CALLS)
def test_every_form_of_rows_on_a_gpu(op: str, form: Form, backend: str) -> None:
    check(op, form, 1152, torch.bfloat16, backend, table_dtype=torch.float32, device="cuda")


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_wanted_gradients_are_computed(backend: str, request: pytest.FixtureRequest) -> None:
    """Each input alone: its gradient is that of the full computation, the others are None."""
    names = CALLS["adaln_zero"][1]
    tensors = draw(FORMS["packed"], 24, torch.float32)
    options = FORMS["packed"].options()

    def gradients(wanted: set[str]) -> dict[str, torch.Tensor | None]:
        leaves = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in tensors.items()}
        hidden, y = CALLS["adaln_zero"][0](ops.adaln_zero, names, backend=backend, **options)(*leaves.values())
        (hidden.square().sum() + y.square().sum()).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    full = gradients(set(names))
    every = backend != "triton" or request.config.getoption("--slow")  # seconds each in the interpreter
    for name in names if every else names[::2]:
        alone = gradients({name})
        assert alone[name] is not None and torch.equal(alone[name], full[name]), name
        assert all(grad is None for other, grad in alone.items() if other != name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", ["hidden", "modulated"])
def test_one_of_the_two_outputs_unused(used: str, backend: str) -> None:
    names = CALLS["adaln_zero"][1]
    tensors = draw(FORMS["per_sample"], 24, torch.float32)
    grads = []
    for function, options in ((ops.adaln_zero, {"backend": backend}), (reference_of("adaln_zero"), {})):
        leaves = [tensors[name].clone().requires_grad_() for name in names]
        hidden, y = CALLS["adaln_zero"][0](function, names, **options)(*leaves)
        (hidden if used == "hidden" else y).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for name, ours, law in zip(names, *grads, strict=True):
        if law is None:
            assert ours is None, name
        else:
            torch.testing.assert_close(ours, law, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chain_equals_its_two_halves_bit_for_bit(dtype: torch.dtype, backend: str) -> None:
    t = draw(FORMS["per_frame"], 96, dtype)
    hidden, y = ops.adaln_zero(t["residual"], t["branch"], t["gate"], t["shift"], t["scale"], backend=backend)
    halves = ops.gate_residual(t["residual"], t["branch"], t["gate"], backend=backend)
    assert torch.equal(hidden, halves)
    assert torch.equal(y, ops.adaln_modulate(halves, t["shift"], t["scale"], backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_each_sample_alone_bit_for_bit(backend: str) -> None:
    form = FORMS["packed"]
    t = draw(form, 48, torch.float32)
    ends = form.cu_seqlens
    assert ends is not None
    packed = ops.adaln_modulate(t["residual"], t["shift"], t["scale"], backend=backend, **form.options())
    for s, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        alone = ops.adaln_modulate(t["residual"][begin:end], t["shift"][s], t["scale"][s], backend=backend)
        assert torch.equal(packed[begin:end], alone), s


def test_backward_is_deterministic_whatever_the_number_of_threads() -> None:
    names = CALLS["adaln_zero"][1]
    tensors = draw(Form((2, 1500), (2,)), 40, torch.float32)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        leaves = [tensors[name].clone().requires_grad_() for name in names]
        hidden, y = CALLS["adaln_zero"][0](ops.adaln_zero, names, backend="cpp")(*leaves)
        results.append(torch.autograd.grad((hidden * y).sum(), leaves))
    torch.set_num_threads(threads)
    for other in results[1:]:
        for name, a, b in zip(names, results[0], other, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_operands_are_read_in_place_or_copied(backend: str) -> None:
    """Chunks of one 6C projection, transposed and sliced activations, and a table expanded over samples."""
    channels = 40
    emb = torch.randn(2, 6 * channels)
    shift, scale, gate = emb.chunk(6, dim=1)[:3]
    x = torch.randn(3, 9, 2, channels).permute(2, 1, 0, 3)[:, ::2]  # [2, 5, 3, C], no axis in order
    branch = torch.randn(2, 5, 3, 2 * channels)[..., :channels]
    expected = reference_of("adaln_zero")(x, branch, gate, shift, scale)
    actual = ops.adaln_zero(x, branch, gate, shift, scale, backend=backend)
    for a, b in zip(actual, expected, strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b)
    shared = torch.randn(1, 1, channels).expand(2, 5, -1)
    tokens = torch.randn(2, 5, channels)
    torch.testing.assert_close(
        ops.adaln_modulate(tokens, shared, None, backend=backend), reference_of("adaln_modulate")(tokens, shared, None)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    x = torch.randn(shape, requires_grad=True)
    tables = [torch.randn(shape[0], 8, requires_grad=True) for _ in range(3)]
    hidden, y = ops.adaln_zero(x, x, *tables, backend=backend)
    assert hidden.shape == y.shape == shape
    (hidden.sum() + y.sum()).backward()
    assert x.grad is not None and x.grad.shape == shape
    for table in tables:
        assert table.grad is not None and torch.equal(table.grad, torch.zeros_like(table))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_extremes(norm: str, backend: str) -> None:
    """Constant rows, a large common offset, tiny and huge values; NaN and Inf stay in their own token."""
    x = torch.randn(8, 64, dtype=torch.float32)
    x[0] = 3.0
    x[1] += 1e4
    x[2] *= 1e-20
    x[3] *= 1e15
    x[4, 5] = float("nan")
    x[5, 6] = float("inf")
    shift, scale = torch.randn(2, 64).unbind()
    actual = ops.adaln_modulate(x, shift, scale, norm=norm, backend=backend)
    truth = reference_of("adaln_modulate")(x.double(), shift.double(), scale.double(), norm=norm)
    assert_same_nonfinite(actual, truth)
    same = reference_of("adaln_modulate")(x, shift, scale, norm=norm)
    for token in (0, 1, 2, 3, 6, 7):
        budget = 2 * (same[token].double() - truth[token]).abs().max() + 2**-24 * truth[token].abs().max()
        assert (actual[token].double() - truth[token]).abs().max() <= budget, token


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("channels", [1152, 101, 4099])
def test_bfloat16_rows_of_any_offset_and_size(channels: int, norm: str) -> None:
    """Where one pass over a row would lose digits a second is taken, and no row depends on the one that it is taken with."""
    offsets = [0.0, 1.0, 7.0, 7.9, 8.1, 20.0, 300.0, 1e4]
    sizes = [1.0, 1e-3, 1e-16, 1e-22, 1e3, 1e17, 1e20]
    x = torch.stack([(torch.randn(channels) + offset) * size for offset in offsets for size in sizes])
    x[5] = x[5, 0]
    x[12, 1:] = x[12, 0]
    x = x.bfloat16()
    shift, scale = torch.randn(2, channels).bfloat16().unbind()
    actual = ops.adaln_modulate(x, shift, scale, norm=norm, eps=1e-30, backend="cpp")
    wide = [value.double() for value in (x, shift, scale)]
    truth = reference_of("adaln_modulate")(*wide, norm=norm, eps=1e-30)
    same = reference_of("adaln_modulate")(x, shift, scale, norm=norm, eps=1e-30)
    for token in range(len(x)):
        alone = ops.adaln_modulate(x[token : token + 1], shift, scale, norm=norm, eps=1e-30, backend="cpp")
        assert torch.equal(alone.nan_to_num(7), actual[token : token + 1].nan_to_num(7)), token
        own = (same[token].double() - truth[token]).abs().max()
        if own.isfinite():  # squares of 1e20 are above float32
            budget = 2 * own + 2**-8 * truth[token].abs().max()
            assert (actual[token].double() - truth[token]).abs().max() <= budget, token


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001], ids=["ones", "all ones", "signalling"])
def test_a_nan_of_any_payload_stays_one(bits: int) -> None:
    """Rounding to bfloat16 may not carry a payload of ones into the sign: NaN in the tables, in x, and at a row's end."""
    names = CALLS["adaln_zero"][1]
    tensors = draw(FORMS["per_token"], 70, torch.bfloat16, table_dtype=torch.float32)
    for place, name in enumerate(("shift", "scale", "gate")):
        tensors[name].view(torch.int32)[0, place, [3 + place, 68]] = bits
    tensors["branch"].view(torch.int16)[0, 4, 11] = bits >> 16
    tensors["residual"].view(torch.int16)[0, 5, 69] = bits >> 16
    found = []
    for function, extra in ((ops.adaln_zero, {"backend": "cpp"}), (reference_of("adaln_zero"), {})):
        leaves = [tensors[name].clone().requires_grad_() for name in names]
        outputs = CALLS["adaln_zero"][0](function, names, **FORMS["per_token"].options(), **extra)(*leaves)
        cotangents = [torch.ones_like(output) for output in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, cotangents)])
    for name, actual, expected in zip(("hidden", "modulated", *names), *found, strict=True):
        assert torch.equal(actual.isnan(), expected.isnan()), name


def test_gradcheck_of_the_reference_and_the_kernel_agree() -> None:
    """Second opinion on the derivative, independent of the law's autograd: finite differences through the kernel."""
    call, names = CALLS["adaln_zero"]
    tensors = [draw(Form((2, 3), (2,)), 5, torch.float64)[name].requires_grad_() for name in names]
    for norm in ("layer", "rms"):
        assert torch.autograd.gradcheck(call(ops.adaln_zero, names, backend="cpp", norm=norm), tensors)


X, TABLE, mod = torch.zeros(2, 6, 8), torch.zeros(2, 8), ops.adaln_modulate


def ends(*values: int) -> torch.Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (DTypeError, "x: expected float32", lambda: mod(X.long(), TABLE, TABLE)),
        (ShapeError, "x: expected 2 to 8 dimensions", lambda: mod(X[0, 0], TABLE, TABLE)),
        (ShapeError, "scale: expected 8 values a row", lambda: mod(X, TABLE, TABLE[:, :4])),
        (ShapeError, "shift: expected [C], [1, C] or [2, C]", lambda: mod(X, torch.zeros(3, 8), None)),
        (ShapeError, "number of groups that divides", lambda: mod(X, torch.zeros(2, 4, 8), None)),
        (ShapeError, "scale: expected 6 rows, as shift has", lambda: mod(X, torch.zeros(2, 3, 8), TABLE)),
        (DTypeError, "scale: expected the dtype of shift", lambda: mod(X, TABLE, TABLE.half())),
        (OptionError, "norm: expected one of", lambda: mod(X, TABLE, TABLE, norm="batch")),
        (OptionError, "eps: expected a number", lambda: mod(X, TABLE, TABLE, eps=-1.0)),
        (ShapeError, "weight: expected shape (8,)", lambda: mod(X, TABLE, TABLE, weight=torch.ones(7))),
        (ShapeError, "branch: expected shape", lambda: ops.gate_residual(X, X[:1], TABLE)),
        (DTypeError, "branch: expected the dtype of residual", lambda: ops.gate_residual(X, X.half(), TABLE)),
        (ShapeError, "cu_seqlens: expected values that rise", lambda: mod(X[0], TABLE, None, cu_seqlens=ends(0, 3, 5))),
        (ShapeError, "shift: expected shape (3, 8)", lambda: mod(X[0], TABLE, None, cu_seqlens=ends(0, 3, 5, 6))),
        (ShapeError, "x: expected [total, C]", lambda: mod(X, TABLE, None, cu_seqlens=ends(0, 3, 12))),
        (DTypeError, "rows: expected an integer", lambda: mod(X, TABLE, None, rows=torch.zeros(2, 6))),
        (ShapeError, "rows: expected [B, groups]", lambda: mod(X, TABLE, None, rows=torch.zeros(2, 4).long())),
        (OptionError, "rows: expected values in [0, 2)", lambda: mod(X, TABLE, None, rows=torch.full((2, 6), 2))),
        (OptionError, "backend: expected one of", lambda: ops.adaln_zero(X, X, TABLE, TABLE, TABLE, backend="fast")),
        (BackendUnavailable, "cuda", lambda: ops.adaln_zero(X, X, TABLE, TABLE, TABLE, backend="cuda")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(error: type[VidkernelsError], text: str, call: Any) -> None:
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


def test_explain_lists_every_backend() -> None:
    explanation = vidkernels.explain("adaln_zero", X, X, TABLE, TABLE, TABLE)
    assert [choice.backend for choice in explanation.choices] == ["cpp", "cuda", "triton", "reference"]
    assert explanation.chosen == "cpp"


def test_gpu_backends_refuse_rows_that_do_not_fit_their_threads() -> None:
    from vidkernels.ops._adaln_layout import row_too_long

    assert row_too_long(torch.empty(1, 8192)) is None
    for dtype in (torch.float32, torch.bfloat16):
        assert "longer than 8192" in row_too_long(torch.empty(1, 8193, dtype=dtype))


def bare_calls() -> list[Any]:
    t = draw(FORMS["packed"], 16, torch.float32)
    cu = FORMS["packed"].options()["cu_seqlens"]
    x, w, b = t["residual"], t["weight"], t["bias"]
    statistics = torch.zeros(75), torch.ones(75)
    namespace = torch.ops.vidkernels
    return [
        ("modulate_fwd", namespace.adaln_modulate_fwd, (x, t["shift"], t["scale"], w, b, None, cu, 1, 1e-6, True)),
        ("modulate_fwd_plain", namespace.adaln_modulate_fwd, (x, None, None, None, None, None, None, 2, 1e-6, False)),
        ("modulate_bwd", namespace.adaln_modulate_bwd, (x, x, *statistics, t["scale"], w, b, None, cu, 6, 1, 121)),
        ("gate_fwd", namespace.gate_residual_fwd, (x, t["branch"], t["gate"], None, cu)),
        ("gate_bwd", namespace.gate_residual_bwd, (x, t["branch"], t["gate"], None, cu, 6, 6)),
        (
            "chain_fwd",
            namespace.adaln_zero_fwd,
            (x, t["branch"], t["gate"], t["shift"], t["scale"], w, b, None, cu, 1, 1e-6, True),
        ),
        (
            "chain_bwd",
            namespace.adaln_zero_bwd,
            (x, x, x, t["branch"], *statistics, t["gate"], t["scale"], w, b, None, cu, 6, 1, 127),
        ),
        (
            "chain_bwd_part",
            namespace.adaln_zero_bwd,
            (None, x, x, None, *statistics, None, None, w, None, None, None, 1, 1, 33),
        ),
    ]


@pytest.mark.parametrize("index", range(8))
def test_opcheck(index: int) -> None:
    ops.adaln_zero, ops.gate_residual, ops.adaln_modulate  # noqa: B018 (defines the ops)
    _, op, arguments = bare_calls()[index]
    opcheck(op.default, arguments)


@pytest.mark.parametrize("op", CALLS)
def test_compiles_in_one_graph_without_recompiling_for_new_lengths(op: str) -> None:
    wrap, names = CALLS[op]
    compiled = torch.compile(wrap(getattr(ops, op), names), fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    counter = torch._dynamo.utils.counters
    counter.clear()
    for tokens in (5, 8, 13, 21, 34):
        tensors = draw(Form((2, tokens), (2,)), 16, torch.float32)
        leaves = [tensors[name].clone().requires_grad_() for name in names]
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        for function, inputs in ((compiled, leaves), (wrap(getattr(ops, op), names), copies)):
            out = function(*inputs)
            sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,))).backward()
        for name, a, b in zip(names, leaves, copies, strict=True):
            assert torch.equal(a.grad, b.grad), name
    assert counter["stats"]["unique_graphs"] == 1


def test_compiles_with_packed_rows() -> None:
    form, function = FORMS["packed"], torch.compile(ops.adaln_modulate, fullgraph=True, backend="aot_eager")
    t = draw(form, 16, torch.float32)
    leaf, copy = t["shift"].clone().requires_grad_(), t["shift"].clone().requires_grad_()
    function(t["residual"], leaf, t["scale"], **form.options()).square().sum().backward()
    ops.adaln_modulate(t["residual"], copy, t["scale"], **form.options()).square().sum().backward()
    assert torch.equal(leaf.grad, copy.grad)
