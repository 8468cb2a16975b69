# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of packed attention: every mask and head-dimension branch through the interpreter, and on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_gradients_within_promise, assert_within_promise
from test_varlen_attention import CASES as LONG_CASES
from test_varlen_attention import make as make_long
from test_varlen_attention import offsets

import vidkernels
from vidkernels import ops
from vidkernels._reference import varlen_attention as reference
from vidkernels.errors import BackendUnavailable

pytest.importorskip("triton")
# name: lengths of q, lengths of k, Hq, Hk, D, causal, scale; tiles are 16 x 16, so 17 and 33 end in masked tiles
CASES = {
    "one-piece": ([17, 1, 33, 16], None, 2, 2, 16, False, None),
    "two-pieces-72": ([5, 33], None, 1, 1, 72, False, None),
    "second-piece-masked-40": ([20, 31], None, 1, 1, 40, False, None),
    "whole-masked-20": ([18, 2], None, 2, 2, 20, False, None),
    "tiny-head": ([7, 18], None, 1, 1, 3, False, None),
    "split-channels-128": ([5, 18], None, 1, 1, 128, False, None),
    "causal": ([17, 1, 40], None, 2, 2, 24, True, None),
    "grouped": ([9, 20], None, 4, 2, 16, True, None),
    "cross-empty": ([12, 0, 20], [0, 5, 37], 2, 1, 16, False, None),
    "cross-causal": ([5, 33, 20], [20, 34, 3], 1, 1, 32, True, None),
    "negative-scale": ([20], None, 1, 1, 16, True, -0.3),
    "zero-scale": ([20], None, 1, 1, 16, True, 0.0),
}


def build(name: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, Any]]:
    lengths_q, lengths_k, heads_q, heads_k, dim, causal, scale = CASES[name]
    lengths_k = lengths_q if lengths_k is None else lengths_k
    sizes = ((sum(lengths_q), heads_q), (sum(lengths_k), heads_k), (sum(lengths_k), heads_k))
    call = {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k), "causal": causal, "scale": scale}
    return [torch.randn(*size, dim).to(dtype) for size in sizes], call


