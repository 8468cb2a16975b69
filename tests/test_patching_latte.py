# SPDX-License-Identifier: Apache-2.0
"""diffusers' LatteTransformer3DModel and PixArt's blocks, patched against unpatched and against float64."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import patching_checks as checks
import pytest
import torch
from helpers import assert_within_promise
from patching_suite import no_fallback  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning

diffusers = pytest.importorskip("diffusers", minversion="0.42")
FRAMES = 4


def build(**changes: Any) -> Any:
    """A small Latte with every parameter at work."""
    options = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "attention_bias": True,
        "sample_size": 8,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": 10,
        "video_length": FRAMES,
    }
    return diffusers.LatteTransformer3DModel(**{**options, **changes}).eval()


def inputs(batch: int = 2, frames: int = FRAMES, height: int = 8, width: int = 6, tokens: int = 5) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, frames, height, width),
        "timestep": torch.arange(batch) * 137 + 11,
        "encoder_hidden_states": torch.randn(batch, tokens, 10),
    }


def wide(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in arguments.items()
    }


def check(model: Any, arguments: dict[str, Any]) -> None:
    """The patched model keeps the promise against the same weights in float64."""
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = model(**arguments).sample
        vidkernels.patch(model)
        actual = model(**arguments).sample
        assert actual.stride() == expected.stride()
        assert_within_promise(actual, expected, double(**wide(arguments, torch.float64)).sample)


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [
        ({}, {}),
        ({"norm_elementwise_affine": True, "norm_eps": 1e-5}, {"batch": 1}),
        ({"cross_attention_dim": None}, {}),
        ({"activation_fn": "geglu"}, {"batch": 1}),
        ({"video_length": 16}, {"frames": 1}),
    ],
    ids=["latte", "affine-norms", "no-caption-attention", "geglu", "image"],
)
def test_forward(changes: dict[str, Any], arguments: dict[str, Any]) -> None:
    check(build(**changes), inputs(**arguments))


def test_without_temporal_attention_and_as_a_tuple() -> None:
    model, arguments = build(), inputs()
    with torch.no_grad():
        expected = model(**arguments, enable_temporal_attentions=False, return_dict=False)
        vidkernels.patch(model)
        actual = model(**arguments, enable_temporal_attentions=False, return_dict=False)
    assert isinstance(actual, tuple)
    torch.testing.assert_close(actual[0], expected[0], atol=2e-6, rtol=1e-5)


def test_caption_mask_is_honoured() -> None:
    model, arguments = build(), inputs()
    bias = torch.zeros(2 * FRAMES, 1, 5)
    bias[:, :, 3:] = -10000.0
    with torch.no_grad():
        plain = model(**arguments).sample
        expected = model(**arguments, encoder_attention_mask=bias).sample
        assert not torch.allclose(plain, expected)
        vidkernels.patch(model)
        actual = model(**arguments, encoder_attention_mask=bias).sample
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)


def gradients(model: Any, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    leaves = {"hidden_states", "encoder_hidden_states"}
    arguments = {k: v.detach().requires_grad_() if k in leaves else v for k, v in arguments.items()}
    y = model(**arguments).sample
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    wanted = {**{k: arguments[k] for k in leaves}, **dict(model.named_parameters())}
    found = torch.autograd.grad((y * weight).sum(), list(wanted.values()), allow_unused=True)
    return {key: g for key, g in zip(wanted, found, strict=True) if g is not None}


def test_gradients() -> None:
    """L2 error of every gradient, at most twice the original's or a few roundings; that of a key bias is zero."""
    model, arguments = build(), inputs()
    truth = gradients(copy.deepcopy(model).double(), wide(arguments, torch.float64))
    before = gradients(model, arguments)
    vidkernels.patch(model, mode="training")
    after = gradients(model, arguments)
    assert after.keys() == before.keys() == truth.keys()
    for key, exact in truth.items():
        if not key.endswith("to_k.bias"):
            errors = [float((g[key].double() - exact).norm() / exact.norm()) for g in (before, after)]
            assert errors[1] <= 2 * errors[0] + 5e-7, f"{key}: {errors}"


def test_gradient_checkpointing() -> None:
    model, arguments = build(), inputs(batch=1)
    vidkernels.patch(model)
    plain = gradients(model, arguments)
    model.train()
    model.enable_gradient_checkpointing()
    again = gradients(model, arguments)
    assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_bfloat16() -> None:
    check(build().bfloat16(), wide(inputs(), torch.bfloat16))


def test_autocast() -> None:
    model, arguments = build(), inputs()
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        truth = double(**wide(arguments, torch.float64)).sample
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(**arguments).sample
            vidkernels.patch(model)
            actual = model(**arguments).sample
        assert_within_promise(actual, expected, truth)


