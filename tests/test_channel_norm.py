# SPDX-License-Identifier: Apache-2.0
"""Channel norms: every kind and layout against float64, diffusers' norms, bare ops, tracing, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from channel_norm_cases import CASES, SILU, WIDE, Case, compare
from helpers import assert_gradients_within_promise, assert_same_nonfinite, assert_within_promise, opcheck

import vidkernels
from vidkernels import ops
from vidkernels._reference import channel_norm as reference
from vidkernels.errors import BackendUnavailable, DTypeError, OptionError, ShapeError


@pytest.mark.parametrize("name", [*CASES, "rows of 1152", "rows of 301", "planes of 300, odd"])
def test_output_and_gradients_keep_the_promise(name: str) -> None:
    compare({**CASES, **WIDE}[name], torch.float32, "cpp", "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["layer silu", "layer silu channels last", "rms silu channels last"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    compare(CASES[name], dtype, "cpp", "cpu", torch.float32 if dtype == torch.bfloat16 else None)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", [*CASES, *WIDE])
def test_gpu_backends(name: str, backend: str) -> None:
    compare({**CASES, **WIDE}[name], torch.float32, backend, "cuda")
    compare({**CASES, **WIDE}[name], torch.bfloat16, backend, "cuda")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 positions: the interpreter sums a tile one value after another (a GPU in a tree), and small inputs then
    have many tiles, several for every program."""
    kernels = pytest.importorskip("vidkernels.triton.channel_norm")
    config = kernels.norm_config
    monkeypatch.setattr(kernels, "norm_config", lambda *a, **k: dataclasses.replace(config(*a, **k), block_p=4))
    monkeypatch.setattr(kernels, "_MAX_PROGRAMS", 8)


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", [*CASES, "rows of 301", "planes of 300, odd"])
def test_triton_interpreted(name: str) -> None:
    compare({**CASES, **WIDE}[name], torch.float32, "triton", "cpu")


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["layer silu", "rms silu channels last", "l2"])
def test_triton_interpreted_low_precision(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        compare(CASES[name], dtype, "triton", "cpu", torch.float32)


@pytest.mark.parametrize("name", ["layer silu", "rms silu channels last", "l2", "l2 below eps channels last"])
def test_gradcheck(name: str) -> None:
    case = dataclasses.replace(CASES[name], shape=(2, 5, 2, 3, 1))
    inputs = [t.detach().requires_grad_() for t in case.draw(torch.float64, "cpu", torch.float64)]
    torch.autograd.gradcheck(case.call(ops, backend="cpp"), inputs, eps=1e-7)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["NCDHW", "NDHWC"])
def test_same_bits_for_any_number_of_threads(layout: torch.memory_format) -> None:
    x = torch.randn(1, 64, 4, 40, 40).contiguous(memory_format=layout)
    dy, w, b = torch.randn_like(x), torch.randn(64), torch.randn(64)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        y = ops.channel_norm(*leaves, activation="silu", backend="cpp")
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_position_has_the_same_bits_wherever_it_stands() -> None:
    """What makes chunks of a clip equal the whole clip."""
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.randn(1, 48, 7, 5, 9).contiguous(memory_format=layout)
        whole = ops.channel_norm(x, activation="silu", backend="cpp")
        for first, last in ((0, 1), (1, 4), (4, 7)):
            chunk = x[:, :, first:last].contiguous(memory_format=layout)
            assert torch.equal(ops.channel_norm(chunk, activation="silu", backend="cpp"), whole[:, :, first:last])


@pytest.mark.parametrize("view", ["whole", "slice", "frames"])
def test_allocates_the_output_alone(view: str) -> None:
    """No copy of x, no intermediate: 1 MB in, 1 MB out, and a few kilobytes."""
    x = torch.randn(1, 64, 4, 32, 32).contiguous(memory_format=torch.channels_last_3d)
    x = {"whole": x, "slice": x[:, :, 1:3], "frames": x.permute(0, 2, 1, 3, 4).flatten(0, 1)}[view]
    ops.channel_norm(x, activation="silu", backend="cpp")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.channel_norm(x, activation="silu", backend="cpp")
    allocated = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
    assert x.numel() * 4 <= allocated < x.numel() * 4 + 4096


