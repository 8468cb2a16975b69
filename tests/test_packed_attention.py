# SPDX-License-Identifier: Apache-2.0
"""nn.PackedAttention against projections, norm, rotation and scaled_dot_product_attention written out per sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vidkernels import nn, packing
from vidkernels._reference import qk_norm_rope
from vidkernels.errors import OptionError, ShapeError

GRIDS = [(1, 2, 3), (2, 3, 1), (1, 1, 1), (3, 2, 2)]
ROTARY = nn.RotaryConfig((4, 6, 6), (1e4,) * 3, (1.0,) * 3)
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "full-norm-rotary-causal": {"qk_norm": "full", "rotary": ROTARY, "causal": True, "bias": False},
    "head-norm-grouped": {"qk_norm": "head", "rotary": ROTARY, "kv_heads": 2, "out_bias": False},
}


def make(mode: str, **more: Any) -> Any:
    module = nn.PackedAttention(20, 4, head_dim=16, dtype=torch.float64, **MODES[mode], **more)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def written_out(module: Any, x: torch.Tensor, context: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
    """One sample, with PyTorch's own operations."""
    if context is None:
        counts = [module.heads * 16, module.kv_heads * 16, module.kv_heads * 16]
        q, k, v = (y.unflatten(1, (-1, 16)) for y in module.to_qkv(x).split(counts, dim=1))
    else:
        q = module.to_q(x).unflatten(1, (-1, 16))
        k, v = (y.unflatten(1, (-1, 16)) for y in module.to_kv(context).chunk(2, dim=1))
    side = module.norm_rope
    if side is not None:
        options = {"axes": ROTARY.axes, "norm": side.norm}
        q, _ = qk_norm_rope.qk_norm_rope(q, None, side.q_weight, positions=positions, **options)
        where = positions if context is None else None
        k, _ = qk_norm_rope.qk_norm_rope(k, None, side.k_weight, positions=where, norm=side.norm, axes=ROTARY.axes)
    sides = (y.transpose(0, 1) for y in (q, k, v))
    out = F.scaled_dot_product_attention(*sides, is_causal=module.causal and context is None, enable_gqa=True)
    return module.to_out(out.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("mode", MODES)
def test_self_attention(mode: str) -> None:
    """Every sample of a pack, with gradients of the input and of all parameters; the same without gradients."""
    module = make(mode)
    packed = packing.pack_grids(GRIDS, torch.randn(25, 20, dtype=torch.float64))
    leaves = [packed.tokens.requires_grad_(), *module.parameters()]
    out = module(packed.tokens, packed.cu_seqlens, packed.max_seqlen, packed.positions)
    parts = zip(packed.tokens.split(packed.lengths), packed.positions.split(packed.lengths), strict=True)
    expected = torch.cat([written_out(module, x, None, positions) for x, positions in parts])
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(y, leaves, grad) for y in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        again = module(packed.tokens, packed.cu_seqlens, packed.max_seqlen, packed.positions)
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("mode", ["plain", "head-norm-grouped"])
def test_cross_attention(mode: str) -> None:
    """Each sample sees its own prompt; q is rotated and the context is not; an empty prompt gives the output bias."""
    module = make(mode, context_width=12)
    packed = packing.pack_grids(GRIDS, torch.randn(25, 20, dtype=torch.float64))
    prompts = [torch.randn(n, 12, dtype=torch.float64) for n in (3, 1, 0, 5)]
    text = packing.pack_text(prompts)
    context = {"context": text.tokens, "context_cu_seqlens": text.cu_seqlens, "context_max_seqlen": text.max_seqlen}
    out = module(packed.tokens, packed.cu_seqlens, packed.max_seqlen, packed.positions, **context)
    parts = out.split(packed.lengths)
    for i, (x, positions) in enumerate(
        zip(packed.tokens.split(packed.lengths), packed.positions.split(packed.lengths), strict=True)
    ):
        nothing = torch.zeros(x.shape[0], 64, dtype=torch.float64)
        expected = written_out(module, x, prompts[i], positions) if len(prompts[i]) else module.to_out(nothing)
        torch.testing.assert_close(parts[i], expected)


class _Keeping(torch.nn.Linear):
    """What it returned, as an adapter or a feature cache may keep it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = super().forward(x)
        return self.kept


@pytest.mark.parametrize("keeper", ["nobody", "hook", "process", "subclass", "forward"])
@pytest.mark.parametrize("mode", ["full-norm-rotary-causal", "head-norm-grouped"])
@pytest.mark.parametrize("crossed", [False, True])
def test_what_a_projection_returned_stays_where_somebody_keeps_it(keeper: str, mode: str, crossed: bool) -> None:
    module = make(mode, **({"context_width": 12} if crossed else {}))
    packed = packing.pack_grids(GRIDS, torch.randn(25, 20, dtype=torch.float64))
    text, kept = packing.pack_text([torch.randn(n, 12, dtype=torch.float64) for n in (3, 1, 2, 5)]), []
    arguments = (packed.tokens, packed.cu_seqlens, packed.max_seqlen, packed.positions)
    context = {"context": text.tokens, "context_cu_seqlens": text.cu_seqlens, "context_max_seqlen": text.max_seqlen}
    expected = module(*arguments, **(context if crossed else {}))
    names = ("to_q", "to_kv") if crossed else ("to_qkv",)
    given = {"to_kv": text.tokens}
    handles = []
    if keeper == "process":
        handles.append(torch.nn.modules.module.register_module_forward_hook(lambda m, i, o: kept.append((m, o))))
    for name in names:
        layer = getattr(module, name)
        if keeper == "hook":
            layer.register_forward_hook(lambda m, i, o: kept.append((m, o)))
        elif keeper == "subclass":
            layer.__class__ = _Keeping
        elif keeper == "forward":
            plain = layer.forward
            layer.forward = lambda x, plain=plain, m=layer: kept.append((m, plain(x))) or kept[-1][1]
    with torch.no_grad():
        actual = module(*arguments, **(context if crossed else {}))
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(actual, expected)
        for name in names if keeper != "nobody" else ():
            layer = getattr(module, name)
            found = layer.kept if keeper == "subclass" else next(output for m, output in kept if m is layer)
            assert torch.equal(found, F.linear(given.get(name, packed.tokens), layer.weight, layer.bias))


def test_compiles_in_one_graph() -> None:
    """fullgraph, with gradients."""
    module = make("full-norm-rotary-causal")
    packed = packing.pack_grids(GRIDS, torch.randn(25, 20, dtype=torch.float64))
    arguments = (packed.tokens, packed.cu_seqlens, packed.max_seqlen, packed.positions)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    actual, expected = compiled(*arguments), module(*arguments)
    torch.testing.assert_close(actual, expected)
    parameters = list(module.parameters())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_errors() -> None:
    """Options and calls that contradict each other."""
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(OptionError, match="^heads:"):
        nn.PackedAttention(20, 3)
    with pytest.raises(OptionError, match="^kv_heads:"):
        nn.PackedAttention(20, 4, kv_heads=3)
    with pytest.raises(OptionError, match="^group:"):
        nn.PackedAttention(20, 4, context_width=8, group=object())
    with pytest.raises(OptionError, match="^context:"):
        nn.PackedAttention(20, 4)(torch.zeros(4, 20), cu, context=torch.zeros(4, 8))
    with pytest.raises(OptionError, match="^context:"):
        nn.PackedAttention(20, 4, context_width=8)(torch.zeros(4, 20), cu)
    with pytest.raises(OptionError, match="^positions:"):
        nn.PackedAttention(64, 4, rotary=ROTARY)(torch.zeros(4, 64), cu)
    with pytest.raises(ShapeError, match="^x:"):
        nn.PackedAttention(20, 4)(torch.zeros(1, 4, 20), cu)
