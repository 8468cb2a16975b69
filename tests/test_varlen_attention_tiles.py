# SPDX-License-Identifier: Apache-2.0
"""Packed attention in bfloat16 by the tile registers of AMX: every shape of tile and block, masks, and what a row may
depend on."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from helpers import assert_gradients_within_promise, assert_same_nonfinite, assert_within_promise
from test_varlen_attention import offsets

from vidkernels import _library, ops
from vidkernels._conv import cpp
from vidkernels._reference import varlen_attention as reference

if "VIDKERNELS_HOST_KERNELS" in os.environ:  # tests/cuda_host builds one variant, which has emulated registers or none
    _TILES = bool(os.environ.get("VIDKERNELS_HOST_TILES"))
else:
    _TILES = _library.cpu_missing is None and cpp.multiplies_tiles(torch.bfloat16)
pytestmark = pytest.mark.skipif(not _TILES, reason="no AMX, or no kernels for it")
# name: lengths of q, lengths of k (None: self-attention), Hq, Hk, D, causal. Tiles have 16 queries, 16 keys and 32 channels;
# a block 32 queries and 384 keys; an item up to 1024 queries.
CASES: dict[str, tuple[list[int], list[int] | None, int, int, int, bool]] = {
    "one-token": ([1, 1], None, 1, 1, 64, False),
    "half-tiles": ([15, 16, 17, 31, 32, 33], None, 2, 2, 72, False),
    "two-blocks-of-keys": ([385, 3], None, 1, 1, 72, False),
    "three-items": ([1100], None, 1, 1, 16, False),
    "channels-1": ([20], None, 1, 1, 1, False),
    "channels-7": ([40, 5], None, 2, 2, 7, False),
    "channels-33": ([40, 70], None, 1, 1, 33, False),
    "channels-64": ([100, 70], None, 2, 2, 64, False),
    "channels-80": ([48, 70], None, 1, 1, 80, True),
    "channels-96": ([48, 70], None, 1, 1, 96, False),
    "channels-128": ([100, 70], None, 1, 1, 128, False),
    "channels-200": ([40, 300], None, 1, 1, 200, False),
    "causal": ([70, 1, 450, 33], None, 2, 2, 40, True),
    "grouped-causal": ([9, 300], None, 4, 2, 32, True),
    "cross": ([12, 70, 5, 0], [7, 0, 540, 3], 4, 2, 48, False),
    "causal-more-keys": ([5, 70, 64], [450, 71, 200], 2, 2, 80, True),
    "causal-fewer-keys": ([9, 330], [4, 66], 2, 1, 24, True),
}


def tensors_of(name: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    lengths_q, lengths_k, heads_q, heads_k, dim, causal = CASES[name]
    lengths_k = lengths_q if lengths_k is None else lengths_k
    shapes = ((sum(lengths_q), heads_q, dim), *[(sum(lengths_k), heads_k, dim)] * 2)
    call = {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k), "causal": causal}
    return [torch.randn(shape).bfloat16() for shape in shapes], call


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **call: Any) -> torch.Tensor:
    out = ops.varlen_attention(q, k, v, **call, backend="cpp")
    truth = reference.varlen_attention(q.double(), k.double(), v.double(), **call)
    assert_within_promise(out, reference.varlen_attention(q, k, v, **call), truth)
    return out


@pytest.mark.parametrize("name", CASES)
def test_promise(name: str) -> None:
    tensors, call = tensors_of(name)
    check(*tensors, **call)


@pytest.mark.parametrize("name", ["half-tiles", "two-blocks-of-keys", "causal", "cross", "causal-fewer-keys"])
def test_gradients(name: str) -> None:
    """The backward takes the forward's maxima and sums."""
    tensors, call = tensors_of(name)
    assert_gradients_within_promise(
        lambda *x: ops.varlen_attention(*x, **call, backend="cpp"),
        lambda *x: reference.varlen_attention(*x, **call),
        tensors,
        names=("q", "k", "v"),
    )


@pytest.mark.parametrize("name", ["half-tiles", "two-blocks-of-keys", "causal-fewer-keys"])
def test_stats(name: str) -> None:
    """Maximum and sum are those of float32: what is rounded to bfloat16 does not reach them."""
    (q, k, v), call = tensors_of(name)
    longest = max(q.shape[0], k.shape[0])
    rest = (call["cu_seqlens_q"], call["cu_seqlens_k"], longest, longest, call["causal"], 0.3)
    fwd = torch.ops.vidkernels.varlen_attention_fwd.default
    actual, exact = fwd(q, k, v, *rest)[1], fwd(q.double(), k.double(), v.double(), *rest)[1]
    # 64 or fewer terms of a score in float32, and the exponential's 2^-18; weights in bfloat16 would be off by 2^-9.
    torch.testing.assert_close(actual, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_strides(causal: bool) -> None:
    """Slices of one projection, other orders of axes, rows that overlap."""
    lengths = [5, 70, 31]
    q, k, v = torch.randn(sum(lengths), 3, 4, 40).bfloat16().unbind(1)
    call = {"cu_seqlens_q": offsets(lengths), "causal": causal}
    expected = check(*(x.contiguous() for x in (q, k, v)), **call)
    turned = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (q, k, v)]
    apart = [torch.randn(4, sum(lengths), 51).bfloat16().transpose(0, 1)[..., 11:].copy_(x) for x in (q, k, v)]
    for views in ((q, k, v), turned, apart):
        assert torch.equal(ops.varlen_attention(*views, **call, backend="cpp"), expected)
    shared = torch.randn(1, 4, 40).bfloat16().expand(sum(lengths), 4, 40)
    check(q, shared, v, **call)