class _Small(torch.autograd.Function):
    """The launchers with tiles of 16 x 16, so that short segments have several."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: tuple[Any, ...]) -> torch.Tensor:
        from vidkernels.triton._attention_configs import AttentionConfig
        from vidkernels.triton.varlen_attention import varlen_attention_fwd

        ctx.config = AttentionConfig(16, 16, 4, 1)
        out, stats = varlen_attention_fwd(q, k, v, *call, config=ctx.config)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        from vidkernels.triton.varlen_attention_bwd import varlen_attention_bwd

        configs = {"config_q": ctx.config, "config_kv": ctx.config}
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        return (*varlen_attention_bwd(grad_out, *ctx.saved_tensors, *ctx.call, *needs, **configs), None)


def small(call: dict[str, Any]) -> Callable[..., torch.Tensor]:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5 if call["scale"] is None else call["scale"]
        arguments = (call["cu_seqlens_q"], call["cu_seqlens_k"], q.shape[0], k.shape[0], call["causal"], scale)
        return _Small.apply(q, k, v, arguments)

    return run


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_the_promise(name: str) -> None:
    """Forward and gradients in float32 against float64."""
    tensors, call = build(name, torch.float32)
    oracle = lambda *x: reference.varlen_attention(*x, **call)  # noqa: E731
    assert_gradients_within_promise(small(call), oracle, tensors, names=("q", "k", "v"))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("name", ["two-pieces-72", "grouped", "cross-empty"])
def test_kernels_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """The paths that differ from float32: rounding of weights and of outputs, and delta from the output."""
    tensors, call = build(name, dtype)
    oracle = lambda *x: reference.varlen_attention(*x, **call)  # noqa: E731
    assert_gradients_within_promise(small(call), oracle, tensors, names=("q", "k", "v"))


@pytest.mark.interpreter
def test_public_op_with_its_own_configs() -> None:
    """Through `ops`, strided slices of one projection, and gradients for k and v alone."""
    lengths = [30, 3]
    qkv = torch.randn(33, 3, 2, 24)
    q, k, v = qkv.unbind(1)
    out = ops.varlen_attention(q, k, v, offsets(lengths), backend="triton")
    truth = reference.varlen_attention(q.double(), k.double(), v.double(), offsets(lengths))
    assert_within_promise(out, reference.varlen_attention(q, k, v, offsets(lengths)), truth)
    leaves = [x.contiguous().requires_grad_(i > 0) for i, x in enumerate((q, k, v))]
    grads = [
        torch.autograd.grad(ops.varlen_attention(*leaves, offsets(lengths), backend=b).square().sum(), leaves[1:])
        for b in ("triton", "reference")
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.interpreter
def test_nonfinite_values_stay_in_their_segment() -> None:
    """A NaN and an infinity in v change no bit of the other segments, though loads of tiles reach beyond a segment."""
    lengths = [9, 20, 18]
    q, k, v = (torch.randn(47, 1, 16) for _ in range(3))
    call = {"cu_seqlens_q": offsets(lengths), "cu_seqlens_k": offsets(lengths), "causal": False, "scale": None}
    clean = small(call)(q, k, v)
    v[12], v[20] = float("nan"), float("inf")
    out = small(call)(q, k, v)
    assert torch.equal(out[:9], clean[:9]) and torch.equal(out[29:], clean[29:])
    assert bool(torch.isnan(out[9:29]).all())


# lengths, heads, D, causal, scale
SHORT_CASES = {
    "one-piece": ([17, 1, 32, 16], 2, 16, False, None),
    "two-pieces-72": ([5, 31], 1, 72, False, None),
    "second-piece-masked-40": ([20, 31, 0], 1, 40, False, None),
    "tiny-head": ([7, 18], 1, 3, False, None),
    "causal": ([17, 1, 0, 14], 2, 24, True, None),
    "whole-piece-64": ([32, 1, 31], 1, 64, True, None),
    "head-dim-128": ([16, 2, 9], 1, 128, True, None),
    "heads-5": ([3, 9, 7], 5, 80, False, None),
    "negative-scale": ([20], 1, 16, True, -0.3),
    "zero-scale": ([20], 1, 16, True, 0.0),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", SHORT_CASES)
def test_short_segments_share_tiles(name: str) -> None:
    """The kernel of short segments serves the plain op, forward and gradients; float32 and bfloat16."""
    lengths, heads, dim, causal, scale = SHORT_CASES[name]
    call = {"cu_seqlens_q": offsets(lengths), "causal": causal, "scale": scale}
    for dtype in (torch.float32, torch.bfloat16):
        assert_gradients_within_promise(
            lambda *x: ops.varlen_attention(*x, **call, backend="triton-short"),
            lambda *x: reference.varlen_attention(*x, **call),
            [torch.randn(sum(lengths), heads, dim).to(dtype) for _ in range(3)],
            names=("q", "k", "v"),
        )


@pytest.mark.interpreter
def test_short_segments_are_refused_with_a_reason() -> None:
    """Cross-attention, grouped heads, segments longer than a tile and wide heads say so."""
    cu = offsets([20, 13])
    refusals = (
        (torch.zeros(33, 2, 16), torch.zeros(33, 2, 16), cu.clone(), "offsets of their own"),
        (torch.zeros(33, 2, 16), torch.zeros(33, 1, 16), None, "2 heads and k 1"),
        (torch.zeros(33, 1, 160), torch.zeros(33, 1, 160), None, "exceeds 128"),
    )
    for q, k, cu_k, reason in refusals:
        with pytest.raises(BackendUnavailable, match=reason):
            ops.varlen_attention(q, k, k, cu, cu_k, backend="triton-short")
    x = torch.zeros(34, 1, 16)
    with pytest.raises(BackendUnavailable, match="segments of 33 tokens exceed 32, half of a tile"):
        ops.varlen_attention(x, x, x, offsets([33, 1]), backend="triton-short")


@pytest.mark.parametrize("longest", [1, 16, 32])
def test_short_tiles_hold_whole_segments(longest: int) -> None:
    """Every segment lies in exactly one tile and fits it; at 16 frames that is at least 3 times fewer executed scores
    than tiles of one segment each, and 12 times fewer than the 128-row tiles of other engines."""
    from vidkernels.triton._attention import tile_count
    from vidkernels.triton.short_attention import grid_of, short_config

    config = short_config("fwd", 72, 16, "sm_90", packed=True)
    for _ in range(20):
        lengths = torch.randint(0, longest + 1, (200,)).tolist()
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        (tiles, groups), step = grid_of(torch.empty(starts[-1], 16, 72, device="meta"), 200, 0, longest, config)
        assert groups * config.heads == 16
        owned = [[i for i in range(200) if t * step <= starts[i] < (t + 1) * step] for t in range(tiles)]
        assert [i for tile in owned for i in tile if lengths[i]] == [i for i in range(200) if lengths[i]]
        assert all(sum(lengths[i] for i in tile) <= config.block for tile in owned)
    for segments in (64, 1024):
        q = torch.empty(1, 16, segments, 16, 72, device="meta")
        axial = grid_of(q, segments, 16, 16, config)[0][0] * config.block**2
        packed = grid_of(q[0].flatten(0, 1), segments, 0, 16, config)[0][0] * config.block**2
        assert axial == 4 * segments * 16**2  # a tile of four segments computes four times the scores that it needs
        assert packed * 3 <= tile_count(16 * segments, segments, 64) * 64**2
        assert packed * 12 <= segments * 128**2


def test_tiles_cover_every_segment_once() -> None:
    """The launch grid holds all tiles and less than one empty program per segment: no padding is computed."""
    from vidkernels.triton._attention import tile_count

    for block in (16, 128):
        for _ in range(20):
            lengths = torch.randint(0, 300, (int(torch.randint(1, 40, ())),)).tolist()
            starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
            found = []
            for program in range(tile_count(starts[-1], len(lengths), block)):
                segment = max(i for i in range(len(lengths)) if starts[i] // block + i <= program)
                tile = program - (starts[segment] // block + segment)
                if tile * block < lengths[segment]:
                    found.append((segment, tile))
            assert found == [(i, t) for i, n in enumerate(lengths) for t in range(-(-n // block))]
            assert tile_count(starts[-1], len(lengths), block) - len(found) <= len(lengths)


def test_head_pieces() -> None:
    """Channels are covered by powers of two of at least 16, with the least sum."""
    from vidkernels.triton._attention import head_pieces

    expected = {3: (16, 0), 16: (16, 0), 24: (32, 0), 32: (32, 0), 40: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16),
                96: (64, 32), 112: (128, 0), 128: (128, 0), 160: (128, 32), 192: (128, 64), 256: (256, 0)}  # fmt: skip
    for head_dim, pieces in expected.items():
        assert head_pieces(head_dim) == pieces
    for head_dim in range(1, 257):
        first, second = head_pieces(head_dim)
        assert head_dim <= first + second <= max(16, 2 ** (head_dim - 1).bit_length())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", LONG_CASES)
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_on_a_device(name: str, dtype: torch.dtype, backend: str) -> None:
    """The compiled kernels, and whatever is chosen automatically, keep the promise."""
    tensors, call = make_long(name, dtype)
    tensors = [x.cuda() for x in tensors]
    call = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in call.items()}
    assert_gradients_within_promise(
        lambda *x: ops.varlen_attention(*x, **call, backend=backend),
        lambda *x: reference.varlen_attention(*x, **call),
        tensors,
        names=("q", "k", "v"),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash4", "flash3", "flash2", "cudnn", "torch"])
@pytest.mark.parametrize("name", ["mixture", "head-dim-72", "grouped-heads", "cross-causal-long-keys"])
def test_engines_on_a_device(name: str, backend: str) -> None:
    """Each installed engine keeps the promise of bf16 against the eager formula in bf16."""
    tensors, call = make_long(name, torch.bfloat16)
    tensors = [x.cuda() for x in tensors]
    call = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in call.items()}
    explanation = vidkernels.explain("varlen_attention", *tensors, **call)
    reason = next((c.reason for c in explanation.choices if c.backend == backend), "unknown")
    if reason is not None:
        pytest.skip(reason)
    assert_gradients_within_promise(
        lambda *x: ops.varlen_attention(*x, **call, backend=backend),
        lambda *x: reference.varlen_attention(*x, **call),
        tensors,
        names=("q", "k", "v"),
    )


@pytest.mark.gpu
def test_gradients_are_equal_in_every_run() -> None:
    """No atomics: ten backward passes give the same bits."""
    lengths = [700, 64, 3, 1500]
    tensors = [torch.randn(sum(lengths), 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
    grad = torch.randn_like(tensors[0])

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(
            ops.varlen_attention(*tensors, offsets(lengths).cuda(), backend="triton"), tensors, grad
        )

    first = run()
    for _ in range(10):
        for a, b in zip(first, run(), strict=True):
            assert torch.equal(a, b)
