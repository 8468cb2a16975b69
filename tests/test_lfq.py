# SPDX-License-Identifier: Apache-2.0
"""LFQ and BSQ: the reference against vector-quantize-pytorch, every backend against the reference."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_gradients_within_promise, assert_within_promise, opcheck
from quantizer_cases import BACKENDS, dtypes_of, layouts, needs_library, rounding_dtypes_of

import vidkernels
from vidkernels import errors, ops
from vidkernels._reference import lfq as reference

ORDERS = ["msb_first", "lsb_first"]
BITS = [1, 5, 9, 18, 31, 36]


def upstream(**options: object) -> torch.nn.Module:
    return pytest.importorskip("vector_quantize_pytorch").LFQ(**options)


@pytest.mark.parametrize(
    ("bits", "codebooks", "spherical", "scale"),
    [(1, 1, False, 1.0), (10, 1, False, 0.5), (13, 1, True, 1.0), (6, 3, False, 1.0), (5, 2, True, 1.0)],
)
def test_reference_equals_vector_quantize_pytorch(bits: int, codebooks: int, spherical: bool, scale: float) -> None:
    """Values in training and evaluation, indices, gradients and decoded codes, bit for bit."""
    module = upstream(
        codebook_size=2**bits,
        num_codebooks=codebooks,
        spherical=spherical,
        codebook_scale=scale,
        entropy_loss_weight=0.0,
    )
    options = dict(scale=scale, spherical=spherical, num_codebooks=codebooks)
    x = torch.randn(2, 61, bits * codebooks, requires_grad=True)
    for training in (True, False):
        module.train(training)
        theirs = module(x, inv_temperature=1e-3)
        straight_through = "additive" if training else "exact"
        values, indices = reference.lfq_quantize(x, **options, straight_through=straight_through)
        assert torch.equal(values, theirs.quantized) and torch.equal(indices, theirs.indices)
        assert indices.dtype == theirs.indices.dtype == torch.int64
        if training:
            cotangent = torch.randn_like(x)
            ours, expected = (torch.autograd.grad(v, x, cotangent)[0] for v in (values, theirs.quantized))
            assert torch.equal(ours, expected)
    codes = reference.lfq_indices_to_codes(indices, bits, **options)
    assert torch.equal(codes, module.indices_to_codes(indices))


def test_bit_orders_are_each_other_reversed() -> None:
    """The first channel is the most significant bit of one and the least significant of the other."""
    x = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0, -1.0]])
    assert reference.lfq_quantize(x, bit_order="msb_first")[1].item() == 0b100110
    assert reference.lfq_quantize(x, bit_order="lsb_first")[1].item() == 0b011001


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ORDERS)
def test_equals_reference(where: tuple[str, str], bits: int, order: str) -> None:
    """Codes, indices and memory format on every layout, with zero, NaN and infinities in."""
    backend, device = where
    codebooks = 2 if bits < 9 else 1
    for name, values, dim in layouts(codebooks * bits, device):
        if values.numel() > 9 and name != "expanded":
            flat = values.movedim(dim, -1)
            flat[..., 0, 0], flat[..., -1, -1] = torch.inf, -torch.inf
            flat[..., -1, 0], flat[..., 0, -1] = torch.nan, 0.0
        for dtype in dtypes_of(backend) if bits == 5 else [torch.float32]:
            x = values.to(dtype)
            for straight_through in ("exact", "additive"):
                options = dict(
                    scale=0.3, bit_order=order, dim=dim, num_codebooks=codebooks, straight_through=straight_through
                )
                if straight_through == "additive" and dtype not in rounding_dtypes_of(backend, device):
                    continue
                codes, indices = ops.lfq_quantize(x, **options, backend=backend)
                expected, expected_indices = reference.lfq_quantize(x, **options)
                assert torch.equal(codes.nan_to_num(9.0), expected.nan_to_num(9.0)), (name, straight_through)
                assert torch.equal(indices, expected_indices), name
                assert codes.stride() == torch.empty_like(x).stride(), name


@pytest.mark.parametrize("where", BACKENDS)
def test_sphere(where: tuple[str, str]) -> None:
    """Codes and indices are equal on every layout; the additive values and all gradients keep the promise."""
    backend, device = where
    bits = 11
    for name, values, dim in layouts(bits, device):
        for dtype in rounding_dtypes_of(backend, device):
            x = values.to(dtype)
            options = dict(scale=0.7, spherical=True, dim=dim)
            codes, indices = ops.lfq_quantize(x, **options, backend=backend)
            expected, expected_indices = reference.lfq_quantize(x, **options)
            assert torch.equal(codes, expected) and torch.equal(indices, expected_indices), name
            if name == "expanded" or x.numel() == 0 or dtype == torch.float64:
                continue
            assert_gradients_within_promise(
                lambda x, o=options: ops.lfq_quantize(x, **o, straight_through="additive", backend=backend)[0],
                lambda x, o=options: reference.lfq_quantize(x, **o, straight_through="additive")[0],
                [x],
                names=[f"x ({name}, {dtype})"],
            )


@pytest.mark.parametrize("where", BACKENDS)
def test_sphere_of_extreme_vectors(where: tuple[str, str]) -> None:
    """Zero vectors, vectors below the norm's floor, huge and tiny components: the reference's signs and gradients."""
    backend, device = where
    x = torch.tensor(
        [[0.0, 0.0, 0.0], [1e-13, -2e-13, 3e-14], [1e15, -1e-15, 1.0], [1e-20, 1e-3, -1e-20], [3e-12, 0.0, -4e-12]],
        device=device,
    )
    values, indices = ops.lfq_quantize(x, spherical=True, backend=backend)
    expected, expected_indices = reference.lfq_quantize(x, spherical=True)
    assert torch.equal(values, expected) and torch.equal(indices, expected_indices)
    cotangent = torch.randn_like(x)

    def gradient(function, x: torch.Tensor, **options: object) -> torch.Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(function(x, spherical=True, **options)[0], x, cotangent.to(x.dtype))[0]

    ours, same = gradient(ops.lfq_quantize, x, backend=backend), gradient(reference.lfq_quantize, x)
    truth = gradient(reference.lfq_quantize, x.double())
    for row in range(len(x)):  # their sizes differ by 27 orders of magnitude
        assert_within_promise(ours[row], same[row], truth[row], f"gradient of row {row}")


@pytest.mark.parametrize("where", BACKENDS)
def test_gradient_is_the_identity(where: tuple[str, str]) -> None:
    backend, device = where
    for _, x, dim in layouts(6, device):
        x = x.clone().requires_grad_()
        codes, _ = ops.lfq_quantize(x, dim=dim, backend=backend)
        cotangent = torch.randn_like(x)
        assert torch.equal(torch.autograd.grad(codes, x, cotangent)[0], cotangent)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("bits", [3, 36, 62])
def test_codes_from_indices_and_back(where: tuple[str, str], bits: int) -> None:
    """Indices beyond 32 bits survive the round trip in both orders; higher bits are not read."""
    backend, device = where
    indices = torch.randint(0, 2**bits, (3, 7, 2), device=device)
    for order in ORDERS:
        for spherical in (False, True):
            for dtype in dtypes_of(backend) if bits == 3 else [torch.float32]:
                options = dict(bit_order=order, num_codebooks=2, dim=1)
                codes = ops.lfq_indices_to_codes(
                    indices, bits, **options, spherical=spherical, scale=0.3, dtype=dtype, backend=backend
                )
                expected = reference.lfq_indices_to_codes(
                    indices, bits, **options, spherical=spherical, scale=0.3, dtype=dtype
                )
                assert torch.equal(codes, expected) and codes.dtype == dtype
                assert torch.equal(ops.lfq_codes_to_indices(codes, **options, backend=backend), indices)
    if bits == 3:
        assert torch.equal(
            ops.lfq_indices_to_codes(indices.int() + 8, 3, backend=backend),
            ops.lfq_indices_to_codes(indices, 3, backend=backend),
        )


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("bits", [1, 8, 9, 18, 62])
def test_codes_of_many_tokens(where: tuple[str, str], bits: int) -> None:
    """Enough tokens for the kernels that look bytes of bits up, and ends that fill none of their steps."""
    backend, device = where
    indices = torch.randint(0, 2**bits, (5, 263), device=device)
    for order in ORDERS:
        for dim in (-1, 1):
            for dtype in (torch.float32, torch.float64):
                if dtype not in dtypes_of(backend):
                    continue
                codes = ops.lfq_indices_to_codes(indices, bits, bit_order=order, dim=dim, dtype=dtype, backend=backend)
                expected = reference.lfq_indices_to_codes(indices, bits, bit_order=order, dim=dim, dtype=dtype)
                assert torch.equal(codes, expected)


@pytest.mark.parametrize("where", BACKENDS)
def test_parts_of_the_result(where: tuple[str, str]) -> None:
    backend, device = where
    x = torch.randn(2, 33, 7, device=device)
    codes, indices = ops.lfq_quantize(x, backend=backend)
    only_codes = ops.lfq_quantize(x, return_indices=False, backend=backend)
    only_indices = ops.lfq_quantize(x, return_quantized=False, backend=backend)
    assert torch.equal(only_codes[0], codes) and only_codes[1] is None
    assert only_indices[0] is None and torch.equal(only_indices[1], indices)


@needs_library
def test_bare_ops_pass_opcheck() -> None:
    x = torch.randn(2, 6, 5, 3)
    for values in (x, x.contiguous(memory_format=torch.channels_last), x[:0]):
        for parts in ((True, True), (True, False), (False, True)):
            opcheck(torch.ops.vidkernels.lfq_fwd.default, (values, 0.5, True, True, True, 1, 2, *parts))
        opcheck(torch.ops.vidkernels.lfq_bwd.default, (values.clone(), values, 1.0, 1, 2))
    indices = torch.randint(0, 8, (2, 5, 2))
    opcheck(torch.ops.vidkernels.lfq_decode.default, (indices, 3, 0.5, False, True, 1, 2, torch.float16))


@needs_library
@pytest.mark.parametrize("spherical", [False, True], ids=["cube", "sphere"])
def test_compiles_whole_and_once(spherical: bool) -> None:
    """One graph, no recompilation over five lengths, the same bits, gradients included."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, indices = ops.lfq_quantize(x, spherical=spherical, straight_through="additive")
        return codes * 2, indices + ops.lfq_codes_to_indices(codes.detach())

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for turn, length in enumerate((7, 12, 33, 64, 100)):
        x = torch.randn(2, length, 9, requires_grad=True)
        with torch.compiler.set_stance("fail_on_recompile" if turn else "default"):
            codes, indices = compiled(x)
        expected, expected_indices = function(x)
        assert torch.equal(codes, expected) and torch.equal(indices, expected_indices)
        cotangent = torch.randn_like(codes)
        assert torch.equal(*(torch.autograd.grad(out, x, cotangent)[0] for out in (codes, expected)))


