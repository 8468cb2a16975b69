# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels tokenize IN.mp4 OUT.safetensors` and `detokenize IN.safetensors OUT.mp4`: constant memory."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vidkernels import _safetensors, _video
from vidkernels._commands._options import about, add_device, at_least, check_output, seed
from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.tokenizers.vidtok import VidTok
from vidkernels.models.tokenizers.vidtok_config import VidTokConfig

FORMAT = "vidkernels-tokens-1"

Item = TypeVar("Item")


def _parser(command: str) -> argparse.ArgumentParser:
    what = "Encode a video file" if command == "tokenize" else "Decode the tokens or latents that `tokenize` wrote"
    parser = argparse.ArgumentParser(prog=f"vidkernels {command}", description=f"{what} with a VidTok, chunk by chunk.")
    source = "video file, or numbered images as FOLDER/%%03d.png"
    parser.add_argument("source", type=Path, help=source if command == "tokenize" else "file written by tokenize")
    parser.add_argument("target", type=Path, help=".safetensors file" if command == "tokenize" else "video file")
    parser.add_argument("--weights", type=Path, help="VidTok checkpoint: .ckpt, .safetensors or folder")
    parser.add_argument("--config", help="published name of the model, where the weights' file is not named after it")
    parser.add_argument("--version", choices=("1.0", "1.1"), help="of VidTok, where no name says it")
    add_device(parser)
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the model; default: float32"
    )
    if command == "tokenize":
        parser.add_argument(
            "--size", type=at_least(1), nargs=2, metavar=("HEIGHT", "WIDTH"), help="resize and crop the frames"
        )
        parser.add_argument("--frames", type=at_least(1), help="encode only the first FRAMES frames")
        parser.add_argument("--chunk", type=at_least(1), default=16, help="frames in memory at a time; default: 16")
    else:
        parser.add_argument(
            "--chunk", type=at_least(1), default=4, help="latent frames in memory at a time; default: 4"
        )
        parser.add_argument("--crf", type=at_least(0), default=16, help="quality, 0 (best) to 51; default: 16")
    parser.add_argument("--random-weights", type=seed, metavar="SEED", help="untrained weights, to try the command")
    return parser


def _model(arguments: argparse.Namespace, stored: VidTokConfig | None) -> VidTok:
    """The tokenizer that the command names; what its weights do not say of themselves is taken from a file of tokens."""
    if arguments.weights is not None:
        model = _weights(arguments, stored)
        wrong = next((key for key, weight in model.named_parameters() if not weight.isfinite().all()), None)
        if wrong is not None:
            raise OptionError("--weights", "finite weights", f"NaN or infinity in {wrong}", "The file is damaged.")
    elif arguments.random_weights is not None:
        config = arguments.config or stored
        if config is None:
            raise OptionError("--config", "a published VidTok name", "none", "Random weights need a configuration.")
        torch.manual_seed(arguments.random_weights)
        with about("--config", "name"):
            model = VidTok.from_config(config)
    else:
        raise OptionError("--weights", "a VidTok checkpoint", "none", "Or --random-weights 0 to try the command.")
    return model.eval().to(arguments.device, getattr(torch, arguments.dtype))


def _weights(arguments: argparse.Namespace, stored: VidTokConfig | None) -> VidTok:
    path, config, version = arguments.weights, arguments.config, arguments.version
    with about("--weights", "path", "folder"), about("--config", "config", "name"), about("--version", "version"):
        try:
            return VidTok.from_checkpoint(path, config, version=version)
        except OptionError as error:
            if stored is None or config is not None or error.argument not in ("config", "version"):
                raise
            return VidTok.from_checkpoint(path, stored, version=version)


def _stored_config(metadata: dict[str, Any]) -> VidTokConfig:
    try:
        return VidTokConfig.from_dict(json.loads(metadata["config"]))
    except ValueError as error:  # of the JSON, or OptionError
        got = str(error).rstrip(".")
        raise OptionError("source", "a file with its tokenizer's configuration", f"one where {got}") from error


