# SPDX-License-Identifier: Apache-2.0
"""Upsampling convolutions through Triton: weights of all phases in one launch, all phases in another, plans that are kept."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aot
import launches
import pytest
import torch
from helpers import ROOT, assert_within_promise
from test_causal_conv3d_host import counted
from test_triton_launch import driver, library  # noqa: F401  fixtures
from test_upsample_conv3d import CASES, LINEAR, make

from vidkernels import ops
from vidkernels._conv import phases, upsample, weights
from vidkernels._conv.upsample_plan import TimeRule
from vidkernels._reference import upsample_conv3d as reference
from vidkernels.errors import DTypeError

LAST = torch.channels_last_3d


def plan_for(scale: tuple[int, int, int], linear: bool = False, split: int = 0, start: int = 0, **more: Any) -> Any:
    """Of 4 x 6 x 7 elements and a causal 3x3x3 kernel."""
    rule = TimeRule(scale[0], linear, more.get("dropped", 0), split)
    place = start, rule.ready(start), more.get("final", True), (2, 0, 1, 1, 1, 1), more.get("mode", 1), 0
    return phases.call_of((4, 6, 7), min(start, 3), (3, 3, 3), scale, linear, rule.dropped, split, *place).plan


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("scale", "blend", "dtype"),
    [
        ((2, 1, 1), 2.0, torch.bfloat16),
        ((1, 2, 2), None, torch.float16),
        ((2, 2, 2), 2.0, torch.float32),
        ((3, 2, 1), None, torch.bfloat16),
    ],
    ids=str,
)
def test_weights_are_sums_in_float64_rounded_once(scale: Any, blend: float | None, dtype: torch.dtype) -> None:
    """Half a rounding of the storage type and some of float32, of the terms' size, in every layout."""
    from vidkernels.triton import _conv_phases

    weight, bias = torch.randn(2, 2, 3, 3, 3).to(dtype), torch.randn(2).to(dtype)
    mix, padding = (None, None) if blend is None else (torch.tensor([blend]), (2, 0, 1, 1, 1, 1))
    plan = plan_for(scale, linear=scale[1:] == (1, 1), split=1)
    exact, exact_bias = weights.summands(weight.double(), bias.double(), mix, padding)
    size = weights.summands(weight.double().abs(), None, mix, padding)[0]
    each, scaled = _conv_phases.separate_weights(plan, weight, bias, mix, padding)
    made = list(each)
    for phase, w in zip(plan.phases, made, strict=True):
        expected, terms = weights.collapse(exact, phase.taps), weights.collapse(size, phase.taps)
        bound = expected.abs() * torch.finfo(dtype).eps / 2 + terms * 4 * torch.finfo(torch.float32).eps
        assert ((w.double() - expected).abs() <= bound).all() and w.is_contiguous(memory_format=LAST)
    error = (scaled.double() - exact_bias).abs()
    assert (error <= exact_bias.abs() * (torch.finfo(dtype).eps / 2 + 1e-6)).all()
    tables = _conv_phases._tables(plan, weight.device)
    smooth = _conv_phases._smooth_tap(padding, (3, 3, 3))
    sliced = weight.repeat(2, 1, 1, 1, 1)
    sliced[::2] = weight
    for layout in (weight.contiguous(memory_format=LAST), sliced[::2]):
        stacked = _conv_phases._make_weights(tables, layout, bias, mix, smooth, stacked=True)
        rows = stacked[: 4 * sum(w.shape[2:].numel() for w in made)].view(-1, 2, 2)
        for first, w in zip(tables.first, made, strict=True):
            assert torch.equal(rows[first : first + w.shape[2:].numel()].permute(1, 2, 0), w.flatten(2))


@pytest.mark.interpreter
def test_an_infinite_tap_reaches_its_own_sums_only() -> None:
    from vidkernels.triton import _conv_phases

    weight = torch.randn(2, 2, 3, 3, 3)
    weight[1, 0, 0, 1, 2] = float("inf")
    plan = plan_for((2, 2, 2))
    for phase, made in zip(plan.phases, _conv_phases.separate_weights(plan, weight, None, None, None)[0], strict=True):
        assert torch.equal(made.isinf(), weights.collapse(weight, phase.taps).isinf()) and not made.isnan().any()


