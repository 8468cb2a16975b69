# SPDX-License-Identifier: Apache-2.0
"""Packed attention: the reference against scaled_dot_product_attention, and every CPU path against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ROOT,
    assert_gradients_within_promise,
    assert_same_nonfinite,
    assert_within_promise,
    opcheck,
    run_python,
)

import vidkernels
from vidkernels import _library, ops
from vidkernels._reference import varlen_attention as reference
from vidkernels.errors import BackendUnavailable, DTypeError, OptionError, ShapeError

needs_cpp = pytest.mark.skipif(_library.cpu_missing is not None, reason=str(_library.cpu_missing))
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
# name: lengths of q, lengths of k (None: self-attention), Hq, Hk, D, causal
CASES = {
    "mixture": ([70, 1, 33, 129], None, 3, 3, 64, False),
    "head-dim-72": ([16, 64, 65, 5], None, 2, 2, 72, False),
    "causal": ([70, 1, 33, 129], None, 2, 2, 40, True),
    "grouped-heads": ([9, 65], None, 6, 2, 32, True),
    "cross-empty-prompt": ([12, 70, 5], [7, 0, 140], 4, 2, 48, False),
    "cross-causal-long-keys": ([5, 70, 64], [20, 71, 200], 2, 2, 80, True),
    "cross-causal-short-keys": ([9, 130], [4, 66], 2, 1, 24, True),
    "odd-head-dim": ([3, 66, 40, 130], None, 3, 3, 7, False),
    "temporal-16": ([16] * 24, None, 2, 2, 72, False),
    "head-dim-256": ([40, 8], None, 1, 1, 256, False),
    # Many heads: an item of the C++ kernel is several tiles of 64 queries.
    "tiles-of-an-item": ([600, 70], None, 8, 4, 16, True),
    "tiles-without-keys": ([300], [130], 16, 16, 8, True),
}


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make(name: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, Any]]:
    lengths_q, lengths_k, heads_q, heads_k, dim, causal = CASES[name]
    total_k = sum(lengths_q if lengths_k is None else lengths_k)
    tensors = [
        torch.randn(sum(lengths_q), heads_q, dim),
        torch.randn(total_k, heads_k, dim),
        torch.randn(total_k, heads_k, dim),
    ]
    call = {
        "cu_seqlens_q": offsets(lengths_q),
        "cu_seqlens_k": None if lengths_k is None else offsets(lengths_k),
        "causal": causal,
    }
    return [x.to(dtype) for x in tensors], call


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_sdpa(name: str) -> None:
    """Segment by segment, with an explicit mask, the reference is PyTorch's attention."""
    (q, k, v), call = make(name, torch.float64)
    out = reference.varlen_attention(q, k, v, **call)
    starts_q = call["cu_seqlens_q"].tolist()
    starts_k = starts_q if call["cu_seqlens_k"] is None else call["cu_seqlens_k"].tolist()
    for i in range(len(starts_q) - 1):
        rows, columns = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        length_q, length_k = rows.stop - rows.start, columns.stop - columns.start
        mask = torch.ones(length_q, length_k, dtype=torch.bool)
        if call["causal"]:
            mask = mask.tril(length_k - length_q)
        operands = (x.transpose(0, 1) for x in (q[rows], k[columns], v[columns]))
        expected = F.scaled_dot_product_attention(*operands, attn_mask=mask, enable_gqa=True).transpose(0, 1)
        seen = mask.any(dim=1) if length_k else torch.zeros(length_q, dtype=torch.bool)
        torch.testing.assert_close(out[rows][seen], expected[seen], rtol=1e-12, atol=1e-12)
        assert torch.equal(out[rows][~seen], torch.zeros_like(out[rows][~seen]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_per_sample_bitwise(backend: str, causal: bool) -> None:
    """Outputs and gradients of a pack are those of one call per sample, bit for bit."""
    lengths = torch.randint(1, 150, (12,)).tolist()
    q, k, v = (torch.randn(sum(lengths), 2, 40, requires_grad=True) for _ in range(3))
    grad = torch.randn(q.shape)
    out = ops.varlen_attention(q, k, v, offsets(lengths), causal=causal, backend=backend)
    packed = torch.autograd.grad(out, (q, k, v), grad)
    for start, length in zip(offsets(lengths).tolist(), lengths, strict=False):
        rows = slice(start, start + length)
        sample = [x.detach()[rows].clone().requires_grad_() for x in (q, k, v)]
        alone = ops.varlen_attention(*sample, offsets([length]), causal=causal, backend=backend)
        assert torch.equal(out[rows], alone)
        for whole, part in zip(packed, torch.autograd.grad(alone, sample, grad[rows]), strict=True):
            assert torch.equal(whole[rows], part)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", CASES)
def test_cpp_keeps_the_promise(name: str, dtype: torch.dtype) -> None:
    """Forward and gradients against float64."""
    tensors, call = make(name, dtype)
    assert_gradients_within_promise(
        lambda *x: ops.varlen_attention(*x, **call, backend="cpp"),
        lambda *x: reference.varlen_attention(*x, **call),
        tensors,
        names=("q", "k", "v"),
    )


@needs_cpp
@pytest.mark.parametrize("name", CASES)
def test_cpp_in_float64(name: str) -> None:
    """In float64 the kernel equals the reference to a few roundings, gradients included."""
    tensors, call = make(name, torch.float64)
    results = []
    for backend in ("cpp", "reference"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = ops.varlen_attention(*leaves, **call, backend=backend)
        results.append(
            (out, *torch.autograd.grad(out, leaves, torch.cos(torch.arange(out.numel())).view_as(out).double()))
        )
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@needs_cpp
@pytest.mark.parametrize("capability", ["avx512", "avx2", "default"])
def test_cpp_on_older_processors(capability: str) -> None:
    """The variants for other instruction sets keep the promise too."""
    run_python(
        "import torch; from test_varlen_attention import *\n"
        "torch.manual_seed(3)\n"
        "for name in CASES:\n"
        "    for dtype in (torch.float32, torch.bfloat16): test_cpp_keeps_the_promise(name, dtype)\n",
        env={"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)},
        cwd=ROOT / "tests",
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_slices_of_a_fused_projection(backend: str) -> None:
    """q, k, v may be slices of one [tokens, 3, heads, D] tensor, or have any other strides."""
    lengths = [5, 70, 31]
    qkv = torch.randn(sum(lengths), 3, 4, 24)
    q, k, v = qkv.unbind(1)
    expected = ops.varlen_attention(*(x.contiguous() for x in (q, k, v)), offsets(lengths), backend=backend)
    assert torch.equal(ops.varlen_attention(q, k, v, offsets(lengths), backend=backend), expected)
    turned = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (q, k, v)]
    actual = ops.varlen_attention(*turned, offsets(lengths), backend=backend)
    assert torch.equal(actual, expected)
    assert actual.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_an_expanded_cotangent(backend: str) -> None:
    """`out.sum()` sends a gradient with zero strides."""
    q, k, v = (torch.randn(20, 2, 16, requires_grad=True) for _ in range(3))
    out = ops.varlen_attention(q, k, v, offsets([7, 13]), backend=backend)
    expanded = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    dense = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for a, b in zip(expanded, dense, strict=True):
        assert torch.equal(a, b)


@needs_cpp
@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_wanted_gradients(needed: tuple[bool, bool, bool]) -> None:
    """Each subset of gradients is the same as within the full set."""
    tensors = [torch.randn(75, 2, 32) for _ in range(3)]
    leaves = [x.clone().requires_grad_() for x in tensors]
    full = torch.autograd.grad(ops.varlen_attention(*leaves, offsets([5, 70]), backend="cpp").sum(), leaves)
    some = [x.clone().requires_grad_(flag) for x, flag in zip(tensors, needed, strict=True)]
    ops.varlen_attention(*some, offsets([5, 70]), backend="cpp").sum().backward()
    for leaf, expected, flag in zip(some, full, needed, strict=True):
        assert (leaf.grad is not None) == flag
        assert leaf.grad is None or torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values_stay_in_their_segment(backend: str, value: float) -> None:
    """Poison in one sample, in k or v, changes no bit of the others; causal attention sees it only from there on."""
    lengths = [9, 40, 64, 3]
    cu = offsets(lengths)
    for poisoned in (1, 2):
        tensors = [torch.randn(sum(lengths), 2, 24) for _ in range(3)]
        clean = ops.varlen_attention(*tensors, cu, causal=True, backend=backend)
        tensors[poisoned][20, 0, 3] = value
        out = ops.varlen_attention(*tensors, cu, causal=True, backend=backend)
        assert torch.equal(out[:20], clean[:20]) and torch.equal(out[49:], clean[49:])
        expected = reference.varlen_attention(*(x.double() for x in tensors), cu, causal=True)
        assert_same_nonfinite(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores(backend: str) -> None:
    """Scores of +-1e4 neither overflow nor lose the promise; a negative and a zero scale are scales as any other."""
    q, k, v = (torch.randn(70, 2, 64) * factor for factor in (1e3, 1e1, 1.0))
    for scale in (None, -0.5, 0.0):
        out = ops.varlen_attention(q, k, v, offsets([6, 64]), scale=scale, backend=backend)
        narrow = reference.varlen_attention(q, k, v, offsets([6, 64]), scale=scale)
        truth = reference.varlen_attention(q.double(), k.double(), v.double(), offsets([6, 64]), scale=scale)
        assert_within_promise(out, narrow, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [0, 3, 0]], ids=str)
def test_empty(backend: str, lengths: list[int]) -> None:
    """No segments, empty segments: right shapes, gradients of the right shapes, no NaN."""
    q, k, v = (torch.randn(sum(lengths), 2, 16, requires_grad=True) for _ in range(3))
    out = ops.varlen_attention(q, k, v, offsets(lengths), backend=backend)
    assert out.shape == q.shape
    for gradient in torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True):
        assert gradient is None or (gradient.shape == q.shape and bool(torch.isfinite(gradient).all()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_prompt_gives_zeros(backend: str) -> None:
    """A segment without keys gets zeros and sends zeros back."""
    q, k, v = torch.randn(9, 2, 16, requires_grad=True), torch.randn(4, 2, 16), torch.randn(4, 2, 16)
    out = ops.varlen_attention(q, k, v, offsets([3, 6]), offsets([0, 4]), backend=backend)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(out[:3], torch.zeros(3, 2, 16)) and torch.equal(gradient[:3], torch.zeros(3, 2, 16))
    assert bool(out[3:].abs().min() > 0)


@needs_cpp
def test_thousands_of_segments() -> None:
    """4096 segments of 0 to 40 tokens, more than threads and vector lanes, against the reference."""
    lengths = torch.randint(0, 41, (4096,)).tolist()
    q, k, v = (torch.randn(sum(lengths), 1, 8) for _ in range(3))
    out = ops.varlen_attention(q, k, v, offsets(lengths), backend="cpp")
    torch.testing.assert_close(out, reference.varlen_attention(q, k, v, offsets(lengths)), rtol=2e-5, atol=2e-6)


@needs_cpp
def test_threads_do_not_change_results() -> None:
    """One thread and all threads give the same bits, forward and backward."""
    lengths = [400, 7, 64, 90]
    q, k, v = (torch.randn(sum(lengths), 4, 32, requires_grad=True) for _ in range(3))
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, max(2, threads)):
            torch.set_num_threads(count)
            out = ops.varlen_attention(q, k, v, offsets(lengths), backend="cpp")
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_recompiling_for_new_lengths(backend: str) -> None:
    """fullgraph, forward and backward, dynamic totals and segment counts: one graph serves five packs."""
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, longest: int) -> torch.Tensor:
        return ops.varlen_attention(q * 2, k, v, cu, None, longest, backend=backend) + 1

    for compiler, packs in ((count, 5), ("aot_eager", 2)):
        compiled = torch.compile(attend, backend=compiler, fullgraph=True, dynamic=True)
        for i in range(packs):
            lengths = torch.randint(2, 30, (4 + i,)).tolist()
            q, k, v = (torch.randn(sum(lengths), 2, 16, requires_grad=True) for _ in range(3))
            arguments = (q, k, v, offsets(lengths), max(lengths))
            actual, expected = compiled(*arguments), attend(*arguments)
            torch.testing.assert_close(actual, expected)
            for a, b in zip(
                *(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (actual, expected)), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert graphs == 1


@needs_cpp
def test_bare_ops() -> None:
    """Schema, fake and tracing of forward and backward."""
    q, k, v = torch.randn(9, 4, 16), torch.randn(12, 2, 16), torch.randn(12, 2, 16)
    call = (offsets([4, 5]), offsets([9, 3]), 5, 9, False, 0.25)
    for suffix in ("", "_reference"):
        fwd = getattr(torch.ops.vidkernels, f"varlen_attention_fwd{suffix}").default
        opcheck(fwd, (q, k, v, *call))
        out, stats = fwd(q, k, v, *call)
        bwd = getattr(torch.ops.vidkernels, f"varlen_attention_bwd{suffix}").default
        for needed in ((True, True), (False, True), (True, False)):
            opcheck(bwd, (torch.randn_like(out), q, k, v, out, stats, *call, *needed))


def test_errors() -> None:
    """Each wrong argument is named."""
    q, k, v = (torch.randn(9, 4, 16) for _ in range(3))
    cu = offsets([4, 5])
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ShapeError, "q", (q[0], k, v, cu), {}),
        (ShapeError, "k", (q, k[:, :3], v[:, :3], cu), {}),
        (ShapeError, "k", (q, k[..., :8], v[..., :8], cu), {}),
        (ShapeError, "v", (q, k, v[:8], cu), {}),
        (ShapeError, "v", (q, k, v[:, :2], cu), {}),
        (DTypeError, "k", (q, k.double(), v, cu), {}),
        (DTypeError, "q", (q.long(), k, v, cu), {}),
        (DTypeError, "cu_seqlens_q", (q, k, v, cu.long()), {}),
        (DTypeError, "cu_seqlens_q", (q, k, v, [0, 4, 9]), {}),
        (ShapeError, "cu_seqlens_q", (q, k, v, offsets([4, 4])), {}),
        (ShapeError, "cu_seqlens_q", (q, k, v, offsets([4, 7, -2])), {}),
        (ShapeError, "cu_seqlens_q", (q, k, v, cu[:0]), {}),
        (ShapeError, "cu_seqlens_k", (q, k, v, cu, offsets([9])), {}),
        (ShapeError, "cu_seqlens_k", (q, k, v, cu, offsets([3, 3])), {}),
        (OptionError, "max_seqlen_q", (q, k, v, cu, None, 5.0), {}),
        (OptionError, "max_seqlen_q", (q, k, v, cu, None, -1), {}),
        (OptionError, "max_seqlen_q", (q, k, v, cu, None, 4), {}),
        (OptionError, "max_seqlen_k", (q, k, v, cu, None, None, 4), {}),
        (OptionError, "scale", (q, k, v, cu), {"scale": "1"}),
        (OptionError, "backend", (q, k, v, cu), {"backend": "fast"}),
    ]
    for error, argument, arguments, options in cases:
        with pytest.raises(error, match=f"^{argument}:"):
            ops.varlen_attention(*arguments, **options)


def test_explain_lists_every_engine() -> None:
    """Each engine is listed once, with a reason where it cannot run; an explicit choice raises that reason."""
    q = torch.randn(9, 4, 16)
    explanation = vidkernels.explain("varlen_attention", q, q, q, offsets([4, 5]))
    names = [choice.backend for choice in explanation.choices]
    assert sorted(names) == sorted({"cpp", "triton", "reference", "flash2", "flash3", "flash4", "torch"} | set(names))
    assert explanation.chosen == ("cpp" if _library.cpu_missing is None else "reference")
    with pytest.raises(BackendUnavailable, match="it runs on cuda tensors, got cpu"):
        ops.varlen_attention(q, q, q, offsets([4, 5]), backend="flash2")
