# SPDX-License-Identifier: Apache-2.0
"""Packing of images and videos: exact round trips, positions, plans, dropped tokens, text and losses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vidkernels import ops, packing
from vidkernels.errors import DeviceError, DTypeError, OptionError, ShapeError

GRIDS = [(1, 2, 3), (4, 1, 1), (3, 5, 2), (1, 1, 1), (2, 4, 4)]  # in patches


def latents(patch: tuple[int, int, int], channels: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    sizes = [tuple(n * p for n, p in zip(grid, patch, strict=True)) for grid in GRIDS]
    return [torch.randn(channels, *size).to(dtype) for size in sizes]


@pytest.mark.parametrize("order", ["channels_first", "channels_last"])
@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 1), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_round_trip_is_exact(order: str, patch: tuple[int, int, int], dtype: torch.dtype) -> None:
    """unpack(pack(x)) is x bit for bit, also from non-contiguous latents and single frames without a time axis."""
    samples = latents(patch, dtype=dtype)
    samples[1] = samples[1].transpose(2, 3).contiguous().transpose(2, 3)
    packed = packing.pack(samples, patch, order=order)
    for actual, expected in zip(packing.unpack(packed), samples, strict=True):
        assert torch.equal(actual, expected)
    if patch[0] == 1:
        image = packing.pack([samples[0][:, 0]], patch, order=order)
        assert torch.equal(packing.unpack(image)[0], samples[0])


def test_tokens_offsets_and_positions() -> None:
    """Tokens come in (t, h, w) order; positions count patches from 0 in each sample."""
    patch = (1, 2, 2)
    samples = latents(patch)
    packed = packing.pack(samples, patch)
    assert packed.lengths == tuple(math.prod(grid) for grid in GRIDS)
    assert packed.cu_seqlens.dtype == torch.int32 and packed.cu_seqlens.tolist() == [0, 6, 10, 40, 41, 73]
    assert packed.max_seqlen == 32 and isinstance(packed.max_seqlen, int)
    expected = [p for t, h, w in GRIDS for p in itertools.product(range(t), range(h), range(w))]
    assert packed.positions.dtype == torch.int32 and packed.positions.tolist() == [list(p) for p in expected]
    assert packed.segment_ids().tolist() == [i for i, n in enumerate(packed.lengths) for _ in range(n)]
    t, h, w = packed.positions[25].tolist()
    block = samples[2][:, t : t + 1, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
    assert torch.equal(packed.tokens[25], block.flatten())


def test_patch_embedding_is_a_linear_layer() -> None:
    """Tokens times the flattened weight of a patch convolution are that convolution's output, per sample."""
    convolution = torch.nn.Conv3d(3, 8, (1, 2, 2), (1, 2, 2)).double()
    samples = latents((1, 2, 2), dtype=torch.float64)
    packed = packing.pack(samples)
    embedded = F.linear(packed.tokens, convolution.weight.flatten(1), convolution.bias)
    for part, sample in zip(embedded.split(packed.lengths), samples, strict=True):
        torch.testing.assert_close(part, convolution(sample[None])[0].flatten(1).T)


def test_unpack_other_channels_and_order() -> None:
    """A model's output may have other channels, and DiT's order inside a token."""
    packed = packing.pack(latents((1, 2, 2)))
    output = torch.randn(73, 4 * 5)
    first, last = packing.unpack(packed, output), packing.unpack(packed, output, order="channels_last")
    assert [tuple(x.shape) for x in first] == [(5, t, 2 * h, 2 * w) for t, h, w in GRIDS]
    assert torch.equal(last[3].flatten(), output[40].view(4, 5).T.flatten())
    assert torch.equal(first[3].flatten(), output[40])


def test_gradients_flow_back() -> None:
    """Packing is differentiable, and unpacking is its inverse for gradients too."""
    samples = [x.requires_grad_() for x in latents((1, 2, 2))]
    loss = sum(x.square().sum() for x in packing.unpack(packing.pack(samples)))
    for gradient, sample in zip(torch.autograd.grad(loss, samples), samples, strict=True):
        assert torch.equal(gradient, 2 * sample)


def test_packed_attention_equals_attention_per_sample() -> None:
    """A pack through attention is every sample through attention, bit for bit on the reference."""
    packed = packing.pack(latents((1, 2, 2)))
    x = packed.tokens.view(-1, 2, 6)
    whole = ops.varlen_attention(x, x, x, packed.cu_seqlens, None, packed.max_seqlen, backend="reference")
    for part, rows in zip(whole.split(packed.lengths), x.split(packed.lengths), strict=True):
        alone = packing.pack_grids([(rows.shape[0], 1, 1)], rows)
        out = ops.varlen_attention(rows, rows, rows, alone.cu_seqlens, backend="reference")
        assert torch.equal(part, out)


@pytest.mark.parametrize("rate", [0.0, 0.5, [0.9, 0.0, 0.25, 0.5, 0.99]], ids=str)
def test_drop_and_restore(rate: float | list[float]) -> None:
    """The right number is kept per sample, in order, with its positions; restoring puts it back."""
    packed = packing.pack(latents((1, 2, 2)))
    rates = [rate] * 5 if isinstance(rate, float) else rate
    dropped = packing.drop_tokens(packed, rate)
    counts = [max(1, round((1 - r) * n)) for r, n in zip(rates, packed.lengths, strict=True)]
    assert list(dropped.lengths) == counts and dropped.max_seqlen == max(counts)
    assert dropped.cu_seqlens.tolist() == [0, *itertools.accumulate(counts)]
    assert dropped.kept is not None and bool((dropped.kept.diff() > 0).all())
    assert torch.equal(dropped.tokens, packed.tokens[dropped.kept])
    assert torch.equal(dropped.positions, packed.positions[dropped.kept])
    assert torch.equal(packed.segment_ids()[dropped.kept], dropped.segment_ids())
    restored = packing.restore_tokens(dropped, fill=torch.full((12,), 7.0))
    assert torch.equal(restored.tokens[dropped.kept], dropped.tokens) and restored.kept is None
    missing = torch.ones(73, dtype=torch.bool).index_fill(0, dropped.kept, False)
    assert bool((restored.tokens[missing] == 7).all())
    assert torch.equal(restored.positions, packed.positions) and torch.equal(restored.cu_seqlens, packed.cu_seqlens)
    with pytest.raises(OptionError, match="restore_tokens"):
        packing.unpack(dropped)


def test_drop_is_uniform_and_reproducible() -> None:
    """Every token of a sample is kept equally often; one seed gives one choice."""
    packed = packing.pack_grids([(1, 2, 5), (1, 1, 4)], torch.zeros(14, 1))
    generator = torch.Generator().manual_seed(1)
    kept = torch.zeros(14)
    for _ in range(400):
        choice = packing.drop_tokens(packed, 0.5, generator=generator).kept
        assert choice is not None
        kept[choice] += 1
    # binomial with p = 1/2 over 400 draws: 5 standard deviations are 50
    assert bool(((kept - 200).abs() < 50).all())
    a, b = (packing.drop_tokens(packed, 0.5, generator=torch.Generator().manual_seed(9)).kept for _ in range(2))
    assert a is not None and b is not None and torch.equal(a, b)


def test_text_round_trip() -> None:
    """Padded rows with lengths, with a mask, and lists give one packed text; empty prompts stay segments."""
    states, lengths = torch.randn(4, 6, 3), [2, 6, 0, 5]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    by_length = packing.pack_text(states, lengths)
    by_mask = packing.pack_text(states, mask=mask)
    by_list = packing.pack_text([row[:n] for row, n in zip(states, lengths, strict=True)])
    for text in (by_length, by_mask, by_list):
        assert torch.equal(text.tokens, states[mask])
        assert text.cu_seqlens.tolist() == [0, 2, 8, 8, 13] and text.max_seqlen == 6 and len(text) == 4
    assert torch.equal(packing.unpack_text(by_length), states * mask[..., None])
    assert packing.unpack_text(by_length, 9, fill=-1.0)[2].eq(-1).all()
    scattered = torch.tensor([[0, 1, 0, 1, 0, 0]] * 4)
    assert torch.equal(packing.pack_text(states, mask=scattered).tokens, states[:, [1, 3]].flatten(0, 1))
    assert packing.pack_text(states).lengths == (6, 6, 6, 6)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
