# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels tokenize IN.mp4 OUT.safetensors` and `detokenize IN.safetensors OUT.mp4`: constant memory."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vidkernels import _safetensors, _video
from vidkernels._commands._options import add_device, at_least, check_output
from vidkernels.errors import OptionError, VidkernelsError
from vidkernels.models.tokenizers.vidtok import VidTok

Item = TypeVar("Item")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"vidkernels {command}")
    parser.add_argument("source", type=Path, help="video file" if command == "tokenize" else "file written by tokenize")
    parser.add_argument("target", type=Path, help=".safetensors file" if command == "tokenize" else "video file")
    parser.add_argument("--weights", type=Path, help="VidTok checkpoint: .ckpt, .safetensors or folder")
    parser.add_argument("--config", help="published name, where the weights' name does not say it")
    parser.add_argument("--version", choices=("1.0", "1.1"), help="where no name says it")
    add_device(parser)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    if command == "tokenize":
        parser.add_argument(
            "--size", type=at_least(1), nargs=2, metavar=("HEIGHT", "WIDTH"), help="resize and crop the frames"
        )
        parser.add_argument("--frames", type=at_least(1), help="only so many frames")
        parser.add_argument("--chunk", type=at_least(1), default=16, help="frames in memory at a time")
    else:
        parser.add_argument("--chunk", type=at_least(1), default=4, help="latent frames in memory at a time")
        parser.add_argument("--crf", type=int, default=16, help="quality of the video file, lower is better")
    parser.add_argument("--random-weights", type=int, metavar="SEED", help="untrained weights, to try the command")
    return parser


def _model(arguments: argparse.Namespace, stored: dict[str, Any] | None) -> VidTok:
    config = arguments.config or (None if stored is None else _stored_config(stored))
    if arguments.weights is not None:
        model = VidTok.from_checkpoint(arguments.weights, config, version=arguments.version)
    elif arguments.random_weights is not None:
        if config is None:
            raise OptionError("--config", "a published VidTok name", None, "Random weights need a configuration.")
        torch.manual_seed(arguments.random_weights)
        model = VidTok.from_config(config)
    else:
        raise OptionError("--weights", "a VidTok checkpoint", None, "Or --random-weights 0 to try the command.")
    return model.eval().to(arguments.device, getattr(torch, arguments.dtype))


def _stored_config(metadata: dict[str, Any]) -> Any:
    from vidkernels.models.tokenizers.vidtok_config import VidTokConfig

    return VidTokConfig.from_dict(json.loads(metadata["config"]))


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
    from safetensors.torch import save_file

    check_output("target", arguments.target, {".safetensors"})
    model = _model(arguments, None)
    size = tuple(arguments.size) if arguments.size else None
    _check_size(model.config.spatial_factor, arguments.source, size)
    total = _video.count_frames(arguments.source)
    total = total if arguments.frames is None else min(total, arguments.frames)
    chunks = _video.read_chunks(arguments.source, arguments.chunk, size, total)
    steps = -(-total // arguments.chunk)
    placed = (
        chunk.to(arguments.device, getattr(torch, arguments.dtype)) for chunk in _progress(chunks, steps, "encoding")
    )
    latents = torch.cat(
        [piece.cpu() for piece in _encode(model, placed, total)], 2 if model.config.regularizer == "kl" else 1
    )
    metadata = {
        "config": json.dumps(model.config.to_dict()),
        "num_frames": str(total),
        "fps": str(_video.frame_rate(arguments.source)),
        "format": "vidkernels-tokens-1",
    }
    save_file(
        {"latents" if model.config.regularizer == "kl" else "tokens": latents.contiguous()},
        str(arguments.target),
        metadata,
    )
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
    stored = tensors[name]
    total, rate = _clip_facts(arguments.source, metadata)
    model = _model(arguments, metadata)
    _check_stored(model, name, stored)
    video = _decode(model, stored.to(arguments.device), name, arguments.chunk, total)
    count = _video.write_video(arguments.target, _progress(video, None, "decoding"), rate, crf=arguments.crf)
    print(f"{arguments.target}: {count} frames")
    return 0


def _clip_facts(source: Path, metadata: dict[str, str]) -> tuple[int, Fraction]:
    """Length and frame rate of the clip that a file of tokens holds."""
    try:
        return int(metadata["num_frames"]), Fraction(metadata["fps"])
    except (KeyError, ValueError, ZeroDivisionError) as error:
        got = f"{source.name} ({type(error).__name__}: {error})"
        raise OptionError("source", "a file with its clip's num_frames and fps", got) from error


def _check_stored(model: VidTok, name: str, stored: Tensor) -> None:
    """Tokens belong to an FSQ model and are codes of it; latents belong to a KL model."""
    wanted = "tokens" if model.config.regularizer == "fsq" else "latents"
    if name != wanted:
        raise OptionError("source", f"{wanted}, as {model.config.name} makes them", name, "Name its own --config.")
    codes = math.prod(model.config.levels)
    if name == "tokens" and stored.numel() and not 0 <= int(stored.min()) <= int(stored.max()) < codes:
        got = f"{int(stored.min())} to {int(stored.max())}"
        raise OptionError("source", f"tokens from 0 to {codes - 1}", got, "The file is damaged, or of another model.")


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
    """Run one of the two commands; errors are one line on stderr."""
    command = argv[0]
    arguments = _parser(command).parse_args(argv[1:])
    try:
        return tokenize(arguments) if command == "tokenize" else detokenize(arguments)
    except VidkernelsError as error:
        print(f"vidkernels {command}: {error}", file=sys.stderr)
        return 1
