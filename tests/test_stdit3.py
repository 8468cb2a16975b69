# SPDX-License-Identifier: Apache-2.0
"""STDiT3: published keys and the official implementation's outputs."""

from __future__ import annotations

import pytest
import torch
from golden_rules import draw, fill_transformer, latte_golden, manifest

from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.transformers import STDiT3

TOLERANCE = 1e-4


def tiny() -> STDiT3:
    return fill_transformer(STDiT3.from_config(manifest("stdit3.json.gz")["_tiny_config"]))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= tolerance, f"largest difference {error:.2e}"


def inputs(rows: int = 2) -> dict[str, torch.Tensor]:
    mask = torch.zeros(2, 20)
    mask[0, :11], mask[1, :7] = 1, 1
    return {
        "x": draw("stdit3/x", 2, 4, 5, 12, 16),
        "timestep": torch.tensor([731.5, 88.0]),
        "y": draw("stdit3/y", 2, 1, 20, 32),
        "mask": mask[:rows],
        "fps": torch.tensor([24.0, 24.0])[:rows],
        "height": torch.tensor([96.0, 96.0]),
        "width": torch.tensor([128.0, 128.0]),
    }


@pytest.mark.parametrize("name", ["STDiT3-XL/2", "STDiT3-3B/2"])
def test_published_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        model = STDiT3.from_config(name)
    stored = manifest("stdit3.json.gz")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == stored[name]


@torch.inference_mode()
def test_plain_forward_and_probes_equal_official() -> None:
    stored, model, seen = latte_golden("stdit3_tiny.npz"), tiny(), {}
    for name in ("spatial_blocks", "temporal_blocks"):
        for index in (0, 1):
            hook = lambda _, __, output, key=(name, index): seen.__setitem__(key, output)  # noqa: E731
            getattr(model, name)[index].register_forward_hook(hook)
    assert_near(model(**inputs(), num_frames=torch.tensor([51])), stored["A_out"])
    assert_near(seen["spatial_blocks", 0][1].flatten(0, 1), stored["A_spatial0_b1"])
    assert_near(seen["temporal_blocks", 0][1].flatten(0, 1), stored["A_temporal0_b1"])
    assert_near(seen["temporal_blocks", 1][0].flatten(0, 1), stored["A_temporal1_b0"])


@torch.inference_mode()
def test_conditioning_frames_equal_official() -> None:
    x_mask = torch.ones(2, 5, dtype=torch.bool)
    x_mask[0, 0] = x_mask[1, 0] = x_mask[1, 1] = False
    assert_near(tiny()(**inputs(), x_mask=x_mask), latte_golden("stdit3_tiny.npz")["B_out"])


@torch.inference_mode()
def test_odd_sizes_equal_official() -> None:
    given = inputs()
    output = tiny()(
        draw("stdit3/x_odd", 1, 4, 3, 9, 11),
        torch.tensor([500.0]),
        given["y"][:1],
        given["mask"][:1],
        fps=torch.tensor([24.0]),
        height=torch.tensor([72.0]),
        width=torch.tensor([88.0]),
    )
    assert_near(output, latte_golden("stdit3_tiny.npz")["C_out"])


@torch.inference_mode()
def test_no_mask_and_a_shared_mask_equal_official() -> None:
    stored, model = latte_golden("stdit3_tiny.npz"), tiny()
    assert_near(model(**{**inputs(), "mask": None}), stored["D_out"])
    assert_near(model(**inputs(rows=1)), stored["E_out"])


def test_a_caption_mask_needs_no_look_at_its_values() -> None:
    """On a GPU reading the captions' lengths would stop every step; a graph, and the meta device, cannot read them at all."""
    model, given = tiny().double().train().requires_grad_(True), inputs()
    given["mask"] = torch.zeros(2, 20)
    given["mask"][0, [0, 2, 3, 9, 17]], given["mask"][1, :19] = 1, 1
    model.y_embedder.dropout_prob = 0.0
    plain = model(**given)
    plain.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)(**given)
    torch.testing.assert_close(traced, plain)
    traced.square().mean().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)
    on_meta = {name: value.to("meta") for name, value in given.items()}
    assert model.to("meta")(**on_meta).shape == plain.shape


def test_gradients_reach_every_parameter() -> None:
    model = tiny().train()
    model(**inputs()).square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(OptionError, match="config: expected one of STDiT3-XL/2"):
        STDiT3.from_config("STDiT3-S/2")
    with pytest.raises(OptionError, match="config: expected keys among"):
        STDiT3.from_config({"depths": 2})
    with pytest.raises(OptionError, match="fps: expected a tensor"):
        tiny()(**{**inputs(), "fps": None})
    with pytest.raises(ShapeError, match="x: expected 5 dimensions"):
        tiny()(**{**inputs(), "x": torch.zeros(4, 5, 12, 16)})


@torch.inference_mode()
def test_a_bfloat16_model_rounds_its_timesteps_as_trained() -> None:
    model, given = tiny().bfloat16(), inputs()
    rounded = {**given, "timestep": given["timestep"].bfloat16()}  # 731.5 is 732 there
    assert torch.equal(model(**given), model(**rounded))
    assert not torch.equal(tiny()(**given), tiny()(**{**given, "timestep": rounded["timestep"].float()}))