def wide_frames(name: str, dtype: torch.dtype, device: str = "cpu", channels: int = 32, side: int = 8) -> Any:
    """A case whose frames fill boxes: named tensors, options."""
    tensors, names, options = make(CASES[name], dtype, channels)
    tensors[0] = torch.randn(1, channels, CASES[name][0], side, side + 1, dtype=dtype).contiguous(memory_format=LAST)
    return {n: t.to(device) for n, t in zip(names, tensors, strict=True)}, options


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels of phases that are launched."""
    pytest.importorskip("triton")
    from vidkernels.triton import _conv_phase_kernels as kernels

    found: list[str] = []

    class Kernel:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            found.append(self.name)
            return self.kernel[grid]

    for name in ("phase_weights_kernel", "phase_box_kernel"):
        monkeypatch.setattr(kernels, name, Kernel(name, getattr(kernels, name)))
    yield found


@pytest.fixture
def few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes of 16 channels, where the interpreter takes a quarter of the time."""
    from vidkernels.triton import _conv_phases

    monkeypatch.setattr(_conv_phases, "_FEW_CHANNELS", 16)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "dtype"), [("vidtok-1.1-first", torch.float32), ("single-zeros", torch.bfloat16)], ids=str
)
def test_all_phases_in_one_launch(name: str, dtype: torch.dtype, launched: list[str], few_channels: None) -> None:
    inputs, options = wide_frames(name, dtype, channels=16)
    y = ops.upsample_conv3d(**inputs, **options, backend="triton")
    assert launched == ["phase_weights_kernel", "phase_box_kernel"] and y.is_contiguous(memory_format=LAST)
    exact = reference.upsample_conv3d(**{n: t.double() for n, t in inputs.items()}, **options)
    own = reference.upsample_conv3d(**inputs, **options)
    if dtype == torch.float32:
        return assert_within_promise(y, own, exact)
    # Triton's interpreter cuts results off where a GPU rounds them to nearest: one more rounding.
    bound = 2 * (own - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= bound


def in_chunks(inputs: dict[str, torch.Tensor], cuts: tuple[int, ...], options: dict[str, Any]) -> torch.Tensor:
    rest, parts, history, start = dict(inputs), [], None, 0
    clip = rest.pop("x")
    for number, count in enumerate(cuts):
        x = clip[:, :, start : start + count]
        state = {"history": history, "start": start, "final": number == len(cuts) - 1, "return_history": True}
        y, history = ops.upsample_conv3d(x, **rest, **options, **state, backend="triton")
        parts.append(y)
        start += count
    return torch.cat(parts, 2)


@pytest.mark.interpreter
def test_chunks_have_the_bits_of_the_whole_clip(few_channels: None) -> None:
    inputs, options = wide_frames("vidtok-1.0", torch.bfloat16, channels=16)
    whole = ops.upsample_conv3d(**inputs, **options, backend="triton")
    assert torch.equal(in_chunks(inputs, (2, 3), options), whole)


@pytest.mark.interpreter
def test_weights_are_not_kept() -> None:
    """An average of weights is copied into them behind autograd's back."""
    tensors, names, options = make(CASES["spatial"], torch.float32)
    inputs = dict(zip(names, tensors, strict=True))
    first = ops.upsample_conv3d(**inputs, **options, backend="triton")
    inputs["weight"].data.copy_(2 * inputs["weight"])
    inputs["bias"].data.mul_(2)
    assert torch.equal(ops.upsample_conv3d(**inputs, **options, backend="triton"), 2 * first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "tf32"])
