# SPDX-License-Identifier: Apache-2.0
"""A step cache and a patch on one model: whichever comes first, whichever goes first."""

from __future__ import annotations

import pytest
import torch
from caching_toys import FAMILIES, diffusers_model, latte, run_steps
from torch import nn

import vidkernels
from vidkernels.caching import _blocks, adacache
from vidkernels.caching._requests import CachedModel
from vidkernels.errors import PatchError

EVERY_OTHER = {"codebook": ((1e9, 2),), "motion": False}
COMPUTED = (1, 2, 4, 6, 7, 8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", ["cache", "patch"])
def test_each_leaves_without_the_other(family: str, first: str) -> None:
    """The one that came first leaves first; what stays works on, and the last to leave restores the classes."""
    diffusers = pytest.importorskip("diffusers")
    model, run = diffusers_model(family, diffusers)
    classes = [type(module) for module in model.modules()]
    plain = torch.stack([run(step) for step in range(8)])

    def close(outputs: list[torch.Tensor], expected: torch.Tensor) -> None:
        torch.testing.assert_close(torch.stack(outputs), expected, rtol=1e-3, atol=1e-4)

    with adacache(model, 8, **EVERY_OTHER) as handle:
        cached = torch.stack([run(step) for step in range(8)])
    if first == "cache":
        handle = adacache(model, 8, **EVERY_OTHER)
        assert vidkernels.patch(model).patched
    else:
        assert vidkernels.patch(model).patched
        handle = adacache(model, 8, **EVERY_OTHER)
    close([run(step) for step in range(8)], cached)
    assert handle.report().computed_steps == COMPUTED
    if first == "cache":
        handle.remove()
        assert vidkernels.status(model).patched in ("all", "some")
        close([run(step) for step in range(8)], plain)
        vidkernels.unpatch(model)
    else:
        vidkernels.unpatch(model)
        assert vidkernels.status(model).patched == "none"
        handle.reset()
        assert torch.equal(torch.stack([run(step) for step in range(8)]), cached)
        assert handle.report().computed_steps == COMPUTED
        handle.remove()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(torch.stack([run(step) for step in range(8)]), plain)


def test_a_patch_that_pauses_below_a_cache() -> None:
    diffusers = pytest.importorskip("diffusers")
    model, run = diffusers_model("wan", diffusers)
    vidkernels.patch(model)
    with adacache(model, 8, **EVERY_OTHER) as handle:
        fused = [type(block) for block in model.blocks]
        with vidkernels.unpatched(model):
            assert [run(step) for step in range(8)] and handle.report().computed_steps == COMPUTED
        assert [type(block) for block in model.blocks] == fused
        assert [run(step) for step in range(8)] and handle.report().computed_steps == COMPUTED
    vidkernels.unpatch(model)


def test_blocks_that_another_re_classed_keep_the_whole_cache() -> None:
    """Nothing is removed half."""
    model = latte()
    handle = adacache(model, 8, **EVERY_OTHER)
    block = model.blocks[2]
    cached = type(block)
    block.__class__ = type("Sharded", (cached,), {})
    with pytest.raises(PatchError, match="Sharded was re-classed after the cache was installed"):
        handle.remove()
    run_steps(model, 8)
    assert handle.report().computed_steps == COMPUTED
    block.__class__ = cached
    handle.remove()
    assert not any(hasattr(block, "_vidkernels_cache") for block in model.blocks)


def test_a_class_that_is_a_block_here_and_a_model_there() -> None:
    block, model, controller = nn.Identity(), nn.Identity(), object()
    for module, mixin in ((block, _blocks.CachedBlock), (model, CachedModel)):
        module.__dict__["_vidkernels_cache"] = (controller, None)
        _blocks.reclass(module, mixin)
        assert type(module).__mro__[1] is mixin
    for module, mixin in ((block, _blocks.CachedBlock), (model, CachedModel)):
        assert _blocks.original(module, controller, mixin) is nn.Identity
