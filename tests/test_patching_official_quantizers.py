# SPDX-License-Identifier: Apache-2.0
"""Rules for the quantizers of VidTok's, Cosmos's and Open-MAGVIT2's official code, which no package holds: here on modules of
the same interface over the references. That the official files have the rules' digests and equal results was tried by hand."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vidkernels
from vidkernels._reference import entropy as entropy_reference
from vidkernels._reference import fsq as fsq_reference
from vidkernels._reference import lfq as lfq_reference
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import _rule as table
from vidkernels.patching import digest
from vidkernels.patching.rules import official_quantizers as rules


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


LossBreakdown = namedtuple("LossBreakdown", ["per_sample_entropy", "codebook_entropy", "commitment", "avg_probs"])


class FSQRegularizer(nn.Module):
    """VidTok's attributes, return values and losses."""

    def __init__(self, levels: list[int], dim: int | None = None, num_codebooks: int = 1, **weights: float) -> None:
        super().__init__()
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.codebook_dim, self.num_codebooks = len(levels), num_codebooks
        self.keep_num_codebooks_dim = num_codebooks > 1
        channels = len(levels) * num_codebooks
        self.dim = channels if dim is None else dim
        self.has_projections = self.dim != channels
        self.project_in = nn.Linear(self.dim, channels) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(channels, self.dim) if self.has_projections else nn.Identity()
        self.entropy_loss_weight = weights.get("entropy", 0.0)
        self.commitment_loss_weight = weights.get("commitment", 0.0)
        self.diversity_gamma = 0.9
        self.register_buffer("implicit_codebook", torch.zeros(()), persistent=False)
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    def calculate_entropy_loss_weight(self, n_steps: int) -> float:
        return self.entropy_loss_weight * (1 + n_steps)

    def forward(self, z: torch.Tensor, inv_temperature: float = 100.0, n_steps: int = 0) -> Any:
        levels = self._levels.tolist()
        rows = self.project_in(z.movedim(1, -1) if z.ndim >= 4 else z)
        wide = rows.float()
        codes, indices = fsq_reference.fsq_quantize(wide, levels, num_codebooks=self.num_codebooks)
        loss = self.zero * 0
        if self.entropy_loss_weight or self.commitment_loss_weight:
            options = {"inv_temperature": inv_temperature, "log_floor": 1e-5}
            per_sample, batch = entropy_reference.fsq_entropy(wide, levels, **options)
            loss = (per_sample - self.diversity_gamma * batch) * self.calculate_entropy_loss_weight(n_steps)
            loss = loss + self.commitment_loss_weight * F.mse_loss(wide, codes.detach())
        out = self.project_out(codes.to(rows.dtype))
        return out.movedim(-1, 1) if z.ndim >= 4 else out, {"indices": indices, "aux_loss": loss}


