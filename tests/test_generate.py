# SPDX-License-Identifier: Apache-2.0
"""The generate command: every kind of transformer to latents or to a real video file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from golden_rules import manifest

from vidkernels import _video
from vidkernels._commands import generate as _generate
from vidkernels._pipeline import Pipeline, PipelineConfig, Request, build, load_folder
from vidkernels._pipeline_sample import sample
from vidkernels.models.tokenizers import VidTok, VidTokConfig
from vidkernels.models.transformers.goku import GokuConfig
from vidkernels.sampling import RectifiedFlow

pytest.importorskip("av")
safetensors = pytest.importorskip("safetensors.torch")

TINY = {"depth": 2, "hidden_size": 32, "num_heads": 2, "in_channels": 4}


def goku(**changes) -> Pipeline:
    config = asdict(GokuConfig(**{**TINY, "text_channels": None, "num_classes": 3, **changes}))
    made = PipelineConfig(
        "goku",
        config,
        mean=(0.5, 0.0, -0.5, 1.0),
        std=(2.0, 1.0, 1.0, 0.5),
        size=(2, 4, 6),
        labels=("sea", "sky", "road"),
        fps=12,
    )
    return build(made, None, 0, "cpu", torch.float32)


def tokenizer(name: str = "kl_causal_488_4chn") -> VidTok:
    torch.manual_seed(0)
    return VidTok(dataclasses.replace(VidTokConfig.named(name), channels=16)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A trained run's export: transformer, statistics, tokenizer."""
    pipeline = goku()
    pipeline.tokenizer = tokenizer()
    pipeline.save(tmp_path / "model")
    return tmp_path / "model"


def run(*argv: object) -> int:
    return _generate.main([str(value) for value in argv])


def test_folder_gives_a_real_video(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.mp4"
    assert run("--model", folder, "--out", out, "--label", "sky", "--steps", 3, "--size", 32, 48, "--frames", 7) == 0
    assert "7 frames of 32x48" in capsys.readouterr().out
    assert _video.count_frames(out) == 7 and _video.frame_rate(out) == 12
    assert next(_video.read_chunks(out, 7)).shape == (1, 3, 7, 32, 48)
    assert run("--model", folder, "--out", tmp_path / "own.mp4", "--label", "0", "--steps", 2) == 0
    assert _video.count_frames(tmp_path / "own.mp4") == 5  # the folder's own 2 latent frames


@pytest.mark.parametrize("method", ["euler", "unipc"])
def test_guidance_in_one_pack_equals_two_calls(method: str) -> None:
    if method == "unipc":
        pytest.importorskip("diffusers")
    pipeline = goku()
    model, steps, scale = pipeline.model.double(), 3, 4.0
    request = Request((2, 4, 6), label=1, steps=steps, method=method, guidance=scale, shift=2.0, seed=5)
    noise = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(5))
    from vidkernels import packing

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        packed, parts = packing.pack([x[0].double()]), []
        for label in (1, 3):
            place = (packed.cu_seqlens, packed.max_seqlen, packed.positions)
            tokens = model(packed.tokens, t.double(), *place, labels=torch.tensor([label]))
            parts.append(packing.unpack(packed, tokens)[0][None])
        return (parts[1] + scale * (parts[0] - parts[1])).float()

    with torch.inference_mode():
        expected = RectifiedFlow("t", shift=2.0, time_scale=1.0).sample(velocity, noise, steps, method=method)
        mean, std = torch.tensor([0.5, 0.0, -0.5, 1.0]), torch.tensor([2.0, 1.0, 1.0, 0.5])
        expected = expected * std.reshape(1, 4, 1, 1, 1) + mean.reshape(1, 4, 1, 1, 1)
    seen: list[int] = []
    actual = sample(pipeline, request, seen.append)
    assert seen == [1, 2, 3]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(actual, sample(pipeline, request))
    assert not torch.equal(actual, sample(pipeline, dataclasses.replace(request, seed=6)))


