# SPDX-License-Identifier: Apache-2.0
"""Rules for the attentions of official Latte and STDiT3 code, on attentions of our own with the same structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from patching_suite import no_fallback  # noqa: F401
from test_patching_official import FrameBlock
from torch import Tensor, nn

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import _rule, digest
from vidkernels.patching.rules import official_attention


class LlamaRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width) + 0.5), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        return self.weight * (wide * (wide.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()).to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), -1).flatten(-2)


def apply_rotary_emb(freqs: Tensor, t: Tensor) -> Tensor:
    return t * freqs.cos() + rotate_half(t) * freqs.sin()


class Rotary(nn.Module):
    """One angle per pair of channels and place, theta 10000."""

    freqs_for, use_xpos, interpolate_factor, default_seq_dim = "lang", False, 1.0, -2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(10000.0 ** -(torch.arange(0, width, 2) / width), requires_grad=False)

    def get_seq_pos(self, count: int, like: Tensor) -> Tensor:
        return torch.arange(count, dtype=self.freqs.dtype)

    def forward(self, positions: Tensor) -> Tensor:
        return torch.outer(positions, self.freqs).repeat_interleave(2, 1)

    def rotate_queries_or_keys(self, t: Tensor) -> Tensor:
        return apply_rotary_emb(self.forward(self.get_seq_pos(t.shape[-2], t)), t).to(t.dtype)


class LatteLike(nn.Module):
    def __init__(self, width: int, heads: int, attention_mode: str = "math") -> None:
        super().__init__()
        self.num_heads, self.scale, self.attention_mode = heads, (width // heads) ** -0.5, attention_mode
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
        return self.proj_drop(self.proj((scores @ v).transpose(1, 2).flatten(2)))


class FramesLike(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool = True, rope: Any = None) -> None:
        super().__init__()
        head = width // heads
        self.num_heads, self.scale, self.enable_flash_attn, self.qk_norm_legacy = heads, head**-0.5, False, False
        self.qkv, self.proj, self.rope = nn.Linear(width, 3 * width), nn.Linear(width, width), rope is not None
        self.q_norm, self.k_norm = (LlamaRMSNorm(head) if qk_norm else nn.Identity() for _ in range(2))
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        if rope is not None:
            self.rotary_emb = rope

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = self.rotary_emb(q), self.rotary_emb(k)
        scores = (q * self.scale @ k.mT).float().softmax(-1).to(q.dtype) if q.dtype != torch.float64 else None
        if scores is None:
            scores = (q * self.scale @ k.mT).softmax(-1)
        if getattr(self, "is_causal", False):  # the first code of Open-Sora 1.2 has no such attribute
            scores = scores.tril() / scores.tril().sum(-1, keepdim=True)
        return self.proj_drop(self.proj((self.attn_drop(scores) @ v).transpose(1, 2).flatten(2)))


COPIES = {
    "official.latte_attention": (LatteLike, {}),
    "official.stdit3_attention": (FramesLike, {"LlamaRMSNorm.forward": (digest(LlamaRMSNorm.forward),)}),
    "official.stdit3_block": (FrameBlock, {}),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The copies are known during a test only, and so is the rotation of this file."""
    before = list(_rule._USER)
    for name, (cls, others) in COPIES.items():
        rule = next(rule for rule in vidkernels.rules() if rule.name == name)
        digests = {f"{cls.__name__}.forward": (digest(cls.forward),), **others}
        target = f"{cls.__module__}:{cls.__name__}"
        vidkernels.register_rule(dataclasses.replace(rule, name=f"copy.{name}", targets=(target,), digests=digests))
    methods = {name: (digest(getattr(Rotary, name)),) for name in official_attention._METHOD_DIGESTS}
    functions = {f.__name__: (digest(f),) for f in (apply_rotary_emb, rotate_half)}
    monkeypatch.setattr(official_attention, "_METHOD_DIGESTS", methods)
    monkeypatch.setattr(official_attention, "_FUNCTION_DIGESTS", functions)
    yield
    _rule._USER[:] = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", ["latte", "plain", "norms", "rotated", "causal"])