def test_explains_itself() -> None:
    explanation = vidkernels.explain("lfq_quantize", torch.randn(2, 3))
    assert {choice.backend for choice in explanation.choices} == {"cpp", "cuda", "triton", "reference"}


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int32), {}, errors.DTypeError, "x: expected float32"),
        (torch.zeros(2, 3), {"num_codebooks": 2}, errors.ShapeError, "multiple of num_codebooks=2"),
        (torch.zeros(2, 63), {}, errors.ShapeError, "at most 62 channels"),
        (torch.zeros(2, 3), {"dim": 2}, errors.ShapeError, "dim: expected an axis of x"),
        (torch.zeros(2, 3), {"bit_order": "little"}, errors.OptionError, "'msb_first', 'lsb_first'"),
        (torch.zeros(2, 3), {"straight_through": "none"}, errors.OptionError, "'exact', 'additive'"),
        (torch.zeros(2, 3), {"scale": 0.0}, errors.OptionError, "scale: expected a positive number"),
        (torch.zeros(2, 3), {"backend": "cudnn"}, errors.OptionError, "backend"),
    ],
)
def test_wrong_arguments(x: torch.Tensor, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ops.lfq_quantize(x, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.lfq_indices_to_codes(torch.zeros(3), 4), errors.DTypeError, "indices: expected an integer"),
        (lambda: ops.lfq_indices_to_codes(torch.zeros(3).int(), 63), errors.OptionError, "bits: expected an int"),
        (lambda: ops.lfq_indices_to_codes(torch.zeros(3).int(), 4, num_codebooks=2), errors.ShapeError, "last axis of 2"),
        (lambda: ops.lfq_indices_to_codes(torch.zeros(3).int(), 4, dtype=torch.int8), errors.OptionError, "dtype"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_conversion(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
