# SPDX-License-Identifier: Apache-2.0
"""A transformer, its sampler and its tokenizer as one thing: a folder on disk, latents from noise, a video from latents.

A folder holds `config.json` (kind, model, statistics of the latents, shift of the flow), `model.safetensors`, and possibly
`tokenizer/`, as `python -m vidkernels train dit` writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidkernels import _files, _safetensors, ops
from vidkernels.errors import OptionError, ShapeError
from vidkernels.models.tokenizers import VidTok
from vidkernels.models.tokenizers._checkpoint import read_tensors
from vidkernels.models.transformers import Goku, Latte, LatteT2V, STDiT3

FORMAT = "vidkernels-dit-1"
KINDS: dict[str, Any] = {"goku": Goku, "latte": Latte, "latte_t2v": LatteT2V, "stdit3": STDiT3}
# Sampler of each kind where none is asked for: (method, steps, guidance), as the models' authors sample.
DEFAULTS = {
    "goku": ("euler", 50, 5.0), "latte": ("ddpm", 250, 7.0), "latte_t2v": ("ddim", 50, 7.5), "stdit3": ("euler", 30, 7.0)
}  # fmt: skip
METHODS = {
    "goku": ("euler", "heun", "unipc"), "latte": ("ddpm", "ddim"), "latte_t2v": ("ddpm", "ddim"),
    "stdit3": ("euler", "heun", "unipc"),
}  # fmt: skip


@dataclass(frozen=True)
class PipelineConfig:
    """What a folder's `config.json` says beside the format.

    Attributes:
        kind: one of `KINDS`. model: the transformer's configuration.
        mean, std: of each latent channel; the model works on (latents - mean) / std. Empty: 0 and 1.
        shift: of the rectified flow, see `sampling.shift_time`.
        size: latent (T, H, W) of a clip where none is asked for.
        labels: names of the classes, by index.
        fps: of the written video.
    """

    kind: str
    model: dict[str, Any]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    shift: float = 1.0
    size: tuple[int, int, int] = (16, 32, 32)
    labels: tuple[str, ...] = ()
    fps: float = 24.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return json.loads(json.dumps({"format": FORMAT, **asdict(self)}))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PipelineConfig:
        """Inverse of `to_dict`; other formats and unknown keys are refused."""
        known = set(cls.__dataclass_fields__)
        fits = isinstance(values, dict) and values.get("format") == FORMAT and set(values) <= {*known, "format"}
        if not fits or values.get("kind") not in list(KINDS) or not isinstance(values.get("model"), dict):
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise OptionError(
                "config.json", f"format {FORMAT} with keys among {sorted(known)}", found, "Was it exported?"
            )
        own = {key: value for key, value in values.items() if key != "format"}
        return cls(**{**_tuples(own), "model": _tuples(own["model"])})

    def __post_init__(self) -> None:
        numbers = {"mean": self.mean, "std": self.std, "shift": (self.shift,), "fps": (self.fps,), "size": self.size}
        for name, found in numbers.items():
            if not isinstance(found, tuple) or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in found):
                raise OptionError(f"config.json: {name}", "finite numbers", found)
        if not isinstance(self.labels, tuple) or not all(isinstance(label, str) for label in self.labels):
            raise OptionError("config.json: labels", "names of the classes", self.labels)
        if len(self.size) != 3 or min(self.size) < 1 or self.size != tuple(map(int, self.size)):
            raise OptionError("config.json: size", "three whole numbers (T, H, W) from 1 on", self.size)
        if self.shift <= 0 or self.fps <= 0:
            raise OptionError("config.json: shift, fps", "positive numbers", (self.shift, self.fps))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


@dataclass
class Pipeline:
    """A loaded transformer with what surrounds it."""

    config: PipelineConfig
    model: nn.Module
    tokenizer: VidTok | None = None

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.model.parameters()).device

    def save(self, folder: Path) -> None:
        """Write a folder that `load_folder` reads; weights are there whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        _files.write_text(folder / "config.json", json.dumps(self.config.to_dict(), indent=1) + "\n")
        _safetensors.write(folder / "model.safetensors", self.model.state_dict())
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder / "tokenizer")

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents [B, C, T, H, W], broadcastable."""
        shape = (1, -1, 1, 1, 1)
        mean, std = (
            like.new_tensor(values).reshape(shape) for values in (self.config.mean or (0,), self.config.std or (1,))
        )
        return mean, std

    def decode(self, latents: Tensor, num_frames: int | None = None, chunk: int = 4) -> Iterator[Tensor]:
        """Frames [1, 3, t, H, W] of latents [1, C, T, H, W], chunk by chunk where the tokenizer is causal."""
        if self.tokenizer is None:
            raise OptionError("--tokenizer", "a VidTok checkpoint", "none", "Latents alone are not a video.")
        config = self.tokenizer.config
        if latents.shape[1] != config.z_channels:
            raise ShapeError("latents", f"the tokenizer's {config.z_channels} channels", latents.shape[1])
        parameter = next(self.tokenizer.parameters())
        latents = latents.to(parameter.device, parameter.dtype)
        if config.regularizer == "fsq":  # to the nearest codes
            indices = ops.fsq_codes_to_indices(latents.clamp(-1, 1), config.levels, dim=1)
            latents = ops.fsq_indices_to_codes(indices, config.levels, dim=1, dtype=parameter.dtype)
        if config.causal:
            yield from self.tokenizer.stream_decode(latents.split(chunk, 2), num_frames=num_frames)
        else:
            yield self.tokenizer.decode(latents, num_frames=num_frames)


def named(name: str, size: tuple[int, int, int] | None, num_classes: int | None) -> PipelineConfig:
    """Configuration of a published name: `latte-s/2` ... `latte-xl/8`, `goku-1b`, `goku-2b`, `goku-8b`, `stdit3-xl/2`,
    `stdit3-3b/2`. A Latte's size is part of its architecture: square, and fixed frames."""
    from vidkernels.models.transformers import goku, latte, stdit3

    lower = name.lower()
    if lower in goku.SIZES:
        return PipelineConfig("goku", _goku_values(lower), size=size or (13, 60, 108), shift=3.0)
    found = next((known for known in stdit3.NAMED if known.lower() == lower), None)
    if found is not None:
        depth, width, heads = stdit3.NAMED[found]
        return PipelineConfig(
            "stdit3",
            asdict(stdit3.STDiT3Config(depth=depth, hidden_size=width, num_heads=heads)),
            size=size or (15, 60, 106),
        )
    sizes = {
        f"latte-{letter}/{patch}".lower(): f"Latte-{letter}/{patch}"
        for letter in latte.SIZES
        for patch in latte.PATCHES
    }
    if lower not in sizes:
        expected = f"a folder, or one of {', '.join([*sizes, *goku.SIZES, *(n.lower() for n in stdit3.NAMED)])}"
        raise OptionError("--model", expected, repr(name))
    size = size or (16, 32, 32)
    if size[1] != size[2]:
        raise OptionError("--size", "equal height and width for a Latte", size[1:])
    config = replace(
        latte.LatteConfig.named(sizes[lower]), num_frames=size[0], input_size=size[1], num_classes=num_classes
    )
    return PipelineConfig("latte", asdict(config), size=size)


