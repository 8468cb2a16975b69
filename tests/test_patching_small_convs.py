# SPDX-License-Identifier: Apache-2.0
"""Convolutions of few positions, which the rules for VAEs compute on a padded copy: equal to the op, and chosen by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vae_cases as cases
from helpers import assert_within_promise

import vidkernels
from vidkernels import ops
from vidkernels.patching.rules import _small_convs as small
from vidkernels.patching.rules import _vae_units

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"time_padding": "replicate", "pad_frames": (2, 0), "spatial_padding": 1},
    {"time_padding": "replicate", "pad_frames": (1, 1), "spatial_padding": (2, 1, 0, 1), "spatial_padding_mode": "replicate"},
    {"time_padding": "zeros", "pad_frames": (1, 1), "spatial_padding": (1, 0)},
    {"time_padding": "zeros", "pad_frames": (2, 1), "stride": (2, 2, 1)},
    {"time_padding": "none", "spatial_padding": (0, 1, 0, 1), "stride": (1, 2, 2)},
    {"history": 1, "pad_frames": 2},
    {"history": 2, "time_padding": "history", "spatial_padding": 0},
    {"history": 1, "time_padding": "replicate", "pad_frames": 3, "dilation": (1, 1, 2)},
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_padded_copy_gives_the_op(options: dict[str, Any], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 5, 4).to(memory_format=layout)
    weight, bias = torch.randn(4, 6, 3, 3, 3), torch.randn(4)
    if "history" in options:
        options = {**options, "history": torch.randn(2, 6, options["history"], 5, 4).to(memory_format=layout)}
    for dtype in (torch.float64, torch.bfloat16):
        given = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        tensors = [t.to(dtype) for t in (x, weight, bias)]
        expected = ops.causal_conv3d(*tensors, backend="reference", **given)
        actual = small.convolve_padded(*tensors, **given)
        assert actual.stride() == ops.causal_conv3d(*tensors, **given).stride()
        truth = ops.causal_conv3d(
            *(t.double() for t in tensors),
            **{key: value.double() if isinstance(value, torch.Tensor) else value for key, value in given.items()},
        )
        assert_within_promise(actual, expected, truth)


@pytest.mark.parametrize(
    ("shape", "filters", "dtype", "chosen"),
    [
        ((1, 512, 2, 2, 2), 512, torch.float32, True),
        ((1, 512, 5, 8, 8), 512, torch.float32, True),
        ((1, 512, 3, 12, 12), 512, torch.float32, False),  # Winograd's tiles
        ((1, 512, 1, 4, 4), 512, torch.float32, True),
        ((1, 512, 1, 6, 6), 512, torch.float32, False),  # two of three taps see frames of zeros
        ((1, 256, 5, 8, 8), 256, torch.float32, False),
        ((1, 256, 3, 4, 4), 64, torch.float32, False),
        ((1, 256, 3, 4, 4), 256, torch.float64, False),
        ((1, 256, 3, 4, 4), 256, torch.float16, False),
    ],
)
def test_few_positions(shape: tuple[int, ...], filters: int, dtype: torch.dtype, chosen: bool) -> None:
    x, weight = torch.empty(shape, dtype=dtype), torch.empty(filters, shape[1], 3, 3, 3, dtype=dtype)
    assert small.reads_mostly_weights(x, weight) == chosen
    with torch.autocast("cpu", torch.bfloat16):
        assert not small.reads_mostly_weights(x, weight)


def test_one_frame_with_others_before_it() -> None:
    x, weight = torch.empty(1, 512, 1, 8, 8), torch.empty(512, 512, 3, 3, 3)
    assert not small.reads_mostly_weights(x, weight)
    assert small.reads_mostly_weights(x, weight, history=x.expand(-1, -1, 2, -1, -1))
    assert small.reads_mostly_weights(x, weight, repeats=True)


def test_bfloat16_only_where_the_processor_multiplies_it_and_not_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 256, 5, 4, 4, dtype=torch.bfloat16)
    weight = torch.empty(256, 256, 3, 3, 3, dtype=torch.bfloat16)
    for native, tiles in ((True, False), (True, True), (False, False)):
        monkeypatch.setattr(small, "native_on_cpu", lambda dtype, native=native: native)
        monkeypatch.setattr(small, "multiplies_tiles", lambda dtype, tiles=tiles: tiles)
        assert small.reads_mostly_weights(x, weight) == (native and not tiles)
        assert not small.reads_mostly_weights(x.expand(2, -1, -1, -1, -1), weight)


def test_a_patched_block_takes_the_padded_copy_unless_a_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and gradients of both ways keep the promise."""
    autoencoder = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_ltx")
    torch.manual_seed(0)
    block = autoencoder.LTXVideoResnetBlock3d(256, 256).eval()
    double, x, seen = cases.in_double(block), torch.randn(1, 256, 2, 3, 4), []
    monkeypatch.setattr(_vae_units, "convolve_padded", lambda *a, **k: seen.append(1) or small.convolve_padded(*a, **k))

    def run(module: Any, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = given.detach().requires_grad_()
        y = module(given)
        return y, *torch.autograd.grad(y.square().sum(), [given, *module.parameters()])

    expected, truth = run(block, x), run(double, x.double())
    vidkernels.patch(block)
    for actual, plain, exact in zip(run(block, x), expected, truth, strict=True):
        assert_within_promise(actual, plain, exact)
    assert len(seen) == 2
    vidkernels.patch(block, backend={"causal_conv3d": "torch"})
    torch.testing.assert_close(block(x), expected[0], atol=1e-5, rtol=1e-4)
    assert len(seen) == 2


class _Owner:
    """The backends of a patched module."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def _vidkernels_backend(self, op: str) -> str:
        return self.backend


def test_doubling_of_few_positions_by_tiles_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    copies: list[tuple[int, ...]] = []
    monkeypatch.setattr(_vae_units, "doubled_copy", lambda x: copies.append((*x.shape,)) or small.doubled_copy(x))
    conv = torch.nn.Conv2d(8, 12, 3, padding=1).bfloat16()
    wide = torch.nn.Conv2d(8, 12, 3, padding=1).double()
    wide.load_state_dict(conv.state_dict())
    for tiles in (False, True):
        monkeypatch.setattr(small, "multiplies_tiles", lambda dtype, tiles=tiles: tiles)
        for size, backend in (((2, 8, 3, 5, 4), "auto"), ((2, 8, 3, 5, 4), "torch"), ((1, 8, 1, 32, 33), "auto")):
            x = _vae_units.channels_last(torch.randn(size).bfloat16())
            with torch.no_grad():
                actual = _vae_units.doubled_in_space(_Owner(backend), conv, x)
                frames = x.transpose(1, 2).flatten(0, 1)
                results = []
                for layer, given in ((conv, frames), (wide, frames.double())):
                    y = layer(torch.nn.functional.interpolate(given, scale_factor=2.0))
                    results.append(y.unflatten(0, (size[0], size[2])).transpose(1, 2))
            assert_within_promise(actual, *results)
            assert actual.is_contiguous(memory_format=torch.channels_last_3d)
    assert copies == [(2, 8, 3, 5, 4)]
    _vae_units.doubled_in_space(_Owner("auto"), conv, x[..., :4])  # gradients go through the phases
    assert len(copies) == 1
