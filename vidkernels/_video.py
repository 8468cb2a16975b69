# SPDX-License-Identifier: Apache-2.0
"""Real video files through PyAV: frames in, frames out, in chunks of constant memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels.errors import OptionError, VidkernelsError

# File endings that can be written, by the codec that their container takes.
CODECS = {".mp4": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9", ".mov": "libx264", ".avi": "libx264"}
SUFFIXES = set(CODECS)


class VideoError(VidkernelsError, OSError):
    """A video file is missing, unreadable or holds no frames."""


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise VideoError("reading video needs PyAV: pip install 'vidkernels[video]'") from error
    return av


def _open(path: Path) -> Any:
    if not path.exists():
        raise VideoError(f"{path}: no such file")
    av = _av()
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise VideoError(f"{path}: not a readable video file ({error})") from error
    if not container.streams.video:
        container.close()
        raise VideoError(f"{path}: holds no video stream")
    return container


def frame_rate(path: Path) -> Fraction:
    """Average frames per second."""
    with _open(path) as container:
        return Fraction(container.streams.video[0].average_rate or 24)


def count_frames(path: Path) -> int:
    """Frames of a file, by decoding it: the container's own count is often absent or wrong."""
    return sum(1 for _ in _decode(path))


def _decode(path: Path) -> Iterator[Any]:
    av = _av()
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        seen = 0
        try:
            for frame in container.decode(stream):
                seen += 1
                yield frame
        except av.FFmpegError as error:
            raise VideoError(f"{path}: damaged after frame {seen} ({error})") from error
    if not seen:
        raise VideoError(f"{path}: holds no frames")


def upright(frame: Any, size: tuple[int, int] | None = None) -> Tensor:
    """A decoded frame as uint8 [H, W, 3], turned as its file says that it is to be shown (telephones film sideways), and scaled
    to `size`, (height, width) as shown."""
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counterclockwise, like rot90
    stored = {} if size is None else {"height": size[turns % 2], "width": size[1 - turns % 2]}
    image = torch.from_numpy(frame.to_ndarray(format="rgb24", **stored))
    return image.rot90(turns).contiguous() if turns else image


def frame_size(path: Path) -> tuple[int, int]:
    """Height and width of the first frame as it is shown."""
    height, width, _ = upright(next(_decode(path))).shape
    return height, width


def to_model_range(frame: Tensor, size: tuple[int, int] | None) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, h, w] in -1..1; the short side is resized (antialiased), the rest centre-cropped."""
    image = frame.permute(2, 0, 1).float()[None] / 127.5 - 1
    if size is not None:
        scale = max(size[0] / image.shape[2], size[1] / image.shape[3])
        resized = [max(round(image.shape[2] * scale), size[0]), max(round(image.shape[3] * scale), size[1])]
        image = F.interpolate(image, resized, mode="bilinear", antialias=True)
        top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
        image = image[:, :, top : top + size[0], left : left + size[1]]
    return image[0]


def read_chunks(
    path: Path, chunk: int, size: tuple[int, int] | None = None, limit: int | None = None
) -> Iterator[Tensor]:
    """Chunks [1, 3, t, H, W] in -1..1 of a file, t = `chunk` but for the last.

    Args:
        path: any file that FFmpeg reads.
        chunk: frames per chunk.
        size: (height, width) to resize and crop to; None keeps the file's own.
        limit: read at most so many frames.
    """
    if chunk < 1:
        raise OptionError("chunk", "at least 1 frame", chunk)
    frames: list[Tensor] = []
    shape: torch.Size | None = None
    for index, frame in enumerate(_decode(path)):
        if limit is not None and index >= limit:
            break
        frames.append(to_model_range(upright(frame), size))
        shape = frames[0].shape if shape is None else shape
        if frames[-1].shape != shape:
            sizes = [" x ".join(map(str, found[1:])) for found in (frames[-1].shape, shape)]
            raise VideoError(f"{path}: frame {index} is {sizes[0]}, those before are {sizes[1]}: give a size")
        if len(frames) == chunk:
            yield torch.stack(frames, 1)[None]
            frames = []
    if frames:
        yield torch.stack(frames, 1)[None]


def to_bytes(video: Tensor) -> Tensor:
    """[1, 3, T, H, W] in -1..1, clamped -> uint8 [T, H, W, 3]."""
    return ((video[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().contiguous()


def write_video(
    path: Path, chunks: Iterable[Tensor], fps: Fraction | float, codec: str | None = None, crf: int = 16
) -> int:
    """Write chunks [1, 3, t, H, W] in -1..1; returns the number of frames. Nothing is left behind if it fails.

    The codec is that of the file's ending (`CODECS`) if none is named.
    """
    av = _av()
    partial = path.with_name(f".{path.name}.part{path.suffix}")
    count = 0
    try:
        with av.open(str(partial), "w") as container:
            name = codec or CODECS.get(path.suffix.lower(), "libx264")
            stream = container.add_stream(name, rate=Fraction(fps).limit_denominator(1001), options={"crf": str(crf)})
            stream.pix_fmt = "yuv420p"
            for chunk in chunks:
                for image in to_bytes(chunk):
                    if not count:
                        stream.height, stream.width = image.shape[:2]
                    for packet in stream.encode(av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")):
                        container.mux(packet)
                    count += 1
            if not count:
                raise VideoError(f"{path}: no frames to write")
            for packet in stream.encode():
                container.mux(packet)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count
