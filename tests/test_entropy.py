# SPDX-License-Identifier: Apache-2.0
"""Entropy losses: the product form against the written-out softmax, other implementations, ranks, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import assert_within_promise, opcheck, run_python

import vidkernels
from vidkernels import errors, ops
from vidkernels._reference import entropy as reference

Entropy = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def value_and_gradient(function: Entropy, x: torch.Tensor, **options: object) -> list[torch.Tensor]:
    """Both terms, and the gradient of a combination in which neither can hide."""
    x = x.detach().clone().requires_grad_()
    per_sample, batch = function(x, **options)
    (gradient,) = torch.autograd.grad(1.3 * per_sample - 0.7 * batch, x)
    return [per_sample.detach(), batch.detach(), gradient]


LFQ_CASES = {
    "exact": {},
    "odd number of bits on the sphere": {"spherical": True},
    "two codebooks in groups": {"num_codebooks": 2, "estimator": "groups", "group_size": 2},
    "groups that do not divide": {"estimator": "groups", "group_size": 4},
    "bits": {"estimator": "bits"},
    "scaled": {"scale": 0.3},
    "clamped": {"log_floor": 1e-5},
    "shifted": {"log_floor": 1e-5, "log_floor_mode": "add"},
    "clamped groups": {"log_floor": 1e-3, "estimator": "groups", "group_size": 5},
}
FSQ_CASES = {
    "exact": {},
    "symmetric": {"bound": "symmetric"},
    "groups": {"estimator": "groups", "group_size": 2},
    "bits": {"estimator": "bits"},
    "clamped": {"log_floor": 1e-5},
}


@pytest.mark.parametrize("inv_temperature", [1.0, 100.0])
@pytest.mark.parametrize("options", LFQ_CASES.values(), ids=list(LFQ_CASES))
def test_lfq_equals_the_softmax_over_all_codes(options: dict, inv_temperature: float, device: torch.device) -> None:
    """To rounding in float64, within the promise in float32."""
    x = torch.randn(2, 23, 10, dtype=torch.float64, device=device)
    options = {**options, "inv_temperature": inv_temperature}
    truth = value_and_gradient(reference.lfq_entropy, x, **options)
    for ours, right in zip(value_and_gradient(ops.lfq_entropy, x, **options), truth, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)
    # One number's error can be next to nothing by chance, the reference's too (6 % of draws): eight draws are one vector.
    narrow = [torch.randn(2, 23, 10, device=device) for _ in range(8)]
    truth = [value_and_gradient(reference.lfq_entropy, x.double(), **options) for x in narrow]
    same = [value_and_gradient(reference.lfq_entropy, x, **options) for x in narrow]
    ours = [value_and_gradient(ops.lfq_entropy, x, **options) for x in narrow]
    for part in range(3):
        assert_within_promise(*(torch.stack([draw[part] for draw in draws]) for draws in (ours, same, truth)))


@pytest.mark.parametrize("inv_temperature", [1.0, 100.0])
@pytest.mark.parametrize("options", FSQ_CASES.values(), ids=list(FSQ_CASES))
def test_fsq_equals_the_softmax_over_all_codes(options: dict, inv_temperature: float, device: torch.device) -> None:
    """The same over level grids of different sizes, with the channels at axis 1."""
    z = torch.randn(2, 4, 3, 7, dtype=torch.float64, device=device)
    options = {**options, "levels": [8, 5, 3, 4], "dim": 1, "inv_temperature": inv_temperature}
    truth = value_and_gradient(reference.fsq_entropy, z, **options)
    for ours, right in zip(value_and_gradient(ops.fsq_entropy, z, **options), truth, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"estimator": "groups", "group_size": 2}, {"log_floor": 1e-3}, {"spherical": True}):
        assert torch.autograd.gradcheck(lambda x, o=options: ops.lfq_entropy(x, inv_temperature=0.7, **o), x)
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: ops.fsq_entropy(z, [4, 3, 5], inv_temperature=0.7), z)


def test_many_chunks_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on how tokens are cut into chunks, the last one partial."""
    x = torch.randn(301, 9, dtype=torch.float64)
    whole = [value_and_gradient(ops.lfq_entropy, x, log_floor=floor) for floor in (0.0, 1e-4)]
    monkeypatch.setattr("vidkernels.ops._entropy_sums.CHUNK_ELEMENTS", 2000)
    for floor, expected in zip((0.0, 1e-4), whole, strict=True):
        for ours, right in zip(value_and_gradient(ops.lfq_entropy, x, log_floor=floor), expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("spherical", [False, True], ids=["cube", "sphere"])
@pytest.mark.parametrize("inv_temperature", [1.0, 100.0])
def test_clamp_reproduces_vector_quantize_pytorch(spherical: bool, inv_temperature: float) -> None:
    """Both terms and the gradient: no worse against float64 than upstream's own, and equal to upstream up to what its
    float32 logits carry (several hundred, hence 3e-5 in an exponent)."""
    upstream = pytest.importorskip("vector_quantize_pytorch").LFQ
    module = upstream(codebook_size=2**10, num_codebooks=2, spherical=spherical, entropy_loss_weight=1.0).train()
    x = 0.3 * torch.randn(3, 77, 20)
    mask = torch.tensor([True, False, True])

    def theirs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        breakdown = module(x, inv_temperature=inv_temperature, mask=mask, return_loss_breakdown=True)[1]
        return breakdown.per_sample_entropy, breakdown.batch_entropy

    options = dict(num_codebooks=2, spherical=spherical, inv_temperature=inv_temperature, mask=mask, log_floor=1e-5)
    ours, expected = value_and_gradient(ops.lfq_entropy, x, **options), value_and_gradient(theirs, x)
    truth = value_and_gradient(reference.lfq_entropy, x.double(), **options)
    for actual, same, exact in zip(ours, expected, truth, strict=True):
        assert_within_promise(actual, same, exact)
        torch.testing.assert_close(actual, same, rtol=3e-5, atol=3e-5 * same.abs().max().item())


def test_token_mask_equals_upstream_on_the_tokens_kept() -> None:
    """Under a mask of single tokens upstream merges tokens into codebooks, and its batch term becomes the per-sample
    one; without the dropped tokens it is right, and that is what a mask gives here."""
    module = pytest.importorskip("vector_quantize_pytorch").LFQ(codebook_size=2**9).train()
    x, mask = 0.3 * torch.randn(3, 50, 9), torch.rand(3, 50) > 0.3
    collapsed = module(x, mask=mask, return_loss_breakdown=True)[1]
    assert collapsed.batch_entropy == collapsed.per_sample_entropy
    kept = module(x[mask].unsqueeze(0), return_loss_breakdown=True)[1]
    ours = ops.lfq_entropy(x, mask=mask, log_floor=1e-5)
    torch.testing.assert_close(ours, (kept.per_sample_entropy, kept.batch_entropy), rtol=3e-5, atol=0)


def test_add_reproduces_open_magvit2() -> None:
    """Written from its formula: -sum p log softmax(logits + 1e-5) and -sum mean(p) log(mean(p) + 1e-5)."""
    x = torch.randn(60, 8, dtype=torch.float64)
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 8)
    logits = 2 * 100.0 * x @ codes.T
    p, log_p = logits.softmax(-1), (logits + 1e-5).log_softmax(-1)
    mean = p.mean(0)
    expected = -(p * log_p).sum(-1).mean(), -(mean * (mean + 1e-5).log()).sum()
    ours = ops.lfq_entropy(x, log_floor=1e-5, log_floor_mode="add")
    torch.testing.assert_close(torch.stack(ours), torch.stack(expected), rtol=1e-12, atol=0)


