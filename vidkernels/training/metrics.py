# SPDX-License-Identifier: Apache-2.0
"""Measures of a reconstruction, and the file that a run writes them to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels import _files
from vidkernels.errors import ShapeError
from vidkernels.ops._checks import check_ndim


def _check_pair(video: Tensor, reconstruction: Tensor) -> None:
    check_ndim("video", video, 5)
    if video.shape != reconstruction.shape:
        raise ShapeError("reconstruction", f"the video's shape {tuple(video.shape)}", tuple(reconstruction.shape))


def psnr(video: Tensor, reconstruction: Tensor, data_range: float = 2.0) -> Tensor:
    """10 log10(range^2 / MSE) in dB of each frame, averaged over the frames: [B] of [B, C, T, H, W].

    Values are clamped to the range of the video (-1..1 for the default), as a written file would be. Equal frames count
    as 100 dB.
    """
    _check_pair(video, reconstruction)
    half = data_range / 2
    error = (video.float() - reconstruction.float().clamp(-half, half)).square().mean((1, 3, 4))
    return (10 * torch.log10(data_range**2 / error.clamp(min=data_range**2 * 1e-10))).mean(1)


def ssim(video: Tensor, reconstruction: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity of each frame and channel, averaged: [B] of [B, C, T, H, W].

    Gaussian window 11x11 of deviation 1.5, K1 = 0.01, K2 = 0.03, no padding (Wang et al. 2004). Frames below 11 pixels
    use the largest odd window that fits.
    """
    _check_pair(video, reconstruction)
    half = data_range / 2
    x, y = (v.movedim(2, 1).flatten(0, 2).unsqueeze(1).double() for v in (video, reconstruction.clamp(-half, half)))
    size = min(11, *(side - 1 + side % 2 for side in x.shape[-2:]))
    line = torch.exp(-((torch.arange(size, dtype=x.dtype, device=x.device) - size // 2) ** 2) / (2 * 1.5**2))
    line = line / line.sum()

    def blur(v: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(v, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    map_ = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return map_.mean((1, 2, 3)).reshape(video.shape[0], -1).mean(1).float()


class MetricLog:
    """One JSON object a line. Lines after the step that a run resumes from are dropped: they will be written again."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_lines(path) if line["step"] <= start]
        _files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append a line; a number that JSON has no form for (NaN, infinity) becomes its name."""
        safe = {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **safe}) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a metric file; from a line on that is damaged, as a killed run leaves its last, they are ignored."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:  # half a line, or bytes that are no text
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines
