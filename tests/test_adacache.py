# SPDX-License-Identifier: Apache-2.0
"""AdaCache: the official code's 13 traces (steps, distances, latents), other models, undo, and its two siblings."""

from __future__ import annotations

import json

import pytest
import torch
from golden_rules import LATTE, draw, fill_transformer, latte_golden, manifest
from torch import nn

import vidkernels
from vidkernels.caching import CacheHandle, adacache
from vidkernels.caching.policies import AdaCachePolicy, FirstBlockPolicy, Observation, TaylorPolicy
from vidkernels.errors import OptionError, PatchError
from vidkernels.models.transformers import Latte, STDiT3
from vidkernels.sampling import shift_time
from vidkernels.sampling.rectified_flow import open_sora_shift

TRACES = json.loads((LATTE / "adacache_trace.json").read_text())
RESIDUAL = {"t-attn": "temporal-attention", "s-attn": "spatial-attention", "ca-mlp": "cross-and-mlp"}


def traced_model() -> STDiT3:
    """The tiny STDiT3 of RULE.md with only its slow timestep features."""
    model = fill_transformer(STDiT3.from_config(manifest("stdit3.json.gz")["_tiny_config"]))
    with torch.no_grad():
        model.t_embedder.mlp[0].weight[:, :64] = 0
        model.t_embedder.mlp[0].weight[:, 128:192] = 0
    return model


@torch.inference_mode()
def open_sora_sample(model: STDiT3, config: dict) -> torch.Tensor:
    """Open-Sora 1.2's sampling loop: Euler on shifted times, guidance in one batch, optional conditioning frames."""
    batch, steps = config["batch"], config["num_sampling_steps"]
    z, prompt = draw("trace/z", batch, 4, 5, 8, 12), draw("trace/y", batch, 1, 20, 32)
    mask = torch.zeros(batch, 20)
    mask[:, :9] = 1
    captions = torch.cat([prompt, model.y_embedder.y_embedding.expand(batch, 1, -1, -1)])
    shift = open_sora_shift(64, 96, 51)
    times = [1000 * shift_time(torch.tensor(1 - i / steps, dtype=torch.float64), shift).item() for i in range(steps)]
    size = {"fps": torch.tensor([24.0]), "height": torch.tensor([64.0]), "width": torch.tensor([96.0])}
    keep = (
        None
        if config["mask"] is None
        else torch.tensor(config["mask"], dtype=torch.float32).reshape(-1, 5).expand(batch, 5)
    )
    noise_added = None if keep is None else keep == 1
    for index, t in enumerate(times):
        extra = {}
        if keep is not None:
            active = keep * 1000 >= t
            assert noise_added is not None and not (active & ~noise_added).any()  # no partial edits in the traces
            extra = {"x_mask": active.repeat(2, 1)}
        output = model(torch.cat([z, z]), torch.full((2 * batch,), t), captions, mask, **size, **extra).chunk(2, 1)[0]
        conditional, null = output.chunk(2)
        step = (t - (times[index + 1] if index + 1 < steps else 0.0)) / 1000
        moved = z + (null + config["cfg_scale"] * (conditional - null)) * step
        z = moved if keep is None else torch.where(active[:, None, :, None, None], moved, z)
    return z


def install(model: nn.Module, config: dict) -> CacheHandle:
    codebook = tuple((float(threshold), int(rate)) for threshold, rate in config["codebook"])
    window = tuple(config["moreg_steps"]) if config.get("moreg_steps") else None
    return adacache(
        model,
        config["num_sampling_steps"],
        codebook=codebook,
        motion=config["apply_moreg"],
        motion_window=window,
        motion_scale=config.get("moreg_hyp", [0.385])[0],
        residual=RESIDUAL[config["cache_res"]],
        locations=config["cache_loc"],
    )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if i > 3 else []) for i, n in enumerate(TRACES)]
)
def test_traces_equal_official(name: str) -> None:
    run = TRACES[name]
    model = traced_model()
    with install(model, run["config"]) as handle:
        latents = open_sora_sample(model, run["config"])
        report = handle.report()
    assert list(report.computed_steps) == run["computed_steps"]
    expected = [decision for step in run["trace"] for decision in step.get("decisions", [])]
    assert [decision.rate for decision in report.decisions] == [decision["new_rate"] for decision in expected]
    torch.testing.assert_close(
        torch.tensor(report.distances),
        torch.tensor([decision["avg_distance"] for decision in expected]),
        rtol=1e-3,
        atol=1e-5,
    )
    torch.testing.assert_close(latents, latte_golden("adacache_final_latents.npz")[name], rtol=0, atol=1e-4)


def latte() -> Latte:
    torch.manual_seed(0)
    model = Latte.from_config({"depth": 4, "hidden_size": 32, "num_heads": 2, "input_size": 8, "num_frames": 4})
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model.eval()


def run_steps(model: nn.Module, steps: int, calls: int = 1) -> list[torch.Tensor]:
    x = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    outputs = []
    with torch.inference_mode():
        for step in range(steps):
            t = torch.full((2,), 999.0 - 10 * step)
            outputs += [model(half, t[: len(half)]) for half in x.chunk(calls)]
    return outputs


def test_reused_steps_skip_every_block_and_undo_is_exact() -> None:
    model = latte()
    keys, before = list(model.state_dict()), run_steps(model, 12)
    calls = [0]
    model.blocks[1].attn.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    handle = vidkernels.adacache(model, 12, codebook=((10.0, 3), (11.0, 3)), motion=False)
    run_steps(model, 12)
    assert handle.report().computed_steps == (1, 2, 5, 8, 11, 12)
    assert calls[0] == 6
    assert list(model.state_dict()) == keys
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, run_steps(model, 12), strict=True))


