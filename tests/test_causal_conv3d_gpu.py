# SPDX-License-Identifier: Apache-2.0
"""The GPU backends of causal_conv3d on a device: values and gradients, streaming, side streams and CUDA graphs."""

from __future__ import annotations

from typing import Any

import causal_conv3d_boxes as boxes
import pytest
import torch
from helpers import assert_gradients_within_promise
from test_causal_conv3d import CASES, Case, call, make

import vidkernels
from vidkernels import ops
from vidkernels._reference import causal_conv3d as reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BACKENDS = ["triton", "cudnn", "torch", "cuda"]
# Several boxes along every axis, tails in all of them, one-row and many-row boxes, 256 filters
LARGE: dict[str, Case] = {
    "128-160": ((1, 128, 3, 24, 40), (160, 3, 3, 3), {}),
    "96-96-wide": ((1, 96, 4, 6, 300), (96, 3, 3, 3), {"time_padding": "replicate"}),
    "256-256-history": ((2, 256, 2, 17, 33), (256, 3, 3, 3), {"P": 2, "time_padding": "history"}),
    "512-512-full": ((1, 512, 5, 32, 32), (512, 3, 3, 3), {"time_padding": "zeros"}),  # two programs a multiprocessor
    "512-512": ((1, 512, 2, 32, 32), (512, 1, 3, 3), {}),
    # Two sums over one box, of one row and of several; sums stored in halves
    "160-192-rest": ((1, 160, 3, 5, 200), (192, 3, 3, 3), {"P": 2, "activation": "silu", "residual": True}),
    "192-160-rows": ((1, 192, 2, 33, 20), (160, 1, 3, 3), {"activation": "silu", "residual": True}),
    "64-192-rows": ((2, 64, 3, 33, 20), (192, 3, 3, 3), {"P": 2, "activation": "silu", "residual": True}),
    "128-384-rows": ((1, 128, 2, 40, 20), (384, 1, 3, 3), {"time_padding": "replicate", "residual": True}),
    "128-256-halves": ((1, 128, 2, 6, 120), (256, 3, 1, 1), {"activation": "silu", "residual": True}),
    "128-128-halves": ((1, 128, 2, 6, 256), (128, 1, 3, 3), {"activation": "silu", "residual": True}),
    "128-temporal": ((2, 128, 6, 16, 64), (128, 3, 1, 1), {"activation": "silu", "residual": True}),
    "160-down": ((1, 160, 4, 33, 31), (160, 3, 3, 3), {"stride": (2, 1, 1)}),
    "128-space-down": ((1, 128, 2, 64, 64), (128, 1, 3, 3), {"stride": (1, 2, 2), "spatial_padding": (0, 1, 0, 1)}),
    "rgb-in": ((1, 3, 4, 40, 56), (128, 3, 3, 3), {"time_padding": "replicate"}),
    "rgb-out": ((1, 128, 4, 40, 56), (3, 3, 3, 3), {"time_padding": "replicate"}),
    # Few channels and few filters: taps become channels, or filters whose results are added up
    "rgb-in-history": ((2, 3, 3, 33, 150), (96, 3, 3, 3), {"P": 2, "time_padding": "history"}),
    "rgb-in-down": (
        (1, 3, 5, 40, 56),
        (64, 3, 3, 3),
        {"stride": 2, "pad_frames": 2, "spatial_padding_mode": "replicate"},
    ),
    "four-in-residual": ((1, 4, 3, 33, 150), (128, 1, 3, 3), {"activation": "silu", "residual": True}),
    "rgb-out-history": ((2, 96, 3, 33, 150), (3, 3, 3, 3), {"P": 2, "activation": "silu", "residual": True}),
    "seven-out": ((1, 128, 3, 40, 56), (7, 1, 3, 3), {"dilation": (1, 2, 2)}),
}


