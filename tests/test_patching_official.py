# SPDX-License-Identifier: Apache-2.0
"""Rules for official DiT, Latte and Open-Sora blocks, on blocks of our own with the same structure.

The official sources are not part of this repository, so each rule is copied and given the digests of the blocks below.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patching_suite import ModelSuite, no_fallback  # noqa: F401
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import Rule, _rule, digest


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Captions are packed: `cond` [1, total, C] with a length per clip in `mask`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, cond: Tensor, mask: list[int]) -> Tensor:
        pieces = zip(self.to_q(x), self.to_kv(cond[0]).split(mask), strict=True)
        return torch.stack([F.scaled_dot_product_attention(q, *kv.chunk(2, -1)) for q, kv in pieces])


def norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))


class ZeroBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn, self.mlp = SelfAttention(width, heads), mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        rows = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + rows[2] * self.attn(self.norm1(x) * (1 + rows[1]) + rows[0])
        return x + rows[5] * self.mlp(self.norm2(x) * (1 + rows[4]) + rows[3])


class ZeroFinal(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final, self.linear = norm(width), nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class FrameBlock(nn.Module):
    def __init__(self, width: int, heads: int, temporal: bool) -> None:
        super().__init__()
        self.temporal, self.drop_path = temporal, nn.Identity()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn, self.cross_attn, self.mlp = SelfAttention(width, heads), CrossAttention(width), mlp(width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def select(self, x_mask: Tensor | None, moving: Tensor, clean: Tensor, S: int) -> Tensor:
        return moving if x_mask is None else torch.where(x_mask.repeat_interleave(S, 1)[..., None], moving, clean)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        mask: Any = None,
        x_mask: Any = None,
        t0: Any = None,
        T: int = 1,
        S: int = 1,
    ) -> Tensor:
        a = (self.scale_shift_table[None] + t.unflatten(1, (6, -1))).chunk(6, dim=1)
        b = a if t0 is None else (self.scale_shift_table[None] + t0.unflatten(1, (6, -1))).chunk(6, dim=1)
        n = self.norm1(x)
        n = self.select(x_mask, n * (1 + a[1]) + a[0], n * (1 + b[1]) + b[0], S).unflatten(1, (T, S))
        if self.temporal:
            n = self.attn(n.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, S)).transpose(1, 2)
        else:
            n = self.attn(n.flatten(0, 1))
        n = n.reshape(x.shape)
        x = x + self.drop_path(self.select(x_mask, a[2] * n, b[2] * n, S))
        x = x + self.cross_attn(x, y, mask)
        n = self.norm2(x)
        n = self.mlp(self.select(x_mask, n * (1 + a[4]) + a[3], n * (1 + b[4]) + b[3], S))
        return x + self.drop_path(self.select(x_mask, a[5] * n, b[5] * n, S))


class FrameFinal(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final, self.linear = norm(width), nn.Linear(width, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, t: Tensor, x_mask: Any = None, t0: Any = None, T: Any = None, S: Any = None) -> Tensor:
        shift, scale = (self.scale_shift_table[None] + t[:, None]).chunk(2, dim=1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


COPIES = {
    "official.dit_block": ZeroBlock,
    "official.latte_block": ZeroBlock,
    "official.dit_final": ZeroFinal,
    "official.stdit3_block": FrameBlock,
    "official.stdit3_final": FrameFinal,
}


def copied(name: str) -> Rule:
    """The package's rule for the block of this file that has its structure."""
    rule = next(rule for rule in vidkernels.rules() if rule.name == name)
    cls = COPIES[name]
    digests = {f"{cls.__name__}.forward": (digest(cls.forward),)}
    return dataclasses.replace(rule, name=f"copy.{name}", targets=(f"{__name__}:{cls.__name__}",), digests=digests)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The copies are known during a test only."""
    before = list(_rule._USER)
    for name in COPIES:
        vidkernels.register_rule(copied(name))
    assert sys.modules[__name__].ZeroBlock is ZeroBlock
    yield
    _rule._USER[:] = before


class Serial(nn.Module):
    """Blocks and a final layer, with checkpointing of blocks as diffusers' models have it."""

    checkpointing = False

    def enable_gradient_checkpointing(self) -> None:
        self.checkpointing = True

    def run(self, block: nn.Module, *arguments: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)


class SmallDiT(Serial):
    def __init__(self, width: int = 24, heads: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ZeroBlock(width, heads) for _ in range(depth))
        self.final_layer = ZeroFinal(width, 8)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x, c)
        return self.final_layer(x, c)


