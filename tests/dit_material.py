# SPDX-License-Identifier: Apache-2.0
"""What `train dit` needs, small: clips, a tokenizer, a recipe."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from vidkernels import _video
from vidkernels.__main__ import main as cli
from vidkernels.models.tokenizers import VidTok, VidTokConfig

TINY = {
    "model": {"depth": 2, "hidden_size": 32, "num_heads": 2},
    "latents": [
        {"count": 4, "frames": 1, "size": [32, 32], "validation_clips": 1},
        {"count": 3, "frames": 5, "size": [32, 48], "validation_clips": 1},
        {"count": 3, "frames": 9, "size": [16, 32], "validation_clips": 1},
    ],
    "flow": {"shift": 1.0},
    "train": {
        "steps": 30, "batch": 4, "seed": 1, "ema": 0.9, "save_every": 10, "log_every": 1, "validate_every": 10,
        "optimizers": {"model": {"learning_rate": 0.005}},
    },
}  # fmt: skip


def make(folder: Path) -> Path:
    """Two clips of 36 frames, a small tokenizer and a recipe."""
    pytest.importorskip("av")
    t = torch.arange(36).reshape(1, 1, -1, 1, 1) / 36
    x, y = torch.arange(64).reshape(1, 1, 1, 1, -1) / 64, torch.arange(48).reshape(1, 1, 1, -1, 1) / 48
    (folder / "clips").mkdir()
    for name, speed in (("slow", 2), ("fast", 9)):
        video = torch.cat(
            [torch.sin(6 * x + speed * t) + 0 * y, (2 * y - 1) + 0 * x * t, torch.cos(speed * t) * x * y], 1
        )
        _video.write_video(folder / "clips" / f"{name}.mp4", [video], 12)
    torch.manual_seed(0)
    config = dataclasses.replace(VidTokConfig.named("kl_causal_488_4chn"), channels=16, residual_blocks=1)
    VidTok(config).save_pretrained(folder / "tokenizer")
    (folder / "recipe.json").write_text(json.dumps(TINY))
    return folder


def command(material: Path, out: Path, *more: str) -> list[str]:
    paths = ("--config", material / "recipe.json", "--tokenizer", material / "tokenizer", "--clips", material / "clips")
    return [*map(str, (*paths, "--out", out)), "--device", "cpu", *more]


def main(arguments: list[str]) -> int:
    """`python -m vidkernels train dit`."""
    return cli(["train", "dit", *arguments])