def test_loss_reductions(shape: tuple[int, ...]) -> None:
    """Mean per sample, and both means of a pack, with gradients, against a loop."""
    lengths = [3, 1, 7]
    cu_seqlens = packing.pack_grids([(n, 1, 1) for n in lengths], torch.zeros(11)).cu_seqlens
    values = torch.randn(11, *shape, dtype=torch.float64, requires_grad=True)
    means = torch.stack([part.mean() for part in values.split(lengths)])
    torch.testing.assert_close(packing.per_sample_mean(values, cu_seqlens), means)
    by_sample, by_token = (packing.packed_mean(values, cu_seqlens, reduction) for reduction in ("sample", "token"))
    torch.testing.assert_close(by_sample, means.mean())
    torch.testing.assert_close(by_token, values.mean())
    for actual, expected in ((by_sample, means.mean()), (by_token, values.mean())):
        (a,) = torch.autograd.grad(actual, values, retain_graph=True)
        (b,) = torch.autograd.grad(expected, values, retain_graph=True)
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(packing.packed_mean(values, cu_seqlens, "token", denominator=44), by_token / 4)
    assert packing.per_sample_mean(values.float().bfloat16(), cu_seqlens).dtype == torch.float32
    empty = packing.per_sample_mean(torch.ones(2), torch.tensor([0, 0, 2], dtype=torch.int32))
    assert empty.tolist() == [0, 1]


@pytest.mark.parametrize("method", ["greedy", "balanced"])
def test_plans_keep_the_budget(method: str) -> None:
    """Every sample is in one pack, no pack exceeds the budget, and the number of packs is a multiple of the ranks."""
    lengths = torch.randint(1, 1000, (300,)).tolist()
    costs = packing.attention_costs(lengths, 1.0, 0.01)
    for ranks in (1, 8):
        packs = packing.pack_plan(costs, 15000.0, method=method, ranks=ranks)
        assert sorted(i for pack in packs for i in pack) == list(range(300))
        assert all(sum(costs[i] for i in pack) <= 15000.0 for pack in packs)
        assert len(packs) % ranks == 0
        assert len(packs) <= math.ceil(11 / 9 * math.ceil(sum(costs) / 15000) * 1.1) + ranks


def test_greedy_plan_is_first_fit_in_order() -> None:
    """By hand: each sample goes to the first pack with room."""
    assert packing.pack_plan([6, 5, 4, 5, 3, 7], 10) == [[0, 2], [1, 3], [4, 5]]
    assert packing.pack_plan([], 10) == []
    assert packing.pack_plan([3], 10, ranks=2) == [[0], []]


def test_balanced_plans_are_more_even() -> None:
    """The costliest pack of a balanced plan is no costlier than the greedy one's, and ranks differ by little."""
    costs = [float(c) for c in torch.randint(1, 400, (256,)).tolist()]
    greedy, even = (packing.pack_plan(costs, 1000, method=m, ranks=8) for m in ("greedy", "balanced"))
    totals = [[sum(costs[i] for i in pack) for pack in packs] for packs in (greedy, even)]
    assert max(totals[1]) <= max(totals[0]) and min(totals[1]) >= min(totals[0])
    assert max(totals[1]) - min(totals[1]) <= 0.1 * max(totals[1])
    bins = packing.balance(costs, 8)
    loads = [sum(costs[i] for i in b) for b in bins]
    assert sorted(i for b in bins for i in b) == list(range(256))
    assert max(loads) <= sum(costs) / 8 * 4 / 3 and max(loads) - min(loads) <= max(costs)


