# SPDX-License-Identifier: Apache-2.0
"""alpha_blend, alpha_blend_down, alpha_blend_up: every backend against the reference, and the rules of the public ops."""

from __future__ import annotations

import importlib.util
import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from alpha_blend_cases import CASES, INFINITE, Case, compare, compare_infinite
from helpers import opcheck

import vidkernels
from vidkernels import _library, dispatch, ops
from vidkernels._reference import alpha_blend as reference
from vidkernels.errors import BackendUnavailable, DTypeError, OptionError, ShapeError

needs_cpp = pytest.mark.skipif(_library.cpu_missing is not None, reason=str(_library.cpu_missing))
needs_cuda = pytest.mark.skipif(_library.cuda_missing is not None, reason=str(_library.cuda_missing))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the triton package is missing")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ALL = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
LOW = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@needs_cpp
@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cpp(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype, "cpp", "cpu")


@needs_cpp
@pytest.mark.parametrize("mix_dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_mix_factor_in_its_own_dtype(mix_dtype: torch.dtype) -> None:
    compare(CASES["linear chunk"], torch.bfloat16, "cpp", "cpu", mix_dtype)


@needs_cpp
@pytest.mark.parametrize("name", INFINITE)
def test_an_infinity(name: str) -> None:
    compare_infinite(CASES[name], torch.float32, "cpp", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", INFINITE)
@pytest.mark.parametrize(
    "backend", [pytest.param("cuda", marks=needs_cuda), pytest.param("triton", marks=needs_triton)]
)
def test_an_infinity_on_a_gpu(name: str, backend: str) -> None:
    compare_infinite(CASES[name], torch.float32, backend, "cuda")


@pytest.mark.gpu
@needs_cuda
@ALL
@LOW
def test_cuda(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype, "cuda", "cuda")


@pytest.mark.gpu
@needs_triton
@ALL
@LOW
def test_triton(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype, "triton", "cuda")


# one of each form; the rest differ in sizes
QUICK = ("plain slice", "down replicate", "down history of 1", "nearest channels last", "linear chunk of one")


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_triton_interpreted(name: str) -> None:
    compare(CASES[name], torch.float32, "triton", "cpu")


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "down history of 2", "linear chunk"])
def test_triton_interpreted_low_precision(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        compare(CASES[name], dtype, "triton", "cpu")


def test_reference_is_the_plain_formula() -> None:
    a, b, m = torch.randn(1, 3, 6, 4, 4), torch.randn(1, 3, 6, 4, 4), torch.tensor([0.3])
    s = torch.sigmoid(m)
    torch.testing.assert_close(reference.alpha_blend(a, b, m), s * a + (1 - s) * b)
    pooled = F.avg_pool3d(F.pad(a, (0, 0, 0, 0, 1, 0)), (3, 1, 1), (2, 1, 1))
    torch.testing.assert_close(reference.alpha_blend_down(a, b[:, :, :3], m), s * pooled + (1 - s) * b[:, :, :3])
    doubled = F.interpolate(a, scale_factor=(2.0, 1.0, 1.0), mode="trilinear")
    wide = torch.cat([b, b], 2)
    got = reference.alpha_blend_up(a, wide, m, mode="linear", split=0)
    torch.testing.assert_close(got, s * doubled + (1 - s) * wide)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "noncausal"])
