# SPDX-License-Identifier: Apache-2.0
"""The law of adaLN-Zero against code not written here: torch's norms and diffusers' blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adaln_zero_cases import FORMS, Form, draw

from vidkernels._reference import adaln_zero as law

normalization = pytest.importorskip("diffusers.models.normalization")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in float64 up to the rounding of sums over C <= 64 values."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def float64_by_default() -> None:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_norms_are_torchs() -> None:
    x, weight, bias = torch.randn(3, 5, 16), torch.randn(16), torch.randn(16)
    close(law.normalize(x, "layer", weight, bias, 1e-5), F.layer_norm(x, (16,), weight, bias, 1e-5))
    close(law.normalize(x, "rms", weight, None, 1e-5), F.rms_norm(x, (16,), weight, 1e-5))
    assert torch.equal(law.normalize(x, "none"), x)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_row_of_each_token(form: Form) -> None:
    """The documented row of every token, found one token at a time."""
    t = draw(form, 3, torch.float64)
    x, table = t["residual"], t["shift"]
    actual = law.modulation_per_token(table, x, **form.options()).reshape(-1, 3)
    samples = 1 if len(form.tokens) == 1 or form.cu_seqlens else form.tokens[0]
    per_sample = actual.shape[0] // samples
    rows = table.reshape(-1, 3)
    for n in range(actual.shape[0]):
        sample, token = divmod(n, per_sample)
        if form.cu_seqlens is not None:
            row = max(s for s, begin in enumerate(form.cu_seqlens[:-1]) if begin <= n)
        elif form.rows is not None:
            of_sample = form.rows[sample] if isinstance(form.rows[0], tuple) else form.rows
            row = of_sample[token * len(of_sample) // per_sample]
        elif len(form.table) == 2:
            row = (sample if form.table[0] > 1 else 0) * form.table[1] + token * form.table[1] // per_sample
        else:
            row = sample if form.table else 0
        assert torch.equal(actual[n], rows[row]), n


def test_ada_layer_norm_zero() -> None:
    """diffusers' AdaLayerNormZero (DiT, SD3, Flux, HunyuanVideo): the first modulation of a block."""
    module = normalization.AdaLayerNormZero(32)
    x, emb = torch.randn(2, 7, 32), torch.randn(2, 32)
    expected, gate, shift_mlp, scale_mlp, gate_mlp = module(x, emb=emb)
    shift, scale, *rest = module.linear(F.silu(emb)).chunk(6, dim=1)
    close(law.adaln_modulate(x, shift, scale), expected)
    for a, b in zip(rest, (gate, shift_mlp, scale_mlp, gate_mlp), strict=True):
        close(a, b)


@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])
def test_ada_layer_norm_continuous(norm_type: str) -> None:
    """diffusers' AdaLayerNormContinuous (final layers of SD3, Flux, CogVideoX)."""
    module = normalization.AdaLayerNormContinuous(32, 16, elementwise_affine=True, eps=1e-6, norm_type=norm_type)
    torch.nn.init.normal_(module.norm.weight)
    x, cond = torch.randn(2, 7, 32), torch.randn(2, 16)
    scale, shift = module.linear(F.silu(cond)).chunk(2, dim=1)
    kind = norm_type.removesuffix("_norm")
    actual = law.adaln_modulate(
        x, shift, scale, norm=kind, weight=module.norm.weight, bias=getattr(module.norm, "bias", None)
    )
    # diffusers' RMSNorm takes the mean square in float32
    tolerance = 1e-12 if kind == "layer" else 1e-6
    torch.testing.assert_close(actual, module(x, cond), rtol=tolerance, atol=tolerance)


def test_cogvideox_layer_norm_zero() -> None:
    """diffusers' CogVideoXLayerNormZero: two streams, weighted norm."""
    module = normalization.CogVideoXLayerNormZero(16, 32, elementwise_affine=True, eps=1e-5)
    torch.nn.init.normal_(module.norm.weight)
    torch.nn.init.normal_(module.norm.bias)
    hidden, text, temb = torch.randn(2, 9, 32), torch.randn(2, 4, 32), torch.randn(2, 16)
    shift, scale, _, text_shift, text_scale, _ = module.linear(F.silu(temb)).chunk(6, dim=1)
    affine = {"weight": module.norm.weight, "bias": module.norm.bias, "eps": 1e-5}
    expected = module(hidden, text, temb)
    close(law.adaln_modulate(hidden, shift, scale, **affine), expected[0])
    close(law.adaln_modulate(text, text_shift, text_scale, **affine), expected[1])


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "backward"])
def test_latte_block(gradients: bool) -> None:
    """Latte's and PixArt's block (diffusers' BasicTransformerBlock, ada_norm_single) written with the three ops:
    modulate, attention, seam, feed-forward, gate. Same outputs, same gradients of input, timestep and table."""
    attention = pytest.importorskip("diffusers.models.attention")
    block = attention.BasicTransformerBlock(
        32,
        4,
        8,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    ).eval()
    x, timestep = torch.randn(3, 6, 32, requires_grad=True), torch.randn(3, 6 * 32, requires_grad=True)
    expected = block(x, timestep=timestep)

    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
        block.scale_shift_table[None] + timestep.reshape(3, 6, -1)
    ).unbind(1)
    branch = block.attn1(law.adaln_modulate(x, shift, scale))
    hidden, modulated = law.adaln_zero(x, branch, gate, shift_mlp, scale_mlp)
    actual = law.gate_residual(hidden, block.ff(modulated), gate_mlp)
    close(actual, expected)
    if gradients:
        cotangent = torch.randn_like(expected)
        inputs = (x, timestep, block.scale_shift_table, block.attn1.to_q.weight)
        grads = [torch.autograd.grad(out, inputs, cotangent, retain_graph=True) for out in (actual, expected)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_wan_block_modulates_in_float32() -> None:
    """diffusers' WanTransformerBlock on bfloat16 activations: norm, modulation and gate in float32, rounded once."""
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    norm = normalization.FP32LayerNorm(64, 1e-6, elementwise_affine=False)
    x, branch = torch.randn(2, 5, 64).bfloat16(), torch.randn(2, 5, 64).bfloat16()
    gate, shift, scale = torch.randn(3, 2, 1, 64, dtype=torch.float32).unbind()
    assert wan.FP32LayerNorm is normalization.FP32LayerNorm
    hidden = (x.float() + branch * gate).type_as(x)
    modulated = (norm(hidden.float()) * (1 + scale) + shift).type_as(x)
    actual = law.adaln_zero(x, branch, gate, shift, scale)
    assert torch.equal(actual[0], hidden)
    # float32 sums in another order may move a value across a rounding boundary of bfloat16: one step of 2^-8 at most
    torch.testing.assert_close(actual[1], modulated, rtol=2**-7, atol=1e-6)
    assert (actual[1] != modulated).float().mean() < 0.01


def test_constant_rows_and_bad_arguments() -> None:
    x = torch.full((1, 2, 8), 5.0)
    close(law.adaln_modulate(x, torch.full((1, 8), 0.5), None), torch.full((1, 2, 8), 0.5))
    with pytest.raises(ValueError, match="norm: expected"):
        law.adaln_modulate(x, None, None, norm="batch")
    with pytest.raises(ValueError, match="equal groups"):
        law.adaln_modulate(torch.zeros(1, 5, 8), torch.zeros(1, 2, 8), None)
