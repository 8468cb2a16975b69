# SPDX-License-Identifier: Apache-2.0
"""Latents of real clips and images of several sizes, made once by a tokenizer of this package and kept in one file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidkernels import _safetensors
from vidkernels.errors import OptionError, TrainingError
from vidkernels.models.tokenizers import VidTok
from vidkernels.ops._checks import check_whole
from vidkernels.training.clips import ClipConfig, ClipDataset
from vidkernels.training.config import from_mapping
from vidkernels.training.data import Draw, mixed_seed


@dataclass(frozen=True)
class LatentConfig:
    """One size of image (frames 1) or video in the training set.

    Attributes:
        count: clips that are cut at random places.
        clips: see `ClipConfig`; a size of the pack is its tokens' (T, H, W).
    """

    count: int
    clips: ClipConfig

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatentConfig:
        """From a recipe: `count` and the keys of `ClipConfig`."""
        rest = {key: value for key, value in values.items() if key != "count"}
        check_whole("latents.count", values.get("count"))
        return cls(values["count"], from_mapping(ClipConfig, rest, "latents"))


@dataclass(frozen=True)
class Sample:
    """One training sample: latents [C, T, H, W], its class, and text states [L, D] if the model takes text."""

    latents: Tensor
    label: int = 0
    text: Tensor | None = None

    def to(self, device: torch.device) -> Sample:
        """On another device."""
        text = None if self.text is None else self.text.to(device)
        return dataclasses.replace(self, latents=self.latents.to(device), text=text)


class LatentDataset:
    """Samples by index, normalised by the mean and standard deviation of each channel over the training set."""

    def __init__(self, samples: Sequence[Sample], validation: Sequence[Sample], names: Sequence[str]) -> None:
        self.names = tuple(names)
        values = torch.cat([sample.latents.flatten(1) for sample in samples], 1)
        if not values.isfinite().all():
            raise TrainingError(
                "the tokenizer makes latents that are not finite of these clips; are its weights whole?"
            )
        spread = values.std(1) if values.shape[1] > 1 else torch.ones_like(values[:, 0])
        self.mean, self.std = values.mean(1), spread.clamp(min=1e-4)
        self.samples = [self._normalised(sample) for sample in samples]
        self.validation = [self._normalised(sample) for sample in validation]

    def _normalised(self, sample: Sample) -> Sample:
        mean, std = self.mean[:, None, None, None], self.std[:, None, None, None]
        return dataclasses.replace(sample, latents=(sample.latents - mean) / std)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Draw) -> Sample:
        return self.samples[draw.index]


@torch.inference_mode()
def encode(tokenizer: VidTok, files: Sequence[Path], sizes: Sequence[LatentConfig], seed: int) -> dict[str, Tensor]:
    """Latents of all sizes, keyed `train.<size>.<number>.<file>` and `validation....`, on the CPU.

    Args:
        tokenizer: on the device that encodes. files: their place in the list is the class.
        sizes: what to cut. seed: of starts, crops and flips.
    """
    parameter = next(tokenizer.parameters())

    def latents(clip: Tensor) -> Tensor:
        made = tokenizer.encode(clip.to(parameter.device, parameter.dtype), sample=False)
        return made[0].float().cpu().contiguous()

    found: dict[str, Tensor] = {}
    label = {path: place for place, path in enumerate(files)}
    for number, size in enumerate(sizes):
        dataset = ClipDataset(files, size.clips)
        for i in range(size.count):
            index = i % len(dataset)
            clip = dataset[Draw(index, mixed_seed(seed, number, i), i)]
            found[f"train.{number}.{i}.{label[dataset.footage[index].path]}"] = latents(clip[None])
        for i, (path, clip) in enumerate(dataset.validation_of_files()):
            found[f"validation.{number}.{i}.{label[path]}"] = latents(clip)
    return found


def write_latents(path: Path, latents: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """What `read_latents` reads, with the facts that it asks for."""
    _safetensors.write(path, latents, {"facts": json.dumps(facts, sort_keys=True)})


def read_latents(
    path: Path, facts: Mapping[str, Any], files: Sequence[Path], states: Sequence[Tensor] | None
) -> LatentDataset:
    """The data set of a file, with the text states of each clip's file, if the model takes text.

    Raises:
        TrainingError: it is damaged, or was made from other clips, sizes or by another tokenizer.
    """
    try:
        tensors, metadata = _safetensors.read(path)
    except OptionError as error:
        if not path.is_file():
            raise
        raise TrainingError(f"{path}: is damaged; remove it, it will be made again ({error.__cause__})") from error
    try:
        stored, wanted = dict(json.loads(metadata.get("facts", "{}"))), json.loads(json.dumps(facts))
    except (TypeError, ValueError) as error:
        raise TrainingError(f"{path}: is damaged; remove it, it will be made again ({error})") from error
    if stored != wanted:
        keys = sorted(k for k in {*stored, *wanted} if stored.get(k) != wanted.get(k))
        raise TrainingError(f"{path}: was made with other {', '.join(keys)}; remove it or name another folder")
    fits = (
        re.fullmatch(r"(train|validation)(\.\d+){3}", key) and x.ndim == 4 and x.numel() for key, x in tensors.items()
    )
    if not all(fits) or not any(key.startswith("train.") for key in tensors):
        raise TrainingError(f"{path}: is damaged; remove it, it will be made again (tensors of other names or shapes)")

    def chosen(part: str) -> list[Sample]:
        keys = sorted(
            (key for key in tensors if key.startswith(part)), key=lambda key: [int(n) for n in key.split(".")[1:]]
        )
        labels = [int(key.rpartition(".")[2]) for key in keys]
        return [
            Sample(tensors[key], label, None if states is None else states[label])
            for key, label in zip(keys, labels, strict=True)
        ]

    return LatentDataset(chosen("train."), chosen("validation."), [source.stem for source in files])


def read_states(path: Path) -> Tensor:
    """Text states [L, D], float32, of a file of the `--text` folder."""
    states = _safetensors.read(path, "--text")[0].get("text")
    if states is None or states.ndim != 2:
        raise OptionError("--text", "files with `text` [L, D]", str(path))
    return states.float()
