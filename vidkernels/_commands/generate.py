# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels generate --model latte-s/2|goku-2b|FOLDER --out out.mp4`: a video from noise, a label or text states."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidkernels import _pipeline, _safetensors, _video
from vidkernels._commands._options import about, add_device, at_least, check_output, seed
from vidkernels._pipeline import Pipeline, Request
from vidkernels._pipeline_sample import sample
from vidkernels.errors import OptionError
from vidkernels.models.tokenizers import VidTok, VidTokConfig

# Pixels and frames per latent position where no tokenizer says it: the models' own autoencoders.
SPATIAL, TEMPORAL = 8, {"latte": 1, "latte_t2v": 1, "goku": 4, "stdit3": 4}


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """Arguments that say which model samples what, for commands that sample."""
    parser = argparse.ArgumentParser(prog=f"vidkernels {command}", description=description)
    parser.add_argument(
        "--model", required=True, help="published name (latte-xl/2, goku-2b, stdit3-xl/2), or a folder of `train dit`"
    )
    written = "video, or .safetensors for latents" if command == "generate" else "JSON file of the codebook"
    parser.add_argument("--out", type=Path, help=f"file to write: {written}")
    parser.add_argument("--weights", type=Path, help="the transformer's checkpoint; needed with a published name")
    parser.add_argument("--random-weights", type=seed, metavar="SEED", help="untrained weights, to try the command")
    parser.add_argument("--label", help="class, by number or name, for a class-conditional model")
    parser.add_argument("--num-classes", type=at_least(1), help="classes of a Latte with random weights")
    parser.add_argument(
        "--text",
        type=Path,
        help="safetensors file with a text encoder's `text` [L, D] and, for guidance, `null` [M, D]",
    )
    parser.add_argument(
        "--size",
        type=at_least(1),
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="in pixels, with --frames; default: the model's",
    )
    parser.add_argument("--frames", type=at_least(1), help="frames of the video, with --size; default: the model's")
    parser.add_argument(
        "--steps", type=at_least(1), help="denoising steps; default: by model and method (docs/models.md)"
    )
    parser.add_argument(
        "--method",
        choices=("ddpm", "ddim", "euler", "heun", "unipc"),
        help="sampler; default: ddpm, ddim or euler by model",
    )
    parser.add_argument(
        "--guidance", type=float, help="scale of classifier-free guidance; 1 runs without; default: by model"
    )
    parser.add_argument("--shift", type=float, help="time shift of a rectified flow; default: the model's")
    reuse = "reuse steps: a codebook's name or JSON file; without a value the default one"
    shown = reuse if command == "generate" else argparse.SUPPRESS  # `calibrate` installs caches itself, and says so
    parser.add_argument("--adacache", metavar="CODEBOOK", nargs="?", const="", help=shown)
    parser.add_argument(
        "--tokenizer",
        help="VidTok checkpoint or folder that decodes the latents; with --random-weights a published name",
    )
    parser.add_argument(
        "--version", choices=("1.0", "1.1"), help="of the tokenizer, where its file's name does not say it"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")
    parser.add_argument("--fps", type=float, help="frames per second of the video; default: the model's, or 24")
    add_device(parser)
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the models; default: float32"
    )
    return parser


def _tokenizer(arguments: argparse.Namespace, dtype: torch.dtype) -> VidTok | None:
    if arguments.tokenizer is None:
        return None
    path = Path(arguments.tokenizer)
    if path.exists():
        with about("--tokenizer", "path", "folder"):
            model = VidTok.from_checkpoint(path, version=arguments.version)
    elif arguments.random_weights is not None:
        torch.manual_seed(arguments.random_weights)
        with about("--tokenizer", "name"):
            model = VidTok.from_config(VidTokConfig.named(arguments.tokenizer))
    else:
        raise OptionError("--tokenizer", "an existing checkpoint", arguments.tokenizer, "Names need --random-weights.")
    return model.eval().requires_grad_(False).to(arguments.device, dtype)


