# SPDX-License-Identifier: Apache-2.0
"""Transformers beyond the golden files: odd sizes, images beside videos, conditions of every kind, autocast, full-graph
compilation, step caches, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_rules import manifest
from torch import Tensor, nn
from transformer_cases import GOKU, KINDS, ODD, SIZES, every_model, filled, goku_inputs, pixels, segment, stdit3

from benchmarks import memory
from benchmarks.official import OfficialSTDiT3, stdit3_positions
from vidkernels.caching import adacache
from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.transformers import Goku, Latte, LatteT2V
from vidkernels.models.transformers._parts import Mlp


@pytest.mark.parametrize(
    ("latents", "size", "fps"),
    [
        ((5, 12, 16), (96, 128), 24.0),
        ((3, 4, 18), (256, 1152), 8.0),
        ((1, 10, 6), (80, 48), 120.0),
        ((7, 2, 2), (512, 512), 1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("clean", [None, "first", "all", "some"])
@torch.inference_mode()
def test_stdit3_at_many_sizes_with_clean_frames(latents: tuple, size: tuple, fps: float, clean: str | None) -> None:
    model = stdit3()
    width = model.config.hidden_size
    x, y = torch.randn(2, 4, *latents, dtype=torch.float64), torch.randn(2, 1, 20, 32, dtype=torch.float64)
    t = torch.tensor([731.5, 88.0])
    x_mask = None
    if clean is not None:
        x_mask = torch.ones(2, latents[0], dtype=torch.bool)
        x_mask[0 if clean == "some" else slice(None), slice(None) if clean == "all" else slice(1)] = False
        x_mask[1, -1] &= clean != "some"
    table = stdit3_positions((latents[1] // 2, latents[2] // 2), size, width)
    expected = OfficialSTDiT3(model)(x, t, y, torch.tensor([fps]), table, x_mask)
    output = model(x, t, y, x_mask=x_mask, **pixels(*size, fps))
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_stdit3_rows_of_a_batch_are_independent() -> None:
    """Each row with its own caption length, clean frames and rate equals that row alone; padding and hidden text do not count."""
    model, lengths = stdit3(), (20, 7, 1)
    x, y = torch.randn(3, 4, 5, 9, 11, dtype=torch.float64), torch.randn(3, 1, 20, 32, dtype=torch.float64)
    t, fps = torch.tensor([900.0, 500.0, 0.0]), torch.tensor([24.0, 8.0, 60.0])
    mask = (torch.arange(20) < torch.tensor(lengths)[:, None]).int()
    x_mask = torch.ones(3, 5, dtype=torch.bool)
    x_mask[0, 0] = x_mask[2, 2:] = False
    sizes = {"height": torch.tensor([72.0]), "width": torch.tensor([88.0])}
    output = model(x, t, y, mask, x_mask, fps, **sizes)
    for i, length in enumerate(lengths):
        row = slice(i, i + 1)
        alone = model(x[row], t[row], y[row, :, :length], None, x_mask[row], fps[row], **sizes)
        torch.testing.assert_close(output[row], alone, rtol=1e-5, atol=1e-5)
    padded = model(F.pad(x, (0, 1, 0, 1)), t, y, mask, x_mask, fps, **sizes)
    torch.testing.assert_close(padded[..., :9, :11], output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@torch.inference_mode()
def test_text_latte_with_images_beside_the_video(masked: bool) -> None:
    """The video is as alone; an image is as a clip of one frame, which has no temporal blocks' neighbours here."""
    config = manifest("latte_diffusers.json.gz")["_config_tiny"]
    model = filled(LatteT2V.from_config(config))
    frames, images = model.config.video_length, 2
    x = torch.randn(2, 4, frames + images, 8, 12, dtype=torch.float64)
    caption, t = torch.randn(2, 1 + images, 7, 32, dtype=torch.float64), torch.tensor([500, 20])
    mask = torch.ones(2, 1 + images, 7)
    mask[0, 0, 5:] = mask[1, 2, 2:] = 0
    given = {"encoder_attention_mask": mask} if masked else {}
    joint = model(x, t, caption, use_image_num=images, **given)
    keep = {"encoder_attention_mask": mask[:, 0]} if masked else {}
    torch.testing.assert_close(joint[:, :, :frames], model(x[:, :, :frames], t, caption[:, 0], **keep))
    for i in range(images):
        keep = {"encoder_attention_mask": mask[:, 1 + i]} if masked else {}
        alone = model(x[:, :, frames + i, None], t, caption[:, 1 + i], enable_temporal_attentions=False, **keep)
        torch.testing.assert_close(joint[:, :, frames + i, None], alone)
    with pytest.raises(ShapeError, match="encoder_hidden_states: expected 4 dimensions"):
        model(x, t, caption[:, 0], use_image_num=images)
    with pytest.raises(ShapeError, match="hidden_states: expected 1 or 5 frames and 3 images"):
        model(x, t, torch.cat([caption, caption[:, :1]], 1), use_image_num=3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["text", "classes", "image to video"])