def _progress(items: Iterable[Item], total: int | None, text: str) -> Iterator[Item]:
    """Progress on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.progress import track

    yield from track(items, description=text, total=total)


@torch.inference_mode()
def tokenize(arguments: argparse.Namespace) -> int:
    """Video file to tokens (FSQ) or latents (KL)."""
    check_output("target", arguments.target, {".safetensors"})
    model = _model(arguments, None)
    size = tuple(arguments.size) if arguments.size else None
    _check_size(model.config.spatial_factor, arguments.source, size)
    total, rate, even = _video.timing(arguments.source, arguments.frames)
    if not even:
        text = f"frames come at uneven times; detokenize will write them at their mean rate, {float(rate):.4g} a second"
        print(f"vidkernels tokenize: {arguments.source}: {text}", file=sys.stderr)
    chunks = _video.read_chunks(arguments.source, arguments.chunk, size, total)
    steps = -(-total // arguments.chunk)
    placed = (
        chunk.to(arguments.device, getattr(torch, arguments.dtype)) for chunk in _progress(chunks, steps, "encoding")
    )
    kl = model.config.regularizer == "kl"
    latents = torch.cat([piece.cpu() for piece in _encode(model, placed, total)], 2 if kl else 1)
    metadata = {
        "config": json.dumps(model.config.to_dict()),
        "num_frames": str(total),
        "fps": str(rate),
        "format": FORMAT,
    }
    _safetensors.write(arguments.target, {"latents" if kl else "tokens": latents}, metadata)
    print(f"{arguments.target}: {total} frames -> {tuple(latents.shape)}")
    return 0


def _check_size(factor: int, source: Path, size: tuple[int, ...] | None) -> None:
    """Frames, resized or not, are whole latent positions: said in terms of the command, before anything is encoded."""
    height, width = size or _video.frame_size(source)
    if height % factor or width % factor:
        fitting = [max(side // factor, 1) * factor for side in (height, width)]
        got = f"{height} {width}" + ("" if size else f", the size of {source.name}")
        remedy = f"--size {fitting[0]} {fitting[1]} resizes and crops."
        raise OptionError("--size", f"height and width multiples of {factor}", got, remedy)


def _encode(model: VidTok, chunks: Iterable[Tensor], total: int) -> Iterator[Tensor]:
    """Latents or tokens of a clip that arrives in chunks; a non-causal model takes it whole."""
    if not model.config.causal:
        moments = model.moments(torch.cat(list(chunks), 2))
        pieces: Iterable[Tensor] = [model.regularize(moments, sample=False)[0]]
    else:
        pieces = model.stream_encode(chunks, num_frames=total, sample=False)
    if model.config.regularizer == "kl":
        yield from pieces
        return
    from vidkernels import ops

    for piece in pieces:
        yield ops.fsq_codes_to_indices(piece, model.config.levels, dim=1)


@torch.inference_mode()
def detokenize(arguments: argparse.Namespace) -> int:
    """Tokens or latents back to a video file of the original length."""
    check_output("target", arguments.target, _video.SUFFIXES)
    tensors, metadata = _safetensors.read(arguments.source, "source")
    name = next((key for key in ("tokens", "latents") if key in tensors), None)
    if name is None or "config" not in metadata:
        raise OptionError("source", "a file written by `vidkernels tokenize`", str(arguments.source))
    if metadata.get("format", FORMAT) != FORMAT:
        raise OptionError("source", f"a file of format {FORMAT}", metadata["format"], "Another version wrote it.")
    stored = tensors[name]
    total, rate = _clip_facts(arguments.source, metadata)
    config = _stored_config(metadata)
    model = _model(arguments, config)
    _check_stored(model, name, stored, config)
    video = _decode(model, stored.to(arguments.device), name, arguments.chunk, total)
    count = _video.write_video(arguments.target, _progress(video, None, "decoding"), rate, crf=arguments.crf)
    print(f"{arguments.target}: {count} frames")
    return 0


def _clip_facts(source: Path, metadata: dict[str, str]) -> tuple[int, Fraction]:
    """Length and frame rate of the clip that a file of tokens holds."""
    try:
        found = int(metadata["num_frames"]), Fraction(metadata["fps"])
        if found[0] < 1 or found[1] <= 0:
            raise ValueError(f"{found[0]} frames at {found[1]} a second")
    except (KeyError, ValueError, ZeroDivisionError) as error:
        got = f"{source.name} ({type(error).__name__}: {error})"
        raise OptionError("source", "a file with its clip's num_frames and fps", got) from error
    return found


def _check_stored(model: VidTok, name: str, stored: Tensor, config: VidTokConfig) -> None:
    """One clip of a model of this configuration: tokens of an FSQ model that are codes of it, or latents of a KL model."""
    if replace(model.config, name=config.name) != config:
        theirs, ours = config.to_dict(), model.config.to_dict()
        key = next(key for key in theirs if key != "name" and theirs[key] != ours[key])
        got = f"{theirs[key]!r} in the file"
        raise OptionError(
            "source", f"what {model.config.name} makes, {key} {ours[key]!r}", got, "Name its own weights."
        )
    wanted = "tokens" if config.regularizer == "fsq" else "latents"
    if name != wanted:
        raise OptionError("source", f"{wanted}, as {config.name} makes them", name, "The file is damaged.")
    shape = tuple(stored.shape)
    if name == "tokens":
        if stored.ndim != 4 or len(stored) != 1 or not stored.numel():
            raise ShapeError("source", "tokens [1, T, H, W] of one clip", shape)
        codes, least, most = math.prod(config.levels), int(stored.min()), int(stored.max())
        if not 0 <= least <= most < codes:
            remedy = "The file is damaged, or of another model."
            raise OptionError("source", f"tokens from 0 to {codes - 1}", f"{least} to {most}", remedy)
    elif stored.ndim != 5 or len(stored) != 1 or not stored.numel():
        raise ShapeError("source", f"latents [1, {config.z_channels}, T, H, W] of one clip", shape)
    elif not stored.isfinite().all():
        raise OptionError("source", "finite latents", "NaN or infinity", "The file is damaged.")


def _decode(model: VidTok, stored: Tensor, name: str, chunk: int, total: int) -> Iterator[Tensor]:
    from vidkernels import ops

    dtype = next(model.parameters()).dtype
    dim = 2 if name == "latents" else 1

    def latents() -> Iterator[Tensor]:
        for piece in stored.split(chunk if model.config.causal else stored.shape[dim], dim):
            yield (
                piece.to(dtype)
                if name == "latents"
                else ops.fsq_indices_to_codes(piece, model.config.levels, dim=1, dtype=dtype)
            )

    if model.config.causal:
        return model.stream_decode(latents(), num_frames=total)
    return (model.decode(piece, num_frames=total) for piece in latents())


def main(argv: Sequence[str]) -> int:
    """Run one of the two commands."""
    arguments = _parser(argv[0]).parse_args(argv[1:])
    return tokenize(arguments) if argv[0] == "tokenize" else detokenize(arguments)
