# SPDX-License-Identifier: Apache-2.0
"""Whole models on a GPU: patched ones against unpatched ones there and against float64, the package's own against their
references, under autocast, compiled, captured, cached, in pieces, sampled and trained.

The same functions run on the CPU among the slow tests, where they show that the comparisons themselves are sound.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import device_models as models
import pytest
import torch
import vae_cases as cases
from device_models import Run, Transformer, Vae, judge, moved, nudged, reference_backend, under_autocast
from patching_suite import no_fallback  # noqa: F401
from test_patching_magvit2_pytorch import known as magvit2_rules  # noqa: F401
from test_patching_official import registered as official_rules  # noqa: F401
from test_patching_official_vidtok import known as vidtok_rules  # noqa: F401
from torch import Tensor

import vidkernels
from vidkernels import ops
from vidkernels.caching import adacache
from vidkernels.models import tokenizers
from vidkernels.models.tokenizers import VidTok, VidTokConfig

FLOAT, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["f32", "bf16"])
CLOSE = {"atol": 1e-4, "rtol": 1e-3}


@pytest.fixture(
    params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, or the CPU as a rehearsal."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """TF32 off: the error of the original is float32's. And what a test compiled is not kept over the others."""
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, value in zip(places, before, strict=True):
        place.allow_tf32 = value
    torch._dynamo.reset()


@DTYPES
@pytest.mark.parametrize("name", models.TRANSFORMERS)
def test_transformer(name: str, dtype: torch.dtype, device: torch.device) -> None:
    case = Transformer(name, device, dtype)
    original, double = copy.deepcopy(case.model), copy.deepcopy(case.model).double()
    case.patch(case.model)
    runs = [case.run(model) for model in (original, case.model, double)]
    judge(runs, case.arguments, leaves=case.leaves)
    assert not vidkernels.status(case.model).fallbacks


@pytest.mark.parametrize("name", models.TRANSFORMERS)
def test_transformer_under_autocast(name: str, device: torch.device) -> None:
    """On a GPU norms return float32 under autocast, and rules follow them; on the CPU they do not."""
    case = Transformer(name, device)
    original, double = copy.deepcopy(case.model), copy.deepcopy(case.model).double()
    case.patch(case.model)
    runs = [case.run(model) for model in (original, case.model, double)]
    runs[:2] = [under_autocast(run, device) for run in runs[:2]]
    judge(runs, case.arguments, leaves=case.leaves)
    assert not vidkernels.status(case.model).fallbacks


@DTYPES
@pytest.mark.parametrize("name", models.VAES)
def test_vae(name: str, dtype: torch.dtype, device: torch.device) -> None:
    Vae(name, device, dtype).compare()


@pytest.mark.parametrize("name", ["wan2.1", "hunyuan", "cogvideox", "official-vidtok-decoder-1.1"])
def test_vae_of_channels_last(name: str, device: torch.device) -> None:
    Vae(name, device).compare(last=True)


@pytest.mark.parametrize("name", ["wan2.1", "ltx", "vidtok-kl"])
def test_vae_under_autocast(name: str, device: torch.device) -> None:
    Vae(name, device).compare(autocast=True)


@pytest.mark.parametrize("name", ["wan", "flux", "cogvideox"])
def test_gradients_of_a_transformer(name: str, device: torch.device) -> None:
    case = Transformer(name, device)
    inputs = [case.arguments]
    inputs += [{**case.arguments, **{key: nudged(case.arguments[key]) for key in case.leaves}} for _ in range(2)]
    double = copy.deepcopy(case.model).double()
    truth = case.suite.gradients(double, moved(case.arguments, device, torch.float64))
    originals = [case.suite.gradients(case.model, given) for given in inputs]
    case.patch(case.model, mode="training")
    patched = [case.suite.gradients(case.model, given) for given in inputs]
    cases.assert_gradients_agree(originals, patched, truth)


@pytest.mark.parametrize("name", ["wan2.1", "hunyuan"])
def test_gradients_of_a_vae(name: str, device: torch.device) -> None:
    model, x = models.diffusers_vae(name).to(device), cases.clip(name, cases.VAES[name].frames[1]).to(device)
    truth = cases.gradients(cases.in_double(model), x.double())
    inputs = x, nudged(x), nudged(x)
    originals = [cases.gradients(model, given) for given in inputs]
    vidkernels.patch(model, mode="training")
    cases.assert_gradients_agree(originals, [cases.gradients(model, given) for given in inputs], truth)


