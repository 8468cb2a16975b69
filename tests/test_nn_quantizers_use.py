# SPDX-License-Identifier: Apache-2.0
"""What users do with `nn.FSQ` and `nn.LFQ`: casts, the meta device, seeds, `torch.func`."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import vidkernels.nn as vknn
from vidkernels import dispatch, errors

upstream = pytest.importorskip("vector_quantize_pytorch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_decoding_in_another_dtype(dtype: torch.dtype) -> None:
    """A model cast as a whole decodes indices, too; upstream raises a dtype error."""
    for module in (
        vknn.FSQ([8, 5, 5], dim=9, orthogonal_rotation=True),
        vknn.LFQ(dim=9, codebook_size=2**5, orthogonal_rotation=True),
    ):
        indices = torch.arange(12).view(1, 12)
        right = module.indices_to_codes(indices)
        found = module.to(dtype).indices_to_codes(indices)
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        torch.testing.assert_close(found.to(right.dtype), right, rtol=4 * eps, atol=4 * eps)


def test_modules_on_the_meta_device() -> None:
    """Projections included: autocast knows no meta device."""
    x = torch.empty(2, 9, 3, 4, 5, device="meta")
    for module in (vknn.FSQ([8, 5, 5], dim=9), vknn.LFQ(dim=9, codebook_size=2**5)):
        out, indices, *_ = module.to("meta")(x)
        assert out.shape == x.shape and out.device.type == "meta" and indices.shape == (2, 3, 4, 5)


def test_modules_made_on_the_meta_device_and_loaded() -> None:
    """As large models are loaded: buffers that are in no checkpoint hold anything, here the largest numbers there are."""
    x, indices = torch.randn(2, 4, 9), torch.arange(12).view(3, 4)
    for make in (lambda: vknn.FSQ([8, 5, 5], dim=9), lambda: vknn.LFQ(dim=9, codebook_size=2**5)):
        right = make()
        with torch.device("meta"):
            module = make()
        module = module.to_empty(device="cpu")
        for buffer in module.buffers():
            buffer.fill_(float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).max)
        module.load_state_dict(right.state_dict())
        for training in (False, True):
            found, expected = (m.train(training)(x) for m in (module, right))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
        if isinstance(right, vknn.FSQ):
            levels = right.indices_to_level_indices(indices)
            assert torch.equal(module.indices_to_level_indices(indices), levels)
            assert levels.dtype == torch.int64 and torch.equal(levels[..., 0], indices % 8)


@pytest.mark.parametrize("layout", ["strided", "contiguous"])
def test_noise_of_one_seed_in_any_layout(layout: str) -> None:
    """Upstream fills its noise in the order of memory."""
    theirs = upstream.FSQ([5, 8], preserve_symmetry=True, noise_dropout=0.5)
    ours = vknn.FSQ([5, 8], preserve_symmetry=True, noise_dropout=0.5)
    z = torch.randn(3, 7, 2)
    if layout == "strided":
        z = z.transpose(0, 2).contiguous().transpose(0, 2)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(5)
        results.append(module.train()(z)[0])
    assert torch.equal(*results)


def test_functional_transforms_of_modules() -> None:
    """Gradients per sample, as differential privacy and meta-learning take them."""
    for ours, theirs in (
        (vknn.FSQ([8, 5, 5], dim=7), upstream.FSQ([8, 5, 5], dim=7)),
        (vknn.LFQ(dim=7, codebook_size=2**5, entropy_log_floor=1e-5), upstream.LFQ(dim=7, codebook_size=2**5)),
    ):
        ours.load_state_dict(theirs.state_dict())
        x, found = torch.randn(2, 6, 7), []
        for module in (ours, theirs):
            parameters = dict(module.named_parameters())

            def loss(values: dict[str, torch.Tensor], one: torch.Tensor, module: nn.Module = module) -> torch.Tensor:
                out, _, *aux = torch.func.functional_call(module, values, (one[None],), {})
                return out.square().sum() + sum(aux)

            with pytest.warns(errors.VidkernelsFallbackWarning) if module is ours else contextlib.nullcontext():
                dispatch.dispatchers()[f"{type(module).__name__.lower()}_quantize"]._warned.clear()
                found.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x))
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"frac_per_sample_entropy": 0.5}, {"entropy_loss_weight": 0.0, "commitment_loss_weight": 1.0}],
    ids=str,
)
def test_masks_that_do_not_fit(options: dict[str, float]) -> None:
    """By every loss: some of them let PyTorch say it."""
    x, module = torch.randn(2, 4, 7), vknn.LFQ(dim=7, codebook_size=8, **options)
    for mask in (torch.ones(3), torch.ones(2, 5), torch.ones(2, 4, 7), torch.ones(()), [True, False], "x"):
        with pytest.raises(errors.VidkernelsError, match="^mask: expected"):
            module(x, mask=mask)
    for mask in (torch.tensor([True, False]), torch.ones(2, 4)):
        assert module(x, mask=mask).entropy_aux_loss.isfinite()