@pytest.mark.parametrize("length", [1, 16, 130])
def test_attention_alone(kind: str, length: int, dtype: torch.dtype) -> None:
    """Outputs and all gradients within the promise."""
    torch.manual_seed(length)
    rope = Rotary(8).to(dtype).rotate_queries_or_keys if kind == "rotated" else None
    made = LatteLike(24, 3) if kind == "latte" else FramesLike(24, 3, kind != "plain", rope)
    made.is_causal = kind == "causal"
    report = vidkernels.patch(made.to(dtype), verify=torch.randn(3, length, 24, dtype=dtype), mode="training")
    assert report.patched[0].op == "axial_attention" and len(report.numerics) >= 6
    made(torch.randn(2, length, 24, dtype=dtype))
    assert not vidkernels.status(made).fallbacks


def block(temporal: bool) -> tuple[Any, tuple[Any, ...]]:
    torch.manual_seed(0)
    made = FrameBlock(24, 3, temporal)
    made.attn = FramesLike(24, 3, rope=Rotary(8).rotate_queries_or_keys if temporal else None)
    inputs = (torch.randn(2, 24, 24), torch.randn(1, 10, 24), torch.randn(2, 144), [5, 5], None, None, 4, 6)
    return made, inputs


@pytest.mark.parametrize("temporal", [False, True])
def test_block_attends_without_moving_tokens(temporal: bool) -> None:
    made, inputs = block(temporal)
    report = vidkernels.patch(made, verify=(inputs, {}), mode="training")
    assert {entry.rule for entry in report.patched} == {"copy.official.stdit3_block", "copy.official.stdit3_attention"}
    calls: list[Any] = []
    original = official_attention.ops.axial_attention
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(
            official_attention.ops,
            "axial_attention",
            lambda q, *a, **k: calls.append((q.ndim, k["dim"])) or original(q, *a, **k),
        )
        made(*inputs)
    assert calls == [(5, 1 if temporal else 2)]


@pytest.mark.parametrize("temporal", [False, True])
def test_block_compiles_and_its_attention_is_heard(temporal: bool) -> None:
    made, inputs = block(temporal)
    with torch.no_grad():
        expected = made(*inputs)
        vidkernels.patch(made)
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), expected, atol=1e-5, rtol=1e-4)
        torch._dynamo.reset()
        seen: list[Any] = []
        made.attn.register_forward_hook(lambda m, i, o: seen.append(o.shape))
        torch.testing.assert_close(made(*inputs), expected, atol=1e-5, rtol=1e-4)
    assert seen == [(12, 4, 24) if temporal else (8, 6, 24)]


def test_dropout_of_attention_weights_goes_to_the_original() -> None:
    made, x = LatteLike(24, 3), torch.randn(2, 5, 24)
    vidkernels.patch(made)
    made.attn_drop.p = 0.5
    with pytest.warns(VidkernelsFallbackWarning, match="attention weights are dropped out"):
        made.train()(x)
    made.eval()(x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "qk_norm_legacy", True), "norms come after the rotation"),
        (lambda m: setattr(m, "k_norm", nn.Identity()), "norms differ"),
        (lambda m: setattr(m, "rotary_emb", lambda t: t), "not a method of a RotaryEmbedding"),
        (lambda m: setattr(m.rotary_emb.__self__, "interpolate_factor", 2.0), "options of its own"),
        (lambda m: m.rotary_emb.__self__.freqs.requires_grad_(), "options of its own"),
    ],
)
def test_refusals(change: Any, reason: str) -> None:
    made = FramesLike(24, 3, rope=Rotary(8).rotate_queries_or_keys)
    change(made)
    report = vidkernels.explain(made)
    assert not report and reason in report.skipped[0].reason


def test_other_rotation_code_and_flash_mode_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official_attention, "_FUNCTION_DIGESTS", {"apply_rotary_emb": ("another",)})
    made = nn.ModuleList([FramesLike(24, 3, rope=Rotary(8).rotate_queries_or_keys), LatteLike(24, 3, "flash")])
    reasons = [entry.reason for entry in vidkernels.explain(made).skipped]
    assert "other code than rotary-embedding-torch" in reasons[0] and "attention_mode is flash" in reasons[1]