def test_bsq_bits_are_sums_of_binary_entropies() -> None:
    """BSQ's own form: bit probabilities sigmoid(4 tau u_i / sqrt(d)) with u on the sphere, entropies summed over bits."""
    x = torch.randn(40, 18, dtype=torch.float64)
    q = torch.sigmoid(4 * 3.0 * F.normalize(x, dim=-1) / math.sqrt(18))

    def binary(p: torch.Tensor) -> torch.Tensor:
        return -(p * p.log() + (1 - p) * (1 - p).log())

    expected = binary(q).sum(-1).mean(), binary(q.mean(0)).sum()
    ours = ops.lfq_entropy(x, spherical=True, inv_temperature=3.0, estimator="bits")
    torch.testing.assert_close(torch.stack(ours), torch.stack(expected), rtol=1e-12, atol=0)


def test_batch_entropy_of_independent_and_of_equal_bits() -> None:
    """Closed forms: hard bits that are all independent give d log 2; copies of one fair bit give log 2, where the bit
    estimate still says d log 2."""
    d = 9
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * d)
    assert ops.lfq_entropy(codes)[1].item() == pytest.approx(d * math.log(2), rel=1e-6)
    copies = torch.tensor([[-1.0], [1.0]]).expand(2, d)
    assert ops.lfq_entropy(copies)[1].item() == pytest.approx(math.log(2), rel=1e-6)
    assert ops.lfq_entropy(copies, estimator="bits")[1].item() == pytest.approx(d * math.log(2), rel=1e-6)


