# SPDX-License-Identifier: Apache-2.0
"""A step cache on the transformers of diffusers, on Open-Sora's blocks, on compiled and on patched models."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from caching_toys import (
    FAMILIES,
    TRACES,
    OpenSoraModel,
    diffusers_model,
    install,
    latte,
    open_sora_sample,
    run_steps,
    traced_model,
)
from golden_rules import latte_golden
from torch import nn

import vidkernels
from vidkernels import packing
from vidkernels.caching import CacheHandle, adacache
from vidkernels.caching.policies import FirstBlockPolicy, TaylorPolicy
from vidkernels.errors import OptionError, PatchError
from vidkernels.models.transformers import Latte

EVERY_OTHER = ((1e9, 2), (2e9, 2))
ALWAYS = ((1e9, 1),)


def count_blocks(model: nn.Module, handle: CacheHandle) -> list[int]:
    """One counter per block, through its own forward hooks."""
    counts: list[int] = []
    for blocks in handle._lists.values():
        for block in blocks:
            index = len(counts)
            counts.append(0)

            def hook(module, args, output, index=index) -> None:
                counts[index] += 1

            block.register_forward_hook(hook)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_models(family: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    model, run = diffusers_model(family, diffusers)
    plain = [run(step) for step in range(6)]
    classes = [type(module) for module in model.modules()]
    with adacache(model, 6, codebook=ALWAYS) as handle:
        assert all(torch.equal(run(step), plain[step]) for step in range(6))
        assert handle.report().computed_steps == (1, 2, 3, 4, 5, 6)
        assert len(handle.report().distances) >= 5 and max(handle.report().distances) > 0
    with adacache(model, 6, codebook=EVERY_OTHER, motion=False) as handle:
        counts = count_blocks(model, handle)
        cached = [run(step) for step in range(6)]
        assert handle.report().computed_steps == (1, 2, 4, 5, 6)
        assert set(counts) == {5}  # no block ran in step 3
        stored = [total for _, totals in handle._stores[0].deltas.values() for total in totals]
        streams = (
            2 if family in ("cogvideox", "hunyuan", "mochi", "latte", "ltx2") else 1
        )  # Latte: one per token layout
        assert len(stored) == streams
    assert all(torch.equal(cached[step], plain[step]) for step in (0, 1, 3, 4, 5))
    # Step 3 gets step 2's residuals: near the truth, not equal to it.
    assert not torch.equal(cached[2], plain[2])
    assert (cached[2] - plain[2]).norm() < 2 * (plain[2] - plain[1]).norm()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(0), plain[0])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "latte"])
def test_frames_of_full_attention_models_are_known(family: str) -> None:
    """Two frames each: MoReg sees the motion between them."""
    model, run = diffusers_model(family, pytest.importorskip("diffusers"))
    with adacache(model, 6, motion_window=(1, 6)) as handle:
        run(0)
        run(1)
        run(2)
        assert handle._meter.frames == 2
        with_motion = handle.report().decisions
    assert with_motion[0].scaled != with_motion[0].distance


def test_motion_without_known_frames_has_no_effect() -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model = Toy()
    with adacache(model, 6, motion=True, motion_window=(1, 6)) as handle:
        for step in range(6):
            model(torch.full((1, 4, 3), 1.0 + step))
        assert all(decision.scaled == decision.distance for decision in handle.report().decisions)


# The four policies of conditioning: plain, clean frames, two prompts, spatial residual.
@pytest.mark.parametrize("name", [n for i, n in enumerate(TRACES) if i in (0, 2, 5, 9)])
def test_open_sora_blocks_by_fingerprint(name: str) -> None:
    """Foreign blocks on flat tokens follow the official schedule, distances included."""
    run = TRACES[name]
    model = OpenSoraModel(traced_model())
    with install(model, run["config"]) as handle:
        latents = open_sora_sample(model, run["config"])
        report = handle.report()
    assert list(report.computed_steps) == run["computed_steps"]
    expected = [decision for step in run["trace"] for decision in step.get("decisions", [])]
    wanted = torch.tensor([decision["avg_distance"] for decision in expected])
    torch.testing.assert_close(torch.tensor(report.distances), wanted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(latents, latte_golden("adacache_final_latents.npz")[name], rtol=0, atol=1e-4)
    assert report.residual == handle._meter.residual != "block"


def test_diffusers_latte_is_measured_as_ours() -> None:
    """The gated temporal attention of diffusers' Latte and of LatteT2V, same weights: same distances and motion."""
    diffusers = pytest.importorskip("diffusers")
    from vidkernels.models.transformers import LatteT2V

    theirs, run = diffusers_model("latte", diffusers)
    ours = LatteT2V.from_config(dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    torch.manual_seed(0)
    x, caption = torch.randn(2, 4, 5, 8, 8), torch.randn(2, 7, 32)
    reports = []
    for model in (theirs, ours):
        with torch.inference_mode(), adacache(model, 8, motion_window=(1, 8)) as handle:
            for step in range(8):
                model(x, timestep=torch.full((2,), 900 - 60 * step), encoder_hidden_states=caption)
            reports.append(handle.report())
    assert reports[0].residual == reports[1].residual == "temporal-attention"
    assert reports[0].computed_steps == reports[1].computed_steps
    for kind in ("distance", "scaled"):
        values = [torch.tensor([getattr(decision, kind) for decision in report.decisions]) for report in reports]
        torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-7)


