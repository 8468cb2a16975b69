# SPDX-License-Identifier: Apache-2.0
"""`nn.FSQ`, `nn.LFQ` and `nn.CodebookUsage`: drop-in for vector-quantize-pytorch, without its defects."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import vidkernels.nn as vknn
from vidkernels import errors, ops
from vidkernels.nn import codebook_usage

upstream = pytest.importorskip("vector_quantize_pytorch")


def same_state(ours: nn.Module, theirs: nn.Module) -> None:
    """Our module takes upstream's state dict as it is, and gives back the same keys."""
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def gradients(out: torch.Tensor, inputs: list[torch.Tensor], extra: torch.Tensor | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    loss = (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum()
    return list(torch.autograd.grad(loss if extra is None else loss + 3 * extra, inputs))


FSQ_CASES: dict[str, tuple[dict, tuple[int, ...]]] = {
    "series": ({"levels": [8, 5, 5, 5]}, (2, 33, 4)),
    "images": ({"levels": [8, 5, 5, 5]}, (2, 4, 5, 7)),
    "video": ({"levels": [8, 8, 8, 5, 5, 5]}, (2, 6, 3, 4, 5)),
    "series, channels first": ({"levels": [5, 3], "channel_first": True}, (2, 2, 33)),
    "tokens, channels first": ({"levels": [5, 3], "channel_first": True}, (9, 2)),
    "projections": ({"levels": [8, 5, 5], "dim": 11}, (2, 33, 11)),
    "projections of images without bias": ({"levels": [8, 5, 5], "dim": 11, "projection_has_bias": False}, (2, 11, 3, 5)),
    "two codebooks": ({"levels": [5, 3, 4], "num_codebooks": 2}, (2, 33, 6)),
    "two projected codebooks of video": ({"levels": [5, 3, 4], "num_codebooks": 2, "dim": 5}, (2, 5, 3, 2, 4)),
    "kept codebook axis": ({"levels": [5, 3, 4], "keep_num_codebooks_dim": True}, (2, 3, 5, 7)),
    "no indices": ({"levels": [5, 3, 4], "return_indices": False}, (2, 33, 3)),
    "symmetric": ({"levels": [2, 5, 8], "preserve_symmetry": True}, (2, 33, 3)),
    "noise": ({"levels": [5, 8], "preserve_symmetry": True, "noise_dropout": 0.5}, (2, 2, 33, 4)),
    "hard clamp": ({"levels": [5, 8], "bound_hard_clamp": True}, (2, 33, 2)),
    "rotation": ({"levels": [5, 5, 5], "orthogonal_rotation": True, "num_codebooks": 2}, (2, 33, 6)),
    "float32 only": ({"levels": [5, 8], "allowed_dtypes": (torch.float32,)}, (2, 33, 2)),
    "nothing forced": ({"levels": [5, 8], "force_quantization_f32": False}, (2, 33, 2)),
}  # fmt: skip


@pytest.mark.parametrize(("options", "shape"), FSQ_CASES.values(), ids=list(FSQ_CASES))
def test_fsq_equals_upstream(options: dict, shape: tuple[int, ...]) -> None:
    """Outputs, indices, dtypes, gradients, decoding and state, in training and evaluation."""
    theirs, ours = upstream.FSQ(**options), vknn.FSQ(**options)
    same_state(ours, theirs)
    exact = not (theirs.has_projections or theirs.orthogonal_rotation)
    dtypes = [torch.float32] if not exact else [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    for training in (True, False):
        for dtype in dtypes:
            z = (1.5 * torch.randn(shape)).to(dtype).requires_grad_()
            results = []
            for module in (theirs.train(training), ours.train(training)):
                torch.manual_seed(5)
                out, indices = module(z)
                results.append((out, indices, *gradients(out, [z, *module.parameters()])))
            (right, right_indices, *right_grads), (out, indices, *grads) = results
            assert out.shape == right.shape and out.dtype == right.dtype
            if options.get("return_indices", True):
                assert torch.equal(indices, right_indices) and indices.dtype == right_indices.dtype
                decoded, right_decoded = ours.indices_to_codes(indices), theirs.indices_to_codes(indices)
                torch.testing.assert_close(decoded, right_decoded, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)
                assert torch.equal(ours.indices_to_level_indices(indices), theirs.indices_to_level_indices(indices))
            else:
                assert indices is None and right_indices is None
            torch.testing.assert_close(out, right, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)
            quantized_in = torch.float32 if dtype not in theirs.allowed_dtypes else dtype
            rounding = 4 * max(torch.finfo(dtype).eps, torch.finfo(quantized_in).eps)
            for grad, right_grad in zip(grads, right_grads, strict=True):
                torch.testing.assert_close(grad, right_grad, rtol=rounding, atol=rounding * 4)


def test_fsq_attributes() -> None:
    theirs, ours = upstream.FSQ([8, 5, 3], dim=7, num_codebooks=2), vknn.FSQ([8, 5, 3], dim=7, num_codebooks=2)
    for name in ("dim", "codebook_dim", "codebook_size", "effective_codebook_dim", "num_codebooks", "has_projections",
                 "keep_num_codebooks_dim", "scale", "channel_first", "preserve_symmetry", "return_indices"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert torch.equal(ours.implicit_codebook, theirs.implicit_codebook)
    assert torch.equal(ours._levels, theirs._levels) and torch.equal(ours._basis.int(), theirs._basis)
    grid = ours.implicit_codebook
    assert torch.equal(ours.codes_to_indices(grid), theirs.codes_to_indices(grid))
    assert torch.equal(ours.quantize(grid * 0.9), theirs.quantize(grid * 0.9))


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("shape", [(1, 1024, 4), (1, 32, 32, 4)], ids=["series", "images"])
def test_fsq_decodes_what_it_encodes(shape: tuple[int, ...], channel_first: bool) -> None:
    """Upstream's own tests: quantized equals the codes of its indices, also behind projections."""
    options = {"dim": 16, "channel_first": True} if channel_first else {}
    quantizer = vknn.FSQ([8, 5, 5, 5], **options)
    if channel_first:
        shape = (1, 16, *shape[1:-1])
    elif len(shape) == 4:
        shape = (1, 4, 32, 32)
    features = torch.randn(shape)
    quantized, indices = quantizer(features)
    assert quantized.shape == features.shape
    assert torch.equal(quantized, quantizer.indices_to_codes(indices))
    assert vknn.FSQ([8, 5, 5, 5], return_indices=False, **options)(features)[1] is None


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rotation", [False, True])
def test_fsq_codes_and_indices_round_trip(symmetric: bool, rotation: bool) -> None:
    """Also with a rotation, where upstream 1.32 reads rotated codes as if they lay on the grid."""
    quantizer = vknn.FSQ([5, 5], preserve_symmetry=symmetric, orthogonal_rotation=rotation)
    every = torch.arange(25).reshape(1, -1)
    assert torch.equal(quantizer.codes_to_indices(quantizer.indices_to_codes(every)), every.int())
    quantized, indices = quantizer(torch.randn(2, 16, 2))
    assert torch.equal(quantizer.codes_to_indices(quantized), indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_input_to_float32_projections(dtype: torch.dtype) -> None:
    """Upstream raises a dtype error; here the projections run in their own dtype and the output has the input's."""
    for ours, theirs in (
        (vknn.FSQ([8, 5, 5], dim=9), upstream.FSQ([8, 5, 5], dim=9)),
        (vknn.LFQ(dim=9, codebook_size=2**5), upstream.LFQ(dim=9, codebook_size=2**5)),
    ):
        x = torch.randn(2, 7, 9, dtype=dtype)
        with pytest.raises(RuntimeError, match="dtype"):
            theirs(x)
        out, indices, *_ = ours(x)
        assert out.dtype == dtype and indices.shape == (2, 7)
        right = ours(x.float())[0]
        torch.testing.assert_close(out.float(), right, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_fsq_indices_beyond_float32() -> None:
    """4^14 = 2^28 codes: upstream adds the digits in float32 and misses the last ones."""
    z = torch.randn(1, 500, 14)
    quantizer = vknn.FSQ([4] * 14)
    quantized, indices = quantizer(z)
    assert torch.equal(quantizer.indices_to_codes(indices), quantized)


LFQ_CASES: dict[str, tuple[dict, tuple[int, ...]]] = {
    "series": ({"dim": 8}, (2, 33, 8)),
    "images": ({"codebook_size": 2**8}, (2, 8, 5, 7)),
    "video": ({"codebook_size": 2**7, "commitment_loss_weight": 0.25}, (2, 7, 3, 4, 5)),
    "channels first": ({"dim": 6, "channel_first": True}, (2, 6, 33)),
    "channels last images": ({"dim": 6, "channel_first": False, "has_projections": False}, (2, 33, 6)),
    "projections": ({"dim": 11, "codebook_size": 2**6}, (2, 33, 11)),
    "cosine projection": ({"dim": 11, "codebook_size": 2**6, "cosine_sim_project_in": True}, (2, 33, 11)),
    "two codebooks": ({"codebook_size": 2**5, "num_codebooks": 2, "commitment_loss_weight": 1.0}, (2, 33, 10)),
    "kept codebook axis": ({"dim": 6, "keep_num_codebooks_dim": True}, (2, 6, 5, 7)),
    "scaled": ({"dim": 6, "codebook_scale": 0.5, "diversity_gamma": 2.5}, (2, 33, 6)),
    "soft clamp": ({"dim": 6, "soft_clamp_input_value": 1.5}, (2, 33, 6)),
    "sphere": ({"dim": 9, "spherical": True, "commitment_loss_weight": 0.5}, (2, 33, 9)),
    "softplus": ({"dim": 6, "experimental_softplus_entropy_loss": True}, (2, 33, 6)),
    "activation": ({"dim": 6, "straight_through_activation": nn.Tanh()}, (2, 33, 6)),
    "rotation": ({"dim": 6, "orthogonal_rotation": True}, (2, 33, 6)),
    "fraction": ({"dim": 6, "frac_per_sample_entropy": 0.3}, (2, 33, 6)),
}


@pytest.mark.parametrize(("options", "shape"), LFQ_CASES.values(), ids=list(LFQ_CASES))
def test_lfq_equals_upstream(options: dict, shape: tuple[int, ...]) -> None:
    """With upstream's floor under the logarithms: outputs, indices, all losses, gradients, decoding and state."""
    theirs, ours = upstream.LFQ(**options), vknn.LFQ(**options, entropy_log_floor=1e-5)
    same_state(ours, theirs)
    exact = not (theirs.has_projections or theirs.orthogonal_rotation)
    for training in (True, False):
        for mask in (None, torch.tensor([True, False])):
            x = (0.2 * torch.randn(shape)).requires_grad_()
            results = []
            for module in (theirs.train(training), ours.train(training)):
                torch.manual_seed(5)
                result, losses = module(x, inv_temperature=10.0, return_loss_breakdown=True, mask=mask)
                grads = []
                if training:
                    grads = gradients(result.quantized, [x, *module.parameters()], result.entropy_aux_loss)
                results.append((result, losses, grads))
            (right, right_losses, right_grads), (result, losses, grads) = results
            assert result._fields == right._fields and losses._fields == right_losses._fields
            tolerance = {} if exact else {"rtol": 1e-5, "atol": 1e-6}
            if exact:
                tolerance = {"rtol": 0, "atol": 0} if not options.get("spherical") else {"rtol": 2e-7, "atol": 0}
            torch.testing.assert_close(result.quantized, right.quantized, **tolerance)
            assert torch.equal(result.indices, right.indices) and result.indices.dtype == right.indices.dtype
            # Upstream's float32 logits reach 100, so its terms carry about 1e-5.
            torch.testing.assert_close(result.entropy_aux_loss, right.entropy_aux_loss, rtol=3e-5, atol=1e-6)
            torch.testing.assert_close(tuple(losses), tuple(right_losses), rtol=3e-5, atol=1e-6)
            for grad, right_grad in zip(grads, right_grads, strict=True):
                torch.testing.assert_close(grad, right_grad, rtol=1e-4, atol=1e-5 * right_grad.abs().max().item())
            decoded, right_decoded = ours.indices_to_codes(result.indices), theirs.indices_to_codes(result.indices)
            torch.testing.assert_close(decoded, right_decoded, rtol=1e-6, atol=1e-6)
            assert torch.equal(ours.codebook, theirs.codebook) and ours.dtype == theirs.dtype


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_lfq_decodes_what_it_encodes(share: float) -> None:
    """Upstream's own test at 2^16 codes, without its table of 2048 x 65536."""
    quantizer = vknn.LFQ(codebook_size=65536, dim=16, frac_per_sample_entropy=share)
    (quantized, indices, aux), losses = quantizer(torch.randn(2, 16, 32, 32), return_loss_breakdown=True)
    assert torch.equal(quantized.round(), quantizer.indices_to_codes(indices)) and torch.isfinite(aux)
    torch.testing.assert_close(quantized, quantizer.indices_to_codes(indices), rtol=0, atol=1e-6)
    assert losses.batch_entropy <= 16 * math.log(2) + 1e-4


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False])], ids=["all", "half the batch"])
def test_lfq_sampled_entropy_is_unbiased(mask: torch.Tensor | None) -> None:
    """Upstream's own test: over draws, the mean of the sampled term agrees with the full one within its own spread."""
    features = torch.randn(2, 16, 32, 32)
    full = vknn.LFQ(codebook_size=65536, dim=16)(features, return_loss_breakdown=True, mask=mask)[1]
    sampled = vknn.LFQ(codebook_size=65536, dim=16, frac_per_sample_entropy=0.1)
    draws = torch.stack(
        [sampled(features, return_loss_breakdown=True, mask=mask)[1].per_sample_entropy.detach() for _ in range(10)]
    )
    assert abs(draws.mean() - full.per_sample_entropy) < 4 * draws.std() / math.sqrt(10)


def test_lfq_sample_of_few_tokens_keeps_one() -> None:
    """Upstream 1.32 keeps none of 2 tokens at a share of 0.2, and the loss is NaN."""
    x = torch.tensor([[[0.1, -0.2], [0.2, -0.1]]], requires_grad=True)
    loss = vknn.LFQ(dim=2, frac_per_sample_entropy=0.2, entropy_loss_weight=1.0)(
        x, inv_temperature=1.0
    ).entropy_aux_loss
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all() and x.grad.any()


def test_lfq_without_floor_still_pushes_at_large_codebooks() -> None:
    """At 2^18 codes a uniform assignment has p = 4e-6, under upstream's floor of 1e-5: there the batch term saturates at
    log 1e5 = 11.513 of 12.477 and its gradient vanishes; without a floor both are right."""
    x = (1e-3 * torch.randn(1, 16, 18)).requires_grad_()
    values, pushes = [], []
    for floor in (0.0, 1e-5):
        batch = ops.lfq_entropy(x, log_floor=floor)[1]
        values.append(batch.item())
        pushes.append(torch.autograd.grad(batch, x)[0].abs().max().item())
    assert 12.2 < values[0] < 12.477 and abs(values[1] - math.log(1e5)) < 0.1
    assert pushes[1] < 0.1 * pushes[0]


def test_lfq_huge_codebook_costs_nothing() -> None:
    """2^36 codes: no table is stored; indices beyond 32 bits survive, the loss comes from groups."""
    quantizer = vknn.LFQ(dim=36, entropy_estimator="groups", entropy_group_size=12)
    x = torch.randn(1, 50, 36)
    quantized, indices, aux = quantizer(x)
    assert indices.max() > 2**32 and torch.isfinite(aux)
    assert torch.equal(quantizer.indices_to_codes(indices) > 0, x > 0)


@pytest.mark.parametrize("training", [True, False])
def test_modules_compile_whole(training: bool) -> None:
    torch._dynamo.reset()
    for module, shape in ((vknn.FSQ([8, 5, 5], dim=9), (2, 9, 3, 4, 5)), (vknn.LFQ(dim=9), (2, 33, 9))):
        compiled = torch.compile(module.train(training), backend="aot_eager", fullgraph=True)
        x = torch.randn(shape, requires_grad=True)
        outs = [m(x) for m in (module, compiled)]
        for ours, right in zip(outs[1], outs[0], strict=True):
            torch.testing.assert_close(ours, right)
        if training:
            pair = [torch.autograd.grad(out[0].sum(), x)[0] for out in outs]
            torch.testing.assert_close(*pair)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vknn.FSQ([8, 2]), errors.OptionError, "symmetric"),
        (lambda: vknn.FSQ([8, 5], noise_dropout=0.1), errors.OptionError, "noise_dropout"),
        (lambda: vknn.FSQ([8, 5], num_codebooks=2, keep_num_codebooks_dim=False), errors.OptionError, "keep_num"),
        (lambda: vknn.FSQ([8, 5])(torch.zeros(3, 2)), errors.ShapeError, "at least 3 axes"),
        (lambda: vknn.FSQ([8, 5])(torch.zeros(1, 3, 4)), errors.ShapeError, "2 channels at axis 2"),
        (lambda: vknn.LFQ(), errors.OptionError, "codebook_size or dim"),
        (lambda: vknn.LFQ(codebook_size=12), errors.OptionError, "Use 16"),
        (lambda: vknn.LFQ(dim=4, frac_per_sample_entropy=0.0), errors.OptionError, "frac_per_sample_entropy"),
        (lambda: vknn.LFQ(dim=4, soft_clamp_input_value=0.5), errors.OptionError, "soft_clamp_input_value"),
        (lambda: vknn.LFQ(dim=4)(torch.zeros(1, 5, 3, 3)), errors.ShapeError, "4 channels at axis 1"),
        (lambda: vknn.CodebookUsage(0), errors.OptionError, "codebook_size"),
        (lambda: vknn.CodebookUsage(4)(torch.zeros(3)), errors.DTypeError, "indices"),
    ],
)  # fmt: skip
def test_wrong_arguments(call: Callable[[], object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("size", [1000, 2**40], ids=["dense", "sparse"])
def test_usage_over_batches_equals_all_at_once(size: int) -> None:
    """Counts, usage and perplexity of a stream against torch.unique over all of it."""
    usage = vknn.CodebookUsage(size)
    batches = [torch.randint(0, min(size, 700), (5, 7)) * (size // 1000) for _ in range(6)]
    batches[2][0, :3] = torch.tensor([-1, size, -(2**31)])
    for batch in batches:
        assert torch.equal(usage(batch), batch)
    every = torch.cat(batches).flatten()
    valid = every[(every >= 0) & (every < size)]
    counts = torch.unique(valid, return_counts=True)[1].double()
    p = counts / counts.sum()
    assert usage.total == len(valid) and usage.used == len(counts) and int(usage.outside) == 3
    assert usage.usage == len(counts) / size
    assert usage.perplexity == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-12)
    usage.reset()
    assert (usage.total, usage.used, usage.perplexity, int(usage.outside)) == (0, 0, 1.0, 0)


def test_usage_counts_int32_indices_and_keeps_no_state_dict() -> None:
    usage = vknn.CodebookUsage(10)
    usage.update(torch.tensor([1, 1, 2], dtype=torch.int32))
    assert usage.used == 2 and usage.state_dict() == {}


def _usage_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for size in (100, 2**40):
        usage = vknn.CodebookUsage(size)
        usage.update(torch.arange(rank, 60, 1 + rank) * (size // 100) - rank)
        usage.all_reduce()
        expected = torch.cat([torch.arange(0, 60) * (size // 100), torch.arange(1, 60, 2) * (size // 100) - 1])
        reference = vknn.CodebookUsage(size)
        reference.update(expected)
        assert (usage.total, usage.used, usage.entropy) == (reference.total, reference.used, reference.entropy)
    # LFQ under ranks: one loss everywhere, where upstream's differ.
    torch.manual_seed(0)
    x = torch.randn(2, 40, 8)
    losses = vknn.LFQ(dim=8)(x[rank : rank + 1], return_loss_breakdown=True)[1]
    right = ops.lfq_entropy(x)
    torch.testing.assert_close((losses.per_sample_entropy, losses.batch_entropy), right)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_usage_rank, (str(tmp_path),), nprocs=2)


def test_dense_limit_is_a_power_of_two() -> None:
    assert vknn.CodebookUsage(codebook_usage.DENSE_CODES).dense
    assert not vknn.CodebookUsage(codebook_usage.DENSE_CODES + 1).dense
