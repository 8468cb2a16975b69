# SPDX-License-Identifier: Apache-2.0
"""Real video files through PyAV: frames in, frames out, in chunks of constant memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels import _files
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
        raise VideoError("reading video needs PyAV: pip install av") from error
    return av


def _open(path: Path) -> Any:
    if path.is_dir():
        raise VideoError(f"{path}: is a folder; single images are named as one file, {path / '%03d.png'}")
    if not path.exists() and "%" not in path.name:  # FFmpeg reads numbered images by a pattern
        raise VideoError(f"{path}: no such file")
    av = _av()
    try:
        container = av.open(str(path), metadata_errors="replace")  # titles of old files are in any encoding
    except av.FFmpegError as error:
        raise VideoError(f"{path}: not a readable video file ({error.strerror})") from error
    if not container.streams.video:
        container.close()
        raise VideoError(f"{path}: holds no video stream")
    return container


def frame_rate(path: Path) -> Fraction:
    """Average frames per second, as the file says."""
    with _open(path) as container:
        return Fraction(container.streams.video[0].average_rate or 24)


def count_frames(path: Path) -> int:
    """Frames of a file, by decoding it: the container's own count is often absent or wrong."""
    return sum(1 for _ in _decode(path))


class Timing(NamedTuple):
    """Frames of a file, their mean number per second, and whether they come at even times."""

    frames: int
    rate: Fraction
    even: bool


def timing(path: Path, limit: int | None = None) -> Timing:
    """Found by decoding a file, or its first `limit` frames: what containers say of frames at uneven times is often wrong."""
    stated = frame_rate(path)
    count, times = 0, []
    for frame in islice(_decode(path), limit):
        count += 1
        if frame.pts is not None:
            times.append(frame.pts * frame.time_base)
    span = times[-1] - times[0] if len(times) == count > 1 else Fraction(0)
    if span <= 0:
        return Timing(count, stated, True)
    steps = [after - before for before, after in zip(times, times[1:], strict=False)]
    if min(steps) < 0:  # of decoding, not of showing: AVI stores no others
        return Timing(count, stated, True)
    mean = span / (count - 1)
    # Times are rounded, to milliseconds in Matroska: a container's rate stands unless half a frame is missing.
    close = abs(span - (count - 1) / stated) < 1 / (2 * stated)
    return Timing(count, stated if close else (1 / mean).limit_denominator(1001), max(steps) - min(steps) < mean / 2)


def _decode(path: Path) -> Iterator[Any]:
    """Every frame in the order of showing.

    Raises:
        VideoError: the file is damaged, holds no frames, or ends before its container says so.
    """
    av = _av()
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        seen, packets = 0, _Packets()
        try:
            for packet in container.demux(stream):
                packets.note(packet)
                for frame in packet.decode():
                    seen += 1
                    yield frame
        except av.FFmpegError as error:
            raise VideoError(f"{path}: damaged after frame {seen} ({error.strerror})") from error
        cut = packets.missing(path, container, stream)
    if not seen:
        raise VideoError(f"{path}: holds no frames")
    if cut is not None:
        raise VideoError(f"{path}: cut off after frame {seen} ({cut}); a limit of frames takes what is there")


class _Packets:
    """What came of a stream, to notice a file that was cut where its reader sees nothing but an early end."""

    def __init__(self) -> None:
        self.count = self.last = self.step = 0
        self.previous: int | None = None

    def note(self, packet: Any) -> None:
        """Take in a packet; the one without data at the end does not count."""
        if not packet.size:
            return
        self.count += 1
        if packet.pts is not None:
            self.last = max(self.last, packet.pts)
        if packet.dts is not None:
            self.step = max(
                self.step, packet.duration or 0, packet.dts - (packet.dts if self.previous is None else self.previous)
            )
            self.previous = packet.dts

    def missing(self, path: Path, container: Any, stream: Any) -> str | None:
        """What the container promises and did not come; None where nothing is known of its end."""
        kind = container.format.name
        if "mp4" in kind and self.count < stream.frames:
            return f"{self.count} of {stream.frames} frames"
        if kind == "gif" and not _tail(path).endswith(b";"):
            return "no trailer"
        if kind == "avi" and self.previous is not None and self.previous + 1 < stream.frames:  # its clock counts frames
            return f"{self.previous + 1} of {stream.frames} frames"
        if kind != "matroska,webm":
            return None
        end = _stated_end(container, stream)
        # The last frame's own duration is not known, a lost one leaves a gap of two.
        if end is None or (self.last + 1.5 * self.step) * stream.time_base >= end:
            return None
        return f"{float((self.last + self.step) * stream.time_base):.2f} of {float(end):.2f} s"


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-min(64, path.stat().st_size), 2)
        return file.read().rstrip(b"\0")


def _stated_end(container: Any, stream: Any) -> Fraction | None:
    """Seconds at which a stream ends according to its container."""
    if "DURATION" in stream.metadata:  # Matroska's writers state it for each stream
        try:
            hours, minutes, seconds = stream.metadata["DURATION"].split(":")
            return 3600 * int(hours) + 60 * int(minutes) + Fraction(seconds)
        except ValueError:
            return None
    alone = container.duration is not None and len(container.streams) == 1
    return Fraction(container.duration, 1_000_000) if alone else None


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
    """Write chunks [1, 3, t, H, W] in -1..1, with the colours of BT.709; returns the number of frames.

    Nothing is left behind if it fails. The codec is that of the file's ending (`CODECS`) if none is named.
    """
    if not 0 <= crf <= 51:
        raise OptionError("crf", "a quality from 0 (best) to 51", crf)
    if fps <= 0:
        raise OptionError("fps", "frames per second above 0", fps)
    av = _av()
    try:
        with _files.whole(path) as partial:
            with av.open(str(partial), "w") as container:
                named = codec or CODECS.get(path.suffix.lower(), "libx264")
                count = _encode(container, chunks, named, Fraction(fps), crf)
            if not count:
                raise VideoError(f"{path}: no frames to write")
    except av.FFmpegError as error:
        raise VideoError(f"{path}: cannot be written ({error.strerror})") from error
    return count


def _encode(container: Any, chunks: Iterable[Tensor], codec: str, fps: Fraction, crf: int) -> int:
    """Frames of the chunks into a container; returns their number."""
    av = _av()
    rate = fps.limit_denominator(1001) or fps.limit_denominator(1_000_000)
    stream = container.add_stream(codec, rate=rate, options={"crf": str(crf)})
    bt709 = av.video.reformatter.Colorspace.ITU709
    count = 0
    for chunk in chunks:
        for image in to_bytes(chunk):
            if not count:
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = "yuv444p" if stream.height % 2 or stream.width % 2 else "yuv420p"
                # Without these tags players guess the colours from the size of the picture.
                context = stream.codec_context
                context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
            frame = av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace=bt709)
            container.mux(stream.encode(frame))
            count += 1
    if count:
        container.mux(stream.encode())
    return count