@pytest.mark.parametrize("name", CASES)
def test_boxes_on_gpu(name: str, dtype: torch.dtype) -> None:
    """Frames that fill boxes, with channels that do not: values of all cases, in the products' precision.

    TF32 is judged as in test_causal_conv3d_gpu: matrix units cut operands off to 10 bits, each towards zero, so that a product
    is off by 2^-9 of itself at most. An H200 was off by 2^-10 of the largest result, five times as far as cuDNN, which
    rounds to nearest.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        for channels, side in ((40, 24), (160, 33)):
            inputs, options = wide_frames(name, dtype, "cuda", channels, side)
            y = ops.upsample_conv3d(**inputs, **options, backend="triton")
            exact = reference.upsample_conv3d(**{n: t.double() for n, t in inputs.items()}, **options)
            if dtype == torch.float32:
                sizes = {n: t.double() if n == "mix_factor" else t.double().abs() for n, t in inputs.items()}
                assert ((y - exact).abs() <= 2**-9 * reference.upsample_conv3d(**sizes, **options)).all()
                continue
            own = reference.upsample_conv3d(**inputs, **options)
            bound = 2 * (own - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
            assert (y - exact).abs().max() <= bound, (channels, side)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vidtok-1.1-first", "vidtok-1.0", "single-zeros"])
def test_chunks_on_gpu(name: str) -> None:
    inputs, options = wide_frames(name, torch.bfloat16, "cuda", 64, 40)
    whole = ops.upsample_conv3d(**inputs, **options, backend="triton")
    assert torch.equal(in_chunks(inputs, (1, CASES[name][0] - 2, 1), options), whole)


@pytest.mark.parametrize(
    ("scale", "options"),
    [
        ((2, 1, 1), {"linear": True, "split": 1}),
        ((2, 1, 1), {"linear": True, "split": 4, "mode": 0}),
        ((3, 1, 1), {"linear": True, "split": 2}),
        ((2, 2, 2), {"dropped": 1, "mode": 0}),
        ((4, 1, 1), {"dropped": 3}),
    ],
    ids=str,
)
def test_chunks_far_into_a_clip_share_their_plan(scale: Any, options: dict[str, Any], monkeypatch: Any) -> None:
    """And it is theirs: the phases of a place deep in the clip, from which positions are counted."""
    for final in (False, True):
        far = [plan_for(scale, start=start, final=final, **options) for start in (30, 31, 77)]
        assert far[0] is far[1] is far[2] and far[0].start < 30
        with monkeypatch.context() as patched:
            patched.setattr(phases, "_settled", lambda rule, kernel, stream: stream)
            patched.setattr(phases, "_call", phases._call.__wrapped__)  # not the call kept from before
            own = plan_for(scale, start=31, final=final, **options)
        assert own.start == 31 and len(own.phases) == len(far[0].phases)
        for a, b in zip(own.phases, far[0].phases, strict=True):
            assert (a.reads, a.past, a.geometry, a.taps) == (b.reads, b.past, b.geometry, b.taps)
            assert a.runs[0].begin - own.start == b.runs[0].begin - far[0].start
            assert [(r.start, r.step, r.count) for r in a.runs] == [(r.start, r.step, r.count) for r in b.runs]


HOST: dict[str, dict[str, Any]] = {
    "time": {"scale": (2, 1, 1)},
    "space": {"scale": (1, 2, 2)},
    "both": {"scale": (2, 2, 2)},
    "blend": {**LINEAR, "split": 1, "mix_factor": torch.zeros(1)},
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["planar", "channels-last"])
@pytest.mark.parametrize("name", HOST)
def test_host(name: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches a call, and two torch ops: the weights' memory and the result's."""
    pytest.importorskip("triton")
    from vidkernels.triton import _conv_configs, _conv_phase_kernels, _correlate

    found: list[str] = []
    for kernel in ("phase_weights_kernel", "phase_box_kernel"):
        launch = type("Kernel", (), {"__getitem__": lambda self, grid, n=kernel: lambda *a, **k: found.append(n)})()
        monkeypatch.setattr(_conv_phase_kernels, kernel, launch)
    for module in (_conv_configs, _correlate):
        monkeypatch.setattr(module, "family", lambda device: "sm_90")
    x = torch.randn(1, 32, 5, 8, 8).bfloat16().contiguous(memory_format=LAST)
    weight, bias = torch.randn(32, 32, 3, 3, 3).bfloat16().contiguous(memory_format=layout), torch.randn(32).bfloat16()
    call = importlib.import_module("vidkernels.ops.upsample_conv3d")._prepare(x, weight, bias, **HOST[name])
    inputs = call.x, call.weight, call.bias, call.history, call.mix_factor
    assert counted(lambda: upsample.fwd_triton(*inputs, *call.args)) == ["empty", "empty"]
    assert found == ["phase_weights_kernel", "phase_box_kernel"] * 2


