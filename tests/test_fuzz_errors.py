# SPDX-License-Identifier: Apache-2.0
"""Bad input, one argument at a time: every op, module, pack and sampler answers with an error of this package that names an
argument, never with a bare one of torch or Python. And odd layouts of good input give the results of the reference."""

from __future__ import annotations

import argparse
import inspect
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vidkernels import errors, nn, ops, packing, patch, sampling
from vidkernels._commands import _options
from vidkernels._commands.samples import samples
from vidkernels.models.tokenizers import VidTok
from vidkernels.models.transformers import Goku, Latte, LatteT2V, STDiT3
from vidkernels.training.clips import ClipConfig
from vidkernels.training.config import read_json

pytestmark = pytest.mark.filterwarnings("ignore")
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


PAIR = torch.tensor([True, False])
ARRAY = np.zeros(2)
HUGE = 10**400  # beyond any float
WRONG: dict[type, tuple[Any, ...]] = {
    bool: (None, 2, "False", [], PAIR, object()),
    int: (1.5, "1", -(2**63), -(10**30), float("nan"), (1,), [1, 1], PAIR, 1j, object()),
    float: (float("nan"), float("inf"), HUGE, "1", (1.0, 2.0, 3.0, 4.0), PAIR, 1j, object()),
    str: ("bogus", "ZEROS", 1, ["zeros"], ARRAY, PAIR, object()),
    tuple: ("abc", [None] * 3, ["1"] * 3, [float("nan")] * 3, [HUGE] * 3, [[1], [2], [3]], object()),
}


def wrong(value: Any) -> Iterator[Any]:
    """What can never stand in the place of a value."""
    if isinstance(value, Tensor):
        yield from ("x", 1.5, value.tolist(), value.numpy(), value.to(torch.complex64), value > 0)
        yield torch.nested.nested_tensor([value.float(), value.float()])
        yield torch.quantize_per_tensor(value.float(), 0.1, 0, torch.quint8)
        yield value.to_sparse()
    for kind, found in WRONG.items():
        if isinstance(value, (tuple, list) if kind is tuple else kind) and type(value) is not (
            bool if kind is int else None
        ):
            yield from found