def _goku_values(name: str) -> dict[str, Any]:
    """A published Goku's configuration as a dict, without building the model."""
    from vidkernels.models.transformers import goku

    depth, width, heads = goku.SIZES[name]
    config = goku.GokuConfig(depth=depth, hidden_size=width, num_heads=heads)
    if name == "goku-1b":  # the pilot study: classes of ImageNet instead of text
        config = replace(config, text_channels=None, num_classes=1000)
    return asdict(config)


def build(config: PipelineConfig, weights: Path | None, seed: int | None, device: str, dtype: torch.dtype) -> Pipeline:
    """A pipeline with weights of a file, or random ones where a seed says so."""
    if weights is None and seed is None:
        raise OptionError(
            "--weights", "a checkpoint of the transformer", "none", "Or --random-weights 0 to try the command."
        )
    state = None if weights is None else _read(weights)
    if state is not None and config.kind == "latte":
        config = replace(config, model={**config.model, **_read_off(state, config.model)})
    made = KINDS[config.kind].from_config
    if state is not None:
        with torch.device("meta"):  # nothing is allocated nor drawn for what the file replaces
            model = made(config.model)
        _load(model, state, weights, device, dtype)
    else:
        torch.manual_seed(seed or 0)
        model = made(config.model)
        _fill_zeros(model)
    config = replace(config, model=asdict(model.config))  # with the values that a folder's file leaves out
    return Pipeline(config, model.eval().requires_grad_(False).to(device, dtype))


