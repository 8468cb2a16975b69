# SPDX-License-Identifier: Apache-2.0
"""The generate command: every kind of transformer to latents or to a real video file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_rules import manifest

from vidkernels import _video
from vidkernels.__main__ import main
from vidkernels._pipeline import Pipeline, PipelineConfig, Request, build, load_folder
from vidkernels._pipeline_sample import sample
from vidkernels.models.tokenizers import VidTok, VidTokConfig
from vidkernels.models.transformers import Latte
from vidkernels.models.transformers.goku import GokuConfig
from vidkernels.sampling import RectifiedFlow
from vidkernels.sampling.rectified_flow import open_sora_shift

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
    return main(["generate", *map(str, argv)])


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
    torch.manual_seed(3)
    model = Latte.from_config("Latte-S/8", input_size=8, num_frames=2, num_classes=7)
    weights = tmp_path / "latte.pt"
    torch.save({"ema": model.state_dict(), "model": {}}, weights)
    base = ("--model", "Latte-S/8", "--weights", weights, "--out", tmp_path / "x.safetensors", "--steps", 2)
    assert run(*base, "--size", 64, 64, "--frames", 2, "--label", 6) == 0
    assert run(*base, "--size", 64, 64, "--frames", 2, "--label", 7) == 2
    assert "--label: expected 0 to 6" in capsys.readouterr().err
    assert run(*base, "--size", 128, 128, "--frames", 2, "--label", 6) == 2
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


@pytest.mark.parametrize("kind", ["stdit3", "latte_t2v"])
def test_published_folders(kind: str, tmp_path: Path) -> None:
    """A transformer as diffusers or Open-Sora leave it on disk gives what its own export gives; shards are joined."""
    folder, own = tmp_path / "published", tmp_path / "own"
    if kind == "latte_t2v":
        latte = pytest.importorskip("diffusers").LatteTransformer3DModel
        config = {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "cross_attention_dim": 16,
            "out_channels": 8,
        }
        config |= {"caption_channels": 8, "sample_size": 8, "video_length": 3, "in_channels": 4, "patch_size": 2}
        fixed = {
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "attention_bias": True,
        }
        latte(**config, **fixed, activation_fn="gelu-approximate").save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 1 and len(list(folder.glob("*.index.json"))) == 1
        kept = PipelineConfig(kind, config, size=(3, 8, 8))
    else:
        config = {"depth": 1, "hidden_size": 16, "num_heads": 2, "caption_channels": 8, "model_max_length": 4}
        kept = PipelineConfig(kind, config, size=(3, 8, 8))
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "STDiT3", "enable_flash_attn": True}))
        state = build(kept, None, 1, "cpu", torch.float32).model.state_dict()
        safetensors.save_file(state, str(folder / "model.safetensors"))
    build(kept, folder, None, "cpu", torch.float32).save(own)
    text, outputs = tmp_path / "text.safetensors", []
    safetensors.save_file({"text": torch.randn(4, 8), "null": torch.randn(2, 8)}, str(text))
    for model in (folder, own):
        options = ("--text", text, "--steps", 2, "--size", 64, 64, "--frames", 3 if kind == "latte_t2v" else 17)
        assert run("--model", model, "--out", tmp_path / f"{model.name}.safetensors", *options) == 0
        outputs.append(safetensors.load_file(str(tmp_path / f"{model.name}.safetensors"))["latents"])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", ["latte", "latte_t2v"])
def test_models_without_a_learned_variance(kind: str, tmp_path: Path) -> None:
    """As many channels out as in; the folder's file need not name what is as usual, and weights say it themselves."""
    text = tmp_path / "text.safetensors"
    safetensors.save_file({"text": torch.randn(6, 8), "null": torch.randn(2, 8)}, str(text))
    if kind == "latte":
        config = {"depth": 2, "hidden_size": 16, "num_heads": 2, "input_size": 4, "num_frames": 3, "num_classes": 3}
        config["learn_sigma"], options = False, ("--label", 1)
    else:
        config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "cross_attention_dim": 16}
        config |= {"caption_channels": 8, "sample_size": 8, "video_length": 3, "out_channels": 4}
        options = ("--text", text)
    build(PipelineConfig(kind, config, size=(3, 4, 4)), None, 1, "cpu", torch.float32).save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": config}))
    for method in ("ddpm", "ddim"):
        out = tmp_path / f"{method}.safetensors"
        arguments = ("--model", tmp_path / "model", "--out", out, *options, "--steps", 3, "--method", method)
        assert run(*arguments) == 0
        assert safetensors.load_file(str(out))["latents"].shape == (1, 4, 3, 4, 4)
    if kind == "latte":
        model = Latte.from_config("Latte-S/8", input_size=8, num_frames=2, learn_sigma=False)
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        named = ("--model", "latte-s/8", "--weights", tmp_path / "weights.pt", "--size", 64, 64, "--frames", 2)
        assert run(*named, "--out", tmp_path / "x.safetensors", "--steps", 2) == 0