def test_reference_is_torch_and_diffusers() -> None:
    x, w, b = torch.randn(2, 12, 3, 4, 5), torch.randn(12), torch.randn(12)
    rows = x.movedim(1, -1)
    expected = F.silu(F.layer_norm(rows, (12,), w, b, 1e-6)).movedim(-1, 1)
    torch.testing.assert_close(reference.channel_norm(x, w, b, activation="silu"), expected)
    torch.testing.assert_close(
        reference.channel_norm(x, w, kind="rms", eps=1e-5), F.rms_norm(rows, (12,), w, 1e-5).movedim(-1, 1)
    )
    wan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    norm = wan.WanRMS_norm(12, images=False)
    torch.nn.init.normal_(norm.gamma)
    torch.testing.assert_close(reference.channel_norm(x, norm.gamma.flatten(), kind="l2"), norm(x))


@pytest.mark.parametrize("shape", [(2, 8, 3, 4, 5), (2, 8, 4, 5), (2, 8, 5)], ids=str)
def test_memory_format_is_kept(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert ops.channel_norm(x).stride() == x.stride()
    assert ops.channel_norm(last).stride() == last.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 3, 7], ids=str)
def test_the_promise_over_seeds(channels: int, layout: str) -> None:
    """Few channels are computed in float64: float32 broke it there, by the luck of few values."""
    for seed in range(60):
        torch.manual_seed(seed)
        case = Case((2, channels, 2, 3, 1 + seed % 7), layout, {"kind": ("layer", "rms", "l2")[seed % 3], **SILU})
        compare(case, (torch.float32, torch.bfloat16)[seed % 2], "cpp", "cpu", torch.float32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["layer", "rms", "l2"])
def test_squares_beyond_float32(kind: str, layout: str) -> None:
    """Multiplied by 2^100, of which torch's norms make 0 or NaN, x has the norm that it has without eps."""
    x = Case((2, 48, 2, 3, 5), layout).draw(torch.float32, "cpu", torch.float32)[0]
    dy, results = torch.randn_like(x), []
    small = reference.channel_norm
    for function, scale, dtype, eps in (
        (ops.channel_norm, 2.0**100, torch.float32, None),
        (small, 1.0, torch.float32, 1e-30),
        (small, 1.0, torch.float64, 1e-30),
    ):
        leaf = (x * scale).to(dtype).requires_grad_()
        y = function(leaf, kind=kind, eps=eps, activation="silu")
        (dx,) = torch.autograd.grad(y, leaf, dy.to(dtype))
        results.append((y.detach(), dx * scale))
    for name, *triple in zip(("output", "gradient of x"), *results, strict=True):
        assert_within_promise(*triple, name=name)


def test_non_finite_rows_do_not_touch_others_and_empty() -> None:
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.randn(1, 16, 2, 3, 5).contiguous(memory_format=layout)
        y = ops.channel_norm(x, activation="silu")
        x[0, 3, 0, 0, 0], x[0, 5, 1, 2, 4] = float("nan"), float("inf")
        z = ops.channel_norm(x, activation="silu")
        bad = torch.zeros(2, 3, 5, dtype=torch.bool)
        bad[0, 0, 0] = bad[1, 2, 4] = True
        assert torch.equal(z[0][:, ~bad], y[0][:, ~bad])
        assert z[0][:, 0, 0, 0].isnan().all()
    assert ops.channel_norm(torch.empty(0, 8, 2, 2)).shape == (0, 8, 2, 2)
    assert ops.channel_norm(torch.randn(1, 8, 0, 2)).shape == (1, 8, 0, 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["NCDHW", "NDHWC"])
