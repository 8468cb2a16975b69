# SPDX-License-Identifier: Apache-2.0
"""`python -m vidkernels train dit`: Goku on a tokenizer's latents, images and videos of any sizes in one pack, rectified flow."""

from __future__ import annotations

import argparse
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import _video, packing
from vidkernels._pipeline import Pipeline, PipelineConfig
from vidkernels.errors import OptionError
from vidkernels.models.tokenizers import VidTok
from vidkernels.models.transformers.goku import Goku, GokuConfig
from vidkernels.ops._checks import check_option
from vidkernels.sampling import RectifiedFlow, shift_time
from vidkernels.sampling.rectified_flow import DENSITIES
from vidkernels.training import recipes
from vidkernels.training.clips import find_files
from vidkernels.training.config import TrainConfig, check_range, from_mapping
from vidkernels.training.data import Draw, mixed_seed
from vidkernels.training.dit_data import (
    LatentConfig,
    LatentDataset,
    Sample,
    encode,
    read_latents,
    read_states,
    write_latents,
)
from vidkernels.training.dit_sequence import Sequence as TokenSequence
from vidkernels.training.dit_sequence import segment_sums
from vidkernels.training.engine import Result, StepContext, Task, Trainer
from vidkernels.training.parallel import Processes

KEYS = {"model", "latents", "train", "flow", "sequence", "gradient_checkpointing", "comment"}
VALIDATION_LEVELS = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class FlowConfig:
    """Rectified flow of a run; x = t data + (1 - t) noise, the model predicts data - noise (arXiv 2502.04896, section 3.2).

    Attributes:
        density, mean, std: of the noise level, "logit_normal" or "uniform".
        shift: see `sampling.shift_time`; "auto": 1 for 256 tokens of a frame to 3 for 4096, times the root of the frames.
        reduction: "sample": each sample weighs alike; "token": each token of a pack, so that long videos dominate, and
            the packs of processes and micro-batches alike.
        dropout: share of samples whose class or text is replaced by the null one.
    """

    density: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float | str = 1.0
    reduction: str = "sample"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_option("density", self.density, DENSITIES)
        check_option("reduction", self.reduction, ("sample", "token"))
        if self.shift != "auto" and not (isinstance(self.shift, (int, float)) and 0 < self.shift < math.inf):
            raise OptionError("shift", "'auto' or a positive number", self.shift)
        check_range("mean", self.mean, -math.inf)
        if not 0 < self.std < math.inf:
            raise OptionError("std", "a positive number", self.std)
        if not 0 <= self.dropout < 1:
            raise OptionError("dropout", "a share of at least 0 and below 1", self.dropout)

    def shift_of(self, size: tuple[int, int, int]) -> float:
        """Shift of a sample of (t, h, w) tokens."""
        if isinstance(self.shift, str):
            return (1 + 2 * (size[1] * size[2] - 256) / (4096 - 256)) * math.sqrt(size[0])
        return self.shift


