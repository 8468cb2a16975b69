# SPDX-License-Identifier: Apache-2.0
"""Encoding and decoding of clips that arrive in chunks, or whose chunks are other ranks'. The state is a local dict: nothing is
left in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidkernels.distributed.temporal import CarriedDict, turns_of
from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.tokenizers._vidtok_layers import State
from vidkernels.ops._checks import check_same_device, check_same_dtype

if TYPE_CHECKING:
    from vidkernels.models.tokenizers.vidtok import VidTok


def _require_causal(model: VidTok) -> None:
    if not model.config.causal:
        raise OptionError(
            "config",
            "a causal model",
            model.config.name,
            "A non-causal model needs the whole clip: use encode and decode.",
        )


def _front(model: VidTok, num_frames: int | None) -> int:
    """Copies of the first frame to start with. Unknown lengths are taken as 1 + kf."""
    return model.front_frames(1 if num_frames is None else num_frames)[0]


def _check_like(name: str, chunk: Tensor, first: Tensor) -> None:
    """A later chunk differs from the first in its number of frames alone."""
    size, expected = ((x.shape[0], x.shape[1], *x.shape[3:]) for x in (chunk, first))
    if size != expected:
        raise ShapeError(name, f"chunks like the first, {tuple(first.shape)} but for the frames", tuple(chunk.shape))
    check_same_dtype(name, chunk, "first", first)
    check_same_device(name, chunk, "first", first)


def _checked(chunks: Iterable[Tensor], name: str, check: Callable[[Tensor], None]) -> Iterator[Tensor]:
    first: Tensor | None = None
    for chunk in chunks:
        if isinstance(chunk, Tensor) and chunk.ndim == 5 and chunk.shape[2] == 0:
            continue
        check(chunk)
        first = chunk[:, :, :1] if first is None else first
        _check_like(name, chunk, first)
        yield chunk


def _check_length(model: VidTok, seen: int, num_frames: int | None) -> None:
    """The padding in front was right, now that all frames have come."""
    if num_frames is not None and seen != num_frames:
        raise OptionError("num_frames", f"{seen}, the frames that came", num_frames)
    if (
        num_frames is None
        and seen
        and model.config.version == "1.1"
        and model.front_frames(seen) != model.front_frames(1)
    ):
        expected = f"the clip's length, {seen}, since it is not 1 + {model.config.temporal_factor} k"
        raise OptionError("num_frames", expected, None, "Version 1.1 pads in front: it must know the length at once.")


def encode(
    model: VidTok, frames: Iterable[Tensor], num_frames: int | None, options: dict[str, Any]
) -> Iterator[Tensor]:
    """See `VidTok.stream_encode`."""
    _require_causal(model)
    factor = model.config.temporal_factor
    state: State = {}
    pending: Tensor | None = None
    seen = 0
    for chunk in _checked(frames, "video", model._check_video):
        seen += chunk.shape[2]
        if pending is None:
            pending = chunk[:, :, :1].expand(-1, -1, _front(model, num_frames), -1, -1)
        pending = torch.cat([pending, chunk], 2)
        ready = pending.shape[2] // factor * factor
        if ready:
            yield _encode_ready(model, pending[:, :, :ready], state, options)
            pending = pending[:, :, ready:]
    _check_length(model, seen, num_frames)
    if pending is not None and pending.shape[2]:
        # The clip's length was not 1 + kf: repeat its last frame, as the whole clip's padding does for v1.0.
        tail = pending[:, :, -1:].expand(-1, -1, factor - pending.shape[2], -1, -1)
        yield _encode_ready(model, torch.cat([pending, tail], 2), state, options)


def _encode_ready(model: VidTok, frames: Tensor, state: State, options: dict[str, Any]) -> Tensor:
    moments = model.encoder(frames.contiguous(memory_format=torch.channels_last_3d), state)
    return model.regularize(moments, **options)[0]


def decode(model: VidTok, latents: Iterable[Tensor], num_frames: int | None) -> Iterator[Tensor]:
    """See `VidTok.stream_decode`."""
    _require_causal(model)
    factor = model.config.temporal_factor
    skip = factor - 1
    if model.config.version == "1.1":  # as `decode`: all frames, or those of the clip
        skip = 0 if num_frames is None else _front(model, num_frames)
    left = num_frames
    for video in _decoded(model, latents):
        skipped = min(skip, video.shape[2])
        skip -= skipped
        video = video[:, :, skipped:] if left is None else video[:, :, skipped : skipped + left]
        if video.shape[2]:
            left = None if left is None else left - video.shape[2]
            yield video
    if left:
        raise OptionError("num_frames", f"at most {(num_frames or 0) - left}, what these latents hold", num_frames)


def _decoded(model: VidTok, latents: Iterable[Tensor]) -> Iterator[Tensor]:
    """Raw output of the decoder for each chunk; the last one is known by looking one chunk ahead."""
    state: State = {}
    previous: Tensor | None = None
    for chunk in _checked(latents, "latents", model._check_latents):
        if previous is not None:
            yield model.decoder(previous.contiguous(memory_format=torch.channels_last_3d), state, last=False)
        previous = chunk
    if previous is not None:
        yield model.decoder(previous.contiguous(memory_format=torch.channels_last_3d), state, last=True)


def encoded(model: VidTok, frames: Tensor) -> Tensor:
    """The encoder on a padded clip, by all ranks under `distributed.temporal_parallel`."""
    return _in_turns(model, frames, model.config.temporal_factor, lambda x, state, last: model.encoder(x, state))


def decoded(model: VidTok, latents: Tensor) -> Tensor:
    """The decoder on all latents of a clip, likewise."""
    return _in_turns(model, latents, 1, lambda x, state, last: model.decoder(x, state, last=last))


def _in_turns(model: VidTok, x: Tensor, step: int, call: Callable[[Tensor, State | None, bool], Tensor]) -> Tensor:
    """`call(frames, state, last)` on x [B, C, T, H, W]: on a rank's chunks, which are cut after multiples of `step` frames."""
    layout = torch.channels_last_3d
    turns = turns_of(model, x)
    if turns is None:
        return call(x.contiguous(memory_format=layout), None, True)
    chunks = x.shape[2] // step
    calls = turns.calls(chunks)

    def results() -> Iterator[tuple[int, Tensor]]:
        for i in filter(turns.is_mine, range(calls)):
            part = x[:, :, chunks * i // calls * step : chunks * (i + 1) // calls * step]
            last = i == calls - 1
            yield i, call(part.contiguous(memory_format=layout), CarriedDict(turns.carried(i, last)), last)

    return torch.cat(list(turns.shared(results(), calls)), 2).contiguous(memory_format=layout)