class FSQuantizer(nn.Module):
    """Cosmos's attributes and return values."""

    def __init__(
        self, levels: list[int], dim: int | None = None, num_codebooks: int = 1, dtype: torch.dtype = torch.float32,
        keep: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.num_codebooks, self.keep_num_codebooks_dim = num_codebooks, keep or num_codebooks > 1
        self.codebook_size, self.dtype, channels = math.prod(levels), dtype, len(levels) * num_codebooks
        self.dim = channels if dim is None else dim
        self.has_projections = self.dim != channels
        self.project_in = nn.Linear(self.dim, channels) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(channels, self.dim) if self.has_projections else nn.Identity()

    def forward(self, z: torch.Tensor) -> Any:
        rows = self.project_in(z.movedim(1, -1) if z.ndim >= 4 else z)
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        codes, indices = fsq_reference.fsq_quantize(wide, self._levels.tolist(), num_codebooks=self.num_codebooks)
        indices = indices.unsqueeze(-1) if self.keep_num_codebooks_dim and self.num_codebooks == 1 else indices
        out = self.project_out(codes)
        if z.ndim < 4:
            return indices, out.to(self.dtype), torch.zeros_like(out[:, :1, :1, None])
        out = out.movedim(-1, 1)
        return indices, out.to(self.dtype), torch.zeros_like(out[:, :1, :1, :1])


class LFQ(nn.Module):
    """Open-MAGVIT2's attributes, return values and losses."""

    def __init__(self, bits: int, factorized_bits: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.codebook_dim, self.num_codebooks = bits, 1
        self.token_factorization, self.factorized_bits = factorized_bits is not None, factorized_bits
        self.sample_minimization_weight, self.batch_maximization_weight = 0.7, 1.0
        self.register_buffer("codebook", torch.zeros(1, bits), persistent=False)
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    def forward(self, x: Any, inv_temperature=100.0, return_loss_breakdown=False, mask=None, return_loss=True) -> Any:
        rows = x.movedim(1, -1)
        signs = torch.where(rows > 0, 1.0, -1.0).to(x.dtype)
        parts = rows.split(self.factorized_bits, -1) if self.token_factorization else (rows,)
        found = [lfq_reference.lfq_quantize(part, bit_order="lsb_first")[1].flatten() for part in parts]
        per_sample = batch = commitment = loss = self.zero
        if self.training and return_loss:
            options = {"log_floor": 1e-5, "log_floor_mode": "add"}
            per_sample, batch = entropy_reference.lfq_entropy(rows, **options)
            loss = self.sample_minimization_weight * per_sample - self.batch_maximization_weight * batch
        if self.training:
            squared = F.mse_loss(rows, signs, reduction="none").flatten(1, -2)
            commitment = (squared if mask is None else squared[mask]).mean()
        quantized = (rows + (signs - rows).detach()).movedim(-1, 1)
        result = (quantized, loss, tuple(found) if self.token_factorization else found[0])
        return (result, LossBreakdown(per_sample, batch, commitment, self.zero)) if return_loss_breakdown else result


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """The three rules, told the digests of the modules above."""
    before = list(table._USER)
    for rule, cls in zip(rules.RULES, (FSQRegularizer, FSQuantizer, LFQ), strict=True):
        digests = {f"{cls.__name__}.forward": (digest(cls.forward),)}
        vidkernels.register_rule(dataclasses.replace(rule, name=f"test.{rule.name}", digests=digests))
    yield
    table._USER[:] = before


FSQ_CASES = {
    "plain": {"levels": [8, 8, 8]},
    "losses": {"levels": [8, 5, 4], "entropy": 0.1, "commitment": 0.25},
    "projections, two codebooks": {"levels": [8, 5], "dim": 7, "num_codebooks": 2},
}


@pytest.mark.parametrize("shape", [(2, -1, 3, 4, 5), (2, 9, -1)], ids=["video", "tokens"])
@pytest.mark.parametrize("name", FSQ_CASES)
def test_vidtok_regularizer(name: str, shape: tuple[int, ...]) -> None:
    module = FSQRegularizer(**FSQ_CASES[name])
    original = copy.deepcopy(module)
    assert vidkernels.patch(module, verify=True).patched
    z = 2 * torch.randn([module.dim if size == -1 else size for size in shape])
    leaves = [z.clone().requires_grad_() for _ in range(2)]
    (codes, log), (right, expected) = module(leaves[0], n_steps=3), original(leaves[1], n_steps=3)
    assert torch.equal(log["indices"], expected["indices"]) and log["indices"].dtype == torch.int32
    torch.testing.assert_close(codes, right, rtol=0, atol=1e-6)
    torch.testing.assert_close(log["aux_loss"], expected["aux_loss"], rtol=1e-5, atol=1e-6)
    for y, loss in ((codes, log["aux_loss"]), (right, expected["aux_loss"])):
        (y.sin().sum() + loss).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-3, atol=1e-5)


COSMOS_CASES: dict[str, dict[str, Any]] = {
    "published": {"levels": [8, 8, 8, 5, 5, 5]},
    "bfloat16, thirds": {"levels": [7, 8, 5], "dtype": torch.bfloat16},
    "an axis of one codebook": {"levels": [8, 6, 5], "keep": True},
    "projections, two codebooks": {"levels": [8, 5], "dim": 7, "num_codebooks": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, -1, 3, 4, 5), (2, -1, 5, 6), (2, 9, -1)], ids=["video", "image", "tokens"])