def test_shift_of_stdit3_is_the_one_asked_for(tmp_path: Path) -> None:
    config = {"depth": 1, "hidden_size": 16, "num_heads": 2, "caption_channels": 8, "model_max_length": 4}
    pipeline = build(PipelineConfig("stdit3", config, size=(2, 4, 4)), None, 1, "cpu", torch.float32)
    request = Request((2, 4, 4), text=torch.randn(3, 8), steps=3, guidance=2.0, pixels=(32, 32))
    usual = sample(pipeline, request)
    own = open_sora_shift(32, 32, 2)
    assert own == pytest.approx(32 / 512 * 2**0.5)
    assert torch.equal(usual, sample(pipeline, dataclasses.replace(request, shift=own)))
    assert not torch.equal(usual, sample(pipeline, dataclasses.replace(request, shift=3.0)))


def test_damaged_folders_are_one_clear_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = folder / "config.json"
    good = json.loads(path.read_text())
    broken: list[tuple[Any, str]] = [
        ("{", "config.json: expected a JSON file"),
        ([1], "config.json: expected format vidkernels-dit-1"),
        ({"format": good["format"], "kind": "goku"}, "config.json: expected format vidkernels-dit-1"),
        ({**good, "kind": ["goku"]}, "config.json: expected format vidkernels-dit-1"),
        ({**good, "labels": 3}, "config.json: labels: expected names"),
        ({**good, "mean": [1.0]}, "config.json: mean, std: expected a number for each of the 4"),
        ({**good, "std": "abcd"}, "config.json: std: expected finite numbers"),
        ({**good, "size": [2, 4]}, "config.json: size: expected three whole numbers"),
        ({**good, "fps": None}, "config.json: fps: expected finite numbers"),
        ({**good, "shift": 0}, "config.json: shift, fps: expected positive"),
        ({**good, "model": {**good["model"], "depth": 3}}, "--weights: expected the"),
    ]
    for values, message in broken:
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        assert run("--model", folder, "--label", 1, "--out", tmp_path / "x.safetensors", "--steps", 1) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    path.write_text(json.dumps(good))
    weights = safetensors.load_file(str(folder / "model.safetensors"))
    weights["patch_embed.weight"][0, 0] = float("nan")
    safetensors.save_file(weights, str(folder / "model.safetensors"))
    assert run("--model", folder, "--label", 1, "--out", tmp_path / "x.safetensors", "--steps", 2) == 2
    assert "--model: expected finite latents, got NaN or infinity after 2 steps" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


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
    nan, codebook = tmp_path / "nan.safetensors", tmp_path / "codebook.json"
    safetensors.save_file({"text": torch.full((3, 8), float("nan"))}, str(nan))
    codebook.write_text('{"codebook": [[0.1, 1e999], [0.2, 1]]}')
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
        (("--model", folder, "--label", 1, "--adacache", "fast"), "--adacache: expected one of"),
        (("--model", "latte-s/2", *random, "--size", 32, 64, "--frames", 4), "--size: expected equal height and width"),
        (("--model", folder, "--label", 1, "--tokenizer", "fsq_causal_488_4096"), "--tokenizer: expected an existing"),
        (("--model", folder, "--label", 1, "--out", tmp_path / "x.txt"), "--out: expected a file ending in"),
        (("--model", folder, "--label", 1, "--weights", text), "--weights: expected none with a folder"),
        (("--model", folder, "--label", 1, "--num-classes", 3), "--num-classes: expected none with a folder"),
        (("--model", folder, "--label", 1, "--guidance", "nan"), "--guidance: expected a finite number"),
        (("--model", folder, "--label", 1, "--shift", 0), "--shift: expected a positive number"),
        (("--model", folder, "--label", 1, "--fps", 0), "--fps: expected a positive number"),
        (("--model", folder, "--label", 1, "--seed", 2**70), "--seed: expected a number of 64 bits"),
        (("--model", folder, "--label", 1, "--text", nan), "--text: expected finite floating-point numbers in `text`"),
        (("--model", folder, "--label", 1, "--adacache", codebook), "--adacache: expected a file that"),
        (("--model", "latte-s/8", *random, "--size", 64, 64, "--frames", 2, "--shift", 2), "--shift: expected none"),
    ]
    for argv, message in cases:
        argv = argv if "--out" in argv else (*argv, "--out", out)
        assert run(*argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    other = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**other, "kind": "unet"}))
    assert run("--model", folder, "--out", out) == 2
    assert "config.json: expected format vidkernels-dit-1" in capsys.readouterr().err
    for option in ("--steps", "--frames", "--num-classes"):  # 0 is not "as usual"
        with pytest.raises(SystemExit):
            run("--model", folder, "--label", 1, "--out", out, option, 0)
        assert f"argument {option}: expected a whole number from 1 on, got '0'" in capsys.readouterr().err
    assert not out.exists()
