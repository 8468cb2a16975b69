# SPDX-License-Identifier: Apache-2.0
"""Latte and LatteT2V: published keys, the official implementation's outputs, diffusers' outputs, all variants."""

from __future__ import annotations

import pytest
import torch
from golden_rules import draw, fill_transformer, latte_golden, manifest

from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.transformers import Latte, LatteT2V

TOLERANCE = 1e-4


def latte_s2() -> Latte:
    return fill_transformer(Latte.from_config("Latte-S/2", input_size=16, num_frames=16, num_classes=101, variant=1))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= tolerance, f"largest difference {error:.2e}"


@pytest.mark.parametrize(
    "entry",
    ["Latte-XL/2|class101", "Latte-L/2|uncond", "Latte-B/2|class101", "Latte-S/8|uncond", "Latte-XL/2|extras78"],
)
def test_official_keys_and_shapes(entry: str) -> None:
    name, _, mode = entry.partition("|")
    changes = {"class101": {"num_classes": 101}, "uncond": {}, "extras78": {"text": True}}[mode]
    with torch.device("meta"):
        model = Latte.from_config(name, **changes)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == manifest("latte_official.json.gz")[
        entry
    ]


@torch.inference_mode()
def test_class_conditional_model_equals_official() -> None:
    stored, model = latte_golden("latte_s2_class_16.npz"), latte_s2()
    tokens = {}
    for index in (0, 1, 2, 3, 11):
        model.blocks[index].register_forward_hook(lambda _, __, output, index=index: tokens.__setitem__(index, output))
    x, t, y = draw("latte_s2_16/x", 2, 16, 4, 16, 16), torch.tensor([937, 41]), torch.tensor([5, 101])
    output = model(x, t, y)
    assert_near(model.t_embedder(t), stored["t_emb"])
    assert_near(model.y_embedder(y), stored["y_emb"])
    assert_near(model._embed(x)[0, 0], stored["tokens_embed_b0f0"])
    assert_near(tokens[0][1, 3], stored["block0_b1f3"])
    assert_near(tokens[1][1, :, 9], stored["block1_b1tok9"])
    assert_near(tokens[2][1, 3], stored["block2_b1f3"])
    assert_near(tokens[3][1, :, 9], stored["block3_b1tok9"])
    assert_near(tokens[11][0, :, 63], stored["block11_b0tok63"])
    assert_near(output, stored["out"])


@torch.inference_mode()
def test_guidance_equals_official() -> None:
    x = draw("latte_s2_16/xcfg", 1, 16, 4, 16, 16)
    output = latte_s2().forward_with_cfg(torch.cat([x, x]), torch.tensor([500, 500]), torch.tensor([23, 101]), 7.0)
    assert_near(output, latte_golden("latte_s2_class_16.npz")["cfg_out"], 7 * TOLERANCE)


def small(**changes) -> Latte:
    torch.manual_seed(0)
    size = {"depth": 4, "hidden_size": 64, "num_heads": 4, "input_size": 8, "num_frames": 4, "num_classes": 5}
    model = Latte.from_config({**size, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize("changes", [{"variant": v} for v in (1, 2, 3, 4)] + [{"conditioning": "all_tokens"}], ids=str)
def test_every_variant_mixes_space_and_time_and_trains(changes: dict) -> None:
    model = small(**changes)
    x, t, y = torch.randn(2, 4, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 4])
    output = model(x, t, y)
    assert output.shape == (2, 4, 8, 8, 8)
    output.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    moved = x.clone()
    moved[0, 0, :, 0, 0] += 1
    change = (model(moved, t, y) - output).detach().abs().amax((2, 3, 4))
    assert (change[0] > 0).all()
    assert (change[1] == 0).all()


@torch.inference_mode()
def test_images_beside_a_video_do_not_see_each_other() -> None:
    model = small()
    video, images = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 2, 4, 8, 8)
    t, y = torch.tensor([7]), torch.tensor([1])
    joint = model(torch.cat([video, images], 1), t, y, use_image_num=2, y_image=[torch.tensor([2, 3])])
    assert_near(joint[:, :4], model(video, t, y), 1e-5)
    changed = model(torch.cat([video + 1, images], 1), t, y, use_image_num=2, y_image=torch.tensor([[2, 3]]))
    assert torch.equal(changed[:, 4:], joint[:, 4:])


def test_a_fresh_model_predicts_zero_and_wrong_arguments_are_named() -> None:
    model = Latte.from_config(
        {"depth": 2, "hidden_size": 32, "num_heads": 2, "input_size": 8, "num_frames": 4, "num_classes": 5}
    ).eval()
    x, t = torch.randn(1, 4, 4, 8, 8), torch.tensor([3])
    assert not model(x, t, torch.tensor([1])).any()
    with pytest.raises(ShapeError, match=r"x: expected \[B, F, C, H, W\] = \(1, 4, 4, 8, 8\)"):
        model(torch.randn(1, 5, 4, 8, 8), t, torch.tensor([1]))
    with pytest.raises(OptionError, match="y: expected labels"):
        model(x, t)
    with pytest.raises(OptionError, match="Latte-{S,B,L,XL}"):
        Latte.from_config("Latte-M/2")


def test_checkpointing_keeps_gradients() -> None:
    model = small().train()
    gradients = []
    for enabled in (False, True):
        model.gradient_checkpointing = enabled
        model.zero_grad()
        torch.manual_seed(3)
        model(torch.ones(1, 4, 4, 8, 8), torch.tensor([3]), torch.tensor([1])).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("entry", "config"), [("latte-1 (XL/2, T2V)", "_config_latte1_xl2"), ("tiny", "_config_tiny")])
def test_text_model_keys(entry: str, config: str) -> None:
    stored = manifest("latte_diffusers.json.gz")
    with torch.device("meta"):
        model = LatteT2V.from_config(stored[config])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == stored[entry]


@pytest.mark.parametrize(
    ("frames", "side", "mask", "temporal"),
    [(5, 8, None, True), (1, 8, None, True), (5, 12, None, True), (5, 8, "bias", True), (5, 8, None, False)],
    ids=["native", "image", "larger", "masked", "spatial only"],
)
@torch.inference_mode()
def test_text_model_equals_diffusers(frames: int, side: int, mask: str | None, temporal: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = manifest("latte_diffusers.json.gz")["_config_tiny"]
    theirs = fill_transformer(diffusers.LatteTransformer3DModel(**config))
    ours = LatteT2V.from_config(config)
    ours.load_state_dict({**theirs.state_dict(), "caption_projection.y_embedding": torch.zeros(120, 32)})
    x, caption, t = torch.randn(2, 4, frames, side, side), torch.randn(2, 7, 32), torch.tensor([500, 20])
    keep = torch.ones(2, 7)
    keep[:, 5:] = 0
    bias = None if mask is None else ((1 - keep) * -10000.0)[:, None].repeat_interleave(frames, 0)
    options = {"enable_temporal_attentions": temporal}
    expected = theirs(x, t, encoder_hidden_states=caption, encoder_attention_mask=bias, **options).sample
    assert_near(ours(x, t, caption, encoder_attention_mask=bias, **options), expected, 1e-5)
    if mask is not None:
        assert_near(ours(x, t, caption, encoder_attention_mask=keep), expected, 1e-5)
