# SPDX-License-Identifier: Apache-2.0
"""Recipes: the JSON files that `python -m vidkernels train` takes, with single values changed on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidkernels.errors import OptionError
from vidkernels.training.config import read_json

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
        raise OptionError("config", f"an existing JSON file or one of {', '.join(known)}", config)
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
