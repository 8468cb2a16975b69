# SPDX-License-Identifier: Apache-2.0
"""Inputs shared by the adaLN tests: every way in which a token finds its row of modulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from helpers import assert_gradients_within_promise

from vidkernels import ops
from vidkernels._reference import adaln_zero as reference

Function = Callable[..., Any]


@dataclass(frozen=True)
class Form:
    """A shape of x (without C), a shape of the tables (without C), and the integers that index the rows."""

    tokens: tuple[int, ...]
    table: tuple[int, ...]
    cu_seqlens: tuple[int, ...] | None = None
    rows: tuple[Any, ...] | None = None

    def options(self, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """`cu_seqlens=` or `rows=`, if the form has one."""
        named = {"cu_seqlens": self.cu_seqlens, "rows": self.rows}
        return {
            name: torch.tensor(value, dtype=torch.int32, device=device)
            for name, value in named.items()
            if value is not None
        }


FORMS = {
    "per_sample": Form((2, 37), (2,)),
    "per_sample_3d": Form((3, 5), (3, 1)),
    "one_row": Form((2, 9), ()),
    "per_frame": Form((2, 12), (2, 4)),
    "per_frame_shared": Form((2, 12), (1, 4)),
    "long_frames": Form((1, 150), (1, 2)),
    "per_token": Form((2, 7), (2, 7)),
    "packed": Form((75,), (6,), cu_seqlens=(0, 0, 7, 7, 8, 52, 75)),
    "packed_last_empty": Form((1, 20), (3,), cu_seqlens=(0, 3, 20, 20)),
    "index_of_token": Form((2, 6), (4,), rows=((3, 0, 0, 1, 3, 3), (1, 1, 0, 3, 0, 1))),
    "index_of_frame": Form((2, 12), (4,), rows=((3, 0, 3), (1, 1, 0))),
    "index_packed": Form((8,), (2,), rows=(1, 0, 1, 1)),
    "video": Form((2, 3, 2, 4), (2,)),
}


def draw(
    form: Form, channels: int, dtype: torch.dtype, table_dtype: torch.dtype | None = None, device: Any = "cpu"
) -> dict[str, torch.Tensor]:
    """Random residual, branch, gate, shift, scale, weight and bias of a form."""
    table_dtype = table_dtype or dtype

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, channels, dtype=torch.float32).to(device=device, dtype=dtype)

    return {
        "residual": normal(*form.tokens) + 0.5,
        "branch": normal(*form.tokens),
        "gate": normal(*form.table, dtype=table_dtype),
        "shift": normal(*form.table, dtype=table_dtype),
        "scale": normal(*form.table, dtype=table_dtype),
        "weight": normal(dtype=table_dtype),
        "bias": normal(dtype=table_dtype),
    }


def chain(function: Function, names: Sequence[str], **options: Any) -> Function:
    """`function` with the named tensors as positional arguments in this order, the others None."""

    def call(*tensors: torch.Tensor) -> Any:
        given = dict(zip(names, tensors, strict=True))
        positional = [given.pop(name, None) for name in ("residual", "branch", "gate", "shift", "scale")]
        return function(*positional, **given, **options)

    return call


def modulate(function: Function, names: Sequence[str], **options: Any) -> Function:
    """As `chain`, for adaln_modulate."""

    def call(*tensors: torch.Tensor) -> Any:
        given = dict(zip(names, tensors, strict=True))
        return function(given.pop("residual"), given.pop("shift", None), given.pop("scale", None), **given, **options)

    return call


def gated(function: Function, names: Sequence[str], **options: Any) -> Function:
    """As `chain`, for gate_residual."""

    def call(*tensors: torch.Tensor) -> Any:
        given = dict(zip(names, tensors, strict=True))
        return function(given["residual"], given["branch"], given.get("gate"), **options)

    return call


# name of the op -> (how to call it, the tensors it takes)
CALLS: dict[str, tuple[Function, tuple[str, ...]]] = {
    "adaln_zero": (chain, ("residual", "branch", "gate", "shift", "scale", "weight", "bias")),
    "adaln_modulate": (modulate, ("residual", "shift", "scale", "weight", "bias")),
    "gate_residual": (gated, ("residual", "branch", "gate")),
}


def reference_of(op: str) -> Function:
    """The law's function of that name."""
    return getattr(reference, op)


def check(
    op: str, form: Form, channels: int, dtype: torch.dtype, backend: str, *, table_dtype: torch.dtype | None = None,
    missing: tuple[str, ...] = (), device: Any = "cpu", **options: Any,
) -> None:  # fmt: skip
    """Outputs and every gradient of one call keep the promise."""
    wrap, names = CALLS[op]
    names = tuple(name for name in names if name not in missing)
    if op != "gate_residual":
        options.setdefault("norm", "layer")
    tensors = draw(form, channels, dtype, table_dtype, device)
    indices = form.options(device)
    ours = wrap(getattr(ops, op), names, backend=backend, **options, **indices)
    law = wrap(reference_of(op), names, **options, **indices)
    assert_gradients_within_promise(ours, law, [tensors[name] for name in names], names=names)