def in_chunks(model: Any, part: str, sizes: list[int]) -> Run:
    """CogVideoX's encoder or decoder over pieces of a clip, each with the caches of the one before."""

    def run(clip: Tensor) -> Tensor:
        found, caches = [], None
        for chunk in clip.split(sizes, 2):
            y, caches = getattr(model, part)(chunk, conv_cache=caches)
            found.append(y)
        return torch.cat(found, 2)

    return run


@DTYPES
def test_patched_stream(dtype: torch.dtype, device: torch.device) -> None:
    model = models.diffusers_vae("cogvideox").to(device, dtype)
    original, double = copy.deepcopy(model), cases.in_double(model)
    vidkernels.patch(model)
    given = {"encoder": torch.randn(1, 3, 17, 16, 16), "decoder": torch.randn(1, 4, 5, 2, 2)}
    for part, sizes in (("encoder", [9, 8]), ("decoder", [3, 2])):
        judge([in_chunks(m, part, sizes) for m in (original, model, double)], given[part].to(device, dtype), part)


def vidtok(name: str, device: torch.device, dtype: torch.dtype = FLOAT) -> VidTok:
    torch.manual_seed(0)
    return VidTok(dataclasses.replace(VidTokConfig.named(name), channels=16)).eval().to(device, dtype)


@pytest.mark.parametrize("name", ["kl_causal_488_4chn", "kl_causal_488_4chn_v1_1"])
def test_streaming_equals_the_whole_clip(name: str, device: torch.device) -> None:
    model, video = vidtok(name, device), torch.randn(1, 3, 17, 16, 16, device=device)
    double = copy.deepcopy(model).double()
    encoded, decoded = (
        lambda x: torch.cat(list(model.stream_encode(x.split((1, 4, 8, 4), 2))), 2),
        lambda z: torch.cat(list(model.stream_decode(z.split(1, 2), num_frames=17)), 2),
    )
    with torch.no_grad():
        latents = model.encode(video)
    judge([model.encode, encoded, double.encode], video, "encoded")
    whole = [lambda z, m=m: m.decode(z, num_frames=17) for m in (model, double)]
    judge([whole[0], decoded, whole[1]], latents, "decoded")


def against_reference(run: Any, model: Any, given: Any, what: str, leaves: tuple[str, ...] = ()) -> None:
    """One call of a model of this package, against the same call with references only."""
    double = copy.deepcopy(model).double()

    def reference(x: Any) -> Tensor:
        with reference_backend():
            return run(model, x)

    judge([reference, lambda x: run(model, x), lambda x: run(double, x)], given, what, leaves)


@DTYPES
@pytest.mark.parametrize("name", ["kl_causal_488_4chn", "kl_causal_488_4chn_v1_1", "kl_noncausal_488_4chn"])
def test_vidtok(name: str, dtype: torch.dtype, device: torch.device) -> None:
    model = vidtok(name, device, dtype)
    video = torch.randn(1, 3, 9 if model.config.causal else 8, 24, 16).to(device, dtype)
    against_reference(lambda m, x: m.moments(x), model, video, "moments")
    latents = torch.randn(1, 4, 3 if model.config.causal else 2, 3, 2).to(device, dtype)
    against_reference(lambda m, z: m.decode(z), model, latents, "video")


def test_tokens_are_those_of_the_cpu(device: torch.device) -> None:
    model = vidtok("fsq_causal_488_4096", device)
    video = torch.randn(1, 3, 9, 24, 16, device=device)
    with torch.no_grad():
        moments = model.moments(video)
        codes, log = model.regularize(moments)
        expected, there = model.regularize(moments.cpu())
        assert torch.equal(log["indices"].cpu(), there["indices"]) and torch.equal(codes.cpu(), expected)
        assert torch.equal(ops.fsq_indices_to_codes(log["indices"], model.config.levels, dim=1), codes)
        assert torch.equal(ops.fsq_codes_to_indices(codes, model.config.levels, dim=1), log["indices"])


