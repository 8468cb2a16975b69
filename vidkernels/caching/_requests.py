# SPDX-License-Identifier: Apache-2.0
"""Several requests in one batch, each with its own schedule: a step runs the model once for the requests that compute and
once, without its blocks, for the others.

Rows of the model's batch are branch-major, as guidance makes them: cat[prompts of all requests, null of all requests].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidkernels.errors import ShapeError

_ATTRIBUTE = "_vidkernels_cache"


@dataclass(frozen=True)
class Members:
    """Requests that share one forward.

    Attributes:
        requests: their numbers.
        branches: rows of the model's batch per request.
        total: requests of the whole batch; 1 leaves tensors as they are.
    """

    requests: tuple[int, ...]
    branches: int = 1
    total: int = 1


def split(x: Tensor, members: Members) -> list[Tensor]:
    """Rows of each member, copied: [branches * members * k, ...] -> [branches * k, ...] each. k > 1 where a model folds
    frames or positions into the batch."""
    if members.total == 1:
        return [x]
    rows = x.unflatten(0, (members.branches, len(members.requests), -1))
    return [rows[:, i].flatten(0, 1).clone() for i in range(len(members.requests))]


def join(parts: Sequence[Tensor], members: Members) -> Tensor:
    """The inverse of `split`."""
    if members.total == 1:
        return parts[0]
    rows = [part.unflatten(0, (members.branches, -1)) for part in parts]
    return torch.stack(rows, 1).flatten(0, 2)


def rows_of(members: Members) -> list[int]:
    """Rows of the model's batch that belong to the members."""
    return [branch * members.total + request for branch in range(members.branches) for request in members.requests]


def _taken(value: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Those rows as views of consecutive ones. An index in a tensor would be copied to a GPU, which is waited for."""
    starts = [i for i, row in enumerate(rows) if not i or row != rows[i - 1] + 1]
    ends = [*starts[1:], len(rows)]
    return [value[rows[start] : rows[start] + end - start] for start, end in zip(starts, ends, strict=True)]


def select(value: Any, members: Members) -> Any:
    """A model's argument for some requests: of tensors with one row per row of the batch, or per request, theirs."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    if value.shape[0] == members.branches * members.total:
        return torch.cat(_taken(value, rows_of(members)))
    if value.shape[0] == members.total:
        return torch.cat(_taken(value, members.requests))
    return value


def merge(outputs: Sequence[Any], groups: Sequence[Members]) -> Any:
    """Outputs of the groups in the order of the whole batch: tensors, tuples of them, or diffusers' output classes."""
    first = outputs[0]
    if isinstance(first, Tensor):
        order = [row for members in groups for row in rows_of(members)]
        places = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(_taken(torch.cat(list(outputs)), places))
    if isinstance(first, dict):
        return type(first)(**{key: merge([output[key] for output in outputs], groups) for key in first})
    if isinstance(first, (tuple, list)):
        return type(first)(merge(parts, groups) for parts in zip(*outputs, strict=True))
    return first


def branches_of(args: tuple[Any, ...], kwargs: dict[str, Any], requests: int) -> int:
    """Rows of the batch per request, from the model's first tensor."""
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim), None)
    rows = 0 if first is None else first.shape[0]
    if not rows or rows % requests:
        raise ShapeError("batch", f"a multiple of requests={requests}", rows, "cat[prompts, nulls] of all requests.")
    return rows // requests


class CachedModel:
    """Mixed in front of the class of a model whose requests have schedules of their own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        controller, _ = getattr(self, _ATTRIBUTE)
        branches = branches_of(args, kwargs, controller.requests)
        groups = controller.groups(branches, args, kwargs)
        outputs = []
        for index, members in enumerate(groups):
            controller.start_group(members, index + 1 == len(groups))
            arguments = [select(value, members) for value in args]
            named = {name: select(value, members) for name, value in kwargs.items()}
            outputs.append(super().__call__(*arguments, **named))  # type: ignore[misc]
        return outputs[0] if len(groups) == 1 else merge(outputs, groups)
