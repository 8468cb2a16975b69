# SPDX-License-Identifier: Apache-2.0
"""Goku: parameter counts of the paper, a naive transcription of its block, and packed against one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.transformers import Goku

SMALL = {"depth": 2, "hidden_size": 64, "num_heads": 2, "in_channels": 4, "text_channels": 24, "axes": (8, 12, 12)}


def model(**changes) -> Goku:
    torch.manual_seed(0)
    made = Goku.from_config({**SMALL, **changes}).double()
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def grid(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width))


def offsets(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def pack(sizes: list[tuple[int, int, int]], prompts: list[int]) -> dict:
    lengths = [t * h * w for t, h, w in sizes]
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "tokens": draw(sum(lengths), 16),
        "t": torch.linspace(0.1, 0.9, len(sizes), dtype=torch.float64),
        "cu_seqlens": offsets(lengths),
        "max_seqlen": max(lengths),
        "positions": torch.cat([grid(*size) for size in sizes]),
        "text": draw(sum(prompts), 24),
        "text_cu_seqlens": offsets(prompts),
        "text_max_seqlen": max(prompts),
    }


def one(packed: dict, index: int) -> dict:
    a, b = packed["cu_seqlens"][index : index + 2].tolist()
    c, d = packed["text_cu_seqlens"][index : index + 2].tolist()
    return {
        "tokens": packed["tokens"][a:b],
        "t": packed["t"][index : index + 1],
        "cu_seqlens": offsets([b - a]),
        "max_seqlen": b - a,
        "positions": packed["positions"][a:b],
        "text": packed["text"][c:d],
        "text_cu_seqlens": offsets([d - c]),
        "text_max_seqlen": d - c,
    }


@pytest.mark.parametrize(("name", "billions"), [("goku-2b", 2.005), ("goku-8b", 8.055), ("goku-1b", 0.669)])
def test_blocks_have_the_papers_parameters(name: str, billions: float) -> None:
    with torch.device("meta"):
        blocks = Goku.from_config(name).blocks
    assert round(sum(p.numel() for p in blocks.parameters()) / 1e9, 3) == billions


def test_released_key_names() -> None:
    keys = {key.removeprefix("blocks.0.") for key in model().state_dict() if key.startswith("blocks.0.")}
    attention = {f"{name}_proj.weight" for name in "qkvo"} | {"q_norm.weight", "k_norm.weight"}
    expected = {"norm1.linear.weight", "norm1.linear.bias", "norm2.weight", "norm3.weight"}
    expected |= {f"attn{i}.{name}" for i in (1, 2) for name in attention}
    expected |= {f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}
    assert keys == expected


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x: torch.Tensor, positions: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    parts, start = [], 0
    for axis, width in enumerate(axes):
        frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = (positions[:, axis, None].double() * frequency)[:, None]
        a, b = x[..., start : start + width : 2], x[..., start + 1 : start + width : 2]
        parts.append(
            torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).flatten(-2)
        )
        start += width
    return torch.cat([*parts, x[..., start:]], -1)


def naive_block(block, x: torch.Tensor, e: torch.Tensor, positions: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The block of one sample, line by line from docs/models.md."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.norm1.linear(F.silu(e)).chunk(6, -1)

    def attention(layer, queries: torch.Tensor, context: torch.Tensor, rotate_k: bool) -> torch.Tensor:
        q, k = rms(layer.q_proj(queries), layer.q_norm.weight), rms(layer.k_proj(context), layer.k_norm.weight)
        q, k, v = (y.unflatten(-1, (2, -1)) for y in (q, k, layer.v_proj(context)))
        q = rotate(q, positions, (8, 12, 12))
        k = rotate(k, positions, (8, 12, 12)) if rotate_k else k
        weights = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5, -1)
        return layer.o_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))

    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
    x = x + gate1 * attention(block.attn1, h, h, True)
    x = x + attention(block.attn2, rms(x, block.norm2.weight), text, False)
    h = rms(x, block.norm3.weight) * (1 + scale2) + shift2
    return x + gate2 * block.mlp.fc2(F.gelu(block.mlp.fc1(h), approximate="tanh"))


def test_block_is_the_papers() -> None:
    goku, packed = model(), pack([(2, 3, 2)], [5])
    seen = []
    goku.blocks[0].register_forward_hook(lambda _, args, output: seen.append((args[0], args[1], output)))
    with torch.inference_mode():
        goku(**packed)
        x, e, output = seen[0]
        expected = naive_block(goku.blocks[0], x, e, packed["positions"], packed["text"])
        torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)  # float32 rows would be off by 1e-8


@pytest.mark.parametrize("sizes", [[(1, 2, 3), (3, 2, 2), (1, 1, 1)], [(2, 2, 2)] * 4], ids=["mixed", "equal"])
def test_packed_training_equals_one_by_one(sizes: list) -> None:
    prompts = [3, 1, 6, 2][: len(sizes)]
    packed, goku = pack(sizes, prompts), model()
    output = goku(**packed)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    together = torch.autograd.grad((output * weights).sum(), list(goku.parameters()), retain_graph=True)
    alone = [goku(**one(packed, index)) for index in range(len(sizes))]
    torch.testing.assert_close(output, torch.cat(alone))
    apart = torch.autograd.grad((torch.cat(alone) * weights).sum(), list(goku.parameters()))
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b)


def test_times_in_bfloat16_are_scaled_in_float32() -> None:
    """A thousand times 0.7 in bfloat16 was 700 or 704, and the features' fastest angle turns by that many radians."""
    goku, packed = model().bfloat16(), pack([(1, 2, 3), (2, 2, 2)], [3, 2])
    packed = {key: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in packed.items()}
    with torch.no_grad():
        assert torch.equal(goku(**packed), goku(**packed | {"t": packed["t"].float()}))


def test_options_and_errors() -> None:
    packed = pack([(2, 2, 2)], [3])
    conditioned = model(image_condition=True)
    assert conditioned(**packed, condition=torch.zeros_like(packed["tokens"])).shape == packed["tokens"].shape
    labelled = model(text_channels=None, num_classes=3)
    no_text = {key: value for key, value in packed.items() if "text" not in key}
    assert labelled(**no_text, labels=torch.tensor([3])).shape == packed["tokens"].shape
    assert Goku.from_config({**SMALL, "hidden_size": 144, "axes": None}).config.rotary_axes == (24, 24, 24)
    fresh = Goku.from_config(SMALL)
    assert not fresh(
        **{key: value.float() if key in ("tokens", "t", "text") else value for key, value in packed.items()}
    ).any()
    for call, error, match in [
        (lambda: conditioned(**packed), OptionError, "condition: expected the first frame"),
        (lambda: labelled(**no_text), OptionError, "labels: expected"),
        (lambda: model()(**no_text), OptionError, "text: expected"),
        (lambda: model()(**{**packed, "t": torch.zeros(2)}), ShapeError, "cu_seqlens: expected"),
        (lambda: Goku.from_config("goku-3b"), OptionError, "config: expected one of"),
        (lambda: Goku.from_config({**SMALL, "axes": (7, 12, 12)}), OptionError, "axes: expected three even"),
    ]:
        with pytest.raises(error, match=match):
            call()
