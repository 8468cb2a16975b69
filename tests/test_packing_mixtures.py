# SPDX-License-Identifier: Apache-2.0
"""Random mixtures of images and videos: a pack through attention, losses and plans is every sample on its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vidkernels import _library, nn, ops, packing

needs_cpp = pytest.mark.skipif(_library.cpu_missing is not None, reason=str(_library.cpu_missing))
GRID = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
MIXTURE = st.lists(GRID, min_size=1, max_size=8)
quick = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def both_bitwise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], keys: list[int]) -> None:
    """Outputs and gradients of a pack and of one call per sample have the same bits."""
    starts = [F.pad(torch.tensor(n).cumsum(0), (1, 0)).int() for n in (lengths, keys)]
    whole = leaves(q, k, v)
    out = ops.varlen_attention(*whole, *starts)
    grad = torch.randn_like(out)
    packed = torch.autograd.grad(out, whole, grad)
    single = leaves(q, k, v)
    parts = []
    for rows, columns, values in zip(
        *(x.split(n) for x, n in zip(single, (lengths, keys, keys), strict=True)), strict=True
    ):
        ends = [torch.tensor([0, len(x)], dtype=torch.int32) for x in (rows, columns)]
        parts.append(ops.varlen_attention(rows, columns, values, *ends))
    assert torch.equal(out, torch.cat(parts))
    for a, b in zip(packed, torch.autograd.grad(torch.cat(parts), single, grad), strict=True):
        assert torch.equal(a, b)


@needs_cpp
@quick
@given(grids=MIXTURE, causal_seed=st.integers(0, 3))
def test_self_attention_of_any_mixture(grids: list[tuple[int, int, int]], causal_seed: int) -> None:
    torch.manual_seed(causal_seed)
    lengths = [t * h * w for t, h, w in grids]
    both_bitwise(*(torch.randn(sum(lengths), 2, 24) for _ in range(3)), lengths, lengths)


@needs_cpp
@quick
@given(grids=MIXTURE, data=st.data())
def test_cross_attention_with_empty_prompts(grids: list[tuple[int, int, int]], data: st.DataObject) -> None:
    """Prompts of 0 to 9 tokens; a sample with an empty one gets zeros and sends none back."""
    lengths = [t * h * w for t, h, w in grids]
    prompts = data.draw(st.lists(st.integers(0, 9), min_size=len(grids), max_size=len(grids)))
    q, k, v = torch.randn(sum(lengths), 2, 16), *(torch.randn(sum(prompts), 2, 16) for _ in range(2))
    both_bitwise(q, k, v, lengths, prompts)


@needs_cpp
@pytest.mark.parametrize("count", [1, 2, 255, 4096])
def test_from_one_to_thousands_of_segments(count: int) -> None:
    """One-token segments among them; the gradient of a sum of samples is that of the samples."""
    lengths = [1 + 7 * i % 5 * (i % 3 > 0) for i in range(count)]
    q, k, v = (torch.randn(sum(lengths), 1, 8) for _ in range(3))
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    mine = leaves(q, k, v)
    out = ops.varlen_attention(*mine, starts)
    loss = packing.packed_mean(out.square(), starts)
    # the same lengths as batches of scaled_dot_product_attention
    wide = leaves(*(x.double() for x in (q, k, v)))
    sizes, total = torch.tensor(lengths), torch.zeros((), dtype=torch.float64)
    for length in sizes.unique().tolist():
        rows = starts[:-1].long()[sizes == length][:, None] + torch.arange(length)
        mixed = F.scaled_dot_product_attention(*(x[rows].transpose(1, 2) for x in wide)).transpose(1, 2)
        torch.testing.assert_close(out[rows].double(), mixed, rtol=1e-5, atol=1e-6)
        total = total + mixed.square().mean((1, 2, 3)).sum()
    torch.testing.assert_close(loss.double(), total / count, rtol=1e-5, atol=1e-7)
    for a, b in zip(torch.autograd.grad(loss, mine), torch.autograd.grad(total / count, wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-7)


@quick
@given(grids=MIXTURE)
def test_module_on_a_pack_equals_the_module_on_its_samples(grids: list[tuple[int, int, int]]) -> None:
    """Latents to loss: pack, norm, rotation, attention, loss per sample; with gradients of latents and weights."""
    torch.manual_seed(len(grids))
    module = nn.PackedAttention(
        8, 2, head_dim=16, qk_norm="head", rotary=nn.RotaryConfig.cogvideox(16), dtype=torch.float64
    )
    samples = [torch.randn(2, t, 2 * h, 2 * w, dtype=torch.float64, requires_grad=True) for t, h, w in grids]
    wanted = [*samples, *module.parameters()]

    def loss(latents: list[torch.Tensor]) -> torch.Tensor:
        packed = packing.pack(latents, patch=(1, 2, 2))
        out = module(packed.tokens, packed.cu_seqlens, packed.max_seqlen, packed.positions)
        return packing.packed_mean(out.square(), packed.cu_seqlens)

    together = loss(samples)
    alone = torch.stack([loss([x]) for x in samples]).mean()
    torch.testing.assert_close(together, alone)
    for a, b in zip(*(torch.autograd.grad(x, wanted) for x in (together, alone)), strict=True):
        torch.testing.assert_close(a, b)


@quick
@given(lengths=st.lists(st.integers(1, 4096), min_size=1, max_size=60), ranks=st.integers(1, 8))
def test_plans_hold_every_sample_once_under_the_budget(lengths: list[int], ranks: int) -> None:
    """Greedy by tokens and balanced by FLOPs, a multiple of the ranks; a rank's packs differ by less than one sample."""
    for method, costs in (
        ("greedy", [float(n) for n in lengths]),
        ("balanced", packing.transformer_costs(lengths, 64)),
    ):
        budget = max(costs) * 2
        plan = packing.pack_plan(costs, budget, method=method, ranks=ranks)
        assert sorted(i for pack in plan for i in pack) == list(range(len(lengths)))
        assert len(plan) % ranks == 0 and all(sum(costs[i] for i in pack) <= budget for pack in plan)
    loads = [sum(costs[i] for i in pack) for pack in packing.balance(costs, ranks)]
    assert max(loads) - min(loads) <= max(costs) * (1 + 1e-12)