def _read_off(state: dict[str, Tensor], model: dict[str, Any]) -> dict[str, Any]:
    """What a Latte's file says that its name does not: how many classes, and whether it learned a variance."""
    found: dict[str, Any] = {}
    table, last = state.get("y_embedder.embedding_table.weight"), state.get("final_layer.linear.weight")
    if table is not None and table.ndim == 2:
        dropped = model.get("class_dropout_prob", 0.1) > 0  # the null label has a row of its own
        found["num_classes"] = table.shape[0] - dropped
    if last is not None and last.ndim == 2:
        single = model.get("patch_size", 2) ** 2 * model.get("in_channels", 4)
        found["learn_sigma"] = last.shape[0] != single
    return found


def load_folder(folder: Path, device: str, dtype: torch.dtype) -> Pipeline:
    """Read what `Pipeline.save` wrote, or a published transformer, see `_published`."""
    path = folder / "config.json"
    if not path.is_file():
        raise OptionError("--model", "a published name or a folder with config.json", str(folder))
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise OptionError("config.json", "a JSON file", str(path), f"{error}.") from error
    config = _published(values) or PipelineConfig.from_dict(values)
    pipeline = build(config, folder, None, device, dtype)
    channels = pipeline.config.model["in_channels"]
    if not {len(config.mean), len(config.std)} <= {0, channels}:
        expected = f"a number for each of the {channels} latent channels"
        raise OptionError("config.json: mean, std", expected, (len(config.mean), len(config.std)))
    if (folder / "tokenizer").is_dir():
        pipeline.tokenizer = VidTok.from_pretrained(folder / "tokenizer").eval().requires_grad_(False).to(device, dtype)
    return pipeline


def _published(values: Any) -> PipelineConfig | None:
    """Configuration of a folder as diffusers writes a `LatteTransformer3DModel`, and Open-Sora an `STDiT3`; None of others."""
    from vidkernels.models.transformers import latte_t2v, stdit3

    if not isinstance(values, dict):
        return None
    if values.get("_class_name") == "LatteTransformer3DModel":
        latte = latte_t2v.LatteT2VConfig.from_dict(values)
        return PipelineConfig(
            "latte_t2v", asdict(latte), size=(latte.video_length, latte.sample_size, latte.sample_size)
        )
    if values.get("model_type") == "STDiT3":
        return PipelineConfig("stdit3", asdict(stdit3.STDiT3Config.from_dict(values)), size=(15, 60, 106))
    return None


def _read(path: Path) -> dict[str, Tensor]:
    """A state dict; official training files hold the averaged weights under "ema", others under "model"."""
    return read_tensors(path, ("ema", "model", "state_dict"))