@pytest.mark.parametrize("name", COSMOS_CASES)
def test_cosmos_quantizer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Indices, codes in the tokenizer's own dtype and a loss of zeros, bit for bit; gradients straight through."""
    module = FSQuantizer(**COSMOS_CASES[name])
    if module.has_projections and dtype != torch.float32:
        pytest.skip("upstream's projections take float32 alone")
    original = copy.deepcopy(module)
    assert vidkernels.patch(module, verify=True).patched
    z = (2 * torch.randn([module.dim if size == -1 else size for size in shape])).to(dtype)
    if not module.has_projections:
        z.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    leaves = [z.clone().requires_grad_() for _ in range(2)]
    results = module(leaves[0]), original(leaves[1])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        tolerance = {"atol": 1e-6, "rtol": 1e-5} if module.has_projections else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)
    for _, codes, _ in results:
        codes.float().sin().nansum().backward()
    finite = z.isfinite()
    tolerance = {"atol": 1e-5, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 2e-2}
    torch.testing.assert_close(leaves[0].grad[finite], leaves[1].grad[finite], **tolerance)
    assert not vidkernels.status(module).fallbacks


def test_cosmos_quantizer_calls_the_original() -> None:
    """For float64, whose codes upstream finds by other thresholds; and wrong inputs get upstream's own error."""
    module = FSQuantizer([8, 6, 5])
    vidkernels.patch(module)
    with pytest.warns(VidkernelsFallbackWarning, match="dtype torch.float64"):
        module(torch.randn(2, 3, 4, 4).double())
    with pytest.warns(VidkernelsFallbackWarning, match="4 channels, not 3"), pytest.raises(RuntimeError, match="sizes"):
        module(torch.randn(2, 4, 4, 4))
    assert "float32 can count" in vidkernels.explain(FSQuantizer([64] * 5)).details()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("halves", [None, (4, 5)], ids=["one index", "factorised"])
def test_open_magvit2_lfq(halves: tuple[int, int] | None, training: bool) -> None:
    module = LFQ(9, halves).train(training)
    original = copy.deepcopy(module)
    assert vidkernels.patch(module, verify=True).patched
    x, mask = torch.randn(2, 9, 4, 5), torch.rand(2, 20) > 0.3
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    results = [
        m(leaf, return_loss_breakdown=True, mask=mask) for m, leaf in zip((module, original), leaves, strict=True)
    ]
    ((codes, loss, found), parts), ((right, expected, places), terms) = results
    assert type(parts) is LossBreakdown
    for mine, theirs in zip(found, places, strict=True) if halves else [(found, places)]:
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    torch.testing.assert_close((codes, loss, *parts), (right, expected, *terms), rtol=1e-5, atol=1e-6)
    for (y, value, _), pieces in results:
        (y.sin().sum() + value + pieces.commitment).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-3, atol=1e-5)


def test_other_formula_in_a_helper_is_a_near_miss() -> None:
    """A rule also knows functions of the class's module: changed maths in one of them is not patched."""
    vidkernels.register_rule(
        dataclasses.replace(
            rules.RULES[2],
            name="test.open_magvit2.quantizer",
            digests={"LFQ.forward": (digest(LFQ.forward),), "doubled": ("0123456789abcdef",)},
        )
    )
    report = vidkernels.patch(LFQ(6), strict=False)
    assert not report.patched and "test_patching_official_quantizers.doubled has digest" in report.details()