def test_masked_and_missing_tokens() -> None:
    """A mask over all tokens or over the batch equals dropping them, whatever they hold; no token gives zero."""
    x = torch.randn(4, 13, 8, dtype=torch.float64)
    mask = torch.rand(4, 13) > 0.4
    x[~mask] = torch.nan
    ours, dropped = value_and_gradient(ops.lfq_entropy, x, mask=mask), value_and_gradient(ops.lfq_entropy, x[mask])
    torch.testing.assert_close(ours[:2], dropped[:2], rtol=1e-12, atol=0)
    torch.testing.assert_close(ours[2][mask], dropped[2], rtol=1e-12, atol=1e-15)
    assert (ours[2][~mask] == 0).all()
    rows = torch.tensor([True, False, True, False])
    x = x.nan_to_num()
    torch.testing.assert_close(ops.lfq_entropy(x, mask=rows), ops.lfq_entropy(x[rows]), rtol=1e-12, atol=0)
    for empty, options in ((x[:0], {}), (x, {"mask": torch.zeros(4, 13, dtype=torch.bool)})):
        per_sample, batch, gradient = value_and_gradient(ops.lfq_entropy, empty, **options)
        assert per_sample == 0 and batch == 0 and not gradient.any()


def test_extreme_inputs() -> None:
    """Saturated bits and huge temperatures stay finite; NaN and infinities come out as NaN."""
    x = torch.tensor([[1e4, -1e4, 0.0], [3e7, 1.0, -1.0], [0.0, 0.0, 0.0]])
    for options in ({}, {"log_floor": 1e-5}, {"inv_temperature": 1e6}):
        assert all(torch.isfinite(part).all() for part in value_and_gradient(ops.lfq_entropy, x, **options))
    for strange in (torch.nan, torch.inf):
        x[1, 1] = strange
        assert all(torch.isnan(part) for part in ops.lfq_entropy(x))


def test_half_precision_is_computed_in_float32() -> None:
    x = torch.randn(31, 12)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = value_and_gradient(ops.lfq_entropy, x.to(dtype))
        wide = value_and_gradient(ops.lfq_entropy, x.to(dtype).float())
        assert narrow[0].dtype == torch.float32 and torch.equal(narrow[0], wide[0]) and torch.equal(narrow[1], wide[1])
        assert torch.equal(narrow[2], wide[2].to(dtype))


