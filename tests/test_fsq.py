# SPDX-License-Identifier: Apache-2.0
"""FSQ: the reference against vector-quantize-pytorch, every backend against the reference, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import EPS, assert_gradients_within_promise, assert_within_promise, opcheck
from quantizer_cases import BACKENDS, dtypes_of, layouts, needs_library, rounding_dtypes_of, ulps

import vidkernels
from vidkernels import errors, ops
from vidkernels._reference import fsq as reference
from vidkernels.ops import _fsq_thresholds as tables
from vidkernels.patching.rules.quantizers import CLAMPED_ENDS_PASS

# Table 1 and A.4 of the paper, VidTok's, Cosmos's; then odd ones: one channel, many levels, more than a vector's lanes.
PUBLISHED = [
    [5, 3], [8, 8], [8, 6, 5], [8, 8, 8], [8, 5, 5, 5], [8, 8, 6, 5], [7, 5, 5, 5, 5], [8, 8, 8, 6, 5],
    [8, 8, 8, 5, 5, 5], [8] * 4, [8] * 5, [8] * 6,
]  # fmt: skip
UNUSUAL = [[3], [16, 9], [17, 4], [100, 3, 41], [3] * 10]
BOUNDS = ["atanh", "tan", "symmetric"]


def level_id(levels: list[int]) -> str:
    return "x".join(map(str, levels))


def upstream(levels: list[int], **options: object) -> torch.nn.Module:
    return pytest.importorskip("vector_quantize_pytorch").FSQ(levels, **options)


@pytest.mark.parametrize("levels", PUBLISHED + UNUSUAL, ids=level_id)
def test_reference_equals_vector_quantize_pytorch(levels: list[int]) -> None:
    """Codes, indices and gradients, bit for bit, for both bounds upstream has, with and without the hard clamp."""
    for bound, clamp in (("atanh", False), ("atanh", True), ("symmetric", False), ("symmetric", True)):
        module = upstream(levels, preserve_symmetry=bound == "symmetric", bound_hard_clamp=clamp)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            z = (1.5 * torch.randn(2, 301, len(levels))).to(dtype).requires_grad_()
            codes, indices = reference.fsq_quantize(z, levels, bound=bound, hard_clamp=clamp)
            theirs, their_indices = module(z)
            assert codes.dtype == theirs.dtype == dtype and torch.equal(codes, theirs)
            if math.prod(levels) < 2**24:  # beyond, upstream adds the digits up in float32 and loses the last ones
                assert torch.equal(indices, their_indices) and indices.dtype == their_indices.dtype
                assert torch.equal(
                    reference.fsq_indices_to_codes(indices, levels, bound=bound), module.indices_to_codes(indices)
                )
            cotangent = torch.randn_like(z)
            (ours,) = torch.autograd.grad(codes, z, cotangent)
            (expected,) = torch.autograd.grad(theirs, z, cotangent)
            # The ends of its clamp have slope 0 from torch 2.14 on.
            same = expected != 0 if clamp and not CLAMPED_ENDS_PASS else torch.ones_like(z, dtype=torch.bool)
            assert torch.equal(ours[same], expected[same])
            assert (ours[~same] != 0).sum() <= z.numel() // 50  # few values are ends


def test_reference_tan_bound_is_the_paper() -> None:
    """Thresholds of appendix A.1, worked out from its formula in float64; float32 rounds values up to 4 on the way."""
    for count in (4, 5, 8):
        half, offset = (count - 1) * (1 - 1e-3) / 2, 0.5 if count % 2 == 0 else 0.0
        shift = math.tan(offset / half)
        expected = [math.atanh((k + 0.5 + offset) / half) - shift for k in range(-(count // 2), (count - 1) // 2)]
        found = tables.thresholds((count,), "tan", False, torch.device("cpu"), False)
        assert found == pytest.approx(expected, abs=1e-6)


def test_reference_equals_diffusers_vidtok() -> None:
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_vidtok").FSQRegularizer([8] * 5)
    z = 1.5 * torch.randn(2, 5, 3, 8, 9)
    codes, indices = module(z)
    ours, our_indices = reference.fsq_quantize(z, [8] * 5, dim=1)
    assert torch.equal(ours, codes) and torch.equal(our_indices, indices)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    ("levels", "codebooks"), [([8, 5, 5], 1), ([4, 3], 2), ([17, 6], 1)], ids=["8x5x5", "two of 4x3", "17x6"]
)
def test_equals_reference(where: tuple[str, str], bound: str, levels: list[int], codebooks: int) -> None:
    """Codes, indices and memory format, on every layout and dtype, with special values in."""
    backend, device = where
    for name, values, dim in layouts(codebooks * len(levels), device):
        if values.numel() > 9 and name != "expanded":
            flat = values.movedim(dim, -1)
            flat[..., 0, 0] = torch.inf
            flat[..., -1, -1] = -torch.inf
            flat[..., -1, 0] = torch.nan
        for dtype in dtypes_of(backend):
            z = values.to(dtype)
            codes, indices = ops.fsq_quantize(z, levels, bound=bound, dim=dim, num_codebooks=codebooks, backend=backend)
            expected, expected_indices = reference.fsq_quantize(
                z, levels, bound=bound, dim=dim, num_codebooks=codebooks
            )
            assert torch.equal(codes.nan_to_num(9.0), expected.nan_to_num(9.0)), name
            assert torch.equal(indices, expected_indices), name
            assert codes.stride() == torch.empty_like(z).stride(), name


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("levels", PUBLISHED + UNUSUAL, ids=level_id)
def test_neighbours_of_every_threshold(where: tuple[str, str], levels: list[int]) -> None:
    """The 2 x 40 floats around each decision threshold go where the formula on the same device sends them."""
    backend, device = where
    if backend == "triton" and tables.distinct_thresholds(levels) > 64:
        pytest.skip("hundreds of thresholds unroll into a kernel of minutes")
    for bound in BOUNDS:
        found = tables.thresholds(tuple(levels), bound, False, torch.device(device), False)
        around = ulps(torch.tensor(found, device=device), 40)
        z = around.unsqueeze(-1).expand(-1, len(levels)).contiguous()
        codes, indices = ops.fsq_quantize(z, levels, bound=bound, backend=backend)
        expected, expected_indices = reference.fsq_quantize(z, levels, bound=bound)
        assert torch.equal(codes, expected) and torch.equal(indices, expected_indices)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("channels", [1, 2, 5, 8, 9], ids="{} channels".format)
def test_every_number_of_levels(where: tuple[str, str], channels: int) -> None:
    """3 to 18 levels, whose codes are products or quotients; token counts around a vector's and a run's; signs of zero."""
    backend, device = where
    if backend == "triton":
        pytest.skip("a kernel for each list of levels, and the same arithmetic for all of them")
    for first in range(3, 19):
        levels = [max(3, min(first + c % 2, int(2 ** (30 / channels)))) for c in range(channels)]
        for tokens in (1, 15, 16, 17, 250 // channels, 2500 // channels):
            z = 2 * torch.randn(tokens, channels, device=device)
            z[-1, -1], z[0, 0] = torch.nan, -0.0
            for bound in BOUNDS:
                for values, dim in ((z, 1), (z.t().contiguous(), 0)):
                    codes, indices = ops.fsq_quantize(values, levels, bound=bound, dim=dim, backend=backend)
                    expected, expected_indices = reference.fsq_quantize(values, levels, bound=bound, dim=dim)
                    assert torch.equal(indices, expected_indices)
                    assert torch.equal(
                        codes.view(torch.int32)[codes == codes], expected.view(torch.int32)[codes == codes]
                    )
                    assert torch.equal(codes.isnan(), values.isnan())


def _assert_same_as_upstream(count: int, levels: list[int]) -> None:
    module = upstream(levels)
    for start in range(0, count, 1_000_000):
        z = torch.randn(1, min(1_000_000, count - start), len(levels)) * 2
        codes, indices = ops.fsq_quantize(z, levels, backend="cpp")
        theirs, their_indices = module(z)
        assert torch.equal(codes, theirs) and torch.equal(indices, their_indices)


@needs_library
@pytest.mark.parametrize("levels", [[8, 8, 8, 5, 5, 5], [8] * 5], ids=level_id)
def test_random_values_equal_upstream(levels: list[int]) -> None:
    _assert_same_as_upstream(200_000, levels)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("levels", PUBLISHED, ids=level_id)
def test_ten_million_random_values_equal_upstream(levels: list[int]) -> None:
    _assert_same_as_upstream(10_000_000 // len(levels) + 1, levels)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("clamp", [False, True], ids=["tanh", "clamp"])
def test_gradients(where: tuple[str, str], clamp: bool) -> None:
    """Straight-through gradients keep the promise against float64, on every layout and dtype."""
    backend, device = where
    levels = [8, 5, 4]
    for name, values, dim in layouts(len(levels), device):
        if name == "expanded":  # its gradient is summed over the expanded axes by autograd, not by the kernel
            continue
        for bound in BOUNDS:
            options = dict(bound=bound, dim=dim, hard_clamp=clamp, return_indices=False)

            def ours(z: torch.Tensor, options: dict = options) -> torch.Tensor:
                return ops.fsq_quantize(z, levels, **options, backend=backend)[0]

            def theirs(z: torch.Tensor, options: dict = options) -> torch.Tensor:
                return reference.fsq_quantize(z, levels, **options)[0]

            for dtype in rounding_dtypes_of(backend, device):
                z = values.to(dtype)
                if name == "one token":  # three values do not tell how far off the reference is; about five roundings
                    wide = z.double().requires_grad_()
                    z.requires_grad_()
                    pair = [torch.autograd.grad(f(x), x, torch.ones_like(x))[0] for f, x in ((ours, z), (theirs, wide))]
                    torch.testing.assert_close(pair[0].double(), pair[1], rtol=8 * EPS[dtype], atol=8 * EPS[dtype])
                    continue
                if dtype != torch.float64:
                    assert_gradients_within_promise(ours, theirs, [z], names=[f"z ({name}, {bound}, {dtype})"])
                    continue
                z.requires_grad_()
                pair = [torch.autograd.grad(f(z), z, torch.ones_like(z))[0] for f in (ours, theirs)]
                torch.testing.assert_close(*pair, rtol=1e-14, atol=1e-15)  # two orders of about five roundings


@pytest.mark.parametrize("where", [*BACKENDS, pytest.param(("reference", "cpu"), id="reference")])
def test_the_ends_of_a_clamp_have_slope_one(where: tuple[str, str]) -> None:
    """On every torch: from 2.14 on `torch.clamp` has slope 0 there. One normal value in 360 is an end in bfloat16."""
    backend, device = where
    z = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5], device=device).view(-1, 1).requires_grad_()
    codes, _ = ops.fsq_quantize(z, [3], bound="symmetric", hard_clamp=True, backend=backend)
    assert torch.autograd.grad(codes.sum(), z)[0].flatten().tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("where", BACKENDS)
def test_gradients_of_mixed_layouts_and_extremes(where: tuple[str, str]) -> None:
    """The cotangent may be laid out unlike z; far from zero the slope goes to zero and never to NaN."""
    backend, device = where
    values = torch.tensor([0.0, 1e-30, 5.0, 9.0, 30.0, 1e4, 3e38, torch.inf], device=device)
    z = torch.cat([values, -values]).view(1, 1, 16).repeat(2, 2, 1).requires_grad_()
    codes, _ = ops.fsq_quantize(z, [8, 5], dim=1, backend=backend)
    cotangent = torch.randn(2, 16, 2, device=device).movedim(-1, 1)
    (grad,) = torch.autograd.grad(codes, z, cotangent)
    truth, same = [
        torch.autograd.grad(reference.fsq_quantize(x, [8, 5], dim=1)[0], x, cotangent.to(x.dtype))[0]
        for x in (z.detach().double().requires_grad_(), z.detach().requires_grad_())
    ]
    assert_within_promise(grad, same, truth)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("where", BACKENDS)
def test_codes_from_indices_and_back(where: tuple[str, str]) -> None:
    """All indices of a codebook survive the round trip, in every dtype and bound; strange indices give NaN."""
    backend, device = where
    levels = [8, 5, 3]
    size = math.prod(levels)
    for bound in BOUNDS:
        for dtype in dtypes_of(backend):
            for index_dtype in (torch.int32, torch.int64):
                indices = torch.arange(size, device=device, dtype=index_dtype).view(2, size // 2)
                codes = ops.fsq_indices_to_codes(indices, levels, bound=bound, dim=1, dtype=dtype, backend=backend)
                expected = reference.fsq_indices_to_codes(indices, levels, bound=bound, dim=1, dtype=dtype)
                assert torch.equal(codes, expected) and codes.dtype == dtype
                back = ops.fsq_codes_to_indices(codes, levels, bound=bound, dim=1, backend=backend)
                assert torch.equal(back, indices.int())
                assert torch.equal(reference.fsq_codes_to_indices(codes, levels, bound=bound, dim=1), indices.int())
    strange = torch.tensor([-1, size, -(2**31), 2**31 - 1, 0], device=device)
    codes = ops.fsq_indices_to_codes(strange, levels, backend=backend)
    assert torch.isnan(codes[:4]).all() and not torch.isnan(codes[4]).any()
    books = torch.randint(0, size, (2, 3, 4), device=device)
    for dim in (0, 1, 2, -1):
        codes = ops.fsq_indices_to_codes(books, levels, num_codebooks=4, dim=dim, backend=backend)
        assert torch.equal(codes, reference.fsq_indices_to_codes(books, levels, num_codebooks=4, dim=dim))
        assert torch.equal(
            ops.fsq_codes_to_indices(codes, levels, num_codebooks=4, dim=dim, backend=backend), books.int()
        )


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize(
    "levels",
    [
        pytest.param([8, 8, 8, 5, 5, 5], id="groups"),
        pytest.param([128, 128, 128], id="2^21-codes"),
        pytest.param([129, 128, 128], id="beyond-float32"),
        pytest.param([3] * 13, id="many-channels"),
        pytest.param([1500, 3], id="wide-channel"),
        pytest.param([7], id="one-channel"),
    ],
)
def test_every_code_of_a_codebook(where: tuple[str, str], levels: list[int]) -> None:
    """Codebooks at the limits of the decoding kernels, both layouts, ends that fill no vector, strange indices between."""
    backend, device = where
    if backend == "triton" and math.prod(levels) > 2**11:
        pytest.skip("one formula for every size, slow in the interpreter")
    size = math.prod(levels)
    step = max(1, size // 300_000)
    indices = torch.arange(0, size, step, device=device, dtype=torch.int32)
    indices = torch.cat([indices, torch.tensor([size - 1, -1, 0, size], device=device, dtype=torch.int32)])
    expected = reference.fsq_indices_to_codes(indices, levels)
    for dtype in (torch.int32, torch.int64):
        for dim in (-1, 0):
            codes = ops.fsq_indices_to_codes(indices.to(dtype), levels, dim=dim, backend=backend)
            assert torch.equal(codes.movedim(dim, -1).nan_to_num(9), expected.nan_to_num(9))


@pytest.mark.parametrize("where", BACKENDS)
def test_parts_of_the_result(where: tuple[str, str]) -> None:
    backend, device = where
    z = torch.randn(2, 33, 3, device=device)
    codes, indices = ops.fsq_quantize(z, [8, 5, 4], backend=backend)
    only_codes = ops.fsq_quantize(z, [8, 5, 4], return_indices=False, backend=backend)
    only_indices = ops.fsq_quantize(z, [8, 5, 4], return_codes=False, backend=backend)
    assert torch.equal(only_codes[0], codes) and only_codes[1] is None
    assert only_indices[0] is None and torch.equal(only_indices[1], indices)


@needs_library
def test_codebook_too_large_for_indices_still_has_codes() -> None:
    z = torch.randn(5, 12)
    codes, indices = ops.fsq_quantize(z, [8] * 12, return_indices=False)
    assert indices is None and torch.equal(codes, reference.fsq_quantize(z, [8] * 12, return_indices=False)[0])
    with pytest.raises(errors.OptionError, match="at most 2147483647 codes"):
        ops.fsq_quantize(z, [8] * 12)


@needs_library
def test_more_channels_than_the_kernel_takes_fall_back() -> None:
    z = torch.randn(4, 40)
    with pytest.warns(errors.VidkernelsFallbackWarning, match="at most 32 channels"):
        codes, _ = ops.fsq_quantize(z, [3] * 40, return_indices=False)
    assert torch.equal(codes, reference.fsq_quantize(z, [3] * 40, return_indices=False)[0])


@needs_library
def test_bare_ops_pass_opcheck() -> None:
    z = torch.randn(2, 6, 5, 3)
    levels = (4, 3, 8)
    found = tables.thresholds(levels, "atanh", False, z.device, False)
    for values in (z, z.contiguous(memory_format=torch.channels_last), z[:0]):
        for parts in ((True, True), (True, False), (False, True)):
            opcheck(torch.ops.vidkernels.fsq_fwd.default, (values, levels, found, False, 1, 2, *parts))
        slopes = (tables.shifts(levels, "atanh", False), tables.slopes(levels, "atanh", False))
        opcheck(torch.ops.vidkernels.fsq_bwd.default, (values.clone(), values, *slopes, False, 1, 2))
    indices = torch.randint(0, 96, (2, 5, 2))
    opcheck(torch.ops.vidkernels.fsq_decode.default, (indices, levels, False, 1, 2, torch.bfloat16))


@needs_library
def test_compiles_whole_and_once() -> None:
    """One graph, no recompilation over five lengths, the same bits, gradients included."""

    def function(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, indices = ops.fsq_quantize(z, [8, 5, 5], bound="tan")
        return codes * 2, indices + ops.fsq_codes_to_indices(codes.detach(), [8, 5, 5], bound="tan")

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for turn, length in enumerate((7, 12, 33, 64, 100)):
        z = torch.randn(2, length, 3, requires_grad=True)
        with torch.compiler.set_stance("fail_on_recompile" if turn else "default"):
            codes, indices = compiled(z)
        expected, expected_indices = function(z)
        assert torch.equal(codes, expected) and torch.equal(indices, expected_indices)
        cotangent = torch.randn_like(codes)
        assert torch.equal(*(torch.autograd.grad(out, z, cotangent)[0] for out in (codes, expected)))


def test_explains_itself() -> None:
    explanation = vidkernels.explain("fsq_quantize", torch.randn(2, 3), [8, 5, 5])
    assert {choice.backend for choice in explanation.choices} == {"cpp", "cuda", "triton", "reference"}
    with pytest.raises(errors.BackendUnavailable, match="cuda tensors"):
        ops.fsq_quantize(torch.randn(2, 3), [8, 5, 5], backend="cuda")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(2, 3, dtype=torch.int32), [8, 5, 5]), {}, errors.DTypeError, "z: expected float32"),
        (([[0.1]], [8]), {}, errors.DTypeError, "z: expected a torch.Tensor"),
        ((torch.zeros(2, 4), [8, 5, 5]), {}, errors.ShapeError, "expected 3 channels at axis 1"),
        ((torch.zeros(2, 3), [8, 5, 5]), {"dim": 2}, errors.ShapeError, "dim: expected an axis of z"),
        ((torch.zeros(2, 3), []), {}, errors.OptionError, "non-empty sequence"),
        ((torch.zeros(2, 2), [8, 2]), {}, errors.OptionError, "symmetric"),
        ((torch.zeros(2, 2), [8, 1]), {"bound": "symmetric"}, errors.OptionError, "at least 2"),
        ((torch.zeros(2, 2), [8, 2.5]), {}, errors.OptionError, "ints"),
        ((torch.zeros(2, 1), [8]), {"bound": "tanh"}, errors.OptionError, "'atanh', 'tan', 'symmetric'"),
        ((torch.zeros(2, 1), [8]), {"num_codebooks": 0}, errors.OptionError, "num_codebooks"),
        ((torch.zeros(2, 1), [8]), {"backend": "cudnn"}, errors.OptionError, "backend"),
    ],
)
def test_wrong_arguments(arguments: tuple, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ops.fsq_quantize(*arguments, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.fsq_indices_to_codes(torch.zeros(3), [8]), errors.DTypeError, "indices: expected an integer"),
        (lambda: ops.fsq_indices_to_codes(torch.zeros(3, dtype=torch.int32), [8], dtype=torch.int8), errors.OptionError, "dtype"),
        (lambda: ops.fsq_indices_to_codes(torch.zeros(3, dtype=torch.int32), [8], num_codebooks=2), errors.ShapeError, "last axis of 2"),
        (lambda: ops.fsq_indices_to_codes(torch.zeros(3, dtype=torch.int32), [8], dim=3), errors.ShapeError, "dim"),
        (lambda: ops.fsq_codes_to_indices(torch.zeros(3, 2), [8]), errors.ShapeError, "codes: expected 1 channels"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_conversions(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