def test_transformer_costs_count_flops() -> None:
    """Against FlopCounterMode on one block's matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    width, length, text = 8, 24, 5
    with FlopCounterMode(display=False) as counter:
        x, y = torch.zeros(1, length, width), torch.zeros(1, text, width)
        for out in (width,) * 6 + (4 * width,):
            F.linear(x, torch.zeros(out, width))
        F.linear(torch.zeros(1, length, 4 * width), torch.zeros(width, 4 * width))
        for keys in (x, y):
            (x @ keys.transpose(1, 2)) @ keys
    (cost,) = packing.transformer_costs([length], width, text_lengths=[text])
    assert cost == counter.get_total_flops()


def test_errors() -> None:
    """Wrong sizes, mixtures and budgets are named."""
    good = torch.zeros(3, 1, 4, 4)
    cases: list[tuple[type[Exception], str, Any]] = [
        (ShapeError, r"latents\[1\]", lambda: packing.pack([good, torch.zeros(3, 1, 5, 4)])),
        (ShapeError, r"latents\[1\]", lambda: packing.pack([good, torch.zeros(4, 1, 4, 4)])),
        (ShapeError, r"latents\[0\]", lambda: packing.pack([good[None]])),
        (ShapeError, r"latents\[0\]", lambda: packing.pack([good[:, :0]])),
        (DTypeError, r"latents\[1\]", lambda: packing.pack([good, good.double()])),
        (ShapeError, "latents", lambda: packing.pack([])),
        (OptionError, "patch", lambda: packing.pack([good], (2, 2))),
        (OptionError, "order", lambda: packing.pack([good], order="cthw")),
        (ShapeError, "tokens", lambda: packing.unpack(packing.pack([good]), torch.zeros(4, 5))),
        (ShapeError, "tokens", lambda: packing.pack([good]).with_tokens(torch.zeros(3, 12))),
        (ShapeError, "tokens", lambda: packing.pack_grids([(1, 2, 2)], torch.zeros(5, 1))),
        (OptionError, "costs", lambda: packing.pack_plan([1, 11], 10)),
        (OptionError, "method", lambda: packing.pack_plan([1], 10, method="best")),
        (OptionError, "ranks", lambda: packing.balance([1], 0)),
        (OptionError, "rate", lambda: packing.drop_tokens(packing.pack([good]), 1.0)),
        (ShapeError, "lengths", lambda: packing.pack_text(torch.zeros(2, 3, 4), [3, 4])),
        (OptionError, "mask", lambda: packing.pack_text(torch.zeros(1, 3, 4), [3], mask=torch.ones(1, 3))),
        (OptionError, "reduction", lambda: packing.packed_mean(torch.zeros(1), torch.tensor([0, 1]), "mean")),
        (DTypeError, "latents", lambda: packing.pack(torch.zeros(2, 3, 4, 4))),
        (
            OptionError,
            "fill",
            lambda: packing.restore_tokens(packing.drop_tokens(packing.pack([good]), 0.5), None, 1e39),
        ),
        (OptionError, "fill", lambda: packing.unpack_text(packing.pack_text(torch.zeros(1, 3, 4).half()), 4, 70000.0)),
        (DeviceError, "mask", lambda: packing.pack_text(good[0].to("meta"), mask=torch.ones(1, 4, device="meta"))),
        (OptionError, "width", lambda: packing.transformer_costs([1], 10**400)),
        (OptionError, "order", lambda: packing.pack([good], order=torch.nested.nested_tensor([good]))),  # type: ignore[arg-type]
    ]
    for error, argument, call in cases:
        with pytest.raises(error, match=f"^{argument}:"):
            call()


def _mixture(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    packed = packing.pack([first, second])
    dropped = packing.drop_tokens(packed, 0.5)
    text = packing.pack_text([packed.tokens, dropped.tokens])
    loss = packing.packed_mean(dropped.tokens.square(), dropped.cu_seqlens)
    return [
        *packing.unpack(packed),
        packed.positions,
        packing.restore_tokens(dropped).tokens,
        packing.unpack_text(text),
        loss,
    ]


def test_one_graph_for_all_sizes() -> None:
    """Sizes that a graph leaves open: `fullgraph`, and no second graph for the third mixture."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(_mixture, fullgraph=True, dynamic=True, backend=counter)
    for t, h, w in ((2, 4, 6), (3, 10, 8), (4, 6, 12), (5, 12, 4)):
        samples = torch.randn(3, t, h, w), torch.randn(3, 1, w, 4)
        torch.manual_seed(0)
        found = compiled(*samples)
        torch.manual_seed(0)
        for actual, expected in zip(found, _mixture(*samples), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert counter.frame_count <= 2


def test_a_loss_is_a_scalar_whatever_its_denominator() -> None:
    """A count summed over ranks has often the shape [1]."""
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
    for reduction in ("sample", "token"):
        loss = packing.packed_mean(torch.ones(3), offsets, reduction, denominator=torch.tensor([4]))
        assert loss.shape == () and loss == packing.packed_mean(torch.ones(3), offsets, reduction, denominator=4)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    """Packing, dropping, losses and unpacking under torch's sync detector."""
    samples = [x.cuda() for x in latents((1, 2, 2))]
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = packing.pack(samples)
        dropped = packing.drop_tokens(packed, 0.5)
        restored = packing.restore_tokens(dropped)
        packing.unpack(restored)
        packing.packed_mean(packed.tokens, packed.cu_seqlens)
        text = packing.pack_text(torch.zeros(2, 5, 4, device="cuda"), [2, 0])
        packing.unpack_text(text)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("order", ["channels_first", "channels_last"])
def test_samples_without_tokens(order: str) -> None:
    """They keep none of none (a token of the next sample went with them) and come back with their sizes."""
    tokens = torch.arange(24.0).view(6, 4)
    pack = packing.pack_grids([(0, 2, 2), (1, 2, 1), (0, 0, 0), (2, 2, 1)], tokens, patch=(1, 2, 1), order=order)
    kept = packing.drop_tokens(pack, 0.5, generator=torch.Generator().manual_seed(0))
    assert kept.lengths == (0, 1, 0, 2) and kept.cu_seqlens.tolist() == [0, 0, 1, 1, 3]
    assert kept.kept is not None and kept.kept[0] < 2 <= kept.kept[1]
    restored = packing.restore_tokens(kept)
    assert torch.equal(restored.tokens[kept.kept], tokens[kept.kept]) and restored.lengths == pack.lengths
    shapes = [tuple(x.shape) for x in packing.unpack(pack)]
    assert shapes == [(2, 0, 4, 2), (2, 1, 4, 1), (2, 0, 0, 0), (2, 2, 4, 1)]
    none = packing.pack_grids([], torch.zeros(0, 4))
    assert packing.drop_tokens(none, 0.5).max_seqlen == 0 and packing.unpack(none) == []


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), (None, True), ("meta", False)])
def test_a_pack_that_comes_to_the_host_is_waited_for(
    device: str | None, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packing.pack([torch.randn(4, 2, 4, 4), torch.randn(4, 1, 8, 4)])
    original, asynchronous = torch.Tensor.to, []

    def to(self: torch.Tensor, *args: Any, non_blocking: bool = False) -> torch.Tensor:
        asynchronous.append(non_blocking)
        return original(self, *args)

    monkeypatch.setattr(torch.Tensor, "to", to)
    moved = packed.to(device, torch.bfloat16)
    assert asynchronous == [not waits] * 3
    assert moved.tokens.dtype == torch.bfloat16 and moved.positions.dtype == torch.int32


def test_packs_are_compared_as_objects() -> None:
    """A generated comparison asked tensors for one truth: `pack in packs` was an error."""
    packs = [packing.pack([torch.randn(2, 1, 4, 4)]) for _ in range(2)]
    texts = [packing.pack_text(torch.randn(1, 3, 4)) for _ in range(2)]
    for first, second in (packs, texts):
        assert first != second and first == first and second in (first, second) and len({first, second}) == 2