def test_one_delta_replaces_all_residuals() -> None:
    model = latte()
    with vidkernels.adacache(model, 6, codebook=((10.0, 2), (11.0, 2)), motion=False) as handle:
        run_steps(model, 6)
        stored = [tensor for store in handle._stores for _, tensors in store.deltas.values() for tensor in tensors]
    assert len(stored) == 1 and stored[0].shape == (2, 4, 16, 32)


def test_guidance_in_two_calls_decides_as_in_one() -> None:
    reports = []
    for calls in (1, 2):
        model = latte()
        with vidkernels.adacache(
            model, 12, codebook=((0.02, 4), (0.2, 3), (9.0, 2)), motion=True, calls_per_step=calls
        ) as handle:
            run_steps(model, 12, calls)
            reports.append(handle.report())
    assert reports[0].computed_steps == reports[1].computed_steps
    torch.testing.assert_close(
        torch.tensor(reports[0].distances), torch.tensor(reports[1].distances), rtol=1e-4, atol=1e-6
    )


def test_a_second_sample_starts_anew() -> None:
    model = latte()
    with vidkernels.adacache(model, 8, codebook=((10.0, 4), (11.0, 4)), motion=False) as handle:
        first = run_steps(model, 8)
        second = run_steps(model, 8)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert handle.report().computed_steps == (1, 2, 6, 7, 8)


@pytest.mark.parametrize("family", ["latte", "cogvideox", "wan"])
def test_diffusers_models_are_cached_and_restored(family: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    if family == "latte":
        model = diffusers.LatteTransformer3DModel(**manifest("latte_diffusers.json.gz")["_config_tiny"])
        kwargs = {"encoder_hidden_states": torch.randn(1, 7, 32)}
        x = torch.randn(1, 4, 5, 8, 8)
    elif family == "cogvideox":
        model = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
            num_layers=3, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=6,
        )  # fmt: skip
        kwargs = {"encoder_hidden_states": torch.randn(1, 6, 8)}
        x = torch.randn(1, 2, 4, 8, 8)
    else:
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32,
            num_layers=3, rope_max_seq_len=32,
        )  # fmt: skip
        kwargs = {"encoder_hidden_states": torch.randn(1, 6, 16)}
        x = torch.randn(1, 4, 2, 8, 8)
    model = model.eval()

    @torch.inference_mode()
    def run(step: int) -> torch.Tensor:
        return model(x, timestep=torch.tensor([900 - step]), **kwargs).sample

    plain = [run(step) for step in range(6)]
    with vidkernels.adacache(model, 6, codebook=((10.0, 2), (11.0, 2)), motion=False) as handle:
        cached = [run(step) for step in range(6)]
        assert handle.report().computed_steps == (1, 2, 4, 5, 6)
    for step in (0, 1, 3, 4, 5):
        assert torch.equal(cached[step], plain[step])
    # Step 3 reuses step 2's residuals: close to the truth, not equal to it.
    assert not torch.equal(cached[2], plain[2])
    assert (cached[2] - plain[2]).norm() < 0.1 * plain[2].norm()
    assert torch.equal(run(0), plain[0])


def test_taylor_forecasts_a_linear_drift_exactly() -> None:
    class Drift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = 0.0

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states + self.time

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Drift(), Drift()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model = Toy()
    handle = CacheHandle(model, TaylorPolicy(10, interval=3, order=1), residual="block")
    for step in range(10):
        for block in model.blocks:
            block.time = float(step)
        torch.testing.assert_close(model(torch.zeros(1, 2, 3)), torch.full((1, 2, 3), 2.0 * step))
    assert handle.report().computed_steps == (1, 2, 5, 8, 10)
    handle.remove()


def test_first_block_policy_follows_the_drift() -> None:
    model = latte()
    plain = run_steps(model, 8)
    for threshold, expected in ((0.0, 8), (1e9, 2)):
        handle = CacheHandle(model, FirstBlockPolicy(8, threshold), residual="block")
        outputs = run_steps(model, 8)
        assert len(handle.report().computed_steps) == expected
        handle.remove()
        if threshold == 0.0:
            assert all(torch.allclose(a, b) for a, b in zip(plain, outputs, strict=True))


def test_schedule_arithmetic() -> None:
    policy = AdaCachePolicy(30, ((0.1, 5), (0.2, 2), (1.0, 1)), motion=False)
    computed = []
    for step in range(1, 31):
        if policy.computes(step):
            computed.append(step)
            policy.observe(step, [Observation(0, None if step == 1 else 0.05)])
    assert computed == [1, 2, 7, 12, 17, 22, 27, 29, 30]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: adacache(latte(), 1), OptionError, "steps: expected at least 2"),
        (lambda: adacache(latte(), 30, codebook="fast"), OptionError, "codebook: expected one of"),
        (lambda: adacache(latte(), 30, codebook=((0.5, 1), (0.1, 2))), OptionError, "codebook: expected"),
        (lambda: adacache(latte(), 30, locations=[9]), OptionError, "locations: expected indices below 2"),
        (lambda: adacache(latte(), 30, residual="mlp"), OptionError, "residual: expected one of"),
        (lambda: adacache(nn.Linear(2, 2), 30), PatchError, "Linear has no list of transformer blocks"),
    ],
)
def test_wrong_arguments(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()


def test_two_caches_on_one_model_are_refused_and_leave_the_first_alone() -> None:
    model = latte()
    handle = adacache(model, 8)
    with pytest.raises(PatchError, match="already has a step cache"):
        adacache(model, 8)
    run_steps(model, 8)
    assert handle.report().total_steps == 8
    handle.remove()