def test_fsq_latents_go_to_the_nearest_codes(tmp_path: Path) -> None:
    pipeline = goku(in_channels=5)
    pipeline.tokenizer = tokenizer("fsq_causal_488_32768_v1_1")
    levels = pipeline.tokenizer.config.levels
    from vidkernels import ops

    indices = torch.randint(0, 8**5, (1, 2, 4, 4))
    codes = ops.fsq_indices_to_codes(indices, levels, dim=1)
    with torch.inference_mode():
        exact = torch.cat(list(pipeline.decode(codes)), 2)
        near = torch.cat(list(pipeline.decode(codes + 0.05 * torch.randn_like(codes).clamp(-2, 2))), 2)
    assert torch.equal(exact, near)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_published_latte_with_random_weights(method: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "latte.mp4"
    options = ("--random-weights", 0, "--num-classes", 5, "--label", 2, "--steps", 6, "--method", method)
    size = ("--size", 64, 64, "--frames", 2)
    assert run("--model", "latte-s/8", "--out", out, *options, *size, "--adacache", "30-fast") == 0
    printed = capsys.readouterr().out
    assert "of 6 steps" in printed and "no tokenizer: latents instead of latte.mp4" in printed
    assert safetensors.load_file(str(out.with_suffix(".safetensors")))["latents"].shape == (1, 4, 2, 8, 8)
    assert not out.exists()


def test_weights_of_a_published_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The class table's size comes from the file; a wrong size of video is one line that names the tensor."""
    from vidkernels.models.transformers import Latte

    torch.manual_seed(3)
    model = Latte.from_config("Latte-S/8", input_size=8, num_frames=2, num_classes=7)
    weights = tmp_path / "latte.pt"
    torch.save({"ema": model.state_dict(), "model": {}}, weights)
    base = ("--model", "Latte-S/8", "--weights", weights, "--out", tmp_path / "x.safetensors", "--steps", 2)
    assert run(*base, "--size", 64, 64, "--frames", 2, "--label", 6) == 0
    assert run(*base, "--size", 64, 64, "--frames", 2, "--label", 7) == 1
    assert "--label: expected 0 to 6" in capsys.readouterr().err
    assert run(*base, "--size", 128, 128, "--frames", 2, "--label", 6) == 1
    assert "--weights: expected pos_embed (1, 4, 384)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["goku", "stdit3", "latte_t2v"])
def test_text_conditioned_models(kind: str, tmp_path: Path) -> None:
    if kind == "goku":
        config, width = asdict(GokuConfig(**TINY, text_channels=24)), 24
    elif kind == "stdit3":
        config, width = manifest("stdit3.json.gz")["_tiny_config"], 32
    else:
        config, width = dict(manifest("latte_diffusers.json.gz")["_config_tiny"]), 32
        from vidkernels.models.transformers.latte_t2v import LatteT2VConfig

        config = asdict(LatteT2VConfig.from_dict(config))
    frames = config.get("video_length", 5)
    config = PipelineConfig(kind, {k: v for k, v in config.items()}, size=(frames, 8, 8))
    build(config, None, 1, "cpu", torch.float32).save(tmp_path / "model")
    text = tmp_path / "text.safetensors"
    states = {"text": torch.randn(6, width), "null": torch.randn(2, width)}
    safetensors.save_file(states, str(text))
    outputs = []
    for guidance in (1, 6):
        out = tmp_path / f"{guidance}.safetensors"
        options = ("--text", text, "--steps", 3, "--guidance", guidance)
        assert run("--model", tmp_path / "model", "--out", out, *options, "--adacache", "30-slow") == 0
        outputs.append(safetensors.load_file(str(out))["latents"])
    assert outputs[0].shape == (1, 4, frames, 8, 8)
    assert torch.isfinite(outputs[1]).all() and not torch.equal(outputs[0], outputs[1])


def test_unipc_with_a_step_cache_from_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One call a step, unlike heun: a cache counts it right."""
    pytest.importorskip("diffusers")
    out = tmp_path / "latents.safetensors"
    options = ("--label", 1, "--steps", 5, "--method", "unipc", "--adacache", "30-slow")
    assert run("--model", folder, "--out", out, *options) == 0
    assert "of 5 steps" in capsys.readouterr().out
    assert torch.isfinite(safetensors.load_file(str(out))["latents"]).all()


def test_folder_round_trip(folder: Path) -> None:
    pipeline = load_folder(folder, "cpu", torch.float32)
    again = goku()
    assert pipeline.config == again.config and pipeline.tokenizer is not None
    for key, value in again.model.state_dict().items():
        assert torch.equal(pipeline.model.state_dict()[key], value)


def test_errors_are_one_clear_line_and_leave_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, text = tmp_path / "out.mp4", tmp_path / "text.safetensors"
    safetensors.save_file({"text": torch.zeros(3, 7)}, str(text))
    random = ("--random-weights", 0)
    cases = [
        (("--model", "latte-s/2"), "--weights: expected a checkpoint of the transformer"),
        (("--model", "lotto-s/2"), "--model: expected a folder, or one of latte-s/2"),
        (("--model", tmp_path), "--model: expected a published name or a folder with config.json"),
        (("--model", folder), "--label: expected 0 to 2, got None"),
        (("--model", folder, "--label", "sun"), "--label: expected a number or one of sea, sky, road"),
        (("--model", folder, "--label", 1, "--text", text), "--text: expected none"),
        (
            ("--model", folder, "--label", 1, "--method", "ddim"),
            "--method: expected one of euler, heun, unipc for goku",
        ),
        (("--model", folder, "--label", 1, "--size", 30, 40, "--frames", 5), "--size: expected multiples of 8"),
        (("--model", folder, "--label", 1, "--frames", 5), "--size, --frames: expected both or none"),
        (("--model", folder, "--label", 1, "--adacache", "fast"), "codebook: expected one of"),
        (("--model", "latte-s/2", *random, "--size", 32, 64, "--frames", 4), "--size: expected equal height and width"),
        (("--model", folder, "--label", 1, "--tokenizer", "fsq_causal_488_4096"), "--tokenizer: expected an existing"),
        (("--model", folder, "--label", 1, "--out", tmp_path / "x.txt"), "--out: expected a file ending in"),
    ]
    for argv, message in cases:
        argv = argv if "--out" in argv else (*argv, "--out", out)
        assert run(*argv) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    other = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**other, "kind": "unet"}))
    assert run("--model", folder, "--out", out) == 1
    assert "config.json: expected format vidkernels-dit-1" in capsys.readouterr().err
    for option in ("--steps", "--frames", "--num-classes"):  # 0 is not "as usual"
        with pytest.raises(SystemExit):
            run("--model", folder, "--label", 1, "--out", out, option, 0)
        assert f"argument {option}: expected a whole number from 1 on, got '0'" in capsys.readouterr().err
    assert not out.exists()