@torch.inference_mode()
def test_goku_packs_of_one_to_five(kind: str, count: int) -> None:
    """Prompts of one token, as the encoder makes of the empty string, and of none."""
    texts = {"text_channels": None, "num_classes": 4} if kind == "classes" else {"text_channels": 24}
    model = filled(Goku.from_config({**GOKU, **texts, "image_condition": kind == "image to video"}))
    prompts = None if kind == "classes" else (1, 7, 0, 1, 5)[:count]
    inputs = goku_inputs(SIZES[:count], prompts, kind == "image to video", torch.float64)
    output = model(**inputs)
    torch.testing.assert_close(output, torch.cat([model(**segment(inputs, i)) for i in range(count)]))
    if kind == "image to video":
        moved = model(**{**inputs, "condition": inputs["condition"] + 1})
        assert ((moved - output).abs().amax(1) > 0).all()
        with pytest.raises(OptionError, match="condition: expected the first frame"):
            model(**{**inputs, "condition": None})


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_and_trains(kind: str) -> None:
    model, arguments = every_model()[kind]
    with torch.no_grad():
        expected = model(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**arguments)
    assert (
        output.detach() - expected
    ).norm() < 0.03 * expected.norm()  # a few roundings of 2^-9 through two or three blocks
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_step_caches_serve_every_model(kind: str) -> None:
    """Also where images are set aside in some of the blocks."""
    model, arguments = every_model()[kind]
    name = "timestep" if "timestep" in arguments else "t"

    def run(step: int) -> Tensor:
        return model(
            **{**arguments, name: torch.full_like(arguments[name], 0.9 - 0.05 * step) * (1 if kind == "goku" else 1000)}
        )

    plain = [run(step) for step in range(6)]
    with adacache(model, 6, codebook=((1e9, 2),)) as handle:
        cached = [run(step) for step in range(6)]
    assert handle.report().computed_steps == (1, 2, 4, 5, 6)
    assert [torch.equal(a, b) for a, b in zip(plain, cached, strict=True)] == [True, True, False, True, True, True]
    assert (cached[2] - plain[2]).norm() < 1.2 * (plain[2] - plain[1]).norm()


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in (KINDS[0], "stdit3", "goku") else [pytest.mark.slow]) for k in KINDS]
)
@torch.no_grad()
def test_whole_models_compile_as_one_graph(kind: str) -> None:
    model, arguments = every_model()[kind]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**arguments), model(**arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("kind", [*KINDS[:4], "goku"])
def test_modulation_of_all_blocks_in_one_product(kind: str, images: int) -> None:
    """Same outputs and gradients, same parameters; one product a step, and none in steps that a cache skips."""
    model, arguments = every_model()[kind]
    if kind != "goku" and not images:
        arguments = {**arguments, "x": arguments["x"][:, :3], "use_image_num": 0}
    parameters, keys = list(model.parameters()), list(model.state_dict())
    results, conditions = [], []

    def counted(condition: Tensor) -> tuple[Tensor, ...]:
        conditions.append(condition)
        return product(condition)

    for batched in (False, True):
        if batched:
            model.batch_modulation()
            product, model._projection = model._projection, counted
        for checkpointing in (False, True):
            model.train().gradient_checkpointing = checkpointing
            torch.manual_seed(3)  # labels are dropped in training
            output = model(**arguments)
            gradients = torch.autograd.grad(output.square().mean(), [p for p in parameters if p.requires_grad])
            results.append((output.detach(), *gradients))
    assert len(conditions) == 2 and product.packed
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with torch.no_grad(), adacache(model.eval(), 6, codebook=((1e9, 2),)):
        for _ in range(6):
            model(**arguments)
    assert len(conditions) == 2 + 5
    model._projection = product
    moved = model.double()
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    assert torch.isfinite(moved(**wide)).all() and not product.packed  # every block for itself


def test_blocks_without_modulation_cannot_batch_it() -> None:
    with pytest.raises(OptionError, match="conditioning: expected 's_adaln' to batch modulation"):
        Latte.from_config({**ODD, "conditioning": "all_tokens"}).batch_modulation()


def test_inference_activates_in_place_and_hooks_keep_what_they_saw() -> None:
    mlp = Mlp(8, 32)
    x = torch.randn(4, 8)
    expected = mlp(x).detach()
    with torch.no_grad():
        assert torch.equal(mlp(x), expected)
        seen: list[Tensor] = []
        mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output))
        assert torch.equal(mlp(x), expected)
        assert torch.equal(seen[0], F.linear(x, mlp.fc1.weight, mlp.fc1.bias))