@pytest.mark.parametrize("bits", [1, 2, 20, 36])
def test_codebooks_of_all_sizes(bits: int) -> None:
    """From two codes to 2^36: exact where its table fits, groups beyond, with a sentence that says so."""
    x = torch.randn(6, bits)
    if bits == 36:
        with pytest.raises(errors.OptionError, match="groups"):
            ops.lfq_entropy(x)
        per_sample, batch = ops.lfq_entropy(x, estimator="groups", group_size=12)
        assert batch < 3 * 12 * math.log(2) + 1e-4
    else:
        per_sample, batch = ops.lfq_entropy(x)
        assert batch <= min(bits * math.log(2), math.log(6) + per_sample) + 1e-4  # H(mean) <= mean H + log N
    p = torch.sigmoid(400 * x.double())
    expected = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)).sum(-1).mean()
    assert per_sample.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: ops.lfq_entropy(x, estimator="pairs"), errors.OptionError, "'exact', 'groups', 'bits'"),
        (lambda x: ops.lfq_entropy(x, inv_temperature=0), errors.OptionError, "inv_temperature: expected a positive"),
        (lambda x: ops.lfq_entropy(x, group_size=0), errors.OptionError, "group_size"),
        (lambda x: ops.lfq_entropy(x, log_floor=-1e-5), errors.OptionError, "log_floor: expected a number of at least 0"),
        (lambda x: ops.lfq_entropy(x, log_floor_mode="max"), errors.OptionError, "'clamp', 'add'"),
        (lambda x: ops.lfq_entropy(x, mask=torch.ones(5)), errors.ShapeError, "mask: expected leading axes"),
        (lambda x: ops.lfq_entropy(x, num_codebooks=3), errors.ShapeError, "multiple of num_codebooks=3"),
        (lambda x: ops.lfq_entropy(x.int()), errors.DTypeError, "x: expected float32"),
        (lambda x: ops.fsq_entropy(x, [8, 5]), errors.ShapeError, "expected 2 channels"),
        (lambda x: ops.fsq_entropy(x, [8, 5, 4, 2]), errors.OptionError, "levels"),
        (lambda x: ops.lfq_entropy(x, backend="cudnn"), errors.OptionError, "backend"),
    ],
)  # fmt: skip
def test_wrong_arguments(call: Callable[[torch.Tensor], object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(3, 4))


def test_bare_ops_pass_opcheck() -> None:
    x, weight = torch.randn(7, 2, 4), torch.tensor([1.0, 0, 1, 1, 1, 0, 1])
    arguments = (x, weight, (2, 3, 2, 4), (-1.0, 1.0, -1, 0, 1, -0.5, 0.5, -1, -0.5, 0, 0.5), 2, 3.0, 0.0)
    opcheck(torch.ops.vidkernels.entropy_sums.default, arguments)
    sums, total = torch.ops.vidkernels.entropy_sums(*arguments)
    opcheck(torch.ops.vidkernels.entropy_sums_bwd.default, (torch.randn_like(sums), total, sums, *arguments))


def test_compiles_whole_and_once() -> None:
    """One graph for any number of tokens, forward and backward, masked and not."""

    def loss(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        per_sample, batch = ops.lfq_entropy(x, mask=mask)
        return per_sample - batch + sum(ops.fsq_entropy(x[..., :3], [8, 5, 4], bound="tan"))

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for turn, tokens in enumerate((7, 12, 33, 64)):
        x = torch.randn(2, tokens, 9, requires_grad=True)
        mask = torch.rand(2, tokens) > 0.3
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(mask, 1)
        with torch.compiler.set_stance("fail_on_recompile" if turn else "default"):
            value = compiled(x, mask)
        expected = loss(x, mask)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        pair = [torch.autograd.grad(v, x)[0] for v in (value, expected)]
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-7)


def test_explains_itself() -> None:
    for name, arguments in (("lfq_entropy", ()), ("fsq_entropy", ([8, 5, 4],))):
        assert vidkernels.explain(name, torch.randn(4, 3), *arguments).chosen == "torch"


MEMORY = """
import resource, torch
from vidkernels import ops
torch.set_num_threads(2)
x = torch.randn({tokens}, 18, requires_grad=True)
per_sample, batch = ops.lfq_entropy(x)
(per_sample - batch).backward()
assert torch.isfinite(x.grad).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_tokens_times_codes() -> None:
    """2^18 codes, 65 536 tokens: the table of one softmax would hold 64 GiB."""
    peak = float(run_python(MEMORY.format(tokens=65536)).split()[-1])
    assert peak < 1.5, f"{peak:.2f} GiB resident"


def _rank(rank: int, folder: str, shards: list[tuple[int, int]]) -> None:
    """One of two processes: its shard's loss and the gradient of a shared weight, averaged as DDP does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    data = torch.load(f"{folder}/data.pt")
    results = []
    for first, last in shards:
        for quantizer in ("lfq", "fsq"):
            shard = data["x"][first:last] if rank == 0 else torch.cat([data["x"][:first], data["x"][last:]])
            weight = data["weight"].clone().requires_grad_()
            arguments = () if quantizer == "lfq" else ([5, 4, 3, 4, 5, 3],)
            function = getattr(ops, f"{quantizer}_entropy")
            per_sample, batch = function(
                shard @ weight, *arguments, inv_temperature=3.0, process_group=dist.group.WORLD
            )
            (gradient,) = torch.autograd.grad(1.3 * per_sample - 0.7 * batch, weight)
            dist.all_reduce(gradient)
            results.append((per_sample.detach(), batch.detach(), gradient / 2))
    compiled = torch.compile(ops.lfq_entropy, backend="aot_eager", fullgraph=True)
    x = data["x"][rank::2].requires_grad_()
    pair = [torch.autograd.grad(sum(f(x, process_group=dist.group.WORLD)), x)[0] for f in (compiled, ops.lfq_entropy)]
    torch.testing.assert_close(*pair)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """Equal, unequal and empty shards: the same losses on both ranks as in one process with all tokens, and the same
    gradient of the weights after averaging over the ranks."""
    data = {"x": torch.randn(40, 7, dtype=torch.float64), "weight": torch.randn(7, 6, dtype=torch.float64)}
    torch.save(data, tmp_path / "data.pt")
    shards = [(0, 20), (0, 7), (0, 0)]
    torch.multiprocessing.spawn(_rank, (str(tmp_path), shards), nprocs=2)
    weight = data["weight"].clone().requires_grad_()
    expected = []
    for arguments, function in (((), ops.lfq_entropy), (([5, 4, 3, 4, 5, 3],), ops.fsq_entropy)):
        per_sample, batch = function(data["x"] @ weight, *arguments, inv_temperature=3.0)
        (gradient,) = torch.autograd.grad(1.3 * per_sample - 0.7 * batch, weight)
        expected.append((per_sample.detach(), batch.detach(), gradient))
    for rank in range(2):
        for index, result in enumerate(torch.load(tmp_path / f"{rank}.pt")):
            for ours, right in zip(result, expected[index % 2], strict=True):
                torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-14)