def inputs(case: Case, dtype: torch.dtype, backend: str) -> tuple[list[torch.Tensor], list[str], dict[str, Any]]:
    tensors, names, options = make(case, dtype, DEVICE)
    given = dict(zip(names, tensors, strict=True))
    reasons = {c.backend: c.reason for c in vidkernels.explain("causal_conv3d", **given, **options).choices}
    if reasons[backend]:
        pytest.skip(reasons[backend])
    return tensors, names, options


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("case", [*CASES.values(), *LARGE.values()], ids=[*CASES, *LARGE])
def test_promise(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Error against float64 at most twice the same-dtype reference's own, plus one rounding; forward and backward.

    Without TF32: whether cuDNN takes it for the reference depends on the shape, and so would the promise.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        tensors, names, options = inputs(case, dtype, backend)
        ours = call(ops.causal_conv3d, names, options, backend=backend)
        assert_gradients_within_promise(ours, call(reference.causal_conv3d, names, options), tensors, names=names)


@pytest.mark.parametrize("backend", ["triton", "cudnn"])
@pytest.mark.parametrize("name", ["128-160", "96-96-wide", "128-temporal", "rgb-in", "rgb-out"])
def test_tf32_is_within_its_own_rounding(name: str, backend: str) -> None:
    """torch's default for convolutions: operands keep 10 bits, cut off at worst, so a product is off by 2^-9 of itself."""
    shape, weight, given = LARGE[name]
    case = shape, weight, {key: value for key, value in given.items() if key not in ("activation", "residual")}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        tensors, names, options = inputs(case, torch.float32, backend)
        y = call(ops.causal_conv3d, names, options, backend=backend)(*tensors)
    exact = call(reference.causal_conv3d, names, options)(*(x.double() for x in tensors))
    bound = call(reference.causal_conv3d, names, options)(*(x.double().abs() for x in tensors))
    assert ((y - exact).abs() <= 2**-9 * bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1), (3, 3, 3)], ids=str)
@torch.no_grad()
def test_out_has_the_bits_of_a_result_of_its_own(kernel: tuple[int, ...], backend: str) -> None:
    """Packed, with gaps, frames of a clip, the residual itself; the memory around is left alone."""
    case: Case = ((1, 128, 4, 24, 40), (136, *kernel), {"time_padding": "zeros"})
    (x, weight, bias), _, options = inputs(case, torch.bfloat16, backend)
    options["backend"] = backend
    wanted = ops.causal_conv3d(x, weight, bias, **options)
    frame = torch.full((1, 136, 8, 48, 40), 7.0, device=DEVICE, dtype=torch.bfloat16)
    for place in ((slice(2, 6), slice(0, 24)), (slice(0, 4), slice(24, 48)), (slice(1, 8, 2), slice(0, 48, 2))):
        for aliased in (False, True):
            whole = frame.to(memory_format=torch.channels_last_3d, copy=True)
            out = whole[:, :, place[0], place[1]]
            residual = out if aliased else torch.randn_like(wanted)
            added = ops.causal_conv3d(x, weight, bias, residual=residual, **options)
            ops.causal_conv3d(x, weight, bias, residual=residual, out=out, **options)
            assert torch.equal(out, added)
            ops.causal_conv3d(x, weight, bias, out=out, **options)
            assert torch.equal(out, wanted)
            out.fill_(7.0)
            assert (whole == 7).all()


@pytest.mark.parametrize("time_padding", ["zeros", "replicate"])
@pytest.mark.parametrize(("channels", "filters"), [(3, 128), (96, 128), (128, 128), (128, 3)])
def test_chunks_are_the_clip_bit_for_bit(
    channels: int, filters: int, time_padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole in one part, the chunks of few channels or filters in parts of some rows and frames."""
    from vidkernels.triton import _conv_fold

    x = torch.randn(1, channels, 9, 20, 30, device=DEVICE).bfloat16().contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(filters, channels, 3, 3, 3, device=DEVICE).bfloat16() * 0.02
    options: dict[str, Any] = {"time_padding": time_padding, "backend": "triton"}
    whole = ops.causal_conv3d(x, weight, **options)
    monkeypatch.setattr(_conv_fold, "WORKSPACE", 100_000)
    for sizes in ([1, 4, 4], [5, 1, 3]):
        parts, history = [], None
        for chunk in x.split(sizes, 2):
            y, history = ops.causal_conv3d(chunk, weight, history=history, return_history=True, **options)
            parts.append(y)
        assert torch.equal(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_side_stream_and_graph(backend: str) -> None:
    """Kernels and plans run on the current stream, and are captured once they are built."""
    tensors, names, options = inputs(LARGE["512-512"], torch.bfloat16, backend)
    run = call(ops.causal_conv3d, names, options, backend=backend)
    expected = run(*tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = run(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(*tensors)
    tensors[0].neg_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, run(*tensors))


@pytest.mark.parametrize("dtype", boxes.DTYPES, ids=str)
@pytest.mark.parametrize("case", boxes.CASES.values(), ids=list(boxes.CASES))
def test_boxes(case: boxes.Case, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for compute capability 9.0")
    boxes.check(case, dtype, DEVICE)


@pytest.mark.parametrize("dtype", boxes.DTYPES, ids=str)
@pytest.mark.parametrize("case", boxes.GRADIENTS.values(), ids=list(boxes.GRADIENTS))
def test_gradients_of_boxes(case: boxes.Case, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for compute capability 9.0")
    boxes.check_gradient(case, dtype, DEVICE)


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_chunks_of_boxes(mode: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for compute capability 9.0")
    boxes.check_chunks(mode, DEVICE)
