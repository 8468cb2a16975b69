# SPDX-License-Identifier: Apache-2.0
"""Checks that several patched transformers pass, each in a test of its own file: they need a block's name, or an option."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from helpers import assert_within_promise
from patching_suite import ModelSuite, cast
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import vidkernels
from vidkernels.errors import VidkernelsFallbackWarning

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def shifted(processor: type) -> Any:
    """An attention processor of somebody's own: the results of `processor` plus one."""

    class Shifted(processor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            result = super().__call__(*args, **kwargs)
            return tuple(part + 1 for part in result) if isinstance(result, tuple) else result + 1

    return Shifted()


def honours_processor(model: Any, arguments: dict[str, Any], attentions: Iterable[Any], processor: type) -> None:
    """A patched model with another processor than the rules know computes what the unpatched one does."""
    with torch.no_grad():
        plain = model(**arguments).sample
        for attention in attentions:
            attention.processor = shifted(processor)
        with pytest.warns(VidkernelsFallbackWarning, match="an attention uses Shifted"):
            actual = model(**arguments).sample
        assert not torch.allclose(actual, plain, atol=1e-3)
        vidkernels.unpatch(model)
        torch.testing.assert_close(actual, model(**arguments).sample, **CLOSE)


def honours_attention_backend(suite: ModelSuite) -> None:
    """`set_attention_backend` of diffusers goes on working."""
    model, arguments = suite.ready(), suite.inputs()
    suite.patch(model)
    with torch.no_grad():
        expected = model(**arguments).sample
        model.set_attention_backend("_native_math")
        try:
            torch.testing.assert_close(model(**arguments).sample, expected, **CLOSE)
        finally:
            model.reset_attention_backend()


def chunks_feed_forward(model: Any, arguments: dict[str, Any], chunk: int, dim: int) -> None:
    """Blocks of a patched model whose MLP is cut into chunks run their original forward."""
    with torch.no_grad():
        expected = model(**arguments).sample
        for block in model.transformer_blocks:
            block.set_chunk_feed_forward(chunk, dim)
        with pytest.warns(VidkernelsFallbackWarning, match="feed-forward is chunked"):
            torch.testing.assert_close(model(**arguments).sample, expected, **CLOSE)


def batches_modulation(suite: ModelSuite, layers: int) -> None:
    """`batch_modulation=True` stacks so many projections, keeps the promise, and is undone."""
    model, arguments = suite.ready(), suite.inputs()
    with torch.no_grad():
        expected = model(**arguments).sample
        truth = copy.deepcopy(model).double()(**cast(arguments, torch.float64)).sample
        assert suite.patch(model, batch_modulation=True).batched == layers
        for _ in range(2):
            assert_within_promise(model(**arguments).sample, expected, truth)
        vidkernels.unpatch(model)
        assert torch.equal(model(**arguments).sample, expected)


def graphs_by_block(model: Any, arguments: dict[str, Any], blocks: Iterable[nn.Module]) -> int:
    """Compile block by block, compare with the eager model; how many graphs the blocks took."""
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        expected = model(**arguments).sample
        for block in blocks:
            block.compile(backend=counter, fullgraph=True)
        torch.testing.assert_close(model(**arguments).sample, expected, **CLOSE)
    torch._dynamo.reset()
    return counter.frame_count


def runs_fused_when_sharded(model: Any, arguments: dict[str, Any], blocks: Iterable[nn.Module]) -> None:
    """FSDP2 around each block and the model, on one process: results and gradients come from the fused forwards."""
    dist = torch.distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, expected = init_device_mesh("cpu", (1,)), model(**arguments).sample
        vidkernels.patch(model)
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        actual = model(**arguments).sample
        torch.testing.assert_close(actual, expected, atol=5e-6, rtol=1e-4)
        actual.square().sum().backward()
        assert vidkernels.status(model).fallbacks == {}
    finally:
        dist.destroy_process_group()


def leaves_kept_outputs(model: Any, arguments: dict[str, Any], layer: nn.Module) -> None:
    """What a hook on a layer of a patched model kept is not overwritten later."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        layer.register_forward_hook(lambda m, i, o: kept.append((o, o.clone())))
        model(**arguments)
    assert torch.equal(*kept[0])
