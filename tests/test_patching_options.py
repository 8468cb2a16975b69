# SPDX-License-Identifier: Apache-2.0
"""The options of `patch` for whole models: `batch_modulation` and `for_compile`."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from helpers import assert_within_promise
from patching_suite import cast, no_fallback, output_of  # noqa: F401
from test_patching_dit import TestDiT as DiT
from test_patching_flux import TestFlux as Flux
from test_patching_mochi import TestMochi as Mochi
from test_patching_sd3 import TestSD35 as SD35
from torch import nn

import vidkernels
from vidkernels.errors import PatchError
from vidkernels.patching import _modulation

# Layers per model: two streams per block, less the last text norm of SD3 and Mochi; one in Flux's single blocks.
MODELS = [(SD35(), 3), (Flux(), 4), (Mochi(), 3)]


def count_linears(model: nn.Module, arguments: dict[str, Any]) -> int:
    """How many layers that project modulation are called."""
    calls: list[str] = []
    forward = nn.Linear.forward
    layers = {m for m in model.modules() if _modulation.is_batched(m)}
    try:
        nn.Linear.forward = lambda self, x: (calls.append("") if self in layers else None) or forward(self, x)
        output_of(model(**arguments))
    finally:
        nn.Linear.forward = forward
    return len(calls)


@pytest.mark.parametrize(("suite", "layers"), MODELS, ids=["sd35", "flux", "mochi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_product_for_all_blocks(suite: Any, layers: int, dtype: torch.dtype) -> None:
    model = suite.ready(**({"dual_attention_layers": ()} if isinstance(suite, SD35) else {})).to(dtype)
    arguments = {k: v if k == "image_rotary_emb" else v for k, v in cast(suite.inputs(), dtype).items()}
    double, state = copy.deepcopy(model).double(), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = output_of(model(**arguments))
        report = vidkernels.patch(model, batch_modulation=True)
        assert report.batched == layers and f"{layers} projections of modulation" in str(report)
        assert count_linears(model, arguments) == 0
        actual = output_of(model(**arguments))
        assert_within_promise(actual, expected, output_of(double(**cast(arguments, torch.float64))))
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[k], v) for k, v in state.items())


def ready() -> tuple[Any, dict[str, Any]]:
    suite = Flux()
    return suite.ready(), suite.inputs()


def test_gradients_and_autocast_and_inference_mode_project_by_block() -> None:
    model, arguments = ready()
    vidkernels.patch(model, batch_modulation=True)
    with torch.no_grad():
        expected = model(**arguments).sample
    assert count_linears(model, arguments) == 4
    plain = Flux().gradients(model, arguments)
    model.enable_gradient_checkpointing()
    again = Flux().gradients(model, arguments)
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    with torch.inference_mode():
        assert count_linears(model, arguments) == 4
        torch.testing.assert_close(model(**arguments).sample, expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert count_linears(model, arguments) == 4


def test_changed_weights_are_seen() -> None:
    """By an optimizer, by `load_state_dict`, by a cast and by assignment; the same condition twice included."""
    model, arguments = ready()
    vidkernels.patch(model, batch_modulation=True)
    block, layer = model.single_transformer_blocks[0], model.single_transformer_blocks[0].norm.linear
    inputs = (torch.randn(1, 4, 32), torch.randn(1, 3, 32), torch.randn(1, 32))
    with torch.no_grad():
        before = block(*inputs)[1]
        layer.weight.mul_(2)
        after = block(*inputs)[1]
        assert not torch.allclose(before, after)
        inputs[2].add_(1)
        moved = block(*inputs)[1]
        vidkernels.unpatch(model)
        torch.testing.assert_close(block(*inputs)[1], moved, atol=1e-5, rtol=1e-4)
        vidkernels.patch(model, batch_modulation=True)
        model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
        patched = model(**arguments).sample
        vidkernels.patch(model.double(), batch_modulation=True)
        wide = model(**cast(arguments, torch.float64)).sample
        torch.testing.assert_close(patched, wide.float(), atol=1e-5, rtol=1e-4)


def test_rows_of_a_warm_up_do_not_enter_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is called on static inputs, then captured on them: the graph must hold the projection, not its last result."""
    model, _ = ready()
    vidkernels.patch(model, batch_modulation=True)
    block, linear = model.single_transformer_blocks[0], torch.nn.functional.linear
    inputs, seen = (torch.randn(1, 4, 32), torch.randn(1, 3, 32), torch.randn(1, 32)), []

    def note(x, *rest):
        seen.append(x.shape)
        return linear(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", note)
    counts = []
    with torch.no_grad():
        for captured in (False, False, True, True, False):
            monkeypatch.setattr(_modulation, "is_captured", lambda x, captured=captured: captured)
            seen.clear()
            block(*inputs)
            counts.append(sum(shape == inputs[2].shape for shape in seen))
    assert counts == [1, 0, 1, 0, 1]


def test_a_condition_that_is_copied_between_blocks_switches_it_off() -> None:
    model, arguments = ready()
    vidkernels.patch(model, batch_modulation=True)
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.register_forward_pre_hook(_copy_condition, with_kwargs=True)
    bank = model.single_transformer_blocks[0].norm.linear.__dict__[_modulation._PLACE][0]
    with torch.no_grad():
        first, second = model(**arguments).sample, model(**arguments).sample
        assert bank._wasted == 2 and len(vidkernels.status(model).remarks) == 1
        vidkernels.unpatch(model)
        expected = model(**arguments).sample
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second, expected, atol=1e-5, rtol=1e-4)


