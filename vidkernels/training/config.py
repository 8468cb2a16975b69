# SPDX-License-Identifier: Apache-2.0
"""What a training run is: numbers only, frozen, written into every checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from vidkernels.errors import OptionError
from vidkernels.ops._checks import check_option

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARALLEL = ("none", "ddp", "fsdp")
DECAYS = ("constant", "cosine")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A dataclass from parsed JSON: lists become tuples, unknown keys are refused."""
    known = {f.name for f in fields(cls)}
    if not isinstance(values, Mapping):
        raise OptionError(where, f"an object with keys among {sorted(known)}", values)
    unknown = sorted(set(values) - known)
    if unknown:
        raise OptionError(where, f"keys among {sorted(known)}", unknown, "Remove or rename them.")
    required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    if required - set(values):
        raise OptionError(where, f"the keys {sorted(required)}", sorted(values), "They have no default.")
    hints = get_type_hints(cls)
    for name, value in values.items():
        if not _is_of(value, hints[name]):
            kind = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            raise OptionError(f"{where}.{name}", str(kind).replace("typing.", ""), repr(value))
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _is_of(value: object, hint: Any) -> bool:
    """Whether a value of parsed JSON is of a field's type; whole numbers serve as floats, lists as tuples."""
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_is_of(value, one) for one in arguments)
    if get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(kinds) == len(value) and all(_is_of(x, kind) for x, kind in zip(value, kinds, strict=True))
    if get_origin(hint) is not None:
        return isinstance(value, Mapping) == issubclass(get_origin(hint), Mapping)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def check_range(name: str, value: float | None, low: float, high: float = math.inf) -> None:
    """A finite number from `low` to `high`; None is for settings that may be absent."""
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        room = "a finite number" if low == -math.inf else f"a number from {low}"
        raise OptionError(name, room if high == math.inf else f"{room} to {high}", value)


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW for one module.

    Attributes:
        learning_rate: after the warm-up.
        betas, weight_decay: AdamW's; without weight decay it is Adam.
        warmup: steps of linear rise from 0.
        decay: "constant", or "cosine" down to `final_fraction` of the rate at the last step.
        clip: largest norm of the gradient; None clips nothing.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 0
    decay: str = "constant"
    final_fraction: float = 0.0
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        check_option("decay", self.decay, DECAYS)
        if self.learning_rate <= 0 or self.warmup < 0:
            raise OptionError("learning_rate, warmup", "positive, not negative", (self.learning_rate, self.warmup))
        check_range("learning_rate", self.learning_rate, 0)
        check_range("weight_decay", self.weight_decay, 0)
        check_range("final_fraction", self.final_fraction, 0, 1)
        check_range("clip", self.clip, 0)
        if self.clip == 0:
            raise OptionError("clip", "a positive number, or None to clip nothing", 0, "0 would stop the training.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise OptionError("betas", "two numbers of at least 0 and below 1", self.betas)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: a function of the step alone, so that a resumed run needs no scheduler's state."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.decay == "constant":
            return self.learning_rate
        progress = min((step - self.warmup) / max(steps - self.warmup, 1), 1.0)
        share = self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * share


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run: steps, batch, precision, parallelism, checkpoints.

    Attributes:
        steps: optimizer steps of the whole run.
        batch: samples of one optimizer step, over all processes and micro-batches: it does not change with their number.
        accumulate: micro-batches per step.
        seed: of everything random. Order of the data, and random numbers of each step and sample, follow from it.
        optimizers: by the name of the trained module; "default" serves the others.
        precision: of autocast; parameters and optimizer stay in float32.
        ema: decay of the averaged weights, or None.
        parallel: "none", "ddp" or "fsdp" (FSDP2, `fully_shard`).
        save_every, keep: steps between checkpoints, and how many are kept (0: all).
        log_every, validate_every: steps between lines of `metrics.jsonl`; 0 never validates.
        workers: processes that load data.
        max_skipped: so many steps in a row without a finite gradient end the run (float16: 16 more, in which the loss scale falls).
    """

    steps: int
    batch: int = 1
    accumulate: int = 1
    seed: int = 0
    optimizers: Mapping[str, OptimizerConfig] = field(default_factory=lambda: {"default": OptimizerConfig()})
    precision: str = "float32"
    ema: float | None = 0.999
    parallel: str = "none"
    save_every: int = 100
    keep: int = 2
    log_every: int = 10
    validate_every: int = 0
    workers: int = 0
    max_skipped: int = 10

    def __post_init__(self) -> None:
        check_option("precision", self.precision, tuple(PRECISIONS))
        check_option("parallel", self.parallel, PARALLEL)
        for name in ("steps", "batch", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise OptionError(name, "at least 1", getattr(self, name))
        for name in ("keep", "validate_every", "workers"):
            check_range(name, getattr(self, name), 0)
        check_range("max_skipped", self.max_skipped, 1)
        check_range("seed", self.seed, -(2**63), 2**63 - 1)
        if self.ema is not None and not 0 < self.ema < 1:
            raise OptionError("ema", "a decay between 0 and 1, or None", self.ema)
        if self.precision == "float16" and self.parallel == "fsdp":
            raise OptionError(
                "precision", "bfloat16 or float32 with fsdp", self.precision, "Loss scaling is not shared."
            )

    @property
    def dtype(self) -> torch.dtype:
        """dtype of autocast."""
        return PRECISIONS[self.precision]

    def optimizer(self, name: str) -> OptimizerConfig:
        """Settings of one trained module."""
        return self.optimizers.get(name) or self.optimizers.get("default") or OptimizerConfig()

    def micro_batch(self, world: int) -> int:
        """Samples of one process in one micro-batch."""
        share, rest = divmod(self.batch, world * self.accumulate)
        if rest or not share:
            expected = f"a multiple of {world} processes x {self.accumulate} micro-batches"
            raise OptionError("batch", expected, self.batch, "The batch counts the samples of all processes.")
        return share

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`; unknown keys are refused."""
        if not isinstance(values, Mapping):
            raise OptionError("train", "an object", values)
        values = dict(values)
        optimizers = values.pop("optimizers", None)
        if optimizers is not None:
            if not isinstance(optimizers, Mapping):
                raise OptionError("train.optimizers", "an object with the settings of each module", optimizers)
            values["optimizers"] = {
                name: from_mapping(OptimizerConfig, settings, f"optimizers.{name}")
                for name, settings in optimizers.items()
            }
        return from_mapping(cls, values, "train")


def read_json(path: str | Path) -> dict[str, Any]:
    """A configuration file."""
    path = Path(path)
    if not path.is_file():
        raise OptionError("config", "an existing JSON file", str(path))
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # also bytes that are no text, and brackets without end
        raise OptionError("config", "a JSON file", str(path), f"{error}.") from error
    if not isinstance(values, dict):
        raise OptionError("config", "a JSON object", type(values).__name__)
    return values
