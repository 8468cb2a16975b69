# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels train tokenizer`: a recipe of one or more stages on real clips, resumable at any point."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vidkernels import _files, _safetensors
from vidkernels.errors import OptionError
from vidkernels.models.tokenizers.vidtok import VidTok
from vidkernels.ops._checks import check_option
from vidkernels.training import recipes
from vidkernels.training.clips import ClipConfig, ClipDataset, find_files
from vidkernels.training.config import TrainConfig, from_mapping
from vidkernels.training.engine import Result, Trainer
from vidkernels.training.parallel import Processes
from vidkernels.training.tokenizer import TRAINED, LossConfig, TokenizerTask, loss_config, make_tokenizer

STAGE_KEYS = {"name", "trained", "clips", "train", "loss"}


def read_recipe(config: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe by path or packaged name; each override is `stages.0.train.steps=10`, the value in JSON."""
    recipe = recipes.read("tokenizer", config, overrides)
    unknown = sorted(set(recipe) - {"model", "loss", "stages", "gradient_checkpointing", "comment"})
    if unknown or not recipe.get("stages"):
        raise OptionError("config", "model, loss, stages, gradient_checkpointing", unknown or "no stages")
    stages = recipe["stages"]
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise OptionError("stages", "a list with an object for each stage", stages)
    losses = [recipe.get("loss", {}), *(stage.get("loss", {}) for stage in stages)]
    for key, held in (("model", recipe.get("model")), *(("loss", loss) for loss in losses)):
        if not isinstance(held, dict):
            raise OptionError(key, "an object with its settings", held)
    if not isinstance(recipe.get("gradient_checkpointing", False), bool):
        raise OptionError("gradient_checkpointing", "true or false", repr(recipe["gradient_checkpointing"]))
    for stage in stages:
        if set(stage) - STAGE_KEYS or not {"name", "clips", "train"} <= set(stage):
            raise OptionError("stages", f"name, clips, train and possibly {sorted(STAGE_KEYS)}", sorted(stage))
        if not isinstance(stage["name"], str) or not re.fullmatch(r"[\w.-]+", stage["name"]):
            raise OptionError(
                "stages", "names of letters, digits, '.', '_' and '-': folders are named so", repr(stage["name"])
            )
        check_option("stages.trained", stage.get("trained", "all"), TRAINED)
    return recipe


def _recompute(tokenizer: Any) -> None:
    if not hasattr(tokenizer, "enable_gradient_checkpointing"):
        raise OptionError("gradient_checkpointing", "false for this tokenizer", type(tokenizer).__name__)
    tokenizer.enable_gradient_checkpointing()


def _run_stage(
    recipe: Mapping[str, Any],
    stage: Mapping[str, Any],
    dataset: ClipDataset,
    config: TrainConfig,
    loss: LossConfig,
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    resume: bool,
    processes: Processes,
) -> tuple[dict[str, torch.Tensor], Result]:
    """One stage from the weights of the one before, if there are any; its averaged weights, and how it ended."""
    torch.manual_seed(config.seed)
    tokenizer = make_tokenizer(recipe["model"])
    if weights:
        tokenizer.load_state_dict(weights)
    if recipe.get("gradient_checkpointing"):
        _recompute(tokenizer)
    size = (dataset.config.frames, *dataset.config.size)
    trained = stage.get("trained", "all")
    task = TokenizerTask(tokenizer, loss, size, dataset.validation(), trained)
    own = {key: value for key, value in stage.items() if key not in ("train", "loss")}
    facts = {"model": recipe["model"], "stage": own, "loss": asdict(loss)}
    trainer = Trainer(task, config, dataset, folder, resume=resume, processes=processes, facts=facts)
    result = trainer.run()
    state = trainer.full_state_dict("model")
    return {key.removeprefix("tokenizer."): value for key, value in state.items()}, result


def run_recipe(
    recipe: Mapping[str, Any], clips: str | Path, folder: Path, *, resume: bool = False, device: str | None = None
) -> tuple[nn.Module, Result]:
    """Train all stages, each in a folder of its own below `folder` and from the averaged weights of the one before.

    Returns:
        The tokenizer with the last stage's averaged weights, in eval mode, and how the last stage ended.
    """
    processes = Processes.current(device)
    sources = find_files(clips)
    stages = [  # the last one's mistakes are told before the first is trained
        (
            stage,
            from_mapping(ClipConfig, stage["clips"], "clips"),
            TrainConfig.from_dict(stage["train"]),
            loss_config({**recipe.get("loss", {}), **stage.get("loss", {})}),
        )
        for stage in recipe["stages"]
    ]
    weights: dict[str, torch.Tensor] = {}
    for number, (stage, clip, config, loss) in enumerate(stages):
        path, dataset = folder / f"{number + 1}-{stage['name']}", ClipDataset(sources, clip)
        weights, result = _run_stage(recipe, stage, dataset, config, loss, path, weights, resume, processes)
        if processes.rank == 0 and result.metrics:
            print(f"{path}: step {result.step}  " + "  ".join(f"{k} {v:.4g}" for k, v in result.metrics.items()))
        if result.stopped:
            break
    tokenizer = make_tokenizer(recipe["model"])
    tokenizer.load_state_dict(weights)
    return tokenizer.eval(), result


def _export(tokenizer: nn.Module, recipe: Mapping[str, Any], folder: Path) -> None:
    """Averaged weights as a folder that `from_pretrained` reads (VidTok) or as safetensors beside the configuration."""
    if isinstance(tokenizer, VidTok):
        tokenizer.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    _files.write_text(folder / "config.json", json.dumps(recipe["model"], indent=1) + "\n")
    _safetensors.write(folder / "model.safetensors", tokenizer.state_dict())


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    arguments = recipes.parser("tokenizer", "stages.0.train.steps=10").parse_args(argv)

    def train() -> Result:
        recipe = read_recipe(arguments.config, arguments.override)
        tokenizer, result = run_recipe(
            recipe, arguments.clips, arguments.out, resume=arguments.resume, device=arguments.device
        )
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first and not result.stopped:
            _export(tokenizer, recipe, arguments.out / "model")
        return result

    return recipes.finish(train)