def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Valid calls with all of their options that are no None."""
    x, offsets = draw(1, 4, 3, 4, 4), torch.tensor([0, 2, 6], dtype=torch.int32)
    pack = packing.pack([draw(4, 2, 4, 4), draw(4, 1, 2, 2)])
    kept = packing.drop_tokens(pack, 0.5)
    flow, steps = sampling.RectifiedFlow(), torch.tensor([3])
    diffusion = sampling.GaussianDiffusion("10", learned_range=False)
    wan = nn.RotaryConfig.wan(8)
    found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}
    for sample in samples(torch.device("cpu"), torch.float64):
        function = getattr(ops, sample.op)
        bound = inspect.signature(function).bind(*sample.args, **sample.kwargs)
        bound.apply_defaults()
        found[f"ops.{sample.op}"] = function, dict(bound.arguments)
    convolution = {
        "stride": (1, 1, 1), "dilation": (1, 1, 1), "pad_frames": (2, 0), "spatial_padding": (1, 1), "residual": x,
        "history": draw(1, 4, 2, 4, 4), "activation": "silu",
    }  # fmt: skip
    found["causal_conv3d"] = ops.causal_conv3d, {"x": x, "weight": draw(4, 4, 3, 3, 3), "bias": draw(4), **convolution}
    rows = {"x": draw(2, 6, 8), "shift": draw(3, 8), "scale": draw(3, 8), "rows": torch.tensor([[0, 2], [1, 0]])}
    found["rows"] = ops.adaln_modulate, {**rows, "weight": draw(8), "bias": draw(8)}
    found["table"] = (
        ops.qk_norm_rope,
        {"q": draw(6, 2, 8), "k": None, "positions": torch.zeros(6, 3), "frequencies": draw(3, 4)},
    )
    found["fold"] = (
        ops.fold_alpha_blend,
        {"weight": draw(4, 4, 3, 3, 3), "bias": draw(4), "mix_factor": draw(1), "branch": "pool"},
    )
    for module, options in (
        (nn.FSQ, {"levels": [5, 4, 3]}), (nn.LFQ, {"dim": 6, "codebook_size": 8}),
        (nn.CausalConv3d, {"in_channels": 3, "out_channels": 3, "kernel_size": 3}),
        (nn.TemporalUpsample, {"channels": 4}), (nn.ChannelNorm, {"channels": 4}), (nn.GroupNorm, {"num_groups": 2, "channels": 4}),
        (nn.AdaLNZero, {"dim": 8}), (nn.AdaLNFinal, {"dim": 8, "out_features": 4}), (nn.QKNormRope, {"heads": 2, "head_dim": 8}),
        (nn.PackedAttention, {"width": 16, "heads": 2}),
    ):  # fmt: skip
        found[f"nn.{module.__name__}"] = module, options
    found |= {
        "FSQ": (nn.FSQ([5, 4, 3], dim=7), {"z": draw(2, 4, 7)}),
        "LFQ": (nn.LFQ(dim=7, codebook_size=8), {"x": draw(2, 4, 7), "inv_temperature": 1.0}),
        "CausalConv3d": (nn.CausalConv3d(4, 4, 3), {"x": x, "state": draw(1, 4, 2, 4, 4), "return_state": False}),
        "AdaLNFinal": (nn.AdaLNFinal(8, 4), {"x": draw(2, 6, 8), "condition": draw(2, 8)}),
        "PackedAttention": (nn.PackedAttention(16, 2), {"x": draw(6, 16), "cu_seqlens": offsets, "max_seqlen": 4}),
        "QKNormRope": (nn.QKNormRope(2, 8, rotary=wan), {"q": draw(6, 2, 8), "k": draw(6, 2, 8), "positions": torch.zeros(6, 3)}),
        "RotaryConfig.cosmos": (nn.RotaryConfig.cosmos, {"head_dim": 24, "rope_scale": (2.0, 1.0, 1.0), "base_fps": 24.0}),
        "pack_plan": (packing.pack_plan, {"costs": (3.0, 4.0), "budget": 9.0, "method": "balanced", "ranks": 2}),
        "transformer_costs": (packing.transformer_costs, {"lengths": (3, 4), "width": 8, "mlp_ratio": 4.0}),
        "pack": (packing.pack, {"latents": [draw(4, 2, 4, 4)], "patch": (1, 2, 2), "order": "channels_first"}),
        "unpack": (packing.unpack, {"packed": pack, "tokens": pack.tokens}),
        "drop_tokens": (packing.drop_tokens, {"packed": pack, "rate": 0.5}),
        "restore_tokens": (packing.restore_tokens, {"packed": kept, "tokens": kept.tokens.double(), "fill": 0.0}),
        "pack_text": (packing.pack_text, {"states": draw(2, 4, 5), "lengths": (3, 4)}),
        "packed_mean": (packing.packed_mean, {"values": draw(6, 3), "cu_seqlens": offsets, "reduction": "sample"}),
        "RectifiedFlow": (sampling.RectifiedFlow, {"orientation": "t", "shift": 1.0, "time_scale": 1.0}),
        "interpolate": (flow.interpolate, {"data": x, "noise": x, "sigma": draw(1)}),
        "flow.sample": (flow.sample, {"model": lambda x, t: x, "noise": x, "steps": 2, "method": "heun"}),
        "GaussianDiffusion": (sampling.GaussianDiffusion, {"spec": (10, 5), "num_steps": 100}),
        "patch": (
            patch,
            {"model": torch.nn.Linear(2, 2), "ops": "auto", "mode": "auto", "backend": "auto", "strict": False,
             "tolerance": "default", "batch_modulation": False, "for_compile": False, "dry_run": True},
        ),
        "training_losses": (diffusion.training_losses, {"model": lambda x, t: x, "x0": x, "t": steps, "noise": x}),
    }  # fmt: skip
    return found


CALLS = calls()
# Losses may be of any real numbers, packs hold any tensors, rates and masks are what they say.
ACCEPTED = {("packed_mean", "values"), ("unpack", "tokens"), ("restore_tokens", "tokens"), ("pack_text", "states")}


@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_meant_is_refused_by_name(name: str) -> None:
    function, arguments = CALLS[name]
    with torch.no_grad():
        function(**arguments)
        for argument, value in arguments.items():
            for bad in wrong(value):
                if (name, argument) in ACCEPTED and isinstance(bad, Tensor):
                    continue
                try:
                    function(**{**arguments, argument: bad})
                except errors.VidkernelsError as error:
                    assert "expected" in str(error) or isinstance(error, errors.BackendUnavailable), (
                        f"{argument}: {error}"
                    )
                    continue
                except Exception as error:
                    pytest.fail(f"{name}: {argument}={bad!r:.60} ended in {type(error).__name__}: {error}")
                pytest.fail(f"{name}: {argument}={bad!r:.60} was accepted")


@pytest.mark.parametrize("make", [m.from_config for m in (VidTok, Latte, LatteT2V, STDiT3, Goku)])
def test_what_configures_no_model_is_refused(make: Callable[..., Any]) -> None:
    for bad in (None, 5, ["depth"], object(), {"no such key": 1}, "no such name"):
        with pytest.raises(errors.OptionError):
            make(bad)


def test_patterns_are_no_numbers_and_a_velocity_has_its_samples_shape() -> None:
    for bad in (5, [5], None):
        with pytest.raises(errors.OptionError, match="exclude: expected patterns"):
            patch(torch.nn.Linear(2, 2), exclude=bad, strict=False)
    for bad in (lambda x, t: x[:, :1], lambda x, t: (x,), lambda x, t: None):
        with pytest.raises(errors.VidkernelsError, match="model: expected"):
            sampling.RectifiedFlow().sample(bad, draw(2, 3, 4), 2)


def _windows(x: Tensor, rnd: random.Random) -> Tensor:
    """Values in overlapping memory, as `unfold` gives it: neighbours share elements, several axes may have stride 1."""
    steps = [rnd.choice((1, 2, x.shape[-1])) for _ in x.shape[:-1]] + [1]
    length = 1 + sum((size - 1) * step for size, step in zip(x.shape, steps, strict=True))
    return draw(length).to(x.dtype).as_strided(x.shape, steps)


def _permuted(x: Tensor, rnd: random.Random) -> Tensor:
    order = rnd.sample(range(x.ndim), x.ndim)
    return x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.ndim)])


def _offset(x: Tensor, rnd: random.Random) -> Tensor:
    """Behind one element of its storage, so at an address that no vector load takes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _within(x: Tensor, rnd: random.Random) -> Tensor:
    """A part of a larger tensor of NaN."""
    part = x.new_full([size + 2 for size in x.shape], float("nan"))[tuple(slice(1, 1 + size) for size in x.shape)]
    return part.copy_(x)