def test_hooks_of_the_process_and_wrapped_forwards_keep_what_they_saw() -> None:
    mlp, x, seen = Mlp(8, 32), torch.randn(4, 8), []
    expected = F.linear(x, mlp.fc1.weight, mlp.fc1.bias)
    with torch.no_grad():
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(output))
        try:
            mlp(x)
        finally:
            handle.remove()
        forward = mlp.fc1.forward
        mlp.fc1.forward = lambda x: seen.append(forward(x)) or seen[-1]
        mlp(x)
    assert torch.equal(seen[0], expected) and torch.equal(seen[-1], expected)


def test_inference_holds_the_widest_tensor_once() -> None:
    """The MLP's hidden tensor exists once, beside the result."""
    mlp, tokens = Mlp(64, 256), torch.randn(4096, 64)
    with torch.no_grad():
        peak = memory.peak_bytes(lambda: mlp(tokens), torch.device("cpu"))
    assert peak <= 4096 * (256 + 64) * 4 * 1.05, peak


def test_wrong_conditions_are_named() -> None:
    goku, arguments = every_model()["goku"]
    stdit, video = every_model()["stdit3"]
    cases: list[tuple[nn.Module, dict[str, Any], type[Exception], str]] = [
        (goku, {**arguments, "labels": torch.tensor([1, 2, 3])}, OptionError, "labels: expected None: no classes"),
        (goku, {**arguments, "condition": None}, OptionError, "condition: expected the first frame's tokens, got None"),
        (goku, {**arguments, "condition": torch.zeros(3, 16)}, ShapeError, "condition: expected shape"),
        (goku, {**arguments, "text": torch.zeros(10, 5)}, ShapeError, "text: expected shape"),
        (goku, {**arguments, "text_cu_seqlens": torch.zeros(2)}, ShapeError, "text_cu_seqlens: expected shape"),
        (goku, {**arguments, "positions": torch.zeros(7, 3)}, ShapeError, "positions: expected shape"),
        (
            stdit,
            {**video, "mask": torch.ones(1, 7)},
            ShapeError,
            r"mask: expected \[B or a divisor of it, L\] = \[2, 20\]",
        ),
        (stdit, {**video, "mask": torch.ones(3, 20)}, ShapeError, "mask: expected"),
        (stdit, {**video, "x_mask": torch.ones(2, 4)}, ShapeError, "x_mask: expected shape"),
        (stdit, {**video, "timestep": torch.zeros(1)}, ShapeError, "timestep: expected shape"),
        (stdit, {**video, "fps": torch.zeros(3)}, ShapeError, r"fps: expected \[1\] or \[B\]"),
    ]
    for model, given, error, message in cases:
        with pytest.raises(error, match=message):
            model(**given)