def test_every_length() -> None:
    """Segments of 0 to 70 tokens."""
    lengths = list(range(71))
    q, k, v = (torch.randn(sum(lengths), 1, 24).bfloat16() for _ in range(3))
    for causal in (False, True):
        check(q, k, v, cu_seqlens_q=offsets(lengths), causal=causal)


def test_equal_values_stay() -> None:
    """The denominator is the sum of the weights that are multiplied: averages of one value are that value. Weights of
    0.50175 are rounded to 0.5; divided by the sum of those in float32, the average of ones would be 0.9968."""
    q, v = (torch.ones(40, 1, 1).bfloat16() for _ in range(2))
    k = -torch.ones(40, 1, 1).bfloat16()
    k[7] = 0
    out = ops.varlen_attention(q, k, v, offsets([40]), scale=-math.log(0.50175), backend="cpp")
    assert torch.equal(out, v)


def test_keys_without_weight() -> None:
    """Scores of -inf in a whole block of keys and beyond, and then finite ones."""
    q, k, v = (torch.randn(500, 1, 24).bfloat16() for _ in range(3))
    q[:, :, 0], k[:400, :, 0] = 1, float("-inf")
    check(q, k, v, cu_seqlens_q=offsets([500]))


@pytest.mark.parametrize("scale", [None, -0.5, 0.0, 1e-30, 3.0])
def test_scales(scale: float | None) -> None:
    """Scores of 1e5 too, and weights from 1 down to nothing."""
    for factor in (1.0, 1e3):
        q, k, v = (torch.randn(436, 1, 64).mul(f).bfloat16() for f in (factor, 10.0, 1.0))
        for causal in (False, True):
            check(q, k, v, cu_seqlens_q=offsets([6, 430]), causal=causal, scale=scale)


def test_rising_scores() -> None:
    """The maximum of a row changes with every block of keys, for other rows with none."""
    q = torch.ones(40, 1, 32)
    q[::2] = -1
    k = torch.linspace(-3, 3, 1000)[:, None, None].expand(1000, 1, 32)
    v = torch.randn(1000, 1, 32)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    check(q, k, v, cu_seqlens_q=offsets([40]), cu_seqlens_k=offsets([1000]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("length", [40, 450])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_not_finite(which: int, length: int, value: float) -> None:
    """It changes no bit of other segments and heads, nor, under a causal mask, of queries that do not see it."""
    lengths = [9, length, 3]
    tensors = [torch.randn(sum(lengths), 2, 24).bfloat16() for _ in range(3)]
    for causal in (False, True):
        call = {"cu_seqlens_q": offsets(lengths), "causal": causal}
        clean = ops.varlen_attention(*tensors, **call, backend="cpp")
        poisoned = [x.clone() for x in tensors]
        poisoned[which][9 + length // 2, 0, 3] = value
        out = ops.varlen_attention(*poisoned, **call, backend="cpp")
        reached = torch.zeros_like(out, dtype=torch.bool)
        first = 9 + (length // 2 if which == 0 or causal else 0)
        reached[first : first + 1 if which == 0 else 9 + length, 0] = True
        assert torch.equal(out[~reached], clean[~reached])
        truth = reference.varlen_attention(*(x.double() for x in poisoned), **call)
        assert_same_nonfinite(out, truth)


def test_infinities_of_both_signs() -> None:
    """Under a causal mask a column is infinite from the first infinity on, and NaN from the first of the other sign on."""
    q, k, v = (torch.randn(450, 1, 24).bfloat16() for _ in range(3))
    v[30, 0, 2], v[420, 0, 2], v[430, 0, 4] = float("inf"), float("-inf"), float("-inf")
    out = check(q, k, v, cu_seqlens_q=offsets([450]), causal=True)
    assert bool(torch.isposinf(out[30:420, 0, 2]).all()) and bool(torch.isnan(out[420:, 0, 2]).all())


def test_threads_and_blocks_do_not_change_results() -> None:
    """An item has up to 1024 queries where one thread works and fewer for more threads: the same bits."""
    lengths = [700, 7, 64, 90]
    q, k, v = (torch.randn(sum(lengths), 2, 40).bfloat16() for _ in range(3))
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(ops.varlen_attention(q, k, v, offsets(lengths), causal=True, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize("causal", [False, True])
def test_packs_equal_single_calls(causal: bool) -> None:
    lengths = [60, 0, 1, 400, 33, 16]
    q, k, v = (torch.randn(sum(lengths), 2, 72).bfloat16() for _ in range(3))
    out = ops.varlen_attention(q, k, v, offsets(lengths), causal=causal, backend="cpp")
    starts = offsets(lengths).tolist()
    for start, length in zip(starts, lengths, strict=False):
        rows = slice(start, start + length)
        alone = ops.varlen_attention(q[rows], k[rows], v[rows], offsets([length]), causal=causal, backend="cpp")
        assert torch.equal(out[rows], alone)


def test_chunks_of_queries_equal_the_whole() -> None:
    """A row depends on the keys it sees alone: under a causal mask a stream of chunks, each with the keys up to its end, is
    the whole. Not so a chunk that ends within 8 keys, which tiles do not take."""
    q, k, v = (torch.randn(450, 2, 72).bfloat16() for _ in range(3))
    whole = {c: ops.varlen_attention(q, k, v, offsets([450]), causal=c, backend="cpp") for c in (False, True)}
    for begin, end in ((0, 20), (20, 21), (21, 61), (61, 410), (410, 450)):
        chunk, seen = offsets([end - begin]), offsets([end])
        free = ops.varlen_attention(q[begin:end], k, v, chunk, offsets([450]), backend="cpp")
        masked = ops.varlen_attention(q[begin:end], k[:end], v[:end], chunk, seen, causal=True, backend="cpp")
        assert torch.equal(free, whole[False][begin:end]) and torch.equal(masked, whole[True][begin:end])