@DTYPES
@pytest.mark.parametrize("name", ["magvit2", "magvit", "vqgan"])
def test_cnn_tokenizers(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """In bfloat16 the decoder alone: a code one rounding away is another code."""
    import test_cnn_tokenizers as toys

    torch.manual_seed(0)
    made = {
        "magvit2": lambda: tokenizers.MAGVIT2(tokenizers.MAGVIT2Config(**toys.SMALL_MAGVIT2)),
        "magvit": lambda: tokenizers.MAGVIT(tokenizers.MAGVITConfig(**toys.SMALL_MAGVIT)),
        "vqgan": lambda: tokenizers.VQGAN(toys.SMALL_VQGAN),
    }
    model = toys.shake(made[name]())
    video = torch.randn(1, 3, *{"magvit2": (5,), "magvit": (4,), "vqgan": ()}[name], 16, 16)
    with torch.no_grad():
        codes, tokens = model.encode(video)[:2]
        model = model.to(device, dtype)
        if dtype == FLOAT:
            assert torch.equal(model.encode(video.to(device))[1].cpu(), tokens)
    against_reference(lambda m, z: m.decode(z), model, codes.to(device, dtype), "decoded")


KINDS = ["latte {'variant': 1}", "latte {'conditioning': 'all_tokens'}", "latte t2v", "stdit3", "goku"]


@pytest.mark.parametrize("autocast", [False, True], ids=["f32", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_of_this_package(kind: str, autocast: bool, device: torch.device) -> None:
    from transformer_cases import every_model

    model, arguments = every_model()[kind]
    model, arguments = model.to(device), moved(arguments, device)

    def run(m: Any, given: Any) -> Tensor:
        plain: Run = lambda g: m(**g)  # noqa: E731
        return (under_autocast(plain, device) if autocast and m is model else plain)(given)

    leaf = next(name for name in ("x", "hidden_states", "tokens") if name in arguments)
    against_reference(run, model, arguments, kind, (leaf,))


@pytest.mark.parametrize("kind", ["transformer", "vae"])
def test_compiles(kind: str, device: torch.device) -> None:
    """A transformer block by block and a VAE's residual block, without graph breaks; by inductor on a GPU."""
    options = {"fullgraph": True, "backend": "inductor" if device.type == "cuda" else "aot_eager"}
    torch._dynamo.reset()
    with torch.no_grad():
        if kind == "transformer":
            case = Transformer("wan", device)
            case.patch(case.model)
            expected = case.model(**case.arguments).sample
            for block in case.model.blocks:
                block.compile(**options)
            actual = case.model(**case.arguments).sample
        else:
            model = models.diffusers_vae("hunyuan").to(device)
            vidkernels.patch(model)
            block, x = model.decoder.up_blocks[1].resnets[0], torch.randn(1, 32, 3, 8, 8, device=device)
            expected = block(x)
            actual = torch.compile(block, **options)(x)
    torch.testing.assert_close(actual, expected, **CLOSE)
    torch._dynamo.reset()


def captured(run: Any) -> tuple[Any, Any]:
    """What a run returns inside a CUDA graph, and how the graph is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return output, graph.replay


@DTYPES
@pytest.mark.parametrize("name", ["wan", "ltx", "official-dit"])
def test_a_step_in_a_graph(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Captured once, replayed on other inputs: the same bits as a call. On the CPU: the call alone."""
    case = Transformer(name, device, dtype)
    case.patch(case.model)
    given, run = case.arguments, case.run(case.model)
    with torch.no_grad():
        first = run(given).clone()
        output, replay = captured(lambda: run(given)) if device.type == "cuda" else (None, None)
        given[case.leaves[0]].mul_(-0.5)
        expected = run(given)
        assert not torch.equal(first, expected)
        if replay is not None:
            replay()
            torch.cuda.synchronize()
            assert torch.equal(output, expected)


@pytest.mark.parametrize("family", ["latte", "cogvideox", "wan"])
def test_cache_on_a_patched_model(family: str, device: torch.device) -> None:
    from caching_toys import diffusers_model

    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    model, run = diffusers_model(family, diffusers, device)
    with adacache(model, 8, codebook=((1e9, 2),), motion=False) as handle:
        expected = torch.stack([run(step) for step in range(8)])
        steps = handle.report().computed_steps
    vidkernels.patch(model)
    with adacache(model, 8, codebook=((1e9, 2),), motion=False) as handle:
        actual = torch.stack([run(step) for step in range(8)])
        assert handle.report().computed_steps == steps == (1, 2, 4, 6, 7, 8)
    torch.testing.assert_close(actual, expected, **CLOSE)


class Clips:
    """Random clips in place of files."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, draw: Any) -> Tensor:
        return torch.rand(3, 5, 16, 16, generator=draw.generator()) * 2 - 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_steps(precision: str, device: torch.device, tmp_path: Path) -> None:
    """The first step's losses and the weights after two are the CPU's: reconstruction, entropy, a discriminator's game."""
    from vidkernels.training import TrainConfig, Trainer
    from vidkernels.training.metrics import read_lines
    from vidkernels.training.parallel import Processes
    from vidkernels.training.tokenizer import LossConfig, TokenizerTask, make_tokenizer

    values = {"steps": 2, "batch": 2, "seed": 4, "save_every": 2, "log_every": 1, "ema": 0.9, "validate_every": 2}
    config = TrainConfig.from_dict(
        {**values, "precision": precision, "optimizers": {"default": {"learning_rate": 1e-3}}}
    )
    small = {"kind": "magvit2", "channels": 8, "channel_multipliers": [1, 2], "residual_blocks": 1, "bits": 6}
    loss = LossConfig(entropy_weight=0.01, discriminator="patch3d", discriminator_channels=4, discriminator_layers=1)
    found = {}
    for place in dict.fromkeys((torch.device("cpu"), device)):
        torch.manual_seed(2)
        model = make_tokenizer({**small, "temporal_down": [True]})
        task = TokenizerTask(model, loss, (5, 16, 16), [torch.zeros(1, 3, 5, 16, 16)])
        processes = Processes.current(place)
        trainer = Trainer(task, config, Clips(), tmp_path / place.type, processes=processes)
        result = trainer.run()
        assert result.step == 2 and next(trainer.modules["model"].parameters()).device.type == place.type
        state = trainer.full_state_dict("model", averaged=False)
        lines = [
            {k: v for k, v in line.items() if k != "seconds"}
            for line in read_lines(tmp_path / place.type / "metrics.jsonl")
        ]
        assert len(lines) == 2 and torch.tensor([v for line in lines for v in line.values()]).isfinite().all()
        found[place.type] = lines[0], state
    if precision == "float32":
        (here, weights), (there, others) = found["cpu"], found[device.type]
        assert there == pytest.approx(here, rel=1e-3, abs=1e-4)
        # Adam's first steps are as long as the learning rate, whatever the gradient: twice two steps apart at most.
        for key, value in weights.items():
            torch.testing.assert_close(
                others[key], value, atol=4.5e-3, rtol=0, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize("kind", ["goku", "latte"])
def test_generating(kind: str, device: torch.device) -> None:
    """From noise to frames: the CPU's, within what three steps make of roundings."""
    from vidkernels._pipeline import PipelineConfig, Request, build
    from vidkernels._pipeline_sample import sample
    from vidkernels.models.transformers.goku import GokuConfig
    from vidkernels.models.transformers.latte import LatteConfig

    tiny = {"depth": 2, "hidden_size": 32, "num_heads": 2, "in_channels": 4, "num_classes": 3}
    made = {
        "goku": lambda: PipelineConfig("goku", dataclasses.asdict(GokuConfig(**tiny, text_channels=None))),
        "latte": lambda: PipelineConfig("latte", dataclasses.asdict(LatteConfig(**tiny, input_size=4, num_frames=2))),
    }
    config = dataclasses.replace(made[kind](), mean=(0.5, 0.0, -0.5, 1.0), std=(2.0, 1.0, 1.0, 0.5), size=(2, 4, 4))
    method = {"goku": "heun", "latte": "ddim"}[kind]
    request = Request((2, 4, 4), label=1, steps=3, method=method, guidance=2.0)
    found = []
    for place in (torch.device("cpu"), device):
        pipeline = build(config, None, 0, str(place), FLOAT)
        pipeline.tokenizer = vidtok("kl_causal_488_4chn", place)
        latents = sample(pipeline, request)
        with torch.no_grad():
            frames = torch.cat(list(pipeline.decode(latents, num_frames=5, chunk=1)), 2)
        assert frames.device.type == place.type and frames.shape == (1, 3, 5, 32, 32)
        found.append((latents.cpu(), frames.cpu()))
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)
    half = build(config, None, 0, str(device), BF16)
    assert sample(half, request).isfinite().all()


def test_tokenizing_chunks(device: torch.device) -> None:
    from vidkernels._commands import tokenize

    model = vidtok("fsq_causal_488_4096", device)
    video = torch.randn(1, 3, 9, 16, 16, device=device)
    with torch.inference_mode():
        tokens = torch.cat(list(tokenize._encode(model, video.split(4, 2), 9)), 1)
        whole = model.indices(video)
    assert tokens.shape == whole.shape and float((tokens != whole).double().mean()) < 0.05
