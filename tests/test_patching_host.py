# SPDX-License-Identifier: Apache-2.0
"""What a patched network asks of Python in each call. Small decodes on a GPU wait for the host: `nn.Module.__getattr__` (0.8 us
a child or weight) made up a third of the time between ops."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import vae_cases as cases
from torch import nn

import vidkernels

pytest.importorskip("diffusers", minversion="0.42")


def lookups(monkeypatch: pytest.MonkeyPatch, call: Any) -> Counter[tuple[str, str]]:
    """Children, weights and missing names asked for through `nn.Module.__getattr__` while `call` runs."""
    found: Counter[tuple[str, str]] = Counter()
    original = nn.Module.__getattr__

    def counted(self: nn.Module, name: str) -> Any:
        found[type(self).__name__, name] += 1
        return original(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__getattr__", counted)
        call()
    return found


@pytest.mark.parametrize("name", ["wan2.1", "hunyuan", "cogvideox"])
def test_children_and_weights_of_blocks_are_not_asked_for_by_attribute(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cases.build(name)
    x = cases.clip(name, 9)
    with torch.no_grad():
        z = cases.latents(model, x)
        unpatched = lookups(monkeypatch, lambda: cases.decode(model, z))
        vidkernels.patch(model)
        patched = lookups(monkeypatch, lambda: cases.decode(model, z))
    assert patched.total() < 0.5 * unpatched.total(), patched.most_common(10)
    children = {key: count for key, count in patched.items() if key[1] in ("norm1", "norm2", "gamma", "weight")}
    assert sum(children.values()) < 20, children  # upsamplers and ends; each block alone had ten


def test_weights_that_are_plain_attributes_are_read() -> None:
    """FSDP 1 without `use_orig_params` and `nn.DataParallel` keep weights as attributes, `_parameters` without them."""
    model = cases.build("wan2.1").requires_grad_(False)
    vidkernels.patch(model)
    z = torch.randn(1, 4, 2, 4, 4)
    with torch.no_grad():
        expected = model.decode(z).sample
        for module in list(model.decoder.modules()):
            for key, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[key]
                    module.__dict__[key] = parameter.detach()
        assert torch.equal(model.decode(z).sample, expected)


def test_marks_of_chunks_reach_the_modules_that_have_them() -> None:
    import diffusers

    torch.manual_seed(0)
    model = diffusers.AutoencoderVidTok(ch=16, ch_mult=[1, 1, 2], num_res_blocks=1)
    original = copy.deepcopy(model)
    vidkernels.patch(model)
    for network in (original, model):
        for module in network.modules():
            if hasattr(module, "causal_cache"):
                module.causal_cache = torch.zeros(1)
        network._set_first_chunk(False)
        network._empty_causal_cached(network.decoder)
    expected, actual = (
        {
            (name, key): module.__dict__.get(key) is None if key == "causal_cache" else module.__dict__.get(key)
            for name, module in network.named_modules()
            for key in ("is_first_chunk", "causal_cache")
        }
        for network in (original, model)
    )
    assert actual == expected and list(actual.values()).count(False) > 20