class DiTTask(Task):
    """Rectified flow of Goku over packs.

    Args:
        model: the transformer. flow: see `FlowConfig`. validation: samples that are not trained on.
        sequence: the group of processes that shares the tokens of a pack. null_text: states of the empty prompt.
    """

    def __init__(
        self,
        model: Goku,
        flow: FlowConfig,
        validation: Sequence[Sample] = (),
        sequence: TokenSequence | None = None,
        null_text: Tensor | None = None,
    ) -> None:
        self.modules, self.config, self.flow = {"model": model}, model.config, flow
        self.validation, self.null_text = list(validation), null_text
        self.sequence = sequence or TokenSequence()
        self.sequence.install(model)
        self._blocks = list(model.blocks)

    def units(self, name: str) -> Iterable[nn.Module]:
        """Block by block."""
        return self._blocks

    def losses(
        self, name: str, modules: Mapping[str, nn.Module], batch: Any, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the velocity. Noise, level and dropout belong to the sample, wherever it is computed."""
        items = list(zip(batch, context.draws, strict=True))
        if self.sequence.degree > 1:  # through the host; without others it would be a way there and back for nothing
            items = self.sequence.gather([(sample.to(torch.device("cpu")), draw) for sample, draw in items])
        samples = [sample.to(context.device) for sample, _ in items]
        levels, dropped = zip(*(self._level(sample, draw) for sample, draw in items), strict=True)
        noise = [
            torch.randn(s.latents.shape, generator=draw.generator(purpose=2)).to(s.latents)
            for s, (_, draw) in zip(samples, items, strict=True)
        ]
        parts, _ = self._errors(modules[name], samples, noise, levels, dropped)
        # The mean over the processes of a group, each with its tokens' share, is the mean over the pack.
        loss = self.sequence.degree * parts.sum()
        return loss, {}

    def _level(self, sample: Sample, draw: Draw) -> tuple[float, bool]:
        """Noise level and whether the condition is dropped."""
        generator = draw.generator(purpose=1)
        flow = RectifiedFlow("t", time_scale=1.0)
        level = flow.sample_levels(
            1, density=self.flow.density, mean=self.flow.mean, std=self.flow.std, generator=generator
        )
        shifted = shift_time(level, self.flow.shift_of(self.grid(sample)))
        return shifted.item(), bool(torch.rand((), generator=generator) < self.flow.dropout)

    def grid(self, sample: Sample) -> tuple[int, int, int]:
        """(t, h, w) tokens of a sample."""
        t, h, w = (size // p for size, p in zip(sample.latents.shape[1:], self.config.patch_size, strict=True))
        return t, h, w

    def _errors(
        self,
        model: nn.Module,
        samples: Sequence[Sample],
        noise: Sequence[Tensor],
        levels: Sequence[float],
        dropped: Sequence[bool],
    ) -> tuple[Tensor, packing.Packed]:
        """Each sample's part [B] of the loss, of this process's tokens, and the pack."""
        flow = RectifiedFlow("t", time_scale=1.0)
        device = samples[0].latents.device
        pairs = [
            flow.interpolate(sample.latents[None], fresh[None], torch.tensor([level], device=device))
            for sample, fresh, level in zip(samples, noise, levels, strict=True)
        ]
        packed = packing.pack([x[0] for x, _ in pairs], self.config.patch_size)
        target = packing.pack([velocity[0] for _, velocity in pairs], self.config.patch_size).tokens
        inputs = {
            "tokens": packed.tokens,
            "t": flow.model_time(torch.tensor(levels, device=device, dtype=packed.tokens.dtype)),
            "cu_seqlens": packed.cu_seqlens,
            "max_seqlen": packed.max_seqlen,
            "positions": packed.positions,
            **self._conditions(samples, dropped, device),
        }
        prediction, offsets = self.sequence.run(model, inputs)
        difference = prediction - self.sequence.slice(target)
        wide = difference if difference.dtype == torch.float64 else difference.float()
        sums = segment_sums(wide.square().mean(1), offsets)[: len(samples)]
        if self.flow.reduction == "token":
            return sums / sum(packed.lengths), packed
        return sums / (sums.new_tensor(packed.lengths) * len(samples)), packed

    def _conditions(self, samples: Sequence[Sample], dropped: Sequence[bool], device: torch.device) -> dict[str, Any]:
        if self.config.num_classes is not None:
            none = self.config.num_classes
            labels = [none if drop else sample.label for sample, drop in zip(samples, dropped, strict=True)]
            return {"labels": torch.tensor(labels, device=device)}
        if self.config.text_channels is None:
            return {}
        null = torch.zeros(1, self.config.text_channels) if self.null_text is None else self.null_text
        states = []
        for sample, drop in zip(samples, dropped, strict=True):
            text = null if drop else sample.text
            assert text is not None  # a data set of texts has one for every sample
            states.append(text.to(sample.latents))
        packed = packing.pack_text(states)
        return {"text": packed.tokens, "text_cu_seqlens": packed.cu_seqlens, "text_max_seqlen": packed.max_seqlen}

    def validate(self, modules: Mapping[str, nn.Module], context: StepContext) -> dict[str, float]:
        """Loss of held-out images and videos at fixed noise and fixed levels."""
        found: dict[str, list[float]] = {"image_loss": [], "video_loss": []}
        samples = [sample.to(context.device) for sample in self.validation]
        for number, level in enumerate(VALIDATION_LEVELS):
            noise = [
                torch.randn(s.latents.shape, generator=torch.Generator().manual_seed(mixed_seed(7, number, i))).to(
                    s.latents
                )
                for i, s in enumerate(samples)
            ]
            if not samples:
                break
            count = len(samples)
            parts, packed = self._errors(modules["model"], samples, noise, [level] * count, [False] * count)
            weight = sum(packed.lengths) if self.flow.reduction == "token" else None
            for i, part in enumerate((self.sequence.degree * parts).tolist()):
                value = part * (count if weight is None else weight / packed.lengths[i])
                found["image_loss" if packed.sizes[i][0] == 1 else "video_loss"].append(value)
        return {f"validation_{name}": sum(values) / len(values) for name, values in found.items() if values}


def read_recipe(config: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe by path or packaged name; each override is `train.steps=10`, the value in JSON."""
    recipe = recipes.read("dit", config, overrides)
    unknown = sorted(set(recipe) - KEYS)
    if unknown or not {"model", "latents", "train"} <= set(recipe):
        raise OptionError("config", f"model, latents, train and possibly {sorted(KEYS)}", unknown or sorted(recipe))
    latents = recipe["latents"]
    if not isinstance(latents, list) or not latents or not all(isinstance(size, dict) for size in latents):
        raise OptionError("latents", "a list with an object for each size", latents)
    if not isinstance(recipe["model"], dict):
        raise OptionError("model", "an object with keys of GokuConfig", recipe["model"])
    if recipe["model"].get("image_condition"):
        raise OptionError("model.image_condition", "false", True, "Image-to-video models are not trained here.")
    trained = TrainConfig.from_dict(recipe["train"]).optimizers
    if not set(trained) <= {"model", "default"}:
        raise OptionError("train.optimizers", "settings of model or default", sorted(trained))
    return recipe


def make_model(recipe: Mapping[str, Any], tokenizer: VidTok, classes: int) -> Goku:
    """A fresh transformer for a tokenizer's latents; class-conditional unless the recipe names a width of text states."""
    settings = {"text_channels": None, **recipe["model"], "in_channels": tokenizer.config.z_channels}
    if settings["text_channels"] is None:
        settings["num_classes"] = classes
    model = Goku(from_mapping(GokuConfig, settings, "model"))
    model.gradient_checkpointing = recipe.get("gradient_checkpointing", False)
    return model


def read_texts(text: Path, sources: Sequence[Path], width: int) -> tuple[list[Tensor], Tensor | None]:
    """Text states of each file of clips, and those of the empty prompt where the folder has them."""
    stems = [source.stem for source in sources]
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise OptionError("--clips", "files of different names, by which texts are found", f"several of {twice[0]!r}")
    null = text / "null.safetensors"
    paths = [text / f"{stem}.safetensors" for stem in stems] + ([null] if null.is_file() else [])
    states = [read_states(path) for path in paths]
    for path, state in zip(paths, states, strict=True):
        if state.shape[1] != width:
            raise OptionError("--text", f"states of the model's {width} channels", f"{state.shape[1]} in {path}")
    return states[: len(sources)], states[len(sources)] if len(states) > len(sources) else None


def prepare(
    recipe: Mapping[str, Any],
    tokenizer: VidTok,
    sources: Sequence[Path],
    folder: Path,
    processes: Processes,
    states: Sequence[Tensor] | None,
) -> LatentDataset:
    """The latents of a run, encoded by the first process where the folder has none, with the text states of each file."""
    sizes = [LatentConfig.from_dict(values) for values in recipe["latents"]]
    seed = TrainConfig.from_dict(recipe["train"]).seed
    digest = hashlib.sha256()
    for value in tokenizer.state_dict().values():
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    facts = {
        "tokenizer": digest.hexdigest(),
        "clips": [source.name for source in sources],
        "latents": recipe["latents"],
        "seed": seed,
    }
    path = folder / "latents.safetensors"
    if processes.rank == 0 and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_latents(path, encode(tokenizer.to(processes.device), sources, sizes, seed), facts)
    processes.barrier()
    return read_latents(path, facts, sources, states)


def run_recipe(
    recipe: Mapping[str, Any],
    tokenizer: VidTok,
    clips: str | Path,
    folder: Path,
    *,
    text: Path | None = None,
    resume: bool = False,
    device: str | None = None,
) -> tuple[Pipeline | None, Result]:
    """Train; returns the transformer with averaged weights and its surroundings (the first process; None elsewhere), and how
    the run ended."""
    processes = Processes.current(device)
    config, flow = TrainConfig.from_dict(recipe["train"]), from_mapping(FlowConfig, recipe.get("flow", {}), "flow")
    sequence = TokenSequence.of(recipe.get("sequence", 1), processes)
    sources = find_files(clips)
    torch.manual_seed(config.seed)
    model = make_model(recipe, tokenizer, len(sources))
    if (model.config.text_channels is None) != (text is None):
        raise OptionError("--text", "a folder of text states exactly where the recipe's model has text_channels", text)
    states, null = (None, None) if text is None else read_texts(text, sources, model.config.text_channels or 0)
    task = DiTTask(model, flow, (), sequence, null)
    # Last, for it may take hours: whatever is wrong with the recipe has been said.
    dataset = prepare(recipe, tokenizer, sources, folder, processes, states)
    task.validation = list(dataset.validation)
    # Neither the number of processes nor how they share the work is part of what a run is.
    facts = {key: recipe.get(key) for key in ("model", "latents", "flow")}
    trainer = Trainer(task, config, dataset, folder, resume=resume, collate=list, processes=processes, facts=facts)
    result = trainer.run()
    weights = trainer.full_state_dict("model")
    if processes.rank:  # one process is enough to write it
        return None, result
    trained = Goku(model.config)
    trained.load_state_dict(weights)
    largest = max(dataset.samples, key=lambda sample: (sample.latents.shape[1], sample.latents[0, 0].numel()))
    frames, height, width = largest.latents.shape[1:]
    clip = LatentConfig.from_dict(max(recipe["latents"], key=lambda values: values["frames"])).clips
    described = PipelineConfig(
        "goku",
        asdict(model.config),
        tuple(dataset.mean.tolist()),
        tuple(dataset.std.tolist()),
        float(flow.shift_of(task.grid(largest))),
        (frames, height, width),
        dataset.names if model.config.num_classes is not None else (),
        float(_video.frame_rate(sources[0]) / clip.stride),
    )
    return Pipeline(described, trained.eval(), tokenizer), result


def _parser() -> argparse.ArgumentParser:
    parser = recipes.parser("dit", "train.steps=10")
    parser.add_argument(
        "--tokenizer", required=True, type=Path, help="VidTok checkpoint or folder of `train tokenizer`"
    )
    parser.add_argument("--version", choices=("1.0", "1.1"), help="of the tokenizer, where no name says it")
    parser.add_argument("--text", type=Path, help="folder with <clip>.safetensors (`text` [L, D]) and null.safetensors")
    return parser


def _tokenizer(arguments: argparse.Namespace) -> VidTok:
    path = arguments.tokenizer
    own = path.is_dir() and (path / "config.json").is_file() and arguments.version is None
    made = VidTok.from_pretrained(path) if own else VidTok.from_checkpoint(path, version=arguments.version)
    return made.eval().requires_grad_(False)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    arguments = _parser().parse_args(argv)

    def train() -> Result:
        recipe = read_recipe(arguments.config, arguments.override)
        pipeline, result = run_recipe(
            recipe, _tokenizer(arguments), arguments.clips, arguments.out, text=arguments.text, resume=arguments.resume,
            device=arguments.device,
        )  # fmt: skip
        if pipeline is not None and not result.stopped:
            pipeline.save(arguments.out / "model")
            numbers = "  ".join(f"{key} {value:.4g}" for key, value in result.metrics.items())
            print(f"{arguments.out}: step {result.step}  {numbers}")
        return result

    return recipes.finish(train)