def test_samplers_of_diffusers(causal: bool) -> None:
    vidtok = pytest.importorskip("diffusers.models.autoencoders.autoencoder_vidtok")
    seen: dict[str, torch.Tensor] = {}
    for module, frames in (
        (vidtok.VidTokDownsample3D(6, 6, is_causal=causal), (2, 5, 8)),
        (vidtok.VidTokUpsample3D(6, 6, num_temp_upsample=2, is_causal=causal), (1, 2, 5)),
    ):
        torch.nn.init.constant_(module.mix_factor, -0.4)
        module.conv.register_forward_hook(lambda m, inputs, output: seen.update(b=output))
        for count in frames:
            x = torch.randn(2, 6, count, 3, 5)
            module.is_first_chunk = True
            expected = module(x)
            if isinstance(module, vidtok.VidTokDownsample3D):
                got = ops.alpha_blend_down(
                    x, seen["b"], module.mix_factor, first_frame="replicate" if causal else "noncausal"
                )
            else:
                mode = "linear" if causal else "nearest"
                got = ops.alpha_blend_up(x, seen["b"], module.mix_factor, mode=mode, split=2)
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("branch", ["pool", "newest", "centre"])
def test_folded_weights_are_the_blend(branch: str) -> None:
    x, mix = torch.randn(1, 4, 7, 5, 6).double(), torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    stride = (2, 1, 1) if branch == "pool" else (1, 1, 1)
    b = F.conv3d(x, weight, bias, stride, (0, 1, 1))
    smooth = {"pool": F.avg_pool3d(x, (3, 1, 1), stride), "newest": x[:, :, 2:], "centre": x[:, :, 1:-1]}[branch]
    blended = ops.alpha_blend(smooth, b, mix)
    folded = F.conv3d(x, *ops.fold_alpha_blend(weight, bias, mix, branch=branch), stride, (0, 1, 1))
    torch.testing.assert_close(folded, blended)
    cotangent = torch.randn_like(blended)
    leaves = [weight, bias, mix]
    for mine, other in zip(
        torch.autograd.grad(folded, leaves, cotangent), torch.autograd.grad(blended, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("op", ["down", "up"])
@pytest.mark.parametrize("cuts", [(4,), (2, 3, 6)], ids=["two chunks", "uneven"])
def test_chunks_equal_the_whole_clip(op: str, cuts: tuple[int, ...]) -> None:
    x, m = torch.randn(1, 4, 8, 3, 3), torch.tensor([0.4])
    b = torch.randn(1, 4, 4 if op == "down" else 16, 3, 3)
    edges, parts, done = (0, *cuts, 8), [], 0
    if op == "down":
        whole = ops.alpha_blend_down(x, b, m)
        pending = torch.zeros(1, 4, 1, 3, 3)
        for first, last in itertools.pairwise(edges):
            chunk = x[:, :, first:last]
            count = (chunk.shape[2] + pending.shape[2] - 1) // 2
            parts.append(ops.alpha_blend_down(chunk, b[:, :, done : done + count], m, first_frame=pending))
            done += count
            pending = torch.cat([pending, chunk], 2)[:, :, 2 * count :]
    else:
        whole = ops.alpha_blend_up(x, b, m, mode="linear", split=0)
        for first, last in itertools.pairwise(edges):
            before = x[:, :, first - 1 : first] if first else None
            behind = x[:, :, last : last + 1] if last < 8 else None
            part = b[:, :, 2 * first : 2 * last]
            options = {"mode": "linear", "split": 0, "history": before, "lookahead": behind}
            parts.append(ops.alpha_blend_up(x[:, :, first:last], part, m, **options))
    assert torch.equal(torch.cat(parts, 2), whole)


@needs_cpp
def test_explain_names_every_backend() -> None:
    x = torch.randn(1, 2, 4, 3, 3)
    text = str(vidkernels.explain("alpha_blend", x, x, torch.zeros(1)))
    assert "-> cpp" in text and "it runs on cuda tensors, got cpu" in text and "reference" in text


@needs_cpp
@pytest.mark.parametrize("name", ["plain", "down replicate", "down history of 2", "linear chunk"])
def test_gradcheck(name: str) -> None:
    case = CASES[name]
    small = Case(case.op, (1, 2, min(case.shape[2], 4), 2, 2), case.options, case.history, case.lookahead)
    inputs = [t.requires_grad_() for t in small.draw(torch.float64, "cpu", torch.float64)]
    torch.autograd.gradcheck(small.call(ops, backend="cpp"), inputs)


@needs_cpp
def test_extreme_mix_factors_keep_the_small_branch() -> None:
    a, b = torch.zeros(5), torch.full((5,), 3.0)
    got = ops.alpha_blend(a, b, torch.tensor([30.0]), backend="cpp")
    torch.testing.assert_close(got, torch.full((5,), 3 * torch.sigmoid(torch.tensor(-30.0)).item()))
    swapped = ops.alpha_blend(b, a, torch.tensor([-30.0]), backend="cpp")
    assert torch.equal(got, swapped)


@needs_cpp
def test_nan_and_infinity_stay_where_they_are() -> None:
    x = torch.randn(1, 2, 6, 1, 4)
    x[0, 0, 3, 0, 1], x[0, 1, 0, 0, 2] = float("nan"), float("inf")
    mix = torch.tensor([0.1])
    for op, frames, options in (
        ("alpha_blend_down", 3, {}),
        ("alpha_blend_down", 3, {"first_frame": "noncausal"}),
        ("alpha_blend_up", 12, {"mode": "linear", "split": 2}),
    ):
        b = torch.randn(1, 2, frames, 1, 4)
        got = getattr(ops, op)(x, b, mix, backend="cpp", **options)
        want = getattr(ops, op)(x, b, mix, backend="reference", **options)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


@needs_cpp
def test_empty() -> None:
    mix = torch.tensor([0.5], requires_grad=True)
    x = torch.randn(2, 3, 1, 4, 4, requires_grad=True)
    y = ops.alpha_blend_down(x, torch.randn(2, 3, 0, 4, 4), mix)
    assert y.shape == (2, 3, 0, 4, 4)
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(mix.grad, torch.zeros(1))
    assert ops.alpha_blend(torch.empty(0, 3), torch.empty(0, 3), mix).shape == (0, 3)


@needs_cpp
def test_memory_format_of_b_is_kept() -> None:
    x, b, mix = torch.randn(2, 8, 4, 5, 6), torch.randn(2, 8, 8, 5, 6), torch.tensor([0.0])
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        for other in (torch.contiguous_format, torch.channels_last_3d):
            out = ops.alpha_blend_up(x.contiguous(memory_format=other), b.contiguous(memory_format=layout), mix)
            assert out.is_contiguous(memory_format=layout)
            torch.testing.assert_close(out, ops.alpha_blend_up(x, b, mix, backend="reference"))


@needs_cpp
def test_same_bits_for_any_number_of_threads() -> None:
    inputs = CASES["nearest"].draw(torch.float32, "cpu", torch.float32)
    wide = [torch.randn(2, 64, 6, 24, 24), torch.randn(2, 64, 12, 24, 24), inputs[2]]
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        leaves = [t.detach().clone().requires_grad_() for t in wide]
        y = ops.alpha_blend_up(*leaves, backend="cpp")
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_cpp
def test_unwanted_gradients_are_not_computed() -> None:
    x, b, mix = CASES["nearest"].draw(torch.float32, "cpu", torch.float32)
    y = ops.alpha_blend_up(x.requires_grad_(), b, mix, backend="cpp")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(dx, torch.full_like(x, 2 * torch.sigmoid(mix).item()))
    bwd = dispatch.op("alpha_blend_bwd", "cpp")
    grads = bwd(torch.ones_like(y), x, b, mix, None, None, 5, 0, True, False, False, False, False)
    assert [g.numel() for g in grads] == [x.numel(), 0, 0, 0, 0]


MEMORY = {
    "alike": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last_3d),
    "a slice": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "expanded": lambda t: t[:, :1].expand_as(t),
}


@pytest.mark.parametrize("backend", ["cpp", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("memory", MEMORY)
def test_a_gradient_lies_as_graphs_expect_it(backend: str, memory: str) -> None:
    """That of x lay as b does in C++ and as x does in the fake: a compiled backward stopped."""
    blend, m = ops.alpha_blend, torch.zeros(1)
    x, b = torch.randn(2, 4, 2, 3, 3), torch.randn(2, 4, 2, 3, 3)
    for pair in ((MEMORY[memory](x), b), (x, MEMORY[memory](b))):
        wanted = (True, True, True, False, False)
        opcheck(dispatch.op("alpha_blend_bwd", backend), (x, *pair, m, None, None, 0, 0, *wanted))
        leaves = [t.detach().requires_grad_() for t in (*pair, m)]
        found, right = (
            torch.autograd.grad(blend(*leaves, backend=name).square().sum(), leaves) for name in (backend, "reference")
        )
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one, other)


@needs_cpp
@pytest.mark.parametrize("name", ["plain", "down history of 2", "linear chunk"])
def test_bare_ops(name: str) -> None:
    case = CASES[name]
    x, b, mix, *given = case.draw(torch.float32, "cpu", torch.float32)
    mode = {"plain": 0, "down history of 2": 4, "linear chunk": 6}[name]
    history, lookahead = (*given, None, None)[:2]
    opcheck(dispatch.op("alpha_blend_fwd", "cpp"), (x, b, mix, history, lookahead, mode, 0))
    wanted = (True, True, True, history is not None, lookahead is not None)
    opcheck(dispatch.op("alpha_blend_bwd", "cpp"), (b, x, b, mix, history, lookahead, mode, 0, *wanted))


@needs_cpp
@pytest.mark.parametrize("name", ["plain", "down replicate", "linear chunk"])
def test_compiles_as_one_graph_for_any_size(name: str) -> None:
    case = CASES[name]
    function = torch.compile(case.call(ops), fullgraph=True, backend="aot_eager", dynamic=True)
    for width in (case.shape[-1], case.shape[-1] + 4):
        inputs = Case(case.op, (*case.shape[:-1], width), case.options, case.history, case.lookahead)
        drawn = inputs.draw(torch.float32, "cpu", torch.float32)
        results = []
        for run in (function, case.call(ops)):
            leaves = [t.detach().requires_grad_() for t in drawn]
            y = run(*leaves)
            results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
        for mine, eager in zip(*results, strict=True):
            assert torch.equal(mine, eager) and mine.stride() == eager.stride()


BAD = {
    "integers": (DTypeError, "alpha_blend", {"a": torch.ones(3, dtype=torch.int32)}),
    "two dtypes": (DTypeError, "alpha_blend", {"b": torch.ones(2, 3, 4, 5, 5, dtype=torch.float64)}),
    "other shape": (ShapeError, "alpha_blend", {"b": torch.ones(2, 3)}),
    "two factors": (ShapeError, "alpha_blend", {"mix_factor": torch.ones(2)}),
    "frames of b": (ShapeError, "alpha_blend_down", {"b": torch.ones(2, 3, 4, 5, 5)}),
    "first frame": (OptionError, "alpha_blend_down", {"first_frame": "reflect"}),
    "given frames": (ShapeError, "alpha_blend_down", {"first_frame": torch.ones(2, 3, 3, 5, 5)}),
    "four axes": (ShapeError, "alpha_blend_up", {"x": torch.ones(2, 3, 4, 5), "b": torch.ones(2, 3, 8, 5)}),
    "mode": (OptionError, "alpha_blend_up", {"mode": "cubic"}),
    "split": (OptionError, "alpha_blend_up", {"mode": "linear", "split": -1}),
    "history of nearest": (OptionError, "alpha_blend_up", {"history": torch.ones(2, 3, 1, 5, 5)}),
    "backend": (OptionError, "alpha_blend", {"backend": "fastest"}),
    "triton on the cpu": (BackendUnavailable, "alpha_blend", {"backend": "triton"}),
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves CPU tensors")
@pytest.mark.parametrize(("error", "op", "changed"), BAD.values(), ids=list(BAD))
def test_wrong_arguments(error: type[Exception], op: str, changed: dict) -> None:
    frames = {"alpha_blend": 4, "alpha_blend_down": 2, "alpha_blend_up": 8}[op]
    first = "a" if op == "alpha_blend" else "x"
    arguments = {first: torch.ones(2, 3, 4, 5, 5), "b": torch.ones(2, 3, frames, 5, 5), "mix_factor": torch.ones(1)}
    with pytest.raises(error):
        getattr(ops, op)(**{**arguments, **changed})