@pytest.mark.parametrize("size", [300.0, 1e8, 1e12], ids=str)
def test_silu_far_from_zero(size: float, layout: torch.memory_format) -> None:
    """Two forms of SiLU meet at parameters of 1e9: both end at 0 and at z, and so do their gradients."""
    x = torch.randn(1, 37, 2, 3, 5).contiguous(memory_format=layout)
    weight, bias = size * torch.randn(37), torch.randn(37)
    mine = ops.channel_norm(x, weight, bias, activation="silu", backend="cpp")
    other, truth = (
        reference.channel_norm(x.to(d), weight.to(d), bias.to(d), activation="silu")
        for d in (torch.float32, torch.float64)
    )
    assert_within_promise(mine, other, truth)
    assert mine.min() > -0.3  # the smallest value of SiLU is -0.278
    names = ["x", "weight", "bias"]
    call = dataclasses.replace(CASES["layer silu"], shape=tuple(x.shape))
    assert_gradients_within_promise(call.call(ops, backend="cpp"), call.call(reference), [x, weight, bias], names=names)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["NCDHW", "NDHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_parameters_that_are_not_finite(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(1, 40, 2, 3, 5).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(40), torch.randn(40)
    bias[3], bias[7], weight[11], weight[39] = float("-inf"), float("inf"), float("nan"), float("inf")
    mine = ops.channel_norm(x, weight, bias, activation="silu", backend="cpp")
    assert_same_nonfinite(mine, reference.channel_norm(x, weight, bias, activation="silu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("positions", [1, 3, 4, 5, 7, 9])
def test_rows_beside_a_block(positions: int, dtype: torch.dtype) -> None:
    """Rows go in blocks; what is left over goes one by one, with the same bits."""
    for channels in (1, 15, 16, 17, 31, 33, 63, 1024, 1025, 2049):
        x = torch.randn(positions, channels).to(dtype)
        y = ops.channel_norm(x, activation="silu", backend="cpp")
        alone = [ops.channel_norm(row[None], activation="silu", backend="cpp") for row in x]
        assert torch.equal(y, torch.cat(alone))


def test_bare_ops_trace_and_compile() -> None:
    x, w, b = torch.randn(2, 8, 3, 4), torch.randn(8), torch.randn(8)
    opcheck(torch.ops.vidkernels.channel_norm_fwd.default, (x, w, b, 1, 0, 1e-6, True))
    opcheck(torch.ops.vidkernels.channel_norm_bwd.default, (x, x, w, b, 1, 0, 1e-6, True, True, True, True))
    opcheck(torch.ops.vidkernels.channel_norm_bwd.default, (x, x, w, None, 1, 2, 1e-6, False, False, True, False))
    compiled = torch.compile(
        lambda x: ops.channel_norm(x, w, b, activation="silu"), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for size in (3, 5, 7):
        x = torch.randn(2, 8, size, 4, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, ops.channel_norm(x, w, b, activation="silu"))
        y.square().sum().backward()
        assert torch.isfinite(x.grad).all()


def test_gradients_only_where_wanted() -> None:
    x, w = torch.randn(2, 8, 3, 4), torch.randn(8, requires_grad=True)
    ops.channel_norm(x, w, torch.zeros(8)).square().sum().backward()
    assert x.grad is None and w.grad is not None


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: ops.channel_norm(x.int()), DTypeError, "x: expected float32"),
        (lambda x: ops.channel_norm(x, torch.ones(5)), ShapeError, "weight"),
        (lambda x: ops.channel_norm(x, kind="batch"), OptionError, "kind: expected one of"),
        (lambda x: ops.channel_norm(x, activation="gelu"), OptionError, "activation: expected one of"),
        (lambda x: ops.channel_norm(x, dim=9), (OptionError, ShapeError), "dim"),
        (lambda x: ops.channel_norm(x, backend="cuda"), BackendUnavailable, "it runs on cuda tensors, got cpu"),
    ],
)
def test_wrong_arguments(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call(torch.randn(2, 8, 3, 4))


def test_explain_names_every_backend() -> None:
    assert "-> cpp" in str(vidkernels.explain("channel_norm", torch.randn(2, 8, 3, 4)))


@pytest.mark.parametrize("kind", ["layer", "rms", "l2"])
@pytest.mark.parametrize("channels", [48, 130])
def test_bfloat16_rows_far_from_zero(kind: str, channels: int) -> None:
    """Sums and squares in one pass lose the digits of a row whose mean is 100 times its deviation: it takes two, and so do
    rows of zeros and of values near the ends of float32. The rows beside it keep their bits."""
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("needs a processor with AVX512_BF16")
    scale = torch.tensor([1, 1, 1, 1e18, 1, 0, 1e-20, 1, 1, 1, 1]).reshape(1, 1, -1, 1, 1)
    shift = torch.tensor([0, 100, 0, 0, 8, 0, 0, -300, 0, 2, 0.0]).reshape(1, 1, -1, 1, 1)
    x = (torch.randn(1, channels, 11, 1, 1) * scale + shift).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last_3d)
    weight, bias = torch.randn(channels).bfloat16(), torch.randn(channels).bfloat16()
    options = {"kind": kind, "eps": 1e-6, "activation": "silu"}
    y = ops.channel_norm(x, weight, bias, backend="cpp", **options)
    for row in range(x.shape[2]):
        one = x[:, :, row : row + 1]
        assert torch.equal(y[:, :, row : row + 1], ops.channel_norm(one, weight, bias, backend="cpp", **options)), row
        truth = reference.channel_norm(one.double(), weight.double(), bias.double(), **options)
        assert_within_promise(y[:, :, row : row + 1], truth.bfloat16(), truth)
