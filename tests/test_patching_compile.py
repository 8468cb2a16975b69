# SPDX-License-Identifier: Apache-2.0
"""Patched modules under torch.compile, torch.export and FSDP2 (one rank on the CPU)."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import patching_toys as toys
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import vidkernels
from vidkernels.errors import PatchError, VidkernelsFallbackWarning
from vidkernels.patching import _guard, _rule


@pytest.fixture(autouse=True)
def toy_rules() -> Iterator[None]:
    """The toy rules, and an empty compile cache."""
    before = list(_rule._USER)
    vidkernels.register_rule(toys.gate_rule())
    torch._dynamo.reset()
    toys.CALLS.clear()
    _guard._WARNED.clear()
    yield
    torch._dynamo.reset()
    _rule._USER[:] = before


class Stateless(toys.Gate):
    """A gate without streaming state, as a compiled block should be."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alpha = torch.sigmoid(self.mix)
        return alpha * x + (1 - alpha) * self.lin(x)


class FastStateless(toys.FastGate):
    """Its mixin."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        reason = toys.call_reason(x) or toys.child_reason(self.lin, torch.nn.Linear)
        if reason is not None:
            toys.note_fallback(self, reason)
            return super(toys.FastGate, self).forward(x)
        h = torch.nn.functional.linear(x, self.lin.weight, self.lin.bias)
        return torch.lerp(h, x, torch.sigmoid(self.mix))


@pytest.fixture
def blocks() -> torch.nn.ModuleList:
    """Eight patched blocks."""
    vidkernels.register_rule(
        toys.gate_rule(
            name="toys.stateless", targets=("test_patching_compile:Stateless",), mixin=FastStateless, digests={}
        )
    )
    model = torch.nn.ModuleList(Stateless(6) for _ in range(8))
    vidkernels.patch(model)
    return model


def test_eight_regional_blocks_make_one_graph(blocks: torch.nn.ModuleList) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    x = torch.randn(3, 6)
    expected = x
    with torch.no_grad():
        for block in blocks:
            expected = block(expected)
        for block in blocks:
            block.compile(backend=counter, fullgraph=True)
            x = block(x)
    assert counter.frame_count == 1
    torch.testing.assert_close(x, expected)


def test_no_recompile_over_batch_sizes(blocks: torch.nn.ModuleList) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(blocks[0], backend=counter, fullgraph=True, dynamic=True)
    for length in (2, 3, 5, 7, 11):
        compiled(torch.randn(length, 6))
    assert counter.frame_count == 1


def test_lora_after_compiling_costs_one_recompile(blocks: torch.nn.ModuleList) -> None:
    peft = pytest.importorskip("peft")
    counter = torch._dynamo.testing.CompileCounter()
    block, x = blocks[0], torch.randn(3, 6)
    compiled = torch.compile(block, backend=counter)
    before = compiled(x)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lin"], init_lora_weights=False), block)
    frames = counter.frame_count
    with pytest.warns(VidkernelsFallbackWarning, match="peft"):
        expected = block(x)
    after = compiled(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected)
    assert counter.frame_count > frames


def test_whole_model_compiles_and_trains() -> None:
    model, x = toys.Model(), torch.randn(4, 6, requires_grad=True)
    vidkernels.patch(model)
    expected = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    compiled = torch.compile(model, backend="aot_eager")
    actual = torch.autograd.grad(compiled(x).sum(), [x, *model.parameters()])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_wrapper_is_refused() -> None:
    model = toys.Model()
    with pytest.raises(PatchError, match=r"vidkernels\.patch first and torch\.compile afterwards"):
        vidkernels.patch(torch.compile(model, backend="eager"))
    assert vidkernels.status(model).patched == "none"


def test_compiled_child_is_refused_and_names_have_no_prefix() -> None:
    model = toys.Model()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    with pytest.raises(PatchError, match=r"blocks\.1 \(Gate\).*inside a torch\.compile wrapper"):
        vidkernels.patch(model)
    report = vidkernels.patch(model, exclude=("blocks.1",))
    assert [entry.name for entry in report.patched] == ["blocks.0"]


def test_patch_after_in_place_compile_takes_effect() -> None:
    model, x = toys.Model(), torch.randn(4, 6)
    model.compile(backend="eager")
    expected = model(x)
    vidkernels.patch(model)
    torch.testing.assert_close(model(x), expected)
    counter = torch._dynamo.testing.CompileCounter()
    model.compile(backend=counter)
    model(x)
    assert any("lerp" in str(node.target) for node in _graph_nodes(model, x))


def _graph_nodes(model: torch.nn.Module, x: torch.Tensor) -> list[torch.fx.Node]:
    nodes: list[torch.fx.Node] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nodes.extend(graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(copy.deepcopy(model), backend=keep)(x)
    return nodes


def test_export(blocks: torch.nn.ModuleList) -> None:
    x = torch.randn(3, 6)
    program = torch.export.export(blocks[0], (x,))
    torch.testing.assert_close(program.module()(x), blocks[0](x))
    assert any("lerp" in str(node.target) for node in program.graph.nodes)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A process group of one rank on the CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(model: toys.Model, mesh: DeviceMesh, children: bool = False) -> None:
    """FSDP2 on every block (and on its child), then on the model."""
    for block in model.blocks:
        if children:
            fully_shard(block.lin, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def test_patch_then_shard(mesh: DeviceMesh) -> None:
    model, x = toys.Model(), torch.randn(4, 6)
    expected = model(x).detach()
    vidkernels.patch(model)
    shard(model, mesh)
    torch.testing.assert_close(model(x), expected)
    assert sum(toys.CALLS.values()) == 3
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert vidkernels.status(model).patched == "irregular"
    with pytest.raises(PatchError, match=r"FSDPGate\); unpatch before fully_shard"):
        vidkernels.unpatch(model)
    assert isinstance(model.blocks[0], FSDPModule)


def test_shard_then_patch(mesh: DeviceMesh) -> None:
    model, x = toys.Model(), torch.randn(4, 6)
    expected = model(x).detach()
    shard(model, mesh)
    vidkernels.patch(model)
    torch.testing.assert_close(model(x), expected)
    assert sum(toys.CALLS.values()) == 3 and isinstance(model.blocks[0], FSDPModule)
    assert vidkernels.unpatch(model) == 2
    assert isinstance(model.blocks[0], FSDPModule)
    torch.testing.assert_close(model(x), expected)


def test_child_sharded_on_its_own_is_refused_or_falls_back(mesh: DeviceMesh) -> None:
    model, x = toys.Model(), torch.randn(4, 6)
    expected = model(x).detach()
    vidkernels.patch(model)
    shard(model, mesh, children=True)
    with pytest.warns(VidkernelsFallbackWarning, match="FSDPLinear"):
        torch.testing.assert_close(model(x), expected)
    assert not toys.CALLS
    model = toys.Model()
    shard(model, mesh, children=True)
    report = vidkernels.patch(model, strict=False)
    assert not report and "sharded on its own" in report.skipped[0].reason


def test_tensor_parallel_weight_is_refused(mesh: DeviceMesh) -> None:
    model = toys.Model()
    parallelize_module(model.blocks[0], mesh, {"lin": ColwiseParallel()})
    report = vidkernels.patch(model, strict=False)
    assert [entry.name for entry in report.patched] == ["blocks.1"]
    assert "is a DTensor" in report.skipped[0].reason