def test_patched_latte_keeps_its_schedule() -> None:
    diffusers = pytest.importorskip("diffusers")
    model, run = diffusers_model("latte", diffusers)
    reports, outputs = [], []
    for patched in (False, True):
        if patched:
            vidkernels.patch(model)
        with adacache(model, 8) as handle:
            outputs.append(torch.stack([run(3 * step) for step in range(8)]))
            reports.append(handle.report())
    vidkernels.unpatch(model)
    assert reports[0].computed_steps == reports[1].computed_steps
    torch.testing.assert_close(
        torch.tensor(reports[0].distances), torch.tensor(reports[1].distances), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["compile first", "cache first", "wrapped blocks", "whole model"])
def test_compiled_blocks(order: str) -> None:
    """Compiled models skip compiled blocks, and never compile again from step to step."""
    model = latte()
    expected = run_steps(model, 8)
    with adacache(model, 8, codebook=EVERY_OTHER, motion=False) as handle:
        reused = run_steps(model, 8)
        wanted = handle.report()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def compile_blocks() -> nn.Module:
        if order == "whole model":
            return torch.compile(model, backend=counter)
        for index, block in enumerate(model.blocks):
            if order == "wrapped blocks":
                model.blocks[index] = torch.compile(block, backend=counter, fullgraph=True)
            else:
                block.compile(backend=counter, fullgraph=True)
        return model

    called = model
    if order != "cache first":
        called = compile_blocks()
        run_steps(called, 2)
    with adacache(called, 8, codebook=EVERY_OTHER, motion=False) as handle:
        if order == "cache first":
            compile_blocks()
        first = run_steps(called, 8)
        compiled = counter.frame_count
        again = run_steps(called, 8)
        report = handle.report()
    assert counter.frame_count == compiled > 0
    assert report.computed_steps == wanted.computed_steps
    torch.testing.assert_close(torch.tensor(report.distances), torch.tensor(wanted.distances), rtol=1e-4, atol=1e-6)
    for a, b, c in zip(first, again, reused, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
        assert torch.equal(a, b)
    torch.testing.assert_close(run_steps(called, 8), expected, rtol=1e-4, atol=1e-5)


def test_two_calls_per_step_on_diffusers() -> None:
    """Guidance in two calls makes the same decisions as in one batch."""
    model, run = diffusers_model("wan", pytest.importorskip("diffusers"))
    reports = []
    for calls in (1, 2):
        with adacache(model, 8, codebook=((0.004, 3), (1.0, 1)), calls_per_step=calls) as handle:
            for step in range(8):
                for rows in [slice(None)] if calls == 1 else [slice(0, 1), slice(1, 2)]:
                    run(step, rows)
            reports.append(handle.report())
    assert reports[0].computed_steps == reports[1].computed_steps
    torch.testing.assert_close(
        torch.tensor(reports[0].distances), torch.tensor(reports[1].distances), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("policy", [FirstBlockPolicy(6, 0.2), TaylorPolicy(6, 2, 1)], ids=["first block", "taylor"])
def test_other_policies_on_two_streams(policy: object) -> None:
    model, run = diffusers_model("hunyuan", pytest.importorskip("diffusers"))
    plain = [run(step) for step in range(6)]
    handle = CacheHandle(model, policy, residual="block")
    cached = [run(step) for step in range(6)]
    computed = handle.report().computed_steps
    handle.remove()
    assert 2 <= len(computed) < 6
    for step in range(6):
        if step + 1 in computed:
            torch.testing.assert_close(cached[step], plain[step], rtol=1e-5, atol=1e-6)
        else:
            assert (cached[step] - plain[step]).norm() < 0.1 * plain[step].norm()


@pytest.mark.parametrize("calls", [1, 2])
def test_a_failed_forward_is_repeated_as_the_same_step(calls: int) -> None:
    """Out of memory behind the blocks of step 3, for instance: the step is done again, and the schedule is undisturbed."""
    model, reports = latte(), []
    for fails in (False, True):
        with adacache(model, 6, codebook=((0.02, 3), (0.05, 2), (1.0, 1)), calls_per_step=calls) as handle:
            for step in range(6):
                for call in range(calls):
                    x, t = (
                        torch.full((1, 4, 4, 8, 8), 0.1 * step) + torch.arange(8.0),
                        torch.full((1,), 900.0 - 10 * step),
                    )
                    if fails and step == 2 and call == calls - 1:
                        hook = model.final_layer.register_forward_pre_hook(lambda *_: 1 / 0)
                        with pytest.raises(ZeroDivisionError):
                            model(x, t)
                        hook.remove()
                    model(x, t)
            reports.append(handle.report())
    assert reports[0] == reports[1]


def test_blocks_that_do_not_continue_their_tokens_are_refused() -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 5)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[0](x)

    with pytest.raises(PatchError, match=r"blocks.0 turns tokens \[\(1, 4\)\] into"):
        model = Toy()
        with adacache(model, 4, residual="block"):
            model(torch.zeros(1, 4))
    assert type(model.blocks[0]) is nn.Linear


def own_model(kind: str):
    """A model of this package and its arguments at a step."""
    torch.manual_seed(0)
    if kind == "goku":
        import dit_workers

        model, packed = dit_workers.model().eval(), packing.pack([torch.randn(4, 2, 4, 4), torch.randn(4, 1, 2, 4)])
        place = (packed.cu_seqlens, packed.max_seqlen, packed.positions)
        return model, lambda step: model(
            packed.tokens, torch.tensor([0.1, 0.1]) + 0.05 * step, *place, labels=torch.tensor([0, 2])
        )
    config = {"depth": 4, "hidden_size": 32, "num_heads": 2, "input_size": 8, "num_frames": 4}
    changes = {"all tokens": {"conditioning": "all_tokens"}}.get(
        kind, {"variant": int(kind[-1]) if kind[-1].isdigit() else 1}
    )
    model = Latte.from_config({**config, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    x = torch.randn(2, 4, 4, 8, 8)
    return model, lambda step: model(x, torch.full((2,), 900.0 - 20 * step))


@pytest.mark.parametrize("kind", ["variant 1", "variant 2", "variant 3", "variant 4", "all tokens", "goku"])
@torch.inference_mode()
def test_models_of_this_package(kind: str) -> None:
    model, run = own_model(kind)
    plain = [run(step) for step in range(6)]
    with adacache(model, 6, codebook=ALWAYS) as handle:
        assert all(torch.equal(run(step), plain[step]) for step in range(6))
        assert len(handle.report().decisions) == 5
    with adacache(model, 6, codebook=EVERY_OTHER, motion=False) as handle:
        counts = count_blocks(model, handle)
        cached = [run(step) for step in range(6)]
        assert handle.report().computed_steps == (1, 2, 4, 5, 6) and set(counts) == {5}
    assert not torch.equal(cached[2], plain[2])
    assert (cached[2] - plain[2]).norm() < 2 * (plain[2] - plain[1]).norm()
    assert torch.equal(run(0), plain[0])


def test_packs_have_no_rows_per_request() -> None:
    with pytest.raises(OptionError, match="requests: expected 1 for a model over packs"):
        adacache(own_model("goku")[0], 6, requests=2)


def test_sharded_blocks_are_not_gathered_when_skipped(tmp_path) -> None:
    """FSDP2 on one process: a skipped block stays sharded, results are the unsharded model's."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model, x = latte(), torch.randn(2, 4, 4, 8, 8)
    with torch.no_grad(), adacache(model, 6, codebook=EVERY_OTHER, motion=False):
        expected = [model(x, torch.full((2,), 999.0 - 10 * step)) for step in range(6)]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        gathered = [0]
        model.blocks[1].register_forward_pre_hook(lambda *_: gathered.__setitem__(0, gathered[0] + 1))
        with adacache(model, 6, codebook=EVERY_OTHER, motion=False) as handle:
            with torch.no_grad():
                outputs = [model(x, torch.full((2,), 999.0 - 10 * step)) for step in range(6)]
            assert handle.report().computed_steps == (1, 2, 4, 5, 6) and gathered == [5]
        for a, b in zip(outputs, expected, strict=True):
            torch.testing.assert_close(a, b)
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@torch.inference_mode()
def test_decisions_never_wait_for_the_device() -> None:
    """Nothing in a cached sample reads a tensor back: sums arrive by an asynchronous copy."""
    model, x = latte().cuda(), torch.randn(2, 4, 4, 8, 8, device="cuda")
    times = [torch.full((2,), 999.0 - 10 * step, device="cuda") for step in range(8)]
    model(x, times[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        with adacache(model, 8, codebook=((0.05, 3), (1.0, 2)), motion=True) as handle:
            for t in times:
                model(x, t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 2 < len(handle.report().computed_steps) < 8
