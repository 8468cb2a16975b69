# SPDX-License-Identifier: Apache-2.0
"""Configurations and arguments of the transformers that do not fit, refused by name before anything is built or computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from vidkernels.errors import DTypeError, OptionError
from vidkernels.ops._checks import check_shape, check_whole, is_unread

T = TypeVar("T")


def check_mapping(kind: type, values: object) -> None:
    """What configures a model where it is neither a name nor a configuration."""
    if not isinstance(values, Mapping):
        raise OptionError("config", f"a name, a mapping or a {kind.__name__}", type(values).__name__)


def configured(kind: type[T], values: Mapping[str, Any], **changes: Any) -> T:
    """A configuration from keys and values, as JSON holds them: lists become tuples, unknown keys are refused."""
    check_mapping(kind, values)
    values = {**values, **changes}
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise OptionError("config", f"keys among {sorted(known)}", unknown, "Remove or rename them.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def check_counts(config: object, *names: str) -> None:
    """Attributes of a configuration that count something: whole numbers from 1."""
    for name in names:
        check_whole(name, getattr(config, name))


def check_optional_counts(config: object, *names: str) -> None:
    """As `check_counts`, of attributes that may be None."""
    check_counts(config, *(name for name in names if getattr(config, name) is not None))


def check_numbers(config: object, *names: str) -> None:
    """Attributes of a configuration that multiply something: finite numbers above 0."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) < math.inf:
            raise OptionError(name, "a positive number", repr(value))


def check_dropout(config: object, name: str) -> None:
    """A share of conditions that training drops."""
    value = getattr(config, name)
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise OptionError(name, "a share from 0 to 1", repr(value))


def check_patch(patch: object) -> None:
    """A patch of three sides."""
    if not isinstance(patch, tuple) or len(patch) != 3 or not all(isinstance(side, int) and side > 0 for side in patch):
        raise OptionError("patch_size", "three sides (t, h, w) of at least 1", patch)


def check_width(
    hidden_size: int, num_heads: int, *, multiple: int, even_heads: bool = False, name: str = "hidden_size"
) -> None:
    """Width of the tokens: whole heads, and a multiple of what the position tables divide it by.

    Args:
        multiple: 4 for two axes of sines and cosines. even_heads: rotary positions turn pairs of a head's channels.
    """
    if hidden_size % num_heads or (even_heads and hidden_size // num_heads % 2):
        heads = "an even width for each of" if even_heads else "a multiple of"
        raise OptionError(name, f"{heads} num_heads={num_heads}", hidden_size)
    if hidden_size % multiple:
        raise OptionError(name, f"a multiple of {multiple}", hidden_size, "The position table halves it.")


def check_labels(name: str, labels: Tensor, shape: tuple[int, ...], rows: int) -> None:
    """Labels of a shape, below the rows of their table; values are looked at on a CPU, where nothing waits for that."""
    if labels.dtype not in (torch.int64, torch.int32):
        raise DTypeError(name, "int64 or int32 labels", labels.dtype, f"Convert them: {name}.long().")
    check_shape(name, labels, shape, "one label each")
    if not labels.numel() or is_unread(labels):
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= rows:
        raise OptionError(name, f"labels 0 to {rows - 1}", f"{low} to {high}", "The null label is the last one.")