def _load(model: nn.Module, state: dict[str, Tensor], path: Path | None, device: str, dtype: torch.dtype) -> None:
    """Give a model without values those of a file, tensor by tensor: `state` is empty behind it, but for what nothing reads."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or (extra and not isinstance(model, LatteT2V)):
        raise ShapeError(
            "--weights", f"the {len(own)} tensors of this model", f"missing {missing[:3]}, extra {extra[:3]}", str(path)
        )
    for key, value in own.items():
        if state[key].shape != value.shape:
            expected = f"{key} {tuple(value.shape)}"
            raise ShapeError(
                "--weights", expected, tuple(state[key].shape), "Do --size and --frames fit these weights?"
            )
        if state[key].is_floating_point() != value.is_floating_point():
            expected = f"{key} of numbers like {value.dtype}"
            raise OptionError("--weights", expected, state[key].dtype, "The file is damaged or quantized.")
    taken: set[int] = set()
    values = {key: _as_copied(state.pop(key), like, device, dtype, taken) for key, like in own.items()}
    model.load_state_dict(values, assign=True)


def _as_copied(value: Tensor, like: Tensor, device: str, dtype: torch.dtype, taken: set[int]) -> Tensor:
    """A file's tensor as a copy into `like` and then to device and dtype gives it: rounded twice where the file has float64,
    contiguous, in memory of its own (`taken`: addresses of those before)."""
    kind = dtype if like.is_floating_point() else like.dtype
    if value.dtype != kind or kind.itemsize > like.dtype.itemsize:
        value = value.to(like.dtype).to(kind)
    value = value.detach().to(device).contiguous()
    storage = value.untyped_storage()
    if storage.nbytes() != value.nbytes or storage.data_ptr() in taken:  # a part of the file, or under two names in it
        value = value.clone()
    taken.add(value.untyped_storage().data_ptr())
    return value


def _fill_zeros(model: nn.Module) -> None:
    """Untrained transformers start as zero (adaLN-Zero); random weights are for trying, and shall show something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        size: latent (T, H, W).
        label: class of a class-conditional model; text: states [L, D] of a prompt; null_text: of the empty prompt.
        steps, method, guidance: None: the kind's own, see `DEFAULTS`. guidance 1 runs one branch.
        shift: of the rectified flow; None: the pipeline's, of STDiT3 the one of the video's size.
        fps, pixels: told to STDiT3: frames per second, (height, width) of the video.
    """

    size: tuple[int, int, int]
    label: int | None = None
    text: Tensor | None = None
    null_text: Tensor | None = None
    steps: int | None = None
    method: str | None = None
    guidance: float | None = None
    shift: float | None = None
    seed: int = 0
    fps: float = 24.0
    pixels: tuple[int, int] = field(default=(256, 256))


def completed(request: Request, pipeline: Pipeline) -> Request:
    """The request with every default filled in and checked against the model."""
    kind = pipeline.config.kind
    method, steps, guidance = DEFAULTS[kind]
    request = replace(
        request,
        method=request.method or method,
        steps=request.steps or steps,
        guidance=guidance if request.guidance is None else request.guidance,
        shift=pipeline.config.shift if request.shift is None and kind == "goku" else request.shift,
    )
    _check_numbers(request)
    if request.method not in METHODS[kind]:
        raise OptionError("--method", f"one of {', '.join(METHODS[kind])} for {kind}", request.method)
    if request.shift is not None and "euler" not in METHODS[kind]:
        raise OptionError("--shift", f"none: {kind} is not a rectified flow", request.shift)
    if request.label is not None and kind not in ("latte", "goku"):
        raise OptionError("--label", f"none: {kind} is conditioned on text", request.label)
    model = pipeline.config.model
    if model.get("num_classes") is None and kind in ("latte", "goku"):
        if request.label is not None:
            raise OptionError("--label", "none: the model is not class-conditional", request.label)
    elif (
        kind in ("latte", "goku")
        and not 0 <= (request.label if request.label is not None else -1) < model["num_classes"]
    ):
        raise OptionError("--label", f"0 to {model['num_classes'] - 1}", request.label)
    width = model.get("text_channels" if kind == "goku" else "caption_channels")
    if kind == "latte" or width is None:
        if request.text is not None:
            raise OptionError("--text", "none: the model takes no text", "a file")
        unconditional = model.get("num_classes") is None
        return replace(request, guidance=1.0) if unconditional else request
    if request.text is None or request.text.shape[-1] != width:
        got = None if request.text is None else tuple(request.text.shape)
        raise OptionError("--text", f"a safetensors file with `text` [L, {width}]", got)
    if request.guidance != 1 and kind != "stdit3":
        if request.null_text is None:
            raise OptionError("--text", "also `null`, the states of the empty prompt", "none", "Or --guidance 1.")
        if request.null_text.shape[-1] != width:
            raise OptionError("--text", f"`null` [M, {width}]", tuple(request.null_text.shape))
    return request


def _check_numbers(request: Request) -> None:
    """Numbers that would make a video of nothing, or none."""
    if request.guidance is not None and not math.isfinite(request.guidance):
        raise OptionError("--guidance", "a finite number", request.guidance)
    for name, value in (("--shift", request.shift), ("--fps", request.fps)):
        if value is not None and not 0 < value < math.inf:
            raise OptionError(name, "a positive number", value)
    if not -(2**63) <= request.seed < 2**63:
        raise OptionError("--seed", "a number of 64 bits", request.seed)