def test_single_uses_between_shared_conditions_do_not_switch_it_off() -> None:
    """A block tried on its own now and then; two such calls in a row turn it off until the model runs again."""
    model, arguments = ready()
    vidkernels.patch(model, batch_modulation=True)
    bank = model.single_transformer_blocks[0].norm.linear.__dict__[_modulation._PLACE][0]
    with torch.no_grad():
        for _ in range(4):
            bank.take(0, torch.randn(1, 32))
            assert count_linears(model, arguments) == 0
        assert vidkernels.status(model).remarks == ()
        for _ in range(4):
            bank.take(0, torch.randn(1, 32))
        assert bank.take(0, torch.randn(1, 32)) is None
        assert "4 layers project one by one: their last conditions" in str(vidkernels.status(model))
        assert count_linears(model, arguments) == 2
        actual = model(**arguments).sample
        assert count_linears(model, arguments) == 0 and vidkernels.status(model).remarks == ()
        vidkernels.unpatch(model)
        expected = model(**arguments).sample
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def _copy_condition(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {key: value.clone() if key == "temb" else value for key, value in kwargs.items()}


def test_lora_and_hooks_on_a_projection_are_honoured() -> None:
    peft = pytest.importorskip("peft")
    model, arguments = ready()
    vidkernels.patch(model, batch_modulation=True)
    seen: list[int] = []
    with torch.no_grad():
        handle = model.transformer_blocks[0].norm1.linear.register_forward_hook(lambda m, i, o: seen.append(1))
        model(**arguments)
        assert seen == [1]
        handle.remove()
        plain = model(**arguments).sample
        config = peft.LoraConfig(target_modules=["norm1.linear"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)
        adapted = model(**arguments).sample
        assert not torch.allclose(plain, adapted, atol=1e-3)
        vidkernels.unpatch(model)
        torch.testing.assert_close(model(**arguments).sample, adapted, atol=1e-5, rtol=1e-4)


def test_copies_pickles_and_undo() -> None:
    model, arguments = ready()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    storages = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    vidkernels.patch(model, batch_modulation=True)
    with torch.no_grad():
        expected = model(**arguments).sample
        twin = copy.deepcopy(model)
        model.transformer_blocks[0].norm1.linear.weight.zero_()
        torch.testing.assert_close(twin(**arguments).sample, expected, atol=1e-5, rtol=1e-4)
        buffer = io.BytesIO()
        torch.save(twin, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        torch.testing.assert_close(loaded(**arguments).sample, expected, atol=1e-5, rtol=1e-4)
        with vidkernels.patching.unpatched(model):
            assert b"vidkernels" not in pickle.dumps(model)
        assert any(_modulation.is_batched(layer) for layer in layers)
        vidkernels.unpatch(model)
    assert not any(_modulation._PLACE in m.__dict__ for m in model.modules())
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == len(storages)


def test_nothing_keeps_the_model_alive() -> None:
    model, arguments = ready()
    vidkernels.patch(model, batch_modulation=True)
    with torch.no_grad():
        model(**arguments)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_models_without_a_shared_condition() -> None:
    model = DiT().ready()
    with pytest.raises(PatchError, match="no two blocks of this model project one condition"):
        vidkernels.patch(model, batch_modulation=True)
    assert vidkernels.status(model).patched == "none"
    assert vidkernels.patch(model, batch_modulation=True, strict=False).batched == 0


def test_a_second_patch_keeps_the_stack() -> None:
    model, _ = ready()
    assert vidkernels.patch(model, batch_modulation=True).batched == 4
    assert vidkernels.patch(model, batch_modulation=True).batched == 0
    assert _modulation.is_batched(model.single_transformer_blocks[0].norm.linear)


def test_weights_that_were_cast_are_stacked_again() -> None:
    model, arguments = ready()
    vidkernels.patch(model, batch_modulation=True)
    model.bfloat16()
    arguments = cast(arguments, torch.bfloat16)
    with torch.no_grad():
        assert count_linears(model, arguments) == 4
        assert vidkernels.patch(model, batch_modulation=True).batched == 4
        assert count_linears(model, arguments) == 0


def test_short_chains_are_left_to_inductor() -> None:
    model, _ = ready()
    explained = vidkernels.explain(model)
    entry = next(e for e in explained.entries if e.rule == "diffusers.adaln_continuous")
    assert entry.state == "patched" and entry.reason.startswith("Inductor alone would be as good: one norm")
    assert not any(e.reason for e in explained.entries if e.rule == "diffusers.flux_block")
    report = vidkernels.patch(model, for_compile=True, mode="inference")
    assert [(e.cls, e.reason.partition(":")[0]) for e in report.skipped] == [
        ("AdaLayerNormContinuous", "left to Inductor")
    ]
    assert type(model.norm_out).__name__ == "AdaLayerNormContinuous" and "vk:" not in repr(model.norm_out)
    vidkernels.unpatch(model)


@pytest.mark.parametrize(
    "options", [{"mode": "training"}, {"ops": ("diffusers.adaln_continuous", "diffusers.flux_block")}]
)
def test_training_and_named_rules_are_not_left_out(options: dict[str, Any]) -> None:
    model, _ = ready()
    report = vidkernels.patch(model, for_compile=True, **options)
    assert "diffusers.adaln_continuous" in {entry.rule for entry in report.patched}


def test_compiled_model_with_both_options() -> None:
    model, arguments = ready()
    with torch.no_grad():
        expected = model(**arguments).sample
        vidkernels.patch(model, for_compile=True, batch_modulation=True, mode="inference")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**arguments).sample, expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
