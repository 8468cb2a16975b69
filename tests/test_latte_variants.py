# SPDX-License-Identifier: Apache-2.0
"""Every variant of Latte, with and without classes and images, against a plain computation at odd sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_cases import ODD, filled

from benchmarks.official import OfficialLatte
from vidkernels.models.transformers import Latte


def attend(attention: nn.Module, x: Tensor, heads: slice = slice(None)) -> Tensor:
    """Some heads of self-attention over one sequence [n, D], before the output projection."""
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1))[:, heads] for part in attention.qkv(x).chunk(3, -1))
    weights = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5, -1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def over(axis: str, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of sequences along one axis of tokens [F, S, D]."""
    if axis == "space":
        return torch.stack([function(frame) for frame in x])
    return torch.stack([function(x[:, position]) for position in range(x.shape[1])], 1)


def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def naive_block(block: nn.Module, kind: str, axis: str, x: Tensor, rows: Tensor, frames: int) -> Tensor:
    """One block on one sample [F + I, S, D] with a condition per frame [F + I, D]."""
    if kind == "all_tokens":
        sequences = x if axis == "space" else x.transpose(0, 1)
        mixed = []
        for index, sequence in enumerate(sequences):
            token = rows[index] if axis == "space" else rows[0]
            joined = torch.cat([sequence, token[None]])
            joined = F.layer_norm(joined, joined.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-6)
            mixed.append(block.attn.proj(attend(block.attn, joined))[:-1])
        stacked = torch.stack(mixed)
        x = x + (stacked if axis == "space" else stacked.transpose(0, 1))
        return x + block.mlp(F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-6))
    parts = [part[:, None] for part in block.adaLN_modulation(rows).chunk(9 if kind == "serial" else 6, -1)]
    normed = norm(x, parts[0], parts[1])
    if kind == "serial":
        x = x + parts[2] * over("space", normed, lambda s: block.attn.proj(attend(block.attn, s)))
        normed, temporal = norm(x, parts[3], parts[4]), block.attn_temporal
        branch = torch.zeros_like(x)
        branch[:frames] = over("time", normed[:frames], lambda s: temporal.proj(attend(temporal, s)))
        x = x + parts[5] * branch
        return x + parts[8] * block.mlp(norm(x, parts[6], parts[7]))
    if kind == "halves":
        half = block.attn.num_heads // 2
        mixed = over("space", normed, lambda s: attend(block.attn, s, slice(half)))
        mixed[:frames] += over("time", normed[:frames], lambda s: attend(block.attn, s, slice(half, None)))
        branch = block.attn.proj(mixed)
    else:
        branch = over(axis, normed, lambda s: block.attn.proj(attend(block.attn, s)))
    x = x + parts[2] * branch
    return x + parts[5] * block.mlp(norm(x, parts[3], parts[4]))


def naive_latte(model: Latte, x: Tensor, rows: Tensor, frames: int) -> Tensor:
    """One sample [F + I, C, H, W] and its condition per frame; docs/models.md says what variants 2 to 4 are."""
    config = model.config
    tokens = model.x_embedder.proj(x).flatten(2).transpose(1, 2) + model.pos_embed
    added = False
    for index, block in enumerate(model.blocks):
        kind = {3: "serial", 4: "halves"}.get(config.variant, config.conditioning)
        late = index % 2 == 1 if config.variant == 1 else index >= config.depth // 2
        axis = "time" if late and config.variant in (1, 2) else "space"
        if not added and (axis == "time" or config.variant in (3, 4)):
            tokens, added = torch.cat([tokens[:frames] + model.temp_embed[0][:, None], tokens[frames:]]), True
        if axis == "time":
            video = naive_block(block, kind, axis, tokens[:frames], rows[:frames], frames)
            tokens = torch.cat([video, tokens[frames:]])
        else:
            tokens = naive_block(block, kind, axis, tokens, rows, frames)
    shift, scale = (part[:, None] for part in model.final_layer.adaLN_modulation(rows).chunk(2, -1))
    output = model.final_layer.linear(norm(tokens, shift, scale))
    side = config.input_size // config.patch_size
    return F.fold(
        output.unflatten(-1, (config.patch_size**2, -1)).permute(0, 3, 2, 1).flatten(1, 2),
        config.input_size,
        config.patch_size,
        stride=config.patch_size,
    ).reshape(x.shape[0], -1, side * config.patch_size, side * config.patch_size)


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("classes", [None, 5], ids=["unconditional", "classes"])
@pytest.mark.parametrize(
    "changes",
    [
        {"variant": 1},
        {"variant": 2, "num_frames": 5},
        {"variant": 3, "input_size": 10},
        {"variant": 4, "num_heads": 6},
        {"variant": 1, "conditioning": "all_tokens", "num_frames": 1},
        {"variant": 2, "conditioning": "all_tokens", "patch_size": 3},
        {"variant": 1, "learn_sigma": False, "in_channels": 3, "depth": 2},
    ],
    ids=str,
)
@torch.inference_mode()
def test_latte_written_out_at_odd_sizes(changes: dict, classes: int | None, images: int) -> None:
    model = filled(Latte.from_config({**ODD, "num_classes": classes, **changes}))
    config = model.config
    frames, side = config.num_frames, config.input_size
    x = torch.randn(2, frames + images, config.in_channels, side, side, dtype=torch.float64)
    t, y, y_image = torch.tensor([3, 977]), torch.tensor([0, 5]), torch.tensor([[1, 2], [4, 3]])
    labels = {} if classes is None else {"y": y}
    if images:
        labels |= {"use_image_num": images} | ({} if classes is None else {"y_image": y_image})
    output = model(x, t, **labels)
    for i in range(2):
        rows = model.t_embedder(t)[i].expand(frames + images, -1)
        if classes is not None:
            each = torch.cat([y[i].expand(frames), y_image[i, :images]])
            rows = rows + model.y_embedder(each)
        torch.testing.assert_close(output[i], naive_latte(model, x[i], rows, frames))


@torch.inference_mode()
def test_latte_as_the_published_code_computes_it() -> None:
    """What the benchmarks compare with is the same function."""
    model = filled(Latte.from_config({**ODD, "num_classes": 5, "depth": 4}))
    x, t, y = torch.randn(2, 3, 4, 6, 6, dtype=torch.float64), torch.tensor([3, 977]), torch.tensor([0, 5])
    for fused in (False, True):
        torch.testing.assert_close(OfficialLatte(model, fused)(x, t, y), model(x, t, y))
