# SPDX-License-Identifier: Apache-2.0
"""Sequence parallel attention over 4 and 2 processes equals one process, outputs and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vidkernels import distributed, ops
from vidkernels.distributed import sequence
from vidkernels.errors import DTypeError, OptionError, ShapeError

LENGTHS = [5, 1, 17, 8]  # 31 tokens: 4 ranks pad 1, 2 ranks pad 1
TEXT = [3, 0, 4, 2]


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def model(x: torch.Tensor, text: torch.Tensor, weight: torch.Tensor, group: object, causal: bool) -> torch.Tensor:
    """Self- and cross-attention with grouped heads on this group's slices, gathered again."""
    local = distributed.shard_sequence(x, group)
    n = local.shape[0]
    q, k, v = (local @ weight).unflatten(1, (16, 4)).split((8, 4, 4), dim=1)
    attended = distributed.ulysses_attention(q, k, v, offsets(LENGTHS), max(LENGTHS), group=group, causal=causal)
    keys = text.unflatten(1, (8, 4))
    spans = distributed.local_offsets(offsets(LENGTHS), n, group), distributed.local_text_offsets(offsets(TEXT))
    crossed = ops.varlen_attention(attended, keys, keys, *spans, n, max(TEXT))
    return distributed.gather_sequence(crossed.flatten(1), x.shape[0], group)


def single(x: torch.Tensor, text: torch.Tensor, weight: torch.Tensor, causal: bool) -> torch.Tensor:
    q, k, v = (x @ weight).unflatten(1, (16, 4)).split((8, 4, 4), dim=1)
    attended = ops.varlen_attention(q, k, v, offsets(LENGTHS), causal=causal)
    keys = text.unflatten(1, (8, 4))
    return ops.varlen_attention(attended, keys, keys, offsets(LENGTHS), offsets(TEXT)).flatten(1)


def compare(group: object) -> None:
    generator = torch.Generator().manual_seed(5)
    x, text, weight, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((31, 6), (9, 32), (6, 64), (31, 32))
    )
    for causal in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, text, weight)]
        expected = single(*leaves, causal)
        wanted = torch.autograd.grad(expected, leaves, grad)
        actual = model(*leaves, group, causal)
        found = list(torch.autograd.grad(actual, leaves, grad))
        process_group = group.get_group() if hasattr(group, "get_group") else group
        for gradient in found[1:]:  # parameters and replicated text: each rank has the share of its tokens
            dist.all_reduce(gradient, group=process_group)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def worker(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        compare(None)
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
        compare(mesh["sequence"])
        compare(mesh["data"].get_group())
        q = torch.zeros(4, 6, 4)
        with pytest.raises(OptionError, match=r"divides 6 query heads and 6 key heads: 1, 2, 3, 6, got 4"):
            distributed.ulysses_attention(q, q, q, offsets([16]))
        with pytest.raises(OptionError, match=r"divides 28 query heads and 28 key heads: 1, 2, 4, 7, 14, 28, got 8"):
            raise_for(28, 8)
        with pytest.raises(OptionError, match="one-dimensional"):
            distributed.shard_sequence(q, mesh)
        with pytest.raises(ShapeError, match="^k:"):
            distributed.ulysses_attention(q[:, :4], q[:3, :4], q[:, :4], offsets([16]))
        fits = torch.zeros(4, 4, 4)
        with pytest.raises(DTypeError, match="^v: expected .*torch.float32.*, got torch.float64"):
            distributed.ulysses_attention(fits, fits, fits.double(), offsets([16]))
        for total in (12, 17):  # slices of 3 and of 5 tokens
            with pytest.raises(
                ShapeError, match="^cu_seqlens: expected offsets of a sequence whose slices have 4 tokens"
            ):
                distributed.ulysses_attention(fits, fits, fits, offsets([total]))
        with pytest.raises(ShapeError, match="^total:"):
            distributed.gather_sequence(q, 17)
    finally:
        dist.destroy_process_group()


def raise_for(heads: int, ranks: int) -> None:
    """The error of a group of another size, without starting that many processes."""
    original = sequence.resolve
    sequence.resolve = lambda group: (None, ranks, 0)
    try:
        q = torch.zeros(4, heads, 4)
        distributed.ulysses_attention(q, q, q, offsets([4 * ranks]))
    finally:
        sequence.resolve = original


def test_four_and_two_processes_equal_one(tmp_path: Path) -> None:
    """The default group of four, a mesh axis of two and a process group of two; grouped heads, causal, padded tail."""
    torch.multiprocessing.spawn(worker, (4, str(tmp_path / "store")), nprocs=4)


def test_one_process_needs_no_group() -> None:
    """Without torch.distributed it is the plain op."""
    q = torch.randn(31, 4, 8)
    expected = ops.varlen_attention(q, q, q, offsets(LENGTHS))
    assert torch.equal(distributed.ulysses_attention(q, q, q, offsets(LENGTHS)), expected)
    assert distributed.shard_sequence(q) is q
    with pytest.raises(OptionError, match="init_process_group"):
        distributed.shard_sequence(q, object())


def test_allowed_degrees() -> None:
    """Divisors of both head counts."""
    assert distributed.allowed_degrees(48, 48) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
    assert distributed.allowed_degrees(32, 8) == (1, 2, 4, 8)


def test_what_is_no_sequence_is_refused_by_name() -> None:
    x, spans = torch.zeros(3, 2), offsets((3,))
    for call, argument in (
        (lambda bad: distributed.shard_sequence(bad), "x"),
        (lambda bad: distributed.gather_sequence(bad, 3), "x"),
        (lambda bad: distributed.gather_sequence(x, bad), "total"),
        (lambda bad: distributed.local_offsets(bad, 3), "cu_seqlens"),
        (lambda bad: distributed.local_offsets(spans, bad), "tokens"),
        (lambda bad: distributed.local_text_offsets(bad), "cu_seqlens"),
        (lambda bad: distributed.allowed_degrees(bad, 2), "heads_q"),
    ):
        for bad in (2.5, "x", None, -1, True, torch.zeros(3, 3)):
            if argument == "x" and isinstance(bad, torch.Tensor):
                continue
            with pytest.raises((DTypeError, OptionError, ShapeError), match=f"^{argument}: expected"):
                call(bad)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_offsets_of_a_slice_are_int32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever integers the offsets of the whole are: attention takes no others, and none wraps around."""
    monkeypatch.setattr(sequence, "resolve", lambda group: (group, 4, 1))  # the second of four ranks
    spans, text = distributed.local_offsets(offsets(LENGTHS).to(dtype), 8), offsets(TEXT).to(dtype)
    assert spans.dtype == torch.int32 and spans.tolist() == [0, 0, 0, 8, 8, 8]
    text = distributed.local_text_offsets(text)
    assert text.dtype == torch.int32 and text.tolist() == [0, 3, 3, 7, 9, 9]
    q, keys = torch.randn(8, 1, 4), torch.randn(9, 1, 4)
    assert ops.varlen_attention(q, keys, keys, spans, text, 8, max(TEXT)).shape == q.shape


def test_offsets_beyond_int32_have_parts_within() -> None:
    far = torch.tensor([0, 2**33])
    assert distributed.local_offsets(far, 7).tolist() == [0, 7, 7]
