# SPDX-License-Identifier: Apache-2.0
"""Patching vector_quantize_pytorch's FSQ and LFQ: equal to the original, inside a model, both ways and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning
from vidkernels.patching import _guard
from vidkernels.patching.rules import quantizers

upstream = pytest.importorskip("vector_quantize_pytorch")


class Tokenizer(nn.Module):
    """A quantizer between two convolutions, as in a video tokenizer."""

    def __init__(self, quantizer: nn.Module, channels: int) -> None:
        super().__init__()
        self.encoder = nn.Conv3d(3, channels, 3, padding=1)
        self.quantizer = quantizer
        self.decoder = nn.Conv3d(channels, 3, 3, padding=1)

    def forward(self, video: torch.Tensor) -> tuple[torch.Tensor, ...]:
        quantized, indices, *losses = self.quantizer(self.encoder(video))
        return (self.decoder(quantized), indices, *losses)


MODELS = {
    "fsq": lambda: (upstream.FSQ([8, 5, 4]), 3),
    "fsq with projections": lambda: (upstream.FSQ([8, 5, 4], dim=7, num_codebooks=2), 7),
    "symmetric fsq": lambda: (upstream.FSQ([8, 5, 2], preserve_symmetry=True), 3),
    "lfq": lambda: (upstream.LFQ(codebook_size=2**9, commitment_loss_weight=0.25), 9),
    "lfq with projections": lambda: (upstream.LFQ(codebook_size=2**8, dim=5), 5),
    "spherical lfq": lambda: (upstream.LFQ(codebook_size=2**9, spherical=True), 9),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_patched_model_equals_original(build, training: bool) -> None:
    model = Tokenizer(*build()).train(training)
    original = copy.deepcopy(model)
    report = vidkernels.patch(model, verify=True)
    assert [entry.name for entry in report.patched] == ["quantizer"]
    assert list(model.state_dict()) == list(original.state_dict())
    video = torch.randn(2, 3, 3, 6, 5)
    ours, right = model(video), original(video)
    assert torch.equal(ours[1], right[1]) and ours[1].dtype == right[1].dtype
    torch.testing.assert_close(ours[0], right[0], rtol=1e-5, atol=1e-6)
    if training:
        for index in range(2, len(ours)):
            torch.testing.assert_close(ours[index], right[index], rtol=3e-5, atol=1e-6)
        for outputs in (ours, right):
            (outputs[0].square().mean() + sum(outputs[2:])).backward()
        for mine, theirs in zip(model.parameters(), original.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4 * theirs.grad.abs().max().item())
    report.undo()
    assert type(model.quantizer) is type(original.quantizer)


def test_upstream_errors_are_kept_not_mended_behind_the_users_back() -> None:
    """A token mask in training goes to upstream's own forward, says so, and gives upstream's numbers."""
    original = upstream.LFQ(codebook_size=2**6)
    patched = copy.deepcopy(original)
    vidkernels.patch(patched)
    x, mask = torch.randn(2, 9, 6), torch.rand(2, 9) > 0.5
    with pytest.warns(VidkernelsFallbackWarning, match="mask of single tokens"):
        losses = patched(x, return_loss_breakdown=True, mask=mask)[1]
    assert losses == original(x, return_loss_breakdown=True, mask=mask)[1]
    assert type(losses).__module__ == type(original(x, return_loss_breakdown=True)[1]).__module__


@pytest.mark.parametrize("kind", ["fsq", "lfq"])
def test_patched_quantizers_compile_whole(kind: str) -> None:
    torch._dynamo.reset()
    module, channels = MODELS[kind]()
    vidkernels.patch(module.eval())
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    z = torch.randn(2, 17, channels)
    for ours, right in zip(compiled(z), module(z), strict=True):
        assert torch.equal(ours, right)


def test_levels_without_values_run_the_original() -> None:
    """Upstream keeps its levels in a buffer alone, which has no values in a non-strict export and on the meta device."""
    module = upstream.FSQ([8, 5, 5], dim=7).eval()
    z = torch.randn(2, 7, 3, 4)
    right = module(z)
    vidkernels.patch(module)
    exported = torch.export.export(module, (z,), strict=False).module()(z)
    torch.testing.assert_close(exported, right, rtol=1e-6, atol=1e-6)
    assert module.to("meta")(z.to("meta"))[0].shape == z.shape
    with pytest.warns(VidkernelsFallbackWarning, match="levels lie in a tensor without values"):
        _guard._WARNED.clear()
        module(z.to("meta"))


def test_a_temperature_that_is_no_number_runs_the_original() -> None:
    module = upstream.LFQ(dim=6).train()
    x = torch.randn(2, 9, 6)
    right = module(x, inv_temperature=torch.tensor(10.0))
    vidkernels.patch(module)
    for found, expected in zip(module(x, inv_temperature=torch.tensor(10.0)), right, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("passing", [quantizers.CLAMPED_ENDS_PASS, False], ids=["this torch", "a newer torch"])
def test_gradients_at_the_ends_of_a_hard_clamp_are_those_of_this_torch(
    passing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From torch 2.14 on they are 0, where the kernels let them pass: there the original runs if gradients are wanted."""
    monkeypatch.setattr(quantizers, "CLAMPED_ENDS_PASS", passing)
    module = upstream.FSQ([5, 3], bound_hard_clamp=True).train()
    z = torch.tensor([-1.5, -1.0, 0.25, 1.0]).repeat(1, 3, 2).view(1, 12, 2).requires_grad_()
    right = torch.autograd.grad(module(z)[0].sum(), z)[0]
    vidkernels.patch(module)
    assert torch.equal(torch.autograd.grad(module(z)[0].sum(), z)[0], right)
    before = vidkernels.status(module).fallbacks
    assert bool(before) == (not passing)
    with torch.no_grad():
        module(z)
    assert vidkernels.status(module).fallbacks == before