def test_lora_on_attention_and_mlp_is_honoured() -> None:
    peft = pytest.importorskip("peft")
    model, arguments = build(), inputs()
    vidkernels.patch(model)
    with torch.no_grad():
        before = model(**arguments).sample
        targets = ["to_q", "to_k", "to_v", "to_out.0", "net.2", "net.0.proj"]
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets, init_lora_weights=False), model)
        after = model(**arguments).sample
        assert not torch.allclose(before, after, atol=1e-3)
        vidkernels.unpatch(model)
        torch.testing.assert_close(after, model(**arguments).sample, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "path",
    ["transformer_blocks.1", "transformer_blocks.0.attn1", "transformer_blocks.0.attn2", "transformer_blocks.1.norm2",
     "temporal_transformer_blocks.0.attn1", "temporal_transformer_blocks.1", "norm_out"],
)  # fmt: skip
def test_hooks_inside_fire(path: str) -> None:
    model, arguments, seen = build(), inputs(), []
    with torch.no_grad():
        expected = model(**arguments).sample
        vidkernels.patch(model)
        model.get_submodule(path).register_forward_hook(lambda m, i, o: seen.append(o))
        warnings.simplefilter("ignore", VidkernelsFallbackWarning)
        actual = model(**arguments).sample
    assert len(seen) == 1
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=1e-4)


def test_another_attention_processor_is_honoured() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model, arguments = build(), inputs()
    vidkernels.patch(model)
    with torch.no_grad():
        expected = model(**arguments).sample
        for block in [*model.transformer_blocks, *model.temporal_transformer_blocks]:
            block.attn1.set_processor(AttnProcessor())
        with pytest.warns(VidkernelsFallbackWarning, match="an attention uses AttnProcessor"):
            torch.testing.assert_close(model(**arguments).sample, expected, atol=5e-6, rtol=1e-4)


def test_chunked_feed_forward_goes_to_the_original() -> None:
    model, arguments = build(), inputs()
    vidkernels.patch(model)
    with torch.no_grad():
        expected = model(**arguments).sample
        for block in model.transformer_blocks:
            block.set_chunk_feed_forward(1, 0)
        with pytest.warns(VidkernelsFallbackWarning, match="feed-forward is chunked"):
            torch.testing.assert_close(model(**arguments).sample, expected, atol=5e-6, rtol=1e-4)


def test_blocks_sharded_on_their_own_still_run_fused() -> None:
    model = build()
    checks.runs_fused_when_sharded(model, inputs(), [*model.transformer_blocks, *model.temporal_transformer_blocks])


def test_compiles_without_graph_break_whole_and_by_block() -> None:
    model, arguments = build(num_layers=1), inputs()
    vidkernels.patch(model)
    with torch.no_grad():
        expected = model(**arguments).sample
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**arguments).sample, expected, atol=5e-6, rtol=1e-4)
        torch._dynamo.reset()
        model.transformer_blocks[0].compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(model(**arguments).sample, expected, atol=5e-6, rtol=1e-4)
    torch._dynamo.reset()


def test_verify_and_reports() -> None:
    model = build()
    report = vidkernels.patch(model, verify=True, mode="training")
    assert all(item.ok for item in report.numerics)
    assert str(report).splitlines()[0].endswith("LatteTransformer3DModel → adaln_zero+axial_attention (auto)")
    assert "4 × BasicTransformerBlock → adaln_zero (auto)" in str(report)
    report.undo()
    assert vidkernels.patch(model, verify=inputs(), mode="inference").numerics


def test_a_named_backend_serves_attention_over_time_too() -> None:
    model, arguments, called = build(), inputs(), set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(func.namespace)
            return func(*args, **(kwargs or {}))

    vidkernels.patch(model, backend="reference")
    with torch.no_grad(), Recorder():
        model(**arguments)
    assert "vidkernels" not in called
    vidkernels.patch(model, backend="auto")
    with torch.no_grad(), Recorder():
        model(**arguments)
    assert "vidkernels" in called


def test_other_norm_types_are_refused() -> None:
    model = build(norm_type="layer_norm", norm_elementwise_affine=True)
    report = vidkernels.explain(model)
    assert not report and "not ada_norm_single" in report.details()


def test_pixart_blocks() -> None:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=16, caption_channels=10, use_additional_conditions=False,
    ).eval()  # fmt: skip
    arguments = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 10),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = model(**arguments).sample
        assert len(vidkernels.patch(model).patched) == 2
        truth = double(**wide(arguments, torch.float64)).sample
        assert_within_promise(model(**arguments).sample, expected, truth)