class SmallSTDiT3(Serial):
    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FrameBlock(width, heads, temporal) for temporal in (False, True))
        self.final_layer = FrameFinal(width, 8)

    def forward(self, x: Tensor, y: Tensor, t: Tensor, t0: Tensor | None, x_mask: Tensor | None, S: int) -> Tensor:
        lengths = [y.shape[1] // x.shape[0]] * x.shape[0]
        for block in self.blocks:
            six = None if t0 is None else t0.repeat(1, 6)
            x = self.run(block, x, y, t.repeat(1, 6), lengths, x_mask, six, x.shape[1] // S, S)
        return self.final_layer(x, t)


class TestDiT(ModelSuite):
    rules = {"copy.official.latte_block": 2, "copy.official.dit_final": 1}
    leaves = ("x", "c")
    lora = ("qkv", "proj", "mlp.0", "adaLN_modulation.1", "linear")
    hooked = ("blocks.0", "blocks.0.attn", "blocks.1.mlp", "blocks.0.norm1", "blocks.1.norm2",
              "blocks.0.adaLN_modulation.1", "final_layer.norm_final")  # fmt: skip
    bypassed = ("blocks.0.norm1", "blocks.1.norm2", "final_layer.norm_final")

    def build(self, **changes: Any) -> Any:
        return SmallDiT(**changes)

    def inputs(self, batch: int = 2, width: int = 24) -> dict[str, Any]:
        torch.manual_seed(1)
        return {"x": torch.randn(batch, 9, width), "c": torch.randn(batch, width)}

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        heads = draw.randint(1, 4)
        width = heads * draw.choice([8, 12, 16])
        return {"width": width, "heads": heads}, {"batch": draw.randint(1, 3), "width": width}


class TestSTDiT3(ModelSuite):
    rules = {"copy.official.stdit3_block": 2, "copy.official.stdit3_final": 1}
    leaves = ("x", "y", "t", "t0")
    lora = ("qkv", "proj", "to_q", "mlp.0", "linear")
    hooked = ("blocks.0", "blocks.1.attn", "blocks.0.cross_attn", "blocks.1.mlp", "blocks.0.norm1", "blocks.1.norm2",
              "final_layer.norm_final")  # fmt: skip
    bypassed = ("blocks.0.norm1", "blocks.1.norm2", "final_layer.norm_final")

    def build(self, **changes: Any) -> Any:
        return SmallSTDiT3(**changes)

    def inputs(self, batch: int = 2, width: int = 24, frames: int = 4, clean: bool = True) -> dict[str, Any]:
        torch.manual_seed(1)
        mask = torch.arange(frames)[None] >= torch.arange(batch)[:, None] + 1
        return {
            "x": torch.randn(batch, frames * 6, width),
            "y": torch.randn(1, batch * 5, width),
            "t": torch.randn(batch, width),
            "t0": torch.randn(batch, width) if clean else None,
            "x_mask": mask if clean else None,
            "S": 6,
        }

    def random_changes(self, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        heads = draw.randint(1, 4)
        width = heads * draw.choice([8, 12, 16])
        sizes = {
            "batch": draw.randint(1, 3),
            "width": width,
            "frames": draw.randint(1, 5),
            "clean": draw.random() < 0.5,
        }
        return {"width": width, "heads": heads}, sizes

    def test_stochastic_depth_drops_the_same_samples(self) -> None:
        class Drop(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * (torch.rand(x.shape[0], 1, 1) < 0.5) / 0.5

        model, arguments = self.ready(), self.inputs(batch=3)
        for block in model.blocks:
            block.drop_path = Drop()
        with torch.no_grad():
            torch.manual_seed(3)
            expected = model(**arguments)
            self.patch(model)
            torch.manual_seed(3)
            torch.testing.assert_close(model(**arguments), expected, atol=1e-5, rtol=1e-4)

    def test_clean_frames_in_the_final_layer_go_to_the_original(self) -> None:
        layer = FrameFinal(24, 8)
        vidkernels.patch(layer)
        x, t = torch.randn(2, 8, 24), torch.randn(2, 24)
        with pytest.warns(VidkernelsFallbackWarning, match="frames are held clean"):
            layer(x, t, torch.ones(2, 4, dtype=torch.bool), t, 4, 2)


def test_a_class_of_that_name_without_the_parts_is_not_reported() -> None:
    final = type("FinalLayer", (nn.Module,), {"forward": lambda self, x: x})()
    block = type("TransformerBlock", (nn.Module,), {"forward": lambda self, x: x})()
    assert vidkernels.explain(nn.Sequential(final, block)).entries == ()


def test_other_code_of_that_name_is_a_near_miss() -> None:
    block = type("DiTBlock", (ZeroBlock,), {})(24, 3)
    _rule._USER.clear()
    report = vidkernels.explain(block)
    assert not report and "modulate is missing or has no source" in report.near_misses[0].reason


def test_our_own_models_are_not_reported() -> None:
    from vidkernels.models.transformers import stdit3

    config = stdit3.STDiT3Config(hidden_size=24, depth=1, num_heads=3, caption_channels=8)
    assert vidkernels.explain(stdit3.STDiT3(config)).entries == ()