def _latent_size(
    arguments: argparse.Namespace, kind: str | None, tokenizer: VidTok | None
) -> tuple[int, int, int] | None:
    """Latent (T, H, W) of the frames and pixels that were asked for; None if neither was."""
    if arguments.size is None and arguments.frames is None:
        return None
    if arguments.size is None or arguments.frames is None:
        raise OptionError("--size, --frames", "both or none", (arguments.size, arguments.frames))
    spatial = SPATIAL if tokenizer is None else tokenizer.config.spatial_factor
    if any(side % spatial or side < 1 for side in arguments.size):
        raise OptionError("--size", f"multiples of {spatial} pixels", tuple(arguments.size))
    if arguments.frames < 1:
        raise OptionError("--frames", "at least 1", arguments.frames)
    if tokenizer is not None:
        frames = (arguments.frames + sum(tokenizer.front_frames(arguments.frames))) // tokenizer.config.temporal_factor
    elif kind == "stdit3":
        frames = max(arguments.frames // 17 * 5, 1)
    else:
        frames = 1 + -(-(arguments.frames - 1) // TEMPORAL[kind or "goku"])
    return frames, arguments.size[0] // spatial, arguments.size[1] // spatial


def _load(arguments: argparse.Namespace) -> tuple[Pipeline, tuple[int, int, int]]:
    dtype = getattr(torch, arguments.dtype)
    tokenizer = _tokenizer(arguments, dtype)
    folder = Path(arguments.model)
    if folder.is_dir():
        for option, value in (("--weights", arguments.weights), ("--num-classes", arguments.num_classes)):
            if value is not None:
                raise OptionError(option, "none with a folder, which has its own", value)
        pipeline = _pipeline.load_folder(folder, arguments.device, dtype)
        pipeline.tokenizer = tokenizer or pipeline.tokenizer
        size = _latent_size(arguments, pipeline.config.kind, pipeline.tokenizer)
    else:
        kind = arguments.model.lower().partition("-")[0]
        size = _latent_size(arguments, kind if kind in TEMPORAL else None, tokenizer)
        config = _pipeline.named(arguments.model, size, arguments.num_classes)
        with about("--weights", "path"):
            pipeline = _pipeline.build(config, arguments.weights, arguments.random_weights, arguments.device, dtype)
        pipeline.tokenizer = tokenizer
    return pipeline, size or pipeline.config.size


def _label(text: str | None, names: Sequence[str]) -> int | None:
    if text is None:
        return None
    if text in names:
        return list(names).index(text)
    if not text.isdecimal():
        wanted = f"a number or one of {', '.join(names)}" if names else "a number (this model names no classes)"
        raise OptionError("--label", wanted, repr(text))
    return int(text)


def _text(path: Path | None) -> tuple[Tensor | None, Tensor | None]:
    if path is None:
        return None, None
    states, _ = _safetensors.read(path, "--text")
    if "text" not in states or any(state.ndim != 2 for state in states.values()):
        raise OptionError(
            "--text", "`text` [L, D] and possibly `null` [M, D]", {k: tuple(v.shape) for k, v in states.items()}
        )
    for name, state in states.items():
        if not state.is_floating_point() or not state.isfinite().all():
            raise OptionError("--text", f"finite floating-point numbers in `{name}`", str(path))
    return states["text"], states.get("null")


def _codebook(text: str) -> dict[str, Any]:
    """`adacache`'s arguments: the name of a codebook, or a file that `vidkernels calibrate` wrote."""
    from vidkernels.caching.policies import checked_codebook

    path = Path(text)
    if not text or not path.suffix:
        return {"codebook": text or None}
    if not path.is_file():
        raise OptionError("--adacache", "a codebook's name or an existing JSON file", text)
    try:
        values = json.loads(path.read_text())
        codebook = checked_codebook(values["codebook"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OptionError("--adacache", "a file that `vidkernels calibrate` wrote", text) from error
    return {"codebook": codebook, "motion": bool(values.get("motion", False))}


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        row = bar.add_task("denoising", total=steps)
        yield lambda step: bar.update(row, completed=step)


def prepared(arguments: argparse.Namespace) -> tuple[Pipeline, Request]:
    """The loaded pipeline and the completed request of parsed arguments."""
    text, null = _text(arguments.text)
    pipeline, size = _load(arguments)
    spatial = SPATIAL if pipeline.tokenizer is None else pipeline.tokenizer.config.spatial_factor
    request = Request(
        size, _label(arguments.label, pipeline.config.labels), text, null, arguments.steps, arguments.method,
        arguments.guidance, arguments.shift, arguments.seed,
        pipeline.config.fps if arguments.fps is None else arguments.fps,
        (size[1] * spatial, size[2] * spatial),
    )  # fmt: skip
    return pipeline, _pipeline.completed(request, pipeline)


def generate(arguments: argparse.Namespace) -> int:
    """Sample, decode, write."""
    out = check_output("--out", arguments.out, _video.SUFFIXES | {".safetensors"})
    pipeline, request = prepared(arguments)
    handle = None
    if arguments.adacache is not None:
        from vidkernels.caching import adacache

        if request.method == "heun":
            raise OptionError("--adacache", "a method with one call per step", "heun")
        with about("--adacache", "codebook"):
            handle = adacache(pipeline.model, request.steps or 1, **_codebook(arguments.adacache))
    with _progress(request.steps or 1) as progress, about("--steps", "spec"):
        latents = sample(pipeline, request, progress)
    if handle is not None:
        print(handle.report())
        handle.remove()
    if pipeline.tokenizer is None and out.suffix.lower() in _video.SUFFIXES:
        out = out.with_suffix(".safetensors")
        print(f"no tokenizer: latents instead of {arguments.out.name}")
    return _write(pipeline, latents, out, request, arguments.frames)


@torch.inference_mode()
def _write(pipeline: Pipeline, latents: Tensor, out: Path, request: Request, frames: int | None) -> int:
    if out.suffix.lower() in _video.SUFFIXES:
        count = _video.write_video(out, pipeline.decode(latents, frames), request.fps)
        print(f"{out}: {count} frames of {request.pixels[0]}x{request.pixels[1]}")
        return 0
    metadata = {"format": "vidkernels-latents-1", "fps": str(request.fps), "model": pipeline.config.kind}
    _safetensors.write(out, {"latents": latents.cpu().contiguous()}, metadata)
    print(f"{out}: latents {tuple(latents.shape)}")
    return 0


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    text = "Sample a video transformer to a video file, or its latents to .safetensors."
    return generate(parser("generate", text).parse_args(argv))
