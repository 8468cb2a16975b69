# SPDX-License-Identifier: Apache-2.0
"""diffusers' video VAEs, patched against unpatched and against float64, on small configurations."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import vae_cases as cases
from patching_suite import no_fallback  # noqa: F401
from test_patching_vidtok import LiveBytes

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning

pytest.importorskip("diffusers", minversion="0.42")
NAMES = list(cases.VAES)


def quickly(*quick: Any, among: Sequence[Any] = NAMES) -> list[Any]:
    """All parameters; those that are not named run with the slow tests."""
    return [
        pytest.param(
            *(given if isinstance(given, tuple) else (given,)), marks=() if given in quick else pytest.mark.slow
        )
        for given in among
    ]


LENGTHS = [(name, frames) for name, case in cases.VAES.items() for frames in case.frames]
PARTS = [(name, part) for name, case in cases.VAES.items() for part in case.parts]
ADAPTED = [name for name in NAMES if cases.VAES[name].adapter]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "frames"), quickly(*((name, case.frames[1]) for name, case in cases.VAES.items()), among=LENGTHS)
)
def test_lengths(name: str, frames: int) -> None:
    cases.check(cases.build(name), cases.clip(name, frames))


@pytest.mark.parametrize("name", quickly("wan2.1", "cogvideox"))
def test_batches_slicing_and_uneven_sides(name: str) -> None:
    model = cases.build(name)
    if cases.VAES[name].slicing:
        model.enable_slicing()
    cases.check(model, cases.clip(name, cases.VAES[name].frames[1], batch=2, wider=1))
    assert vidkernels.status(model).patched == "all"


@pytest.mark.parametrize("name", quickly("wan2.1"))
def test_tiled(name: str) -> None:
    model = cases.build(name)
    cases.enable_tiling(name, model)
    cases.check(model, cases.clip(name, cases.VAES[name].frames[1], wider=1))


@pytest.mark.parametrize("name", quickly("wan2.1"))
def test_layout_of_the_input(name: str) -> None:
    x = cases.clip(name, cases.VAES[name].frames[1], batch=cases.VAES[name].batch)
    for laid_out in (x.contiguous(memory_format=torch.channels_last_3d), x.transpose(3, 4)):
        before = laid_out.clone()
        cases.check(cases.build(name), laid_out)
        assert torch.equal(laid_out, before), "the input was written to"


@pytest.mark.parametrize("name", quickly("wan2.1", "hunyuan"))
def test_bfloat16(name: str) -> None:
    model, x = cases.build(name), cases.clip(name, cases.VAES[name].frames[1])
    shape = cases.latents(model, x).shape
    model, x = model.bfloat16(), x.bfloat16()
    models = copy.deepcopy(model), model, cases.in_double(model)
    vidkernels.patch(model)
    with torch.no_grad():
        if name != "cosmos":  # whose average pooling has no bfloat16 on CPUs upstream
            cases.check_call(cases.encode, models, x, "encoded")
        cases.check_call(cases.decode, models, torch.randn(shape).bfloat16(), "decoded")
        assert cases.encode(model, x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", quickly("wan2.1", "ltx"))
def test_gradients(name: str) -> None:
    model, x = cases.build(name), cases.clip(name, cases.VAES[name].frames[1])
    truth = cases.gradients(cases.in_double(model), x.double())
    inputs = x, cases.nudged(x), cases.nudged(x)
    originals = [cases.gradients(model, given) for given in inputs]
    vidkernels.patch(model, mode="training")
    cases.assert_gradients_agree(originals, [cases.gradients(model, given) for given in inputs], truth)


@pytest.mark.parametrize("name", quickly("wan2.1", "cogvideox"))
def test_autocast(name: str) -> None:
    model, x = cases.build(name), cases.clip(name, cases.VAES[name].frames[1])
    original, double = copy.deepcopy(model), cases.in_double(model)
    vidkernels.patch(model)
    with torch.no_grad():
        for call, given in ((cases.encode, x), (cases.decode, cases.latents(original, x))):
            with torch.autocast("cpu", torch.bfloat16):
                expected, actual = call(original, given), call(model, given)
            cases.assert_within_promise(actual, expected, call(double, given.double()), call.__name__)


@pytest.mark.parametrize("name", quickly("qwenimage", "cosmos", "magvit"))
def test_verify_state_copies_and_undo(name: str) -> None:
    model, x = cases.build(name), cases.clip(name, cases.VAES[name].frames[1])
    classes, state = [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = cases.encode(model, x)
        report = vidkernels.patch(model, verify=True)
        assert all(item.ok for item in report.numerics) and len(report.numerics) > 4
        actual = cases.encode(model, x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(cases.encode(other, x), actual)
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        report.undo()
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(cases.encode(model, x), expected)


@pytest.mark.parametrize(
    ("name", "part"), quickly(*((name, case.parts[0]) for name, case in cases.VAES.items() if case.parts), among=PARTS)
)
def test_hooks_inside_fire_and_the_rest_stays_fused(name: str, part: str) -> None:
    model, x, seen = cases.build(name), cases.clip(name, cases.VAES[name].frames[1]), []
    with torch.no_grad():
        expected = cases.decode(model, cases.latents(model, x))
        vidkernels.patch(model)
        model.get_submodule(part).register_forward_hook(lambda module, inputs, output: seen.append(output))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VidkernelsFallbackWarning)
            actual = cases.decode(model, cases.latents(model, x))
    assert seen
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.parametrize("name", quickly("wan2.1", "hunyuan", among=ADAPTED))
def test_lora_on_one_convolution_is_honoured(name: str) -> None:
    import peft

    model, x = cases.build(name), cases.clip(name, cases.VAES[name].frames[1])
    vidkernels.patch(model)
    config = peft.LoraConfig(target_modules=[cases.VAES[name].adapter], init_lora_weights=False)
    with torch.no_grad():
        z = cases.latents(model, x)
        before = cases.decode(model, z)
        peft.inject_adapter_in_model(config, model.decoder)
        with pytest.warns(VidkernelsFallbackWarning, match="peft"):
            after = cases.decode(model, z)
        assert not torch.allclose(before, after)
        vidkernels.unpatch(model)
        torch.testing.assert_close(after, cases.decode(model, z), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", quickly("wan2.1"))
def test_networks_compile_without_graph_break(name: str) -> None:
    model, x = cases.build(name), cases.clip(name, 1)
    vidkernels.patch(model)
    with torch.no_grad():
        seen: list[tuple[object, ...]] = []
        handle = model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VidkernelsFallbackWarning)
            model.encode(x)
        handle.remove()
        given = seen[0]
        expected = torch.utils._pytree.tree_leaves(model.encoder(*given))[0]
        if hasattr(model, "_clear_conv_cache"):
            model._clear_conv_cache()
        torch._dynamo.reset()
        compiled = torch.compile(model.encoder, backend="aot_eager", fullgraph=True)
        actual = torch.utils._pytree.tree_leaves(compiled(*given))[0]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", quickly("hunyuan", among=["hunyuan", "cogvideox", "ltx0.9.5", "cosmos", "hunyuan1.5", "mochi"])
)
def test_gradient_checkpointing(name: str) -> None:
    model, x = cases.build(name), cases.clip(name, cases.VAES[name].frames[1])
    vidkernels.patch(model)
    plain = cases.gradients(model, x)
    model.train()
    model.enable_gradient_checkpointing()
    again = cases.gradients(model, x)
    assert plain.keys() == again.keys() and all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize(("name", "limit"), [("wan2.1", 0.85), ("hunyuan", 0.8), ("cogvideox", 0.8), ("magvit", 0.85)])
def test_peak_memory(name: str, limit: float) -> None:
    """No padded, concatenated, upsampled or separately activated tensor: a block needs three tensors instead of five."""
    model = cases.build(name)
    original = copy.deepcopy(model)
    vidkernels.patch(model)
    x = torch.randn(1, 3, cases.VAES[name].frames[1], 64, 64)

    def peak(network: Any, call: Any, given: torch.Tensor) -> int:
        with LiveBytes() as live:
            call(network, given)
        return live.peak

    with torch.no_grad():
        for call, given in ((cases.encode, x), (cases.decode, cases.latents(original, x))):
            assert peak(model, call, given) < limit * peak(original, call, given), call.__name__


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "frames", "side"),
    [
        ("AutoencoderKLQwenImage", 5, 32),
        ("AutoencoderKLHunyuanVideo", 5, 32),
        ("AutoencoderKLCogVideoX", 9, 32),
        ("AutoencoderKLCosmos", 9, 64),
        ("AutoencoderKLMagvit", 5, 32),
    ],
)
def test_default_configurations(model: str, frames: int, side: int) -> None:
    import diffusers

    cases.check(getattr(diffusers, model)().eval(), torch.rand(1, 3, frames, side, side) * 2 - 1)


@pytest.mark.parametrize(
    ("name", "part"),
    [("magvit", "decoder.mid_block.convs.0.shortcut"), ("cosmos", "decoder.mid_block.resnets.0.conv_shortcut")],
)
def test_hooks_on_shortcuts_that_do_nothing(name: str, part: str) -> None:
    """An `Identity` is read past like the other children, so whatever sits on it counts."""
    model = cases.build(name)
    latents = torch.randn(cases.latents(model, cases.clip(name, cases.VAES[name].frames[0])).shape)
    patched = copy.deepcopy(model)
    vidkernels.patch(patched)
    results = []
    for candidate in (model, patched):
        candidate.get_submodule(part).register_forward_hook(lambda module, args, output: 1.3 * output)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", VidkernelsFallbackWarning)
            results.append(cases.decode(candidate, latents))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox", "magvit", "mochi"])
def test_blocks_with_another_activation_are_left_out_and_layers_served(name: str) -> None:
    """Refused when the model is patched, with the reason, so that no call falls back."""
    model = cases.build(name, act_fn="relu")
    original, x = copy.deepcopy(model), cases.clip(name, cases.VAES[name].frames[1])
    report = vidkernels.patch(model)
    refused = [entry for entry in report.entries if entry.reason == "its activation is ReLU, not SiLU"]
    assert refused and report.patched
    with torch.no_grad():
        expected = cases.encode(original, x)
        torch.testing.assert_close(cases.encode(model, x), expected, atol=2e-4, rtol=1e-3)
    assert not vidkernels.status(model).fallbacks