@pytest.mark.interpreter
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_blended_downsampling_is_one_weight_and_one_convolution(bias: bool, launched: list[str]) -> None:
    tensors, _, _ = make((5, (3, 3, 3), {"mix": True}), torch.float16, 6)
    x, weight, given, mix = tensors[0], tensors[1], tensors[2] if bias else None, tensors[3]
    y = ops.downsample_conv3d(x, weight, given, mix_factor=mix, backend="triton")
    assert launched == ["phase_weights_kernel"]
    wide = [t if t is None else t.double() for t in (x, weight, given, mix)]
    exact = reference.downsample_conv3d(*wide[:3], mix_factor=wide[3])
    own = reference.downsample_conv3d(x, weight, given, mix_factor=mix)
    assert_within_promise(y, own, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cudnn", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_downsample_on_gpu(dtype: torch.dtype, backend: str) -> None:
    """Weights of the blend made in one launch have the value of those made for gradients, whichever convolution takes them."""
    tensors = [t.to("cuda") for t in make((7, (3, 3, 3), {"mix": True}), dtype, 64)[0]]
    x, weight, bias, mix = tensors
    y = ops.downsample_conv3d(x, weight, bias, mix_factor=mix, backend=backend)
    exact = reference.downsample_conv3d(*(t.double() for t in (x, weight, bias)), mix_factor=mix.double())
    assert_within_promise(y, reference.downsample_conv3d(x, weight, bias, mix_factor=mix), exact)
    graph = ops.downsample_conv3d(x, weight.requires_grad_(), bias, mix_factor=mix, backend=backend)
    assert_within_promise(graph.detach(), y, exact)


def test_calls_that_look_alike_are_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the values, and with gradients too; chunks, options and errors are decided by themselves; modes see the op."""
    module = importlib.import_module("vidkernels.ops.upsample_conv3d")
    decided, prepare = [], module._prepare
    monkeypatch.setattr(module, "_prepare", lambda *a, **k: decided.append(k) or prepare(*a, **k))
    x, weight, bias = torch.randn(1, 4, 3, 5, 5), torch.randn(4, 4, 3, 3, 3), torch.randn(4)
    mix = torch.randn(1)
    first = ops.upsample_conv3d(x, weight, bias, mix_factor=mix, backend="torch")
    second = ops.upsample_conv3d(2 * x, weight.clone(), 2 * bias, mix_factor=mix, backend="torch")
    assert len(decided) == 1
    torch.testing.assert_close(second, 2 * first)
    y = ops.upsample_conv3d(x, weight.requires_grad_(), bias, mix_factor=mix, backend="torch")
    assert len(decided) == 1 and torch.equal(y, first) and y.requires_grad
    with torch.no_grad():
        names = counted(lambda: ops.upsample_conv3d(x, weight, bias, mix_factor=mix, backend="torch"))
    assert "upsample_conv3d_fwd_torch" in names and len(decided) == 1
    history = x[:, :, -1:]
    for _ in range(2):  # the frames before a chunk are no part of the first chunk's rule
        late = ops.upsample_conv3d(x, weight, bias, start=1, history=history, backend="torch")
    assert len(decided) == 2 and late.shape[2] == 6
    for number in range(2):
        with pytest.raises(DTypeError):
            ops.upsample_conv3d(x, weight, bias, mix_factor=mix.int(), backend="torch")
        assert len(decided) == 3 + number
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.upsample_conv3d(x, weight, bias, mix_factor=mix, backend="torch").dtype == torch.bfloat16
    assert len(decided) == 5


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_one_compilation_serves_all_clips_and_rules() -> None:
    """On an H100: frames, factors and interpolation stand in tables; weights are mixed in space or not."""
    last, weight = LAST, torch.empty(128, 128, 3, 3, 3, device="meta", dtype=torch.bfloat16)
    rules: tuple[dict[str, Any], ...] = (
        {"scale": (2, 1, 1)},
        {"mode": "linear_time"},
        {"scale": 2},
        {"scale": (1, 2, 2)},
    )
    with launches.record() as found:
        for frames, rule in enumerate(rules, 1):
            x = torch.empty(1, 128, frames, 64, 128, device="meta", dtype=torch.bfloat16).to(memory_format=last)
            ops.upsample_conv3d(x, weight, **rule, backend="triton")
    assert [launch.kernel for launch in found] == ["phase_weights_kernel", "phase_box_kernel"] * len(rules)
    compilations = launches.compilations(found)
    assert sorted(c.kernel for c in compilations) == ["phase_box_kernel"] + ["phase_weights_kernel"] * 2
    assert all(c.report.spills == 0 for c in compilations)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in for the driver would hide a GPU's")
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")
def test_repeated_launches_are_those_of_triton(library: Path, driver: Path) -> None:  # noqa: F811
    """Byte for byte, see `test_triton_launch.py`."""
    pytest.importorskip("triton")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "TRITON_LIBCUDA_PATH": str(driver)}
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    script = ROOT / "tests" / "triton_launch" / "compare_phases.py"
    words = [sys.executable, "-W", "ignore", str(script), str(library)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"phase_weights_kernel=4", "phase_box_kernel=2"} <= set(done.stdout.split())