LAYOUTS = (_windows, _permuted, _offset, _within)
DIFFERENTIABLE = [sample for sample in samples(torch.device("cpu"), torch.float64) if "_to_" not in sample.op]


@pytest.mark.parametrize("sample", DIFFERENTIABLE, ids=lambda sample: sample.op)
def test_every_argument_in_an_odd_layout_of_its_own(sample: Any) -> None:
    """Results, gradients and cotangents; sliding windows were written as if their channels were neighbours."""
    rnd = random.Random(0)
    function = getattr(ops, sample.op)
    bound = inspect.signature(function).bind(*sample.args, **sample.kwargs).arguments
    names = [name for name, value in bound.items() if isinstance(value, Tensor) and value.is_floating_point()]
    for _ in range(8):
        moved = {name: rnd.choice(LAYOUTS)(bound[name], rnd) for name in names if bound[name].ndim}
        found = []
        for backend in ("auto", "reference"):
            leaves = {name: bound[name] for name in names} | moved
            leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
            outputs = function(**{**bound, **leaves}, backend=backend)
            outputs = [
                x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None and x.requires_grad
            ]
            state, cotangents = random.Random(1), []
            for x in outputs:
                cotangent = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
                cotangents.append(state.choice(LAYOUTS[1:])(cotangent, state) if x.ndim else cotangent)
            found.append((*outputs, *torch.autograd.grad(outputs, list(leaves.values()), cotangents)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_offsets_beyond_the_values_are_not_read() -> None:
    """The sum over segments trusts its lengths: this was a crash."""
    with pytest.raises(errors.ShapeError, match="^cu_seqlens: expected offsets from 0 to the 4 tokens of values"):
        packing.packed_mean(torch.randn(4, 3), torch.tensor([0, 2, 6000000], dtype=torch.int32))


def test_indices_of_bytes_are_no_mask() -> None:
    x0, diffusion = torch.randn(2, 4, 3, 4, 4), sampling.GaussianDiffusion("10")
    with pytest.raises(errors.DTypeError, match="^t: expected int32 or int64"):
        diffusion.add_noise(x0, torch.tensor([1, 0], dtype=torch.uint8), x0)


def test_long_values_are_shortened_in_messages() -> None:
    x, offsets = torch.randn(4, 8), torch.arange(100_000)
    with pytest.raises(errors.ShapeError) as caught:
        ops.adaln_modulate(x, torch.zeros(99_999, 8), None, cu_seqlens=offsets)
    assert len(str(caught.value)) < 1000


def test_results_go_only_into_memory_of_their_own() -> None:
    x, weight = torch.randn(1, 4, 3, 4, 4), torch.randn(4, 4, 1, 1, 1)
    with pytest.raises(errors.OptionError, match="^out: expected memory of its own"):
        ops.causal_conv3d(x, weight, out=torch.empty(12).as_strided(x.shape, (1, 1, 1, 1, 1)))
    q = torch.randn(20).unfold(0, 8, 2).unsqueeze(1)
    with pytest.raises(errors.OptionError, match="^inplace: expected False for an expanded q"):
        ops.qk_norm_rope(q, None, inplace=True)


def test_numbers_of_the_command_line(tmp_path: Path) -> None:
    for kind, texts in ((_options.positive, ("nan", "inf", "0", "-1", "x")), (_options.seed, (str(2**63), "1.5", "x"))):
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError, match="expected"):
                kind(text)
    assert _options.positive("0.5") == 0.5 and _options.seed("-1") == -1
    for options in ({"validation_clips": -1}, {"resize": 0}):
        with pytest.raises(errors.OptionError, match=f"^{next(iter(options))}"):
            ClipConfig(frames=1, size=(8, 8), **options)
    for number, content in enumerate((b"", b"{", b"\xff\xfe", b"[" * 100_000)):
        (tmp_path / f"{number}.json").write_bytes(content)
        with pytest.raises(errors.OptionError, match="^config: expected a JSON file"):
            read_json(tmp_path / f"{number}.json")
